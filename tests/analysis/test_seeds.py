"""Means over seeds: Student's interval by hand, by scipy and by its coverage; pairs by seed; verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from miniplm.analysis.seeds import Mean, mean_over_seeds, paired, verdict, widened
from miniplm.errors import RecipeError


def test_the_interval_of_three_values_is_that_worked_out_by_hand() -> None:
    found = mean_over_seeds([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # the 97.5 % point of Student's t with two degrees of freedom; s is 1
    assert (found.value, found.deviation, found.seeds) == (2.0, 1.0, 3)
    assert (found.low, found.high, found.half) == pytest.approx((2 - half, 2 + half, half))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_is_that_of_scipy(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(3.0, 0.2, seeds).tolist()
    found = mean_over_seeds(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(sum(values) / seeds)


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    draw = np.random.default_rng(0)
    for seeds in (2, 5):
        means = [mean_over_seeds(draw.normal(-0.1, 0.03, seeds).tolist()) for _ in range(2000)]
        holds = sum((one.low or 0) <= -0.1 <= (one.high or 0) for one in means)
        assert abs(holds / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_one_seed_has_a_value_and_nothing_else() -> None:
    assert mean_over_seeds([2.5]) == Mean(2.5, None, None, None, 1)
    assert mean_over_seeds([2.5]).half is None


def test_no_seed_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no runs"):
        mean_over_seeds([])
    with pytest.raises(RecipeError, match="no runs"):
        paired({1: 1.0}, {2: 1.0})


def test_differences_are_those_of_the_same_seed_in_whatever_order_they_come() -> None:
    ours, control = {3: 5.0, 1: 4.0, 7: 9.0, 8: 0.0}, {7: 8.5, 3: 6.0, 1: 4.5, 2: 100.0}
    assert paired(ours, control) == mean_over_seeds([4.0 - 4.5, 5.0 - 6.0, 9.0 - 8.5])


def test_pairing_takes_out_what_two_runs_of_a_seed_have_in_common() -> None:
    draw = np.random.default_rng(1)
    shared = draw.normal(5.0, 1.0, 5)
    ours = dict(enumerate(shared - 0.1 + draw.normal(0, 0.01, 5)))
    control = dict(enumerate(shared))
    found = paired(ours, control)
    assert found.half is not None
    assert found.half < 0.05
    assert verdict(found, lower_is_better=True) == "better"
    apart = mean_over_seeds(list(ours.values()))
    assert apart.half is not None
    assert apart.half > 0.5


def mean(value: float, half: float) -> Mean:
    return Mean(value, value - half, value + half, 1.0, 3)


@pytest.mark.parametrize(
    ("difference", "lower", "higher"),
    [
        (mean(-0.3, 0.2), "better", "worse"),
        (mean(0.3, 0.2), "worse", "better"),
        (mean(-0.3, 0.4), "within noise", "within noise"),
        (mean(0.3, 0.3), "within noise", "within noise"),
        (mean(0.0, 0.0), "within noise", "within noise"),
        (mean(-0.1, 0.0), "within noise", "within noise"),  # seeds that happen to agree prove nothing
        (mean_over_seeds([0.3 - 0.2, 0.4 - 0.3]), "within noise", "within noise"),  # equal but for rounding
        (Mean(-9.0, None, None, None, 1), "one seed", "one seed"),
    ],
)
def test_a_verdict_follows_the_interval_and_which_side_is_better(difference: Mean, lower: str, higher: str) -> None:
    assert verdict(difference, lower_is_better=True) == lower
    assert verdict(difference, lower_is_better=False) == higher


def test_of_two_ways_that_are_the_same_one_in_twenty_seems_to_differ() -> None:
    draw = np.random.default_rng(2)
    runs = (tuple(dict(enumerate(values)) for values in draw.normal(0, 1, (2, 5))) for _ in range(2000))
    verdicts = [verdict(paired(ours, control), lower_is_better=True) for ours, control in runs]
    for word in ("better", "worse"):
        assert abs(verdicts.count(word) / 2000 - 0.025) < 4 * math.sqrt(0.025 * 0.975 / 2000)


def test_equal_differences_of_tasks_are_as_uncertain_as_their_questions() -> None:
    """Two seeds, both 2 questions of 100 better: an interval of no width until the questions count."""
    gap = paired({0: 0.42, 1: 0.47}, {0: 0.40, 1: 0.45})
    errors = [(0.05, 0.05), (0.03, 0.04)]
    found = widened(gap, errors)
    half = 1.959964 * (math.sqrt(0.005) + 0.05) / 2
    assert (found.value, found.half) == pytest.approx((0.02, half))
    assert (gap.half, found.high) == pytest.approx((0.0, 0.02 + half))
    assert (found.deviation, found.seeds) == (gap.deviation, gap.seeds)
    assert verdict(found, lower_is_better=False) == "within noise"
    assert verdict(widened(gap, [(0.005, 0.005)] * 2), lower_is_better=False) == "better"


def test_both_errors_add_as_squares_and_one_seed_has_no_interval_to_widen() -> None:
    gap = mean_over_seeds([0.1, 0.2, 0.3])
    assert gap.half is not None
    assert widened(gap, [(0.3, 0.4)] * 3).half == pytest.approx(math.hypot(gap.half, 1.959964 * 0.5))
    assert widened(gap, []) == gap
    assert widened(mean_over_seeds([0.1]), [(0.3, 0.4)]) == Mean(0.1, None, None, None, 1)


def test_two_models_alike_in_nothing_but_skill_are_seldom_told_apart() -> None:
    """Answers of 200 questions at 40 %, two seeds: seeds alone say 'differs' where they happen to agree."""
    draw = np.random.default_rng(3)
    questions, told = 200, 0
    for ours, theirs in draw.binomial(questions, 0.4, (1000, 2, 2)) / questions:
        errors = [
            (math.sqrt(a * (1 - a) / questions), math.sqrt(b * (1 - b) / questions))
            for a, b in zip(ours, theirs, strict=True)
        ]
        found = widened(paired(dict(enumerate(ours)), dict(enumerate(theirs))), errors)
        told += verdict(found, lower_is_better=False) != "within noise"
    assert told / 1000 < 0.05
