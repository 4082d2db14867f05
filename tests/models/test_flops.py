"""Operations: torch's own counter where it sees everything, and the formulas written out where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from miniplm.models.flops import forward_flops, model_flops, without_weights
from miniplm.models.load import new_model
from miniplm.recipe import GivenModel, ServerModel

V, D, LAYERS, HEADS, FFN = 96, 32, 3, 4, 80
BATCH = 2
SIZES = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
ATTENTION = {**SIZES, "intermediate_size": FFN, "num_attention_heads": HEADS, "attn_implementation": "eager"}
GROUPED = {**ATTENTION, "num_key_value_heads": 2}
GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "attn_implementation": "eager"}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **GROUPED},
    "qwen3, wide heads": {"model_type": "qwen3", **GROUPED, "head_dim": 16},
    "llama, tied": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **ATTENTION},
    "gpt2": {"model_type": "gpt2", **GPT2},
}
N, KERNEL, INNER = 8, 4, 64
SSM = {**SIZES, "state_size": N, "conv_kernel": KERNEL, "expand": 2, "tie_word_embeddings": True}


def counted(config: dict[str, Any], length: int) -> tuple[int, float]:
    """What torch counts in a forward pass over `[BATCH, length]`, and ours."""
    model = new_model(config, 0).eval()
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops(), BATCH * length * forward_flops(model, length)


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("length", [8, 33])
def test_attention_and_linear_layers_cost_what_torch_counts_but_half_of_the_square(family: str, length: int) -> None:
    config = TRANSFORMERS[family]
    theirs, ours = counted(config, length)
    masked = BATCH * length * 2 * length * HEADS * config.get("head_dim", D // HEADS) * LAYERS
    assert theirs == ours + masked


def test_a_mamba_costs_its_layers_and_9_operations_for_each_state() -> None:
    length, rank = 12, 2
    theirs, ours = counted({"model_type": "mamba", **SSM, "time_step_rank": rank}, length)
    linear = D * 2 * INNER + INNER * (rank + 2 * N) + rank * INNER + INNER * D
    token = LAYERS * (2 * linear + 2 * KERNEL * INNER + 9 * INNER * N) + 2 * D * V
    assert ours == BATCH * length * token
    # torch sees of the scan only what comes out of the states; convolutions run over their padding too
    padding = BATCH * (KERNEL - 1) * LAYERS * 2 * KERNEL * INNER
    assert theirs - padding == ours - BATCH * length * LAYERS * 7 * INNER * N


@pytest.mark.parametrize("groups", [1, 2])
def test_a_mamba2_costs_its_layers_and_its_scan_in_chunks(groups: int) -> None:
    heads, chunk, chunks = 8, 16, 3
    config = {
        "model_type": "mamba2", **SSM, "num_heads": heads, "head_dim": INNER // heads, "n_groups": groups,
        "chunk_size": chunk,
    }  # fmt: skip
    theirs, ours = counted(config, chunk * chunks)
    convolved = INNER + 2 * groups * N
    layer = 2 * (D * (INNER + convolved + heads) + INNER * D + KERNEL * convolved)
    half_square = chunk * (groups * N + INNER)
    states = 2 * (2 * INNER * N)
    assert ours == BATCH * chunk * chunks * (LAYERS * (layer + half_square + states) + 2 * D * V)
    # transformers takes the full square, and scores for each head; and its recurrence over chunks is a square too
    more = chunk * chunks * (2 * chunk * (heads * N + INNER) - half_square) + 2 * (chunks + 1) ** 2 * INNER * N
    padding = (KERNEL - 1) * 2 * KERNEL * convolved
    assert theirs == ours + BATCH * LAYERS * (more + padding)


def test_a_text_shorter_than_a_chunk_is_a_chunk_by_itself() -> None:
    config = {"model_type": "mamba2", **SSM, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 256}
    with torch.device("meta"):
        model = new_model(config, 0)
    assert forward_flops(model, 10) - forward_flops(model, 9) == LAYERS * (N + INNER)
    assert forward_flops(model, 1000) == forward_flops(model, 256)


@pytest.mark.parametrize("family", ["llama, tied", "gpt_neox"])
def test_a_model_without_weights_has_the_same_parameters_and_operations(family: str, tmp_path: Path) -> None:
    model = new_model(TRANSFORMERS[family], 0)
    model.save_pretrained(tmp_path)
    given = GivenModel(model=str(tmp_path))
    shape = without_weights(given)
    assert shape is not None
    assert shape.device.type == "meta"
    assert shape.num_parameters() == model.num_parameters()
    assert model_flops(given, 33) == forward_flops(shape, 33) == forward_flops(model, 33)


def test_nothing_is_known_of_a_model_behind_a_server() -> None:
    assert without_weights(ServerModel(server="http://localhost:1/v1", model="m")) is None
