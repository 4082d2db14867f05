"""Presets: the published parameter counts, the vocabulary rule, and what a recipe may leave out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from miniplm.errors import ModelError, RecipeError
from miniplm.models.load import new_model
from miniplm.recipe import TrainSettings
from miniplm.training.presets import PRESETS, preset, resolve

QWEN_TOKENS, LLAMA_TOKENS, FALCON_TOKENS = 151_646, 128_256, 65_024  # of the published tokenizers
QWEN3_TOKENS, NEOX_TOKENS = 151_669, 50_277
PUBLISHED = {  # millions, as the paper or the size of the published checkpoint says, with the digits it says
    "qwen-45m": (QWEN_TOKENS, "45.3"),
    "qwen-104m": (QWEN_TOKENS, "103.50"),
    "qwen-200m": (QWEN_TOKENS, "203.44"),
    "qwen-300m": (QWEN_TOKENS, "246.8"),
    "qwen-500m": (QWEN_TOKENS, "463.99"),
    "qwen-1.2b": (QWEN_TOKENS, "1160.6"),
}
PUBLISHED_EXACTLY = {
    "llama-212m": (LLAMA_TOKENS, 211_766_016),
    "mamba-130m": (FALCON_TOKENS, 140_458_752),
    "mamba2-130m": (NEOX_TOKENS, 128_989_632),  # of its layers' shapes; "130m"
    "neox-160m": (NEOX_TOKENS, 162_322_944),  # arXiv 2304.01373, table 1
    # those of qwen-200m, with a norm for queries and keys of each layer instead of biases
    "qwen3-200m": (QWEN3_TOKENS, 203_437_824 + 12 * (2 * 64 - 3 * 768)),
}
CPU_PRESETS = {
    "qwen-0.5m": 0.5, "qwen-1m": 1.0, "qwen-2m": 2.0, "qwen-3m": 3.0, "qwen-5m": 5.0,
    "qwen3-1m": 1.0, "llama-1m": 1.0, "neox-1m": 1.0, "mamba-1m": 1.0, "mamba2-1m": 1.0,
}  # fmt: skip


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(tokens=1_000_000, **given)


def resolved(name: str, tokens: int) -> dict[str, Any]:
    config = resolve(settings(preset=name), tokens, 0).config
    assert config is not None
    return config


def parameters(name: str, tokens: int) -> int:
    """Of the model that is trained, shared matrices once; on the meta device, so without its memory."""
    with torch.device("meta"):
        model = new_model(resolved(name, tokens), 0)
    distinct = {id(p): p.numel() for p in model.parameters()}
    assert sum(distinct.values()) == model.num_parameters()
    return sum(distinct.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_paper_preset_has_the_published_number_of_parameters(name: str) -> None:
    tokens, millions = PUBLISHED[name]
    digits = len(millions.partition(".")[2])
    assert f"{parameters(name, tokens) / 1e6:.{digits}f}" == millions


@pytest.mark.parametrize("name", PUBLISHED_EXACTLY)
def test_a_preset_whose_checkpoint_is_published_has_exactly_its_parameters(name: str) -> None:
    tokens, count = PUBLISHED_EXACTLY[name]
    assert parameters(name, tokens) == count


@pytest.mark.parametrize("name", CPU_PRESETS)
def test_a_preset_for_cpus_is_about_the_size_in_its_name_with_the_quickstarts_vocabulary(name: str) -> None:
    assert 0.9 < parameters(name, 4096) / 1e6 / CPU_PRESETS[name] < 1.4


def test_every_preset_is_in_one_of_these_tables() -> None:
    assert set(PRESETS) == set(PUBLISHED) | set(PUBLISHED_EXACTLY) | set(CPU_PRESETS)


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [
        ("qwen-104m", 6e-4), ("qwen-200m", 6e-4), ("qwen-300m", 6e-4), ("qwen-500m", 3e-4), ("qwen-1.2b", 2.5e-4),
        ("llama-212m", 6e-4), ("mamba-130m", 2e-3), ("qwen3-200m", 6e-4), ("neox-160m", 6e-4), ("mamba2-130m", 2e-3),
    ],
)  # fmt: skip
def test_a_paper_preset_has_the_papers_peak_learning_rate_and_batch(name: str, learning_rate: float) -> None:
    found = resolve(settings(preset=name), QWEN_TOKENS, 0)
    assert found.learning_rate == learning_rate
    assert found.batch_tokens == 512 * 1024


@pytest.mark.parametrize(
    ("name", "tokens", "vocab_size"),
    [
        ("qwen-200m", QWEN_TOKENS, 151_936),
        ("qwen-200m", 151_936, 151_936),
        ("qwen-200m", 151_937, 152_064),
        ("qwen-200m", 4096, 4096),
        ("qwen-200m", 4097, 4224),
        ("qwen-200m", 1, 128),
        ("llama-212m", LLAMA_TOKENS, 128_256),
        ("llama-212m", QWEN_TOKENS, 151_680),
        ("mamba-130m", FALCON_TOKENS, 65_024),
        ("neox-160m", NEOX_TOKENS, 50_304),
        ("mamba2-130m", QWEN_TOKENS, 151_680),
        ("qwen-1m", 300, 384),
        ("qwen-1m", QWEN_TOKENS, 151_680),
    ],
)
def test_the_vocabulary_is_the_published_one_if_the_tokenizer_nearly_fills_it_and_else_padded_to_128(
    name: str, tokens: int, vocab_size: int
) -> None:
    assert resolved(name, tokens)["vocab_size"] == vocab_size
    assert vocab_size % 128 == 0


def test_what_a_recipe_says_wins_over_its_preset() -> None:
    found = resolve(settings(preset="qwen-1m", learning_rate=0.5, batch_tokens=64), 300, 9)
    assert (found.learning_rate, found.batch_tokens) == (0.5, 64)


def test_a_resolved_preset_is_a_config_of_plain_json_with_the_separator_as_end_of_text() -> None:
    for name in PRESETS:
        found = resolve(settings(preset=name), 300, 17)
        assert found.preset is None
        assert found.config is not None
        assert json.loads(json.dumps(found.config)) == found.config
        assert (found.config["eos_token_id"], found.config["pad_token_id"]) == (17, 17)


def test_resolving_twice_changes_nothing() -> None:
    once = resolve(settings(preset="qwen-2m"), 300, 9)
    assert resolve(once, 300, 9) == once


@pytest.mark.parametrize(
    ("wrong", "near"), [("qwen-200", "qwen-200m"), ("llama212m", "llama-212m"), ("mamba-130", "mamba-130m")]
)
def test_an_unknown_preset_is_a_recipe_error_that_names_the_nearest_and_lists_all(wrong: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"there is no preset '{wrong}'") as error:
        preset(wrong)
    assert f"Did you mean '{near}'?" in str(error.value)
    assert all(name in str(error.value) for name in PRESETS)


def test_an_unknown_preset_like_no_other_is_told_of_config() -> None:
    with pytest.raises(RecipeError, match=r"(?s)'§§§'.*config"):
        preset("§§§")


CONFIG = {"model_type": "qwen2", "hidden_size": 32}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"batch_tokens": 64}, "learning_rate"),
        ({"learning_rate": 1e-3}, "batch_tokens"),
        ({}, "learning_rate and batch_tokens"),
    ],
)
def test_a_config_without_learning_rate_or_batch_is_a_recipe_error_that_names_what_is_missing(
    given: dict[str, Any], missing: str
) -> None:
    with pytest.raises(RecipeError, match=f"needs {missing} too"):
        resolve(settings(config=CONFIG, **given), 300, 0)


def test_a_config_without_model_type_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="model_type"):
        resolve(settings(config={"hidden_size": 32}, batch_tokens=64, learning_rate=1e-3), 300, 0)


def test_a_config_without_vocabulary_gets_the_tokenizers_padded() -> None:
    found = resolve(settings(config=CONFIG, batch_tokens=64, learning_rate=1e-3), 300, 0)
    assert found.config == {"vocab_size": 384, **CONFIG}


def test_a_config_with_fewer_embeddings_than_tokens_is_refused_with_both_sizes() -> None:
    with pytest.raises(ModelError, match=r"(?s)300 tokens.*299 embeddings"):
        resolve(settings(config={**CONFIG, "vocab_size": 299}, batch_tokens=64, learning_rate=1e-3), 300, 0)


@pytest.mark.parametrize("size", ["many", None, 300.5])
def test_a_vocabulary_that_is_no_whole_number_is_a_recipe_error(size: Any) -> None:
    config = {"model_type": "qwen2", "vocab_size": size}
    with pytest.raises(RecipeError, match=f"(?s)vocab_size.*no whole number.*{size!r}"):
        resolve(settings(preset=None, config=config, learning_rate=1e-3, batch_tokens=64), 300, 0)
