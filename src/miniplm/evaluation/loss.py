"""Held-out loss: nats per token and bits per byte, per source and in all, with standard errors over instances.

In: the scores of held-out instances under a model. Out: an `Evaluation`: rows of (dataset, source, metric, value,
standard error, n), and the scores themselves, so that two models can be compared instance by instance.

Both metrics are ratios of sums, Σ −log p / Σ tokens; the standard error is that of a ratio of means over instances:
s / (mean tokens · √n), s the standard deviation of −log p − ratio · tokens (Cochran, Sampling Techniques, section 6.4).
Instances of one document are not independent, so it is a little too small where documents are long.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from miniplm.progress import printable
from miniplm.scoring.base import Scores

ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `source` is `all` or a domain, `metric` `nats_per_token` or `bits_per_byte`, `n` counts instances."""

    dataset: str
    source: str
    metric: str
    value: float
    standard_error: float | None
    n: int

    def __str__(self) -> str:
        error = "–" if self.standard_error is None else f"{self.standard_error:.4f}"
        source = printable(self.source, 24)
        return f"{self.dataset:<10} {source:<24} {self.metric:<15} {self.value:8.4f} ± {error}  n={self.n:,}"

    def as_dict(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Difference:
    """Student minus control in nats per token, paired by instance; negative means that the student is better."""

    value: float
    standard_error: float
    n: int

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `within noise` (less than two standard errors)."""
        if self.n < 2 or abs(self.value) <= 2 * self.standard_error:
            return "within noise"
        return "better" if self.value < 0 else "worse"


def losses(scores: Scores, dataset: str = "held_out") -> list[Row]:
    """The figures of one model: both metrics for all instances, then for each source."""
    groups = [(ALL, np.arange(len(scores)))]
    groups += [(name, np.flatnonzero(scores.source == code)) for code, name in enumerate(scores.sources)]
    rows = []
    for source, inside in groups:
        if len(inside) == 0:
            continue
        nats = -scores.logp[inside]
        for metric, amount in (
            ("nats_per_token", scores.n_tokens[inside].astype(np.float64)),
            ("bits_per_byte", scores.n_bytes[inside] * np.log(2)),
        ):
            if amount.sum() == 0:  # a source of nothing but separators has no bytes to speak of
                continue
            value, error = _ratio(nats, amount)
            rows.append(Row(dataset, source, metric, value, error, len(inside)))
    return rows


def compare(student: Scores, control: Scores) -> Difference:
    """Student minus control on the same held-out instances. Raises ValueError if they are not the same."""
    if student.packed != control.packed:
        raise ValueError("the two models were measured on different instances")
    if not np.array_equal(student.n_tokens, control.n_tokens):
        raise ValueError("the two models were measured on different targets (two rules for what counts)")
    gap = control.logp - student.logp
    value, error = _ratio(gap, student.n_tokens.astype(np.float64))
    return Difference(value, 0.0 if error is None else error, len(student))


def _ratio(total: NDArray[np.float64], amount: NDArray[np.float64]) -> tuple[float, float | None]:
    """Σ total / Σ amount and its standard error over the items; None for a single item."""
    value = float(total.sum() / amount.sum())
    n = len(total)
    if n < 2:
        return value, None
    spread = float(np.std(total - value * amount, ddof=1))
    return value, spread / (float(amount.mean()) * np.sqrt(n).item())
