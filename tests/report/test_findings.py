"""The findings of a small finished run agree with its artifacts, recomputed the obvious way."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import write_jsonl
from miniplm import artifact, recipe
from miniplm.analysis.agreement import student_agreement
from miniplm.analysis.compute_reduction import Curve, compute_reduction
from miniplm.analysis.diversity import packed_diversity
from miniplm.analysis.effects import effects
from miniplm.analysis.scaling import fit_power_law
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.evaluation.tasks import open_tasks
from miniplm.models.load import new_model
from miniplm.packing.instances import open_packed
from miniplm.packing.prepare import open_corpus
from miniplm.pipeline.chain import Chain, chain
from miniplm.pipeline.costs import costs
from miniplm.pipeline.run import run
from miniplm.report.analysis import STEEP
from miniplm.report.findings import gather
from miniplm.report.show import show
from miniplm.report.training import compare_bits, control_of
from miniplm.report.write import summary, write_report
from miniplm.sampling.base import open_selection
from miniplm.scoring.base import Scores, open_scores
from miniplm.training.checkpoint import read_curve

pytestmark = pytest.mark.slow  # each needs a training of its own

TINY = (
    "config: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,"
    " num_key_value_heads: 2}, learning_rate: 5e-3, batch_tokens: 512, precision: float32"
)
RECIPE = f"""
schema: 1
name: small
corpus: {{files: CORPUS}}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: 32
  split: {{reference: 0.2, teacher: 0.3, held_out: 0.1}}
teacher: {{{TINY}, tokens: 8192}}
reference: {{{TINY}, tokens: 2048}}
score: {{dtype: float32}}
select:
  random: {{sampler: random}}
  difference: {{sampler: difference, ratio: 0.4}}
generate:
  written: {{data: random, dtype: float32}}
retokenize:
  other-random: {{data: random, tokenizer: TOKENIZER}}
  other: {{data: written, tokenizer: TOKENIZER}}
students:
  control: {{{TINY}, tokens: 4096, data: random}}
  student: {{like: control, data: difference}}
  kd: {{like: control, objective: {{name: vanilla_kd, dtype: float32}}, match: flops}}
  policy: {{like: control, objective: {{name: minillm, dtype: float32}}, match: operations}}
  family-control: {{like: control, data: other-random}}
  family: {{like: control, data: other}}
evaluate:
  documents:
    others: {{files: DOCUMENTS, documents: 20}}
    whole: {{files: DOCUMENTS, documents: 20, windows: all}}
  tasks: [paper]
  tasks_data: TASKS
  models: {{theirs: THEIRS}}
