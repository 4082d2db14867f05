"""The stage `tasks`: the slow and obvious, the harness itself on the same examples, resuming, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from conftest import WORDS
from miniplm import artifact
from miniplm.errors import CorpusError, MissingExtraError, ModelError, RecipeError, ScoreError, TokenizerError
from miniplm.evaluation import local_tasks, tasks
from miniplm.evaluation.loss import ALL, Row
from miniplm.evaluation.tasks import PAPER_TASKS, TaskResults, evaluate_tasks, identity, open_tasks, task_names
from miniplm.models.load import model_fingerprint, new_model
from miniplm.packing import tokenizer as tokenizers
from miniplm.recipe import Compute, GivenModel, ServerModel, TaskSettings, VllmModel

REAL = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
CPU = Compute(device="cpu", score_tokens=60)  # a few requests a batch
CONFIG = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
HOSTILE = "a <|endoftext|> {{ 7 * 7 }} \x1b[31m \x00 ../../../tmp/x ' \" \\ 模型"

HUB: dict[str, dict[str, list[dict[str, Any]]]] = {
    "hellaswag": {
        "validation": [
            {"activity_label": "Teaching", "ctx_a": "A teacher reads.", "ctx_b": "the student",
             "endings": ["learns [title] a token.", "drops  the corpus.", "is text.", "keeps"], "label": "1"},
            {"activity_label": "Reading", "ctx_a": "The model", "ctx_b": "",
             "endings": ["reads.", "scores a hard text and keeps it.", "drops", HOSTILE], "label": "3"},
        ]
    },
    "piqa": {
        "validation": [
            {"goal": "keep a hard text", "sol1": "score it", "sol2": "drop the easy text of the corpus", "label": 1},
            {"goal": HOSTILE, "sol1": "a", "sol2": HOSTILE, "label": 0},
            {"goal": "read", "sol1": "token", "sol2": "model", "label": 0},
        ]
    },
    "arc_easy": {
        "test": [
            {"id": "a", "question": "What learns?", "choices": {"text": ["a text", "the student", "a token"],
             "label": ["A", "B", "C"]}, "answerKey": "B"},
            {"id": "b", "question": "Which is easy?", "choices": {"text": ["hard", "easy"], "label": ["1", "2"]},
             "answerKey": "2"},
        ]
    },
    "lambada_openai": {
        "test": [
            {"text": "the teacher reads a text and the student learns the token"}, {"text": f"{HOSTILE} end"},
            {"text": "the model keeps the hard text and drops"},
        ]
    },
    "winogrande": {
        "validation": [
            {"sentence": "The model scores the text because _ is hard.", "option1": "the model", "option2": "the text",
             "answer": "2"},
            {"sentence": "A student reads and _", "option1": "learns", "option2": "drops", "answer": "1"},
        ]
    },
}  # fmt: skip
SCIQ = [
    {"question": "What learns?", "correct_answer": "the student", "distractor1": "a text", "distractor2": "a token",
     "distractor3": "it", "support": "The student reads."},
    {"question": "What is hard?", "correct_answer": "the text", "distractor1": "it", "distractor2": "a token",
     "distractor3": "no", "support": ""},
]  # fmt: skip


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> GivenModel:
    """A tiny random model with a tokenizer trained here."""
    folder = tmp_path_factory.mktemp("model")
    new_model({**CONFIG, "eos_token_id": 0}, seed=1).save_pretrained(folder)
    tokenizers.train([" ".join(WORDS[i % len(WORDS)] for i in range(4000))] * 2, 270).save(folder)
    return GivenModel(model=str(folder))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The tasks' folder."""
    for name, splits in HUB.items():
        for split, records in splits.items():
            write_lines(tmp_path / "data" / name / f"{split}.jsonl", records)
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def ask(given: GivenModel, data: Path | None, out: Path, names: Any = tuple(HUB), **more: Any) -> TaskResults:
    settings = TaskSettings(tasks=list(names), tasks_data=None if data is None else str(data), dtype="float32", **more)
    return evaluate_tasks(given, settings, out, identity(model_fingerprint(given), settings), CPU)


def samples(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "raw" / f"{name}.samples.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != artifact.PROVENANCE
    }


# the slow and obvious


