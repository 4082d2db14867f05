"""Whole documents as instances: what language-modelling loss is measured on (paper, section 3.1).

In: `Documents`, a tokenizer, T. Out: a packed part like any other whose instances are documents, not mixtures of them:
the first T+1 tokens of each (the paper's way; what is cut off is counted), or the whole of each in windows that overlap
by one token, so that every token but the first is predicted once. A document ends with the separator, which is
predicted too. Short ones are padded with it; `length` says how many tokens are there.

With `documents: n` the n with the smallest hash of id and seed are taken, in the order of the corpus: the same ones
however the files are cut. Memory: the chosen documents.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.corpus.sources import Document, Documents, Rejected
from miniplm.errors import CorpusError
from miniplm.packing.instances import TOKENIZER, Instances, Packed, dataset_files, open_packed, write_shard
from miniplm.packing.pack import token_dtype
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import progress
from miniplm.recipe import DocumentSetSettings

VERSION = 1
_SHARD_DOCUMENTS = 5_000


def identity(documents: str, tokenizer: str, sequence_length: int, settings: DocumentSetSettings) -> Identity:
    """What the packed documents are; `documents` is their fingerprint, `tokenizer` that of it or of what trains it."""
    recipe: dict[str, Any] = {"windows": settings.windows, "sequence_length": sequence_length}
    if settings.documents is not None:
        recipe |= {"documents": settings.documents, "seed": settings.seed}
    return Identity("packed", VERSION, recipe, {"documents": documents, "tokenizer": tokenizer})


def pack_documents(
    documents: Documents,
    tokenizer: Tokenizer,
    sequence_length: int,
    settings: DocumentSetSettings,
    out: Path,
    what: Identity,
) -> Packed:
    """Pack each document by itself into the artifact at `out`.

    Raises:
        CorpusError: a document cannot be read, or there is none.
        ArtifactError: `out` holds something else.

    """

    def work(workspace: Workspace) -> Mapping[str, Any]:
        if not workspace.has(TOKENIZER):
            with workspace.part(TOKENIZER) as folder:
                tokenizer.save(folder)
        counts = _pack(workspace, documents, tokenizer, sequence_length + 1, settings)
        shape = dataset_files(
            counts["shards"], sequence_length + 1, token_dtype(tokenizer.vocab_size), what.fingerprint
        )
        for name, content in shape.items():
            workspace.write_json(name, content)
        return counts

    artifact.make(out, what, work)
    return open_packed(out)


def _pack(
    work: Workspace, documents: Documents, tokenizer: Tokenizer, length: int, settings: DocumentSetSettings
) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    shards: list[str] = []
    with progress(f"pack {work.path.name.removesuffix('.partial')}", None, "doc") as meter:
        for batch in _batches(_chosen(documents, settings, rejected)):
            instances = _instances(batch, tokenizer, length, settings.windows == "all", counts)
            if not len(instances):
                continue
            shards.append(f"part-{len(shards):05d}.arrow")
            with work.part(shards[-1]) as path:
                write_shard(path, instances)
            sources.update(instances.source)
            meter.advance(len(batch))
    if not shards:
        facts = {"files": len(documents.files), **rejected, **counts}
        raise CorpusError("there are no documents to measure on.", facts=facts)
    return {
        "documents": counts["documents"],
        "empty": rejected["empty"] + counts["without tokens"],
        **{reason: rejected[reason] for reason in ("malformed", "undecodable")},
        "instances": sources.total(),
        "tokens_in": counts["tokens in"],
        "tokens_out": counts["tokens out"],
        "cut_tokens": counts["tokens cut"],
        "sources": dict(sorted(sources.items())),
        "shards": shards,
        "sequence_length": length - 1,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "tokenizer": tokenizer.fingerprint,
    }


def _chosen(documents: Documents, settings: DocumentSetSettings, rejected: Counter[str]) -> Iterator[Document]:
    """All documents, or those with the smallest hashes, in the order of the corpus."""
    every = _readable(documents, rejected)
    if settings.documents is None:
        yield from every
        return
    drawn: list[tuple[int, int, Document]] = []  # a heap whose first entry has the largest hash
    for number, document in enumerate(every):
        digest = hashlib.sha256(f"{settings.seed}\0{document.id}".encode("utf-8", "surrogatepass")).digest()
        entry = (-int.from_bytes(digest[:8], "big"), -number, document)
        if len(drawn) < settings.documents:
            heapq.heappush(drawn, entry)
        elif entry[:2] > drawn[0][:2]:
            heapq.heapreplace(drawn, entry)
    for _, _, document in sorted(drawn, key=lambda entry: -entry[1]):
        yield document


def _readable(documents: Documents, rejected: Counter[str]) -> Iterator[Document]:
    for group in range(len(documents.groups)):
        for record in documents.read(group):
            if isinstance(record, Rejected):
                rejected[record.reason] += 1
            else:
                yield record


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _SHARD_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _instances(
    batch: list[Document], tokenizer: Tokenizer, length: int, whole: bool, counts: Counter[str]
) -> Instances:
    pieces: list[NDArray[np.uint32]] = []
    of: list[Document] = []
    for document, ids in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
        if not len(ids):  # a normaliser left nothing of it
            counts["without tokens"] += 1
            continue
        tokens = np.append(ids, np.uint32(tokenizer.separator))
        starts = range(0, len(tokens) - 1, length - 1) if whole else range(1)
        windows = [tokens[start : start + length] for start in starts]
        counts["documents"] += 1
        counts["tokens in"] += len(tokens)
        counts["tokens out"] += sum(map(len, windows))
        counts["tokens cut"] += 0 if whole else max(0, len(tokens) - length)
        pieces += windows
        of += [document] * len(windows)
    ids_of = np.full((len(pieces), length), tokenizer.separator, token_dtype(tokenizer.vocab_size))
    sizes = np.array([len(piece) for piece in pieces], np.int32)
    ids_of[np.arange(length)[None, :] < sizes[:, None]] = np.concatenate([*pieces, np.array([], np.uint32)])
    return Instances(
        input_ids=ids_of,
        length=sizes,
        n_bytes=tokenizer.token_bytes[ids_of].sum(axis=1, dtype=np.int32),
        source=[document.source for document in of],
        documents=[[document.id] for document in of],
    )
