"""Floating-point operations of a model, counted from its layers.

A forward pass costs, for each token:

    linear layers     2 for each weight, the head included, look-ups not
    convolutions      2 for each weight: each output channel of Mamba's has a kernel of its own
    attention         2·T·(heads × head width) in each layer, for the scores and the mixing of values: under a causal
                      mask, half of the full square
    Mamba's scan      9·D·N in each layer, of inner width D and state N: discretisation, recurrence, output (A. Gu,
                      github.com/state-spaces/mamba/issues/110)
    Mamba-2's scan    Q·(G·N + D) + 4·D·N in each layer, of G groups: in chunks of Q tokens, half of the square of
                      scores and of their mixing, then the chunk's state in and out (Dao and Gu 2024, arXiv 2405.21060,
                      section 6; the recurrence over chunks, 2·D·N/Q, is left out)

It is what must be computed, by whatever code: transformers' own path for Mamba-2, say, takes the full square for each
head. Norms, activations and softmax are not counted, nor are linear attention's other kinds (gated delta nets). A
training step costs three forward passes (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from miniplm.models.load import hub_commit
from miniplm.recipe import GivenModel, ScoredModel, ServerModel

TRAINING_PASSES = 3


def forward_flops(model: PreTrainedModel, sequence_length: int) -> float:
    """Operations of a forward pass per predicted token, at this sequence length."""
    head = model.get_output_embeddings()
    weights = {id(m): m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, Conv1D))}
    weights.setdefault(id(head), head.weight.numel() if isinstance(head, nn.Linear) else 0)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = 2 * sequence_length * width * config.num_hidden_layers
    scans = sum(_scan_flops(module, sequence_length) for module in model.modules())
    return float(2 * sum(weights.values()) + attention + scans)


def _scan_flops(mixer: nn.Module, sequence_length: int) -> int:
    """Operations per token of what a state-space layer does beside its projections; 0 for any other module."""
    decay = getattr(mixer, "A_log", None)
    if not isinstance(decay, nn.Parameter) or not hasattr(mixer, "ssm_state_size"):
        return 0
    inner, state = int(mixer.intermediate_size), int(mixer.ssm_state_size)  # type: ignore[arg-type]
    if decay.ndim == 2:  # Mamba: a decay for each channel and state
        return 9 * inner * state
    chunk = min(int(mixer.chunk_size), sequence_length)  # type: ignore[arg-type]
    return chunk * (int(mixer.n_groups) * state + inner) + 4 * inner * state  # type: ignore[arg-type]


@torch.inference_mode()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product here and now: the best of several, about 0.1 s in all."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    synchronize: Callable[[], object] = (
        partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    )
    best = float("inf")
    for _ in range(6):  # the first one warms up
        synchronize()
        begun = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def model_flops(model: ScoredModel, sequence_length: int) -> float | None:
    """Operations of a forward pass per predicted token, from the config alone; None for a model behind a server."""
    shape = without_weights(model)
    return None if shape is None else forward_flops(shape, sequence_length)


def without_weights(model: ScoredModel) -> PreTrainedModel | None:
    """A given model on the meta device, from its config alone; None for a model behind a server.

    Raises:
        ModelError: it is neither a folder nor to be had from the Hub.

    """
    if isinstance(model, ServerModel):
        return None
    given = model if isinstance(model, GivenModel) else GivenModel(model=model.vllm, revision=model.revision)
    folder = Path(given.model).expanduser()
    trusted = {"trust_remote_code": model.trust_remote_code}
    revision = None if folder.is_dir() else hub_commit(given)
    config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else given.model, revision=revision, **trusted)
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, **trusted)
    return made
