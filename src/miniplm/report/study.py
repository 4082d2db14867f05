"""What a study found, gathered from the artifacts of its branches into plain JSON types: `study.json`.

    branches (a seed, a point of the grid) × students × yardsticks ──► mean over seeds, difference from the control,
                                                                        difference from the first value of each grid key

A yardstick is a number that a student has: the loss on the held-out mixture, the mean of its sources' losses (each
counts the same), the loss on each source, on each group of sources (`evaluate.groups`) and on each set of documents,
the accuracy on each task. The control is, at the same point and seed, the student of the same terms whose data chance
chose. Points are compared too, student by student and seed by seed: each with the point that has a key's first value
and is otherwise the same (`points`). Branches that are not done are left out, and counted.

Losses are in nats per token, of sets of documents whose beginnings are read the paper's mean over documents; in bits
per byte where students read different tokens. Differences of tasks take in the error over questions (`seeds.py`).
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
from miniplm.analysis.seeds import Mean, mean_over_seeds, paired, verdict, widened
from miniplm.errors import ArtifactMissingError
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.evaluation.loss import ALL, HELD_OUT, loss_on
from miniplm.evaluation.tasks import open_tasks
from miniplm.pipeline.study import Branch
from miniplm.progress import printable
from miniplm.recipe import Study
from miniplm.report.training import control_of

SCHEMA = 2
MIXTURE, SOURCES = "held-out mixture", "mean of sources"
_NATS, _BITS = "nats_per_token", "bits_per_byte"
_BY_DOCUMENT = "nats_per_token_by_document"
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte")  # of the harness's metrics
_COLUMNS = (
    "point", "student", "yardstick", "unit", "seeds", "mean", "low", "high", "deviation", "control", "against",
    "difference", "difference_low", "difference_high", "verdict",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Something that students are measured by; `kind`: mixture, group, sources, source, documents, task."""

    name: str
    kind: str
    unit: str
    lower_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Figure:
    """What a student measures on a yardstick with one seed; of tasks with the standard error over questions."""

    value: float
    error: float | None = None


_BySeed = Mapping[int, Figure]


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
    measured: dict[tuple[str, str], dict[Yardstick, dict[int, Figure]]] = defaultdict(lambda: defaultdict(dict))
    controls: dict[tuple[str, str], str | None] = {}
    for number, branch in enumerate(done):
        point, recipe = point_label(branch.variant.point), branch.variant.recipe
        seed = number if branch.variant.seed is None else branch.variant.seed
        for name in recipe.students:
            controls[point, name] = control_of(recipe, name)
            for yardstick, value in _figures(branch, name, metric).items():
                measured[point, name][yardstick][seed] = value
    rows = [
        _row(point, name, yardstick, seeds, _of(measured, point, control, yardstick), control=control)
        for (point, name), found in measured.items()
        for control in (controls[point, name],)
        for yardstick, seeds in found.items()
    ]
    points = [
        _row(point, name, yardstick, seeds, theirs, against=against)
        for point, against in _pairs_of_points(study)
        for (where, name), found in measured.items()
        if where == point
        for yardstick, seeds in found.items()
        if (theirs := _of(measured, against, name, yardstick)).keys() & seeds.keys()
    ]
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
        "points": points,
        "tasks": _said_of_tasks(done),
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
    """A row for each point, student and yardstick, against its control; then those against other points (`against`)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows([*findings["rows"], *findings["points"]])
    return text.getvalue()


def lines(findings: Mapping[str, Any]) -> list[str]:
    """What is printed: for each yardstick of the whole and each point the students against the control, then points."""
    shown = [y for y in findings["yardsticks"] if y["kind"] != "source"]
    found = [""]
    if findings["runs_done"] < findings["runs"]:
        found.append(f"{findings['runs_done']} of {findings['runs']} runs are done; this is of those.")
    width = max((len(row["student"]) for row in findings["rows"]), default=0)
    for yardstick in shown:
        better = "lower" if yardstick["lower_is_better"] else "higher"
        found.append(f"{yardstick['name']}, {yardstick['unit']}, {better} is better")
        heading = ""
        for row in [*findings["rows"], *findings["points"]]:
            if (row["yardstick"], row["unit"]) != (yardstick["name"], yardstick["unit"]):
                continue
            minus = "" if row["against"] is None else f" minus {row['against']}"
            if heading != (heading := printable(row["point"] + minus)):
                found.append(f"  {heading}")
            found.append(f"  {'  ' if heading else ''}{row['student']:<{width}}  {_figures_of(row)}")
        found.append("")
    return [
        *found,
        *(printable(line) for line in _task_lines(findings["tasks"])),
        "± is half of a 95 % interval over seeds (Student's t); differences are paired by seed, and those of tasks "
        "take in the error over questions. `within noise`: the interval holds 0, or has no width.",
    ]


def _figures_of(row: Mapping[str, Any]) -> str:
    """A row's numbers; of a comparison of points the difference alone."""
    seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
    difference = ""
    if row["difference"] is not None:
        difference = _plus_minus(row["difference"], row["difference_low"], sign=True)
    if row["against"] is not None:
        return f"{difference}  {row['verdict']}"
    compared = f"  {difference} against {row['control']}  {row['verdict']}" if difference else ""
    return f"{_plus_minus(row['mean'], row['low'])}  {seeds}{compared}"


