"""Measuring models as a Python user writes it: on held-out instances, on documents, on tasks.

Each function makes the artifact at `out` if it is not there, goes on with it if it is unfinished, and opens it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from miniplm.corpus.sources import open_documents
from miniplm.errors import ModelError, RecipeError
from miniplm.evaluation import evaluate as evaluating
from miniplm.evaluation import tasks as asking
from miniplm.evaluation.evaluate import Evaluation
from miniplm.evaluation.tasks import TaskResults
from miniplm.models.load import own_tokenizer
from miniplm.packing import documents as packing
from miniplm.packing.instances import Packed
from miniplm.packing.tokenizer import Tokenizer
from miniplm.pipeline.engines import engine_of
from miniplm.pipeline.given import AnyGivenModel, given_model, refused
from miniplm.pipeline.library import AnyModel, own_tokenizer_fingerprint, score_settings, scorer_of
from miniplm.recipe import Compute, Counted, DocumentSetSettings, GivenModel, Precision, TaskSettings

_BLOCK_BYTES = 32_000_000


def evaluate(
    model: AnyModel,
    *,
    held_out: Packed,
    out: str | os.PathLike[str],
    dtype: Precision = "bfloat16",
    counted: Counted = "all",
    tokenizer: Literal["packed", "own"] = "packed",
    documents: str | None = None,
    compute: Compute | None = None,
) -> Evaluation:
    """Measure a model on held-out instances: nats per token and bits per byte, per source and in all.

    Arguments and errors are those of `score`; `documents` is the name of a set whose instances are documents, as
    `pack_documents` makes them. Printing the result shows the table.
    """
    compute = compute or Compute()
    settings = score_settings(dtype=dtype, counted=counted, tokenizer=tokenizer)
    fingerprint, make_scorer = scorer_of(model, settings, compute)
    own = own_tokenizer_fingerprint(model, settings)
    what = evaluating.identity(held_out.fingerprint, fingerprint, settings, own, documents)
    return evaluating.evaluate(held_out, make_scorer, Path(out), what, compute, engine_of(compute))


def pack_documents(
    source: str | os.PathLike[str] | list[str] | Mapping[str, Any] | DocumentSetSettings,
    *,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    sequence_length: int = 1024,
    windows: Literal["first", "all"] = "first",
) -> Packed:
    """Pack documents, each by itself, to measure models on.

    Args:
        source: path, glob, list of them, or settings as in a recipe (`{files: ..., documents: 10000}`).
        tokenizer: for all models that are to be compared, or that of the one model.
        out: folder of the packed documents.
        sequence_length: T, predicted positions.
        windows: `first` T+1 tokens of a document, the paper's way; `all`: the whole of it, in windows.

    Raises:
        RecipeError, CorpusError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    try:
        if isinstance(source, str | os.PathLike | list):
            source = {"files": source if isinstance(source, list) else os.fspath(source)}
        if isinstance(source, Mapping):
            source = {"windows": windows, **source}
        settings = DocumentSetSettings.model_validate(source)
    except ValidationError as error:
        raise refused(error) from error
    if sequence_length < 2:  # as in a recipe
        raise RecipeError("sequence_length cannot be used.", facts={"found": sequence_length, "expected": "2 or more"})
    documents = open_documents(settings, _BLOCK_BYTES)
    what = packing.identity(documents.fingerprint, tokenizer.fingerprint, sequence_length, settings)
    return packing.pack_documents(documents, tokenizer, sequence_length, settings, Path(out), what)


def evaluate_documents(
    model: AnyGivenModel,
    source: str | os.PathLike[str] | list[str] | Mapping[str, Any] | DocumentSetSettings,
    *,
    out: str | os.PathLike[str],
    name: str = "documents",
    sequence_length: int = 1024,
    windows: Literal["first", "all"] = "first",
    dtype: Precision = "bfloat16",
    compute: Compute | None = None,
) -> Evaluation:
    """Measure a model on documents under its own tokenizer, as the paper does (10K documents of DCLM, section 3.1).

    Nats per token of models with different tokenizers cannot be compared; bits per byte can with `windows="all"`, where
    every model reads the same text. The packed documents lie beside `out`.

    Args:
        model: Hub id, folder, `Checkpoint`.
        source: documents, as in `pack_documents`.
        out: folder of the evaluation.
        name: of the set, in tables.
        sequence_length: T, predicted positions of a window.
        windows: `first` T+1 tokens of a document, the paper's way; `all`: the whole of it.
        dtype: of the model's weights.
        compute: how: device, batch size.

    Raises:
        ModelError: the model has no tokenizer of its own, or cannot be loaded.
        RecipeError, CorpusError, ScoreError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    given, out = given_model(model), Path(out)
    tokenizer = own_tokenizer(given) if isinstance(given, GivenModel) else None
    if tokenizer is None:
        raise ModelError(
            "the model comes without a tokenizer, so documents cannot be read to it.",
            facts={"model": getattr(given, "model", given)},
            remedy="Save its tokenizer in its folder, or pack the documents with one: `pack_documents`, `evaluate`.",
        )
    packed = pack_documents(
        source, tokenizer=tokenizer, out=out.with_name(out.name + "-packed"), sequence_length=sequence_length,
        windows=windows,
    )  # fmt: skip
    return evaluate(given, held_out=packed, out=out, dtype=dtype, documents=name, compute=compute)


def evaluate_tasks(
    model: AnyGivenModel,
    tasks: str | Sequence[str] = "paper",
    *,
    out: str | os.PathLike[str],
    tasks_data: str | os.PathLike[str] | None = None,
    shots: int = 0,
    limit: int | None = None,
    dtype: Precision = "bfloat16",
    compute: Compute | None = None,
) -> TaskResults:
    """Put the questions of benchmarks to a model, by lm-evaluation-harness.

    Args:
        model: Hub id, folder, `Checkpoint`.
        tasks: names of the harness; `paper` stands for the paper's nine.
        out: folder of the results.
        tasks_data: folder with the tasks' files, a folder a task: nothing is read from the network.
        shots: examples before each question.
        limit: examples of each task.
        dtype: of the model's weights.
        compute: how: the device.

    Raises:
        RecipeError: there is no such task, or its files are not there.
        MissingExtraError: lm-evaluation-harness is not installed.
        ModelError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    given = given_model(model)
    if not isinstance(given, GivenModel):
        raise ModelError("tasks need a model that transformers runs, not one behind a server or in vLLM.")
    try:
        settings = TaskSettings.model_validate(
            {
                "tasks": [tasks] if isinstance(tasks, str) else list(tasks), "shots": shots, "limit": limit,
                "tasks_data": None if tasks_data is None else os.fspath(tasks_data), "dtype": dtype,
            }
        )  # fmt: skip
    except ValidationError as error:
        raise refused(error) from error
    from miniplm.models.load import model_fingerprint

    what = asking.identity(model_fingerprint(given), settings)
    return asking.evaluate_tasks(given, settings, Path(out), what, compute)
