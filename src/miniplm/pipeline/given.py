"""What the arguments of the library's functions stand for, and what they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from miniplm import artifact
from miniplm.artifact import MANIFEST
from miniplm.errors import RecipeError
from miniplm.packing.instances import Packed, open_packed
from miniplm.recipe import GivenModel, ScoredModel
from miniplm.sampling.base import open_selection

if TYPE_CHECKING:
    import datasets

AnyGivenModel = str | os.PathLike[str] | ScoredModel


def own_fingerprint(own: object, kind: str) -> str:
    """What an object of the user's is."""
    fingerprint = getattr(own, "fingerprint", None)
    if not isinstance(fingerprint, str):
        raise RecipeError(
            f"{type(own).__name__} does not say what it is.",
            remedy=f"Give your {kind} an attribute `fingerprint`: a string that changes when its results would.",
        )
    return hashlib.sha256(f"{kind}\0{fingerprint}".encode()).hexdigest()


def given_model(model: AnyGivenModel) -> ScoredModel:
    """A model's settings, from its name or folder."""
    return model if isinstance(model, ScoredModel) else GivenModel(model=os.fspath(model))


def packed_behind(rows: datasets.Dataset) -> Packed | None:
    """The packed part that a Dataset is a choice of rows of, told by where its files lie; None if of no such part."""
    folders = {Path(file["filename"]).parent for file in rows.cache_files}
    if len(folders) == 1 and ((folder := folders.pop()) / MANIFEST).is_file():
        return open_packed(folder)
    return None


def rows_fingerprint(rows: datasets.Dataset, packed: Packed | None) -> str:
    """What a Dataset is: the packed part and the row numbers, or the fingerprint that `datasets` gives it."""
    if packed is None or rows._indices is None or not _over_whole(rows, packed):
        return str(rows._fingerprint)
    numbers = rows._indices.column(0).to_numpy().astype(np.int64)
    return hashlib.sha256(packed.fingerprint.encode() + numbers.tobytes()).hexdigest()


def about_rows(rows: datasets.Dataset, packed: Packed | None) -> dict[str, str]:
    """What a model card says of rows: which part they are of, and how much of it, as far as that can be told."""
    if packed is None or not _over_whole(rows, packed):
        return {}
    if rows._indices is None:
        return {"data": packed.path.name}
    kept = len(np.unique(rows._indices.column(0).to_numpy()))
    return {"data": f"{kept / len(packed):.0%} of {packed.path.name}"}


def selected_rows(packed: Packed, folder: Path) -> tuple[datasets.Dataset, dict[str, str]]:
    """The rows that a selection on disk kept, and what a model card says of them.

    Raises:
        ArtifactError: there is no selection, or it is of other instances.

    """
    selection, manifest = open_selection(folder), artifact.read(folder)
    selection.check_of(packed)
    how = manifest.identity.recipe["sampler"]
    about = {
        "data": f"{len(selection) / selection.of:.0%} of {packed.path.name}, by {how} sampling",
        "selection": manifest.fingerprint[:12],
    }
    return packed.select(selection.rows), about


def _over_whole(rows: datasets.Dataset, packed: Packed) -> bool:
    """Whether the table under the rows is that of the whole part, so that row numbers mean what they say."""
    whole = rows._data.num_rows == len(packed) and rows.features == packed.dataset.features
    files = {Path(file["filename"]).resolve() for file in rows.cache_files}
    return whole and files == {shard.resolve() for shard in packed.shards}  # the part may have been given relatively


def refused(error: ValidationError) -> RecipeError:
    """What pydantic says of an argument, as an error of ours."""
    first = error.errors()[0]
    name = ".".join(str(step) for step in first["loc"]) or "the arguments"
    return RecipeError(
        f"{name} cannot be used.",
        facts={"found": repr(first["input"])[:80], "because": first["msg"].removeprefix("Value error, ")},
    )
