"""Floating-point operations of a model, counted from its layers.

A forward pass costs, for each token, 2 operations for each weight of each linear layer (the head included, look-ups
not), and 2·T·(heads × head width) in each attention layer for the scores and the mixing of values: under a
causal mask, half of the full square. A training step costs three forward passes (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1).
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
    linear = {id(m): m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    linear.setdefault(id(head), head.weight.numel() if isinstance(head, nn.Linear) else 0)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    return float(2 * sum(linear.values()) + 2 * sequence_length * width * config.num_hidden_layers)


def training_flops(model: PreTrainedModel, sequence_length: int, tokens: int) -> float:
    """Operations of training on so many predicted tokens."""
    return TRAINING_PASSES * forward_flops(model, sequence_length) * tokens


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
    if isinstance(model, ServerModel):
        return None
    given = model if isinstance(model, GivenModel) else GivenModel(model=model.vllm, revision=model.revision)
    folder = Path(given.model).expanduser()
    trusted = {"trust_remote_code": model.trust_remote_code}
    revision = None if folder.is_dir() else hub_commit(given)
    config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else given.model, revision=revision, **trusted)
    with torch.device("meta"):
        return forward_flops(AutoModelForCausalLM.from_config(config, **trusted), sequence_length)