compute: {{device: cpu}}
"""
STUDENTS = ("control", "student", "kd", "policy", "family-control", "family")


def write_tokenizer(folder: Path, corpus: Path) -> None:
    """A byte-level BPE that is not the corpus's."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=byte_level.alphabet(), special_tokens=[end])
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def write_model(folder: Path, corpus: Path) -> None:
    """A tiny random model with that tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    new_model({"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 270, **sizes}, 0).save_pretrained(folder)
    write_tokenizer(folder, corpus)


def write_tasks(folder: Path) -> None:
    """Some examples of two of the paper's tasks."""
    asked = {
        "piqa": [{"goal": f"keep text {n}", "sol1": "score it", "sol2": "drop it", "label": n % 2} for n in range(6)],
        "winogrande": [
            {"sentence": f"Model {n} reads and _", "option1": "learns", "option2": "drops", "answer": "1"}
            for n in range(5)
        ],
    }
    for name, examples in asked.items():
        (folder / name).mkdir(parents=True)
        lines = [json.dumps(example) for example in examples]
        (folder / name / "validation.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("run")
    corpus = write_jsonl(folder / "corpus.jsonl", 400)
    write_tokenizer(folder / "tokenizer", corpus)
    write_model(folder / "theirs", corpus)
    write_tasks(folder / "tasks")
    text = RECIPE.replace("CORPUS", str(corpus)).replace("TOKENIZER", str(folder / "tokenizer"))
    text = text.replace("DOCUMENTS", str(write_jsonl(folder / "others.jsonl", 30, seed=1)))
    text = text.replace("TASKS", str(folder / "tasks")).replace("THEIRS", str(folder / "theirs"))
    stages = chain(recipe.parse(text), folder / "run")
    run(stages)
    return stages


@pytest.fixture(scope="module")
def findings(finished: Chain) -> dict[str, Any]:
    return gather(finished)


def by_name(findings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {student["name"]: student for student in findings["students"]}


def test_figures_of_students_are_those_of_their_evaluations(finished: Chain, findings: dict[str, Any]) -> None:
    assert {name: one["control"] for name, one in by_name(findings).items()} == {
        **dict.fromkeys(("student", "kd", "policy"), "control"),
        "family": "family-control",
        **dict.fromkeys(("control", "family-control")),
    }
    for student in findings["students"]:
        scores = open_evaluation(finished[f"evaluate/{student['name']}"].path).scores
        nats = -scores.logp.sum() / scores.n_tokens.sum()
        assert student["loss"] == (None if "family" in student["name"] else pytest.approx(nats))
        assert student["bits_per_byte"] == pytest.approx(-scores.logp.sum() / np.log(2) / scores.n_bytes.sum())


def test_what_training_took_is_what_manifests_and_provenance_say(finished: Chain, findings: dict[str, Any]) -> None:
    models = {one["role"]: one for one in findings["models"]}
    stages = {f"students/{name}": one for name, one in by_name(findings).items()}
    stages |= {"train/teacher": models["teacher"], "train/reference": models["reference"]}
    for name, one in stages.items():
        counts, how = artifact.read(finished[name].path).counts, artifact.provenance(finished[name].path)
        for key in ("parameters", "steps", "epochs", "matched_share", "final_train_loss", "learning_rate"):
            assert one[key] == counts[key], (name, key)
        assert (one["tokens"], one["flops"]) == (counts["train_tokens"], counts["train_flops"])
        for key in ("train_seconds", "tokens_per_s", "share_of_matmul_rate", "flops_per_s", "device", "processes"):
            assert one[key] == how[key], (name, key)
        assert one["curve"][-1]["tokens"] == one["tokens"]
        assert one["curve"][-1]["flops"] == pytest.approx(one["flops"])


def test_students_whose_operations_were_matched_say_so(findings: dict[str, Any]) -> None:
    students = by_name(findings)
    control, kd, policy = (students[name] for name in ("control", "kd", "policy"))
    assert (control["match"], kd["match"], policy["match"]) == (None, "flops", "operations")
    assert kd["matched_share"] == pytest.approx(3 / 4), "a teacher of the student's size"
    assert policy["matched_share"] == pytest.approx(1 / 2)
    assert kd["flops"] == pytest.approx(control["flops"])
    assert (control["steps"], kd["steps"], policy["steps"]) == (8, 6, 4)


def test_a_training_loss_is_the_cross_entropy_in_it(finished: Chain, findings: dict[str, Any]) -> None:
    for name, student in by_name(findings).items():
        lines = (finished[f"students/{name}"].path / "training.jsonl").read_text().splitlines()
        points = [json.loads(line) for line in lines]
        key = "cross_entropy" if name in ("kd", "policy") else "train_loss"
        assert [point["cross_entropy"] for point in student["curve"]] == [point[key] for point in points]
        assert student["final_cross_entropy"] == points[-1][key]
        assert all(
            point["train_loss"] == own["train_loss"] for point, own in zip(student["curve"], points, strict=True)
        )
    kd = by_name(findings)["kd"]
    assert kd["final_train_loss"] == pytest.approx(
        (kd["final_cross_entropy"] + kd["curve"][-1]["teacher_term"]) / 2, abs=1e-4
    )


def test_the_comparison_is_paired_by_instance(finished: Chain, findings: dict[str, Any]) -> None:
    comparison = findings["comparisons"][0]
    assert (comparison["student"], comparison["unit"]) == ("student", "nats per token")
    student, control = (open_evaluation(finished[f"evaluate/{n}"].path).scores for n in ("student", "control"))
    gaps = (control.logp - student.logp) / student.n_tokens  # all instances have as many tokens here
    assert comparison["difference"] == pytest.approx(gaps.mean())
    assert comparison["se"] == pytest.approx(gaps.std(ddof=1) / len(gaps) ** 0.5)
    clear = abs(comparison["difference"]) >= 2 * comparison["se"]
    assert (comparison["verdict"] != "within noise") == clear


def test_a_tokenizer_of_its_own_is_compared_in_bits_per_byte(findings: dict[str, Any]) -> None:
    students = by_name(findings)
    assert [name for name, one in students.items() if one["own_tokenizer"]] == ["family-control", "family"]
    family = students["family"]
    assert [one["kind"] for one in family["made_of"]] == ["retokenised", "generated", "selection"]
    assert family["loss"] is family["loss_se"] is family["curve"][-1]["held_out_loss"] is None
    assert all(row["loss"] is None and row["bits_per_byte"] > 0 for row in family["by_source"])
    comparison = findings["comparisons"][-1]
    assert comparison["student"] == "family"
    assert comparison["unit"] == "bits per byte"
    assert comparison["control"] == "family-control"
    gap = family["bits_per_byte"] - students["family-control"]["bits_per_byte"]
    assert comparison["difference"] == pytest.approx(gap)
    assert comparison["bits_difference"] == pytest.approx(gap)


def test_the_error_of_a_difference_in_bits_is_that_of_leaving_out_each_instance() -> None:
    draw = np.random.default_rng(0)
    count = 200
    hard = draw.gamma(5, 1, count)

    def scores(shift: float) -> Scores:
        n_bytes = draw.integers(80, 120, count).astype(np.int32)
        logp = -n_bytes * (1 + 0.1 * hard + shift + 0.02 * draw.standard_normal(count))
        return Scores(logp, n_bytes // 3, n_bytes, np.zeros(count, np.int32), ("s",), packed="same")

    def bits(one: Scores, rows: np.ndarray) -> float:
        return float(-one.logp[rows].sum() / np.log(2) / one.n_bytes[rows].sum())

    student, control = scores(0.0), scores(0.01)
    found = compare_bits(student, control)
    every = np.arange(count)
    assert found.value == pytest.approx(bits(student, every) - bits(control, every))
    without = [bits(student, rest) - bits(control, rest) for rest in (np.delete(every, row) for row in every)]
    jackknife = ((count - 1) / count * np.sum((without - np.mean(without)) ** 2)) ** 0.5
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)


SHAPE = """
schema: 1
name: shape
corpus: {files: corpus.jsonl}
prepare: {tokenizer: ours, split: {reference: 0.2}}
teacher: {model: teacher}
reference: {preset: qwen-104m, tokens: 1e6}
select:
  random: {sampler: random}
  difference: {sampler: difference}
  quarter: {sampler: difference, ratio: 0.25}
generate:
  written: {data: random}
  written-difference: {data: difference}
retokenize:
  theirs-random: {data: random, tokenizer: theirs}
  theirs-difference: {data: difference, tokenizer: theirs}
  theirs-written: {data: written, tokenizer: theirs}
  others-random: {data: random, tokenizer: others}
  ours-random: {data: random, tokenizer: ours}
students:
"""
RECIPES = Path(__file__).parents[2] / "recipes"


def controls_of(settings: recipe.Recipe) -> dict[str, str | None]:
    return {name: control_of(settings, name) for name in settings.students}


def with_students(**students: str) -> dict[str, str | None]:
    """The controls of students given by their data, or by settings that differ from the first one's."""
    lines = []
    for number, (name, said) in enumerate(students.items()):
        first = "preset: qwen-1m, tokens: 1e6" if number == 0 else f"like: {next(iter(students))}"
        lines.append(f"  {name}: {{{first}, {said if ':' in said else 'data: ' + said}}}")
    return controls_of(recipe.parse(SHAPE + "\n".join(lines)))


def test_students_of_other_families_have_their_own_families_controls() -> None:
    assert controls_of(recipe.load(RECIPES / "paper/families.yaml")) == {
        "llama-pretrain": None,
        "llama-miniplm": "llama-pretrain",
        "mamba-pretrain": None,
        "mamba-miniplm": "mamba-pretrain",
    }


def test_a_larger_models_control_is_none_of_smaller_students() -> None:
    found = controls_of(recipe.load(RECIPES / "studies/families.yaml"))
    assert [name for name, control in found.items() if control == "strong-control"] == ["strong"]
    assert found["strong-control"] is None


def test_methods_of_one_model_share_a_control() -> None:
    methods = ("vanilla_kd", "seqkd", "minillm", "miniplm", "miniplm_kd")
    for name in ("studies/baselines.yaml", "paper/baselines-200m.yaml"):
        found = controls_of(recipe.load(RECIPES / name))
        assert found == {"pretrain": None, **dict.fromkeys(methods, "pretrain")}


def test_where_epochs_make_up_for_data_the_control_reads_the_pool_once() -> None:
    found = controls_of(recipe.load(RECIPES / "paper/data-limited.yaml"))
    assert found == {"pretrain": None, **dict.fromkeys(("half", "quarter", "eighth"), "pretrain")}


def test_a_control_has_the_same_model_length_and_tokenizer() -> None:
    found = with_students(
        control="random",
        student="difference",
        larger="preset: qwen-5m, data: difference",
        longer="tokens: 2e6, data: difference",
        passes="epochs: 2, data: difference",
        other="theirs-difference",
        same="ours-random",
        policy="objective: minillm, match: flops, learning_rate: 1e-4, data: difference",
    )
    assert found == {
        **dict.fromkeys(found),
        **dict.fromkeys(("student", "same", "policy"), "control"),
    }


def test_the_first_of_several_controls_is_taken() -> None:
    assert with_students(a="difference", b="pool", c="random") == {"a": "b", "b": None, "c": "b"}
    assert with_students(a="difference", c="random", b="pool") == {"a": "c", "c": None, "b": "c"}


def test_what_a_teacher_wrote_controls_only_what_it_wrote() -> None:
    assert with_students(a="written", b="difference") == {"a": None, "b": None}
    assert with_students(a="written", b="written-difference") == {"a": None, "b": "a"}
    assert with_students(a="written", b="written-difference", c="random") == {"a": "c", "b": "c", "c": None}
    assert with_students(a="theirs-written", b="theirs-random", c="others-random") == {"a": "b", "b": None, "c": None}


def test_without_chance_or_a_plain_objective_there_is_no_control() -> None:
    assert with_students(a="difference", b="quarter") == {"a": None, "b": None}
    assert with_students(a="difference", kd="objective: vanilla_kd, data: random") == {"a": None, "kd": None}


def test_data_made_for_students_is_counted(finished: Chain, findings: dict[str, Any]) -> None:
    (written,), (_, other) = findings["generated"], findings["retokenized"]
    counts = artifact.read(finished["generate/written"].path).counts
    for key in ("instances", "kept_unchanged", "generated_tokens", "tokens_out", "prompt_tokens"):
        assert written[key] == counts[key]
    assert written["data"] == "random"
    for one in written["examples"]:
        packed = open_packed(finished["generate/written"].path)
        assert packed.text(one["row"]).startswith(one["prompt"][:10])
        assert one["written"]
    counts = artifact.read(finished["retokenize/other"].path).counts
    assert all(other[key] == counts[key] for key in other.keys() & counts.keys())
    assert other["bytes_in"] == other["bytes_out"] > 0
    for stage in ("generate/written", "retokenize/other"):
        lines = list(show(finished[stage].path))
        first = lines.index("the first instances") + 1
        assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines[first : first + 3])


def test_the_tables_agree_with_the_findings(finished: Chain, findings: dict[str, Any]) -> None:
    page = write_report(finished).read_text()
    rows = {row["name"]: row for row in csv.DictReader((finished.root / "students.csv").read_text().splitlines())}
    assert list(rows) == list(STUDENTS)
    for name, student in by_name(findings).items():
        row = rows[name]
        for key in ("tokens", "steps", "flops", "matched_share", "train_seconds", "tokens_per_s", "final_train_loss"):
            assert float(row[key]) == student[key], (name, key)
        assert row["loss"] == ("" if student["loss"] is None else str(student["loss"]))
        shown = re.findall(rf'<tr><th scope="row" class="name">{name}</th>(.*?)</tr>', page, re.DOTALL)[0]
        cells = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in re.findall("<td.*?</td>", shown, re.DOTALL)]
        assert cells[2].split()[0] == f"{student['steps']:,}"
        assert cells[6] == f"{student['share_of_matmul_rate']:.1%}"
        assert ("by " in cells[2]) == (student["match"] is not None)
    assert rows["family"]["made_of"] == "retokenised from written, generated from random"
    assert rows["kd"]["objective"] == "vanilla_kd λ=0.5"
    assert rows["family"]["unit"] == "bits per byte"
    assert {name: row["control"] for name, row in rows.items()} == {
        name: one["control"] or "" for name, one in by_name(findings).items()
    }


