"""Loss curves from models on disk or from files, and what scaling laws say of them as JSON types.

In: points, a mapping of fields each, and a `Reading` that says which fields are meant and how they are fitted. Out:
the laws with their intervals, what they say of more compute, what a control would need. The numbers are those of
`miniplm.analysis`; here is decided only what they are taken of. No torch: it takes seconds to import.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.analysis.compute_reduction import Curve, compute_reduction
from miniplm.analysis.data_constrained import data_reduction, effective_tokens
from miniplm.analysis.intervals import Measured
from miniplm.analysis.power_terms import FLOOR_DEPTH
from miniplm.analysis.scaling import finite, fit_parameters_and_data, fit_power_law
from miniplm.errors import RecipeError
from miniplm.training.checkpoint import read_curve

Points = Sequence[Mapping[str, Any]]

STEEP = 0.2  # of training: the first, steep part of a curve, which follows no power law
FURTHER = 10.0  # times a curve's last compute: how far it is extrapolated where nobody says
LINE_POINTS = 33  # of a law that is drawn
UNTOLD = math.exp(1 - FLOOR_DEPTH)  # of the least loss: a floor below that is the bound of the fit, and no finding


@dataclass(frozen=True, slots=True)
class Reading:
    """Which fields of the points are meant, and how they are fitted.

    Attributes:
        along: field of the compute: operations, or tokens.
        value: field of the loss, or of an accuracy.
        ceiling: of a value that rises, the highest it could be; its laws are those of the distance from there.
        warm_up: share of the compute at the beginning that the laws leave out.
        seed: of the intervals.

    """

    along: str = "flops"
    value: str = "held_out_loss"
    ceiling: float | None = None
    warm_up: float = STEEP
    seed: int = 0


def read_points(path: Path) -> Points:
    """The points of a trained model's loss curve, or those of a file: JSON lines, or CSV with a header, its cells text.

    Raises:
        RecipeError: there is no such model or file, or it cannot be read.

    """
    try:
        if path.is_dir():
            return read_curve(path)
        text = path.read_text(encoding="utf-8-sig")
        return _cells(text) if path.suffix == ".csv" else _objects(text)
    except (OSError, ValueError, csv.Error) as error:
        raise RecipeError(
            f"{path} has no loss curve that can be read.",
            facts={"because": error},
            remedy="Name a model that was trained here, or a file of points: JSON lines or CSV with a header.",
        ) from error


def scaling(
    curves: Mapping[str, Points], control: str | None = None, *, at: Sequence[float] = (), how: Reading = Reading()
) -> dict[str, Any]:
    """The law of each curve; with a control, one of the curves, the compute that it would need beside the others'.

    Raises RecipeError if a curve has too few points, or none with these fields, or rises where a loss falls.
    """
    others = [name for name in curves if name != control]
    return {
        "along": how.along,
        "value": how.value,
        "ceiling": how.ceiling,
        "warm_up": how.warm_up,
        "control": control,
        "curves": [extrapolate(name, points, at=at, how=how) for name, points in curves.items()],
        "reductions": [{"name": name, **compare(curves[name], curves[control], how)} for name in others if control],
    }


def scaling_of_sizes(
    runs: Mapping[str, Points], parameters: str, *, at: Sequence[float] = (), how: Reading = Reading()
) -> dict[str, Any]:
    """The law L(N, D) of each file of runs, which differ in size and tokens, and the losses of its largest model.

    Args:
        runs: name -> a point for each run, at its end.
        parameters: field of the model's size; `how.along` is that of the tokens.
        at: tokens to extrapolate to; none: `FURTHER` times the largest.
        how: nothing is left out as warm-up, and there is no ceiling.

    Raises:
        RecipeError: too few points, or none with these fields.

    """
    _check_at(at)
    fitted = []
    for name, points in runs.items():
        sizes, tokens, loss = _columns(points, (parameters, how.along, how.value))
        fit = fit_parameters_and_data(sizes, tokens, loss, seed=how.seed)
        largest, last = float(sizes.max()), float(tokens.max())
        beyond = [
            {"parameters": largest, "compute": d, **finite(fit.loss_at(largest, d))}
            for d in [last, *(at or [FURTHER * last])]
        ]
        told = fit.law.floor > UNTOLD * loss.min()
        fitted.append(
            {"name": name, "points": len(loss), **fit.as_dict(), "floor_told": bool(told), "extrapolated": beyond}
        )
    read = {"along": how.along, "value": how.value, "parameters": parameters, "ceiling": None, "control": None}
    return {**read, "curves": fitted, "reductions": []}


def extrapolate(name: str, points: Points, *, at: Sequence[float] = (), how: Reading = Reading()) -> dict[str, Any]:
    """The law of one curve with its intervals, and the losses at its last compute and at further ones.

    Raises RecipeError as `scaling` does.
    """
    _check_at(at)
    curve = curve_of(points, how)
    falling = curve.falling(how.ceiling)
    fit = fit_power_law(falling.compute, falling.value, warm_up=how.warm_up, seed=how.seed)
    last = float(falling.compute[-1])
    asked = [last, *(at or [FURTHER * last])]
    drawn = np.geomspace(max(how.warm_up * last, float(falling.compute[0])), max(asked), LINE_POINTS)
    told = fit.law.floor > UNTOLD * falling.value[falling.compute >= how.warm_up * last].min()

    def loss(compute: float) -> dict[str, Any]:
        return {"compute": compute, **finite(_below(how.ceiling, fit.loss_at(compute)))}

    return {
        "name": name,
        "points": len(curve.value),
        **fit.as_dict(),
        "floor_told": bool(told),  # otherwise the floor is at the bound of the fit
        "trained": last,
        "measured": [[float(c), float(v)] for c, v in zip(curve.compute, curve.value, strict=True)],
        "extrapolated": [loss(compute) for compute in asked],
        "line": [loss(float(compute)) for compute in drawn],
    }


def compare(student: Points, control: Points, how: Reading = Reading()) -> dict[str, Any]:
    """How much less compute a student needs than its control, at the end of the one and of the other."""
    ours, theirs = curve_of(student, how), curve_of(control, how)
    given: dict[str, Any] = {"ceiling": how.ceiling, "warm_up": how.warm_up, "seed": how.seed}
    return {
        f"at_end_of_{end}": compute_reduction(ours, theirs, end_of=end, **given).as_dict()
        for end in ("student", "control")
    }


def data_needed(
    control: Points, student: Points | float, unique: float, *, epochs: float = 1.0, how: Reading = Reading()
) -> dict[str, Any]:
    """The unique tokens that a control would need for a student's final loss (paper, section 3.4).

    Args:
        control: its curve, along `tokens`.
        student: its curve, or its final loss.
        unique: tokens that both were given.
        epochs: how often the control would see its data.
        how: the field of the loss, the warm-up and the seed.

    Raises:
        RecipeError: no tokens, less than one epoch, no loss above 0, or as `scaling` does.

    """
    how = replace(how, along="tokens", ceiling=None)
    loss = float(student if isinstance(student, int | float) else curve_of(student, how).falling(None).value[-1])
    if not 0 < loss < math.inf:
        raise RecipeError("a loss is above 0.", facts={"found": loss})
    curve = curve_of(control, how)
    effective = effective_tokens(unique, curve.compute)
    fit = fit_power_law(effective, curve.value, warm_up=how.warm_up, seed=how.seed)
    told = fit.law.floor > UNTOLD * curve.value[effective >= how.warm_up * effective.max()].min()
    law = {"points": len(curve.value), **fit.as_dict(), "floor_told": bool(told)}
    return {"law": law, **data_reduction(fit, loss, unique, epochs=epochs).as_dict()}


def curve_of(points: Points, how: Reading = Reading()) -> Curve:
    """A curve along a field.

    Raises:
        RecipeError: no point has both fields, one is no number or not below the ceiling, or the curve goes the wrong
            way: a loss falls, a value with a ceiling rises.

    """
    curve = Curve(*_columns(points, (how.along, how.value)))
    if how.ceiling is not None and not curve.value.max() < how.ceiling:
        raise RecipeError(
            f"not every {how.value} is below the ceiling.",
            facts={"found": curve.value.max(), "expected": f"below {how.ceiling:g}"},
            remedy="The ceiling is 1 for an accuracy, --ceiling 100 for one in per cent.",
        )
    values = curve.value[np.argsort(curve.compute, kind="stable")]
    first, last = float(values[0]), float(values[-1])
    if how.ceiling is None and last > first:
        raise RecipeError(
            f"the curve of {how.value} rises, and a law of losses is of one that falls.",
            facts={"first": f"{first:g}", "last": f"{last:g}"},
            remedy="For an accuracy, `scaling` takes the highest that it could be: --ceiling 1, or 100 in per cent.",
        )
    if how.ceiling is not None and last < first:
        raise RecipeError(
            f"the curve of {how.value} falls, and --ceiling is for one that rises.",
            facts={"first": f"{first:g}", "last": f"{last:g}"},
            remedy="Leave out --ceiling for a loss.",
        )
    return curve


def _cells(text: str) -> Points:
    """The rows of CSV, empty cells being None."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the header")
    return [{name: cell or None for name, cell in row.items()} for row in rows]


