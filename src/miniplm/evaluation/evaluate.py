"""The stage `evaluate`: a model on the held-out part.

In: a model's scorer and a packed part. Out: an `Evaluation`: the log-probability of every instance in Parquet, from
which the figures of `loss.py` are derived, and with which any two models can be compared in pairs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.engine.base import Engine
from miniplm.engine.local import LocalEngine
from miniplm.evaluation.loss import ALL, Row, losses
from miniplm.packing.instances import Packed
from miniplm.recipe import Compute, ScoreSettings
from miniplm.scoring.base import Scores, open_scores, read_parts
from miniplm.scoring.score import ScorerFactory, score_shards

VERSION = 2


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model: rows of (dataset, source, metric, value, standard error, n), and the scores behind them."""

    rows: tuple[Row, ...]
    scores: Scores

    def value(self, metric: str, source: str = ALL) -> Row:
        """One figure by name. Raises KeyError if it was not measured."""
        for row in self.rows:
            if (row.metric, row.source) == (metric, source):
                return row
        raise KeyError((metric, source))

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self.rows)


def identity(held_out: str, model: str, settings: ScoreSettings, tokenizer: str = "") -> Identity:
    """What an evaluation is: `held_out`, `model` and, with `tokenizer: own`, that of the model are fingerprints.

    Of the settings, dtype, tokenizer and what counts. A model is measured as it was trained: over whole instances, and
    not quantised.
    """
    recipe = settings.model_dump(mode="json", include={"dtype", "counted", "tokenizer"})
    inputs = {"packed": held_out, "model": model}
    if settings.tokenizer == "own" and tokenizer:
        inputs["tokenizer"] = tokenizer
    return Identity("evaluation", VERSION, recipe, inputs)


def evaluate(
    held_out: Packed,
    make_scorer: ScorerFactory,
    out: Path,
    what: Identity,
    compute: Compute | None = None,
    engine: Engine | None = None,
) -> Evaluation:
    """Measure a model on `held_out` into the artifact at `out`. Errors are those of scoring."""

    def work(workspace: Workspace) -> Mapping[str, Any]:
        settings = ScoreSettings.model_validate(what.recipe)
        how, where = compute or Compute(), engine or LocalEngine()
        counts = score_shards(workspace, held_out, make_scorer, settings, how, where, "evaluate")
        evaluation = _evaluation(read_parts(workspace.path, held_out.fingerprint, counts["tokenizer"]))
        workspace.write_json("evaluation.json", [row.as_dict() for row in evaluation.rows])
        with workspace.part("evaluation.csv") as path:
            path.write_bytes(as_csv({what.inputs["model"][:12]: evaluation}).encode())
        return counts

    artifact.make(out, what, work)
    return open_evaluation(out)


def open_evaluation(path: Path | str) -> Evaluation:
    """Open an evaluation on disk. Raises ArtifactError if it is not there, not finished or damaged."""
    return _evaluation(open_scores(path, kind="evaluation"))


def as_csv(rows: Mapping[str, Evaluation]) -> str:
    """A table of several models: model, dataset, source, metric, value, standard error, n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "dataset", "source", "metric", "value", "standard_error", "n"])
    for model, evaluation in rows.items():
        writer.writerows([model, *row.as_dict().values()] for row in evaluation.rows)
    return text.getvalue()


def _evaluation(scores: Scores) -> Evaluation:
    return Evaluation(tuple(losses(scores)), scores)