def test_what_is_printed_leaves_nothing_out(finished: Chain, findings: dict[str, Any]) -> None:
    write_report(finished)
    headings = ("nats per token", "compute reduction")
    lines = [line for line in summary(finished).splitlines() if not any(said in line for said in headings)]
    for name in STUDENTS:
        assert sum(line.startswith(f"{name} ") for line in lines) == 3
    family, family_took, family_said = (line for line in lines if line.startswith("family "))
    assert "bits/byte" in family_said
    assert family.endswith("  (family-control)")
    assert sum(line.endswith("  (a control)") for line in lines) == 2
    assert " – " in family
    assert "bits/byte" in family
    assert family_took.endswith(" –"), "its training loss is of other tokens"
    assert any(line.startswith("kd ") and " 75.0% " in line for line in lines)
    (written,) = findings["generated"]
    assert any(line.startswith("written: ") and f"{written['generated_tokens']:,} tokens" in line for line in lines)
    assert any(line.startswith("other: ") and "bytes in" in line for line in lines)


def test_examples_are_what_their_headings_say(finished: Chain, findings: dict[str, Any]) -> None:
    effects = findings["effects"]
    kept = set(open_selection(finished["select/difference"].path).rows.tolist())
    teacher, reference = (open_scores(finished[f"score/{n}"].path) for n in ("teacher", "reference"))
    score = teacher.logp / teacher.n_tokens - reference.logp / reference.n_tokens
    assert effects["kept_by"] == "difference"
    assert effects["hard_kept"][0]["row"] == int(np.argmax(score))
    assert all(example["row"] in kept for example in effects["hard_kept"])
    assert not any(example["row"] in kept for example in effects["easy_dropped"] + effects["noisy_dropped"])
    assert all(example["score"] < 0 for example in effects["noisy_dropped"])
    assert bool(effects["noisy_dropped"]) != ("noisy_dropped" in effects["notes"])
    for example in effects["hard_kept"] + effects["easy_dropped"] + effects["borderline"]:
        assert example["score"] == pytest.approx(score[example["row"]])
        assert example["score"] == pytest.approx(example["reference"] - example["teacher"])
    assert [example["kept"] for example in effects["borderline"]] == [True] * 3 + [False] * 3
    assert [example["row"] in kept for example in effects["borderline"]] == [True] * 3 + [False] * 3


