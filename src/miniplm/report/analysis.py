"""What the analyses say of a finished run: agreement, scaling, diversity, cost.

In: the stages, all done, and what `findings.py` has opened of them already. Out: plain JSON types, a part of
`report.json` for each analysis; None where there is nothing to say. What each figure means stands in `miniplm.analysis`
and `miniplm.pipeline.costs`; here is decided only what is measured against what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from miniplm.analysis.agreement import PAPER_REFERENCES, student_agreement
from miniplm.analysis.compute_reduction import Curve, compute_reduction
from miniplm.analysis.cost import PAPER_COMPUTE_REDUCTION, break_even, saved_to_same_loss
from miniplm.analysis.diversity import PAPER_SEMANTIC, packed_diversity
from miniplm.analysis.published import PUBLISHED
from miniplm.analysis.scaling import fit_power_law
from miniplm.errors import CorpusTooSmallError, RecipeError
from miniplm.evaluation.evaluate import Evaluation
from miniplm.packing.instances import Packed, open_packed
from miniplm.pipeline.chain import Chain
from miniplm.pipeline.costs import costs
from miniplm.pipeline.curves import STEEP
from miniplm.recipe import Recipe
from miniplm.report.benchmarks import ROLES
from miniplm.sampling.base import keep_count, open_selection
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Normalize, Scores

CELLS = 36  # along each side of the figure of two differences
CLIPPED = (0.005, 0.995)  # quantiles; what lies beyond is counted in the outermost cells
EXTRAPOLATED = 10.0  # times a student's operations
ENDS: tuple[Literal["control"], Literal["student"]] = ("control", "student")  # the control's first, as in the paper
LINE_POINTS = 33  # of a law that is drawn


def plain_difference(recipe: Recipe) -> str | None:
    """The first selection by Difference Sampling over the whole pool, as in the paper; None if there is none."""
    plain = (name for name, one in recipe.select.items() if one.sampler == "difference" and one.within is None)
    return next(plain, None)


def agreements(
    recipe: Recipe, students: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Evaluation]
) -> dict[str, Any] | None:
    """How far the reference stands for each student, on the held-out instances; students that saw random text first.

    The paper's q is such a student, one that plainly learned from text as it comes. None if too little was measured.
    """
    scores = {name: one.scores for name, one in evaluations.items()}
    compared = [one for one in students if not one["own_tokenizer"] and one["name"] in scores]
    if not set(ROLES) <= scores.keys() or not compared:
        return None
    teacher, reference = (scores[role] for role in ROLES)
    selection = plain_difference(recipe)
    ratio = 0.5 if selection is None else recipe.select[selection].ratio
    per: Normalize = "token" if selection is None else recipe.select[selection].normalize
    controls = {one["control"] for one in students}
    compared.sort(key=lambda one: one["name"] not in controls)
    rows: list[dict[str, Any]] = []
    for one in compared:
        student = scores[one["name"]]
        same_tokens = len({teacher.tokenizer, reference.tokenizer, student.tokenizer}) == 1
        unit = per if same_tokens else "byte"
        found = student_agreement(teacher, reference, student, ratio=ratio, normalize=unit)
        rows.append({"student": one["name"], "control": one["name"] in controls, **found.as_dict()})
    shown = rows[0]
    cells = _cells(teacher, reference, scores[shown["student"]], ratio, shown["normalize"])
    return {"students": rows, "cells": {"student": shown["student"], **cells}, "paper": PAPER_REFERENCES}


def scaling(students: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A law for each student's curve, and the compute of students and controls to the same loss.

    Both are of held-out loss against training operations. None if no curve was measured.
    """
    curves = {
        one["name"]: Curve.of([point for point in one["curve"] if point["flops"]])
        for one in students
        if any(point["held_out_loss"] is not None for point in one["curve"])
    }
    if not curves:
        return None
    fits = {name: found for name, curve in curves.items() if (found := _law(curve)) is not None}
    exponents = [law.alpha for law in PUBLISHED.values()]
    return {
        "steep": STEEP,
        "times": EXTRAPOLATED,
        "fits": [{"student": name, **found} for name, found in fits.items()],
        "not_fitted": [one["name"] for one in students if one["name"] not in fits],
        "reductions": list(_reductions(students, curves)),
        "paper": {"alpha": [min(exponents), max(exponents)], "compute_reduction": PAPER_COMPUTE_REDUCTION},
    }