def _objects(text: str) -> Points:
    """The objects of JSON lines."""
    points = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            points.append(json.loads(line))
            if not isinstance(points[-1], dict):
                raise ValueError(f"line {number} is no JSON object")
    return points


def _columns(points: Points, fields: Sequence[str]) -> tuple[NDArray[np.float64], ...]:
    """The fields [n] of the points that have them all."""
    there = [point for point in points if all(point.get(field) is not None for field in fields)]
    if not there:
        known = dict.fromkeys(name for point in points for name in point)
        wanted = ", ".join(map(repr, fields))
        raise RecipeError(f"no point of the curve has all of {wanted}.", facts={"fields": ", ".join(known) or "none"})
    return tuple(np.array([_number(point, field) for point in there]) for field in fields)


def _number(point: Mapping[str, Any], field: str) -> float:
    try:
        return float(point[field])
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"a point of the curve has no number in its field {field!r}.", facts={"found": repr(point[field])}
        ) from error


def _check_at(at: Sequence[float]) -> None:
    wrong = [compute for compute in at if not 0 < compute < math.inf]
    if wrong:
        raise RecipeError("a law is extrapolated to a compute above 0.", facts={"found": f"--at {wrong[0]:g}"})


def _below(ceiling: float | None, distance: Measured) -> Measured:
    """The value so far below the ceiling."""
    if ceiling is None:
        return distance
    return Measured(ceiling - distance.value, ceiling - distance.high, ceiling - distance.low)