def prompts(name: str, doc: dict[str, Any]) -> list[tuple[str, str]]:
    """Context and continuations of an example, as the harness's YAML files have them."""
    if name == "hellaswag":

        def clean(text: str) -> str:
            return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

        query = clean(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
        return [(query, f" {clean(ending)}") for ending in doc["endings"]]
    if name == "piqa":
        return [(f"Question: {doc['goal']}\nAnswer:", f" {solution}") for solution in (doc["sol1"], doc["sol2"])]
    if name == "arc_easy":
        return [(f"Question: {doc['question']}\nAnswer:", f" {choice}") for choice in doc["choices"]["text"]]
    if name == "lambada_openai":
        context, _, last = doc["text"].rpartition(" ")
        return [(context, f" {last}")]
    begin, _, rest = doc["sentence"].partition("_")
    return [(begin + option, f" {rest.strip()}") for option in (doc["option1"], doc["option2"])]


@torch.no_grad()
def by_hand(given: GivenModel, context: str, continuation: str) -> tuple[float, bool]:
    """One request at a time, in float32 with the logarithm in float64; text is never a control token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    encode = tokenizers.load(given.model).encode
    spaces = len(context) - len(context.rstrip())
    kept = len(encode([context[: len(context) - spaces]])[0]) if context else 1
    whole = torch.tensor([([] if context else [0]) + encode([context + continuation])[0].tolist()])
    logp = model(whole).logits[0, :-1].double().log_softmax(-1)
    picked = logp.gather(1, whole[0, 1:, None])[kept - 1 :, 0]
    return picked.sum().item(), bool((logp.argmax(-1) == whole[0, 1:])[kept - 1 :].all())


def test_log_likelihoods_are_those_of_the_slow_and_obvious(
    given: GivenModel, data: Path, tmp_path: Path, no_network: None
) -> None:
    ask(given, data, tmp_path / "out")
    for name, splits in HUB.items():
        found = samples(tmp_path / "out", name)
        (docs,) = splits.values()
        assert [sample["doc_id"] for sample in found] == list(range(len(docs)))
        for sample, doc in zip(found, docs, strict=True):
            expected = [by_hand(given, *prompt) for prompt in prompts(name, doc)]
            assert sample["logp"] == pytest.approx([logp for logp, _ in expected], rel=2e-6), (name, doc)
            assert sample["greedy"] == [greedy for _, greedy in expected]


def test_metrics_average_and_errors_are_those_of_a_count_by_hand(given: GivenModel, data: Path, tmp_path: Path) -> None:
    results = ask(given, data, tmp_path / "out")
    expected = []
    for name, metric in (
        ("hellaswag", "acc_norm"), ("piqa", "acc_norm"), ("arc_easy", "acc_norm"), ("lambada_openai", "acc"),
        ("winogrande", "acc"),
    ):  # fmt: skip
        (docs,) = HUB[name].values()
        right = []
        for sample, doc in zip(samples(tmp_path / "out", name), docs, strict=True):
            if name == "lambada_openai":
                right.append(sample["greedy"] == [True])
                continue
            lengths = [len(continuation) - 1 for _, continuation in prompts(name, doc)]
            scores = [v / n if metric == "acc_norm" else v for v, n in zip(sample["logp"], lengths, strict=True)]
            right.append(scores.index(max(scores)) == sample["gold"])
            assert sample[metric] == right[-1]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / (len(right) - 1))
        row = results.value(name)
        assert (row.metric, row.n, row.source) == (metric, len(right), ALL)
        assert row.value == pytest.approx(share)
        assert row.standard_error == pytest.approx(error)
        expected.append((share, error))
    mean = results.value("average")
    assert (mean.metric, mean.n) == ("accuracy", 5)
    assert mean.value == pytest.approx(sum(share for share, _ in expected) / 5)
    assert mean.standard_error == pytest.approx(math.sqrt(sum(error**2 for _, error in expected)) / 5)
    with pytest.raises(KeyError):
        results.value("boolq")


@pytest.mark.parametrize("shots", [0, 1])
def test_results_are_those_of_the_harness_on_the_hubs_examples(
    given: GivenModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: int
) -> None:
    """Log-likelihoods to the last digits only: matrices are not of the same shapes, and sums not of the same precision.

    Ours batches by tokens, has the head only where an answer is, and adds an answer's tokens in float64; the harness
    takes so many rows at a time, has the head everywhere, and adds in float32. In the same shapes, and without a sum,
    the bits are the same: the next test.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    plain = {  # of the Hub, and without text that its tokenizer would take for a control token
        name: {split: [doc for doc in docs if HOSTILE not in json.dumps(doc, ensure_ascii=False)
                       and "endoftext" not in json.dumps(doc)] for split, docs in splits.items()}
        for name, splits in HUB.items()
    }  # fmt: skip
    for name, splits in plain.items():
        for split, word in (("train", "some"), ("validation", "no")):  # like the others, but not the same
            docs = json.dumps(next(iter(splits.values()))).replace("the", word).replace("Which", word)
            splits.setdefault(split, json.loads(docs) * 2)
        for split, docs in splits.items():
            write_lines(data / name / f"{split}.jsonl", docs)
    ask(given, data, tmp_path / "out", shots=shots)

    def load_dataset(path: str, **_: Any) -> datasets.DatasetDict:
        name = next(n for n in HUB if n.split("_")[0] in path or (n == "arc_easy" and path == "allenai/ai2_arc"))
        return datasets.DatasetDict({s: datasets.Dataset.from_list(docs) for s, docs in plain[name].items()})

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    folders = [
        Path(lm_eval.__file__).parent / "tasks" / f for f in ("hellaswag", "piqa", "arc", "lambada", "winogrande")
    ]
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=given.model, tokenizer=PreTrainedTokenizerFast.from_pretrained(given.model), device="cpu",
             dtype="float32", batch_size=3),
        tasks=list(HUB), num_fewshot=shots, bootstrap_iters=1000,
        task_manager=TaskManager(include_defaults=False, include_path=folders),
    )  # fmt: skip
    for name in HUB:
        ours = json.loads((tmp_path / "out" / "raw" / f"{name}.json").read_text())["harness"]
        for key, value in theirs["results"][name].items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ours["results"][name][key] == expected, (name, key)
        assert ours["versions"][name] == theirs["versions"][name]
        for mine, its in zip(samples(tmp_path / "out", name), theirs["samples"][name], strict=True):
            assert mine["logp"] == pytest.approx([answer[0] for answer in its["filtered_resps"]], rel=2e-6)
            for key in ("doc_id", "doc_hash", "prompt_hash"):
                assert mine[key] == its[key], (name, key)
            assert mine["gold"] == (its["target"] if name != "winogrande" else int(its["doc"]["answer"]) - 1)


