"""A scorer of your own: anything with `score(tokens, counted) -> logp` and a `fingerprint`.

    python examples/own_scorer.py runs/quickstart/corpus-* /tmp/unigram-scores

This one is a unigram model of the reference part: no GPU, no torch.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

import miniplm


class Unigram:
    """log p of a token is the log of its (smoothed) share of a packed part."""

    def __init__(self, packed: miniplm.Packed) -> None:
        counts = np.ones(packed.vocab_size)
        for batch in packed.dataset.with_format("numpy").iter(1000):
            counts += np.bincount(np.asarray(batch["input_ids"]).ravel(), minlength=packed.vocab_size)
        self.logp = np.log(counts / counts.sum())
        self.fingerprint = f"unigram of {packed.fingerprint}"

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Sums over the counted targets, `[B]`."""
        return np.where(counted, self.logp[tokens[:, 1:]], 0.0).sum(axis=1)


corpus = miniplm.open_corpus(sys.argv[1])
scores = miniplm.score(corpus.pool, Unigram(corpus.reference), out=sys.argv[2])
print(f"{len(scores):,} instances, {-scores.logp.sum() / scores.n_tokens.sum():.3f} nats per token under unigrams")
