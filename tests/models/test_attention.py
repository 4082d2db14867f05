"""Blocked attention against dense float64 attention, and against whole models with torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MambaConfig, PreTrainedModel, Qwen2Config

from miniplm.models import attention
from miniplm.models.attention import blocked_attention, use_blocked_attention
from miniplm.models.compiled import compile_layers


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


@pytest.mark.parametrize(
    ("heads", "groups", "length", "scores"), [(4, 1, 300, 1 << 22), (4, 2, 256, 1 << 15), (3, 1, 257, 1)]
)
def test_its_gradients_are_those_of_dense_attention(
    heads: int, groups: int, length: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, called as under autocast: queries and keys in float32, as rotary positions leave them."""
    monkeypatch.setattr(attention, "_SCORES", scores)
    draw = torch.Generator().manual_seed(0)
    shapes = {"query": heads, "key": heads // groups, "value": heads // groups}
    given = {name: torch.randn(2, count, length, 16, generator=draw) for name, count in shapes.items()}
    by_out = torch.randn(2, length, heads, 16, generator=draw)
    ours = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = blocked_attention(torch.nn.Module(), **ours, attention_mask=None)
    assert out.dtype == torch.bfloat16
    out.backward(by_out.bfloat16())
    exact = {name: tensor.double().requires_grad_() for name, tensor in given.items()}
    k, v = (exact[name].repeat_interleave(groups, dim=1) for name in ("key", "value"))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    logits = (exact["query"] @ k.transpose(2, 3) / 4).masked_fill(later, -torch.inf)
    (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).backward(by_out.double())
    for name in given:
        slow, found = exact[name].grad, ours[name].grad
        assert slow is not None
        assert found is not None
        assert (found.double() - slow).norm() < 0.02 * slow.norm(), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_model_is_trained_with_it_as_without(config: object) -> None:
    ids = torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(0))
    gradients = []
    for blocked in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).train()
        if blocked:
            use_blocked_attention(model, torch.bfloat16)
            assert model.config._attn_implementation == "miniplm_blocked"
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()
    assert not torch.equal(*gradients), "it was not taken"


def test_in_float32_torchs_is_taken() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[0]), dtype=torch.float32)
    use_blocked_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing torch's compiler causes them
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # also theirs
def test_layers_compiled_one_by_one_with_it_give_the_same_gradients() -> None:
    ids = torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[0]), dtype=torch.float32).train()
        use_blocked_attention(model, torch.bfloat16)
        if compiled:
            compile_layers(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()
