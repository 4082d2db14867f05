"""How well two rankings of the same instances agree: correlations, and the decisions that they lead to.

Paper, appendix D.4, and the authors' data scorer, which is measured by Spearman's correlation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.sampling.base import keep_count, top_k

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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
