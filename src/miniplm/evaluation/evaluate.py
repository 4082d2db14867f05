"""The stage `evaluate`: a model on the held-out part, or on a set of documents.

In: a model's scorer and a packed part. Out: an `Evaluation`: the log-probability of every instance in Parquet, from
which the figures of `loss.py` are derived, and with which any two models can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.engine.base import Engine
from miniplm.engine.local import LocalEngine
from miniplm.evaluation.loss import ALL, HELD_OUT, Row, as_csv, losses
from miniplm.packing.instances import Packed
from miniplm.recipe import Compute, ScoreSettings
from miniplm.scoring.base import Scores, open_scores, read_parts
from miniplm.scoring.score import ScorerFactory, score_shards

VERSION = 3


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


def identity(
    held_out: str, model: str, settings: ScoreSettings, tokenizer: str = "", documents: str | None = None
) -> Identity:
    """What an evaluation is: `held_out`, `model` and, with `tokenizer: own`, that of the model are fingerprints.

    `documents` is the name of the set where the instances are documents, each by itself.

    Of the settings, dtype, tokenizer and what counts. A model is measured as it was trained: over whole instances, and
    not quantised.
    """
    recipe = settings.model_dump(mode="json", include={"dtype", "counted", "tokenizer"})
    if documents is not None:
        recipe["documents_named"] = documents
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
        settings = score_settings(what)
        how, where = compute or Compute(), engine or LocalEngine()
        counts = score_shards(workspace, held_out, make_scorer, settings, how, where, "evaluate")
        whole = held_out.manifest.identity.recipe.get("windows") == "first"
        shape = {"dataset": what.recipe.get("documents_named", HELD_OUT), "by_document": whole}
        evaluation = _evaluation(read_parts(workspace.path, held_out.fingerprint, counts["tokenizer"]), **shape)
        workspace.write_json("evaluation.json", [row.as_dict() for row in evaluation.rows])
        with workspace.part("evaluation.csv") as path:
            path.write_bytes(as_csv({what.inputs["model"][:12]: evaluation.rows}).encode())
        return {**counts, **shape}

    artifact.make(out, what, work)
    return open_evaluation(out)


def score_settings(what: Identity) -> ScoreSettings:
    """The settings in an evaluation's identity."""
    recipe = {key: value for key, value in what.recipe.items() if key != "documents_named"}
    return ScoreSettings.model_validate(recipe)


def open_evaluation(path: Path | str) -> Evaluation:
    """Open an evaluation on disk. Raises ArtifactError if it is not there, not finished or damaged."""
    scores = open_scores(path, kind="evaluation")
    counts = artifact.read(path).counts
    return _evaluation(scores, counts.get("dataset", HELD_OUT), by_document=counts.get("by_document", False))


def _evaluation(scores: Scores, dataset: str, *, by_document: bool) -> Evaluation:
    return Evaluation(tuple(losses(scores, dataset, by_document=by_document)), scores)
