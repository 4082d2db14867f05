"""What models reached on documents and on tasks (paper, section 3.1), and every figure of them as one table.

In: the stages, all done. Out: plain JSON types, and rows. The models are teacher, reference, students, and those of
other people that the recipe names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from miniplm.evaluation.evaluate import Evaluation, open_evaluation
from miniplm.evaluation.loss import ALL, Difference, Row, compare
from miniplm.evaluation.tasks import AVERAGE, open_tasks
from miniplm.pipeline.chain import Chain
from miniplm.recipe import Recipe
from miniplm.report.training import compare_bits, control_of
from miniplm.scoring.base import Scores

ROLES = ("teacher", "reference")
_METRICS = ("nats_per_token_by_document", "nats_per_token", "bits_per_byte")  # the paper's first


def documents(stages: Chain, corpus_tokenizer: str) -> list[dict[str, Any]]:
    """Each set of documents with the losses of every model; in nats only where the tokens are the corpus's."""
    recipe = stages.recipe
    found = []
    for name, settings in recipe.evaluate.documents.items():
        opened = {model: open_evaluation(stage.path) for model, stage in stages.within(f"loss/{name}")}
        rows: list[dict[str, Any]] = []
        for model, one in opened.items():
            own = one.scores.tokenizer != corpus_tokenizer
            control = control_of(recipe, model) if model in recipe.students else None
            gap = None
            if control is not None:
                gap = _against(one.scores, opened[control].scores, own, by_document=settings.windows == "first")
            row = {"model": model, "role": _role_of(recipe, model), **_figures(one, own_tokenizer=own)}
            rows.append({**row, "control": control, "difference": gap})
        instances = max((len(one.scores) for one in opened.values()), default=0)
        found.append({"name": name, "windows": settings.windows, "instances": instances, "models": rows})
    return found


def tasks(stages: Chain) -> dict[str, Any] | None:
    """The accuracies of every model, `accuracies` in the order of `tasks`; None if nothing was asked."""
    opened = {model: open_tasks(stage.path) for model, stage in stages.within("tasks")}
    if not opened:
        return None
    first, asked = next(iter(opened.values())), stages.recipe.evaluate
    measured = [row for row in first.rows if row.dataset != AVERAGE]
    return {
        "tasks": [{"name": row.dataset, "metric": row.metric, "examples": row.n} for row in measured],
        "missing": list(first.missing),
        "notes": {task: note for one in opened.values() for task, note in one.notes.items()},
        "shots": asked.shots,
        "limit": asked.limit,
        "models": [
            {
                "model": model,
                "role": _role_of(stages.recipe, model),
                "average": next((_with_error(row) for row in one.rows if row.dataset == AVERAGE), None),
                "accuracies": [_with_error(one.value(row.dataset)) for row in measured],
            }
            for model, one in opened.items()
        ],
    }


def table_rows(stages: Chain) -> dict[str, list[Row]]:
    """Every figure of each model: held-out loss, documents, tasks."""
    rows: dict[str, list[Row]] = {}
    for name, stage in stages.items():
        kind, _, model = name.partition("/")
        if kind in ("evaluate", "loss"):
            rows.setdefault(model.rpartition("/")[2], []).extend(open_evaluation(stage.path).rows)
        elif kind == "tasks":
            rows.setdefault(model, []).extend(open_tasks(stage.path).rows)
    return rows


def _role_of(recipe: Recipe, model: str) -> str:
    """`teacher`, `reference`, `student`, or `other`: a model of other people."""
    return model if model in ROLES else "student" if model in recipe.students else "other"


def _figures(evaluation: Evaluation, *, own_tokenizer: bool) -> dict[str, Any]:
    """All metrics of an evaluation as `metric` and `metric_se`; nats per token of other tokens are None."""
    figures: dict[str, Any] = {"own_tokenizer": own_tokenizer}
    of_all = {row.metric: row for row in evaluation.rows if row.source == ALL}
    for metric in _METRICS:
        row = of_all.get(metric)
        known = row is not None and not (own_tokenizer and metric.startswith("nats"))
        figures[metric] = row.value if row is not None and known else None
        figures[f"{metric}_se"] = row.standard_error if row is not None and known else None
    return figures


def _against(ours: Scores, control: Scores, own_tokenizer: bool, *, by_document: bool) -> dict[str, Any]:
    """Student minus control, paired by document; in bits per byte where the student's tokens are not the corpus's."""
    if own_tokenizer or ours.tokenizer != control.tokenizer:
        unit, gap = "bits per byte", compare_bits(ours, control)
    elif by_document:
        each = (control.logp - ours.logp) / ours.n_tokens
        error = float(np.std(each, ddof=1)) / len(each) ** 0.5 if len(each) > 1 else 0.0
        unit, gap = "nats per token, by document", Difference(float(each.mean()), error, len(each))
    else:
        unit, gap = "nats per token", compare(ours, control)
    return {"unit": unit, "value": gap.value, "se": gap.standard_error, "verdict": gap.verdict}


def _with_error(row: Row) -> dict[str, float | None]:
    return {"value": row.value, "se": row.standard_error}
