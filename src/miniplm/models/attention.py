"""Causal attention on CPU in 16 bits: large matrix products instead of a flash kernel's small ones.

torch's scaled_dot_product_attention reaches 120 GFLOP/s on CPU without AMX, where a matrix product reaches 900: with a
small vocabulary it is more than half of a forward pass. Here the scores of a block of positions, for many heads at
once, are one batched product: twice as fast, forward and backward. The arithmetic is that of transformers' own `eager`
attention (scores are rounded to 16 bits, the softmax is float32), without its T x T of memory: the backward pass makes
each block's scores again. *Measured 2026-11-20 and -21, NOTES.md.*

It is taken only by models that reach it through transformers' AttentionInterface, and only for what it knows: plain
causal attention. Everything else goes to torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def use_blocked_attention(model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
    """Let a model run with it, if the model is of the kind that gains: on CPU, in 16 bits, through `sdpa`.

    Args:
        model: to score with, or to train.
        autocast: what products are taken in, if not in the model's own dtype.

    """
    sixteen_bits = (autocast or model.dtype) != torch.float32
    if model.device.type == "cpu" and sixteen_bits and model.config._attn_implementation == "sdpa":
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
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    causal = others.get("is_causal") in (None, True) and getattr(module, "is_causal", True)
    plain = causal and attention_mask is None and dropout == 0.0 and key.shape[2] == query.shape[2]
    plain = plain and all(others.get(name) in (None, False) for name in _CHANGING)
    if not plain or query.shape[2] < _SHORTEST or dtype == torch.float32:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return found
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    with torch.autocast("cpu", enabled=False):
        rows = ((query * scale).to(dtype), key.to(dtype), value.to(dtype))
        out = _attend(*(tensor.reshape(batch * heads, length, -1) for tensor in rows))
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


# As operators of their own they are taken as they are where the model around them is compiled.
@torch.library.custom_op("miniplm::blocked_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of `[B*H, T, d]`; queries come scaled."""
    out = query.new_empty(*query.shape[:2], value.shape[2])
    for some, rows, end, shares in _blocks(query, key):
        torch.bmm(shares, value[some, :end], out=out[some, rows])
    return out


@torch.library.custom_op("miniplm::blocked_attention_backward", mutates_args=())
def _attend_backward(by_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value; each block's softmax is made again."""
    by_query = torch.empty_like(query)
    by_key, by_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
    by_out, value_rows = by_out.contiguous(), value.transpose(1, 2)
    for some, rows, end, shares in _blocks(query, key):
        by_block = by_out[some, rows]
        by_value[some, :end] += torch.bmm(shares.transpose(1, 2), by_block)
        by_shares = torch.bmm(by_block, value_rows[some, :, :end])
        by_scores = torch.ops.aten._softmax_backward_data(by_shares, shares, -1, shares.dtype)
        torch.bmm(by_scores, key[some, :end], out=by_query[some, rows])
        by_key[some, :end] += torch.bmm(by_scores.transpose(1, 2), query[some, rows])
    return by_query, by_key.to(key.dtype), by_value.to(value.dtype)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


@_attend_backward.register_fake
def _(by_out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _attend_backward(by_out, *ctx.saved_tensors)
    return found


_attend.register_autograd(_backward, setup_context=_remember)


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Some heads and a block of their positions, where its keys end, and its softmax `[heads, block, end]`.

    The softmax lies in memory that the next block takes.
    """
    count, length, _ = query.shape
    key = key.transpose(1, 2)
    later = torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=query.dtype).triu(1)
    at_once = max(1, _SCORES // (_BLOCK * length))
    memory = query.new_empty(2, min(at_once, count) * _BLOCK * length)
    for head in range(0, count, at_once):
        some = slice(head, min(head + at_once, count))
        for begin in range(0, length, _BLOCK):
            end = min(begin + _BLOCK, length)
            shape = (some.stop - some.start, end - begin, end)
            size = shape[0] * shape[1] * shape[2]
            scores, shares = (half[:size].view(shape) for half in memory)
            torch.bmm(query[some, begin:end], key[some, :, :end], out=scores)
            scores[:, :, begin:] += later[: end - begin, : end - begin]
            torch.ops.aten._softmax.out(scores, -1, False, out=shares)
            yield some, slice(begin, end), end, shares
