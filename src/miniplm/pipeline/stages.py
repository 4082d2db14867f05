"""What the stages of a chain do: open the inputs, call the library function. One function for each kind of stage.

Inputs come as functions that open them, because nothing is there yet when the chain is laid out; `out` and `what` come
last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miniplm.artifact import Identity, Manifest
from miniplm.corpus.sources import Documents
from miniplm.evaluation.evaluate import Evaluation, evaluate, score_settings
from miniplm.evaluation.tasks import TaskResults, evaluate_tasks
from miniplm.packing.documents import pack_documents
from miniplm.packing.instances import Packed, open_packed
from miniplm.packing.repack import retokenize
from miniplm.packing.sample import sample
from miniplm.packing.tokenizer import Tokenizer
from miniplm.pipeline.engines import engine_of
from miniplm.recipe import (
    Compute,
    Counted,
    DocumentSetSettings,
    GenerateSettings,
    GivenModel,
    ProxySettings,
    RetokenizeSettings,
    ScoredModel,
    ScoreSettings,
    TaskSettings,
    TrainSettings,
)
from miniplm.sampling.base import Pool, Sampler, open_selection, save
from miniplm.scoring.base import Scores, open_scores
from miniplm.scoring.load import load_scorer
from miniplm.scoring.proxy import Proxy, load_proxy
from miniplm.scoring.proxy_training import ProxyData, train_proxy
from miniplm.scoring.score import score
from miniplm.training.checkpoint import Checkpoint
from miniplm.training.objectives import Objective
from miniplm.training.sequence_kd import generate
from miniplm.training.trainer import TrainingData, train

OpenPacked = Callable[[], Packed]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a packed part: `numbers`, or all."""

    packed: Packed
    numbers: NDArray[np.int64] | None = None


OpenRows = Callable[[], Rows]


@dataclass(frozen=True, slots=True)
class Material:
    """What a model is trained on, to be opened; `open_held_out` gives it a loss curve, `about` is for its card."""

    open: OpenRows
    open_held_out: OpenPacked | None
    counted: Counted
    about: Mapping[str, str]


def open_whole(open_packed: OpenPacked) -> Rows:
    """All of a part."""
    return Rows(open_packed())


def open_selected(open_packed: OpenPacked, selection: Path) -> Rows:
    """The rows of a part that a selection kept."""
    return Rows(open_packed(), open_selection(selection).rows)


def open_made(path: Path) -> Rows:
    """All of what was generated, or packed anew."""
    return Rows(open_packed(path))


def train_model(
    settings: TrainSettings,
    material: Material,
    teacher: GivenModel | None,
    objective: Objective | None,
    compute: Compute,
    out: Path,
    what: Identity,
) -> Checkpoint:
    """Train a model, with the teacher that its objective asks, or with an objective of the user's."""
    rows = material.open()
    packed = rows.packed
    data = TrainingData(
        rows=packed.dataset if rows.numbers is None else packed.select(rows.numbers),
        tokenizer=packed.tokenizer,
        held_out=None if material.open_held_out is None else material.open_held_out().dataset,
        counted=material.counted,
        about=material.about,
    )
    logs = out.parent.parent / "logs" / out.parent.name / out.name  # of the whole run together
    return train(settings, data, out, what, compute, teacher=teacher, objective=objective, logs=logs)


def generate_rows(
    open_prompts: OpenRows, teacher: GivenModel, settings: GenerateSettings, compute: Compute, out: Path, what: Identity
) -> Packed:
    """Have the teacher rewrite the end of each instance (SeqKD)."""
    prompts = open_prompts()
    return generate(prompts.packed, prompts.numbers, teacher, settings, out, what, compute, engine_of(compute))


def retokenize_rows(
    open_rows: OpenRows,
    tokenizer: Tokenizer,
    settings: RetokenizeSettings,
    compute: Compute,
    out: Path,
    what: Identity,
) -> Packed:
    """Pack the text of rows again under another tokenizer."""
    rows = open_rows()
    return retokenize(rows.packed, rows.numbers, tokenizer, settings, out, what, engine_of(compute, model=False))


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


def pack_set(
    documents: Documents,
    open_tokenizer: Callable[[], Tokenizer],
    sequence_length: int,
    settings: DocumentSetSettings,
    out: Path,
    what: Identity,
) -> Packed:
    """Pack a set of documents to measure models on, under the corpus's tokenizer."""
    return pack_documents(documents, open_tokenizer(), sequence_length, settings, out, what)


def evaluate_model(
    open_measured: OpenPacked, model: ScoredModel, compute: Compute, out: Path, what: Identity
) -> Evaluation:
    """Measure a model on the held-out part, or on a set of documents."""
    make_scorer = partial(load_scorer, model, score_settings(what), compute)
    return evaluate(open_measured(), make_scorer, out, what, compute, engine_of(compute))


def run_tasks(model: GivenModel, settings: TaskSettings, compute: Compute, out: Path, what: Identity) -> TaskResults:
    """Put the questions of benchmarks to a model."""
    return evaluate_tasks(model, settings, out, what, compute)
