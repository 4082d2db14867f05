"""What the stages of a chain do: open the inputs, call the library function. One function for each kind of stage.

Inputs come as functions that open them, because nothing is there yet when the chain is laid out; `out` and `what` come
last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from miniplm.artifact import Identity, Manifest
from miniplm.evaluation.evaluate import Evaluation, evaluate
from miniplm.packing.instances import Packed, open_packed
from miniplm.packing.sample import sample
from miniplm.pipeline.engines import engine_of
from miniplm.recipe import Compute, Counted, GivenModel, ProxySettings, ScoredModel, ScoreSettings, TrainSettings
from miniplm.sampling.base import Pool, Sampler, open_selection, save
from miniplm.scoring.base import Scores, open_scores
from miniplm.scoring.load import load_scorer
from miniplm.scoring.proxy import Proxy, load_proxy
from miniplm.scoring.proxy_training import ProxyData, train_proxy
from miniplm.scoring.score import score
from miniplm.training.trainer import Checkpoint, TrainingData, train

OpenPacked = Callable[[], Packed]


def train_model(
    settings: TrainSettings,
    open_packed: OpenPacked,
    rows: Path | None,
    open_held_out: OpenPacked | None,
    counted: Counted,
    compute: Compute,
    out: Path,
    what: Identity,
) -> Checkpoint:
    """Train a model on a packed part, or on the selection `rows` of it; `open_held_out` gives it a loss curve."""
    packed = open_packed()
    data = TrainingData(
        rows=packed.dataset if rows is None else packed.select(open_selection(rows).rows),
        tokenizer=packed.tokenizer,
        held_out=None if open_held_out is None else open_held_out().dataset,
        counted=counted,
    )
    return train(settings, data, out, what, compute)


def score_part(open_packed: OpenPacked, model: ScoredModel, compute: Compute, out: Path, what: Identity) -> Scores:
    """Score a packed part with a model."""
    make_scorer = partial(load_scorer, model, ScoreSettings.model_validate(what.recipe), compute)
    return score(open_packed(), make_scorer, out, what, compute, engine_of(compute))


def sample_pool(open_pool: OpenPacked, out: Path, what: Identity) -> Packed:
    """Draw the share of the pool that teacher and reference score where there is a proxy."""
    return sample(open_pool(), out, what)


def make_proxy(
    settings: ProxySettings,
    sampled: Path,
    scores: Mapping[str, Path],
    models: Mapping[str, ScoredModel],
    counted: Counted,
    compute: Compute,
    out: Path,
    what: Identity,
) -> Proxy:
    """Fine-tune the reference model to predict the difference; `scores` (of the sample) and `models` are by role."""
    reference = models["reference"]
    assert isinstance(reference, GivenModel)  # the recipe has made sure
    opened = {role: open_scores(path) for role, path in scores.items()}
    data = ProxyData(
        open_packed(sampled), opened["teacher"], opened["reference"], reference, models["teacher"], counted
    )
    return train_proxy(data, settings, out, what, compute)


def score_with_proxy(open_packed: OpenPacked, proxy: Path, compute: Compute, out: Path, what: Identity) -> Scores:
    """Predict the difference for every instance of a packed part."""
    make_scorer = partial(load_proxy, proxy, ScoreSettings.model_validate(what.recipe).dtype, compute)
    return score(open_packed(), make_scorer, out, what, compute, engine_of(compute))


def select_rows(
    sampler: Sampler, open_pool: OpenPacked, scores: Mapping[str, Path], out: Path, what: Identity
) -> Manifest:
    """Run a sampler on the scores that it needs (role -> folder; a proxy's are `difference`), and write its choice."""
    opened = {role: open_scores(path) for role, path in scores.items()}
    if "difference" in opened:
        selection = sampler.select_predicted(opened["difference"])  # type: ignore[attr-defined]  # `needs_with_proxy`
    else:
        selection = sampler.select(opened.get("teacher"), opened.get("reference"), pool=Pool.of(open_pool()))
    return save(out, what, selection)


def evaluate_model(
    open_held_out: OpenPacked, model: ScoredModel, compute: Compute, out: Path, what: Identity
) -> Evaluation:
    """Measure a model on the held-out part."""
    make_scorer = partial(load_scorer, model, ScoreSettings.model_validate(what.recipe), compute)
    return evaluate(open_held_out(), make_scorer, out, what, compute, engine_of(compute))
