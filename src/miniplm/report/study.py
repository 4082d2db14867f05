"""What a study found, gathered from the artifacts of its branches into plain JSON types: `study.json`.

    branches (a seed, a point of the grid) × students × yardsticks ──► mean over seeds, difference from the control

A yardstick is a number that a student has: the loss on the held-out mixture, the mean of its sources' losses (each
counts the same), the loss on each source, on each group of sources (`evaluate.groups`) and on each set of documents,
the accuracy on each task. The control is, at the same point and seed, the student of the same terms whose data chance
chose. Branches that are not done are left out, and counted.

Losses are in nats per token, or in bits per byte where students read different tokens.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from miniplm import artifact
from miniplm.analysis.seeds import Mean, mean_over_seeds, paired, verdict
from miniplm.errors import ArtifactMissingError
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.evaluation.loss import ALL, HELD_OUT, loss_on
from miniplm.evaluation.tasks import open_tasks
from miniplm.pipeline.study import Branch
from miniplm.progress import printable
from miniplm.recipe import Study
from miniplm.report.training import control_of

SCHEMA = 1
MIXTURE, SOURCES = "held-out mixture", "mean of sources"
_NATS, _BITS = "nats_per_token", "bits_per_byte"
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte")  # of the harness's metrics
_COLUMNS = (
    "point", "student", "yardstick", "unit", "seeds", "mean", "low", "high", "deviation", "control", "difference",
    "difference_low", "difference_high", "verdict",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Something that students are measured by; `kind`: mixture, group, sources, source, documents, task."""

    name: str
    kind: str
    unit: str
    lower_is_better: bool = True


