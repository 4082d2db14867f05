"""Families: each small preset is made well, learns, and is read by transformers as it was trained."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from miniplm.errors import ModelError
from miniplm.models.head import check_head
from miniplm.models.load import new_model
from miniplm.recipe import TrainSettings
from miniplm.training.objectives import Batch, NextToken
from miniplm.training.presets import resolve

FAMILIES = ["qwen-1m", "qwen3-1m", "llama-1m", "neox-1m", "mamba-1m", "mamba2-1m"]
TOKENS, T = 500, 16


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


def made(name: str) -> PreTrainedModel:
    config = resolve(TrainSettings(preset=name, tokens=1000), TOKENS, 0).config
    assert config is not None
    return new_model(config, 0)


def repetitive() -> Batch:
    """Four instances of one text of five tokens."""
    ids = torch.from_numpy(np.resize([7, 3, 11, 250, 499], (4, T + 1)))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "weights": None, "positions": torch.arange(4)}


def transformers_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Its own cross entropy: labels are the inputs, shifted inside."""
    ids = torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1)
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_model_knows_nothing_and_has_a_head_that_is_linear(name: str) -> None:
    model = made(name)
    check_head(model)
    ids = torch.randint(0, TOKENS, (4, T + 1), generator=torch.Generator().manual_seed(0))
    batch: Batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "weights": None, "positions": torch.arange(4)}
    with torch.no_grad():
        loss, _ = NextToken().loss(model, batch)
    assert loss.item() == pytest.approx(math.log(model.config.vocab_size), abs=0.3)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_by_the_loss_that_transformers_computes_and_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    model, batch, losses = made(name), repetitive(), []
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(3):
        loss, _ = NextToken().loss(model, batch)
        with torch.no_grad():
            assert loss.item() == pytest.approx(transformers_loss(model, batch).item(), rel=1e-5)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]

    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = batch["input_ids"][:1]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=prompt).logits, model(input_ids=prompt).logits)
    written = loaded.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, T + 5)
    assert torch.equal(written[:, :T], prompt)


@pytest.mark.parametrize("name", ["mamba-1m", "mamba2-1m"])
def test_a_state_space_model_begins_with_slow_and_stable_states(name: str) -> None:
    model = made(name)
    for name, value in model.named_parameters():
        kind = name.rpartition("mixer.")[2]
        if kind == "A_log":  # 1 to N for each channel, or 1 to the number of heads
            assert torch.equal(value.exp().round(), torch.arange(1, value.shape[-1] + 1).expand_as(value))
        elif kind in ("dt_bias", "dt_proj.bias"):
            steps = torch.nn.functional.softplus(value)
            assert 0.9e-3 < steps.min() < steps.max() < 0.11
        elif kind == "D":
            assert (value == 1).all()
        elif kind in ("in_proj.weight", "x_proj.weight") or "embeddings" in name:
            assert value.std().item() == pytest.approx(0.02, rel=0.05)


def test_rotary_positions_of_neox_turn_a_quarter_of_each_head() -> None:
    config = made("neox-1m").config
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert config.rope_parameters["rope_theta"] == 10_000


# Any other config


def test_a_config_of_another_family_trains_too() -> None:
    given = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = resolve(TrainSettings(config=given, tokens=1000, learning_rate=1e-3, batch_tokens=64), TOKENS, 0).config
    assert config is not None
    model = new_model(config, 0)
    check_head(model)
    model.eval()  # no dropout
    loss, _ = NextToken().loss(model, repetitive())
    assert loss.item() == pytest.approx(transformers_loss(model, repetitive()).item(), rel=1e-5)


def test_a_config_whose_logits_are_capped_is_refused() -> None:
    given = {
        "model_type": "gemma2", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    with pytest.raises(ModelError, match="more to its logits"):
        check_head(new_model(given, 0))
