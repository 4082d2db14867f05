"""The proxy learns a planted difference, is measured on what it never saw, and costs what the arithmetic says."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy import stats

import miniplm
from conftest import write_jsonl
from miniplm import artifact
from miniplm.analysis import agreement
from miniplm.errors import ArtifactMismatchError, MiniplmError, RecipeError, TokenizerError, TrainingError
from miniplm.models.flops import forward_flops, model_flops
from miniplm.models.load import load_model
from miniplm.packing.sample import pool_rows
from miniplm.pipeline.chain import Chain, chain
from miniplm.pipeline.run import plan, run
from miniplm.recipe import GivenModel, ProxySettings, parse
from miniplm.report.findings import gather, proxy_lines
from miniplm.report.write import write_report
from miniplm.sampling.base import keep_count, open_selection
from miniplm.sampling.difference import differences
from miniplm.scoring import proxy as proxies
from miniplm.scoring import proxy_training as fitting
from miniplm.scoring.base import Scores, open_scores

T = 31
TINY = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
HOW: dict[str, Any] = {"learning_rate": 1e-3, "batch_tokens": 31 * 16, "precision": "float32"}
SETTINGS: dict[str, Any] = {"precision": "float32", "epochs": 2, "batch": 16, "learning_rate": 1e-3}


class Planted:
    """Each token has a price of its own; `sign` 0 is a model that finds all tokens alike."""

    def __init__(self, sign: float) -> None:
        self.price = sign * np.random.default_rng(0).normal(size=400)
        self.fingerprint = f"planted {sign}"

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.where(counted, self.price[tokens[:, 1:]] - 3, 0).sum(axis=1)


class Made:
    """A pool, a sample of it, two scores of the sample, and a reference model."""

    def __init__(self, folder: Path) -> None:
        write_jsonl(folder / "c.jsonl", 600)
        self.corpus = miniplm.prepare(
            folder / "c.jsonl", tokenizer={"train": {"vocab_size": 300}}, sequence_length=T, out=folder / "corpus",
            split={"reference": 0.2, "held_out": 0.1},
        )  # fmt: skip
        self.model = miniplm.train(TINY, self.corpus.reference, tokens=31 * 16 * 5, out=folder / "reference", **HOW)
        self.sample = miniplm.sample(self.corpus.pool, share=0.4, out=folder / "sample")
        self.teacher = miniplm.score(self.sample, Planted(1.0), out=folder / "teacher")
        self.reference = miniplm.score(self.sample, Planted(0.0), out=folder / "reference-scores")

    def train(self, out: Path, **settings: Any) -> proxies.Proxy:
        return miniplm.train_proxy(
            self.sample, teacher=self.teacher, reference=self.reference, model=self.model, teacher_model=self.model,
            out=out, **{**SETTINGS, **settings},
        )  # fmt: skip

    def data(self, **other: Any) -> fitting.ProxyData:
        given = GivenModel(model=str(self.model.path))
        return dataclasses.replace(fitting.ProxyData(self.sample, self.teacher, self.reference, given), **other)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("proxy"))


@pytest.fixture(scope="module")
def proxy(made: Made, tmp_path_factory: pytest.TempPathFactory) -> proxies.Proxy:
    return made.train(tmp_path_factory.mktemp("trained") / "proxy")


def held_out(proxy: proxies.Proxy) -> dict[str, NDArray[Any]]:
    table = pq.read_table(proxy.path / proxies.HELD_OUT)
    return {name: table[name].to_numpy() for name in table.column_names}


def contents(folder: Path) -> dict[str, bytes]:
    names = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != artifact.PROVENANCE]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}


def shuffled(scores: Scores) -> Scores:
    return dataclasses.replace(scores, logp=np.random.default_rng(1).permutation(scores.logp))


def test_a_planted_difference_is_learnt_and_a_shuffled_one_is_not(
    made: Made, proxy: proxies.Proxy, tmp_path: Path
) -> None:
    found = proxy.figures["held_out"]
    assert found["spearman"] > 0.9
    assert found["r2"] > 0.8
    data = made.data(teacher=shuffled(made.teacher))
    settings = ProxySettings(**SETTINGS)
    none = fitting.train_proxy(data, settings, tmp_path / "none", proxies.identity(settings, "all", {"a": "b"}))
    assert abs(none.figures["held_out"]["spearman"]) < 0.3


def test_fine_tuning_gains_on_the_ridge_regression(made: Made, proxy: proxies.Proxy, tmp_path: Path) -> None:
    head_alone = made.train(tmp_path / "ridge", epochs=0).figures
    assert len(head_alone["validation_spearman"]) == 1
    course = proxy.figures["validation_spearman"]
    assert len(course) == SETTINGS["epochs"] + 1
    assert course[0] == head_alone["validation_spearman"][0]
    assert proxy.figures["kept_epoch"] == int(np.argmax(course)) > 0
    assert proxy.figures["held_out"]["r2"] > head_alone["held_out"]["r2"]


def test_the_figures_are_those_of_the_held_out_instances(made: Made, proxy: proxies.Proxy) -> None:
    rows, figures = held_out(proxy), proxy.figures
    assert np.array_equal(rows["row"], pool_rows(made.sample)[rows["instance"]])
    true = differences(made.teacher, made.reference)[rows["instance"]]
    assert np.array_equal(rows["difference"], true)
    assert figures["held_out"]["pearson"] == pytest.approx(stats.pearsonr(true, rows["predicted"])[0])
    assert figures["held_out"]["spearman"] == pytest.approx(stats.spearmanr(true, rows["predicted"])[0])
    for ratio in agreement.RATIOS:
        k = keep_count(ratio, len(true))
        best = [set(sorted(range(len(true)), key=lambda i, s=s: (-s[i], i))[:k]) for s in (true, rows["predicted"])]
        same = [(i in best[0]) == (i in best[1]) for i in range(len(true))]
        assert figures["held_out"]["agreement"][str(ratio)] == sum(same) / len(same)


def test_a_constant_is_correlated_with_nothing() -> None:
    values = np.random.default_rng(0).integers(0, 9, 200).astype(float)
    assert agreement.spearman(values, values**3) == pytest.approx(1)
    assert agreement.spearman(values, np.ones(200)) == agreement.pearson(np.ones(200), values) == 0.0


def test_held_out_and_validation_instances_are_in_no_training_batch(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    forward = proxies.Regressor.forward

    def spy(self: Any, input_ids: torch.Tensor, counted: torch.Tensor, target: torch.Tensor) -> Any:
        seen.extend(map(tuple, input_ids.tolist()))
        return forward(self, input_ids, counted, target)

    fitted: list[Any] = []
    batches = fitting._Examples.batches

    def spy_on_batches(self: Any, rows: NDArray[np.int64], *how: Any) -> Any:
        fitted.append(rows)
        return batches(self, rows, *how)

    monkeypatch.setattr(proxies.Regressor, "forward", spy)
    monkeypatch.setattr(fitting._Examples, "batches", spy_on_batches)
    proxy = made.train(tmp_path / "proxy", seed=4)
    division = fitting.divide(len(made.sample), ProxySettings(**SETTINGS, seed=4))
    parts = (division.training, division.validation, division.held_out)
    assert sorted(np.concatenate(parts)) == list(range(len(made.sample)))
    ids = [tuple(row[:-1]) for row in made.sample.dataset["input_ids"]]
    assert len(set(ids)) == len(ids)
    assert set(seen) <= {ids[row] for row in division.training}
    assert len(seen) == SETTINGS["epochs"] * len(division.training) // 16 * 16
    assert np.array_equal(fitted[0], division.training)  # the ridge regression
    assert all(np.array_equal(rows, division.validation) for rows in fitted[1:-1])
    assert np.array_equal(fitted[-1], held_out(proxy)["instance"])
    assert np.array_equal(fitted[-1], division.held_out)


def test_every_epoch_sees_every_training_instance_once_in_its_own_order() -> None:
    rows = np.arange(10, 30)
    order = list(fitting._order(rows, 60, seed=0))
    epochs = [order[n : n + 20] for n in (0, 20, 40)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_ridge_is_the_best_penalty_by_generalised_cross_validation() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 8)) * 3 + 5
    y = x @ draw.normal(size=8) + 4 + draw.normal(size=60) * 5
    z = np.column_stack([np.ones(60), x, y])
    weight, bias = fitting.ridge(z.T @ z)
    xc, yc = x - x.mean(axis=0), y - y.mean()
    best = (np.inf, np.zeros(8))
    for penalty in fitting._PENALTIES * np.linalg.eigvalsh(xc.T @ xc)[-1]:
        hat = xc @ np.linalg.solve(xc.T @ xc + penalty * np.eye(8), xc.T)
        freedom = np.trace(hat) + 1
        error = np.sum((yc - hat @ yc) ** 2) / (1 - freedom / 60) ** 2
        if freedom <= fitting._FREEDOM * 60 and error < best[0]:
            best = error, np.linalg.solve(xc.T @ xc + penalty * np.eye(8), xc.T @ yc)
    assert weight == pytest.approx(best[1], rel=1e-6)
    assert bias == pytest.approx(y.mean() - x.mean(axis=0) @ best[1])


def test_ridge_on_fewer_instances_than_states_and_on_none_that_vary() -> None:
    draw = np.random.default_rng(0)
    z = np.column_stack([np.ones(6), draw.normal(size=(6, 20)), draw.normal(size=6)])
    weight, bias = fitting.ridge(z.T @ z)
    assert np.isfinite(weight).all()
    assert np.isfinite(bias)
    z[:, 1:-1] = 1.0
    weight, bias = fitting.ridge(z.T @ z)
    assert weight == pytest.approx(np.zeros(20))
    assert bias == pytest.approx(z[:, -1].mean())


def test_a_proxy_scores_as_any_model_and_per_token_is_its_prediction(
    made: Made, proxy: proxies.Proxy, tmp_path: Path
) -> None:
    scores = miniplm.score(made.corpus.pool, proxy, dtype="float32", out=tmp_path / "scores")
    rows = held_out(proxy)
    assert scores.per("token")[rows["row"]] == pytest.approx(rows["predicted"], abs=1e-5)
    chosen = miniplm.DifferenceSampling(ratio=0.3).select_predicted(scores)
    assert chosen.rows.tolist() == sorted(np.argsort(-scores.per("token"), kind="stable")[: len(chosen)].tolist())
    again = miniplm.score(made.corpus.pool, proxy.path, dtype="float32", out=tmp_path / "scores")  # by its folder
    assert again.fingerprint == scores.fingerprint
    copy = pickle.loads(pickle.dumps(proxy))  # as it goes to a worker elsewhere
    tokens = np.array(made.corpus.pool.dataset[:4]["input_ids"])
    counted = np.ones((4, T), bool)
    assert np.array_equal(copy.score(tokens, counted), proxy.score(tokens, counted))


def test_padding_and_the_company_of_a_batch_change_nothing(made: Made, proxy: proxies.Proxy) -> None:
    tokens = np.array(made.corpus.pool.dataset[:3]["input_ids"])
    counted = np.ones((3, T), bool)
    alone = proxy.score(tokens[1:2, :21], counted[1:2, :20])
    tokens[1, 21:], counted[1, 20:] = 7, False
    assert proxy.score(tokens, counted)[1] == pytest.approx(alone[0], rel=1e-5)


def test_the_difference_per_byte_is_learnt_per_byte(made: Made, tmp_path: Path) -> None:
    proxy = made.train(tmp_path / "proxy", normalize="byte", epochs=0)
    rows = held_out(proxy)
    assert np.array_equal(rows["difference"], differences(made.teacher, made.reference, "byte")[rows["instance"]])
    assert proxy.figures["normalize"] == "byte"


def test_the_costs_are_those_of_the_arithmetic(made: Made, proxy: proxies.Proxy) -> None:
    flops, instances = proxy.figures["flops"], proxy.figures["instances"]
    vocabulary = load_model(GivenModel(model=str(made.model.path))).config.vocab_size
    layer = 4 * 32 * 32 + 3 * 32 * 64
    backbone = 2 * 2 * layer + 2 * T * 32 * 2
    whole = backbone + 2 * 32 * vocabulary
    assert flops["per_token"] == {"teacher": whole, "reference": whole, "proxy": backbone}
    steps = 2 * instances["training"] // 16
    passes = (
        instances["training"]  # the ridge regression
        + 3 * 16 * steps
        + 3 * instances["validation"]  # before the first epoch and after each of two
        + instances["held_out"]
    )
    sample, pool = len(made.sample) * T, len(made.corpus.pool) * T
    assert (flops["sample_tokens"], flops["pool_tokens"]) == (sample, pool)
    assert flops["fine_tuning"] == passes * T * backbone
    assert flops["full_path"] == 2 * whole * pool
    assert flops["proxy_path"] == 2 * whole * sample + passes * T * backbone + backbone * pool
    assert flops["saved"] == 1 - flops["proxy_path"] / flops["full_path"]


def test_a_models_operations_are_told_from_its_config(made: Made) -> None:
    given = GivenModel(model=str(made.model.path))
    assert model_flops(given, T) == forward_flops(load_model(given), T)


def test_without_the_teacher_model_its_costs_are_not_told(made: Made, tmp_path: Path) -> None:
    settings = ProxySettings(**{**SETTINGS, "epochs": 0})
    what = proxies.identity(settings, "all", {})
    flops = fitting.train_proxy(made.data(), settings, tmp_path / "proxy", what).figures["flops"]
    assert flops["full_path"] is flops["proxy_path"] is flops["saved"] is flops["teacher_on_sample"] is None
    assert flops["proxy_on_pool"] > 0


@pytest.mark.parametrize("moment", ["_tune", "_save", "measures"])
def test_killed_and_begun_again_it_ends_with_the_same_bytes(
    made: Made, proxy: proxies.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def dies(function: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*given: Any) -> None:
            function(*given)
            raise KeyboardInterrupt

        return dying

    with monkeypatch.context() as patch:
        patch.setattr(fitting, moment, dies(getattr(fitting, moment)))
        with pytest.raises(KeyboardInterrupt):
            made.train(tmp_path / "elsewhere" / "proxy")
    assert (tmp_path / "elsewhere" / "proxy.partial").exists()
    again = made.train(tmp_path / "elsewhere" / "proxy")
    assert contents(again.path) == contents(proxy.path)
    assert list(artifact.verify(again.path)) == []
    assert not list(again.path.glob("state*"))


def test_what_cannot_be_used_is_an_error_that_says_why(made: Made, tmp_path: Path) -> None:
    pool_scores = miniplm.score(made.corpus.pool, Planted(1.0), out=tmp_path / "pool-scores")
    with pytest.raises(ArtifactMismatchError, match="other instances than the sample"):
        miniplm.train_proxy(
            made.sample, teacher=pool_scores, reference=pool_scores, model=made.model, out=tmp_path / "a"
        )
    with pytest.raises(TrainingError, match="nothing to learn"):
        miniplm.train_proxy(
            made.sample, teacher=made.reference, reference=made.reference, model=made.model, out=tmp_path / "b"
        )
    few = miniplm.sample(made.corpus.pool, share=1e-9, out=tmp_path / "few")
    scores = miniplm.score(few, Planted(1.0), out=tmp_path / "few-scores")
    with pytest.raises(TrainingError, match="too small"):
        miniplm.train_proxy(few, teacher=scores, reference=scores, model=made.model, out=tmp_path / "c")
    with pytest.raises(RecipeError, match="epochs"):
        made.train(tmp_path / "d", epochs=-1)
    write_jsonl(tmp_path / "other.jsonl", 200)
    (tmp_path / "other.jsonl").write_text((tmp_path / "other.jsonl").read_text().replace("the", "zebra"))
    other = miniplm.prepare(
        tmp_path / "other.jsonl", tokenizer={"train": {"vocab_size": 300}}, sequence_length=T, out=tmp_path / "o",
        split={"held_out": 0.1, "reference": 0.2},
    )  # fmt: skip
    model = miniplm.train(TINY, other.pool, tokens=31 * 16, out=tmp_path / "model", **HOW)
    with pytest.raises(TokenizerError, match="another tokenizer"):
        miniplm.train_proxy(
            made.sample, teacher=made.teacher, reference=made.reference, model=model, out=tmp_path / "e"
        )


TRAINED = {
    "config": TINY,
    "tokens": 31 * 16 * 8,
    "batch_tokens": 31 * 16,
    "learning_rate": 2e-3,
    "precision": "float32",
}
RECIPE: dict[str, Any] = {
    "schema": 1,
    "name": "proxied",
    "prepare": {
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": T,
        "split": {"reference": 0.2, "teacher": 0.2, "held_out": 0.1},
    },
    "teacher": {**TRAINED, "tokens": 31 * 16 * 30},
    "reference": TRAINED,
    "score": {"dtype": "float32"},
    "proxy": {"share": 0.3, **SETTINGS},
    "select": {
        "difference": {"sampler": "difference", "ratio": 0.4},
        "within": {"sampler": "difference", "within": "source"},
        "random": {"sampler": "random"},
    },
    "students": {"student": {**TRAINED, "data": "difference"}, "control": {"like": "student", "data": "random"}},
    "compute": {"device": "cpu"},
}


def recipe_with(corpus: str = "nothing.jsonl", **changes: Any) -> str:
    return yaml.safe_dump({**RECIPE, "corpus": {"files": corpus}, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("run")
    corpus = write_jsonl(folder / "corpus.jsonl", 400)
    stages = chain(parse(recipe_with(str(corpus))), folder / "run")
    run(stages)
    return stages


@pytest.mark.slow
def test_a_recipe_with_a_proxy_runs_from_end_to_end(finished: Chain) -> None:
    names = list(finished)
    for earlier, later in (
        ("proxy/sample", "score/teacher"), ("score/reference", "proxy/model"), ("proxy/model", "score/difference"),
        ("score/difference", "select/difference"),
    ):  # fmt: skip
        assert names.index(earlier) < names.index(later)
    assert {status.state for status in plan(finished)} == {"done"}
    pool, sample = (
        artifact.read(path).counts["instances"]
        for path in (finished["prepare"].path / "pool", finished["proxy/sample"].path)
    )
    assert [len(open_scores(finished[f"score/{name}"].path)) for name in ("teacher", "reference", "difference")] == [
        sample, sample, pool,
    ]  # fmt: skip
    predicted = open_scores(finished["score/difference"].path)
    chosen = open_selection(finished["select/difference"].path)
    assert chosen.rows.tolist() == miniplm.DifferenceSampling(ratio=0.4).select_predicted(predicted).rows.tolist()
    assert chosen.of == pool


@pytest.mark.slow
def test_the_report_of_a_run_with_a_proxy_says_how_good_and_how_cheap_it_was(finished: Chain) -> None:
    findings = gather(finished)
    figures = json.loads((finished["proxy/model"].path / proxies.FIGURES).read_bytes())
    assert findings["proxy"]["held_out"] == figures["held_out"]
    assert findings["proxy"]["flops"] == figures["flops"]
    agreement = figures["held_out"]["agreement"]
    assert findings["proxy"]["agreement"] == [
        {"selection": "difference", "ratio": 0.4, "agreement": agreement["0.4"], "by_chance": pytest.approx(0.52)},
        {"selection": "within", "ratio": 0.5, "agreement": agreement["0.5"], "by_chance": 0.5},
    ]
    lines = "\n".join(proxy_lines(findings))
    assert f"Spearman {figures['held_out']['spearman']:.3f}" in lines
    assert f"{figures['flops']['saved']:.1%} saved" in lines
    assert "9e+18 instead of 2e+20, 95%" in lines
    assert findings["scores"]["instances"] == len(open_scores(finished["score/difference"].path))
    rows = set(pool_rows(miniplm.open_packed(finished["proxy/sample"].path)).tolist())
    shown = findings["effects"]["hard_kept"]
    assert shown
    kept = set(open_selection(finished["select/difference"].path).rows.tolist())
    for example in shown:
        assert example["row"] in rows & kept
        assert (
            miniplm.open_packed(finished["prepare"].path / "pool").text(example["row"]).startswith(example["text"][:40])
        )
    page = write_report(finished).read_text()
    assert f"{figures['held_out']['spearman']:.3f}" in page
    assert "reference in place of the student" in page


@pytest.mark.slow
def test_another_reference_or_share_makes_another_proxy_and_another_ratio_does_not(
    finished: Chain, tmp_path: Path
) -> None:
    corpus = str(finished.recipe.corpus.files)
    base = {name: stage.identity.fingerprint for name, stage in finished.items()}

    def changed(**changes: Any) -> set[str]:
        stages = chain(parse(recipe_with(corpus, **changes)), finished.root)
        return {name for name, stage in stages.items() if stage.identity.fingerprint != base[name]}

    proxied = {"proxy/model", "score/difference", "select/difference", "select/within", "students/student"}
    proxied |= {"evaluate/student"}
    assert changed(proxy={**RECIPE["proxy"], "epochs": 1}) == proxied
    scored = proxied | {"proxy/sample", "score/teacher", "score/reference"}
    assert changed(proxy={**RECIPE["proxy"], "share": 0.2}) == scored
    select = {**RECIPE["select"], "difference": {"sampler": "difference", "ratio": 0.3}}
    assert changed(select=select) == {"select/difference", "students/student", "evaluate/student"}


@pytest.mark.slow
def test_plan_shows_how_far_the_sample_is_scored(finished: Chain, tmp_path: Path) -> None:
    stages = chain(
        parse(recipe_with(str(finished.recipe.corpus.files), proxy={**RECIPE["proxy"], "seed": 9})), tmp_path
    )
    for name, stage in stages.items():
        if stage.identity.fingerprint == finished[name].identity.fingerprint:
            stage.path.parent.mkdir(parents=True, exist_ok=True)
            stage.path.symlink_to(finished[name].path)
    run(stages, "proxy/sample")
    for name in ("score/teacher", "proxy/model"):
        artifact.partial_path(stages[name].path).mkdir(parents=True)
    states = {status.stage.name: str(status) for status in plan(stages)}
    assert states["score/teacher"] == "begun 0 of 1 shards"
    assert states["proxy/model"].startswith("waiting on score/teacher")


def refused(**changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(recipe_with(**changes))
    return str(caught.value)


def test_recipes_that_cannot_be_are_errors_that_say_why() -> None:
    for sampler in ("teacher", "reference"):
        message = refused(select={"difference": {"sampler": sampler}, "random": {"sampler": "random"}})
        assert "select.difference.sampler" in message
        assert "a share of the pool only" in message
    message = refused(select={**RECIPE["select"], "difference": {"sampler": "difference", "normalize": "byte"}})
    assert "proxy predicts the difference per token" in message
    assert "reference's weights" in refused(reference={"server": "http://localhost:1/v1", "model": "m"})
    assert "normalize" in refused(proxy={"normalize": "sum"})
    assert "nothing is left to train on" in refused(proxy={"held_out": 0.6, "validation": 0.4})


def test_a_proxy_can_be_left_out_of_a_recipe_that_has_one() -> None:
    recipe = parse(recipe_with(), overrides=["proxy=null"])
    assert recipe.proxy is None
    assert parse(recipe.resolved()) == recipe


class NeedsTheTeacher:
    """A sampler of one's own that reads the teacher's scores."""

    needs = frozenset({"teacher"})


class TakesPredictions(NeedsTheTeacher):
    """One that can do with a prediction."""

    def select_predicted(self, predicted: Scores) -> Any:
        return miniplm.DifferenceSampling(ratio=0.5).select_predicted(predicted)


def test_a_sampler_of_ones_own_says_whether_a_prediction_will_do(tmp_path: Path) -> None:
    corpus = str(write_jsonl(tmp_path / "c.jsonl", 20))
    text = recipe_with(corpus, select={"own": {"sampler": f"{__name__}:NeedsTheTeacher"}}, students={})
    with pytest.raises(MiniplmError, match=r"cannot be used with a proxy[\s\S]*scores of the teacher"):
        chain(parse(text), tmp_path / "run")
    stages = chain(parse(text.replace("NeedsTheTeacher", "TakesPredictions")), tmp_path / "run")
    assert stages["select/own"].needs == ("prepare", "score/difference")
