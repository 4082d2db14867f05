"""What a model got on benchmarks: a figure a task by the paper's rule, and their average (paper, section 3.1).

In: what the harness found of each task. Out: `Row`s: acc_norm where the harness has it, else acc, else its first
metric, with the harness's standard error. The average is the unweighted mean of the accuracies: of the paper's tasks
alone where `paper` was asked for, so that it is the paper's figure whatever else was asked; else of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.evaluation.loss import ALL, Row

AVERAGE = "average"
_ACCURACIES = ("acc_norm", "acc")  # the paper's rule: the first that there is


@dataclass(frozen=True)
class TaskResults:
    """Figures of one model.

    Attributes:
        path: the artifact's folder.
        rows: a row a task, in the order asked; last `average`, of metric `accuracy`, whose `n` counts the tasks in it:
            those of the paper if `paper` was asked for, else all that have an accuracy.
        missing: tasks that `paper` stands for and whose files are not there.
        notes: task -> what a reader of its figure has to know.
        limit: questions of each task, where not all were asked; of a group, of each task in it.

    """

    path: Path
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    notes: Mapping[str, str]
    limit: int | None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of the figures has to know, a line each: how many questions, tasks not there, notes."""
        lines = [] if self.limit is None else [self._questions(self.limit)]
        lines += [f"without {name}, whose examples are not there" for name in self.missing]
        return (*lines, *(f"{task}: {note}" for task, note in self.notes.items()))

    def _questions(self, limit: int) -> str:
        other = [f"{row.dataset} {row.n:,}" for row in self.rows if row.dataset != AVERAGE and row.n != limit]
        return f"{limit:,} questions each" + (f" ({', '.join(other)})" if other else "")

    def value(self, task: str) -> Row:
        """The figure of a task, or of `average`. Raises KeyError if it was not measured."""
        for row in self.rows:
            if row.dataset == task:
                return row
        raise KeyError(task)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), *self.remarks])


def open_tasks(path: Path | str) -> TaskResults:
    """Open results on disk. Raises ArtifactError if they are not there, not finished or damaged."""
    manifest = artifact.read(path, kind="tasks")
    rows = tuple(Row(**entry) for entry in json.loads((Path(path) / "results.json").read_bytes()))
    missing, notes = tuple(manifest.counts["missing"]), dict(manifest.counts["notes"])
    return TaskResults(Path(path), rows, missing, notes, manifest.identity.recipe["limit"])


def results(raw: Mapping[str, Mapping[str, Any]], averaged: Container[str]) -> tuple[Row, ...]:
    """The rows of tasks, from what the harness found of each, and the average of those that are `averaged`."""
    by_task = {name: list(_rows(name, found["harness"]["results"])) for name, found in raw.items()}
    rows = [row for found in by_task.values() for row in found]
    accuracies = [row for name, found in by_task.items() if name in averaged for row in found]
    accuracies = [row for row in accuracies if row.metric in _ACCURACIES]
    if len(accuracies) > 1:
        rows.append(average(accuracies))
    return tuple(rows)


def average(rows: Sequence[Row]) -> Row:
    """The unweighted mean over tasks; its standard error is that of independent tasks, √Σse² / n."""
    errors = [row.standard_error for row in rows]
    value = math.fsum(row.value for row in rows) / len(rows)
    error = None
    if all(e is not None for e in errors):
        error = math.sqrt(math.fsum(e * e for e in errors if e is not None)) / len(rows)
    return Row(AVERAGE, ALL, "accuracy", value, error, len(rows))


def _rows(name: str, figures: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """The row of a task or group; of a group that the harness does not average, one for each task in it."""
    for task in [name] if _chosen(figures.get(name, {})) else [task for task in figures if task != name]:
        if (metric := _chosen(figures[task])) is not None:
            short, _, filtered = metric.partition(",")
            value, error = figures[task][metric], figures[task].get(f"{short}_stderr,{filtered}")
            known = float(error) if isinstance(error, int | float) else None
            yield Row(task, ALL, short, float(value), known, figures[task]["sample_len"])


def _chosen(figures: Mapping[str, Any]) -> str | None:
    """The metric that stands for a task, as the harness spells it (`acc,none`): the paper's rule, else its first."""
    metrics = [k for k, v in figures.items() if "," in k and "_stderr," not in k and isinstance(v, int | float)]
    preferred = [m for accuracy in _ACCURACIES for m in metrics if m.partition(",")[0] == accuracy]
    return next(iter([*preferred, *metrics]), None)
