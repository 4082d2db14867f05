"""The stages that make models, and data for them, as a Python user writes them. Exported by `miniplm` itself.

As in `library.py`: each makes the artifact at `out` if it is not there, goes on if it is unfinished, and opens it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from miniplm.errors import RecipeError
from miniplm.models.load import model_fingerprint
from miniplm.packing import repack
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import Packed
from miniplm.packing.tokenizer import Tokenizer
from miniplm.pipeline.engines import engine_of
from miniplm.pipeline.given import (
    AnyGivenModel,
    about_rows,
    given_model,
    own_fingerprint,
    packed_behind,
    refused,
    rows_fingerprint,
)
from miniplm.recipe import (
    Compute,
    Counted,
    GenerateSettings,
    GivenModel,
    OwnObjective,
    ProxySettings,
    RetokenizeSettings,
    ScoreSettings,
    TrainSettings,
)
from miniplm.sampling.base import Selection
from miniplm.scoring.base import Scores

if TYPE_CHECKING:
    import datasets

    from miniplm.scoring.proxy import Proxy
    from miniplm.training.checkpoint import Checkpoint
    from miniplm.training.objectives import Objective


def train(
    model: str | Mapping[str, Any] | os.PathLike[str] | GivenModel,
    data: Packed | datasets.Dataset,
    *,
    out: str | os.PathLike[str],
    tokens: float | None = None,
    epochs: float | None = None,
    objective: str | Mapping[str, Any] | Objective = "next_token",
    teacher: str | os.PathLike[str] | GivenModel | None = None,
    held_out: Packed | None = None,
    counted: Counted = "all",
    tokenizer: Tokenizer | None = None,
    about: Mapping[str, str] | None = None,
    compute: Compute | None = None,
    **settings: Any,
) -> Checkpoint:
    """Train a causal language model: from scratch, or a trained one further.

    Args:
        model: a preset (`qwen-200m`), a `transformers` config as a dict, or a model to go on from (a `Checkpoint`, a
            `Path`, a `GivenModel`).
        data: a packed part, or rows of one (`corpus.pool.select(chosen.rows)`).
        out: folder of the model.
        tokens: predicted tokens to see, rounded down to whole batches; more than the data has are seen in further
            epochs.
        epochs: instead of `tokens`, passes over the data.
        objective: `next_token`, `vanilla_kd`, `minillm`, a mapping with further settings (`{"name": "vanilla_kd",
            "share": 0.3}`), `package.module:Class`, or an object with `loss(model, batch)` and a `fingerprint`.
        teacher: that the objective asks; those of your own are asked nothing here, and hold their own.
        held_out: instances for the loss curve.
        counted: which targets count.
        tokenizer: needed only for rows that are not of a packed part of ours.
        about: what the model card says of the data: name -> value; None: which part, and how much of it.
        compute: how: device, micro-batch.
        settings: `batch_tokens`, `learning_rate`, `match`, `seed`, `precision`, `keep`, `trainer`, ... of
            `TrainSettings`.

    Raises:
        RecipeError, ModelError, TokenizerError, TrainingError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    from miniplm.training import trainer as training  # imports torch, which documents and selections do not need
    from miniplm.training.named import own_objective
    from miniplm.training.trainer import TrainingData

    own = None if isinstance(objective, (str, Mapping)) else objective
    try:
        given = {"tokens": tokens, "epochs": epochs, **settings}
        if own is None:
            given["objective"] = objective
        resolved = TrainSettings.model_validate({**_which_model(model), **given})
        counted = ScoreSettings(counted=counted).counted
    except ValidationError as error:
        raise refused(error) from error
    if own is None and isinstance(resolved.objective, OwnObjective):
        own = own_objective(resolved.objective)
    if teacher is not None and not resolved.needs_teacher:
        raise RecipeError(
            f"the objective {resolved.objective.name if own is None else type(own).__name__} asks no teacher.",
            facts={"teacher": os.fspath(teacher) if not isinstance(teacher, GivenModel) else teacher.model},
            remedy="Leave it out, or give an objective that asks one: vanilla_kd, minillm.",
        )
    packed = data if isinstance(data, Packed) else packed_behind(data)
    made_by = _tokenizer_of(packed, tokenizer)
    rows = data.dataset if isinstance(data, Packed) else data
    inputs = {"data": data.fingerprint if isinstance(data, Packed) else rows_fingerprint(data, packed)}
    if packed is None:
        inputs["tokenizer"] = made_by.fingerprint
    if held_out is not None:
        inputs["held_out"] = held_out.fingerprint
    if own is not None:
        inputs["objective"] = own_fingerprint(own, "objective")
    asked = teacher if teacher is None or isinstance(teacher, GivenModel) else GivenModel(model=os.fspath(teacher))
    if asked is not None:
        inputs["teacher"] = model_fingerprint(asked)
    if resolved.start is not None:
        inputs["from"] = model_fingerprint(resolved.start)
    said = about_rows(rows, packed) if about is None else about
    material = TrainingData(rows, made_by, None if held_out is None else held_out.dataset, counted, said)
    what = training.identity(resolved, counted, inputs)
    return training.train(resolved, material, Path(out), what, compute, teacher=asked, objective=own)