def measured_reductions(found: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Of what `scaling` found, the reduction of each student for which nothing was extrapolated."""
    read = {}
    for one in found["reductions"] if found else ():
        measured = [end for end in one["ends"] if end["read_from"] == "curve"]
        if measured:
            read[one["student"]] = {"control": one["control"], **measured[0]}
    return read


def diversity(stages: Chain, pool: Packed) -> dict[str, Any] | None:
    """How diverse each selection and what the teacher wrote are beside the pool; None if there is neither."""
    beside: dict[str, NDArray[np.int64] | Packed] = {
        name: open_selection(stage.path).rows for name, stage in stages.within("select")
    }
    beside |= {name: open_packed(stage.path) for name, stage in stages.within("generate")}
    if not beside:
        return None
    try:
        found = packed_diversity(pool, beside).as_dict()
    except CorpusTooSmallError as error:
        found = {"collections": [], "because": str(error).splitlines()[0]}
    return {**found, "paper": PAPER_SEMANTIC}


def cost(stages: Chain, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the run took, and how many students repay it.

    `here`, beside each, is by the compute reduction that this run measured: `found` is what `scaling` says.
    """
    read = measured_reductions(found)
    told = costs(stages, measure=False).as_dict()
    for one in told["break_even"]:
        reduction = read[one["student"]]["ratio"] if one["student"] in read else None
        one["here"] = None if reduction is None else _repaid(one["offline_flops"], one["student_flops"], reduction)
    return told


def _repaid(
    offline: float | None, student: float | None, reduction: Mapping[str, float | None]
) -> dict[str, dict[str, float | None]]:
    """Students that repay the offline operations, at the reduction and at the ends of its interval; None: never.

    An end of the interval that is None is infinite.
    """
    students: dict[str, float | None] = {}
    for end, ratio in reduction.items():
        saved = None if student is None else saved_to_same_loss(student, math.inf if ratio is None else ratio)
        found = break_even(offline, saved)
        students[end] = None if found is None or not math.isfinite(found) else found
    return {"compute_reduction": dict(reduction), "against_pretraining": students}


def _cells(teacher: Scores, reference: Scores, student: Scores, ratio: float, unit: Normalize) -> dict[str, Any]:
    """A histogram of both differences, `cells` being [column, row, instances], and from where each would keep."""
    both = [differences(teacher, other, unit) for other in (reference, student)]
    kept = keep_count(ratio, len(teacher))
    edges = []
    for values in both:
        low, high = np.quantile(values, CLIPPED)
        edges.append(np.linspace(low, high if high > low else low + 1, CELLS + 1))
    clipped = [np.clip(values, ends[0], ends[-1]) for values, ends in zip(both, edges, strict=True)]
    counts = np.histogram2d(clipped[0], clipped[1], bins=edges)[0].astype(int)
    return {
        "edges": [ends.tolist() for ends in edges],
        "thresholds": [float(np.sort(values)[-kept]) for values in both],
        "cells": [[int(column), int(row), int(counts[column, row])] for column, row in np.argwhere(counts)],
    }


def _law(curve: Curve) -> dict[str, Any] | None:
    """The law of a curve, and what it says up to `EXTRAPOLATED` times its operations; None of too few points."""
    try:
        fit = fit_power_law(curve.compute, curve.value, warm_up=STEEP)
    except RecipeError:
        return None
    last = float(curve.compute.max())
    along = np.geomspace(max(STEEP * last, float(curve.compute.min())), EXTRAPOLATED * last, LINE_POINTS)
    return {
        **fit.as_dict(),
        "trained": last,
        "line": [{"flops": float(c), **fit.loss_at(float(c)).as_dict()} for c in along],
        "extrapolated": {"flops": EXTRAPOLATED * last, **fit.loss_at(EXTRAPOLATED * last).as_dict()},
    }


def _reductions(students: Sequence[Mapping[str, Any]], curves: Mapping[str, Curve]) -> Iterator[dict[str, Any]]:
    """For each student whose control was measured too: the reduction at the control's end and at its own."""
    for one in students:
        name, control = one["name"], one["control"]
        if name not in curves or control not in curves:
            continue
        try:
            ends = [
                compute_reduction(curves[name], curves[control], end_of=end_of, warm_up=STEEP).as_dict()
                for end_of in ENDS
            ]
        except RecipeError:  # too few points
            continue
        for end in ends:
            end["flops"] = {who: end.pop(who) for who in ENDS}
        yield {"student": name, "control": control, "ends": ends}
