"""Agreement against the slow and obvious, and intervals that hold the truth about as often as they say."""

from __future__ import annotations

import json
from math import asin, pi

import numpy as np
import pytest

from miniplm.analysis.agreement import agreement, by_chance, pearson, spearman, student_agreement
from miniplm.analysis.intervals import Measured, bootstrap, jackknife, mean_of
from miniplm.errors import ArtifactMismatchError, RecipeError
from miniplm.scoring.base import Scores


def scores_of(logp: list[float] | np.ndarray, *, packed: str = "p", tokenizer: str = "t", tokens: int = 10) -> Scores:
    n = len(logp)
    return Scores(
        logp=np.asarray(logp, np.float64),
        n_tokens=np.full(n, tokens, np.int32),
        n_bytes=np.full(n, 40, np.int32),
        source=np.zeros(n, np.int32),
        sources=("s",),
        packed=packed,
        tokenizer=tokenizer,
    )


def three(n: int = 60, seed: int = 0) -> tuple[Scores, Scores, Scores]:
    draw = np.random.default_rng(seed)
    teacher = draw.normal(-30, 3, n)
    gap = draw.gamma(4, 2, n)
    return scores_of(teacher), scores_of(teacher - gap), scores_of(teacher - 0.7 * gap - draw.normal(3, 1, n))


