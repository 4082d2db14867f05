"""The text of instances under another tokenizer.

In: instances' ids, the tokenizer that made them (byte-level) and the other one. Out: the other one's ids for the same
bytes, documents apart by its own separator.

Promised: the bytes are the same, or it is an error. An instance may begin and end inside a character; such stray bytes
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
    """From ids of one tokenizer to those of another.

    Raises:
        TokenizerError: the first one is not byte-level.

    """

    def __init__(self, ours: Tokenizer, theirs: Tokenizer) -> None:
        self.spelling = ours.spelling
        self.separator = ours.separator
        special = {i for i, token in ours.backend.get_added_tokens_decoder().items() if token.special}
        self.unspeakable = np.array(sorted(special - {ours.separator}), np.int64)
        self.theirs = theirs.verbatim()

    def __call__(self, instances: Sequence[NDArray[Any]]) -> list[NDArray[np.uint32]]:
        """The other tokenizer's ids of each instance.

        Raises:
            TokenizerError: some text does not come back from the other tokenizer as it went in.

        """
        pieces = [self._pieces(ids) for ids in instances]
        texts = [text for instance in pieces for text in instance if isinstance(text, str)]
        encoded = iter(self._encode(texts))
        joined = []
        for instance in pieces:
            parts = [next(encoded) if isinstance(piece, str) else piece for piece in instance]
            joined.append(np.concatenate(parts) if parts else np.zeros(0, np.uint32))
        return joined

    def _pieces(self, ids: NDArray[Any]) -> list[str | NDArray[np.uint32]]:
        """An instance as texts and, between them, ids that are known already: separators and stray bytes."""
        pieces: list[str | NDArray[np.uint32]] = []
        if len(strange := np.intersect1d(ids, self.unspeakable)):
            raise TokenizerError(
                "an instance has a special token that is no separator: there is no text for it.",
                facts={"id": int(strange[0])},
            )
        ends = np.flatnonzero(ids == self.separator)
        for number, document in enumerate(np.split(ids, ends)):
            if number:
                document = document[1:]
                pieces.append(np.array([self.theirs.separator], np.uint32))
            pieces += self._document(b"".join(self.spelling[i] for i in document.tolist()))
        return pieces

    def _document(self, text: bytes) -> Iterator[str | NDArray[np.uint32]]:
        for run in _STRAY_BYTES.split(text.decode("utf-8", errors="surrogateescape")):
            if run and "\udc80" <= run[0] <= "\udcff":
                yield self._byte_tokens(run.encode("utf-8", errors="surrogateescape"))
            elif run:
                yield run

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
                    "the model's tokenizer changes the text, so it cannot score it as it is.",
                    facts={"text": printable(text, 60), "comes back": printable(back, 60)},
                )
        return encoded
