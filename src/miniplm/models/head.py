"""The output head, a chunk of positions at a time: log-probabilities without the logits.

A model is used as backbone (ids -> hidden states `[N, D]`) and head (a `[V, D]` matrix). The logits `[N, V]` of a batch
of 16 x 1,024 positions and 151,936 tokens are 10 GB in float32; here at most a block of them exists at once.

Why not `torch.nn.functional.linear_cross_entropy`: with bfloat16 inputs torch 2.13 on CPU returned 8.0 for a loss of
12.55 (V = 151,936; it sums in the input's dtype), took 5 to 10 times as long there, and torch 2.11 does not have it.
*Measured 2026-11-20, NOTES.md.*
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from miniplm.errors import ModelError

_BLOCK = (1024, 2048)  # positions and tokens of the vocabulary at once when scoring on CPU: 4 MB of logits in bfloat16
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits at once; measured on CPU (L2-sized), assumed on CUDA
_SMALLEST_CHUNK_ROWS = 256  # below, the gradient of the head is read and written too often
_LOUD = 100.0  # to which the largest logit is raised for the check: a new model's are too small to show a soft cap
_HEAD_TOLERANCE = 0.02  # of the largest logit; bfloat16 has 3 digits, a soft cap or a logit scale is far beyond it


def hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The backbone's last hidden states, `[B, T, D]` for ids `[B, T]`. Attention is causal over the whole row."""
    hidden: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def head_of(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The head's weight `[V, D]` and bias `[V]`.

    Raises:
        ModelError: the model has no linear head.

    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear output head.", facts={"found": type(head).__name__})
    return head.weight, head.bias


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Make sure that head(backbone(x)) are the model's own logits, on eight tokens.

    Some architectures cap, scale or shift their logits after the head; scored in our way they would be wrong in
    silence.

    Raises:
        ModelError: they are not.

    """
    ids = torch.arange(8, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    weight, bias = head_of(model)
    plain = nn.functional.linear(hidden_states(model, ids).to(weight.dtype), weight, bias)
    found = _loud(plain).float()
    head_gave: list[Tensor] = []

    def make_loud(head: nn.Module, given: object, logits: Tensor) -> Tensor:
        head_gave.append(logits)
        return _loud(logits)

    hook = model.get_output_embeddings().register_forward_hook(make_loud)
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
        model.train(was_training)
    # a scale between backbone and head shows before the logits are made loud, a cap after
    in_front = (plain - head_gave[0]).abs().max() > _HEAD_TOLERANCE * plain.abs().max()
    if (difference := (found - expected).abs().max()) > _HEAD_TOLERANCE * _LOUD or in_front:
        raise ModelError(
            f"{type(model).__name__} does more to its logits than a linear head.",
            facts={
                "largest difference": "hidden states are scaled on the way" if in_front else f"{difference:.3g} nats",
                "expected": "logits = hidden states x weight + bias",
            },
            remedy="Such models (soft-capped or scaled logits) cannot be used yet.",
        )


def _loud(logits: Tensor) -> Tensor:
    return logits * (_LOUD / logits.abs().max().clamp(min=1e-6))


LogSumExp = Callable[[Tensor], Tensor]
"""From logits `[n, v]`, in any floating-point type, to float32 `[n]`."""


def compiled_logsumexp() -> LogSumExp | None:
    """One pass over the logits instead of three; None where `torch.compile` does not work (no C++ compiler, say).

    A sixth off the head's time on CPU. *Measured 2026-11-20, NOTES.md.*
    """
    found: LogSumExp = torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=1), dynamic=True)
    try:
        found(torch.zeros(2, 3, dtype=torch.bfloat16))
    except Exception:  # whatever a compiler, its headers or its temporary folder lack: what it would have saved is time
        return None
    return found


@torch.no_grad()
def token_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logsumexp: LogSumExp | None = None
) -> Tensor:
    """Log p of each target in nats, float32 `[N]`, from hidden states `[N, D]`.

    Products are accumulated in float32 whatever the dtype of the model is, and the logits are never rounded to it on
    CUDA. On CPU, products of bfloat16 come back in bfloat16, which is 0.06 nats at a logit of 20. So the target's own
    logit is computed first, in float32, and taken from all others *before* they are rounded: what is left is near 0
    where it matters, and the error of log p is about its 256th part at most, to either side.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`.
        bias: `[V]` or None.
        targets: `[N]`, int64.
        logsumexp: for blocks of logits on CPU; None computes it step by step.

    """
    if weight.is_cuda:
        return _token_logp_cuda(hidden.to(weight.dtype), weight, bias, targets)
    logp = torch.empty(len(targets), dtype=torch.float32)
    logsumexp = logsumexp or _logsumexp_stepwise()
    rows, columns = _BLOCK
    block = torch.empty(rows * columns, dtype=weight.dtype)
    for begin in range(0, len(targets), rows):
        chunk = slice(begin, begin + rows)
        logp[chunk] = _token_logp_cpu(hidden[chunk].to(weight.dtype), weight, bias, targets[chunk], logsumexp, block)
    return logp


def _token_logp_cpu(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logsumexp: LogSumExp, block: Tensor
) -> Tensor:
    """As `token_logp`, for as many positions as a block has rows; the vocabulary goes by in blocks of columns."""
    picked = (hidden.float() * weight[targets].float()).sum(dim=1)
    if bias is not None:
        picked += bias[targets].float()
    shift = picked.to(weight.dtype)
    exact = weight.dtype == torch.float32
    total = torch.full_like(picked, -torch.inf)
    for begin in range(0, len(weight), _BLOCK[1]):
        part = weight[begin : begin + _BLOCK[1]]
        if bias is None:
            out = block[: len(hidden) * len(part)].view(len(hidden), len(part))
            logits = torch.addmm(-shift[:, None], hidden, part.T, out=out)
        else:  # a bias would be rounded together with the shift
            logits = hidden.float() @ part.float().T + bias[begin : begin + _BLOCK[1]].float() - shift[:, None].float()
        total = torch.logaddexp(total, logsumexp(logits))
    return -total if exact else (picked - shift.float()) - total


def _logsumexp_stepwise() -> LogSumExp:
    """Through log_softmax, which is one fused loop, into memory that is taken once."""
    memory = torch.empty(_BLOCK[0] * _BLOCK[1], dtype=torch.float32)

    def logsumexp(logits: Tensor) -> Tensor:
        out = memory[: logits.numel()].view(logits.shape)
        torch.ops.aten.log_softmax.int_out(logits, 1, torch.float32, out=out)
        return logits[:, 0].float() - out[:, 0]

    return logsumexp


def _token_logp_cuda(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logp = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    rows = chunk_rows(hidden, weight)
    for begin in range(0, len(targets), rows):
        chunk = slice(begin, begin + rows)
        if weight.dtype == torch.float32:
            logits = hidden[chunk] @ weight.T
        else:
            logits = torch.mm(hidden[chunk], weight.T, out_dtype=torch.float32)
        if bias is not None:
            logits += bias
        logp[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1) - torch.logsumexp(logits, dim=1)
    return logp


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """How many positions go through the head `[V, D]` at once, on the device of the hidden states."""
    return max(_SMALLEST_CHUNK_ROWS, _CHUNK_ELEMENTS.get(hidden.device.type, 1 << 24) // len(weight))
