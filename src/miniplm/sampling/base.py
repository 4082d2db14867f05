"""What a sampler is, what a selection is, and exact top-K.

A sampler is called as `select(teacher, reference, pool=...)` and returns a `Selection`. `needs` says which of the three
it reads; the others may be None. `pool` is anything that says which instances there are and of which source (`Pool`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Manifest, Workspace
from miniplm.errors import ArtifactMismatchError, RecipeError, ScoreError
from miniplm.packing.instances import Packed
from miniplm.scoring.base import Scores, encode_sources

VERSION = 1
_ROWS = "rows.parquet"


@dataclass(frozen=True)
class Pool:
    """The instances that are selected from.

    Attributes:
        fingerprint: of the packed part.
        source: `[N]` int32, codes into `sources`.
        sources: names of the domains, sorted.

    """

    fingerprint: str
    source: NDArray[np.int32]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def of(cls, instances: Scores | Packed) -> Pool:
        """The instances of a packed part, or those that some scores are of."""
        if isinstance(instances, Scores):
            return cls(instances.packed, instances.source, instances.sources)
        sources, codes = encode_sources(instances.dataset.data.column("source").to_pylist())
        return cls(instances.fingerprint, codes, sources)


@dataclass(frozen=True)
class Selection:
    """The rows that are kept.

    Attributes:
        rows: strictly increasing int64 row numbers of the pool.
        of: N, the instances of the pool.
        threshold: the smallest score that was kept; None where there is no single one.
        by_source: source -> (kept, in the pool).
        packed: fingerprint of the pool.

    """

    rows: NDArray[np.int64]
    of: int
    threshold: float | None
    by_source: Mapping[str, tuple[int, int]]
    packed: str

    def __len__(self) -> int:
        return len(self.rows)

    def check_of(self, packed: Packed) -> None:
        """Raise ArtifactMismatchError if the rows are those of other instances."""
        if self.packed != packed.fingerprint:
            raise ArtifactMismatchError(
                "the selection is of other instances.",
                facts={
                    "selection": f"packed {self.packed[:12]}  {self.of:,} instances",
                    "instances": f"packed {packed.fingerprint[:12]}  {len(packed):,} instances  {packed.path}",
                },
                remedy="Select from the scores of these instances.",
            )

    @classmethod
    def of_rows(cls, rows: NDArray[np.int64], pool: Pool, threshold: float | None = None) -> Selection:
        """A selection of these rows of the pool, in any order."""
        rows = np.sort(rows)
        kept = np.bincount(pool.source[rows], minlength=len(pool.sources))
        there = np.bincount(pool.source, minlength=len(pool.sources))
        by_source = {name: (int(kept[i]), int(there[i])) for i, name in enumerate(pool.sources)}
        return cls(rows, len(pool), threshold, by_source, pool.fingerprint)


class Sampler(Protocol):
    """Chooses instances."""

    needs: ClassVar[frozenset[str]]

    def select(
        self, teacher: Scores | None = None, reference: Scores | None = None, *, pool: Pool | None = None
    ) -> Selection:
        """The instances to keep. Raises ScoreError or ArtifactMismatchError if the scores cannot be used together."""


def keep_count(ratio: float, instances: int) -> int:
    """K = ⌊ratio · N⌋, at least 1.

    0.29 · 100 is 28.999999999999996 in floating point and 29 to the person who wrote it, so a product within 1e-9 of a
    whole number is that number. Raises RecipeError if the ratio is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise RecipeError("the sampling ratio is outside (0, 1].", facts={"found": ratio})
    product = ratio * instances
    nearest = round(product)
    return max(1, nearest if abs(product - nearest) < 1e-9 * max(1, instances) else floor(product))


def top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The rows of the k largest scores, in increasing order; of equal scores the lower rows. O(N).

    Raises:
        ScoreError: a score is NaN or infinite; the instance is named.

    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ScoreError(f"instance {bad[0]:,} has the score {scores[bad[0]]}.", remedy="Score it again in float32.")
    if k >= len(scores):
        return np.arange(len(scores), dtype=np.int64)
    boundary = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > boundary)
    ties = np.flatnonzero(scores == boundary)[: k - len(above)]
    rows: NDArray[np.int64] = np.sort(np.concatenate([above, ties])).astype(np.int64)
    return rows


def top_share(scores: NDArray[np.float64], ratio: float, pool: Pool, *, within_source: bool) -> Selection:
    """The top ⌊ratio·N⌋ of all instances, or the top share inside each source, to the same total.

    Inside sources, each gets ⌊ratio·n⌋ and the rest goes, one each, to the largest remainders (of equal ones, to the
    first name), so the corpus keeps its mixture of sources and the total is ⌊ratio·N⌋ exactly.
    """
    k = keep_count(ratio, len(scores))
    if not within_source:
        rows = top_k(scores, k)
        return Selection.of_rows(rows, pool, threshold=float(scores[rows].min()))
    chosen = []
    for code, quota in enumerate(quotas(ratio, np.bincount(pool.source, minlength=len(pool.sources)), k)):
        inside = np.flatnonzero(pool.source == code)
        if quota:
            chosen.append(inside[top_k(scores[inside], int(quota))])
    return Selection.of_rows(np.concatenate(chosen), pool)


def quotas(ratio: float, sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """How many of each group are taken so that they sum to `total`: largest remainders of ratio · size."""
    exact = ratio * sizes
    taken: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    for group in np.argsort(-(exact - taken), kind="stable"):
        if taken.sum() >= total:
            break
        taken[group] += taken[group] < sizes[group]
    return taken


def check_same_instances(teacher: Scores, reference: Scores) -> None:
    """Raise ArtifactMismatchError if the two were scored on different instances."""
    if teacher.packed != reference.packed or len(teacher) != len(reference):
        raise ArtifactMismatchError(
            "teacher and reference were scored on different instances.",
            facts={
                "teacher": f"{teacher.name}    packed {teacher.packed[:12]}  {len(teacher):,} instances",
                "reference": f"{reference.name}    packed {reference.packed[:12]}  {len(reference):,} instances",
            },
            remedy="Score both models on the same packed dataset.",
        )
    if teacher.tokenizer == reference.tokenizer and not np.array_equal(teacher.n_tokens, reference.n_tokens):
        raise ArtifactMismatchError(
            "teacher and reference counted different targets.",
            facts={"teacher": teacher.name, "reference": reference.name},
            remedy="Score both with the same `counted` rule.",
        )


def save(out: Path, what: Identity, selection: Selection) -> Manifest:
    """Write a selection as an artifact: `rows.parquet` with one column `row`; the rest is in the manifest."""

    def work(workspace: Workspace) -> Mapping[str, Any]:
        with workspace.part(_ROWS) as path:
            pq.write_table(pa.table({"row": selection.rows}), path, compression="zstd")
        return {
            "selected": len(selection),
            "of": selection.of,
            "threshold": selection.threshold,
            "packed": selection.packed,
            "by_source": {name: list(pair) for name, pair in selection.by_source.items()},
        }

    return artifact.make(out, what, work)


def open_selection(path: Path | str) -> Selection:
    """Open a selection on disk. Raises ArtifactError if it is not there, not finished or damaged."""
    manifest = artifact.read(path, kind="selection")
    counts = manifest.counts
    rows = pq.read_table(Path(path) / _ROWS)["row"].to_numpy()
    by_source = {name: (int(kept), int(there)) for name, (kept, there) in counts["by_source"].items()}
    return Selection(rows, counts["of"], counts["threshold"], by_source, counts["packed"])
