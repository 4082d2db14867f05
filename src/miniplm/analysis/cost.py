"""What the offline part costs, in operations and in bytes, and how many students repay it. Plain arithmetic.

The paper's figures (sections 2.4, 3.4, appendices C and E) follow from it: a float for each instance of 50B tokens is
200 MB where a distribution for each token would be 30 PB; scoring 100B tokens with a 1.8B teacher is 3.6e20 operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PAPER_SCORE_BYTES = 4  # of a score in the paper's footnote 2: one float32
SCORE_BYTES = 14  # of ours on disk: row, sum (float64), tokens, bytes, source; zstd; measured, 10K instances in 9 files
PAPER_COMPUTE_REDUCTION = 2.2  # of a 500M student, against Vanilla KD, training operations alone (abstract, figure 1a)


def score_bytes(instances: float, models: int = 2, bytes_each: float = SCORE_BYTES) -> float:
    """Disk for the scores of so many instances: of teacher and reference, or of their difference alone (`models=1`)."""
    return instances * models * bytes_each


def token_level_bytes(tokens: float, vocab_size: int, bytes_each: float = 4) -> float:
    """Disk for one model's distributions over the whole vocabulary at every predicted token."""
    return tokens * vocab_size * bytes_each


def break_even(offline: float | None, saved_per_student: float | None) -> float | None:
    """How many students repay the offline part: infinite where a student saves nothing, None where either is unknown.

    Args:
        offline: its cost: operations, seconds or money.
        saved_per_student: in the same unit; from `saved_to_same_loss`, or the teacher's forward passes that Vanilla KD
            of one student would take.

    """
    if offline is None or saved_per_student is None:
        return None
    return offline / saved_per_student if saved_per_student > 0 else math.inf


def saved_to_same_loss(student: float, compute_reduction: float) -> float:
    """What a student saves against a control that needs `compute_reduction` times its training for the same loss."""
    return (compute_reduction - 1) * student


def offline_flops(
    per_token: Mapping[str, float | None], sample_tokens: int, pool_tokens: int, fine_tuning: float
) -> dict[str, Any]:
    """The operations of scoring with and without a proxy; None where the teacher's are not known.

    The reference model is trained either way and counts in neither.

    Args:
        per_token: of a forward pass of `teacher`, `reference` (heads included) and `proxy`.
        sample_tokens: predicted tokens that teacher and reference score.
        pool_tokens: predicted tokens of the pool.
        fine_tuning: operations of training and measuring the proxy.

    """
    teacher, reference, proxy = per_token["teacher"], per_token["reference"], per_token["proxy"]
    assert reference is not None
    assert proxy is not None
    full = None if teacher is None else (teacher + reference) * pool_tokens
    with_proxy = None
    if teacher is not None:
        with_proxy = (teacher + reference) * sample_tokens + fine_tuning + proxy * pool_tokens
    return {
        "per_token": dict(per_token),
        "sample_tokens": sample_tokens,
        "pool_tokens": pool_tokens,
        "teacher_on_sample": None if teacher is None else teacher * sample_tokens,
        "reference_on_sample": reference * sample_tokens,
        "fine_tuning": fine_tuning,
        "proxy_on_pool": proxy * pool_tokens,
        "full_path": full,
        "proxy_path": with_proxy,
        "saved": None if full is None or with_proxy is None else 1 - with_proxy / full,
    }
