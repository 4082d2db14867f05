"""A scorer for any `transformers` causal language model.

In: token ids and which targets count. Out: log p in nats, a float64 sum of float32 log-probabilities for each row,
whatever the dtype of the weights. The backbone runs over the batch; the head runs over a block of logits at a time,
so the logits are never held whole (`models/head.py`). On CUDA nothing waits for the device but `result()`: the next
batches are prepared and queued meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from miniplm.errors import ModelError
from miniplm.models.attention import use_blocked_attention
from miniplm.models.compiled import compile_layers
from miniplm.models.flops import forward_flops, matmul_rate
from miniplm.models.head import check_head, compiled_logsumexp, head_of, hidden_states, token_logp
from miniplm.models.load import choose_device, load_model, name_of, own_tokenizer, quantize
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import Compute, GivenModel, ScoreSettings

_IN_FLIGHT = 4
_TOKEN_BUDGET = {"cpu": 4096, "cuda": 32_768}  # measured on CPU (activations in the cache), assumed on CUDA
_LARGE_HEAD = 1 << 24  # weights; below, a shard takes seconds as it is


class HuggingFaceScorer:
    """Scores with a `transformers` model that is already loaded.

    Args:
        model: in evaluation mode, on its device. Raises ModelError if its head is not linear.
        tokenizer: the model's own, where it is known; compared with that of the instances.
        name: what provenance calls it.
        compiled: use `torch.compile`: for the backbone on CUDA, for the head's log-sum-exp on CPU, where compiling the
            backbone gains nothing (NOTES.md).
        quantized: whether its linear layers multiply in fewer bits than its head.

    """

    in_flight = _IN_FLIGHT

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None = None,
        name: str = "a model in memory",
        compiled: bool = False,
        quantized: bool = False,
    ) -> None:
        check_head(model)
        use_blocked_attention(model)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.token_budget = _TOKEN_BUDGET.get(model.device.type, 16_384)
        self.weight, self.bias = head_of(model)
        if not quantized:  # there is no rate to compare a mixture of types with
            self.ceiling: Callable[[], float] = cache(lambda: matmul_rate(model.device, self.weight.dtype))
        self.logsumexp = compiled_logsumexp() if compiled and model.device.type == "cpu" else None
        if compiled and model.device.type == "cuda":
            compile_layers(model)

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return dict(self.model.config.to_dict())

    @property
    def vocab_size(self) -> int:
        """Embeddings of the model, padding included."""
        return int(self.model.config.get_text_config().vocab_size)

    def flops_per_token(self, sequence_length: int) -> float:
        """Operations of a forward pass per predicted token."""
        return forward_flops(self.model, sequence_length)

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See `Scorer.score`."""
        return self.submit(tokens, counted).result()

    @torch.inference_mode()
    def submit(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> _OnDevice:
        """Queue a batch; on a CPU this computes it."""
        device = self.model.device
        ids = _to(torch.from_numpy(tokens.astype(np.int64)), device)
        mask = _to(torch.from_numpy(counted), device)
        hidden = hidden_states(self.model, ids[:, :-1]).flatten(0, 1)
        logp = token_logp(hidden, self.weight, self.bias, ids[:, 1:].flatten(), self.logsumexp).view(mask.shape)
        return _OnDevice(torch.where(mask, logp.double(), 0.0).sum(dim=1))


class _OnDevice:
    """An answer that is computed on a device while the host goes on."""

    def __init__(self, summed: torch.Tensor) -> None:
        self.event = torch.cuda.Event() if summed.is_cuda else None  # type: ignore[no-untyped-call]
        self.summed = summed.to("cpu", non_blocking=True)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(summed.device))

    def result(self) -> NDArray[np.float64]:
        """Wait for this answer, not for those queued after it."""
        if self.event is not None:
            self.event.synchronize()
        return np.asarray(self.summed.numpy())


def load(given: GivenModel, settings: ScoreSettings, compute: Compute) -> HuggingFaceScorer:
    """Load a model and make a scorer of it. Raises ModelError if it cannot be loaded or used."""
    device = choose_device(compute.device)
    if device.type not in {"cpu", "cuda"}:
        raise ModelError(
            f"scoring does not run on {device.type}: it needs float64 sums.", remedy="Use `device: cpu` or `cuda`."
        )
    model = load_model(given, settings.dtype, str(device))
    if settings.quantize != "none":
        quantize(model, settings.quantize)
    compiled = _pays(model) if compute.compile == "auto" else compute.compile
    return HuggingFaceScorer(
        model, own_tokenizer(given), name_of(given), compiled, quantized=settings.quantize != "none"
    )


def _pays(model: PreTrainedModel) -> bool:
    """Whether compiling gains more than its seconds cost: on CUDA, and on CPU with a large head and a C++ compiler."""
    large = head_of(model)[0].numel() >= _LARGE_HEAD
    return model.device.type == "cuda" or (large and shutil.which("c++") is not None)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
