"""The stage `retokenize`: the text of chosen instances, packed again under another tokenizer.

    rows ──shard──► pieces of documents, as bytes ──other tokenizer──► streams per source ──cut──► shards
                                                                           └─ what is left of a shard ─┐
                                                    all shards' remainders, in order, packed once more ◄┘

In: a packed part, the rows to take of it, another tokenizer. Out: a packed part like any other, that tokenizer beside
it. A shard of the part is the unit of work, of retry and of commit; any worker may take any shard, and the bytes are
the same. Memory: one shard, and at the end what all shards leave over (less than an instance for each and source).

What a piece is. The chosen instances, in order, are the text. A document that lies in several of them is one piece as
far as they follow each other (no other instance of the source between): no token must end where an instance happened
to. Every piece ends with the new separator, also one that the end of an instance cut off: what comes next is other
text, and a student must not learn that the one goes on as the other. A student thus sees some documents end early, as
many as `cut_pieces` says. A piece without text (an instance may begin with the separator of the document before) is
left out. `documents` of an instance names one document for each piece in it.

Promised, and counted in the manifest: the bytes of each piece are those that were there, `bytes_in` = `bytes_out`;
`tokens_in` (the new ones, separators among them) = `tokens_out` + `leftover_tokens`. Nothing is cut short or padded.
The reference code maps instances one to one, drops what is too long and pads what is too short, untold (paper.md
section 2.5). Not covered: a token for the beginning of a text, which none of our instances has.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.engine.base import Advance, Engine
from miniplm.engine.local import LocalEngine
from miniplm.errors import CorpusTooSmallError, RecipeError, TokenizerError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import (
    TOKENIZER,
    Instances,
    Packed,
    dataset_files,
    open_packed,
    read_shard,
    shard_rows,
    write_shard,
)
from miniplm.packing.pack import Stream, concatenate, pack, token_dtype
from miniplm.packing.remainders import pack_remainders, read_ledgers, write_ledger
from miniplm.packing.retokenize import Retokenizer
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import progress
from miniplm.recipe import RetokenizeSettings

VERSION = 1
_BATCH_BYTES = 1 << 20  # text handed to the Rust tokenizer's threads at once
_LEDGERS = "blocks"
_REMAINDERS = "remainders.arrow"
_PART = "text"  # the only one, where `prepare` has several


def identity(settings: RetokenizeSettings, tokenizer_fingerprint: str, inputs: Mapping[str, str]) -> Identity:
    """What retokenised instances are; `inputs` are the fingerprints of the instances and of what chose among them."""
    recipe = {"sequence_length": settings.sequence_length}
    return Identity("packed", VERSION, recipe, {**inputs, "tokenizer": tokenizer_fingerprint})


def retokenize(
    packed: Packed,
    rows: NDArray[np.int64] | None,
    tokenizer: Tokenizer,
    settings: RetokenizeSettings,
    out: Path,
    what: Identity,
    engine: Engine | None = None,
) -> Packed:
    """Pack the text of some instances again, under another tokenizer, into the artifact at `out`.

    Args:
        packed: the instances.
        rows: strictly increasing row numbers; None takes all.
        tokenizer: the other one.
        settings: its `sequence_length`; None makes instances as long as they are.
        out: the artifact.
        what: its identity, from `identity`.
        engine: what runs the shards.

    Raises:
        RecipeError: `rows` are no rows of the instances, or not in order.
        TokenizerError: the text cannot be told from the ids, or does not come back from the other tokenizer.
        CorpusTooSmallError: the text does not fill one instance.
        ArtifactError: `out` holds something else.
        StorageError: the disk is full.

    """
    chosen = np.arange(len(packed), dtype=np.int64) if rows is None else _checked(rows, len(packed))
    length = (settings.sequence_length or packed.sequence_length) + 1

    def work(workspace: Workspace) -> Mapping[str, Any]:
        counts = _retokenize(workspace, packed, chosen, tokenizer, length, engine or LocalEngine())
        dtype = token_dtype(tokenizer.vocab_size)
        for name, content in dataset_files(counts["shards"], length, dtype, what.fingerprint).items():
            workspace.write_json(name, content)
        workspace.remove(_LEDGERS)
        return counts

    artifact.make(out, what, work)
    return open_packed(out)


def _checked(rows: NDArray[np.int64], instances: int) -> NDArray[np.int64]:
    within = len(rows) and rows[0] >= 0 and rows[-1] < instances
    if not within or (np.diff(rows) <= 0).any():
        raise RecipeError(
            "these are no strictly increasing rows of the instances.",
            facts={"rows": f"{len(rows):,}", "instances": f"{instances:,}"},
            remedy="Take the rows of a selection of these instances.",
        )
    return rows


def _retokenize(
    work: Workspace, packed: Packed, rows: NDArray[np.int64], tokenizer: Tokenizer, length: int, engine: Engine
) -> Mapping[str, Any]:
    if not work.has(TOKENIZER):
        with work.part(TOKENIZER) as folder:
            tokenizer.save(folder)
    tasks = list(_tasks(packed, rows))
    waiting = [task for task in tasks if not work.has(task.ledger)]
    tokens = packed.manifest.counts["tokens_out"] * len(rows) // len(packed)
    with progress(f"retokenize {work.path.name.removesuffix('.partial')}", tokens, "tok") as meter:
        meter.skip(tokens * (len(rows) - sum(len(task.rows) for task in waiting)) // len(rows))
        if waiting:
            for _ in engine.run(partial(_Worker, work.path, packed, length), waiting, meter.advance):
                pass
    total, streams = read_ledgers(work.path / _LEDGERS)
    remainders, left = pack_remainders(streams, length, tokenizer)
    if _PART in remainders:
        with work.part(_REMAINDERS) as path:
            write_shard(path, remainders[_PART])
        total.update(_counted(remainders[_PART]))
    return _counts(work, packed, len(rows), total, left[_PART], tokenizer, length)


def _counts(
    work: Workspace, packed: Packed, taken: int, total: Counter[str], left: int, tokenizer: Tokenizer, length: int
) -> dict[str, Any]:
    assert total["tokens in"] == total["tokens out"] + left, "tokens were lost"
    if total["bytes in"] != total["bytes out"]:
        raise TokenizerError(
            "the text is not what it was.",
            facts={"bytes in": f"{total['bytes in']:,}", "bytes out": f"{total['bytes out']:,}"},
        )
    if not total["instances"]:
        raise CorpusTooSmallError(
            "the chosen text is too short for one instance.",
            facts={"tokens": f"{left:,}", "needed": f"{length:,} of one source (sequence_length + 1)"},
            remedy="Choose more instances, or lower sequence_length.",
        )
    prefix = "source "
    return {
        "of": len(packed),
        "instances_in": taken,
        **{name: total[name.replace("_", " ")] for name in ("pieces", "joined_instances", "cut_pieces")},
        **{name: total[name.replace("_", " ")] for name in ("bytes_in", "bytes_out", "tokens_in", "tokens_out")},
        "leftover_tokens": left,
        "instances": total["instances"],
        "sources": {name.removeprefix(prefix): total[name] for name in sorted(total) if name.startswith(prefix)},
        "shards": sorted(path.name for path in work.path.glob("*.arrow")),
        "sequence_length": length - 1,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "tokenizer": tokenizer.fingerprint,
    }


@dataclass(frozen=True, slots=True)
class _Task:
    """A shard; `rows` are counted from its first."""

    name: str
    shard: Path
    rows: NDArray[np.int64]

    @property
    def ledger(self) -> str:
        return f"{_LEDGERS}/{self.name}.parquet"


def _tasks(packed: Packed, rows: NDArray[np.int64]) -> Iterator[_Task]:
    """The shards that some rows are in."""
    first = 0
    for number, shard in enumerate(packed.shards):
        end = first + shard_rows(shard)
        begin, stop = np.searchsorted(rows, [first, end])
        if begin < stop:
            yield _Task(f"{number:05d}", shard, rows[begin:stop] - first)
        first = end


@dataclass(slots=True)
class _Piece:
    """A stretch of a document: its text, instance by instance, and whether an instance's end cut it off."""

    source: str
    document: str
    parts: list[bytes]
    cut: bool = False


