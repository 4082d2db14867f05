"""Packing: a stream of tokenised documents becomes instances of `length` = T+1 tokens.

In: `Stream`s of tokens, one for each part and source, every document followed by the separator. Out: whole `Instances`
and what is left of each stream (fewer than T+1 tokens). Nothing is lost: tokens in = tokens out + tokens left.

Two ways to cut. `exact` takes T+1 tokens at a time. `sentence` cuts after the last separator, line end or sentence
end of those T+1 tokens, as the paper's code does, and pads; but never in the first half of them, because the paper's
rule makes instances of two tokens there, whose scores are noise (paper.md section 9.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.packing.instances import Instances
from miniplm.packing.tokenizer import Tokenizer

_SENTENCE_ENDS = frozenset(".!?;。！？；")
_BRACKETS = {"(": ")", "[": "]", "{": "}", "（": "）", "「": "」"}


@dataclass
class Stream:
    """Tokens of one part and source that wait to be packed.

    Attributes:
        documents: ids of the documents, in order.
        tokens: the tokens of each that are still waiting, separator included.

    """

    documents: list[str] = field(default_factory=list)
    tokens: list[NDArray[np.uint32]] = field(default_factory=list)

    def add(self, document: str, tokens: NDArray[np.uint32]) -> None:
        """Append a document's tokens."""
        self.documents.append(document)
        self.tokens.append(tokens)

    def waiting(self) -> int:
        """Tokens that wait."""
        return sum(len(tokens) for tokens in self.tokens)


class SentenceEnds:
    """Where a stream of tokens may be cut: tables over the vocabulary, `[V]` each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        self.line = np.zeros(size, np.bool_)
        self.sentence = np.zeros(size, np.bool_)
        self.space = np.zeros(size, np.bool_)
        for i in range(size):
            text = tokenizer.decode([i])
            self.line[i] = "\n" in text
            self.space[i] = " " in text
            self.sentence[i] = bool(_SENTENCE_ENDS & set(text)) and _balanced(text)
        self.line[tokenizer.separator] = True

    def last_cut(self, window: NDArray[np.uint32]) -> int:
        """How many tokens of the window come before the cut; all of them if there is no place in its second half.

        A sentence end is real if a space is in it or in the token after it (so that `3.14` is not cut).
        """
        spaced = self.space[window]
        after = np.append(spaced[1:], True)
        allowed = self.line[window] | (self.sentence[window] & (spaced | after))
        allowed[: len(window) // 2] = False
        places = np.flatnonzero(allowed)
        return int(places[-1]) + 1 if len(places) else len(window)


def pack(
    stream: Stream,
    source: str,
    length: int,
    tokenizer: Tokenizer,
    ends: SentenceEnds | None = None,
) -> tuple[Instances, Stream]:
    """Cut all whole instances from the stream.

    Args:
        stream: the waiting tokens.
        source: the domain of all of them.
        length: T+1, tokens of an instance.
        tokenizer: for the separator, the bytes of a token and the size of the vocabulary.
        ends: where cuts may be; None cuts exactly.

    Returns:
        The instances, and the stream that is left; the last document in an instance may also be the first of what is
        left.

    """
    tokens = np.concatenate(stream.tokens) if stream.tokens else np.empty(0, np.uint32)
    edges = _exact_edges(len(tokens), length) if ends is None else _sentence_edges(tokens, length, ends)
    sizes = np.diff(edges)
    ids = np.full((len(sizes), length), tokenizer.separator, token_dtype(tokenizer.vocab_size))
    ids[np.arange(length)[None, :] < sizes[:, None]] = tokens[: edges[-1]]
    document_ends = np.cumsum([len(t) for t in stream.tokens]) if stream.tokens else np.empty(0, np.int64)
    first = np.searchsorted(document_ends, edges[:-1], side="right")
    last = np.searchsorted(document_ends, edges[1:], side="left")
    instances = Instances(
        input_ids=ids,
        length=sizes.astype(np.int32),
        n_bytes=tokenizer.token_bytes[ids].sum(axis=1, dtype=np.int32),
        source=[source] * len(sizes),
        documents=[stream.documents[a : b + 1] for a, b in zip(first, last, strict=True)],
    )
    return instances, _rest(stream, document_ends, int(edges[-1]))


def concatenate(parts: Sequence[Instances]) -> Instances:
    """Instances one after the other; there must be at least one part."""
    return Instances(
        input_ids=np.concatenate([p.input_ids for p in parts]),
        length=np.concatenate([p.length for p in parts]),
        n_bytes=np.concatenate([p.n_bytes for p in parts]),
        source=[s for p in parts for s in p.source],
        documents=[d for p in parts for d in p.documents],
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _exact_edges(waiting: int, length: int) -> NDArray[np.int64]:
    return np.arange(0, waiting // length * length + 1, length, dtype=np.int64)


def _sentence_edges(tokens: NDArray[np.uint32], length: int, ends: SentenceEnds) -> NDArray[np.int64]:
    edges = [0]
    while len(tokens) - edges[-1] >= length:
        edges.append(edges[-1] + ends.last_cut(tokens[edges[-1] : edges[-1] + length]))
    return np.array(edges, np.int64)


def _rest(stream: Stream, document_ends: NDArray[np.int64], taken: int) -> Stream:
    first = int(np.searchsorted(document_ends, taken, side="right"))
    tokens = stream.tokens[first:]
    if tokens:
        begun = taken - (int(document_ends[first]) - len(tokens[0]))
        tokens[0] = tokens[0][begun:]
    return Stream(stream.documents[first:], tokens)


def _balanced(text: str) -> bool:
    return all(text.count(opening) <= text.count(closing) for opening, closing in _BRACKETS.items())
