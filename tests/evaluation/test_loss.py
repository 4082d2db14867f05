"""Held-out figures by hand, their standard errors against a bootstrap, and paired comparison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from miniplm.errors import RecipeError
from miniplm.evaluation.loss import ALL, Difference, Row, compare, loss_on, losses
from miniplm.scoring.base import Scores, encode_sources


def scores_of(
    logp: Any, n_tokens: Any, n_bytes: Any = None, source: list[str] | None = None, packed: str = "held out"
) -> Scores:
    count = len(logp)
    names, codes = encode_sources(source or ["web"] * count)
    return Scores(
        logp=np.asarray(logp, np.float64),
        n_tokens=np.asarray(n_tokens, np.int32),
        n_bytes=np.asarray(n_tokens if n_bytes is None else n_bytes, np.int32),
        source=codes,
        sources=names,
        packed=packed,
    )


def synthetic(count: int, seed: int) -> tuple[Scores, Scores]:
    """Two models on ragged instances: the loss of a token varies with the instance, and longer ones are easier."""
    draw = np.random.default_rng(seed)
    n_tokens = draw.integers(5, 400, count)
    difficulty = draw.gamma(9.0, 0.35, count) * (1.4 - n_tokens / 500)
    n_bytes = np.round(n_tokens * draw.uniform(2.5, 5.5, count))
    student = -n_tokens * (difficulty + draw.normal(-0.02, 0.3, count))
    return scores_of(-n_tokens * difficulty, n_tokens, n_bytes), scores_of(student, n_tokens, n_bytes)


def bootstrap(total: np.ndarray[Any, Any], amount: np.ndarray[Any, Any]) -> float:
    """Standard deviation of the ratio of sums over instances drawn again and again with replacement."""
    draw = np.random.default_rng(7)
    ratios = []
    for _ in range(3000):
        rows = draw.integers(0, len(total), len(total))
        ratios.append(total[rows].sum() / amount[rows].sum())
    return float(np.std(ratios))


def figure(rows: list[Row], metric: str, source: str = ALL) -> Row:
    (found,) = [row for row in rows if (row.metric, row.source) == (metric, source)]
    return found


def test_nats_per_token_and_bits_per_byte_of_three_instances_are_those_worked_out_by_hand() -> None:
    rows = losses(scores_of([-10.0, -20.0, -6.0], [5, 8, 2], [20, 31, 9]))
    nats, bits = figure(rows, "nats_per_token"), figure(rows, "bits_per_byte")
    assert nats.value == pytest.approx(36 / 15)
    assert bits.value == pytest.approx(36 / math.log(2) / 60)
    # -10 + 2.4 x 5 = 2, -20 + 2.4 x 8 = -0.8, -6 + 2.4 x 2 = -1.2; their sum of squares is 6.08
    assert nats.standard_error == pytest.approx(math.sqrt(6.08 / 2) / (5 * math.sqrt(3)))
    # 36 nats of 60 bytes are 0.6 a byte: residuals 2, -1.4, -0.6
    assert bits.standard_error == pytest.approx(math.sqrt(6.32 / 2) / (20 * math.log(2) * math.sqrt(3)))
    assert (nats.n, bits.n, nats.dataset) == (3, 3, "held_out")


def test_the_mean_is_over_tokens_and_not_over_instances() -> None:
    rows = losses(scores_of([-1.0, -99.0], [1, 33]))
    assert figure(rows, "nats_per_token").value == pytest.approx(100 / 34)


@pytest.mark.parametrize("metric", ["nats_per_token", "bits_per_byte"])
def test_the_standard_error_is_that_of_a_bootstrap_over_instances(metric: str) -> None:
    scores, _ = synthetic(400, seed=0)
    amount = scores.n_tokens if metric == "nats_per_token" else scores.n_bytes * math.log(2)
    expected = bootstrap(-scores.logp, amount.astype(np.float64))
    found = figure(losses(scores), metric).standard_error
    assert found == pytest.approx(expected, rel=0.1)
    naive = float(np.std(-scores.logp / amount, ddof=1)) / math.sqrt(len(scores))
    assert naive != pytest.approx(expected, rel=0.1), "any formula would do on these data"


def test_the_standard_error_of_a_single_instance_is_unknown() -> None:
    assert {row.standard_error for row in losses(scores_of([-3.0], [2]))} == {None}


def test_instances_with_the_same_loss_per_token_have_no_standard_error() -> None:
    row = figure(losses(scores_of([-2.0, -4.0, -10.0], [1, 2, 5])), "nats_per_token")
    assert row.value == pytest.approx(2.0)
    assert row.standard_error == pytest.approx(0.0, abs=1e-12)


def test_there_is_a_row_for_all_and_one_for_each_source_by_name() -> None:
    source = ["web", "code", "web", "books"]
    rows = losses(scores_of([-4.0, -9.0, -8.0, -5.0], [2, 3, 4, 5], [6, 7, 8, 9], source))
    assert [(row.source, row.metric) for row in rows] == [
        (name, metric) for name in (ALL, "books", "code", "web") for metric in ("nats_per_token", "bits_per_byte")
    ]
    expected = {ALL: 26 / 14, "books": 1.0, "code": 3.0, "web": 12 / 6}
    assert {n: figure(rows, "nats_per_token", n).value for n in expected} == pytest.approx(expected)
    assert figure(rows, "bits_per_byte", "web").value == pytest.approx(12 / math.log(2) / 14)
    assert {n: figure(rows, "nats_per_token", n).n for n in expected} == {ALL: 4, "books": 1, "code": 1, "web": 2}


def test_the_rows_of_a_source_are_those_of_its_instances_alone() -> None:
    scores, _ = synthetic(60, seed=1)
    source = ["a" if i % 3 else "b" for i in range(60)]
    rows = losses(scores_of(scores.logp, scores.n_tokens, scores.n_bytes, source))
    only = np.array([name == "b" for name in source])
    alone = losses(scores_of(scores.logp[only], scores.n_tokens[only], scores.n_bytes[only]))
    for metric in ("nats_per_token", "bits_per_byte"):
        part, whole = figure(rows, metric, "b"), figure(alone, metric)
        assert (part.value, part.standard_error, part.n) == (whole.value, whole.standard_error, whole.n)


def test_a_source_without_instances_has_no_row() -> None:
    given = scores_of([-4.0], [2])
    more = Scores(given.logp, given.n_tokens, given.n_bytes, given.source, ("web", "zzz"), "held out")
    assert {row.source for row in losses(more)} == {ALL, "web"}


def test_a_row_is_its_fields_by_name() -> None:
    row = Row("held_out", "web", "nats_per_token", 2.5, None, 1)
    assert row.as_dict() == {
        "dataset": "held_out", "source": "web", "metric": "nats_per_token", "value": 2.5, "standard_error": None,
        "n": 1,
    }  # fmt: skip


def test_the_mean_over_documents_is_that_of_each_ones_nats_per_token_and_counts_them_alike() -> None:
    rows = losses(scores_of([-10.0, -20.0, -6.0], [5, 8, 2], source=["a", "a", "b"]), "web", by_document=True)
    found = figure(rows, "nats_per_token_by_document")  # 2, 2.5, 3
    assert found.value == pytest.approx(2.5)
    assert found.standard_error == pytest.approx(math.sqrt((0.25 + 0 + 0.25) / 2) / math.sqrt(3))
    assert (found.dataset, found.n) == ("web", 3)
    of_a, of_b = (figure(rows, "nats_per_token_by_document", source) for source in "ab")
    assert (of_a.value, of_a.standard_error, of_a.n) == (pytest.approx(2.25), pytest.approx(0.25), 2)
    assert (of_b.value, of_b.standard_error, of_b.n) == (3.0, None, 1)
    assert figure(rows, "nats_per_token").value == pytest.approx(36 / 15)


def test_the_mean_over_documents_is_there_only_where_instances_are_documents() -> None:
    scores = scores_of([-10.0, -20.0], [5, 8])
    assert {row.metric for row in losses(scores)} == {"nats_per_token", "bits_per_byte"}
    more = losses(scores, by_document=True)
    assert [row for row in more if row.metric != "nats_per_token_by_document"] == losses(scores)
    assert len(more) == len(losses(scores)) + 2


def test_the_name_of_a_set_is_that_of_its_rows() -> None:
    scores = scores_of([-10.0, -20.0], [5, 8])
    assert {row.dataset for row in losses(scores)} == {"held_out"}
    assert {row.dataset for row in losses(scores, "dclm", by_document=True)} == {"dclm"}


def test_a_comparison_is_the_difference_of_the_two_losses_per_token() -> None:
    control, student = scores_of([-10.0, -20.0, -6.0], [5, 8, 2]), scores_of([-9.0, -16.0, -5.0], [5, 8, 2])
    found = compare(student, control)
    assert found.value == pytest.approx(30 / 15 - 36 / 15)
    # -1 + 0.4 x 5 = 1, -4 + 0.4 x 8 = -0.8, -1 + 0.4 x 2 = -0.2
    assert found.standard_error == pytest.approx(math.sqrt((1 + 0.64 + 0.04) / 2) / (5 * math.sqrt(3)))
    assert found.n == 3
    assert compare(control, student).value == -found.value


def test_the_standard_error_of_a_comparison_is_that_of_a_bootstrap_over_pairs() -> None:
    control, student = synthetic(400, seed=2)
    expected = bootstrap(control.logp - student.logp, student.n_tokens.astype(np.float64))
    found = compare(student, control)
    assert found.standard_error == pytest.approx(expected, rel=0.1)
    alone = [figure(losses(s), "nats_per_token").standard_error or 0.0 for s in (control, student)]
    assert found.standard_error < 0.7 * math.hypot(*alone), "pairing gains nothing on these data"


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(-0.3, "better"), (0.3, "worse"), (-0.19, "within noise"), (0.19, "within noise"), (0.0, "within noise")],
)
def test_a_difference_of_less_than_two_standard_errors_is_noise(value: float, verdict: str) -> None:
    assert Difference(value, 0.1, 50).verdict == verdict


def test_two_models_alike_in_every_instance_differ_by_nothing_and_neither_is_better() -> None:
    scores, _ = synthetic(30, seed=3)
    found = compare(scores, scores)
    assert (found.value, found.standard_error) == (0.0, 0.0)
    assert found.verdict == "within noise"


def test_one_instance_decides_nothing() -> None:
    found = compare(scores_of([-3.0], [2]), scores_of([-4.0], [2]))
    assert found.value == pytest.approx(-0.5)
    assert found.verdict == "within noise"


def test_measurements_on_different_instances_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different instances"):
        compare(scores_of([-3.0], [2]), scores_of([-3.0], [2], packed="others"))


def test_measurements_under_different_rules_for_what_counts_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different"):
        compare(scores_of([-3.0, -4.0], [2, 2]), scores_of([-3.0, -4.0], [2, 3]))


def test_the_loss_on_some_sources_is_theirs_together_and_a_source_that_is_not_there_is_named() -> None:
    scores = scores_of([-10.0, -20.0, -6.0], [5, 8, 2], [20, 31, 9], ["web", "code", "books"])
    assert loss_on(scores, ["web", "books"], "nats_per_token") == pytest.approx(16 / 7)
    assert loss_on(scores, ["web", "books"], "bits_per_byte") == pytest.approx(16 / math.log(2) / 29)
    with pytest.raises(RecipeError, match="no source 'law'"):
        loss_on(scores, ["law"], "nats_per_token")