def test_effects_count_each_instance_once(findings: dict[str, Any], finished: Chain) -> None:
    parts = findings["effects"]["effects"]
    assert sum(one["pool"] for one in parts) == findings["corpus"]["parts"]["pool"]["instances"]
    assert sum(one["kept"] for one in parts) == len(open_selection(finished["select/difference"].path).rows)


def test_the_histogram_counts_every_instance(finished: Chain, findings: dict[str, Any]) -> None:
    scores = findings["scores"]
    assert sum(scores["counts"]) == scores["instances"] == len(open_scores(finished["score/teacher"].path))
    assert len(scores["edges"]) == len(scores["counts"]) + 1


def test_a_report_of_an_earlier_schema_is_made_anew(finished: Chain) -> None:
    write_report(finished)
    path = finished.root / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    write_report(finished)
    assert json.loads(path.read_text())["schema"] > 1


def test_the_report_is_written_once_and_again_when_settings_change(finished: Chain, findings: dict[str, Any]) -> None:
    page = write_report(finished)
    written, html = page.stat().st_mtime_ns, page.read_bytes()
    assert json.loads((finished.root / "report.json").read_text()) == json.loads(json.dumps(findings))
    assert write_report(finished).stat().st_mtime_ns == written, "a report that is up to date is left alone"
    (finished.root / "report.json").write_text(
        (finished.root / "report.json").read_text().replace("ratio: 0.4", "ratio: 0.6")
    )
    assert write_report(finished).stat().st_mtime_ns > written
    assert page.read_bytes() == html, "the same artifacts, the same bytes"
    table = summary(finished)
    assert "(a control)" in table
    assert "student" in table
    rows = (finished.root / "evaluations.csv").read_text().splitlines()
    assert rows[0] == "model,dataset,source,metric,value,standard_error,n"
    assert {row.split(",")[0] for row in rows[1:]} == {"teacher", "reference", "theirs", *STUDENTS}


