"""The losses, a chunk of positions at a time: no model's distribution over the vocabulary is ever held whole.

In: hidden states `[N, D]` and head `[V, D]` of the student; for distillation hidden states `[N, E]` and head `[U, E]`
of the teacher. Out: scalars in nats, with gradients to the student's hidden states and head; the teacher gets none.

    cross_entropy  -log q of the targets: next-token training (paper, Eq. 5)
    distillation   (1 - share) * CE + share * H(p, q): Vanilla KD (paper section 4)
    reverse_kl     KL(q || p): the single-step term of MiniLLM (Gu et al. 2024, arXiv 2306.08543)

Cost: three products with the student's head and one with the teacher's. Memory: a chunk of the models' logits in their
own dtypes, and the gradient of the head in float32. All other float32 goes by in strips of a few rows, and the gradient
by the logits is written over the logits: on CPU a strip stays in the cache, while taking large memory anew for every
chunk costs more than the arithmetic on it. At V = 151,936 a row of `log_softmax` takes 0.08 ms in strips of 1 to 48
rows and 0.30 ms in a block of 96; adding 256 rows to the gradient of a head 512 wide takes 0.10 s in strips and 0.22 s
in one. *Measured 2026-11-21, one core, bfloat16.*

Not covered: logits are rounded to the dtype of their model, as a linear layer's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from miniplm.errors import ModelError
from miniplm.models.head import chunk_rows

# float32 at once; on CPU for each thread
_STRIP_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}  # measured on CPU (cache), assumed on CUDA


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean negative log p of the targets in nats: a float32 scalar with gradients to hidden states and head.

    Args:
        hidden: `[N, D]`; under autocast the products are taken in autocast's dtype, as a linear layer's are.
        weight: `[V, D]`.
        bias: `[V]` or None.
        targets: `[N]`, int64.
        weights: `[N]`, what each target weighs: summing to 1 for a mean, or any numbers, below 0 too, for another sum.
            None weighs all alike.

    """
    return _by_chunks(hidden, weight, bias, len(weight), None, _CrossEntropy(targets), weights)[0]


def distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    share: float = 0.5,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of Vanilla KD, (1 - share) * CE + share * H(p, q), as a weighted mean over positions (paper section 4).

    CE is -log q of the target at temperature 1; H(p, q) = -sum_v p_v log q_v, with both distributions at `temperature`,
    which is KL(p || q) but for the teacher's entropy. At a temperature other than 1 the second term is multiplied by
    its square, so that its gradient stays as large as it was (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Padding of the heads beyond the tokenizer: p is over the first `vocabulary` tokens, and sums to 1 over them. q is
    over all V logits of the student in *both* terms. CE is then what it is without distillation, and both terms push
    the student's padding down, where a q over the tokenizer's tokens alone would give padding no gradient at all. The
    second term is larger by -log(q's mass on the tokenizer's tokens) than with such a q; its minimum is the same.

    Args:
        hidden: `[N, D]`; under autocast the student's products are taken in autocast's dtype.
        weight: `[V, D]`.
        bias: `[V]` or None.
        teacher_hidden: `[N, E]`; taken in the dtype of the teacher's head, under autocast too.
        teacher_weight: `[U, E]`.
        teacher_bias: `[U]` or None.
        targets: `[N]`, int64, below `vocabulary`.
        weights: `[N]`, what each position weighs in the mean, summing to 1; None weighs all alike.
        share: of the teacher's term in the loss, 0 to 1; the reference code's default is 0.5.
        temperature: by which the logits are divided in the teacher's term, above 0.
        vocabulary: how many tokens the tokenizer has; V and U may be padded beyond it. None: V and U are the same.

    Returns:
        The loss, a float32 scalar with gradients to `hidden`, `weight` and `bias`; and, to be logged, CE and the
        teacher's term (with the square of the temperature, without the share), float32 scalars without gradients.

    Raises:
        ModelError: V or U is smaller than `vocabulary`, or they differ and `vocabulary` is None.

    """
    compared = _compared(vocabulary, weight, teacher_weight)
    teacher = _teacher(teacher_hidden, teacher_weight, teacher_bias, compared)
    term = _Distillation(targets, share, temperature)
    loss, (cross_entropy, teacher_term) = _by_chunks(hidden, weight, bias, len(weight), teacher, term, weights)
    return loss, cross_entropy, teacher_term


def reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    weights: Tensor | None = None,
    *,
    vocabulary: int | None = None,
) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v) in nats, as a weighted mean over positions.

    Student's q and teacher's p are both over the first `vocabulary` tokens, and sum to 1 over them: a p of 0 at a
    padding token would make it infinite. The student's padding gets no gradient.

    Args:
        hidden: `[N, D]`; under autocast the student's products are taken in autocast's dtype.
        weight: `[V, D]`.
        bias: `[V]` or None.
        teacher_hidden: `[N, E]`; taken in the dtype of the teacher's head, under autocast too.
        teacher_weight: `[U, E]`.
        teacher_bias: `[U]` or None.
        weights: `[N]`, what each position weighs in the mean, summing to 1; None weighs all alike.
        vocabulary: how many tokens the tokenizer has; V and U may be padded beyond it. None: V and U are the same.

    Returns:
        A float32 scalar with gradients to `hidden`, `weight` and `bias`.

    Raises:
        ModelError: V or U is smaller than `vocabulary`, or they differ and `vocabulary` is None.

    """
    compared = _compared(vocabulary, weight, teacher_weight)
    teacher = _teacher(teacher_hidden, teacher_weight, teacher_bias, compared)
    return _by_chunks(hidden, weight, bias, compared, teacher, _ReverseKL(), weights)[0]


def _compared(vocabulary: int | None, weight: Tensor, teacher_weight: Tensor) -> int:
    """How many tokens, from the first on, both models have and the tokenizer can give."""
    facts = {"student": f"{len(weight):,} tokens", "teacher": f"{len(teacher_weight):,} tokens"}
    if vocabulary is None:
        if len(weight) != len(teacher_weight):
            raise ModelError(
                "student and teacher have vocabularies of different sizes.",
                facts=facts,
                remedy="If the rest is padding, say how many tokens the tokenizer has; else they cannot be compared.",
            )
        return len(weight)
    if not 0 < vocabulary <= min(len(weight), len(teacher_weight)):
        raise ModelError(
            "the tokenizer's vocabulary exceeds that of the student or of the teacher.",
            facts={"tokenizer": f"{vocabulary:,} tokens", **facts},
            remedy="Distillation compares token by token: use models and tokenizer of one family.",
        )
    return vocabulary


@dataclass(frozen=True, slots=True)
class _Teacher:
    """Without graph and in one dtype. hidden: `[N, E]`; weight: `[U, E]` and bias: `[U]`, of compared tokens only."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _teacher(hidden: Tensor, weight: Tensor, bias: Tensor | None, compared: int) -> _Teacher:
    dtype = weight.dtype
    return _Teacher(
        hidden.detach().to(dtype),
        weight.detach()[:compared],
        None if bias is None else bias.detach()[:compared].to(dtype),
    )


class _Term(Protocol):
    """What is summed over positions, from a strip of `n` positions' logits."""

    @property
    def mixture(self) -> tuple[float, ...]:
        """What each of the K values counts in the loss."""

    def at(
        self, logits: Tensor, teacher_logits: Tensor | None, strip: slice, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The values, float32 `[n, K]`, and the gradient of their mixture by the logits, float32 `[n, V]`."""


@dataclass(frozen=True, slots=True)
class _CrossEntropy:
    """CE alone, without a teacher. targets: `[N]`."""

    targets: Tensor

    @property
    def mixture(self) -> tuple[float, ...]:
        return (1.0,)

    def at(
        self, logits: Tensor, teacher_logits: Tensor | None, strip: slice, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        target = self.targets[strip, None]
        logq = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        values = -logq.gather(1, target)
        if not needs_grad:
            return values, None
        return values, logq.exp_().scatter_add_(1, target, logq.new_full(target.shape, -1.0))


@dataclass(frozen=True, slots=True)
class _Distillation:
    """CE and H(p, q). targets: `[N]`."""

    targets: Tensor
    share: float
    temperature: float

    @property
    def mixture(self) -> tuple[float, ...]:
        return 1 - self.share, self.share

    def at(
        self, logits: Tensor, teacher_logits: Tensor | None, strip: slice, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher_logits is not None
        share, heat, target = self.share, self.temperature, self.targets[strip, None]
        logq = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        softened = logq
        if heat != 1:
            softened = torch.log_softmax(logits.float() / heat, dim=1)
            teacher_logits = teacher_logits.float() / heat
        p = torch.softmax(teacher_logits, dim=1, dtype=torch.float32)
        shared = softened[:, : p.shape[1]]  # the teacher gives no probability to what is beyond
        values = torch.stack([-logq.gather(1, target).squeeze(1), (p * shared).sum(dim=1) * -(heat**2)], dim=1)
        if not needs_grad:
            return values, None
        gradient = logq.exp_()
        if heat == 1:  # (1 - share) (q - target) + share (q - p), of which q is one
            shared.sub_(p, alpha=share)
        else:  # of the square of the temperature one is lost to the logits' division
            softened.exp_()
            shared.sub_(p)
            gradient.mul_(1 - share).add_(softened, alpha=share * heat)
        return values, gradient.scatter_add_(1, target, gradient.new_full(target.shape, share - 1))


@dataclass(frozen=True, slots=True)
class _ReverseKL:
    """KL(q || p)."""

    @property
    def mixture(self) -> tuple[float, ...]:
        return (1.0,)

    def at(
        self, logits: Tensor, teacher_logits: Tensor | None, strip: slice, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher_logits is not None
        logq = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        surplus = torch.log_softmax(teacher_logits, dim=1, dtype=torch.float32).neg_().add_(logq)
        q = logq.exp_()
        kl = (q * surplus).sum(dim=1, keepdim=True)
        return kl, surplus.sub_(kl).mul_(q) if needs_grad else None


def _by_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: int,
    teacher: _Teacher | None,
    term: _Term,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss and, float32 `[K]`, the means it is mixed of; of the student only the first `tokens` logits count."""
    assert teacher is None or len(hidden) == len(teacher.hidden), "student and teacher have seen different positions"
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    with torch.autocast(kind, enabled=False):
        loss, means = _ByChunks.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            tokens,
            teacher,
            term,
            weights,
            needs_grad,  # `ctx.needs_input_grad` does not know of no_grad, and in `forward` gradients are always off
        )
    return loss, means


class _ByChunks(torch.autograd.Function):
    """Loss and gradients in one pass over chunks; the backward pass only scales what the forward pass made.

    What is kept between them is N times the gradient of the mean: its entries are then of the size of probabilities,
    and those of a large batch do not vanish in float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: int,
        teacher: _Teacher | None,
        term: _Term,
        weights: Tensor | None,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        head, offset = weight[:tokens], None if bias is None else bias[:tokens]
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        rows = min(len(hidden), chunk_rows(hidden, head))
        memory = hidden.new_empty(rows, tokens)
        teacher_memory = None if teacher is None else teacher.hidden.new_empty(rows, len(teacher.weight))
        values = []
        for begin in range(0, len(hidden), rows):
            chunk = slice(begin, min(begin + rows, len(hidden)))
            part = hidden[chunk]
            logits = _linear(part, head, offset, memory)
            told = None
            if teacher is not None and teacher_memory is not None:
                told = _linear(teacher.hidden[chunk], teacher.weight, teacher.bias, teacher_memory)
            for strip in _strips(logits):
                where = slice(begin + strip.start, begin + strip.stop)
                value, gradient = term.at(logits[strip], None if told is None else told[strip], where, needs_grad)
                values.append(value)
                if gradient is None:
                    continue
                if weights is not None:
                    gradient *= weights[where, None] * len(hidden)
                if bias_grad is not None:
                    bias_grad[:tokens] += gradient.sum(dim=0)
                logits[strip] = gradient
            if hidden_grad is None or weight_grad is None:
                continue
            torch.mm(logits, head, out=hidden_grad[chunk])
            for columns in _strips(head):
                weight_grad[columns] += logits[:, columns].T @ part
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtype = weight.dtype
        each = torch.cat(values).double()
        means = each.mean(dim=0) if weights is None else (each * weights[:, None]).sum(dim=0)
        loss = (means * means.new_tensor(term.mixture)).sum().float()
        means = means.float()
        ctx.mark_non_differentiable(means)
        return loss, means

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        scale = scale / len(hidden_grad)
        by_weight = torch.empty_like(weight_grad, dtype=ctx.dtype)
        for strip in _strips(weight_grad):
            by_weight[strip] = weight_grad[strip] * scale
        by_bias = None if bias_grad is None else (bias_grad * scale).to(ctx.dtype)
        return (hidden_grad * scale).to(hidden_grad.dtype), by_weight, by_bias, None, None, None, None, None


def _linear(part: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor) -> Tensor:
    """The logits of a chunk, in memory that is taken once."""
    out = memory[: len(part)]
    return torch.mm(part, weight.T, out=out) if bias is None else torch.addmm(bias, part, weight.T, out=out)


def _strips(matrix: Tensor) -> list[slice]:
    """The rows of a matrix, a few at a time for each thread: all of them wait for each other after each operation."""
    count, width = matrix.shape
    rows = max(1, _STRIP_ELEMENTS.get(matrix.device.type, 1 << 24) // width)
    if matrix.device.type == "cpu":
        rows *= torch.get_num_threads()
    return [slice(begin, min(begin + rows, count)) for begin in range(0, count, rows)]