def generate(
    data: Packed,
    teacher: str | os.PathLike[str] | GivenModel,
    *,
    out: str | os.PathLike[str],
    rows: Selection | None = None,
    compute: Compute | None = None,
    **settings: Any,
) -> Packed:
    """Have a teacher rewrite the end of each instance (SeqKD); what comes out is a packed part like any other.

    Args:
        data: the instances.
        teacher: Hub id, folder, `Checkpoint` or `GivenModel`.
        out: folder of the instances.
        rows: a selection of them; None takes all.
        compute: how: device, `generate_batch`, engine.
        settings: `prompt_tokens`, `temperature`, `top_p`, `dtype`, `seed` of `GenerateSettings`.

    Raises:
        RecipeError, ModelError, TokenizerError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    from miniplm.training import sequence_kd  # imports torch

    try:
        resolved = GenerateSettings.model_validate(settings)
    except ValidationError as error:
        raise refused(error) from error
    given = teacher if isinstance(teacher, GivenModel) else GivenModel(model=os.fspath(teacher))
    chosen, fingerprint = _chosen(data, rows)
    what = sequence_kd.identity(resolved, {"data": fingerprint, "teacher": model_fingerprint(given)})
    compute = compute or Compute()
    return sequence_kd.generate(data, chosen, given, resolved, Path(out), what, compute, engine_of(compute))


def retokenize(
    data: Packed,
    tokenizer: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    rows: Selection | None = None,
    sequence_length: int | None = None,
    compute: Compute | None = None,
) -> Packed:
    """Pack the text of instances again under another tokenizer, for students of another family.

    Args:
        data: the instances.
        tokenizer: Hub id or folder.
        out: folder of the instances.
        rows: a selection of them; None takes all.
        sequence_length: of the new instances; None: as the old ones.
        compute: how: the engine.

    Raises:
        RecipeError, TokenizerError, CorpusTooSmallError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    try:
        settings = RetokenizeSettings.model_validate(
            {"tokenizer": os.fspath(tokenizer), "sequence_length": sequence_length}
        )
    except ValidationError as error:
        raise refused(error) from error
    theirs = tokenizers.load(os.fspath(tokenizer))
    chosen, fingerprint = _chosen(data, rows)
    what = repack.identity(settings, theirs.fingerprint, {"data": fingerprint})
    return repack.retokenize(
        data, chosen, theirs, settings, Path(out), what, engine_of(compute or Compute(), model=False)
    )


def train_proxy(
    sample: Packed,
    *,
    teacher: Scores,
    reference: Scores,
    model: str | os.PathLike[str] | GivenModel,
    out: str | os.PathLike[str],
    teacher_model: AnyGivenModel | None = None,
    counted: Counted = "all",
    compute: Compute | None = None,
    **settings: Any,
) -> Proxy:
    """Fine-tune the reference model to predict the difference of the scores; `score` then takes it as a model.

    `DifferenceSampling(ratio=0.5).select_predicted(miniplm.score(corpus.pool, proxy, out=...))` is the selection.

    Args:
        sample: of the pool, from `miniplm.sample`.
        teacher: the teacher's scores of the sample.
        reference: the reference's.
        model: the reference model.
        out: folder of the proxy.
        teacher_model: the teacher, if `proxy.json` is to tell the operations that are saved.
        counted: which targets count, as in the scores.
        compute: how: device, micro-batch.
        settings: `normalize`, `held_out`, `validation`, `epochs`, `learning_rate`, `batch`, `precision`, `seed` of
            `ProxySettings`.

    Raises:
        RecipeError, ModelError, TokenizerError, TrainingError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    from miniplm.scoring.proxy import identity  # these import torch
    from miniplm.scoring.proxy_training import ProxyData
    from miniplm.scoring.proxy_training import train_proxy as train

    try:
        resolved = ProxySettings.model_validate(settings)
        counted = ScoreSettings(counted=counted).counted
    except ValidationError as error:
        raise refused(error) from error
    given = model if isinstance(model, GivenModel) else GivenModel(model=os.fspath(model))
    inputs = {
        "sample": sample.fingerprint,
        "teacher": teacher.fingerprint,
        "reference": reference.fingerprint,
        "model": model_fingerprint(given),
    }
    whose_flops = None if teacher_model is None else given_model(teacher_model)
    if whose_flops is not None:
        inputs["teacher_model"] = model_fingerprint(whose_flops)
    data = ProxyData(sample, teacher, reference, given, whose_flops, counted)
    return train(data, resolved, Path(out), identity(resolved, counted, inputs), compute)


def _which_model(model: str | Mapping[str, Any] | os.PathLike[str] | GivenModel) -> dict[str, Any]:
    """The settings that say which model is trained."""
    if isinstance(model, GivenModel):
        return {"from": model}
    if isinstance(model, os.PathLike):
        return {"from": os.fspath(model)}
    return {"preset": model} if isinstance(model, str) else {"config": dict(model)}


def _tokenizer_of(packed: Packed | None, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer that made the rows; one that is given has to be that of the packed part."""
    if packed is None:
        if given is None:
            raise RecipeError(
                "these rows are of no packed part; say which tokenizer made them: train(..., tokenizer=...)."
            )
        return given
    made_by = packed.tokenizer
    if given is not None and given.fingerprint != made_by.fingerprint:
        raise RecipeError(
            "the tokenizer is not the one that made these rows.",
            facts={
                "given": f"tokenizer {given.fingerprint[:12]}  {given.vocab_size:,} tokens",
                "rows": f"tokenizer {made_by.fingerprint[:12]}  {made_by.vocab_size:,} tokens  {packed.path}",
            },
            remedy="Leave `tokenizer` out; miniplm.retokenize packs the text again under another one.",
        )
    return made_by


def _chosen(data: Packed, rows: Selection | None) -> tuple[NDArray[np.int64] | None, str]:
    """Row numbers (None: all), and the fingerprint of what they are."""
    if rows is None:
        return None, data.fingerprint
    rows.check_of(data)
    return rows.rows, hashlib.sha256(data.fingerprint.encode() + rows.rows.tobytes()).hexdigest()