def test_the_page_is_one_file_without_references(finished: Chain) -> None:
    page: Path = write_report(finished)
    text = page.read_text()
    assert "<script" not in text
    assert "src=" not in text.replace("src=''", "")
    assert finished.recipe.name in text


# the analyses

MODELS = ("teacher", "reference", *STUDENTS, "theirs")
OURS = ("control", "student", "kd", "policy")  # of the corpus's tokenizer


def scores_of(stages: Chain, model: str, measured: str = "evaluate") -> Scores:
    return open_evaluation(stages[f"{measured}/{model}"].path).scores


def curve(stages: Chain, student: str) -> Curve:
    return Curve.of(read_curve(stages[f"students/{student}"].path))


def test_documents_are_counted_as_the_paper_does(finished: Chain, findings: dict[str, Any]) -> None:
    first, whole = findings["documents"]
    assert (first["name"], first["windows"], first["instances"]) == ("others", "first", 20)
    assert whole["instances"] > 20, "documents are longer than a window"
    assert [row["model"] for row in first["models"]] == list(MODELS)
    assert [row["role"] for row in first["models"]] == ["teacher", "reference", *["student"] * 6, "other"]
    for row in first["models"]:
        scores = scores_of(finished, row["model"], "loss/others")
        assert row["bits_per_byte"] == pytest.approx(-scores.logp.sum() / np.log(2) / scores.n_bytes.sum())
        if row["own_tokenizer"]:
            assert row["nats_per_token"] is row["nats_per_token_by_document"] is None
        else:
            assert row["nats_per_token_by_document"] == pytest.approx((-scores.logp / scores.n_tokens).mean())
            assert row["nats_per_token"] == pytest.approx(-scores.logp.sum() / scores.n_tokens.sum())
    assert {row["model"] for row in first["models"] if row["own_tokenizer"]} == {"family-control", "family", "theirs"}
    assert all(row["nats_per_token_by_document"] is None for row in whole["models"])


