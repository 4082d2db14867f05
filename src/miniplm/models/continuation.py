"""Continuations: a causal language model writes on from prompts, by random numbers that it is given.

In: prompts `[B, P]` and a number in [0, 1) for each token to come, `[B, G]`. Out: the tokens, `[B, G]`. Each is the
inverse of the cumulative distribution, in order of ids, at its number: no generator is asked, so the same prompts,
numbers and models give the same tokens, whoever draws what elsewhere.

What it costs: a forward pass over the prompts and G - 1 over one position each, with a cache; of the prompts, only the
last position's logits. Nothing waits for the device but one check at the end.

Not covered: prompts of different lengths (left padding), devices without float64 (MPS). Low precision: a token may turn
out otherwise in a batch of another size, as logits do.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from miniplm.errors import ModelError

_CACHES = ("past_key_values", "cache_params")  # as attention and state-space models call it, in and out


@torch.no_grad()  # not inference_mode: what is sampled here may be trained on
def continuations(
    model: PreTrainedModel,
    prompts: Tensor,
    uniform: Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    mixed_with: PreTrainedModel | None = None,
    mix: float = 0.0,
    forbidden: Tensor | None = None,
) -> Tensor:
    """Continue each prompt by as many tokens as there are random numbers; int64 `[B, G]`.

    Both models are in evaluation mode meanwhile, and as they were afterwards.

    Args:
        model: q, which writes.
        prompts: `[B, P]` int64 on the models' device, P at least 1.
        uniform: `[B, G]` float32 in [0, 1): what decides each token.
        vocabulary: ids from here on, which pad the logits, are never sampled.
        temperature: by which logits are divided; 0 is the likeliest token.
        top_p: each token is one of the likeliest that together have this share of what is sampled from, or just more.
        mixed_with: p, a second model; tokens are drawn from (1 - mix)·q + mix·p (MiniLLM, arXiv 2306.08543, section
            2.2). `temperature` is of both, `top_p` of the mixture.
        mix: the share of p.
        forbidden: `[vocabulary]` bool, tokens that are never sampled.

    Raises:
        ModelError: some logits are no numbers.

    """
    written = torch.empty_like(uniform, dtype=torch.int64)
    usable = torch.ones((), dtype=torch.bool, device=uniform.device)
    given = prompts
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # or it is compiled for caches as they grow
        q = _Stepping(stack.enter_context(_evaluating(model)))
        p = None if mixed_with is None else _Stepping(stack.enter_context(_evaluating(mixed_with)))
        for position in range(uniform.shape[1]):
            shares = _shares(q(given), vocabulary, temperature, forbidden)
            if p is not None:
                shares = torch.lerp(shares, _shares(p(given), vocabulary, temperature, forbidden), mix)
            if top_p < 1:
                shares = _nucleus(shares, top_p)
            cumulative = shares.cumsum(1, dtype=torch.float64)
            wanted = uniform[:, position, None] * cumulative[:, -1:]
            # the first to exceed it, so none of probability 0; the bound is for logits that are no numbers
            token = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=vocabulary - 1)
            usable &= cumulative[:, -1].isfinite().all()
            written[:, position] = token[:, 0]
            given = token
    if not usable:
        raise ModelError(
            "the model's logits are no numbers.",
            facts={"model": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")},
            remedy="Run it in float32 or bfloat16; float16 overflows on models trained in bfloat16.",
        )
    return written


def uniform_numbers(stream: int, seed: int, places: Sequence[int], count: int) -> NDArray[np.float32]:
    """Random numbers in [0, 1), `[B, count]`; a row depends on the stream, the seed and its place alone.

    Args:
        stream: of whom the numbers are; below 2**64. Other streams have other numbers, whatever the seed and place.
        seed: chosen by the user.
        places: `[B]`, of what each row is for, in an order that nothing changes.
        count: numbers a row.

    """
    generators = (np.random.Philox(key=[seed, place], counter=[0, 0, 0, stream]) for place in places)
    return np.stack([np.random.Generator(bits).random(count, dtype=np.float32) for bits in generators])


class _Stepping:
    """A model that is given tokens piece by piece, with its cache; a call gives the logits after a piece, `[B, V]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # asked of the class: the instance's own `forward` may have been wrapped
        keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.how = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}
        self.cache: dict[str, object] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, **self.cache, **self.how)
        self.cache = {name: output[name] for name in _CACHES if output.get(name) is not None}
        if not self.cache:  # the next token would be given without what is before it
            raise ModelError(f"{type(self.model).__name__} keeps no cache, so it cannot write token by token.")
        logits: Tensor = output.logits[:, -1]
        return logits


def _shares(logits: Tensor, vocabulary: int, temperature: float, forbidden: Tensor | None) -> Tensor:
    """The probabilities of the next token, float32 `[B, vocabulary]`."""
    logits = logits[:, :vocabulary].float()
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    if temperature == 0:
        likeliest = nn.functional.one_hot(logits.argmax(1), vocabulary).float()
        return torch.where(logits.isnan().any(1, keepdim=True), torch.nan, likeliest)
    return torch.softmax(logits / temperature, dim=1)


def _nucleus(shares: Tensor, top_p: float) -> Tensor:
    """The shares with 0 for all but the likeliest tokens that together have `top_p` (arXiv 1904.09751)."""
    ordered, order = shares.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1, dtype=torch.float64) - ordered
    whole = ordered.sum(1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(shares).scatter(1, order, ordered.where(before < top_p * whole, 0.0))


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Evaluation mode, in which there is neither dropout nor gradient checkpointing, which would drop the cache."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