def test_in_the_same_shapes_a_tokens_log_likelihood_has_the_bits_of_the_harness(
    given: GivenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from miniplm.evaluation.harness_model import language_model

    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)
    theirs = HFLM(pretrained=given.model, tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1)
    ours = language_model(given, "float32", Compute(device="cpu", score_tokens=1))  # one row a batch
    monkeypatch.setattr(ours, "_keeps", False)  # the head everywhere
    encode = tokenizers.load(given.model).encode
    texts = ["".join(one) for name in HUB for docs in HUB[name].values() for doc in docs for one in prompts(name, doc)]
    requests = [(("", str(number)), ids[:-1], ids[-1:]) for number, ids in enumerate(x.tolist() for x in encode(texts))]
    found, expected = (lm._loglikelihood_tokens(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert len(requests) > 20
    assert found == expected


# what is on disk


def test_what_is_on_disk_is_what_is_returned(given: GivenModel, data: Path, tmp_path: Path) -> None:
    results = ask(given, data, tmp_path / "out")
    assert open_tasks(tmp_path / "out") == results
    assert [Row(**entry) for entry in json.loads((tmp_path / "out" / "results.json").read_text())] == list(results.rows)
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text())))
    assert [(line["dataset"], float(line["value"])) for line in table] == [(r.dataset, r.value) for r in results.rows]
    assert [row.dataset for row in results.rows] == [*HUB, "average"]
    assert list(artifact.verify(tmp_path / "out")) == []
    for name in HUB:
        written = (tmp_path / "out" / "raw" / f"{name}.json").read_text()
        assert str(tmp_path) not in written
        assert "site-packages" not in written
        for split, sha in json.loads(written)["files"].items():
            assert sha == artifact.file_sha256(data / name / f"{split}.jsonl")


