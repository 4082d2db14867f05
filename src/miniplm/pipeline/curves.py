"""Loss curves from models on disk or from files, and what scaling laws say of them as JSON types."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miniplm.analysis.compute_reduction import Curve, compute_reduction
from miniplm.analysis.scaling import finite, fit_power_law
from miniplm.errors import RecipeError
from miniplm.training.checkpoint import read_curve

Points = Sequence[Mapping[str, Any]]
FURTHER = 10.0  # times a curve's last compute: how far it is extrapolated where nobody says


def read_points(path: Path) -> Points:
    """The points of a trained model's loss curve, or those of a file: JSON lines, or CSV with a header.

    Raises:
        RecipeError: there is no such model or file, or it cannot be read.

    """
    try:
        if path.is_dir():
            return read_curve(path)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = csv.DictReader(text.splitlines())
            return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path} has no loss curve that can be read.",
            facts={"because": error},
            remedy="Name a model that was trained here, or a file of points: JSON lines or CSV with a header.",
        ) from error


def extrapolate(
    name: str,
    points: Points,
    *,
    along: str = "flops",
    value: str = "held_out_loss",
    at: Sequence[float] = (),
    warm_up: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """The law of one curve with its intervals, and the losses at further compute.

    Raises RecipeError if the curve has too few points, or none with these fields.
    """
    curve = curve_of(points, value, along)
    fit = fit_power_law(curve.compute, curve.value, warm_up=warm_up, seed=seed)
    last = float(curve.compute.max())
    asked = [last, *(at or [FURTHER * last])]
    return {
        "name": name,
        "points": len(curve.value),
        **fit.as_dict(),
        "extrapolated": [{"compute": compute, **finite(fit.loss_at(compute))} for compute in asked],
    }


def compare(
    student: Points, control: Points, *, along: str = "flops", value: str = "held_out_loss", seed: int = 0
) -> dict[str, Any]:
    """How much less compute a student needs than its control, at the end of the one and of the other."""
    ours, theirs = curve_of(student, value, along), curve_of(control, value, along)
    return {
        f"at_end_of_{end}": compute_reduction(ours, theirs, end_of=end, seed=seed).as_dict()
        for end in ("student", "control")
    }


def curve_of(points: Points, value: str, along: str) -> Curve:
    """A curve along a field. Raises RecipeError if no point has both fields."""
    there = [point for point in points if point.get(value) is not None and point.get(along) is not None]
    if not there:
        fields = dict.fromkeys(name for point in points for name in point)
        raise RecipeError(
            f"no point of the curve has both {value!r} and {along!r}.", facts={"fields": ", ".join(fields) or "none"}
        )
    return Curve.of(there, value, along)
