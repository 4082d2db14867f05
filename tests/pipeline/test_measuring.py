"""Measuring models: folders and tables of several, documents under their own tokenizers, the stages of a recipe."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import miniplm
from conftest import write_jsonl
from miniplm import artifact
from miniplm.errors import ArtifactDamagedError, ModelError, RecipeError
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.evaluation.loss import Row
from miniplm.evaluation.tasks import TaskResults
from miniplm.packing import documents as packing
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import open_packed
from miniplm.packing.tokenizer import Tokenizer
from miniplm.pipeline.chain import Chain, chain
from miniplm.pipeline.measured_models import Measured, check_models, folder_names, measured, table, write_table
from miniplm.pipeline.run import plan, run
from miniplm.recipe import Compute, parse
from miniplm.report.write import write_report
from miniplm.scoring import score as scoring

T = 16
CPU = Compute(device="cpu")
HOSTILE = "\x1b[31mred\u202e"
RECIPE = """
schema: 1
name: measured
corpus: {files: CORPUS}
prepare: {tokenizer: TOKENIZER, sequence_length: 16, split: {reference: 0.2, held_out: 0.3}}
teacher: {model: OURS}
reference: {model: BARE}
score: {dtype: float32}
select:
  random: {sampler: random}
students:
  student:
    config: {model_type: qwen2, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
      num_key_value_heads: 1}
    data: random
    tokens: 256
    batch_tokens: 128
    learning_rate: 1e-2
    precision: float32
evaluate:
  documents:
    web: {files: WEB, documents: 6}
    whole: {files: WEB, windows: all}
  models: {other: OTHER}
