"""What the offline part costs, in floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
