"""What the stages of a chain do: open the inputs, call the library function. One function for each kind of stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from miniplm.artifact import Identity, Manifest
from miniplm.evaluation.evaluate import Evaluation, evaluate
from miniplm.packing.instances import Packed
from miniplm.recipe import Compute, Counted, GivenModel, TrainSettings
from miniplm.sampling.base import Pool, Sampler, Selection, save
from miniplm.scoring.base import Scores, open_scores
from miniplm.scoring.huggingface import load_scorer
from miniplm.scoring.score import score
from miniplm.training.trainer import Checkpoint, TrainingData, train


def train_model(
    settings: TrainSettings,
    packed: Packed,
    selection: Selection | None,
    held_out: Packed | None,
    counted: Counted,
    out: Path,
    what: Identity,
    compute: Compute,
) -> Checkpoint:
    """Train a model on a packed part, or on a selection of it; `held_out` gives it a loss curve."""
    data = TrainingData(
        rows=packed.dataset if selection is None else packed.select(selection.rows),
        tokenizer=packed.tokenizer,
        held_out=None if held_out is None else held_out.dataset,
        counted=counted,
    )
    return train(settings, data, out, what, compute)


def score_part(packed: Packed, model: GivenModel, out: Path, what: Identity, compute: Compute) -> Scores:
    """Score a packed part with a model."""
    return score(packed, lambda: load_scorer(model, what.recipe["dtype"], compute), out, what, compute)


def select_rows(sampler: Sampler, pool: Packed, scores: Mapping[str, Path], out: Path, what: Identity) -> Manifest:
    """Run a sampler on the scores that it needs, and write what it chose."""
    opened = {role: open_scores(path) for role, path in scores.items()}
    selection = sampler.select(opened.get("teacher"), opened.get("reference"), pool=Pool.of(pool))
    return save(out, what, selection)


def evaluate_model(held_out: Packed, model: GivenModel, out: Path, what: Identity, compute: Compute) -> Evaluation:
    """Measure a model on the held-out part."""
    return evaluate(held_out, lambda: load_scorer(model, what.recipe["dtype"], compute), out, what, compute)
