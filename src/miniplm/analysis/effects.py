"""What the difference of two models says of a pool: how much of it is easy, hard or noisy, by source, and examples.

The paper's three effects (section 2.2, Fig. 3b) by its words, each instance being one of

    noisy      p < p_ref: the score is below 0
    easy       p ≳ p_ref, and common: the score is near 0, and the reference fits the text as well as the teacher does
    hard       p ≫ p_ref, and diverse: the score is far above 0
    between    none of the three

The paper gives no numbers for "near" and "far" (*assumed* here): near is at most half of the pool's typical gain, far
is more than one and a half times it, where the typical gain is the median of the scores that are not below 0. That the
reference fits a text means that its loss is at most the pool's median: where both models fail alike, the text is not
easy. All three are parameters. Bounds that follow the pool serve any unit and any pair of models, and yet do not fix
the shares, as quantiles of the score would.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import ArtifactMismatchError, RecipeError
from miniplm.packing.instances import Packed
from miniplm.sampling.base import Selection
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Normalize, Scores

Effect = Literal["easy", "hard", "noisy", "between"]
EFFECTS: tuple[Effect, ...] = ("easy", "hard", "noisy", "between")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where the effects end, in nats per the unit of the scores.

    Attributes:
        easy_score: the largest score of an easy instance; the smallest is 0.
        easy_loss: the largest loss of the reference on an easy instance.
        hard_score: hard instances score more.

    """

    easy_score: float
    easy_loss: float
    hard_score: float


@dataclass(frozen=True)
class Effects:
    """The effect that each of N instances shows.

    Attributes:
        unit: what scores and losses are per.
        score: `[N]` log p − log p_ref, nats per unit.
        teacher_loss: `[N]` −log p, likewise.
        reference_loss: `[N]` −log p_ref, likewise.
        effect: `[N]` codes into `EFFECTS`.
        bounds: that decided it.
        kept: `[N]`, which were selected; None if nobody selected.
        source: `[N]` codes into `sources`.
        sources: names of the domains, sorted.
        packed: fingerprint of the instances.

    """

    unit: Normalize
    score: NDArray[np.float64]
    teacher_loss: NDArray[np.float64]
    reference_loss: NDArray[np.float64]
    effect: NDArray[np.int8]
    bounds: Bounds
    kept: NDArray[np.bool_] | None
    source: NDArray[np.int32]
    sources: tuple[str, ...]
    packed: str

    def __len__(self) -> int:
        return len(self.score)

    def of(self, effect: Effect) -> NDArray[np.bool_]:
        """Which instances show an effect, `[N]`."""
        there: NDArray[np.bool_] = self.effect == EFFECTS.index(effect)
        return there

    def check_of(self, packed: Packed) -> None:
        """Raise ArtifactMismatchError if these are the effects of other instances."""
        if self.packed != packed.fingerprint or len(self) != len(packed):
            raise ArtifactMismatchError(
                "the scores are of other instances.",
                facts={
                    "scores": f"packed {self.packed[:12]}  {len(self):,} instances",
                    "instances": f"packed {packed.fingerprint[:12]}  {len(packed):,} instances  {packed.path}",
                },
                remedy="Show the instances that were scored.",
            )

    def as_dict(self) -> dict[str, Any]:
        """As JSON: `{unit, bounds, effects: [{effect, ...}], by_source: [{source, ...}]}`, largest sources first."""
        sizes = np.bincount(self.source, minlength=len(self.sources))
        return {
            "unit": self.unit,
            "bounds": asdict(self.bounds),
            "effects": [{"effect": name, **self._part(self.of(name))} for name in EFFECTS],
            "by_source": [self._source(int(code)) for code in np.argsort(-sizes, kind="stable")],
        }

    def _part(self, there: NDArray[np.bool_]) -> dict[str, Any]:
        """A part of the pool: its size, how much of it was kept, and its means (None of nothing)."""
        count = int(there.sum())
        kept = None if self.kept is None else int(self.kept[there].sum())
        means = {"teacher": self.teacher_loss, "reference": self.reference_loss, "score": self.score}
        return {
            "pool": count,
            "share": count / len(self),
            "kept": kept,
            "kept_share": None if kept is None or not count else kept / count,
            **{name: float(values[there].mean()) if count else None for name, values in means.items()},
        }

    def _source(self, code: int) -> dict[str, Any]:
        there = self.source == code
        shares: dict[str, float | None] = {
            name: float(self.of(name)[there].mean()) if there.any() else None for name in EFFECTS
        }
        return {"source": self.sources[code], **self._part(there), **shares}


def effects(
    teacher: Scores,
    reference: Scores,
    kept: Selection | NDArray[np.bool_] | None = None,
    *,
    normalize: Normalize = "token",
    easy_below: float = 0.5,
    hard_above: float = 1.5,
    fits: float = 0.5,
) -> Effects:
    """Tell easy, hard and noisy instances apart.

    Args:
        teacher: scores of the instances.
        reference: of the same instances.
        kept: the selection, or which instances it kept, `[N]`.
        normalize: what a score is per; `byte` where the tokenizers differ.
        easy_below: an easy instance scores at most this multiple of the typical gain.
        hard_above: a hard one scores more than this multiple.
        fits: the share of the pool that the reference is said to fit: those on which its loss is smallest.

    Raises:
        ArtifactMismatchError: the three are of different instances.
        RecipeError: a hard instance could be easy, or `fits` is no share.

    """
    if not (0 <= easy_below <= hard_above and 0 <= fits <= 1):
        raise RecipeError(
            "these bounds do not tell easy instances from hard ones.",
            facts={
                "found": f"easy_below={easy_below:g}, hard_above={hard_above:g}, fits={fits:g}",
                "expected": "0 ≤ easy_below ≤ hard_above and 0 ≤ fits ≤ 1",
            },
        )
    score = differences(teacher, reference, normalize)
    if isinstance(kept, Selection):
        kept = _kept_by(kept, teacher)
    elif kept is not None and kept.shape != score.shape:
        raise ArtifactMismatchError(
            "the selection is of other instances than the scores.",
            facts={"selection": f"{len(kept):,} instances", "scores": f"{len(score):,} instances  {teacher.name}"},
        )
    loss = -reference.per(normalize)
    gains = score[score >= 0]
    typical = float(np.median(gains)) if len(gains) else 0.0
    bounds = Bounds(easy_below * typical, float(np.quantile(loss, fits)), hard_above * typical)
    which = [
        (score >= 0) & (score <= bounds.easy_score) & (loss <= bounds.easy_loss),
        (score >= 0) & (score > bounds.hard_score),
        score < 0,
    ]
    effect = np.select(which, [0, 1, 2], default=3).astype(np.int8)
    return Effects(
        normalize, score, -teacher.per(normalize), loss, effect, bounds, kept,
        reference.source, reference.sources, reference.packed,
    )  # fmt: skip


def _kept_by(selection: Selection, scores: Scores) -> NDArray[np.bool_]:
    """Which instances a selection kept, `[N]`. Raises ArtifactMismatchError if it is of others than the scores."""
    if selection.packed != scores.packed or selection.of != len(scores):
        raise ArtifactMismatchError(
            "the selection is of other instances than the scores.",
            facts={
                "selection": f"packed {selection.packed[:12]}  {selection.of:,} instances",
                "scores": f"packed {scores.packed[:12]}  {len(scores):,} instances  {scores.name}",
            },
            remedy="Select from the scores of these instances.",
        )
    kept = np.zeros(len(scores), np.bool_)
    kept[selection.rows] = True
    return kept
