"""Latent semantic analysis: texts to vectors by the words that they share, where no sentence encoder is at hand.

TF-IDF of words, (1 + ln count) · (1 + ln((1 + N) / (1 + N with the word))) at unit length, onto the first `DIMENSIONS`
singular vectors of all texts. Nothing is learnt from elsewhere: vectors mean something beside others of the same call
only, and two texts that say the same in other words are apart unless other texts of the call join them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.analysis.words import words

DIMENSIONS = 128


@dataclass(frozen=True)
class Lsa:
    """As an encoder is called; it fits the texts that it is given."""

    name: str = "tf-idf + lsa (no sentence encoder was given)"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """A vector for each text, `[N, D]`; D is `DIMENSIONS`, or the number of words where few texts or words are."""
        from scipy.sparse.linalg import svds

        weights = _tf_idf(texts)
        if min(weights.shape) <= DIMENSIONS + 1:  # nothing to leave out
            dense: NDArray[np.float64] = weights.toarray()
            return dense
        start = np.ones(min(weights.shape))  # of the iteration, which otherwise begins at random
        left, values, _ = svds(weights, k=DIMENSIONS, v0=start)
        projected: NDArray[np.float64] = left * values
        return projected


def _tf_idf(texts: Sequence[str]) -> Any:
    """A row of unit length for each text, a column for each different word: a scipy array `[N, W]`."""
    import scipy.sparse as sparse

    known: dict[str, int] = {}
    counts = [Counter(words(text)) for text in texts]
    rows = np.repeat(np.arange(len(texts)), [len(count) for count in counts])
    columns = np.array([known.setdefault(word, len(known)) for count in counts for word in count], np.int64)
    often = np.array([number for count in counts for number in count.values()], np.float64)
    having = np.bincount(columns, minlength=len(known))
    rare = 1 + np.log((1 + len(texts)) / (1 + having))
    weights = (1 + np.log(often)) * rare[columns]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=len(texts)))
    return sparse.csr_array((weights / lengths[rows], (rows, columns)), shape=(len(texts), max(1, len(known))))