class _Worker:
    """Packs shards anew; the tokenizers are opened where the work is done."""

    def __init__(self, folder: Path, packed: Packed, length: int, advance: Advance) -> None:
        self.work, self.length, self.advance = Workspace(folder), length, advance
        self.tokenizer = tokenizers.load(folder / TOKENIZER)
        self.retokenizer = Retokenizer(packed.tokenizer, self.tokenizer)
        self.flows = _flows(packed)

    def __call__(self, task: _Task) -> None:
        """Pack the chosen rows of a shard, and commit them."""
        streams: defaultdict[tuple[str, str], Stream] = defaultdict(Stream)
        whole: list[Instances] = []
        counts: Counter[str] = Counter()
        separator = np.uint32(self.tokenizer.separator)
        for batch in _batches(self._pieces(read_shard(task.shard), task.rows, counts)):
            texts = [b"".join(piece.parts) for piece in batch]
            for piece, text, ids in zip(batch, texts, self.retokenizer.encode(texts), strict=True):
                streams[_PART, piece.source].add(piece.document, np.append(ids, separator))
                counts["pieces"] += 1
                counts["cut pieces"] += piece.cut
                counts["bytes in"] += len(text)
                counts["bytes out"] += self._bytes(text, ids)
                counts["tokens in"] += len(ids) + 1
            for source in sorted({piece.source for piece in batch}):
                if streams[_PART, source].waiting() >= self.length:
                    made, streams[_PART, source] = pack(
                        streams[_PART, source], source, self.length, self.tokenizer, None
                    )
                    whole.append(made)
        if whole:
            instances = concatenate(whole)
            with self.work.part(f"part-{task.name}.arrow") as path:
                write_shard(path, instances)
            counts.update(_counted(instances))
        with self.work.part(task.ledger) as path:  # last: it says that the shard is done
            write_ledger(path, streams, counts)

    def _pieces(self, instances: Instances, rows: NDArray[np.int64], counts: Counter[str]) -> Iterator[_Piece]:
        """The pieces of documents of the chosen rows, in the order in which they end."""
        chosen = np.zeros(len(instances), np.bool_)
        chosen[rows] = True
        unfinished: dict[str, _Piece] = {}  # of a source, if its last instance ends inside a document
        for row, (source, documents) in enumerate(zip(instances.source, instances.documents, strict=True)):
            begun = unfinished.pop(source, None)
            if not chosen[row]:
                if begun is not None:
                    yield begun
                continue
            ids = instances.input_ids[row, : instances.length[row]]
            texts = self.retokenizer.documents(ids)
            if ids[-1] == self.retokenizer.separator:
                texts.pop()  # nothing comes after it
            for number, text in enumerate(texts):
                # what a teacher wrote may have more pieces than the documents it was made of
                document = documents[min(number, len(documents) - 1)]
                if begun is not None and self.flows and begun.document == document:
                    begun.parts.append(text)
                    begun.cut = False
                    piece = begun
                    counts["joined instances"] += 1
                else:
                    if begun is not None:
                        yield begun
                    piece = _Piece(source, document, [text])
                begun = None
                if number < len(texts) - 1 or ids[-1] == self.retokenizer.separator:
                    yield piece
                else:
                    piece.cut = True
                    unfinished[source] = piece
            self.advance(len(ids))
        yield from (unfinished[source] for source in sorted(unfinished))

    def _bytes(self, text: bytes, ids: NDArray[np.uint32]) -> int:
        """Bytes that the new ids stand for, once it is sure that they are those of the text.

        Where tokens do not spell their bytes, the retokenizer has seen that they decode to it, and that must do.
        """
        theirs = self.retokenizer.theirs
        if not theirs.byte_level:
            return len(text)
        back = b"".join([theirs.spelling[i] for i in ids.tolist()])
        if back != text:
            raise TokenizerError(
                "the text is not what it was.", facts={"bytes in": f"{len(text):,}", "bytes out": f"{len(back):,}"}
            )
        return len(back)


def _flows(packed: Packed) -> bool:
    """Whether an instance goes on where the one before it of its source ended.

    So it is where a text was cut: in a part of a prepared corpus, and in what this stage made. In a sample of rows, or
    where a teacher has written the ends, the next instance is other text, though it may be of the same document.
    """
    return set(packed.manifest.identity.recipe) in ({"part"}, {"sequence_length"})


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces with text, about `_BATCH_BYTES` at a time."""
    batch: list[_Piece] = []
    waiting = 0
    for piece in pieces:
        if size := sum(map(len, piece.parts)):
            batch.append(piece)
            waiting += size
        if waiting >= _BATCH_BYTES:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _counted(instances: Instances) -> Counter[str]:
    """What there is of a shard's instances to count."""
    counts = Counter({"instances": len(instances), "tokens out": int(instances.length.sum(dtype=np.int64))})
    counts.update(f"source {source}" for source in instances.source)
    return counts
