"""A random share of a packed part, as a packed part of its own.

In: a packed part, a share and a seed. Out: a folder like any other part (Arrow shards that `datasets.load_from_disk`
opens, the tokenizer beside them) and `rows.parquet`: the row of the pool that each sampled instance is. Instances are
drawn without replacement and stand in the order of the pool; their columns, lineage included, are what they were there.
Memory: one shard, and the row numbers. Killed and begun again, it goes on with the next shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.packing.instances import TOKENIZER, Packed, dataset_files, open_packed, read_shard, write_shard

VERSION = 1
ROWS = "rows.parquet"
_SHARD_TOKENS = 1 << 22  # of a shard, which is the unit of work and retry of whoever scores the sample
_STREAM = int.from_bytes(b"sample", "big")  # of random numbers: with equal seeds, no part of a `RandomSampling`


def identity(packed: str, share: float, seed: int) -> Identity:
    """What a sample is; `packed` is the fingerprint of what it is drawn from."""
    return Identity("packed", VERSION, {"share": share, "seed": seed}, {"packed": packed})


def sample(packed: Packed, out: Path, what: Identity) -> Packed:
    """Draw the share that `what` says of `packed` into the artifact at `out`.

    Raises:
        ArtifactError: `out` holds something else.
        StorageError: the disk is full.

    """
    artifact.make(out, what, lambda work: _sample(work, packed, what))
    return open_packed(out)


def drawn(instances: int, share: float, seed: int) -> NDArray[np.int64]:
    """The rows that are drawn of so many instances, increasing: `share` of them to the nearest, at least one."""
    count = min(instances, max(1, round(share * instances)))
    generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM]))
    rows: NDArray[np.int64] = np.sort(generator.choice(instances, count, replace=False, shuffle=False))
    return rows.astype(np.int64)


def pool_rows(sampled: Packed) -> NDArray[np.int64]:
    """The row of the pool that each instance of a sample is, `[N]`."""
    rows: NDArray[np.int64] = pq.read_table(sampled.path / ROWS)["row"].to_numpy()
    return rows


def _sample(work: Workspace, packed: Packed, what: Identity) -> Mapping[str, Any]:
    rows = drawn(len(packed), what.recipe["share"], what.recipe["seed"])
    if not work.has(TOKENIZER):
        with work.part(TOKENIZER) as folder:
            packed.tokenizer.save(folder)
    step = max(1, _SHARD_TOKENS // (packed.sequence_length + 1))
    shards = [f"part-{number:05d}.arrow" for number in range(-(-len(rows) // step))]
    for number, name in enumerate(shards):
        if not work.has(name):
            with work.part(name) as path:
                write_shard(path, packed.take(rows[number * step : (number + 1) * step]))
    with work.part(ROWS) as path:
        pq.write_table(pa.table({"row": rows}), path, compression="zstd")

    sources: Counter[str] = Counter()
    tokens = 0
    for name in shards:
        instances = read_shard(work.path / name)
        sources.update(instances.source)
        tokens += int(instances.length.sum(dtype=np.int64))
        width, dtype = instances.input_ids.shape[1], instances.input_ids.dtype
    for name, content in dataset_files(shards, width, dtype, what.fingerprint).items():
        work.write_json(name, content)
    there = packed.manifest.counts
    return {
        "of": len(packed),
        "tokens_of": there["tokens_out"],  # of the pool, as `tokens_out` is of the sample
        "tokens_out": tokens,
        "instances": len(rows),
        "sources": dict(sorted(sources.items())),
        "shards": shards,
        **{name: there[name] for name in ("sequence_length", "vocab_size", "separator", "tokenizer")},
    }
