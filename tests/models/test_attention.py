"""Blocked attention against dense float64 attention, and against whole models with torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MambaConfig, PreTrainedModel, Qwen2Config

from miniplm.models import attention
from miniplm.models.attention import blocked_attention, use_blocked_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "width", "scores"),
    [(2, 4, 1, 300, 32, 1 << 22), (1, 8, 4, 513, 16, 1 << 22), (3, 4, 2, 256, 16, 1 << 15), (1, 3, 1, 257, 8, 1)],
)
def test_it_is_dense_causal_attention(
    batch: int, heads: int, groups: int, length: int, width: int, scores: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "_SCORES", scores)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(batch, length, heads, width, generator=draw).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, heads // groups, length, width, generator=draw).to(dtype) for _ in range(2))
    with torch.no_grad():
        found, _ = blocked_attention(torch.nn.Module(), query, key, value, None)
    k, v = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (key, value))
    logits = query.double() @ k.transpose(2, 3) / width**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    exact = (torch.softmax(logits.masked_fill(later, -torch.inf), dim=-1) @ v).transpose(1, 2)
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().max() < 0.04
    assert (found.double() - exact).abs().mean() < 2e-3


SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = [
    Qwen2Config(num_key_value_heads=2, **SHAPE),
    LlamaConfig(num_key_value_heads=4, **SHAPE),
    GPTNeoXConfig(**SHAPE),
]


def new(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_model_says_with_it_what_it_says_without(config: object) -> None:
    ids = torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(0))
    model = new(config)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        use_blocked_attention(model)
        assert model.config._attn_implementation == "miniplm_blocked"
        after = model(input_ids=ids).logits.float()
    assert not torch.equal(before, after)  # or it would not have been used
    assert (before - after).abs().max() < 0.02 * before.abs().max()


def test_sliding_windows_and_padding_are_left_to_torch() -> None:
    config = Qwen2Config(**SHAPE, num_key_value_heads=4, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    ids = torch.randint(0, 64, (1, 300), generator=torch.Generator().manual_seed(0))
    model = new(config)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        use_blocked_attention(model)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_models_in_float32_or_of_another_kind_stay_as_they_are() -> None:
    wide = new(CONFIGS[0]).float()
    use_blocked_attention(wide)
    assert wide.config._attn_implementation == "sdpa"
    state_space = new(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8))
    use_blocked_attention(state_space)
    with torch.no_grad():
        state_space(input_ids=torch.zeros(1, 300, dtype=torch.int64))