def test_interrupted_between_tasks_it_goes_on_and_the_bytes_are_the_same(
    given: GivenModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miniplm.evaluation import harness

    ask(given, data, tmp_path / "undisturbed")
    run, asked = harness.run, []

    def dies_at_the_third(lm: Any, task: Any, limit: Any) -> Any:
        asked.append(lm.label)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run(lm, task, limit)

    monkeypatch.setattr(harness, "run", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ask(given, data, tmp_path / "out")
    ask(given, data, tmp_path / "out")
    assert asked == [*list(HUB)[:3], *list(HUB)[2:]]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    ask(given, data, tmp_path / "out")
    assert len(asked) == 6


def test_batches_change_no_more_than_the_last_digits(given: GivenModel, data: Path, tmp_path: Path) -> None:
    settings = TaskSettings(tasks=["hellaswag", "piqa"], tasks_data=str(data), dtype="float32")
    what = identity(model_fingerprint(given), settings)
    for budget in (1, 10_000):
        evaluate_tasks(given, settings, tmp_path / str(budget), what, Compute(device="cpu", score_tokens=budget))
    for name in settings.tasks:
        for one, all_ in zip(samples(tmp_path / "1", name), samples(tmp_path / "10000", name), strict=True):
            assert one["logp"] == pytest.approx(all_["logp"], rel=2e-6)


def test_the_identity_is_of_contents_not_of_paths(given: GivenModel, data: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, **more: Any) -> str:
        names = more.pop("tasks", ["piqa", "arc_easy"])
        return identity("m", TaskSettings(tasks=names, tasks_data=str(folder), **more)).fingerprint

    usual = fingerprint(data)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert fingerprint(moved) == usual
    write_lines(moved / "hellaswag" / "validation.jsonl", [])
    assert fingerprint(moved) == usual  # it is not asked for
    write_lines(moved / "piqa" / "validation.jsonl", HUB["piqa"]["validation"][:2])
    assert fingerprint(moved) != usual
    different = [fingerprint(data, shots=1), fingerprint(data, limit=1), fingerprint(data, dtype="float32")]
    assert len({usual, *different, fingerprint(data, tasks=["piqa"])}) == 5


# which tasks


def test_paper_stands_for_nine_tasks_less_those_that_cannot_be_had(data: Path) -> None:
    assert len(PAPER_TASKS) == 9
    assert task_names(TaskSettings(tasks=["paper"])) == PAPER_TASKS[:8]
    here = TaskSettings(tasks=["paper", "piqa"], tasks_data=str(data))
    assert task_names(here) == ("hellaswag", "lambada_openai", "winogrande", "arc_easy", "piqa")
    assert tasks.missing_tasks(here) == ("openbookqa", "arc_challenge", "social_iqa", "storycloze_2018")


def test_what_is_missing_is_said(given: GivenModel, data: Path, tmp_path: Path) -> None:
    results = ask(given, data, tmp_path / "out", ["paper"], limit=1)
    assert results.value("average").n == 5
    assert "without storycloze_2018, whose examples are not there" in str(results)
    assert str(results).splitlines()[6] == results.remarks[0] == "1 questions each"
    assert artifact.read(tmp_path / "out").counts["missing"] == list(results.missing)


def test_the_papers_average_is_of_its_tasks_whatever_else_is_asked(
    given: GivenModel, data: Path, tmp_path: Path
) -> None:
    write_lines(data / "sciq" / "test.jsonl", SCIQ)
    paper, more, plain = (
        ask(given, data, tmp_path / str(number), names)
        for number, names in enumerate((["paper"], ["sciq", "paper"], ["sciq", *HUB]))
    )
    assert more.value("average") == paper.value("average")
    assert more.notes["average"] == "of the paper's tasks alone"
    assert more.rows[0].dataset == "sciq"
    accuracies = [row.value for row in plain.rows if row.dataset != "average"]
    assert (plain.value("average").n, plain.value("average").value) == (6, pytest.approx(sum(accuracies) / 6))
    assert "average" not in plain.notes
    recipes = [artifact.read(tmp_path / str(number)).identity.recipe for number in range(3)]
    assert ["averaged" in recipe for recipe in recipes] == [False, True, False]
    open_tasks(tmp_path / "1")


def test_the_questions_of_each_task_are_said_where_a_limit_was_given(
    given: GivenModel, data: Path, tmp_path: Path
) -> None:
    results = ask(given, data, tmp_path / "out", ["piqa", "hellaswag"], limit=3)
    assert (results.limit, results.remarks) == (3, ("3 questions each (hellaswag 2)",))
    assert ask(given, data, tmp_path / "all", ["piqa"]).remarks == ()


def test_a_task_without_examples_is_refused_with_what_is_there(data: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)arc_challenge has no files in .*found +files of arc_easy, hella"):
        task_names(TaskSettings(tasks=["hellaswag", "arc_challenge"], tasks_data=str(data)))
    with pytest.raises(RecipeError) as refused:  # the harness has it: it is not misspelt
        task_names(TaskSettings(tasks=["arc_challenge"], tasks_data=str(data)))
    assert "Did you mean" not in str(refused.value)
    with pytest.raises(RecipeError, match="StoryCloze may not be redistributed"):
        task_names(TaskSettings(tasks=["storycloze_2018"]))
    with pytest.raises(CorpusError, match="there is no folder"):
        task_names(TaskSettings(tasks=["piqa"], tasks_data=str(data / "nowhere")))
    with pytest.raises(RecipeError, match=r"(?s)none of the paper's tasks has files in .*found +files of no task"):
        task_names(TaskSettings(tasks=["paper"], tasks_data=str(data / "piqa")))


@pytest.mark.slow
def test_any_other_task_of_the_harness_by_name(given: GivenModel, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no task 'helaswag'.*\nDid you mean `hellaswag`\?"):
        task_names(TaskSettings(tasks=["helaswag"]))
    with pytest.raises(RecipeError, match=r"no task 'foobar'.*\n`lm-eval ls tasks` lists them"):
        task_names(TaskSettings(tasks=["foobar"]))
    assert task_names(TaskSettings(tasks=["ai2_arc"])) == ("arc_challenge", "arc_easy")
    copa = {"premise": "The student reads.", "choice1": "He learns.", "choice2": "He drops.", "question": "effect"}
    write_lines(data / "copa" / "validation.jsonl", [copa | {"label": 0}, copa | {"label": 1}])
    results = ask(given, data, tmp_path / "out", ["copa"])
    assert [(row.dataset, row.metric, row.n) for row in results.rows] == [("copa", "acc", 2)]


def test_a_group_is_one_row_and_its_tasks_are_kept(given: GivenModel, tmp_path: Path, no_network: None) -> None:
    if not (REAL / "blimp").is_dir():
        pytest.skip("the files of BLiMP are not here")
    results = ask(given, REAL, tmp_path / "out", ["blimp"], limit=1)
    row = results.value("blimp")
    found = json.loads((tmp_path / "out" / "raw" / "blimp.json").read_text())["harness"]["results"]
    each = [figures["acc,none"] for name, figures in found.items() if name != "blimp"]
    assert (len(each), row.metric, row.n) == (67, "acc", 67)
    assert row.value == pytest.approx(sum(each) / 67)
    assert len(samples(tmp_path / "out", "blimp")) == 67


def test_the_files_that_are_handed_out_with_the_project(given: GivenModel, tmp_path: Path, no_network: None) -> None:
    if not REAL.is_dir():
        pytest.skip("the files of the benchmarks are not here")
    results = ask(given, REAL, tmp_path / "out", ["paper", "sciq", "blimp_npi_present_1"], limit=2)
    assert results.missing == ("storycloze_2018",)
    assert results.value("average").n == 8
    assert results.notes == {
        "sciq": "validation split, where the harness scores test", "average": "of the paper's tasks alone",
    }  # fmt: skip


def test_prepared_hellaswag_is_asked_as_the_original(given: GivenModel, data: Path, tmp_path: Path) -> None:
    prepared = []
    for doc in HUB["hellaswag"]["validation"]:
        asked = prompts("hellaswag", doc)
        prepared.append({"query": asked[0][0], "choices": [c[1:] for _, c in asked], "gold": int(doc["label"])})
    write_lines(tmp_path / "other" / "hellaswag" / "hellaswag_val_lmeval_style.jsonl", prepared)
    ask(given, data, tmp_path / "hub", ["hellaswag"])
    ask(given, tmp_path / "other", tmp_path / "prepared", ["hellaswag"])
    keys = ("logp", "gold", "acc", "acc_norm", "prompt_hash")
    one, other = ([[s[k] for k in keys] for s in samples(tmp_path / f, "hellaswag")] for f in ("hub", "prepared"))
    assert one == other


@pytest.mark.parametrize("name", ["cloze_test_val__winter2018-cloze_test_ALL_val - 1 - 1.csv", "validation.jsonl"])
def test_a_users_own_storycloze(given: GivenModel, tmp_path: Path, name: str) -> None:
    story = {
        "InputStoryid": "x", "InputSentence1": "A student reads.", "InputSentence2": 'It is "hard".',
        "InputSentence3": "He learns,", "InputSentence4": "keeps", "RandomFifthSentenceQuiz1": "and drops.",
        "RandomFifthSentenceQuiz2": "and scores.", "AnswerRightEnding": "2",
    }  # fmt: skip
    path = tmp_path / "data" / "storycloze" / name
    path.parent.mkdir(parents=True)
    if name.endswith("csv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(story))
            writer.writeheader()
            writer.writerows([story, story])
    else:
        write_lines(path, [story, story])
    row = ask(given, tmp_path / "data", tmp_path / "out", ["storycloze_2018"]).value("storycloze_2018")
    assert (row.metric, row.n) == ("acc", 2)
    context = 'A student reads. It is "hard". He learns, keeps'
    expected = [by_hand(given, context, end)[0] for end in (" and drops.", " and scores.")]
    found = samples(tmp_path / "out", "storycloze_2018")[0]
    assert found["logp"] == pytest.approx(expected, rel=2e-6)
    assert found["gold"] == 1


def test_wikitext_is_a_perplexity_of_articles(given: GivenModel, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir(parents=True)
    pages = [" = A = \n \n The text . \n \n = = B = = \n a token \n", " = C = \n the corpus \n"]
    (folder / "test.txt").write_text("\n" + "".join(pages))
    results = ask(given, tmp_path / "data", tmp_path / "out", ["wikitext"])
    assert [(row.metric, row.n) for row in results.rows] == [("word_perplexity", 2)]
    found = samples(tmp_path / "out", "wikitext")
    logp = by_hand(given, "", found[1]["gold"])[0]
    assert found[1]["logp"] == pytest.approx([logp], rel=2e-6)
    words = sum(len(re.split(r"\s+", page)) for page in ("\n" + pages[0], pages[1]))
    assert results.rows[0].value == pytest.approx(math.exp(-sum(s["logp"][0] for s in found) / words), rel=0.2)


# what is refused


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it is no JSON object"),
        ('{"goal": "a", "sol1": "b", "label": 0}', "it has no 'sol2'"),
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', "label: expected 0 to 1, found 2"),
        ('{"goal": "a", "sol1": "", "sol2": "c", "label": 0}', "sol1: it is empty"),
        ('{"goal": ["a"], "sol1": "b", "sol2": "c", "label": 0}', "goal: expected text"),
        ('{"goal": "\\ud800", "sol1": "b", "sol2": "c", "label": 0}', "goal: .*surrogates not allowed"),
    ],
)
def test_a_record_that_is_no_example_is_named_by_file_and_line(
    given: GivenModel, data: Path, tmp_path: Path, line: str, reason: str
) -> None:
    with (data / "piqa" / "validation.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CorpusError, match=rf"(?s)line 4 of .*validation.jsonl is no example of .*{reason}"):
        ask(given, data, tmp_path / "out", ["piqa"])


def test_files_that_are_not_there_are_named(given: GivenModel, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"(?s)split train, of which the 2 shots are taken: .*piqa/train.jsonl"):
        ask(given, data, tmp_path / "out", ["piqa"], shots=2)
    with pytest.raises(CorpusError, match="has too few examples to show 3 before each question"):
        ask(given, data, tmp_path / "few", ["lambada_openai"], shots=3)
    (data / "arc_easy" / "test.jsonl").rename(data / "arc_easy" / "train.jsonl")
    with pytest.raises(CorpusError, match=r"(?s)split test or validation: .*arc_easy/test.jsonl"):
        ask(given, data, tmp_path / "other", ["arc_easy"])
    (data / "winogrande" / "validation.jsonl").write_text("")
    with pytest.raises(CorpusError, match="is empty"):
        ask(given, data, tmp_path / "empty", ["winogrande"])


def test_a_name_is_never_a_path(data: Path) -> None:
    for name in ("../data/piqa", "blimp_../../data/piqa/validation", "/etc", "", "."):
        assert local_tasks.files(data, name) == {}


def test_models_that_are_elsewhere_are_refused(data: Path, tmp_path: Path) -> None:
    settings = TaskSettings(tasks=["piqa"], tasks_data=str(data))
    for model in (ServerModel(server="http://localhost:1/v1", model="m"), VllmModel(vllm="m")):
        with pytest.raises(RecipeError, match="behind a server or in vLLM"):
            evaluate_tasks(model, settings, tmp_path / "out", identity("m", settings))


def test_a_model_without_a_tokenizer_is_refused(given: GivenModel, data: Path, tmp_path: Path) -> None:
    shutil.copytree(given.model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        ask(GivenModel(model=str(tmp_path / "bare")), data, tmp_path / "out", ["piqa"])


def test_a_model_that_gives_no_numbers_is_refused(given: GivenModel, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(given.model, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(given.model)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ScoreError, match=r"(?s)no number.*task +piqa.*6 of 6"):
        ask(GivenModel(model=str(tmp_path / "broken")), data, tmp_path / "out", ["piqa"])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(given: GivenModel, data: Path, tmp_path: Path) -> None:
    shutil.copytree(given.model, tmp_path / "few")
    new_model({**CONFIG, "vocab_size": 260}, seed=1).save_pretrained(tmp_path / "few")
    with pytest.raises(ModelError, match="vocabulary exceeds the model's"):
        ask(GivenModel(model=str(tmp_path / "few")), data, tmp_path / "out", ["piqa"])


def test_an_answer_longer_than_the_model_reads_is_refused(given: GivenModel, data: Path, tmp_path: Path) -> None:
    config = json.loads((Path(given.model) / "config.json").read_text()) | {"max_position_embeddings": 5}
    shutil.copytree(given.model, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ScoreError, match=r"(?s)an answer cannot be asked for.*positions  5"):
        ask(GivenModel(model=str(tmp_path / "short")), data, tmp_path / "out", ["hellaswag"])


def test_requests_that_share_their_tokens_are_read_once(
    given: GivenModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of one token each: one row for all of them, as in the harness."""
    from miniplm.evaluation import harness_model

    doc = {"id": "a", "question": "Which?", "choices": {"text": ["!", "?", "."], "label": ["A", "B", "C"]},
           "answerKey": "B"}  # fmt: skip
    write_lines(data / "arc_easy" / "test.jsonl", [doc, doc])
    read, answers = [], harness_model.LanguageModel._answers

    def count(self: Any, rows: Any, asked: Any) -> Any:
        read.extend(rows)
        return answers(self, rows, asked)

    monkeypatch.setattr(harness_model.LanguageModel, "_answers", count)
    ask(given, data, tmp_path / "out", ["arc_easy"])
    assert len(read) == 1
    for sample in samples(tmp_path / "out", "arc_easy"):
        expected = [by_hand(given, *prompt)[0] for prompt in prompts("arc_easy", doc)]
        assert sample["logp"] == pytest.approx(expected, rel=2e-6)


def test_requests_too_long_for_the_model_are_counted(given: GivenModel, data: Path, tmp_path: Path) -> None:
    config = json.loads((Path(given.model) / "config.json").read_text()) | {"max_position_embeddings": 20}
    shutil.copytree(given.model, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    results = ask(GivenModel(model=str(tmp_path / "short")), data, tmp_path / "out", ["lambada_openai"])
    assert results.notes == {"lambada_openai": "3 requests were too long for the model and lost their beginning"}


def test_the_harness_is_imported_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, miniplm.evaluation.tasks as t; t.PAPER_TASKS; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

    def is_not_there(name: str) -> str:
        raise tasks.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tasks.metadata, "version", is_not_there)
    with pytest.raises(MissingExtraError, match=r'pip install "miniplm\[eval\]"'):
        identity("m", TaskSettings(tasks=["paper"]))
