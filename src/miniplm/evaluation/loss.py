"""Loss on held-out instances or documents: nats per token and bits per byte, per source and in all, standard errors.

In: the scores of instances under a model. Out: an `Evaluation`: rows of (dataset, source, metric, value,
standard error, n), and the scores themselves, so that two models can be compared instance by instance.

Both metrics are ratios of sums, Σ −log p / Σ tokens; the standard error is that of a ratio of means over instances:
s / (mean tokens · √n), s the standard deviation of −log p − ratio · tokens (Cochran, Sampling Techniques, section 6.4).
Instances of one document are not independent, so it is a little too small where documents are long.

Where an instance is a document, there is the paper's own figure too: the mean over documents of each one's nats per
token, in which a short document weighs as much as a long one (paper.md section 2.4).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import RecipeError
from miniplm.progress import printable
from miniplm.scoring.base import Scores

ALL = "all"
HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a model.

    Attributes:
        dataset: `held_out`, the name of a set of documents, or a task.
        source: `all` or a domain.
        metric: `nats_per_token`, `nats_per_token_by_document`, `bits_per_byte`, or a task's: `acc_norm`, ...
        value: of it.
        standard_error: of the value; None where it is not known.
        n: instances or examples; of an average, tasks.

    """

    dataset: str
    source: str
    metric: str
    value: float
    standard_error: float | None
    n: int

    def __str__(self) -> str:
        error = "–" if self.standard_error is None else f"{self.standard_error:.4f}"
        source = printable(self.source, 24)
        return f"{self.dataset:<10} {source:<24} {self.metric:<26} {self.value:8.4f} ± {error}  n={self.n:,}"

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


def losses(scores: Scores, dataset: str = HELD_OUT, *, by_document: bool = False) -> list[Row]:
    """The figures of one model: all metrics for all instances, then for each source.

    Args:
        scores: of the instances.
        dataset: what the rows call it.
        by_document: each instance is a document: give the mean over documents too.

    """
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
        if by_document:
            each = nats / scores.n_tokens[inside]
            error = float(np.std(each, ddof=1)) / len(each) ** 0.5 if len(each) > 1 else None
            rows.append(Row(dataset, source, "nats_per_token_by_document", float(each.mean()), error, len(inside)))
    return rows


def as_csv(models: Mapping[str, Iterable[Row]]) -> str:
    """A table of several models: model, dataset, source, metric, value, standard error, n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "dataset", "source", "metric", "value", "standard_error", "n"])
    writer.writerows([model, *row.as_dict().values()] for model, rows in models.items() for row in rows)
    return text.getvalue()


def loss_on(scores: Scores, sources: Iterable[str], metric: str) -> float:
    """The loss on some sources together, as `nats_per_token` or `bits_per_byte`.

    Raises:
        RecipeError: the instances have no such source.

    """
    wanted = list(sources)
    if unknown := sorted(set(wanted) - set(scores.sources)):
        raise RecipeError(
            f"the instances have no source {printable(unknown[0])!r}.",
            facts={"sources": printable(", ".join(scores.sources))},
            remedy="Name sources of the held-out part in `evaluate.groups`.",
        )
    inside = np.isin(scores.source_names, wanted)
    amount = scores.n_tokens if metric == "nats_per_token" else scores.n_bytes * np.log(2)
    return float(-scores.logp[inside].sum() / amount[inside].sum())


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
