"""How much less compute the student needs than its control for the same result (paper, figure 1a).

In: the curves of student and control, along operations or tokens. Out: a `Reduction`: the control's compute over the
student's, both at the value (a loss, an accuracy) that one of them had in the end. The other one's compute there is
read from its measured curve where that got there, linear in the logarithm of the compute between two points, and
otherwise from the power law fitted to it; `read_from` says which.

Whose end it is matters, for the curves flatten. The paper's 2.2 is reckoned at the end of the control (Vanilla KD),
where the student was early and nothing is extrapolated. At the student's end the control is mostly not there yet, and
the figure is larger: by the paper's own laws 1.97 instead of 1.71 for the 500M student.

A curve is read where it *first* is there, so where it is noisy and flat the reading is early. The interval draws the
points of the curve and the value anew, with the scatter of these points about their law. `scaling` says what such
intervals do not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from miniplm.analysis.intervals import Measured
from miniplm.analysis.laws import PowerLaw
from miniplm.analysis.power_terms import Floats, scatter
from miniplm.analysis.scaling import DELTA, Fit, finite, fit_power_law, points, within
from miniplm.errors import RecipeError


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """What was measured along a run: `compute` [n], operations or tokens, and `value` [n], both above 0."""

    compute: Floats
    value: Floats

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, Any]], value: str = "held_out_loss", along: str = "flops") -> Curve:
        """From the points of a loss curve on disk, by the names of their fields; points without the value are none."""
        found = [point for point in measured if point.get(value) is not None]
        return cls(*(np.array([point[name] for point in found], np.float64) for name in (along, value)))

    def falling(self, ceiling: float | None) -> Curve:
        """The curve in order, as one that falls towards 0: the loss itself, or how far `value` is below `ceiling`."""
        if len(self.value) == 0:
            raise RecipeError("a curve has no point.", remedy="Measure the model at its end at least.")
        (compute,), value = points({"compute": self.compute}, self.value if ceiling is None else ceiling - self.value)
        order = np.argsort(compute, kind="stable")
        return Curve(compute[order], value[order])


@dataclass(frozen=True, slots=True)
class Reduction:
    """What student and control need for the same value; a compute without an interval is exact: it is a run's own."""

    target: float
    end_of: Literal["student", "control"]  # who had the target in the end
    student: Measured  # compute at the target
    control: Measured
    read_from: Literal["curve", "law"]  # where the other one's compute was read

    @property
    def ratio(self) -> Measured:
        """The compute reduction, control over student: above 1 where the student needs less."""
        above, below = self.control, self.student
        return Measured(above.value / below.value, above.low / below.high, above.high / below.low)

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, None for what is not finite."""
        figures = {"student": self.student, "control": self.control, "ratio": self.ratio}
        given = {"target": self.target, "end_of": self.end_of, "read_from": self.read_from}
        return given | {name: finite(one) for name, one in figures.items()}


def compute_reduction(
    student: Curve,
    control: Curve,
    *,
    end_of: Literal["student", "control"] = "student",
    ceiling: float | None = None,
    warm_up: float = 0.0,
    delta: float = DELTA,
    bootstrap: int = 500,
    seed: int = 0,
) -> Reduction:
    """The control's compute over the student's, at the value that one of them had in the end.

    Args:
        student: at least 4 points, or 1 where the value is its own.
        control: likewise.
        end_of: whose last value it is: `control` as in the paper's figure, or `student`.
        ceiling: for a value that rises, the highest it could be: 1 for an accuracy, 100 for one in per cent. The law
            is then that of the distance from there.
        warm_up: see `fit_power_law`; only the law leaves these points out.
        delta: see `fit_power_law`.
        bootstrap: draws for the interval.
        seed: of the draws.

    Raises:
        RecipeError: too few points, or a value that is not finite or not below the ceiling.

    """
    ended, other = student.falling(ceiling), control.falling(ceiling)
    if end_of == "control":
        ended, other = other, ended
    fit = fit_power_law(other.compute, other.value, warm_up=warm_up, delta=delta, bootstrap=bootstrap, seed=seed)
    goal, took = float(ended.value[-1]), Measured(*[float(ended.compute[-1])] * 3)
    read = _read(other, goal)
    if read is None:
        needed = _beyond(fit.compute_for(goal, measured=True), float(other.compute[-1]))
    else:
        needed = within(read, _readings(other, goal, fit, seed))
    target = goal if ceiling is None else ceiling - goal
    both = (took, needed) if end_of == "student" else (needed, took)
    return Reduction(target, end_of, *both, "law" if read is None else "curve")


def _beyond(needed: Measured, trained: float) -> Measured:
    """What a law says of a curve that was not there by its end: that end at the earliest, whatever the law says."""
    return Measured(max(needed.value, trained), needed.low, max(needed.high, trained))


def _read(curve: Curve, goal: float) -> float | None:
    """The compute at which a falling curve first is as low as `goal`; its first point's if that is; None if never."""
    reached = np.flatnonzero(curve.value <= goal)
    if len(reached) == 0:
        return None
    there = int(reached[0])
    if there == 0:
        return float(curve.compute[0])
    (before, after), (early, late) = curve.value[there - 1 : there + 1], np.log(curve.compute[there - 1 : there + 1])
    return float(np.exp(early + (before - goal) / (before - after) * (late - early)))


def _readings(curve: Curve, goal: float, fit: Fit[PowerLaw], seed: int) -> list[float]:
    """Readings [B] of curve and goal drawn anew; of the sample's law where the drawn curve does not get there."""
    generator = np.random.default_rng((seed, 1))  # draws of their own, beside those of the fit
    noise = scatter(fit.residuals, 3, (len(fit.samples), len(curve.value) + 1), generator)
    readings = []
    for law, drawn in zip(fit.samples, np.exp(noise), strict=True):
        read = _read(Curve(curve.compute, curve.value * drawn[1:]), goal * float(drawn[0]))
        readings.append(law.compute_for(goal * float(drawn[0])) if read is None else read)
    return readings
