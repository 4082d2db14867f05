"""What several seeds say: means with intervals, and whether a difference is more than noise.

Runs with the same seed are pairs: they share the order of data and the first weights as far as they can. So the
difference of two ways is taken seed by seed, and its interval is Student's over the seeds: mean ± t · s / √n. It speaks
of other seeds of the same training on the same corpus and models, and of nothing else.

An accuracy is a count of few questions, and equal differences of two or three seeds are common by chance: seeds alone
would give an interval without width. So the differences of tasks are `widened` by the error over questions. That is
conservative, for both models answer the same questions and a part of the error is in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from miniplm.analysis.intervals import mean_of
from miniplm.errors import RecipeError

_NORMAL = 1.959964  # standard errors on either side that hold 95 in 100
Verdict = Literal["better", "within noise", "worse", "one seed"]


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over seeds, with an interval that holds the mean over all seeds 95 times in 100.

    Attributes:
        value: the mean.
        low: end of the interval; None with one seed.
        high: likewise.
        deviation: the standard deviation over seeds (n − 1); None with one seed.
        seeds: how many.

    """

    value: float
    low: float | None
    high: float | None
    deviation: float | None
    seeds: int

    @property
    def half(self) -> float | None:
        """Half of the interval's length: value ± half."""
        return None if self.low is None else self.value - self.low


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """The mean of one number a seed and its interval. Raises RecipeError if there is none."""
    if not values:
        raise RecipeError("there are no runs to take a mean of.")
    if len(values) == 1:
        return Mean(values[0], None, None, None, 1)
    found = mean_of(values)
    return Mean(found.value, found.low, found.high, float(np.std(values, ddof=1)), len(values))


def paired(ours: Mapping[int, float], control: Mapping[int, float]) -> Mean:
    """Ours minus the control, by seed. Raises RecipeError if they have no seed in common."""
    return mean_over_seeds([ours[seed] - control[seed] for seed in sorted(ours.keys() & control.keys())])


def widened(difference: Mean, errors: Sequence[tuple[float, float]]) -> Mean:
    """A difference of tasks whose interval takes in the error over questions too; with one seed it has none to widen.

    Added as squares: half of the interval over seeds, and half of that over questions, 1.96 · √(se² + se²) in the mean
    over seeds. Conservative: the questions are the same, and are taken to be drawn anew for each of the two.

    Args:
        difference: paired by seed.
        errors: for each seed the standard errors of both sides over their questions.

    """
    if difference.half is None or not errors:
        return difference
    of_questions = math.fsum(math.hypot(*pair) for pair in errors) / len(errors)
    half = math.hypot(difference.half, _NORMAL * of_questions)
    return replace(difference, low=difference.value - half, high=difference.value + half)


def verdict(difference: Mean, *, lower_is_better: bool) -> Verdict:
    """What the interval of a difference says; `within noise` if it holds 0 or has no width (seeds alike by chance)."""
    if difference.low is None or difference.high is None:
        return "one seed"
    if difference.low <= 0 <= difference.high or math.isclose(difference.low, difference.high, rel_tol=1e-9):
        return "within noise"
    return "better" if (difference.value < 0) == lower_is_better else "worse"
