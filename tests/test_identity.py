"""Identity is what, never how: what changes a fingerprint, and what must not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import write_jsonl
from miniplm.artifact import Identity
from miniplm.pipeline.chain import chain
from miniplm.recipe import load, parse

CONFIG = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TRAINED = {"config": CONFIG, "tokens": 4096, "batch_tokens": 256, "learning_rate": 1e-3}
RECIPE: dict[str, Any] = {
    "schema": 1,
    "name": "identity",
    "prepare": {
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 32,
        "split": {"reference": 0.2, "teacher": 0.2, "held_out": 0.1},
    },
    "teacher": TRAINED,
    "reference": {"preset": "qwen-0.5m", "tokens": 4096},
    "select": {
        "difference": {"sampler": "difference", "ratio": 0.5},
        "random": {"sampler": "random", "ratio": 0.5, "seed": 0},
    },
    "students": {
        "miniplm": {**TRAINED, "data": "difference"},
        "control": {"like": "miniplm", "data": "random"},
        "all": {"like": "miniplm", "data": "pool"},
    },
}
ALL = {
    "prepare",
    "train/teacher",
    "train/reference",
    "score/teacher",
    "score/reference",
    "select/difference",
    "select/random",
    "students/miniplm",
    "students/control",
    "students/all",
    "evaluate/teacher",
    "evaluate/reference",
    "evaluate/miniplm",
    "evaluate/control",
    "evaluate/all",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    for number in range(2):
        write_jsonl(folder / f"{number}.jsonl", 20, seed=number)
    return folder


def fingerprints(recipe: dict[str, Any], corpus: Path, root: Path) -> dict[str, str]:
    text = yaml.safe_dump({**recipe, "corpus": {"files": f"{corpus}/*.jsonl"}}, sort_keys=False)
    return {name: stage.identity.fingerprint for name, stage in chain(parse(text), root).items()}


def changed(recipe: dict[str, Any], corpus: Path, root: Path) -> set[str]:
    """The stages that are others than those of `RECIPE`."""
    before, after = fingerprints(RECIPE, corpus, root), fingerprints(recipe, corpus, root)
    assert set(before) == set(after) == ALL
    return {name for name in before if before[name] != after[name]}


def with_value(path: str, value: object) -> dict[str, Any]:
    """`RECIPE` with one key changed."""
    recipe: dict[str, Any] = json.loads(json.dumps(RECIPE))
    *folders, key = path.split(".")
    target = recipe
    for folder in folders:
        target = target.setdefault(folder, {})
    target[key] = value
    return recipe


def reversed_keys(value: Any) -> Any:
    return {k: reversed_keys(value[k]) for k in reversed(value)} if isinstance(value, dict) else value


def test_the_order_of_keys_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    turned = reversed_keys(RECIPE)
    assert list(turned) != list(RECIPE)
    assert changed(turned, corpus, tmp_path) == set()


def test_where_the_corpus_and_the_run_lie_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    there = tmp_path / "another place" / "deeper"
    shutil.copytree(corpus, there)
    assert fingerprints(RECIPE, there, tmp_path / "run b") == fingerprints(RECIPE, corpus, tmp_path / "run a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "cpu"),
        ("score_tokens", 3),
        ("train_micro_batch", 2),
        ("compile", False),
        ("engine", "ray"),
        ("ray", {"workers": 3, "address": "10.0.0.1:6379"}),
        ("server_concurrency", 3),
        ("checkpoints", 1),
        ("trainer", {"dataloader_num_workers": 1}),
    ],
)
def test_how_it_is_computed_does_not_matter(corpus: Path, tmp_path: Path, key: str, value: object) -> None:
    assert changed(with_value(f"compute.{key}", value), corpus, tmp_path) == set()


def test_the_name_of_the_recipe_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    assert changed(with_value("name", "other"), corpus, tmp_path) == set()


def test_writing_out_a_default_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    assert changed(with_value("select.difference.normalize", "token"), corpus, tmp_path) == set()
    assert changed(with_value("score.counted", "all"), corpus, tmp_path) == set()


def test_the_recipe_that_is_written_into_the_run_directory_makes_the_same_stages(corpus: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump({**RECIPE, "corpus": {"files": f"{corpus}/*.jsonl"}})
    recipe = parse(text)
    (tmp_path / "recipe.yaml").write_text(recipe.resolved())
    before, after = chain(recipe, tmp_path), chain(load(tmp_path / "recipe.yaml"), tmp_path)
    assert {n: s.identity for n, s in before.items()} == {n: s.identity for n, s in after.items()}


SELECTION = {"select/difference", "students/miniplm", "evaluate/miniplm"}
SCORES = {"score/teacher", "score/reference", *SELECTION}
EVALUATIONS = {name for name in ALL if name.startswith("evaluate/")}
STUDENTS = {name for name in ALL if name.startswith("students/")}


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("select.difference.ratio", 0.4, SELECTION),
        ("select.difference.normalize", "byte", SELECTION),
        ("select.difference.within", "source", SELECTION),
        ("select.random.seed", 1, {"select/random", "students/control", "evaluate/control"}),
        ("students.all.seed", 1, {"students/all", "evaluate/all"}),
        ("students.control.tokens", 8192, {"students/control", "evaluate/control"}),
        ("reference.tokens", 8192, {"train/reference", "score/reference", "evaluate/reference", *SELECTION}),
        ("teacher.seed", 1, {"train/teacher", "score/teacher", "evaluate/teacher", *SELECTION}),
        ("score.dtype", "float32", {*SCORES, *EVALUATIONS}),
        ("score.counted", "skip_after_separator", ALL - {"prepare", "select/random"}),
        ("prepare.sequence_length", 16, ALL),
        ("prepare.split.seed", 1, ALL),
        ("prepare.block_bytes", 1000, ALL),
    ],
)
def test_a_setting_changes_what_depends_on_it_and_nothing_else(
    corpus: Path, tmp_path: Path, key: str, value: object, stages: set[str]
) -> None:
    assert changed(with_value(key, value), corpus, tmp_path) == stages


def flip_a_byte(corpus: Path) -> None:
    file = corpus / "1.jsonl"
    raw = bytearray(file.read_bytes())
    position = raw.index(b"teacher")
    raw[position] = ord("T")
    file.write_bytes(raw)


def rename_a_file(corpus: Path) -> None:
    (corpus / "1.jsonl").rename(corpus / "2.jsonl")  # ids are made from it where records have none


def add_a_file(corpus: Path) -> None:
    write_jsonl(corpus / "2.jsonl", 1)


@pytest.mark.parametrize("change", [flip_a_byte, rename_a_file, add_a_file])
def test_another_corpus_changes_everything(corpus: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    before = fingerprints(RECIPE, corpus, tmp_path)
    change(corpus)
    after = fingerprints(RECIPE, corpus, tmp_path)
    assert {name for name in before if before[name] != after[name]} == ALL


GOLDEN = {
    "scores": (
        Identity("scores", 1, {"dtype": "bfloat16", "counted": "all"}, {"packed": "0" * 64, "model": "1" * 64}),
        "65a8a10ea076e0a42a6bc41a5198342a9797ebd6136948f4a6bf887a7d258d1c",
    ),
    "selection": (
        Identity(
            "selection",
            1,
            {"sampler": "difference", "ratio": 0.5, "normalize": "token", "within": None},
            {"reference": "a" * 64, "teacher": "b" * 64},
        ),
        "e65d90f8de82f5384c0e5c40f44dd7f1616b4195a056dcef02060721568e92e8",
    ),
    "no inputs": (
        Identity("documents", 3, {"budget_bytes": 48_000_000, "seed": 0, "content": "é 中 \n"}),
        "2cc6fbc0a4c1f6b99bb4098838ff48e03996ecd485b8d35a818c6b080d1826ef",
    ),
    "numbers": (
        Identity("model", 1, {"learning_rate": 1e-4, "epsilon": 1e-06, "beta": 0.1, "on": True}),
        "c01e31c661365fa728d950fe9e38958f6245bd0ce1310d7d3288511eb4be75a9",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_fingerprint_is_what_it_was_when_it_was_written_down(name: str) -> None:
    identity, fingerprint = GOLDEN[name]
    assert identity.fingerprint == fingerprint


def test_a_fingerprint_is_the_sha256_of_the_canonical_json() -> None:
    canonical = '{"inputs":{"packed":"00ff"},"kind":"scores","recipe":{"counted":"all","é":[0.5,null]},"version":1}'
    identity = Identity("scores", 1, {"é": [0.5, None], "counted": "all"}, {"packed": "00ff"})
    assert identity.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


def test_each_of_the_four_fields_counts() -> None:
    base = Identity("scores", 1, {"a": 1}, {"x": "0"})
    others = [
        Identity("score", 1, {"a": 1}, {"x": "0"}),
        Identity("scores", 2, {"a": 1}, {"x": "0"}),
        Identity("scores", 1, {"a": 2}, {"x": "0"}),
        Identity("scores", 1, {"a": 1}, {"x": "1"}),
        Identity("scores", 1, {"a": 1}, {"y": "0"}),
    ]
    assert len({identity.fingerprint for identity in [base, *others]}) == 6
