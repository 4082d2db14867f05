"""What a model got on benchmarks: a figure a task by the paper's rule, and their average (paper, section 3.1).

In: what the harness found of each task. Out: `Row`s: acc_norm where the harness has it, else acc, else its first
metric, with the harness's standard error. The average is the unweighted mean of the accuracies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
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
        rows: a row a task, in the order asked; last `average`, of metric `accuracy`, whose `n` counts tasks.
        missing: tasks that `paper` stands for and whose files are not there.
        notes: task -> what a reader of its figure has to know.

    """

    path: Path
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    notes: Mapping[str, str]

    def value(self, task: str) -> Row:
        """The figure of a task, or of `average`. Raises KeyError if it was not measured."""
        for row in self.rows:
            if row.dataset == task:
                return row
        raise KeyError(task)

    def __str__(self) -> str:
        lines = [str(row) for row in self.rows]
        lines += [f"without {name}, whose examples are not there" for name in self.missing]
        return "\n".join([*lines, *(f"{task}: {note}" for task, note in self.notes.items())])


def open_tasks(path: Path | str) -> TaskResults:
    """Open results on disk. Raises ArtifactError if they are not there, not finished or damaged."""
    manifest = artifact.read(path, kind="tasks")
    rows = tuple(Row(**entry) for entry in json.loads((Path(path) / "results.json").read_bytes()))
    return TaskResults(Path(path), rows, tuple(manifest.counts["missing"]), dict(manifest.counts["notes"]))


def results(raw: Mapping[str, Mapping[str, Any]]) -> tuple[Row, ...]:
    """The rows of tasks, from what the harness found of each, and their average."""
    rows = [row for name, found in raw.items() for row in _rows(name, found["harness"]["results"])]
    accuracies = [row for row in rows if row.metric in _ACCURACIES]
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
