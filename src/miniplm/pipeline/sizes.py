"""How many instances and tokens a chain's data have: counted where they are there, else what the recipe lets expect.

Before a corpus is packed, how many tokens it has is a guess: one for each `_BYTES_PER_TOKEN` of its text; of a corpus
on the Hub, whose size nobody here knows, the pool is taken to be as large as the students need to see each instance
once, as the paper's is. Documents that are read whole are guessed by their files likewise. What follows from a guess is
marked `guessed`. Nothing here raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.artifact import Manifest
from miniplm.corpus.sources import open_documents
from miniplm.errors import MiniplmError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import packed_identity
from miniplm.packing.pack import token_dtype
from miniplm.packing.split import parts_in
from miniplm.pipeline.chain import Chain, Stage
from miniplm.recipe import CorpusSettings, Recipe, Split, TokenizerSettings, TrainSettings
from miniplm.sampling.base import keep_count
from miniplm.training.presets import PRESETS

_BYTES_PER_TOKEN = 4.0  # of text; assumed: 3.1 with a vocabulary of 4,096 on code, 4.4 with 152K on English
_COMPRESSION = 3.0  # of text in Parquet, zstd, gzip; assumed: 3.9 for the built-in corpus
_COMPRESSED = (".parquet", ".arrow", ".zst", ".gz", ".xz", ".bz2")
_LINEAGE_BYTES = 72  # of an instance on disk beside its ids, T = 256; measured


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed instances, there or to come.

    Attributes:
        length: T.
        instances: how many; None is not known.
        tokens: predicted ones.
        vocab_size: of the tokenizer.
        guessed: whether how many there are hangs on a guess.

    """

    length: int
    instances: int | None = None
    tokens: int | None = None
    vocab_size: int | None = None
    guessed: bool = False

    @classmethod
    def counted(cls, counts: Mapping[str, Any], of_all: Mapping[str, Any] | None = None) -> Rows:
        """What a manifest counted; what it leaves to the whole corpus is in `of_all`."""
        shared = of_all or counts
        instances = counts["instances"]
        return cls(shared["sequence_length"], instances, counts["tokens_out"] - instances, shared["vocab_size"])

    @classmethod
    def full(cls, length: int, instances: float | None, vocab_size: int | None, guessed: bool = True) -> Rows:
        """So many whole instances."""
        if instances is None:
            return cls(length, None, None, vocab_size, guessed)
        return cls(length, int(instances), int(instances) * length, vocab_size, guessed)

    def some(self, instances: int) -> Rows:
        """So many of these instances."""
        if self.instances is None or self.tokens is None:
            return self
        return dataclasses.replace(self, instances=instances, tokens=self.tokens * instances // self.instances)

    @property
    def disk_bytes(self) -> int | None:
        """Of the Arrow files that hold them."""
        if self.instances is None or self.vocab_size is None:
            return None
        return self.instances * ((self.length + 1) * token_dtype(self.vocab_size).itemsize + _LINEAGE_BYTES)


def done(stage: Stage) -> Manifest | None:
    """The manifest of a stage that is made, None of one that is not."""
    return artifact.finished(stage.path, stage.identity)


def rows_of(stages: Chain) -> dict[str, Rows]:
    """All packed instances of a chain, by fingerprint; selections of them too."""
    found: dict[str, Rows] = {}
    for name, stage in stages.items():
        kind, manifest = stage.identity.kind, done(stage)
        if kind == "corpus":
            for part, rows in _parts(stages.recipe, manifest).items():
                found[packed_identity(stage.identity.fingerprint, part).fingerprint] = rows
        elif kind == "packed":
            made = _made(stages.recipe, name, stage, found) if manifest is None else Rows.counted(manifest.counts)
            found[stage.identity.fingerprint] = made
        elif kind == "selection":
            pool = found[packed_identity(stages["prepare"].identity.fingerprint, "pool").fingerprint]
            kept = None if manifest is None else manifest.counts["selected"]
            if kept is None and pool.instances:
                kept = keep_count(stages.recipe.select[name.split("/")[1]].ratio, pool.instances)
            found[stage.identity.fingerprint] = pool if kept is None else pool.some(kept)
    return found


def assumption(recipe: Recipe) -> str:
    """What a guess of how large a corpus is rests on."""
    by_bytes = f"a token for every {_BYTES_PER_TOKEN:g} bytes of text"
    if recipe.corpus.hub is None:
        return by_bytes
    as_needed = "the pool is as large as its students need to see each instance once"
    whole = any(one.windows == "all" and one.files is not None for one in recipe.evaluate.documents.values())
    return f"{as_needed}; documents have {by_bytes}" if whole else as_needed


def text_bytes(corpus: CorpusSettings, block_bytes: int) -> float | None:
    """UTF-8 bytes of a corpus, guessed from its settings and files; None of one on the Hub."""
    if corpus.source is not None:
        return corpus.budget_bytes
    if corpus.files is None:
        return None
    try:
        documents = open_documents(corpus, block_bytes)
    except MiniplmError:  # whoever makes the chain is told
        return None
    sizes = ((name, documents.disk_bytes(name)) for name in documents.files)
    return sum(size * (_COMPRESSION if Path(name).suffix in _COMPRESSED else 1) for name, size in sizes) or None


def _parts(recipe: Recipe, manifest: Manifest | None) -> dict[str, Rows]:
    """The parts of the corpus by name."""
    split, length = recipe.prepare.split, recipe.prepare.sequence_length
    if manifest is not None:
        counts = manifest.counts
        return {part: Rows.counted(counts["parts"][part], counts) for part in parts_in(split)}
    tokens = _corpus_tokens(recipe)
    vocab_size = _vocab_size(recipe.prepare.tokenizer) or _published_vocab_size(recipe)
    return {
        part: Rows.full(length, None if tokens is None else tokens * _share(split, part) // (length + 1), vocab_size)
        for part in parts_in(split)
    }


def _share(split: Split, part: str) -> float:
    """Of the documents."""
    if part == "pool":
        return 1 - split.reference - split.teacher - split.held_out
    return float(getattr(split, part))


def _corpus_tokens(recipe: Recipe) -> float | None:
    """Tokens of the whole corpus, guessed."""
    if (there := text_bytes(recipe.corpus, recipe.prepare.block_bytes)) is not None:
        return there / _BYTES_PER_TOKEN
    needed = [
        student.tokens / _share_of_pool(recipe, student.data)
        for student in recipe.students.values()
        if student.tokens is not None
    ]
    length = recipe.prepare.sequence_length
    return max(needed) * (length + 1) / length / _share(recipe.prepare.split, "pool") if needed else None


def _share_of_pool(recipe: Recipe, data: str) -> float:
    """How much of the pool some data are, or are made of."""
    if data in recipe.select:
        return recipe.select[data].ratio
    made = recipe.generate.get(data) or recipe.retokenize.get(data)
    return 1.0 if made is None else _share_of_pool(recipe, made.data)


def _made(recipe: Recipe, name: str, stage: Stage, there: Mapping[str, Rows]) -> Rows:
    """What a stage will pack: a sample, what the teacher writes, other tokens of the same text, a set of documents."""
    group, _, last = name.partition("/")
    if group == "documents":
        documents, length = recipe.evaluate.documents[last], recipe.prepare.sequence_length
        vocab_size = _vocab_size(recipe.prepare.tokenizer)
        if documents.windows == "first":
            return Rows.full(length, documents.documents, vocab_size)  # at most: documents may be short
        n_bytes = text_bytes(documents, recipe.prepare.block_bytes)  # at most: not all of them may be drawn
        if n_bytes is None:
            return Rows.full(length, None, vocab_size)
        tokens = int(n_bytes / _BYTES_PER_TOKEN)
        return Rows(length, -(-tokens // length), tokens, vocab_size, guessed=True)
    before = there.get(stage.identity.inputs.get("data") or stage.identity.inputs["packed"])
    if before is None:
        return Rows(recipe.prepare.sequence_length, guessed=True)
    if group == "proxy":
        assert recipe.proxy is not None
        return before.some(max(1, round(recipe.proxy.share * (before.instances or 0))))
    if group == "generate":
        return before
    other = recipe.retokenize[last]
    length = other.sequence_length or before.length
    instances = None if before.tokens is None else before.tokens // length  # as many tokens: a guess
    return Rows.full(length, instances, _vocab_size(other.tokenizer))


def _vocab_size(settings: TokenizerSettings) -> int | None:
    """Of a tokenizer that is at hand, or that is yet to be trained; None of one that is out of reach."""
    if settings.train is not None:
        return settings.train.vocab_size
    with contextlib.suppress(MiniplmError):
        return tokenizers.from_settings(settings).vocab_size
    return None


def _published_vocab_size(recipe: Recipe) -> int | None:
    """Of the tokenizer that the reference's preset is meant for."""
    named = recipe.reference.preset if isinstance(recipe.reference, TrainSettings) else None
    return None if named is None else PRESETS[named].vocab_size
