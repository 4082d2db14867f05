"""Causal attention for scoring on CPU in bfloat16: large matrix products instead of a flash kernel's small ones.

torch's scaled_dot_product_attention reaches 120 GFLOP/s on CPU without AMX, where a matrix product reaches 900: with a
small vocabulary it is more than half of a forward pass. Here the scores of a block of positions, for many heads at
once, are one batched product: twice as fast. The arithmetic is that of transformers' own `eager` attention (scores are
rounded to bfloat16, the softmax is float32), without its T x T of memory. *Measured 2026-11-20, NOTES.md.*

It is taken only by models that reach it through transformers' AttentionInterface, and only for what it knows: plain
causal attention. Everything else goes to torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "miniplm_blocked"
_BLOCK = 128  # positions; a power of two
_SCORES = 1 << 22  # scores at once: 8 MB
_SHORTEST = 256  # positions; below, torch's is as fast
_CHANGING = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")  # what makes attention another one


def use_blocked_attention(model: PreTrainedModel) -> None:
    """Let a model score with it, if the model is of the kind that gains: on CPU, in 16 bits, through `sdpa`."""
    if model.device.type == "cpu" and model.dtype != torch.float32 and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, blocked_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def blocked_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it: `[B, H, T, d]` in, `[B, T, H, d]` out."""
    causal = others.get("is_causal") in (None, True) and getattr(module, "is_causal", True)
    plain = causal and attention_mask is None and dropout == 0.0 and key.shape[2] == query.shape[2]
    plain = plain and all(others.get(name) in (None, False) for name in _CHANGING)
    if not plain or query.shape[2] < _SHORTEST or torch.is_grad_enabled():
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return found
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    q = torch.mul(query, scale, out=torch.empty(query.shape, dtype=query.dtype)).view(batch * heads, length, width)
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    k = key.reshape(batch * heads, length, width).transpose(1, 2)
    v = value.reshape(batch * heads, length, value.shape[3])
    out = torch.empty(batch * heads, length, value.shape[3], dtype=query.dtype)
    later = torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=query.dtype).triu(1)
    at_once = max(1, _SCORES // (_BLOCK * length))
    memory = torch.empty(2, min(at_once, len(q)) * _BLOCK * length, dtype=query.dtype)
    for head in range(0, len(q), at_once):
        some = slice(head, head + at_once)
        for begin in range(0, length, _BLOCK):
            end = min(begin + _BLOCK, length)
            shape = (len(q[some]), end - begin, end)
            size = shape[0] * shape[1] * shape[2]
            scores, shares = (half[:size].view(shape) for half in memory)
            torch.bmm(q[some, begin:end], k[some, :, :end], out=scores)
            scores[:, :, begin:] += later[: end - begin, : end - begin]
            torch.ops.aten._softmax.out(scores, -1, False, out=shares)
            torch.bmm(shares, v[some, :end], out=out[some, begin:end])
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None
