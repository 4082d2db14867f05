"""What finished stages took, and so how fast the next ones will go.

In: artifacts with their provenance. Out: `Measured`, from manifests and clocks; and `Speeds`: seconds for work that has
not been done, from the most similar work that has been done in the same run directory, else from a large matrix product
timed now and the share of it that such work has reached elsewhere. Seconds are of the wall, on the device at hand (one
device, where nothing was measured).

Not covered: what runs on other devices than the one that measures; a run directory that was copied there says so for
models only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import log
from pathlib import Path
from typing import Any

import torch

from miniplm import artifact
from miniplm.artifact import Identity, Manifest
from miniplm.errors import ArtifactError, MiniplmError
from miniplm.models.flops import matmul_rate
from miniplm.models.load import choose_device
from miniplm.recipe import Compute

WITHOUT_MODEL = frozenset({"documents", "corpus", "packed", "selection"})
# Of the rate of a large matrix product: measured on two CPU cores, models of 0.5 to 6M parameters; GPUs not yet
_SHARES = {"score": 0.35, "next_token": 0.2, "vanilla_kd": 0.25, "minillm": 0.1, "generate": 0.13, "proxy": 0.2}
_OTHER_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Measured:
    """What a stage took; None is not known.

    Attributes:
        work: what kind of computing it was, see `work_of`.
        flops: operations.
        tokens: as in `Estimate`.
        seconds: of the wall, earlier runs of a stage that was interrupted counted in.
        disk_bytes: of its folder.

    """

    work: str
    flops: float | None
    tokens: int | None
    seconds: float | None
    disk_bytes: int


def work_of(what: Identity) -> str:
    """What is computed, as far as it decides how fast: `score`, `generate`, an objective's name, else the kind."""
    if what.kind in {"scores", "evaluation"}:
        return "score"
    if what.kind == "model":
        return str(what.recipe.get("objective", {}).get("name", "next_token"))
    return "generate" if what.kind == "packed" and "teacher" in what.inputs else what.kind


def measured(manifest: Manifest) -> Measured:
    """What the artifact of a manifest took."""
    how, counts, work = artifact.provenance(manifest.path), manifest.counts, work_of(manifest.identity)
    flops: float | None = None
    tokens: int | None = None
    if manifest.identity.kind == "model":
        flops, tokens = counts.get("train_flops"), counts.get("train_tokens")
    elif work == "score":
        tokens = counts["tokens"]
        flops = None if how.get("resumed") else how.get("flops")  # those of the last run
    elif work == "generate":
        flops, tokens = counts["teacher_flops"], counts["generated_tokens"]
    elif work == "proxy":
        flops = counts["flops"]["fine_tuning"]
    elif work == "corpus":
        tokens = sum(part["tokens_out"] - part["instances"] for part in counts["parts"].values())
    elif work == "packed":
        tokens = counts["tokens_out"] - counts["instances"]
    return Measured(work, flops, tokens, _seconds(how, tokens), _folder_bytes(manifest.path))


class Speeds:
    """How fast work goes here."""

    def __init__(self, root: Path, compute: Compute, *, measure: bool) -> None:
        self._compute = compute
        self._measure = measure
        self._known = list(self._finished(root))

    def seconds(
        self, work: str, flops: float | None, tokens: int | None, dtype: str = "bfloat16"
    ) -> tuple[float | None, str]:
        """How long some work will take, and where that is from; None and "" if it cannot be told.

        Args:
            work: see `work_of`.
            flops: operations.
            tokens: of it; work on data is told by them, and other work is similar if it has as many operations a token.
            dtype: of the products, where nothing similar was done.

        """
        amount = tokens if work in WITHOUT_MODEL else flops
        if not amount:
            return None, ""
        alike = [known for known in self._known if known.work == work]
        if alike:
            size = (flops or 0) / (tokens or 1)
            nearest = min(alike, key=lambda known: abs(log(known.size / size)) if size and known.size else 0)
            return amount / nearest.per_second, f"as fast as {nearest.name}"
        if work in WITHOUT_MODEL or not self._measure or self._device is None:
            return None, ""
        rate = _timed(self._device, dtype)
        share = _SHARES.get(work, _OTHER_SHARE)
        return amount / (rate * share), f"at {share:.0%} of {rate / 1e12:,.2f} TFLOP/s"

    @cached_property
    def _device(self) -> str | None:
        try:
            return choose_device(self._compute.device).type
        except MiniplmError:  # the recipe is planned here and run elsewhere
            return None

    def _finished(self, root: Path) -> Iterator[_Known]:
        for folder in artifact.find(root) if root.is_dir() else ():
            try:
                found = measured(artifact.read(folder))
            except ArtifactError:  # whoever needs it is told
                continue
            where = artifact.provenance(folder).get("device")
            elsewhere = where is not None and where.split(":")[0] != self._device
            amount = found.tokens if found.work in WITHOUT_MODEL else found.flops
            if found.seconds and amount and not elsewhere:
                name = folder.relative_to(root).as_posix().rpartition("-")[0]
                size = 0 if not found.flops or not found.tokens else found.flops / found.tokens
                yield _Known(found.work, name, size, amount / found.seconds)


@dataclass(frozen=True, slots=True)
class _Known:
    """Work that was done: operations a token, and operations (of work without a model, tokens) per second."""

    work: str
    name: str
    size: float
    per_second: float


@cache
def _timed(device: str, dtype: str) -> float:
    """Operations per second of a large matrix product; timed once in a process."""
    return matmul_rate(torch.device(device), getattr(torch, dtype))


def _seconds(how: dict[str, Any], tokens: int | None) -> float | None:
    """Of all runs together: a stage's clock begins anew when it goes on after an interruption."""
    if "seconds" in how and not how.get("resumed"):
        return float(how["seconds"])
    if "train_seconds" in how:
        return float(how["train_seconds"])
    return tokens / how["tokens_per_s"] if tokens and how.get("tokens_per_s") else None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
