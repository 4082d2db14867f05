"""How well two rankings of the same instances agree: correlations, and the decisions that they lead to.

Paper, appendix D.4 (Table 11: a reference against the student that it stands for), and the authors' data scorer, which
is measured by Spearman's correlation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.analysis.intervals import RESAMPLES, Measured, bootstrap
from miniplm.errors import ArtifactMismatchError
from miniplm.sampling.base import keep_count, top_k
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Normalize, Scores

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAPER_REFERENCES = (
    {"reference": "45M", "pearson": 0.743, "spearman": 0.774, "agreement": 0.806},
    {"reference": "104M", "pearson": 0.826, "spearman": 0.840, "agreement": 0.874},
    {"reference": "200M", "pearson": 0.856, "spearman": 0.879, "agreement": 0.895},
)
"""What `student_agreement` was in the paper (Table 11), by the reference's size: teacher 1.8B, student 500M, held-out
instances of the Pile, ratio 0.5."""


def agreement(difference: NDArray[np.float64], predicted: NDArray[np.float64], ratio: float) -> float:
    """The share of instances that both rankings keep, or both drop, when each keeps its top `ratio`."""
    k = keep_count(ratio, len(difference))
    kept = np.zeros((2, len(difference)), np.bool_)
    for mask, scores in zip(kept, (difference, predicted), strict=True):
        mask[top_k(scores, k)] = True
    return float((kept[0] == kept[1]).mean())


def pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The linear correlation; 0 where one of the two is constant."""
    from scipy.stats import pearsonr  # a second to import

    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(pearsonr(a, b).statistic)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The correlation of the ranks; equal values share the mean of theirs; 0 where one of the two is constant."""
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def measures(difference: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, Any]:
    """How well a prediction of the differences does."""
    residual = difference - predicted
    return {
        "instances": len(difference),
        "pearson": pearson(difference, predicted),
        "spearman": spearman(difference, predicted),
        "r2": 1 - float(residual @ residual) / float(((difference - difference.mean()) ** 2).sum()),
        "agreement": {str(ratio): agreement(difference, predicted, ratio) for ratio in RATIOS},
    }


@dataclass(frozen=True)
class StudentAgreement:
    """How far the reference stands for a student (Table 11): log p/p_ref against log p/q of the same instances.

    Attributes:
        instances: how many.
        ratio: of the sampling.
        normalize: what both differences are per.
        pearson: of the two differences.
        spearman: likewise.
        agreement: the share of instances that both keep, or both drop ("sampling accuracy").
        by_chance: what it is between rankings that know nothing of each other.

    """

    instances: int
    ratio: float
    normalize: Normalize
    pearson: Measured
    spearman: Measured
    agreement: Measured
    by_chance: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON: the attributes, a measured one as `{value, low, high}`."""
        return asdict(self)


def student_agreement(
    teacher: Scores,
    reference: Scores,
    student: Scores,
    *,
    ratio: float = 0.5,
    normalize: Normalize = "token",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> StudentAgreement:
    """How well the reference's choice of instances is the one that a student itself would lead to.

    Intervals are 95 %, by a bootstrap over instances, which takes no longer for more than `intervals.MOST_DRAWN`.

    Args:
        teacher: scores of instances that none of the three was trained on, if possible.
        reference: of the same instances.
        student: of the same instances.
        ratio: α of the sampling.
        normalize: what a difference is per; `byte` where the tokenizers differ.
        seed: of the bootstrap.
        resamples: likewise.

    Raises:
        ArtifactMismatchError: they are of different instances, or per token of different tokenizers.
        RecipeError: the ratio is outside (0, 1].

    """
    _check_student(teacher, student, normalize)
    chosen, ideal = differences(teacher, reference, normalize), differences(teacher, student, normalize)

    def figures(rows: NDArray[np.int64]) -> tuple[float, float, float]:
        a, b = chosen[rows], ideal[rows]
        return _correlation(a, b), _correlation(_ranks(a), _ranks(b)), agreement(a, b, ratio)

    linear, ranked, agreeing = bootstrap(figures, len(chosen), seed, resamples)
    return StudentAgreement(len(chosen), ratio, normalize, linear, ranked, agreeing, by_chance(ratio))


def by_chance(ratio: float) -> float:
    """The agreement of two rankings that know nothing of each other."""
    return ratio**2 + (1 - ratio) ** 2


def _check_student(teacher: Scores, student: Scores, normalize: Normalize) -> None:
    """As `differences` checks the reference, in a message that names the student."""
    if teacher.packed != student.packed or len(teacher) != len(student):
        raise ArtifactMismatchError(
            "teacher and student were scored on different instances.",
            facts={
                "teacher": f"{teacher.name}    packed {teacher.packed[:12]}  {len(teacher):,} instances",
                "student": f"{student.name}    packed {student.packed[:12]}  {len(student):,} instances",
            },
            remedy="Score both models on the same packed dataset.",
        )
    if normalize == "token" and teacher.tokenizer != student.tokenizer:
        raise ArtifactMismatchError(
            "teacher and student were scored under different tokenizers: a difference per token means nothing.",
            facts={
                "teacher": f"{teacher.name}    tokenizer {teacher.tokenizer[:12]}",
                "student": f"{student.name}    tokenizer {student.tokenizer[:12]}",
            },
            remedy="Compare them per byte: normalize: byte.",
        )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    ranks: NDArray[np.float64] = rankdata(values)
    return ranks


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """As `pearson`, without its test of significance, which would take most of a bootstrap's time."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b) / float(np.sqrt((a @ a) * (b @ b)))
