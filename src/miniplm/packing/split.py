"""Which part a document belongs to: reference, teacher, held out, or the pool.

In: a document's id and the `Split` settings. Out: the name of its part. The hash of the id and the seed decides, so
the answer depends on nothing else: not on the order of documents, on files, shards or workers. Documents of equal id
fall into the same part.
"""

from __future__ import annotations

import hashlib

from miniplm.recipe import Split

PARTS = ("reference", "teacher", "held_out", "pool")


def part_of(document_id: str, split: Split) -> str:
    """The part of the document with this id.

    The unit interval is laid out as held out, teacher, reference, pool from 0 upwards, so changing the reference's
    share moves no document into or out of the held-out part.
    """
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=split.seed.to_bytes(8, "big")).digest()
    position = int.from_bytes(digest, "big") / 2**64
    for part, share in (("held_out", split.held_out), ("teacher", split.teacher), ("reference", split.reference)):
        if position < share:
            return part
        position -= share
    return "pool"


def parts_in(split: Split) -> tuple[str, ...]:
    """The parts that get documents under these settings, in the order of `PARTS`."""
    return tuple(part for part in PARTS if part == "pool" or getattr(split, part) > 0)