def _task_lines(tasks: Mapping[str, Any]) -> list[str]:
    """What a reader of the tasks' figures has to know."""
    missing = ", ".join(tasks["missing"])
    found = [f"tasks without {missing}: no examples here; `average` is of the others."] if missing else []
    return found + [f"{one['task']}: {one['note']} ({', '.join(one['students'])})" for one in tasks["notes"]]


def _figures(branch: Branch, student: str, metric: str) -> dict[Yardstick, Figure]:
    """Every yardstick of one student in one branch."""
    stages, unit = branch.stages, metric.replace("_", " ")
    found: dict[Yardstick, Figure] = {}
    for name, stage in stages.items():
        kind, *between = name.removesuffix(f"/{student}").split("/")
        if not name.endswith(f"/{student}") or kind not in {"evaluate", "loss", "tasks"}:
            continue
        if kind == "tasks":
            for row in open_tasks(stage.path).rows:
                lower = any(word in row.metric for word in _LOWER_IS_BETTER)
                yardstick = Yardstick(row.dataset, "task", row.metric, lower_is_better=lower)
                found[yardstick] = Figure(row.value, row.standard_error)
            continue
        evaluation = open_evaluation(stage.path)
        rows = [row for row in evaluation.rows if row.metric == metric]
        whole = Figure(next(row.value for row in rows if row.source == ALL))
        if kind == "loss":
            by_document = [row for row in evaluation.rows if (row.metric, row.source) == (_BY_DOCUMENT, ALL)]
            if metric == _NATS and by_document:
                found[Yardstick(between[0], "documents", _BY_DOCUMENT.replace("_", " "))] = Figure(by_document[0].value)
            else:
                found[Yardstick(between[0], "documents", unit)] = whole
            continue
        of_sources = {row.source: row.value for row in rows if row.source != ALL}
        found[Yardstick(MIXTURE, "mixture", unit)] = whole
        for group, sources in branch.variant.recipe.evaluate.groups.items():
            found[Yardstick(group, "group", unit)] = Figure(loss_on(evaluation.scores, sources, metric))
        if len(of_sources) > 1:
            found[Yardstick(SOURCES, "sources", unit)] = Figure(float(np.mean(list(of_sources.values()))))
            found |= {Yardstick(f"{HELD_OUT}/{s}", "source", unit): Figure(value) for s, value in of_sources.items()}
    return found


def _pairs_of_points(study: Study) -> list[tuple[str, str]]:
    """Labels of points to compare: each, and for each key of the grid the point that has the key's first value."""
    points = list({tuple(variant.point.items()): variant.point for variant in study.variants}.values())
    return [
        (point_label(point), point_label(against))
        for key, first in (points[0].items() if points else ())
        for point in points
        if (against := {**point, key: first}) != point
    ]


def _of(
    measured: Mapping[tuple[str, str], Mapping[Yardstick, _BySeed]],
    point: str,
    student: str | None,
    yardstick: Yardstick,
) -> _BySeed:
    """What was measured of a student; nothing if there is none."""
    return {} if student is None else measured.get((point, student), {}).get(yardstick, {})


def _row(
    point: str,
    student: str,
    yardstick: Yardstick,
    ours: _BySeed,
    theirs: _BySeed,
    *,
    control: str | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """A student at a point, and its difference from a control, or from itself at the point `against`."""
    mean = mean_over_seeds([one.value for one in ours.values()])
    seeds = sorted(ours.keys() & theirs.keys())
    gap = _difference(ours, theirs, seeds) if seeds else None
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
        "values": {str(seed): one.value for seed, one in sorted(ours.items())},
        "control": control,
        "against": against,
        "difference": None if gap is None else gap.value,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
        "differences": {str(seed): ours[seed].value - theirs[seed].value for seed in seeds},
        "verdict": None if gap is None else verdict(gap, lower_is_better=yardstick.lower_is_better),
    }


def _difference(ours: _BySeed, theirs: _BySeed, seeds: Sequence[int]) -> Mean:
    """Ours minus theirs, seed by seed."""
    gap = paired({seed: ours[seed].value for seed in seeds}, {seed: theirs[seed].value for seed in seeds})
    errors = [(ours[seed].error, theirs[seed].error) for seed in seeds]
    return widened(gap, [(a, b) for a, b in errors if a is not None and b is not None])


def _said_of_tasks(done: Sequence[Branch]) -> dict[str, Any]:
    """Tasks whose examples are missing, and notes on figures, with the students that each is of."""
    missing: dict[str, None] = {}
    notes: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for branch in done:
        for student in branch.variant.recipe.students:
            if (stage := branch.stages.get(f"tasks/{student}")) is None:
                continue
            results = open_tasks(stage.path)
            missing |= dict.fromkeys(results.missing)
            for task, note in results.notes.items():
                notes[task, note][student] = None
    return {
        "missing": list(missing),
        "notes": [{"task": task, "note": note, "students": list(of)} for (task, note), of in notes.items()],
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
