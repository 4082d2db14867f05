"""What blocks of work leave over: tokens that fill no instance, kept until all blocks are done, then packed once more.

A block writes a ledger: its remainders, and what it counted. Written last, it says that the block is done. Read in the
order of their names, the ledgers are the same whoever made them, in whatever order.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miniplm.packing.instances import Instances
from miniplm.packing.pack import SentenceEnds, Stream, concatenate, pack
from miniplm.packing.tokenizer import Tokenizer

Streams = Mapping[tuple[str, str], Stream]
"""(part, source) -> the tokens that wait."""


def write_ledger(path: Path, streams: Streams, counts: Mapping[str, int]) -> None:
    """Write a block's remainders (a row for each document that still has tokens) and, as metadata, its counts."""
    rows = [
        (part, source, document, tokens)
        for (part, source), stream in sorted(streams.items())
        for document, tokens in zip(stream.documents, stream.tokens, strict=True)
    ]
    schema = pa.schema(
        {"part": pa.string(), "source": pa.string(), "document": pa.string(), "tokens": pa.list_(pa.uint32())},
        metadata={"counts": json.dumps(counts, sort_keys=True)},
    )
    columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
    pq.write_table(
        pa.table([pa.array(column, f.type) for column, f in zip(columns, schema, strict=True)], schema=schema), path
    )


def read_ledgers(folder: Path) -> tuple[Counter[str], Streams]:
    """The sum of what the blocks counted, and what they left over, in the order of blocks."""
    counts: Counter[str] = Counter()
    streams: defaultdict[tuple[str, str], Stream] = defaultdict(Stream)
    for path in sorted(folder.glob("*.parquet")):
        ledger = pq.read_table(path)
        counts.update(json.loads(ledger.schema.metadata[b"counts"]))
        for row in ledger.to_pylist():
            streams[row["part"], row["source"]].add(row["document"], np.array(row["tokens"], np.uint32))
    return counts, streams


def pack_remainders(
    streams: Streams, length: int, tokenizer: Tokenizer, ends: SentenceEnds | None = None
) -> tuple[dict[str, Instances], Counter[str]]:
    """Pack what the blocks left over, source by source; arguments as of `pack`.

    Returns:
        The instances of each part that gets some, and the tokens of each part that are left even then.

    """
    whole: defaultdict[str, list[Instances]] = defaultdict(list)
    left: Counter[str] = Counter()
    for (part, source), stream in sorted(streams.items()):
        instances, rest = pack(stream, source, length, tokenizer, ends)
        left[part] += rest.waiting()
        if len(instances):
            whole[part].append(instances)
    return {part: concatenate(pieces) for part, pieces in whole.items()}, left