def slow_pearson(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / (sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) ** 0.5


def slow_rank(values: list[float]) -> list[float]:
    """How many are smaller, and half of how many are equal."""
    return [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values]


def slow_agreement(a: list[float], b: list[float], ratio: float) -> float:
    def kept(values: list[float]) -> set[int]:
        return set(sorted(range(len(values)), key=lambda row: (-values[row], row))[: int(ratio * len(values))])

    return sum((row in kept(a)) == (row in kept(b)) for row in range(len(a))) / len(a)


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_agreement_with_a_student_is_that_of_the_two_differences(ratio: float) -> None:
    teacher, reference, student = three()
    chosen = [(t - r) / 10 for t, r in zip(teacher.logp, reference.logp, strict=True)]
    ideal = [(t - s) / 10 for t, s in zip(teacher.logp, student.logp, strict=True)]
    found = student_agreement(teacher, reference, student, ratio=ratio)
    assert found.instances == 60
    assert found.pearson.value == pytest.approx(slow_pearson(chosen, ideal))
    assert found.spearman.value == pytest.approx(slow_pearson(slow_rank(chosen), slow_rank(ideal)))
    assert found.agreement.value == pytest.approx(slow_agreement(chosen, ideal, ratio))
    assert found.pearson.value == pytest.approx(pearson(np.array(chosen), np.array(ideal)))
    assert found.spearman.value == pytest.approx(spearman(np.array(chosen), np.array(ideal)))
    for one in (found.pearson, found.spearman, found.agreement):
        assert one.low < one.value < one.high <= 1


def test_agreement_is_plain_json_with_three_intervals() -> None:
    found = student_agreement(*three()).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["agreement"].keys() == {"value", "low", "high"}
    assert found["by_chance"] == 0.5


def test_agreement_depends_on_the_seed_only_in_its_intervals_and_not_on_the_order_of_instances() -> None:
    teacher, reference, student = three()
    first, again = student_agreement(teacher, reference, student), student_agreement(teacher, reference, student)
    assert first == again
    other = student_agreement(teacher, reference, student, seed=1)
    assert other.pearson.value == first.pearson.value
    assert other.pearson.low != first.pearson.low
    order = np.random.default_rng(0).permutation(60)
    moved = student_agreement(*(scores_of(one.logp[order]) for one in (teacher, reference, student)))
    for name in ("pearson", "spearman", "agreement"):
        a, b = getattr(first, name), getattr(moved, name)
        assert b.value == pytest.approx(a.value)
        assert b.low == pytest.approx(a.low, abs=0.1)


def test_a_student_that_is_the_reference_agrees_fully_and_a_constant_one_not_at_all() -> None:
    teacher, reference, _ = three()
    same = student_agreement(teacher, reference, reference)
    assert same.agreement == Measured(1.0, 1.0, 1.0)
    assert same.pearson.value == pytest.approx(1)
    constant = student_agreement(teacher, reference, scores_of(teacher.logp))
    assert (constant.pearson.value, constant.spearman.value) == (0.0, 0.0)


def test_rankings_that_know_nothing_of_each_other_agree_by_chance() -> None:
    draw = np.random.default_rng(0)
    for ratio in (0.1, 0.5, 0.8):
        found = agreement(draw.normal(size=200_000), draw.normal(size=200_000), ratio)
        assert found == pytest.approx(by_chance(ratio), abs=0.005)


def test_scores_of_other_instances_or_tokens_are_refused_by_name() -> None:
    teacher, reference, student = three()
    with pytest.raises(ArtifactMismatchError, match="teacher and student were scored on different instances"):
        student_agreement(teacher, reference, scores_of(student.logp, packed="other"))
    with pytest.raises(ArtifactMismatchError, match="teacher and student were scored on different instances"):
        student_agreement(teacher, reference, scores_of(student.logp[:-1]))
    with pytest.raises(ArtifactMismatchError, match="teacher and reference"):
        student_agreement(teacher, scores_of(reference.logp, packed="other"), student)
    own = scores_of(student.logp, tokenizer="own", tokens=7)
    with pytest.raises(ArtifactMismatchError, match="normalize: byte"):
        student_agreement(teacher, reference, own)
    per_byte = student_agreement(teacher, reference, own, normalize="byte")
    assert per_byte.spearman.value == pytest.approx(student_agreement(teacher, reference, student).spearman.value)
    with pytest.raises(RecipeError, match="ratio"):
        student_agreement(teacher, reference, student, ratio=0)


def test_the_bootstrap_of_a_mean_is_the_textbooks_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    (found,) = bootstrap(lambda rows: (values[rows].mean(),), 400)
    textbook = mean_of(values)
    assert found.value == textbook.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(textbook.low, abs=0.02)
    assert found.high == pytest.approx(textbook.high, abs=0.02)


def test_of_many_instances_fewer_are_drawn_for_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(5, 2, 4000)

    def mean(rows: np.ndarray) -> tuple[float]:
        return (float(values[rows].mean()),)

    (full,) = bootstrap(mean, 4000)
    monkeypatch.setattr("miniplm.analysis.intervals.MOST_DRAWN", 250)
    (fewer,) = bootstrap(mean, 4000)
    assert fewer.value == full.value
    assert fewer.high - fewer.low == pytest.approx(full.high - full.low, rel=0.1)


def test_the_jackknife_of_a_mean_is_the_textbooks_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, 30)
    without = (values.sum() - values) / 29
    found, textbook = jackknife(float(values.mean()), without), mean_of(values)
    assert (found.low, found.high) == (pytest.approx(textbook.low), pytest.approx(textbook.high))


def test_the_interval_of_a_difference_is_welchs_where_both_are_symmetric() -> None:
    found = Measured(3.0, 2.7, 3.3).minus(Measured(1.0, 0.6, 1.4))
    assert (found.value, found.low, found.high) == (pytest.approx(2), pytest.approx(1.5), pytest.approx(2.5))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draw, rho, n, times = np.random.default_rng(1), 0.8, 150, 80
    truth = {"pearson": rho, "spearman": 6 / pi * asin(rho / 2), "agreement": 0.5 + asin(rho) / pi}
    held = dict.fromkeys(truth, 0)
    for _ in range(times):
        a = draw.normal(size=n)
        b = rho * a + (1 - rho**2) ** 0.5 * draw.normal(size=n)
        found = student_agreement(scores_of(np.zeros(n)), scores_of(-a), scores_of(-b), resamples=150)
        for name, value in truth.items():
            held[name] += getattr(found, name).low <= value <= getattr(found, name).high
    assert all(0.87 * times <= count <= times for count in held.values()), held
