"""The text of instances under another tokenizer.

In: instances' ids, the tokenizer that made them (byte-level) and the other one. Out: the other one's ids for the same
bytes, documents apart by its own separator.

Promised: the bytes are the same, or it is an error. A text may begin and end inside a character; such stray bytes
become the other tokenizer's tokens of single bytes. Text is encoded as it is: a byte-level tokenizer's normaliser (NFC
in Qwen's) is left out, and whatever else does not come back from decoding is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import TokenizerError
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import printable

_STRAY_BYTES = re.compile("([\udc80-\udcff]+)")  # as "surrogateescape" shows bytes that are no UTF-8


class Retokenizer:
    """From ids of one tokenizer to those of another. Called with instances, it gives the other's ids of each.

    Raises:
        TokenizerError: the first one is not byte-level.

    """

    def __init__(self, ours: Tokenizer, theirs: Tokenizer) -> None:
        self.spelling = ours.spelling
        self.separator = ours.separator
        self.mute = ours.unspeakable
        self.theirs = theirs.verbatim()

    def __call__(self, instances: Sequence[NDArray[Any]]) -> list[NDArray[np.uint32]]:
        """The other tokenizer's ids of each instance.

        Raises:
            TokenizerError: some text does not come back from the other tokenizer as it went in.

        """
        documents = [self.documents(ids) for ids in instances]
        encoded = iter(self.encode([text for texts in documents for text in texts]))
        separator = np.array([self.theirs.separator], np.uint32)
        joined = []
        for texts in documents:
            parts = [part for _ in texts for part in (separator, next(encoded))]
            joined.append(np.concatenate(parts[1:]))
        return joined

    def documents(self, ids: NDArray[Any]) -> list[bytes]:
        """The text between the separators of an instance: one piece more than it has separators, some perhaps empty.

        Raises:
            TokenizerError: it has a token that stands for no text and is no separator.

        """
        known = ids[ids < len(self.mute)]
        if len(known) < len(ids) or self.mute[known].any():
            strange = next(i for i in ids.tolist() if i >= len(self.mute) or self.mute[i])
            raise TokenizerError(
                "an instance has a special token that is no separator: there is no text for it.",
                facts={"id": strange},
            )
        pieces = np.split(ids, np.flatnonzero(ids == self.separator))
        return [b"".join([self.spelling[i] for i in piece.tolist()]) for piece in pieces]  # a separator is spelt b""

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """The other tokenizer's ids of each text, without separators.

        Raises:
            TokenizerError: some text does not come back as it went in.

        """
        split = [list(_runs(text)) for text in texts]
        encoded = iter(self._encode([run for runs in split for run in runs if isinstance(run, str)]))
        joined = []
        for runs in split:
            parts = [next(encoded) if isinstance(run, str) else self._byte_tokens(run) for run in runs]
            joined.append(np.concatenate(parts) if parts else np.zeros(0, np.uint32))
        return joined

    def _byte_tokens(self, stray: bytes) -> NDArray[np.uint32]:
        ids = [self.theirs.byte_ids[byte] for byte in stray]
        if None in ids:
            raise TokenizerError(
                "an instance begins or ends inside a character, and the tokenizer has no token for single bytes.",
                facts={"byte": f"0x{stray[ids.index(None)]:02X}"},
            )
        return np.array(ids, np.uint32)

    def _encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        encoded = self.theirs.encode(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if (back := self.theirs.decode(ids)) != text:
                raise TokenizerError(
                    "the tokenizer changes the text, so it cannot be used for it as it is.",
                    facts={"text": printable(text, 60), "comes back": printable(back, 60)},
                )
        return encoded


def _runs(text: bytes) -> Iterator[str | bytes]:
    """A text as strings and, between them, bytes that are no UTF-8."""
    for run in _STRAY_BYTES.split(text.decode("utf-8", errors="surrogateescape")):
        if run and "\udc80" <= run[0] <= "\udcff":
            yield run.encode("utf-8", errors="surrogateescape")
        elif run:
            yield run