def gather(study: Study, branches: Sequence[Branch]) -> dict[str, Any]:
    """The findings of the branches that are done. Raises ArtifactMissingError if none is."""
    done = [branch for branch in branches if branch.done]
    if not done:
        raise ArtifactMissingError(
            "no run of the study is finished yet.",
            facts={"runs": len(branches)},
            remedy="`miniplm study` makes them; it goes on where it stopped.",
        )
    metric = _BITS if any(branch.variant.recipe.retokenize for branch in done) else _NATS
    measured: dict[tuple[str, str], dict[Yardstick, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    controls: dict[tuple[str, str], str | None] = {}
    for number, branch in enumerate(done):
        point, recipe = point_label(branch.variant.point), branch.variant.recipe
        seed = number if branch.variant.seed is None else branch.variant.seed
        for name in recipe.students:
            controls[point, name] = control_of(recipe, name)
            for yardstick, value in _figures(branch, name, metric).items():
                measured[point, name][yardstick][seed] = value
    rows = [
        _row(point, name, yardstick, seeds, _of(measured, point, controls[point, name], yardstick))
        for (point, name), found in measured.items()
        for yardstick, seeds in found.items()
    ]
    for row in rows:
        row["control"] = controls[row["point"], row["student"]]
    grid: dict[str, list[str]] = defaultdict(list)
    for variant in study.variants:
        for key, named in variant.point.items():
            if named not in grid[key]:
                grid[key].append(named)
    return {
        "schema": SCHEMA,
        "name": study.name,
        "runs": len(branches),
        "runs_done": len(done),
        "seeds": sorted({b.variant.seed for b in branches if b.variant.seed is not None}),
        "grid": dict(grid),
        "yardsticks": [asdict(one) for one in dict.fromkeys(y for found in measured.values() for y in found)],
        "rows": rows,
        "models": _models(done),
        "selections": _selections(done),
        "stages": sorted({stage.identity.fingerprint for branch in done for stage in branch.stages.values()}),
        "study": study.text,
        "versions": artifact.provenance(done[0].stages["prepare"].path).get("versions", {}),
        "platform": artifact.provenance(done[0].stages["prepare"].path).get("platform", ""),
    }


def point_label(point: Mapping[str, str]) -> str:
    """`reference small, ratio 0.5`: the last part of each key, with its value; nothing where there is no grid."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in point.items())


def as_csv(findings: Mapping[str, Any]) -> str:
    """A row for each point, student and yardstick."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(findings["rows"])
    return text.getvalue()


def lines(findings: Mapping[str, Any]) -> list[str]:
    """What is printed: for each point and student the yardsticks of the whole, against the control."""
    shown = [y for y in findings["yardsticks"] if y["kind"] != "source"]
    found = [""]
    if findings["runs_done"] < findings["runs"]:
        found.append(f"{findings['runs_done']} of {findings['runs']} runs are done; this is of those.")
    width = max((len(row["student"]) for row in findings["rows"]), default=0)
    for yardstick in shown:
        better = "lower" if yardstick["lower_is_better"] else "higher"
        found.append(f"{yardstick['name']}, {yardstick['unit']}, {better} is better")
        for row in findings["rows"]:
            if row["yardstick"] != yardstick["name"]:
                continue
            point = f"  [{printable(row['point'])}]" if row["point"] else ""
            seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
            line = f"  {row['student']:<{width}}  {_plus_minus(row['mean'], row['low'])}  {seeds}"
            if row["difference"] is not None:
                line += f"  {_plus_minus(row['difference'], row['difference_low'], sign=True)}  {row['verdict']}"
            found.append(line + point)
        found.append("")
    return [
        *found,
        "± is half of a 95 % interval over seeds (Student's t); differences are paired by seed. `within noise`: the "
        "interval holds 0.",
    ]


def _figures(branch: Branch, student: str, metric: str) -> dict[Yardstick, float]:
    """Every yardstick of one student in one branch."""
    stages, unit = branch.stages, metric.replace("_", " ")
    found: dict[Yardstick, float] = {}
    for name, stage in stages.items():
        kind, *between = name.removesuffix(f"/{student}").split("/")
        if not name.endswith(f"/{student}") or kind not in {"evaluate", "loss", "tasks"}:
            continue
        if kind == "tasks":
            for row in open_tasks(stage.path).rows:
                lower = any(word in row.metric for word in _LOWER_IS_BETTER)
                found[Yardstick(row.dataset, "task", row.metric, lower_is_better=lower)] = row.value
            continue
        evaluation = open_evaluation(stage.path)
        rows = [row for row in evaluation.rows if row.metric == metric]
        whole = next(row.value for row in rows if row.source == ALL)
        if kind == "loss":
            found[Yardstick(between[0], "documents", unit)] = whole
            continue
        of_sources = {row.source: row.value for row in rows if row.source != ALL}
        found[Yardstick(MIXTURE, "mixture", unit)] = whole
        for group, sources in branch.variant.recipe.evaluate.groups.items():
            found[Yardstick(group, "group", unit)] = loss_on(evaluation.scores, sources, metric)
        if len(of_sources) > 1:
            found[Yardstick(SOURCES, "sources", unit)] = float(np.mean(list(of_sources.values())))
            found |= {Yardstick(f"{HELD_OUT}/{s}", "source", unit): value for s, value in of_sources.items()}
    return found


def _of(
    measured: Mapping[tuple[str, str], Mapping[Yardstick, Mapping[int, float]]],
    point: str,
    control: str | None,
    yardstick: Yardstick,
) -> Mapping[int, float]:
    return {} if control is None else measured[point, control].get(yardstick, {})


def _row(
    point: str, student: str, yardstick: Yardstick, ours: Mapping[int, float], control: Mapping[int, float]
) -> dict[str, Any]:
    mean = mean_over_seeds(list(ours.values()))
    gap: Mean | None = paired(ours, control) if ours.keys() & control.keys() else None
    return {
        "point": point,
        "student": student,
        "yardstick": yardstick.name,
        "unit": yardstick.unit,
        "seeds": mean.seeds,
        "mean": mean.value,
        "low": mean.low,
        "high": mean.high,
        "deviation": mean.deviation,
        "values": {str(seed): value for seed, value in sorted(ours.items())},
        "difference": None if gap is None else gap.value,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
        "differences": {str(s): ours[s] - control[s] for s in sorted(ours.keys() & control.keys())},
        "verdict": None if gap is None else verdict(gap, lower_is_better=yardstick.lower_is_better),
    }


def _models(done: Sequence[Branch]) -> list[dict[str, Any]]:
    """Teachers and references by their held-out loss, and at which points each was used; "" is all of them.

    Students have rows of their own.
    """
    points = list(dict.fromkeys(point_label(branch.variant.point) for branch in done))
    used: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for branch in done:
        for role in ("teacher", "reference"):
            if (stage := branch.stages.get(f"evaluate/{role}")) is not None:
                key = (role, stage.identity.inputs["model"])
                used[key][point_label(branch.variant.point)] = open_evaluation(stage.path).value(_NATS).value
    return [
        {
            "role": role,
            "point": "" if len(losses) == len(points) else "; ".join(losses),
            "loss": next(iter(losses.values())),
        }
        for (role, _), losses in used.items()
    ]


def _selections(done: Sequence[Branch]) -> list[dict[str, Any]]:
    """What each selection of the first seed kept of each source."""
    found: dict[str, dict[str, Any]] = {}
    for branch in done:
        for name, stage in branch.stages.within("select"):
            counts = artifact.read(stage.path).counts
            label = ", ".join(part for part in (name, point_label(branch.variant.point)) if part)
            found.setdefault(
                label,
                {
                    "name": label,
                    "selected": counts["selected"],
                    "of": counts["of"],
                    "by_source": [
                        {"source": source, "pool": pool, "selected": kept}
                        for source, (kept, pool) in counts["by_source"].items()
                    ],
                },
            )
    return list(found.values())


def _plus_minus(value: float, low: float | None, *, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''}.4f}"
    return text if low is None else f"{text} ± {value - low:.4f}"