compute: {device: cpu, report_to: none}
"""
MODELS = ("teacher", "reference", "student", "other")
SETS = ("web", "whole")


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    untimed(monkeypatch)


def untimed(patch: pytest.MonkeyPatch) -> None:
    """Without the matrix products that tell how fast this machine is: they take longer than these models."""
    for module in ("scoring.huggingface", "training.trainer"):
        patch.setattr(f"miniplm.{module}.matmul_rate", lambda *_: 1e12)


class Given:
    """What is there before: documents, tokenizers, models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = write_jsonl(folder / "corpus.jsonl", 40)
        self.web = write_jsonl(folder / "web.jsonl", 9, words=14, seed=4)
        self.tokenizer = tokenizers.train(["the teacher reads the corpus and the student"] * 30, 280)
        self.tokenizer.save(folder / "tokenizer")
        qwen = Qwen2Config(
            vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=16, initializer_range=0.3,
        )  # fmt: skip
        gpt2 = GPT2Config(vocab_size=265, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
        self.ours = self._model("ours", qwen, self.tokenizer)
        self.bare = self._model("bare", qwen, None)
        self.other = self._model("other", gpt2, tokenizers.train(["completely different merges"] * 30, 265))

    def _model(self, name: str, config: Any, tokenizer: Tokenizer | None) -> Path:
        AutoModelForCausalLM.from_config(config).save_pretrained(self.folder / name)
        if tokenizer is not None:
            tokenizer.save(self.folder / name)
        return self.folder / name

    def chain(self, root: Path) -> Chain:
        text = RECIPE
        for word, path in (
            ("CORPUS", self.corpus), ("TOKENIZER", self.folder / "tokenizer"), ("OURS", self.ours),
            ("BARE", self.bare), ("WEB", self.web), ("OTHER", self.other),
        ):  # fmt: skip
            text = text.replace(word, str(path))
        return chain(parse(text), root)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def made(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """The recipe's stages, all made, in shards of two documents."""
    with pytest.MonkeyPatch.context() as patch:
        untimed(patch)
        patch.setenv("XDG_CACHE_HOME", str(given.folder / "cache"))
        patch.setattr(packing, "_SHARD_DOCUMENTS", 2)
        stages = given.chain(tmp_path_factory.mktemp("run"))
        run(stages)
        yield stages


def test_a_recipe_measures_every_model_on_everything_once(made: Chain) -> None:
    measuring = [name for name in made if name.split("/")[0] in {"documents", "evaluate", "loss"}]
    assert measuring == [
        "documents/web", "documents/whole", *(f"evaluate/{model}" for model in MODELS),
        *(f"loss/{of}/{model}" for of in SETS for model in MODELS),
    ]  # fmt: skip
    assert {status.state for status in plan(made)} == {"done"}
    for name in measuring:
        kind, *of = name.split("/")[:-1]
        if kind != "documents":
            evaluation = open_evaluation(made[name].path)
            assert {row.dataset for row in evaluation.rows} == ({*of} or {"held_out"})
            by_document = "nats_per_token_by_document" in {row.metric for row in evaluation.rows}
            assert by_document == (of == ["web"]), "where an instance is a document"
    assert len(open_packed(made["documents/web"].path)) == 6
    assert artifact.read(made["documents/whole"].path).counts["documents"] == 9


def test_each_figure_is_that_of_the_model_measured_by_itself(made: Chain, given: Given, tmp_path: Path) -> None:
    models = {"teacher": given.ours, "reference": given.bare, "student": made["students/student"].path}
    for of in SETS:
        packed = open_packed(made[f"documents/{of}"].path)
        for model, path in models.items():
            alone = miniplm.score(packed, path, out=tmp_path / f"{of}-{model}", dtype="float32", compute=CPU)
            found = open_evaluation(made[f"loss/{of}/{model}"].path)
            assert found.scores.logp.tolist() == alone.logp.tolist()
            assert found.value("nats_per_token").value == pytest.approx(-alone.logp.sum() / alone.n_tokens.sum())


def test_a_model_of_another_tokenizer_reads_the_same_bytes_under_its_own(
    made: Chain, given: Given, tmp_path: Path
) -> None:
    own = tokenizers.load(given.other)
    for name in ("evaluate", *(f"loss/{of}" for of in SETS)):
        ours, theirs = (open_evaluation(made[f"{name}/{model}"].path) for model in ("teacher", "other"))
        assert theirs.scores.tokenizer == own.fingerprint != ours.scores.tokenizer
        assert theirs.scores.packed == ours.scores.packed
        assert theirs.scores.n_tokens.sum() != ours.scores.n_tokens.sum()
        bits = -theirs.scores.logp.sum() / np.log(2) / theirs.scores.n_bytes.sum()
        assert theirs.value("bits_per_byte").value == pytest.approx(bits)
    packed = open_packed(made["documents/whole"].path)
    alone = miniplm.score(
        packed, given.other, out=tmp_path / "scores", dtype="float32", tokenizer="own", compute=CPU
    )  # fmt: skip
    assert open_evaluation(made["loss/whole/other"].path).scores.logp.tolist() == alone.logp.tolist()


def test_the_run_ends_with_its_report(made: Chain) -> None:
    write_report(made)
    with (made.root / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == set(MODELS)
    assert "student" in (made.root / "report.html").read_text()


def test_the_plan_knows_what_the_new_stages_wait_for(given: Given, tmp_path: Path) -> None:
    stages = given.chain(tmp_path / "run")
    found = {status.stage.name: str(status) for status in plan(stages)}
    assert found["documents/web"] == "waiting on prepare"
    assert found["loss/web/teacher"] == "waiting on documents/web"
    assert found["loss/web/student"] == "waiting on documents/web, students/student"
    assert found["evaluate/other"] == "waiting on prepare"
    run(stages, "prepare")
    found = {status.stage.name: str(status) for status in plan(stages)}
    assert found["documents/web"] == found["evaluate/other"] == "ready"
    assert not list((tmp_path / "run").glob("documents*"))


@pytest.mark.parametrize(
    ("stage", "module", "function", "calls", "expected"),
    [
        ("documents/whole", packing, "write_shard", 3, "begun 3 shards"),
        ("loss/whole/other", scoring, "_refuse_unusable", 2, "begun 2 of 5 shards"),
        ("loss/web/student", scoring, "_refuse_unusable", 1, "begun 1 of 3 shards"),
    ],
)
def test_the_plan_tells_how_far_an_interrupted_stage_is_and_it_ends_with_the_same_bytes(
    stage: str, module: Any, function: str, calls: int, expected: str, made: Chain, given: Given, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(made.root, tmp_path / "run")
    stages = given.chain(tmp_path / "run")
    files = artifact.read(stages[stage].path).files
    shutil.rmtree(stages[stage].path)
    real, left = getattr(module, function), [None] * calls

    def stop(*arguments: Any, **options: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        with pytest.raises(KeyboardInterrupt):
            run(stages, stage)
    assert {status.stage.name: str(status) for status in plan(stages)}[stage] == expected
    monkeypatch.setattr(packing, "_SHARD_DOCUMENTS", 2)
    run(stages, stage)
    assert artifact.read(stages[stage].path).files == files


def test_models_are_called_by_the_last_part_of_their_names() -> None:
    assert folder_names(["Qwen/Qwen3-0.6B", "runs/x/students/miniplm-1a2b/", "gpt2"]) == {
        "Qwen3-0.6B": "Qwen/Qwen3-0.6B", "miniplm-1a2b": "runs/x/students/miniplm-1a2b/", "gpt2": "gpt2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/m", "b/m", "c/m"], ["m", "m-2", "m-3"]),
        (["m-2", "a/m", "b/m"], ["m-2", "m", "m-3"]),
        (["a/m", "m-2", "b/m"], ["m", "m-2", "m-3"]),
        (["qwen-200m", "qwen"], ["qwen-200m", "qwen"]),
        ([".", "..", "/"], ["model", "model-2", "model-3"]),
    ],
)
def test_every_model_has_a_name_of_its_own_that_leads_out_of_no_folder(models: list[str], names: list[str]) -> None:
    assert folder_names(models) == dict(zip(names, models, strict=True))


@pytest.mark.parametrize("models", [["a/m", "a/m"], ["a/m", "a/m/"], ["m", "./m"], ["a/m", "b", "a//m"]])
def test_the_same_model_twice_is_an_error_that_names_it(models: list[str]) -> None:
    with pytest.raises(RecipeError, match="is there twice"):
        folder_names(models)


def test_what_is_no_model_is_found_before_any_is_measured(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text("{}")
    check_models(["Qwen/Qwen3-0.6B", "gpt2", str(tmp_path)])
    with pytest.raises(ModelError, match=r"(?s)1.jsonl is no model.*found +a file\n.*quote the glob"):
        check_models(["gpt2", str(tmp_path / "1.jsonl")])
    for strange in (str(tmp_path / "nowhere"), "../nowhere", "a/b/c", HOSTILE):
        with pytest.raises(ModelError, match=r"(?s)is no model.*found +no such folder"):
            check_models([strange])


ASKED = TaskResults(
    Path("x"), (Row("piqa", "all", "acc_norm", 0.5, 0.0321, 5),), ("storycloze_2018",), {"piqa": "a note"}, 5
)
MEASURED = {
    "one": Measured(
        (
            Row("held_out", "all", "nats_per_token", 3.25, 0.0312, 100),
            Row("held_out", HOSTILE, "nats_per_token", 3.0, None, 1),
        ), None, {"held_out": "these", "piqa": 1},
    ),
    "a-model-with-a-long-name": Measured(
        (Row("held_out", "all", "nats_per_token", 2.0, 0.01, 100), *ASKED.rows), ASKED,
        {"held_out": "others", "piqa": 2},
    ),
}  # fmt: skip


def test_the_table_has_models_side_by_side_and_a_dash_where_nothing_was_measured() -> None:
    lines = table(MEASURED)
    head, *lines = lines[: lines.index("± is one standard error.")]
    assert head.split() == ["one", "a-model-with-a-long-name"]
    assert [" ".join(line.split()) for line in lines] == [
        "held_out nats_per_token 3.2500 ± 0.0312 2.0000 ± 0.0100",
        "held_out \\u001b[31mred\\u202e nats_per_token 3.0000 –",
        "piqa acc_norm – 0.5000 ± 0.0321",
    ]
    assert len({len(line) for line in [head, *lines]}) == 1
    assert all(line.isprintable() for line in [head, *lines])


def test_under_the_table_is_what_a_reader_has_to_know_each_thing_once() -> None:
    lines = table(MEASURED)
    who = "(a-model-with-a-long-name)"
    assert lines[lines.index("± is one standard error.") + 1 :] == [
        f"5 questions each {who}", f"without storycloze_2018, whose examples are not there {who}",
        f"piqa: a note {who}", f"held_out: other data or settings than those of one {who}",
        f"piqa: other data or settings than those of one {who}",
    ]  # fmt: skip
    asked = Measured(ASKED.rows, ASKED, {"tasks": "the same"})
    assert table({"one": asked, "two": asked})[-3:] == list(ASKED.remarks)


def test_the_table_on_disk_has_every_figure(tmp_path: Path) -> None:
    write_table(tmp_path / "new" / "folder", MEASURED)
    expected = [{"model": model, **row.as_dict()} for model, one in MEASURED.items() for row in one.rows]
    last, unlike = list(MEASURED)[-1], "other data or settings than those of one"
    assert json.loads((tmp_path / "new" / "folder" / "evaluations.json").read_bytes()) == {
        "rows": expected,
        "missing": {last: ["storycloze_2018"]},
        "notes": {last: {"piqa": f"a note; {unlike}", "held_out": unlike}},
    }
    with (tmp_path / "new" / "folder" / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {key: "" if value is None else str(value) for key, value in one.items()} for one in expected
    ]  # fmt: skip


def test_a_table_that_cannot_be_written_leaves_the_old_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path, MEASURED)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"evaluations.csv", "evaluations.json"}
    write = Path.write_bytes

    def dies_halfway(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", dies_halfway)
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path, {"one": MEASURED["one"]})
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_all_that_is_finished_in_a_folder_is_in_its_table(made: Chain, given: Given, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    prepared = made["prepare"].path
    shutil.copytree(prepared, tmp_path / "pile")  # its held_out is no evaluation
    for model in ("teacher", "student"):
        shutil.copytree(made[f"evaluate/{model}"].path, tmp_path / model / "held_out")
    shutil.copytree(made["loss/web/teacher"].path, tmp_path / "teacher" / "documents.partial")
    for model, sequence_length in ((given.ours, T), (given.other, T), (given.folder / "alike", 2 * T)):
        if not model.exists():
            shutil.copytree(given.ours, model)
        miniplm.evaluate_documents(
            model, given.web, out=tmp_path / model.name / "documents", sequence_length=sequence_length,
            dtype="float32", compute=CPU,
        )  # fmt: skip
    found = measured(tmp_path, ["teacher", "ours"])
    assert list(found) == ["teacher", "ours", "alike", "other", "student"]
    assert found["teacher"].rows == open_evaluation(made["evaluate/teacher"].path).rows
    assert found["teacher"].alike == found["student"].alike
    assert found["ours"].alike == found["other"].alike, "of the same documents, each under its own tokenizer"
    assert table(found)[-1] == "documents: other data or settings than those of ours (alike)"
    (tmp_path / "student" / "held_out" / "evaluation.json").unlink()
    with pytest.raises(ArtifactDamagedError):
        measured(tmp_path)


def test_documents_are_read_to_a_model_by_its_own_tokenizer(given: Given, tmp_path: Path) -> None:
    found = {
        model.name: miniplm.evaluate_documents(
            model, given.web, out=tmp_path / model.name, windows="all", sequence_length=T, dtype="float32", compute=CPU
        )
        for model in (given.ours, given.other)
    }  # fmt: skip
    for model in (given.ours, given.other):
        packed = open_packed(tmp_path / f"{model.name}-packed")
        assert packed.tokenizer.fingerprint == tokenizers.load(model).fingerprint
        alone = miniplm.score(packed, model, out=tmp_path / f"{model.name}-s", dtype="float32", compute=CPU)
        assert found[model.name].scores.logp.tolist() == alone.logp.tolist()
        assert {row.dataset for row in found[model.name].rows} == {"documents"}


def test_a_model_without_a_tokenizer_cannot_be_read_documents_to(given: Given, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)without a tokenizer.*bare.*pack_documents"):
        miniplm.evaluate_documents(given.bare, given.web, out=tmp_path / "out", compute=CPU)
    served = miniplm.ServerModel(server="http://127.0.0.1:9/v1", model="x")
    with pytest.raises(ModelError, match="without a tokenizer"):
        miniplm.evaluate_documents(served, given.web, out=tmp_path / "out", compute=CPU)
    assert not list(tmp_path.iterdir())


def test_a_set_of_documents_may_be_given_in_any_way_that_names_it(given: Given, tmp_path: Path) -> None:
    ways: dict[str, Any] = {
        "path": given.web, "text": str(given.web), "list": [str(given.web)], "settings": {"files": str(given.web)},
        "recipe": miniplm.recipe.DocumentSetSettings(files=str(given.web), windows="all"),
    }  # fmt: skip
    found = {
        name: miniplm.pack_documents(
            way, tokenizer=given.tokenizer, out=tmp_path / name, sequence_length=T, windows="all"
        ).fingerprint
        for name, way in ways.items()
    }  # fmt: skip
    assert len(set(found.values())) == 1
    few = miniplm.pack_documents(
        {"files": str(given.web), "documents": 3}, tokenizer=given.tokenizer, out=tmp_path / "few"
    )
    assert len(few) == 3


@pytest.mark.parametrize(
    ("source", "options", "word"),
    [
        ({"files": "x", "documets": 3}, {}, "documets"),
        ({"source": "builtin"}, {}, "files or hub"),
        ({}, {}, "exactly one of"),
        ("{web}", {"windows": "last"}, "windows"),
        ("{web}", {"sequence_length": 1}, "sequence_length"),
    ],
)
def test_a_set_of_documents_that_cannot_be_is_an_error_that_names_the_argument(
    source: Any, options: dict[str, Any], word: str, given: Given, tmp_path: Path
) -> None:
    if isinstance(source, str):
        source = source.format(web=given.web)
    with pytest.raises(RecipeError, match=word):
        miniplm.pack_documents(source, tokenizer=given.tokenizer, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
