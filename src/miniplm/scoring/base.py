"""What a scorer is, and what scores are.

`Scores` on disk: a folder of Parquet files, one for each shard of the packed instances and in their order; columns
`instance` (row of the packed part), `logp`, `n_tokens`, `n_bytes`, `source`. Sums and counts are stored; means are
derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.errors import ArtifactDamagedError, ArtifactMismatchError, ScoreError

Normalize = Literal["token", "sum", "byte"]


class Scorer(Protocol):
    """A model that says how likely a text is to it.

    What a scorer may have besides, each looked at only if it is there:
        vocab_size      embeddings; an error if the instances have larger ids
        config          of the model (`max_position_embeddings`); an error if the instances are longer
        tokenizer       its own `Tokenizer`; needed for `tokenizer: own`, otherwise compared with that of the instances
        name            what provenance calls it
        flops_per_token `(sequence_length) -> float`, operations per token, and
        ceiling         `() -> float`, operations per second that the device is able to do
        submit          `(tokens, counted) -> Pending`: as `score`, without waiting for the answer, and
        in_flight       how many answers may be waited for at a time
        token_budget    tokens that it takes at a time, padding included, unless `compute` says how many
        expect          `(tokenizer) -> None`: told of the instances' tokenizer, if it has none of its own
        most_rows       the rows that it takes at a time
        costly          True if answers are worth a journal on the disk

    """

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Log p in nats, summed in float64 over the counted targets: `[B]` for `tokens [B, T+1]`, `counted [B, T]`."""


class Pending(Protocol):
    """An answer that is on its way. One with `done() -> bool` is taken as soon as it is there, out of turn."""

    def result(self) -> NDArray[np.float64]:
        """Wait for it: log p, `[B]`, as `Scorer.score` gives it."""


@dataclass(frozen=True)
class Scores:
    """The scores of N instances.

    Attributes:
        logp: `[N]` float64, nats, summed over counted targets.
        n_tokens: `[N]` int32, counted targets.
        n_bytes: `[N]` int32, UTF-8 bytes of the counted targets.
        source: `[N]`, the domain of each instance, as codes into `sources`.
        sources: the names of the domains, sorted.
        packed: fingerprint of the instances.
        tokenizer: fingerprint of the tokenizer whose tokens were scored.
        fingerprint: of these scores.
        name: what messages call them (their folder).

    """

    logp: NDArray[np.float64]
    n_tokens: NDArray[np.int32]
    n_bytes: NDArray[np.int32]
    source: NDArray[np.int32]
    sources: tuple[str, ...]
    packed: str
    tokenizer: str = ""
    fingerprint: str = ""
    name: str = "scores"

    def __post_init__(self) -> None:
        bad = np.flatnonzero(~np.isfinite(self.logp))
        if len(bad):
            raise ScoreError(
                f"{self.name} has {len(bad):,} scores that are no numbers.",
                facts={"first": f"instance {bad[0]:,}: log p = {self.logp[bad[0]]}"},
                remedy="Score it again in float32 or bfloat16; float16 overflows on models trained in bfloat16.",
            )
        if len(self.n_tokens) and self.n_tokens.min() <= 0:
            first = int(np.argmin(self.n_tokens))
            raise ScoreError(f"{self.name}: instance {first:,} has {self.n_tokens[first]} counted tokens.")

    def __len__(self) -> int:
        return len(self.logp)

    def per(self, normalize: Normalize) -> NDArray[np.float64]:
        """Log p per counted token, per byte, or as the sum: `[N]`."""
        if normalize == "sum":
            return self.logp
        return self.logp / (self.n_tokens if normalize == "token" else np.maximum(self.n_bytes, 1))

    @cached_property
    def source_names(self) -> NDArray[np.str_]:
        """The domain of each instance by name, `[N]`."""
        return np.asarray(self.sources)[self.source]


def open_scores(path: Path | str, kind: str = "scores") -> Scores:
    """Open scores on disk.

    Args:
        path: the artifact.
        kind: `scores`, or `evaluation`, which holds the scores of the held-out instances.

    Raises:
        ArtifactError: they are not there, not finished, or damaged.
        ScoreError: a score is NaN or infinite.

    """
    manifest = artifact.read(path, kind=kind)
    if (tokenizer := manifest.counts.get("tokenizer")) is None:
        raise ArtifactMismatchError(
            f"{path} was made by an earlier version.",
            facts={"found": f"version {manifest.identity.version}", "expected": "scores that name their tokenizer"},
            remedy="Score again.",
        )
    return read_parts(Path(path), manifest.identity.inputs["packed"], tokenizer, manifest.fingerprint)


def read_parts(folder: Path, packed: str, tokenizer: str, fingerprint: str = "") -> Scores:
    """The scores in a folder's `part-*.parquet`, of the instances with the fingerprint `packed`.

    Raises:
        ArtifactDamagedError: a file cannot be read.
        ScoreError: an instance is missing, or a score is NaN or infinite.

    """
    try:
        table = pa.concat_tables(
            [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
        ).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactDamagedError(
            f"the scores in {folder} cannot be read.",
            facts={"because": str(error).splitlines()[0]},
            remedy="`miniplm verify` names the file; remove the artifact and run the same command again.",
        ) from error
    rows = table["instance"].to_numpy()
    if not np.array_equal(rows, np.arange(len(rows))):
        raise ScoreError(f"{folder}: the instances are not 0 to {len(rows) - 1:,}, each once and in order.")
    names, codes = encode_sources(table["source"].to_pylist())
    return Scores(
        logp=table["logp"].to_numpy(),
        n_tokens=table["n_tokens"].to_numpy(),
        n_bytes=table["n_bytes"].to_numpy(),
        source=codes,
        sources=names,
        packed=packed,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        name=str(folder),
    )


def throughput(provenance: Mapping[str, Any]) -> str:
    """How fast scores were made, as `, 5,120 tokens/s, 480 GFLOP/s, 53% of ...`; nothing where it is not known."""
    if "tokens_per_s" not in provenance:
        return ""
    said = f", {provenance['tokens_per_s']:,} tokens/s"
    if "share_of_matmul_rate" in provenance:
        said += f", {provenance['flops_per_s'] / 1e9:,.0f} GFLOP/s"
        said += f", {provenance['share_of_matmul_rate']:.0%} of this machine's matrix products"
    return said


def encode_sources(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The sorted distinct names, and each name as a code into them."""
    distinct = tuple(sorted(set(names)))
    index = {name: code for code, name in enumerate(distinct)}
    return distinct, np.fromiter((index[name] for name in names), np.int32, len(names))
