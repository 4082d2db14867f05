"""Scoring instances in memory: rows out, answers in, some of them under way at a time.

In: instances, a `Scorer`, and a rule by which instances become rows. Out: log p, tokens and bytes of each instance. The
stage (`score.py`) does this for each shard, `drift.py` for a sample.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from miniplm.engine.base import Advance
from miniplm.errors import MiniplmError, ScoreError, TokenizerError
from miniplm.models.load import check_length, check_vocabulary, positions
from miniplm.packing.instances import Instances, Packed
from miniplm.packing.retokenize import Retokenizer
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import ScoreSettings
from miniplm.scoring.base import Pending, Scorer
from miniplm.scoring.journal import Journal
from miniplm.scoring.rows import Batch, Row, RowRule, batches

_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Scored:
    """Some instances with their scores.

    Attributes:
        table: `logp` (nats, float64), `n_tokens`, `n_bytes`, `source`, a row an instance.
        lengths: predicted positions of a row -> rows that were computed.

    """

    table: pa.Table
    lengths: Counter[int]


def row_rule(packed: Packed, scorer: Scorer, settings: ScoreSettings) -> tuple[RowRule, str]:
    """How instances become this model's rows, and the fingerprint of the tokenizer whose ids those are.

    Raises:
        ModelError, TokenizerError: the model cannot have meant these token ids.

    """
    ours = packed.tokenizer
    theirs: Tokenizer | None = getattr(scorer, "tokenizer", None)
    config = getattr(scorer, "config", {})
    differing = None if theirs is None else ours.differing_token(theirs)
    if settings.tokenizer == "own" and theirs is None:
        raise TokenizerError(
            "the model's own tokenizer is not known, and `tokenizer: own` needs it.",
            remedy="It must lie beside the weights as tokenizer.json; for a server, name it: `tokenizer: ...`.",
        )
    if theirs is not None and settings.tokenizer == "own" and differing is not None:
        separator, sizes, longest = theirs.separator, theirs.token_bytes, positions(config)
        rule = RowRule(separator, sizes, settings.counted, settings.documents, Retokenizer(ours, theirs), longest)
        return rule, theirs.fingerprint
    if theirs is None and hasattr(scorer, "expect"):
        scorer.expect(ours)
    if theirs is not None and differing is not None:
        raise TokenizerError(
            "the model was trained with another tokenizer than the instances were packed with.",
            facts={
                "instances": f"{len(ours.vocabulary):,} tokens, {differing!r} is {ours.vocabulary[differing]}",
                "model": f"{len(theirs.vocabulary):,} tokens, {differing!r} is {theirs.vocabulary.get(differing)}",
            },
            remedy="Prepare the corpus with the model's tokenizer, or have the text scored under the model's own: "
            "`tokenizer: own` (and compare per byte).",
        )
    if (size := getattr(scorer, "vocab_size", None)) is not None:
        check_vocabulary(packed.vocab_size, size, "the model")
    check_length(config, packed.sequence_length)
    return RowRule(packed.separator, ours.token_bytes, settings.counted, settings.documents), ours.fingerprint


def score_instances(
    instances: Instances,
    scorer: Scorer,
    rule: RowRule,
    token_budget: int,
    advance: Advance = lambda _: None,
    journal: Journal | None = None,
    first_row: int = 0,
) -> Scored:
    """Score instances in memory.

    Args:
        instances: N of them.
        scorer: the model.
        rule: how they become rows.
        token_budget: tokens per batch, padding included.
        advance: told of counted tokens.
        journal: rows that are known already, and where new ones are kept.
        first_row: what messages call the first instance.

    """
    rows, n_tokens, n_bytes = rule.rows(instances)
    found = np.zeros(len(rows), np.float64)
    if journal is not None and journal.known:
        known = np.fromiter(journal.known, np.int64)
        found[known] = np.fromiter(journal.known.values(), np.float64)
        advance(sum(int(rows[number].counted.sum()) for number in known))
        waiting = np.setdiff1d(np.arange(len(rows)), known)
    else:
        waiting = np.arange(len(rows))
    for batch, logp in _scored(scorer, [rows[number] for number in waiting], rule, token_budget, first_row):
        if np.shape(logp) != batch.rows.shape:
            raise ScoreError(
                "the scorer did not give one number for each instance.",
                facts={"found": f"shape {np.shape(logp)}", "expected": f"shape {batch.rows.shape}"},
            )
        found[waiting[batch.rows]] = logp
        if journal is not None:
            journal.write(waiting[batch.rows], logp)
        advance(int(batch.counted.sum()))
    table = pa.table(
        {
            "logp": np.bincount([row.instance for row in rows], weights=found, minlength=len(instances)),
            "n_tokens": n_tokens,
            "n_bytes": n_bytes,
            "source": pa.array(instances.source).dictionary_encode(),
        }
    )
    return Scored(table, Counter(len(rows[number].counted) for number in waiting))


def _scored(
    scorer: Scorer, rows: list[Row], rule: RowRule, token_budget: int, first_row: int
) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
    """Batches with their scores, as they come; later ones are handed over while earlier ones are computed.

    After an error, what is on its way is waited for and given before the error is raised: it may have cost money.
    """
    if not rows:
        return
    submit = getattr(scorer, "submit", None)
    in_flight = 0 if submit is None else scorer.in_flight  # type: ignore[attr-defined]  # belongs to `submit`
    waiting: list[tuple[Batch, Pending]] = []

    def one() -> tuple[Batch, NDArray[np.float64]]:
        batch, pending = waiting.pop(_first_done([pending for _, pending in waiting]))
        try:
            return batch, pending.result()
        except ScoreError as error:
            names = sorted({first_row + rows[row].instance for row in batch.rows.tolist()})
            raise ScoreError(f"instance {', '.join(f'{name:,}' for name in names)}: {error}") from error

    try:
        for batch in batches(rows, token_budget, rule.separator, getattr(scorer, "most_rows", None)):
            begin = partial(_Computed, scorer) if submit is None else submit
            waiting.append((batch, begin(batch.tokens, batch.counted)))
            while len(waiting) > in_flight:
                yield one()
        while waiting:
            yield one()
    except MiniplmError:
        while waiting:
            with contextlib.suppress(MiniplmError):
                yield one()
        raise


class _Computed:
    """An answer that is computed when it is asked for."""

    def __init__(self, scorer: Scorer, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> None:
        self.result = partial(scorer.score, tokens, counted)


def _first_done(waiting: list[Pending]) -> int:
    """The first answer that is there; where they do not say, the first. One that is late holds up no others."""
    while hasattr(waiting[0], "done"):
        for number, pending in enumerate(waiting):
            if pending.done():  # type: ignore[attr-defined]
                return number
        time.sleep(_POLL_SECONDS)
    return 0
