"""What all settings share: the base class, names for common types, and complaints that name a setting."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Counted = Literal["all", "skip_after_separator"]
Documents = Literal["attend", "isolate"]
Precision = Literal["float32", "bfloat16", "float16"]


class At(ValueError):  # noqa: N818 (it never leaves this folder)
    """A complaint about the setting at `path`, relative to the model whose validator raises it."""

    def __init__(self, path: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


class Settings(BaseModel):
    """The base of all settings: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """What was expected in place of a word, and the nearest of it."""
    names = sorted(valid)
    return " ".join(filter(None, [f"expected one of: {', '.join(names)}.", nearest(word, names)]))


def nearest(word: str, valid: Iterable[str]) -> str:
    """The valid name that a word was probably meant to be, as a question; "" if none is near."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else ""
