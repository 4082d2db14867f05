"""The library functions: what they are given decides what they make, and wrong arguments are errors of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import miniplm
from conftest import write_jsonl
from miniplm.errors import ArtifactMismatchError, MiniplmError, RecipeError, ScoreError, TokenizerError, TrainingError
from miniplm.pipeline.given import about_rows, own_fingerprint, packed_behind, rows_fingerprint
from miniplm.training.checkpoint import read_curve
from miniplm.training.objectives import NextToken

TINY = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
HOW: dict[str, Any] = {"tokens": 1024, "learning_rate": 1e-3, "batch_tokens": 512, "precision": "float32"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> miniplm.Corpus:
    folder = tmp_path_factory.mktemp("library")
    write_jsonl(folder / "c.jsonl", 300)
    return miniplm.prepare(
        folder / "c.jsonl",
        tokenizer={"train": {"vocab_size": 300}},
        sequence_length=31,
        split={"reference": 0.2, "held_out": 0.1},
        out=folder / "corpus",
    )


def fingerprint(rows: Any) -> str:
    return rows_fingerprint(rows, packed_behind(rows))


def test_different_rows_have_different_fingerprints_however_they_were_chosen(corpus: miniplm.Corpus) -> None:
    pool = corpus.pool
    choices = [
        pool.select([0, 5]),
        pool.select([5, 0]),
        pool.dataset.select(range(10, 20)).select([0, 5]),
        pool.dataset.map(lambda row: {"length": row["length"] - 1}).select([0, 5]),
        pool.dataset,
        corpus.held_out.select([0, 5]),
    ]
    assert len({fingerprint(rows) for rows in choices}) == len(choices)


def test_the_same_rows_have_the_same_fingerprint_on_another_path(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(corpus.path, tmp_path / "copy")
    copy = miniplm.open_corpus(tmp_path / "copy")
    assert fingerprint(copy.pool.select([3, 1])) == fingerprint(corpus.pool.select([3, 1]))


def test_rows_find_the_tokenizer_of_the_part_they_come_from(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    checkpoint = miniplm.train(TINY, corpus.pool.select(range(40)), out=tmp_path / "m", **HOW)
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    assert checkpoint.manifest.counts["instances"] == 40


def test_rows_of_no_part_need_a_tokenizer(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    import datasets

    loose = datasets.Dataset.from_dict({"input_ids": [[1] * 32] * 40}, features=datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32"), length=32)}
    ))  # fmt: skip
    with pytest.raises(RecipeError, match="which tokenizer"):
        miniplm.train(TINY, loose, out=tmp_path / "m", **HOW)
    ragged = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    with pytest.raises(TrainingError, match="no fixed length"):
        miniplm.train(TINY, ragged, out=tmp_path / "m", tokenizer=corpus.tokenizer, **HOW)


def test_a_model_of_another_tokenizer_is_refused(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other.jsonl", 200, seed=9)
    (tmp_path / "other.jsonl").write_text((tmp_path / "other.jsonl").read_text().replace("the", "zebra"))
    other = miniplm.prepare(
        tmp_path / "other.jsonl", tokenizer={"train": {"vocab_size": 300}}, sequence_length=31, out=tmp_path / "o",
        split={"held_out": 0.1, "reference": 0.2},
    )  # fmt: skip
    model = miniplm.train(TINY, other.pool, out=tmp_path / "model", **HOW)
    with pytest.raises(TokenizerError, match="another tokenizer"):
        miniplm.score(corpus.pool, model, out=tmp_path / "scores")


def test_a_tokenizer_that_did_not_make_the_rows_is_refused_with_both(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other.jsonl", 200, seed=9)
    other = miniplm.prepare(
        tmp_path / "other.jsonl", tokenizer={"train": {"vocab_size": 290}}, sequence_length=31, out=tmp_path / "o",
        split={"held_out": 0.1, "reference": 0.2},
    )  # fmt: skip
    for data in (corpus.pool, corpus.pool.select(range(40))):
        with pytest.raises(RecipeError, match="not the one that made") as refused:
            miniplm.train(TINY, data, out=tmp_path / "m", tokenizer=other.tokenizer, **HOW)
        assert other.tokenizer.fingerprint[:12] in str(refused.value)
        assert corpus.tokenizer.fingerprint[:12] in str(refused.value)
    assert not (tmp_path / "m").exists()
    with_own = miniplm.train(TINY, corpus.pool, out=tmp_path / "m", tokenizer=corpus.tokenizer, **HOW)
    without = miniplm.train(TINY, corpus.pool, out=tmp_path / "m", **HOW)
    assert with_own.fingerprint == without.fingerprint


def test_a_teacher_that_nobody_asks_is_refused(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    for objective, name in (("next_token", "next_token"), (Twice(), "Twice"), (f"{__name__}:Twice", "Twice")):
        with pytest.raises(RecipeError, match=f"the objective {name} asks no teacher"):
            miniplm.train(TINY, corpus.pool, out=tmp_path / "m", objective=objective, teacher="no/such", **HOW)
    assert not list(tmp_path.iterdir())


class Twice:
    """An objective: twice the cross entropy."""

    fingerprint = "twice"

    def loss(self, model: Any, batch: Any) -> Any:
        loss, metrics = NextToken().loss(model, batch)
        return 2 * loss, metrics


class Nameless:
    """An objective that does not say what it is."""

    def loss(self, model: Any, batch: Any) -> Any:
        return NextToken().loss(model, batch)


def test_an_objective_by_name_is_what_its_fingerprint_says(
    corpus: miniplm.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"{__name__}:Twice"
    made = miniplm.train(TINY, corpus.pool, out=tmp_path / "m", objective=named, **HOW)
    plain = miniplm.train(TINY, corpus.pool, out=tmp_path / "plain", **HOW)
    first, once = (read_curve(model.path)[0]["train_loss"] for model in (made, plain))
    assert first == pytest.approx(2 * once, rel=0.05)
    inputs = made.manifest.identity.inputs
    assert inputs["objective"] == own_fingerprint(Twice(), "objective")
    monkeypatch.setattr(Twice, "fingerprint", "thrice")
    with pytest.raises(ArtifactMismatchError):
        miniplm.train(TINY, corpus.pool, out=tmp_path / "m", objective=named, **HOW)
    with pytest.raises(RecipeError, match="Nameless does not say what it is"):
        miniplm.train(TINY, corpus.pool, out=tmp_path / "n", objective=f"{__name__}:Nameless", **HOW)


def test_the_model_card_says_which_part_and_how_much_of_it(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    half = corpus.pool.select(range(0, len(corpus.pool), 2))
    for name, data, how, said in (
        ("whole", corpus.pool, {}, "| data | pool |"),
        ("half", half, {}, "| data | 50% of pool |"),
        ("told", half, {"about": {"data": "mine"}}, "| data | mine |"),
    ):
        model = miniplm.train(TINY, data, out=tmp_path / name, **how, **HOW)
        assert said in (model.path / "README.md").read_text()
    assert about_rows(half, None) == {}
    relative = miniplm.open_packed(os.path.relpath(corpus.pool.path))
    assert about_rows(relative.dataset, relative) == {"data": "pool"}


class Constant:
    """A scorer that gives every counted token the same probability."""

    fingerprint = "constant"

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        return counted.sum(axis=1) * -0.5


def test_a_scorer_of_ones_own_is_an_object(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    scores = miniplm.score(corpus.pool, Constant(), out=tmp_path / "scores")
    assert scores.per("token").tolist() == [-0.5] * len(corpus.pool)
    with pytest.raises(RecipeError, match="fingerprint"):
        miniplm.score(corpus.pool, object(), out=tmp_path / "other")  # type: ignore[arg-type]


def test_a_scorer_must_give_one_number_an_instance(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    class Scalar(Constant):
        def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
            return np.float64(-1.0)  # type: ignore[return-value]

    with pytest.raises(ScoreError, match="one number for each instance"):
        miniplm.score(corpus.pool, Scalar(), out=tmp_path / "scores")


def test_a_scorer_that_gives_nan_is_an_error_that_names_the_instance(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    class Broken(Constant):
        def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
            found = super().score(tokens, counted)
            found[3] = np.nan
            return found

    with pytest.raises(ScoreError, match="instance 3"):
        miniplm.score(corpus.pool, Broken(), out=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_another_artifact_at_the_same_place_is_refused(corpus: miniplm.Corpus, tmp_path: Path) -> None:
    miniplm.score(corpus.pool, Constant(), out=tmp_path / "scores")
    with pytest.raises(ArtifactMismatchError, match="something else"):
        miniplm.score(corpus.held_out, Constant(), out=tmp_path / "scores")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c, o: miniplm.score(c.pool, Constant(), out=o, dtype="fp32"),
        lambda c, o: miniplm.score(c.pool, Constant(), out=o, counted="some"),
        lambda c, o: miniplm.train(TINY, c.pool, out=o, counted="some", **HOW),
        lambda c, o: miniplm.train("qwen-1m", c.pool, out=o, tokens=1e4, learning_rat=1.0),
        lambda c, o: miniplm.train("qwen-1m", c.pool, out=o, tokens=1e4, seed=2**33),
        lambda c, o: miniplm.train({**TINY, "max_position_embeddings": 16}, c.pool, out=o, **HOW),
        lambda c, o: miniplm.prepare("nothing-*.jsonl", tokenizer="x", out=o),
        lambda c, o: miniplm.prepare("x", tokenizer={"train": {}}, out=o),
        lambda c, o: miniplm.select({"sampler": "difference"}, out=o),
        lambda c, o: miniplm.select({"sampler": "random"}, out=o),
        lambda c, o: miniplm.select({"sampler": "random", "ratio": 2}, out=o, pool=c.pool.path),
    ],
)
def test_wrong_arguments_are_errors_of_ours(wrong: Any, corpus: miniplm.Corpus, tmp_path: Path) -> None:
    with pytest.raises(MiniplmError):
        wrong(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
