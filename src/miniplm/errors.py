"""The exceptions of miniplm: one class for each kind of thing a user can mend.

    MiniplmError
    ├── RecipeError                a recipe, a setting or an option that cannot be used
    ├── MissingExtraError          a part of miniplm that is not installed
    ├── CorpusError                documents that cannot be read
    │   └── CorpusTooSmallError    not enough of them for the split that was asked for
    ├── TokenizerError             a tokenizer that cannot be loaded or does not fit
    ├── ArtifactError
    │   ├── ArtifactMissingError   nothing there, or not finished
    │   ├── ArtifactMismatchError  something else is there, or two things that do not belong together
    │   ├── ArtifactDamagedError   truncated or altered
    │   └── ArtifactBusyError      another process is making it
    ├── ModelError                 a model that cannot be loaded or does not fit the data
    ├── ScoreError                 scores that cannot be used (NaN, infinite, too few)
    ├── TrainingError              training that cannot begin or go on
    ├── EngineError                workers that cannot be had, or that are lost again and again
    └── StorageError               the disk is full

A message says what was found, what was expected and what to do, with the values. `MiniplmError.facts` lays the
middle lines out in two aligned columns, so that both sides of a mismatch stand under each other.
"""

from __future__ import annotations

from collections.abc import Mapping


class MiniplmError(Exception):
    """The root of everything a user can cause; the command line prints it as `error: ...` and exits with 1.

    Args:
        summary: one sentence that says what is wrong.
        facts: name -> value, printed one to a line below the summary.
        remedy: what to do, in the imperative.

    """

    def __init__(self, summary: str, *, facts: Mapping[str, object] | None = None, remedy: str = "") -> None:
        width = max((len(name) for name in facts or {}), default=0)
        lines = [summary, *(f"  {name:<{width}}  {value}" for name, value in (facts or {}).items())]
        super().__init__("\n".join([*lines, remedy] if remedy else lines))


class RecipeError(MiniplmError):
    """A recipe, a setting or an option that cannot be used."""


class MissingExtraError(MiniplmError):
    """A part of miniplm that is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(
            f"this needs the package {module!r}, which is not installed.",
            remedy=f'Install it with: pip install "miniplm[{extra}]"',
        )
        self.extra, self.module = extra, module

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:  # workers elsewhere send it back
        return MissingExtraError, (self.extra, self.module)


class CorpusError(MiniplmError):
    """Documents that cannot be read."""


class CorpusTooSmallError(CorpusError):
    """Too few documents for the split that was asked for."""


class TokenizerError(MiniplmError):
    """A tokenizer that cannot be loaded or does not fit."""


class ArtifactError(MiniplmError):
    """Something is wrong with an artifact on disk."""


class ArtifactMissingError(ArtifactError):
    """Nothing is there, or it is not finished."""


class ArtifactMismatchError(ArtifactError):
    """Something else is there, or two artifacts do not belong together."""


class ArtifactDamagedError(ArtifactError):
    """An artifact is truncated or altered."""


class ArtifactBusyError(ArtifactError):
    """Another process is making the artifact."""


class ModelError(MiniplmError):
    """A model that cannot be loaded or does not fit the data."""


class ScoreError(MiniplmError):
    """Scores that cannot be used."""


class TrainingError(MiniplmError):
    """Training that cannot begin or go on."""


class EngineError(MiniplmError):
    """Workers that cannot be had, or that are lost again and again."""


class StorageError(MiniplmError):
    """The disk is full."""
