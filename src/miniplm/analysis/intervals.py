"""A figure and the interval that it is known to: 95 %, by the one of three ways that fits it.

    mean_of      a mean over independent parts             Student's t
    jackknife    a smooth figure of n independent things   leave each out; Student's t
    bootstrap    any figure of n independent things        draw n with replacement, again and again; percentiles

All three take the things to be drawn independently. Instances of one document are alike, so where a sample has several
of each document the true interval is wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 1000
MOST_DRAWN = 10_000  # in a resample; of more things fewer are drawn, and the interval shrinks as the root of n


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def minus(self, other: Measured) -> Measured:
        """The difference of two figures of independent samples.

        The ends are those of Zou and Donner (2008, "Construction of confidence limits about effect measures"): the
        distances from value to end add as squares, each side for itself.
        """
        value = self.value - other.value
        below = np.hypot(self.value - self.low, other.high - other.value)
        above = np.hypot(self.high - self.value, other.value - other.low)
        return Measured(value, value - float(below), value + float(above))

    def times(self, factor: float) -> Measured:
        """The same in another unit; `factor` is positive."""
        return Measured(self.value * factor, self.low * factor, self.high * factor)

    def as_dict(self) -> dict[str, float]:
        """As JSON: `{value, low, high}`."""
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_of(parts: Sequence[float] | NDArray[np.float64]) -> Measured:
    """The mean of two or more independent parts, ± t · s / √n."""
    value = float(np.mean(parts))
    return _around(value, float(np.std(parts, ddof=1)) / len(parts) ** 0.5, len(parts))


def jackknife(value: float, without: NDArray[np.float64]) -> Measured:
    """A figure of n things, from what it is without each of them, `[n]`."""
    count = len(without)
    variance = (count - 1) / count * float(((without - without.mean()) ** 2).sum())
    return _around(value, variance**0.5, count)


def bootstrap(
    figures: Callable[[NDArray[np.int64]], Sequence[float]], count: int, seed: int = 0, resamples: int = RESAMPLES
) -> list[Measured]:
    """Some figures of `count` things, all from the same resamples.

    Args:
        figures: of the things with these numbers, which may repeat.
        count: how many things there are.
        seed: of the draws.
        resamples: how many.

    """
    generator = np.random.default_rng(seed)
    values = np.asarray(figures(np.arange(count, dtype=np.int64)), np.float64)
    drawn = min(count, MOST_DRAWN)
    again = np.asarray([figures(generator.integers(0, count, drawn)) for _ in range(resamples)], np.float64)
    ends = np.quantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    low, high = values + (ends - values) * (drawn / count) ** 0.5
    return [Measured(*map(float, one)) for one in zip(values, low, high, strict=True)]


def _around(value: float, standard_error: float, count: int) -> Measured:
    from scipy.stats import t  # a second to import

    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * standard_error
    return Measured(value, value - half, value + half)