def test_differences_on_documents_are_paired(finished: Chain, findings: dict[str, Any]) -> None:
    rows = {row["model"]: row for row in findings["documents"][0]["models"]}
    student, control = (scores_of(finished, name, "loss/others") for name in ("student", "control"))
    gaps = (control.logp - student.logp) / student.n_tokens
    assert rows["student"]["difference"]["value"] == pytest.approx(gaps.mean())
    assert rows["student"]["difference"]["se"] == pytest.approx(gaps.std(ddof=1) / len(gaps) ** 0.5)
    assert rows["control"]["difference"] is rows["theirs"]["difference"] is None
    family = rows["family"]["difference"]
    assert family["unit"] == "bits per byte"
    assert family["value"] == pytest.approx(rows["family"]["bits_per_byte"] - rows["family-control"]["bits_per_byte"])


def test_accuracies_are_those_of_the_tasks(finished: Chain, findings: dict[str, Any]) -> None:
    tasks = findings["tasks"]
    assert {one["name"]: one["examples"] for one in tasks["tasks"]} == {"winogrande": 5, "piqa": 6}
    assert len(tasks["missing"]) == 7
    assert "storycloze_2018" in tasks["missing"]
    assert [one["model"] for one in tasks["models"]] == list(MODELS)
    for one in tasks["models"]:
        found = open_tasks(finished[f"tasks/{one['model']}"].path)
        assert one["average"] == {"value": found.value("average").value, "se": found.value("average").standard_error}
        for task, shown in zip(tasks["tasks"], one["accuracies"], strict=True):
            assert shown["value"] == found.value(task["name"]).value


def test_every_figure_of_a_model_is_in_the_table(finished: Chain) -> None:
    write_report(finished)
    rows = list(csv.DictReader((finished.root / "evaluations.csv").read_text().splitlines()))
    for model in MODELS:
        found = {row["dataset"] for row in rows if row["model"] == model}
        assert found == {"held_out", "others", "whole", "winogrande", "piqa", "average"}
    by_document = [row for row in rows if row["metric"] == "nats_per_token_by_document" and row["source"] == "all"]
    assert [row["model"] for row in by_document] == list(MODELS)
    assert {row["n"] for row in by_document} == {"20"}


def test_models_of_other_people_are_measured_on_held_out_text(
    finished: Chain,
    findings: dict[str, Any],
) -> None:
    (theirs,) = findings["others"]
    scores = scores_of(finished, "theirs")
    assert theirs["name"] == "theirs"
    assert theirs["loss"] is None
    assert theirs["bits_per_byte"] == pytest.approx(-scores.logp.sum() / np.log(2) / scores.n_bytes.sum())


