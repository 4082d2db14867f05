"""Rows: what a scorer is given. Of each instance one, or one for each document or window in it.

In: instances and `ScoreSettings`. Out: rows of token ids with a mask of the targets that count; each target of each
instance is in exactly one row. Batches of rows by a budget of tokens, the longest first, padded to the longest.

`documents: isolate` cuts an instance where a document begins: each document is scored after a separator and knows
nothing of the one before, as if positions were reset and attention were block-diagonal; but for every architecture,
state-space models too, and with less attention to compute. Text of a model whose own tokenizer makes an instance longer
than its positions is cut in windows that overlap by one token, as `lm-evaluation-harness` rolls over long texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.packing.instances import Instances, counted
from miniplm.packing.retokenize import Retokenizer
from miniplm.recipe import Counted
from miniplm.recipe import Documents as DocumentsRule


@dataclass(frozen=True, slots=True)
class Row:
    """A stretch of an instance: `tokens [t+1]`, and which of its t targets count."""

    instance: int
    tokens: NDArray[Any]
    counted: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows, padded: `tokens [B, t+1]`, `counted [B, t]`, and the numbers of the rows."""

    rows: NDArray[np.int64]
    tokens: NDArray[Any]
    counted: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowRule:
    """How instances become rows.

    Attributes:
        separator: the token between documents, in the ids that the model is given.
        token_bytes: `[V]`, UTF-8 bytes of each of those ids.
        counted: which targets count.
        documents: whether documents of one instance see each other.
        retokenizer: makes the model's own ids; None if the instances' ids are the model's.
        longest: tokens that the model has positions for; None if there is no limit.

    """

    separator: int
    token_bytes: NDArray[np.int32]
    counted: Counted
    documents: DocumentsRule = "attend"
    retokenizer: Retokenizer | None = None
    longest: int | None = None

    def rows(self, instances: Instances) -> tuple[list[Row], NDArray[np.int32], NDArray[np.int32]]:
        """The rows of some instances, and for each instance the tokens and bytes that count: `[N]`, `[N]`."""
        stored = zip(instances.input_ids, instances.length, strict=True)
        texts = [ids[:length] for ids, length in stored]
        if self.retokenizer is not None:
            texts = self.retokenizer(texts)
        rows: list[Row] = []
        n_tokens = np.zeros(len(texts), np.int32)
        n_bytes = np.zeros(len(texts), np.int32)
        for number, ids in enumerate(texts):
            mask = counted(ids[None], [len(ids)], self.separator, self.counted)[0]
            n_tokens[number] = mask.sum()
            n_bytes[number] = self.token_bytes[ids[1:][mask]].sum()
            for begin, end in self._spans(ids):
                if mask[begin : end - 1].any():
                    rows.append(Row(number, ids[begin:end], mask[begin : end - 1]))
        return rows, n_tokens, n_bytes

    def _spans(self, ids: NDArray[Any]) -> Iterator[tuple[int, int]]:
        """Stretches of tokens; each begins with the last token of the one before, which is no target of its own."""
        begins = [0]
        if self.documents == "isolate":
            begins += [int(p) for p in np.flatnonzero(ids[:-1] == self.separator) if p]
        for begin, following in zip(begins, [*begins[1:], len(ids) - 1], strict=True):
            step = self.longest or max(following - begin, 1)
            for at in range(begin, following, step):
                yield at, min(at + step, following) + 1


def batches(rows: list[Row], token_budget: int, padding: int, most_rows: int | None = None) -> Iterator[Batch]:
    """Cut rows into batches of at most `token_budget` tokens, padding counted (one row may be longer by itself)."""
    lengths = np.array([len(row.counted) for row in rows], np.int64)
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        take = max(1, token_budget // longest)
        chosen = order[begin : begin + min(take, most_rows or take)]
        tokens = np.full((len(chosen), longest + 1), padding, rows[0].tokens.dtype)
        mask = np.zeros((len(chosen), longest), np.bool_)
        for line, number in enumerate(chosen):
            row = rows[number]
            tokens[line, : len(row.tokens)] = row.tokens
            mask[line, : len(row.counted)] = row.counted
        yield Batch(chosen, tokens, mask)
        begin += len(chosen)
