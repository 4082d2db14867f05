"""The stage `prepare`: documents are split, tokenised and packed, in one pass over the data.

    documents ──group──► blocks of text ──hash of id──► parts ──tokenise──► streams per (part, source) ──cut──► shards
                                                                                     └─ what is left of a block ─┐
                                                              all blocks' remainders, in order, packed once more ◄┘

In: `Documents` and `PrepareSettings`. Out: a folder with one packed part each (`pool/`, `reference/`, ...) and
`tokenizer/`. A block is about `block_bytes` of text of one group of files: the unit of work, of retry and of commit.
Blocks know nothing of each other, so any worker may take any group, and the bytes are the same. Memory: one block, and
at the end what all blocks leave over (less than an instance for each block, part and source).

Promised, and counted in the manifest: every document is in exactly one part; tokens in = tokens out + leftovers.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.corpus.sources import Document, Documents, Rejected
from miniplm.engine.base import Advance, Engine
from miniplm.engine.local import LocalEngine
from miniplm.errors import ArtifactMissingError, CorpusError, CorpusTooSmallError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import (
    TOKENIZER,
    Instances,
    Packed,
    dataset_files,
    open_packed,
    packed_identity,
    write_shard,
)
from miniplm.packing.pack import SentenceEnds, Stream, concatenate, pack, token_dtype
from miniplm.packing.remainders import pack_remainders, read_ledgers, write_ledger
from miniplm.packing.split import part_of, parts_in
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import Meter, progress
from miniplm.recipe import PrepareSettings

VERSION = 1
_BATCH_BYTES = 1 << 20  # text handed to the Rust tokenizer's threads at once
_BLOCKS = "blocks"
_REMAINDERS = "remainders.arrow"


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. `reference`, `held_out` and `teacher` are there where the split gave them a share."""

    path: Path
    manifest: artifact.Manifest

    @property
    def pool(self) -> Packed:
        """What is scored and selected from."""
        return self.part("pool")

    @property
    def reference(self) -> Packed:
        """What the reference model is trained on."""
        return self.part("reference")

    @property
    def teacher(self) -> Packed:
        """What the teacher is trained on, where it is trained here."""
        return self.part("teacher")

    @property
    def held_out(self) -> Packed:
        """What models are measured on."""
        return self.part("held_out")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all parts."""
        return tokenizers.load(self.path / TOKENIZER)

    def part(self, name: str) -> Packed:
        """A part by name. Raises ArtifactMissingError if the split gave it no share."""
        if name not in (there := self.manifest.counts["parts"]):
            raise ArtifactMissingError(
                f"the corpus {self.path} has no part {name!r}.",
                facts={"parts": ", ".join(there)},
                remedy=f"Give it a share of the documents: split={{{name!r}: 0.05}}.",
            )
        return open_packed(self.path / name)


def identity(documents: str, settings: PrepareSettings) -> Identity:
    """What the prepared corpus is, of documents with this fingerprint; a given tokenizer enters by its vocabulary."""
    recipe = settings.model_dump(mode="json", exclude={"tokenizer": {"name", "revision"}})
    inputs = {"documents": documents}
    if settings.tokenizer.train is None:
        inputs["tokenizer"] = tokenizers.from_settings(settings.tokenizer).fingerprint
    return Identity("corpus", VERSION, recipe, inputs)


def prepare(documents: Documents, settings: PrepareSettings, out: Path, engine: Engine | None = None) -> Corpus:
    """Split, tokenise and pack `documents` into the artifact at `out`.

    Raises:
        CorpusError: a document cannot be read, or there is none.
        CorpusTooSmallError: a part has too little text for one instance.
        TokenizerError: the tokenizer cannot be loaded or trained.
        ArtifactError: `out` holds something else.

    """
    what = identity(documents.fingerprint, settings)
    manifest = artifact.make(out, what, lambda work: _prepare(work, what, documents, settings, engine or LocalEngine()))
    return Corpus(out, manifest)


def open_corpus(path: Path | str) -> Corpus:
    """Open a prepared corpus. Raises ArtifactError if it is not there, not finished or damaged."""
    return Corpus(Path(path), artifact.read(path, kind="corpus"))


def counts_table(counts: Mapping[str, Any]) -> list[str]:
    """What `prepare` counted, as lines: documents, tokens and instances of each part, and what was left out."""
    columns = ("documents", "tokens_in", "tokens_out", "leftover_tokens", "instances")
    lines = [f"{'part':<10}" + "".join(f"{name.replace('_', ' '):>17}" for name in columns)]
    for part, found in counts["parts"].items():
        lines.append(f"{part:<10}" + "".join(f"{found[name]:>17,}" for name in columns))
    left_out = ", ".join(f"{counts[reason]:,} {reason}" for reason in ("empty", "malformed", "undecodable"))
    return [*lines, f"left out: {left_out}"]


def _prepare(
    work: Workspace, what: Identity, documents: Documents, settings: PrepareSettings, engine: Engine
) -> Mapping[str, Any]:
    tokenizer = _tokenizer(work, documents, settings)
    total = sum(documents.disk_bytes(name) for name in documents.files)
    with progress("prepare", total or None, "B") as meter:
        make_worker = partial(_Worker, work, documents, settings)
        for _ in engine.run(make_worker, range(len(documents.groups)), meter.advance):
            pass
    counted, waiting = read_ledgers(work.path / _BLOCKS)
    if not counted["documents"]:
        raise _no_documents(documents, _rejected(counted))
    ends = SentenceEnds(tokenizer) if settings.cut == "sentence" else None
    remainders, tokens_left = pack_remainders(waiting, settings.sequence_length + 1, tokenizer, ends)
    for part, instances in remainders.items():
        with work.part(f"{part}/{_REMAINDERS}") as path:
            write_shard(path, instances)
    counts = _totals(work, counted, tokens_left, settings, tokenizer)
    _refuse_empty_parts(counts, settings)
    for part in parts_in(settings.split):
        _seal(work, packed_identity(what.fingerprint, part), part, counts["parts"][part], tokenizer, settings)
    work.remove(_BLOCKS)
    return counts


def _no_documents(documents: Documents, rejected: Mapping[str, int]) -> CorpusError:
    return CorpusError("the corpus has no documents.", facts={"files": len(documents.files), **rejected})


def _tokenizer(work: Workspace, documents: Documents, settings: PrepareSettings) -> Tokenizer:
    """The tokenizer, from the workspace if an earlier run put it there."""
    if not work.has(TOKENIZER):
        if (training := settings.tokenizer.train) is not None:
            with progress("train tokenizer", training.sample_bytes, "B") as meter:
                sample = _sample(documents, settings, meter)
                if (first := next(sample, None)) is None:
                    raise _no_documents(documents, {})
                made = tokenizers.train(itertools.chain((first,), sample), training.vocab_size)
        else:
            made = tokenizers.from_settings(settings.tokenizer)
        with work.part(TOKENIZER) as folder:
            made.save(folder)
    return tokenizers.load(work.path / TOKENIZER)


def _sample(documents: Documents, settings: PrepareSettings, meter: Meter) -> Iterator[str]:
    """Text to train the tokenizer on: the beginning of every file in equal measure, without held-out documents."""
    assert settings.tokenizer.train is not None
    left = settings.tokenizer.train.sample_bytes
    for position, name in enumerate(documents.files):
        share = left // (len(documents.files) - position)
        for document in documents.read_file(name):
            if share <= 0:
                break
            if isinstance(document, Rejected) or part_of(document.id, settings.split) == "held_out":
                continue
            size = len(document.text.encode())
            share -= size
            left -= size
            meter.advance(size)
            yield document.text


class _Worker:
    """Packs groups; the tokenizer is opened where the work is done."""

    def __init__(self, work: Workspace, documents: Documents, settings: PrepareSettings, advance: Advance) -> None:
        self.work, self.documents, self.settings, self.advance = work, documents, settings, advance
        self.tokenizer = tokenizers.load(work.path / TOKENIZER)
        self.ends = SentenceEnds(self.tokenizer) if settings.cut == "sentence" else None

    def __call__(self, group: int) -> None:
        """Pack every block of a group that is not there yet."""
        for number, block in enumerate(_blocks(self.documents.read(group, self.advance), self.settings.block_bytes)):
            name = f"{group:05d}-{number:05d}"
            if self.work.has(f"{_BLOCKS}/{name}.parquet"):
                for _ in block:  # read on to where the next block begins
                    pass
            else:
                self._pack_block(name, block)

    def _pack_block(self, name: str, block: Iterator[Document | Rejected]) -> None:
        tokenizer = self.tokenizer
        length = self.settings.sequence_length + 1
        streams: defaultdict[tuple[str, str], Stream] = defaultdict(Stream)
        whole: defaultdict[str, list[Instances]] = defaultdict(list)
        counts: Counter[str] = Counter()
        for batch in _batches(block, counts):
            touched = set()
            for document, ids in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
                part = part_of(document.id, self.settings.split)
                tokens = np.append(ids, np.uint32(tokenizer.separator))
                streams[part, document.source].add(document.id, tokens)
                touched.add((part, document.source))
                counts[f"documents in {part}"] += 1
                counts[f"tokens in {part}"] += len(tokens)
                counts[f"bytes in {part}"] += len(document.text.encode())
            for part, source in sorted(touched):
                if streams[part, source].waiting() >= length:
                    instances, streams[part, source] = pack(streams[part, source], source, length, tokenizer, self.ends)
                    whole[part].append(instances)
        for part, pieces in sorted(whole.items()):
            with self.work.part(f"{part}/part-{name}.arrow") as path:
                write_shard(path, concatenate(pieces))
            counts[f"instances in {part}"] = sum(len(p) for p in pieces)
            counts[f"tokens out {part}"] = sum(int(p.length.sum()) for p in pieces)
        with self.work.part(f"{_BLOCKS}/{name}.parquet") as path:  # last: it says that the block is done
            write_ledger(path, streams, counts)


def _blocks(records: Iterator[Document | Rejected], block_bytes: int) -> Iterator[Iterator[Document | Rejected]]:
    """Cut a stream of records into blocks of about `block_bytes` of text. Each block must be read before the next."""
    exhausted = False

    def block() -> Iterator[Document | Rejected]:
        nonlocal exhausted
        filled = 0
        for record in records:
            yield record
            filled += len(record.text.encode()) if isinstance(record, Document) else 0
            if filled >= block_bytes:
                return
        exhausted = True

    while not exhausted:
        yield block()


def _batches(block: Iterator[Document | Rejected], counts: Counter[str]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    waiting = 0
    for record in block:
        if isinstance(record, Rejected):
            counts[record.reason] += 1
            continue
        counts["documents"] += 1
        batch.append(record)
        waiting += len(record.text)
        if waiting >= _BATCH_BYTES:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _rejected(counts: Counter[str]) -> dict[str, int]:
    return {reason: counts[reason] for reason in ("empty", "malformed", "undecodable")}


def _totals(
    work: Workspace,
    total: Counter[str],
    tokens_left: Counter[str],
    settings: PrepareSettings,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    parts = {}
    for part in parts_in(settings.split):
        shards = sorted(p.name for p in (work.path / part).glob("*.arrow"))
        sources: Counter[str] = Counter()
        tokens = 0
        for shard in shards:
            with pa.memory_map(str(work.path / part / shard)) as file, pa.ipc.open_stream(file) as reader:
                table = reader.read_all()
            sources.update(table["source"].to_pylist())
            tokens += int(table["length"].to_numpy().sum())
        parts[part] = {
            "documents": total[f"documents in {part}"],
            "text_bytes": total[f"bytes in {part}"],
            "tokens_in": total[f"tokens in {part}"],
            "tokens_out": tokens,
            "leftover_tokens": tokens_left[part],
            "instances": sources.total(),
            "sources": dict(sorted(sources.items())),
            "shards": shards,
        }
        assert total[f"tokens in {part}"] == tokens + tokens_left[part], "tokens were lost"
    return {
        "documents": total["documents"],
        **_rejected(total),
        "sequence_length": settings.sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "tokenizer": tokenizer.fingerprint,
        "parts": parts,
    }


def _refuse_empty_parts(counts: Mapping[str, Any], settings: PrepareSettings) -> None:
    empty = [part for part, found in counts["parts"].items() if found["instances"] == 0]
    if empty:
        raise CorpusTooSmallError(
            f"the corpus is too small for this split: {', '.join(empty)} would be empty.",
            facts={
                f"tokens in {part}": f"{found['tokens_in']:,} of {found['documents']:,} documents"
                for part, found in counts["parts"].items()
            }
            | {"needed in each": f"{settings.sequence_length + 1:,} of one source (sequence_length + 1)"},
            remedy="Bring more text, give those parts a larger share, or lower prepare.sequence_length.",
        )


def _seal(
    work: Workspace,
    what: Identity,
    part: str,
    found: Mapping[str, Any],
    tokenizer: Tokenizer,
    settings: PrepareSettings,
) -> None:
    """Make a part a folder that `datasets.load_from_disk` opens and that is an artifact of its own."""
    files = dataset_files(
        found["shards"], settings.sequence_length + 1, token_dtype(tokenizer.vocab_size), what.fingerprint
    )
    for name, content in files.items():
        work.write_json(f"{part}/{name}", content)
    shape = {
        "sequence_length": settings.sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "tokenizer": tokenizer.fingerprint,
    }
    work.seal(part, what, {**found, **shape})