def test_agreement_is_that_of_the_held_out_instances(finished: Chain, findings: dict[str, Any]) -> None:
    rows = findings["agreement"]["students"]
    assert [row["student"] for row in rows] == list(OURS), "the control first; none of another tokenizer"
    assert [row["control"] for row in rows] == [True, False, False, False]
    teacher, reference = (scores_of(finished, role) for role in ("teacher", "reference"))
    for row in rows:
        found = student_agreement(teacher, reference, scores_of(finished, row["student"]), ratio=0.4)
        assert {key: row[key] for key in found.as_dict()} == found.as_dict()
    cells = findings["agreement"]["cells"]
    assert cells["student"] == "control"
    assert sum(count for *_, count in cells["cells"]) == len(teacher)
    control = scores_of(finished, "control")
    for other, threshold in zip((reference, control), cells["thresholds"], strict=True):
        kept = teacher.per("token") - other.per("token") >= threshold
        assert kept.sum() == int(0.4 * len(teacher))


def test_laws_are_those_of_the_curves(finished: Chain, findings: dict[str, Any]) -> None:
    scaling = findings["scaling"]
    assert {one["student"] for one in scaling["fits"]} | set(scaling["not_fitted"]) == set(STUDENTS)
    assert {"family", "family-control"} <= set(scaling["not_fitted"]), "no held-out loss in the corpus's tokens"
    assert scaling["fits"]
    for one in scaling["fits"]:
        measured = curve(finished, one["student"])
        fit = fit_power_law(measured.compute, measured.value, warm_up=STEEP)
        assert {key: one[key] for key in fit.as_dict()} == fit.as_dict()
        last = float(measured.compute.max())
        assert one["extrapolated"] == {"flops": 10 * last, **fit.loss_at(10 * last).as_dict()}
        assert one["line"][-1]["value"] == pytest.approx(one["extrapolated"]["value"])
        assert one["line"][0]["flops"] >= STEEP * last


def test_compute_reductions_are_told_at_both_ends(finished: Chain, findings: dict[str, Any]) -> None:
    reductions = {one["student"]: one for one in findings["scaling"]["reductions"]}
    assert "student" in reductions
    for name, one in reductions.items():
        assert one["control"] == "control"
        assert [end["end_of"] for end in one["ends"]] == ["control", "student"]
        for end in one["ends"]:
            found = compute_reduction(
                curve(finished, name), curve(finished, "control"), end_of=end["end_of"], warm_up=STEEP
            ).as_dict()
            assert (end["ratio"], end["read_from"]) == (found["ratio"], found["read_from"])
            assert end["flops"] == {who: found[who] for who in ("control", "student")}


def test_diversity_is_of_selections_and_of_what_was_written(
    finished: Chain,
    findings: dict[str, Any],
) -> None:
    beside: dict[str, Any] = {name: open_selection(stage.path).rows for name, stage in finished.within("select")}
    beside["written"] = open_packed(finished["generate/written"].path)
    pool = open_corpus(finished["prepare"].path).pool
    found = packed_diversity(pool, beside).as_dict()
    assert {key: findings["diversity"][key] for key in found} == found
    assert [one["name"] for one in found["collections"]] == ["pool", "random", "difference", "written"]


def test_effects_are_those_of_the_scores(finished: Chain, findings: dict[str, Any]) -> None:
    teacher, reference = (open_scores(finished[f"score/{role}"].path) for role in ("teacher", "reference"))
    kept = np.isin(np.arange(len(teacher)), open_selection(finished["select/difference"].path).rows)
    found = effects(teacher, reference, kept).as_dict()
    assert {key: findings["effects"][key] for key in found} == found


def test_costs_are_those_of_the_stages(finished: Chain, findings: dict[str, Any]) -> None:
    found = costs(finished, measure=False).as_dict()
    shown = findings["cost"]
    assert (shown["stages"], shown["totals"], shown["storage"]) == (found["stages"], found["totals"], found["storage"])
    (student,) = shown["break_even"]
    assert {key: student[key] for key in found["break_even"][0]} == found["break_even"][0]
    measured = [
        end["ratio"]
        for one in findings["scaling"]["reductions"]
        if one["student"] == "student"
        for end in one["ends"]
        if end["read_from"] == "curve"
    ]
    if not measured:
        assert student["here"] is None
        return
    reduction = measured[0]["value"]
    needed = student["here"]["against_pretraining"]["value"]
    if reduction > 1:
        assert needed == pytest.approx(student["offline_flops"] / (reduction - 1) / student["student_flops"])
    else:
        assert needed is None
