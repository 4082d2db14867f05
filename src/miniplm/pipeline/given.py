"""What the arguments of the library's functions stand for, and what they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from miniplm.artifact import MANIFEST
from miniplm.errors import RecipeError
from miniplm.packing.instances import Packed, open_packed
from miniplm.recipe import GivenModel, ScoredModel

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
    """What a Dataset is: the packed part and the row numbers, or the fingerprint that `datasets` gives it.

    Row numbers mean what they say only while the table under them is that of the whole part: slices are other tables.
    """
    whole = packed is not None and rows._data.num_rows == len(packed) and rows.features == packed.dataset.features
    whole = whole and {Path(file["filename"]) for file in rows.cache_files} == set(packed.shards if packed else ())
    if packed is None or rows._indices is None or not whole:
        return str(rows._fingerprint)
    numbers = rows._indices.column(0).to_numpy().astype(np.int64)
    return hashlib.sha256(packed.fingerprint.encode() + numbers.tobytes()).hexdigest()


def refused(error: ValidationError) -> RecipeError:
    """What pydantic says of an argument, as an error of ours."""
    first = error.errors()[0]
    name = ".".join(str(step) for step in first["loc"]) or "the arguments"
    return RecipeError(
        f"{name} cannot be used.",
        facts={"found": repr(first["input"])[:80], "because": first["msg"].removeprefix("Value error, ")},
    )
