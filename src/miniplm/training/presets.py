"""Presets: a family, four numbers and a learning rate each.

The paper's sizes are those of its Table 6 and of the published checkpoints (paper.md sections 3.1 to 3.3; arXiv
2410.17215); where the paper is silent (45M, Llama 212M, 300M tied or not) the numbers are those that give the published
parameter counts. Other families are other people's: `mamba2-130m` has the shape of state-spaces/mamba2-130m (Dao and Gu
2024, arXiv 2405.21060) and, by assumption, the paper's learning rate for Mamba; `neox-160m` is EleutherAI/pythia-160m
(arXiv 2304.01373; models/160M/pythia-160m.yml in its repository); `qwen3-200m` has the sizes of `qwen-200m`. The small
ones are for CPUs, with the same proportions; their learning rates are assumed.

Not covered: kernels. Without `mamba_ssm` transformers computes Mamba's scan token by token, and a batch costs the
square of its length: on a CPU take Mamba-2, which goes by chunks, or micro-batches of one instance (NOTES.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miniplm.errors import RecipeError
from miniplm.models.load import check_vocabulary
from miniplm.recipe import TrainSettings

Family = Literal["qwen2", "qwen3", "llama", "gpt_neox", "mamba", "mamba2"]  # as transformers calls them

_PADDING = 128  # vocabularies are padded to a multiple of this, for the matrix units
_FILLED = 0.9  # a preset's published vocabulary is taken if the tokenizer fills this share of it
_MAX_POSITIONS = 32_768
# The published configs say 0.1, which was the embeddings' alone then: transformers 5 gives it to linear layers too, and
# a new model's loss is 0.4 nats higher after 150 steps. *Measured 2026-11-21, NOTES.md.* mamba_ssm has 0.02.
_MAMBA_INITIALIZER_RANGE = 0.02
_MAMBA2_CHUNK = 64  # how, not what; 1.5 times as fast as 256 without kernels. *Measured 2026-11-21, NOTES.md*


@dataclass(frozen=True, slots=True)
class Preset:
    """A student or reference architecture.

    Attributes:
        hidden: D, the width.
        ffn: width of the feed-forward layers (Mamba: of the inner state).
        heads: attention heads, as many for keys and values (Mamba: 0; Mamba-2: of the inner state).
        learning_rate: peak, of the paper where the size is the paper's.
        batch_tokens: predicted tokens a step.
        tied: whether input and output embeddings are one matrix.
        vocab_size: published; None takes the tokenizer's, padded.

    """

    family: Family
    hidden: int
    ffn: int
    layers: int
    heads: int
    learning_rate: float
    batch_tokens: int = 512 * 1024
    tied: bool = True
    vocab_size: int | None = 151_936


PRESETS: Mapping[str, Preset] = {
    "qwen-45m": Preset("qwen2", 256, 704, 8, 4, 6e-4),
    "qwen-104m": Preset("qwen2", 512, 1408, 8, 8, 6e-4),
    "qwen-200m": Preset("qwen2", 768, 2112, 12, 12, 6e-4),
    "qwen-300m": Preset("qwen2", 768, 2112, 18, 12, 6e-4),
    "qwen-500m": Preset("qwen2", 1024, 2816, 24, 16, 3e-4),
    "qwen-1.2b": Preset("qwen2", 1536, 4224, 24, 16, 2.5e-4, tied=False),
    "llama-212m": Preset("llama", 768, 3072, 12, 12, 6e-4, vocab_size=128_256),
    "mamba-130m": Preset("mamba", 768, 1536, 24, 0, 2e-3, vocab_size=65_024),
    "mamba2-130m": Preset("mamba2", 768, 1536, 24, 24, 2e-3, vocab_size=50_288),
    "qwen3-200m": Preset("qwen3", 768, 2112, 12, 12, 6e-4),
    "neox-160m": Preset("gpt_neox", 768, 3072, 12, 12, 6e-4, tied=False, vocab_size=50_304),
    "qwen-0.5m": Preset("qwen2", 64, 176, 4, 2, 3e-3, 8192, vocab_size=None),
    "qwen-1m": Preset("qwen2", 128, 352, 4, 4, 2e-3, 8192, vocab_size=None),
    "qwen-2m": Preset("qwen2", 192, 528, 4, 6, 2e-3, 8192, vocab_size=None),
    "qwen-3m": Preset("qwen2", 256, 704, 3, 4, 1.5e-3, 8192, vocab_size=None),
    "qwen-5m": Preset("qwen2", 256, 704, 6, 4, 1.5e-3, 8192, vocab_size=None),
    "qwen3-1m": Preset("qwen3", 128, 352, 4, 4, 2e-3, 8192, vocab_size=None),
    "llama-1m": Preset("llama", 128, 512, 3, 4, 2e-3, 8192, vocab_size=None),
    "neox-1m": Preset("gpt_neox", 128, 512, 3, 4, 2e-3, 8192, vocab_size=None),
    "mamba-1m": Preset("mamba", 128, 256, 4, 0, 2e-3, 8192, vocab_size=None),
    "mamba2-1m": Preset("mamba2", 128, 256, 4, 4, 2e-3, 8192, vocab_size=None),
}


def preset(name: str) -> Preset:
    """The preset of this name. Raises RecipeError, with the nearest name, if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, list(PRESETS), n=1)
    raise RecipeError(
        f"there is no preset {name!r}.",
        facts={"presets": ", ".join(PRESETS)},
        remedy=f"Did you mean {close[0]!r}?" if close else "Or give `config:`, any transformers config.",
    )


def resolve(settings: TrainSettings, tokenizer_vocab_size: int, separator: int) -> TrainSettings:
    """The settings with everything that the preset decides written out: `config`, `learning_rate`, `batch_tokens`.

    Args:
        settings: as in the recipe.
        tokenizer_vocab_size: one more than the largest id of the data.
        separator: the token that ends a text.

    Raises:
        RecipeError: there is no such preset, or a config without `learning_rate` or `batch_tokens`.
        ModelError: the tokenizer's vocabulary exceeds the model's.

    """
    if settings.preset is not None:
        found = preset(settings.preset)
        update: dict[str, Any] = {
            "preset": None,
            "config": _config(found, tokenizer_vocab_size, separator),
            "learning_rate": settings.learning_rate or found.learning_rate,
            "batch_tokens": settings.batch_tokens or found.batch_tokens,
        }
        return settings.model_copy(update=update)
    assert settings.config is not None
    missing = [name for name in ("learning_rate", "batch_tokens") if getattr(settings, name) is None]
    if missing:
        raise RecipeError(f"a model given by `config` needs {' and '.join(missing)} too; presets have them.")
    if "model_type" not in settings.config:
        raise RecipeError("`config` does not say which `model_type` it is of (`qwen2`, `llama`, `gpt_neox`, ...).")
    config = {"vocab_size": _padded(tokenizer_vocab_size), **settings.config}
    if not isinstance(config["vocab_size"], int):
        raise RecipeError(
            "`config: {vocab_size: ...}` is no whole number.",
            facts={"found": repr(config["vocab_size"])},
            remedy="Leave it out: it is then the tokenizer's, padded.",
        )
    check_vocabulary(tokenizer_vocab_size, config["vocab_size"], "the model's config")
    return settings.model_copy(update={"config": config})


def _config(found: Preset, tokenizer_vocab_size: int, separator: int) -> dict[str, Any]:
    vocab_size = found.vocab_size
    if vocab_size is None or not _FILLED * vocab_size <= tokenizer_vocab_size <= vocab_size:
        vocab_size = _padded(tokenizer_vocab_size)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": found.hidden,
        "num_hidden_layers": found.layers,
        "tie_word_embeddings": found.tied,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": separator,
    }
    return {"model_type": found.family, **common, **_BY_FAMILY[found.family](found)}


def _qwen2(found: Preset) -> dict[str, Any]:
    return {
        "intermediate_size": found.ffn, "num_attention_heads": found.heads, "num_key_value_heads": found.heads,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0,
        "max_position_embeddings": _MAX_POSITIONS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def _qwen3(found: Preset) -> dict[str, Any]:
    return {**_qwen2(found), "head_dim": found.hidden // found.heads, "attention_bias": False}


def _gpt_neox(found: Preset) -> dict[str, Any]:
    return {
        "intermediate_size": found.ffn, "num_attention_heads": found.heads, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True, "initializer_range": 0.02,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": _MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    }  # fmt: skip


def _mamba(found: Preset) -> dict[str, Any]:
    return {
        "intermediate_size": found.ffn, "state_size": 16, "conv_kernel": 4, "expand": found.ffn // found.hidden,
        "time_step_rank": found.hidden // 16, "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
        "initializer_range": _MAMBA_INITIALIZER_RANGE,
    }  # fmt: skip


def _mamba2(found: Preset) -> dict[str, Any]:
    return {
        "num_heads": found.heads, "head_dim": found.ffn // found.heads, "state_size": 128, "n_groups": 1,
        "conv_kernel": 4, "expand": found.ffn // found.hidden, "chunk_size": _MAMBA2_CHUNK, "use_bias": False,
        "use_conv_bias": True, "residual_in_fp32": True, "initializer_range": _MAMBA_INITIALIZER_RANGE,
    }  # fmt: skip


_BY_FAMILY: Mapping[Family, Callable[[Preset], dict[str, Any]]] = {
    "qwen2": _qwen2, "qwen3": _qwen3, "llama": _qwen2, "gpt_neox": _gpt_neox, "mamba": _mamba, "mamba2": _mamba2,
}  # fmt: skip


def _padded(size: int) -> int:
    return -(-size // _PADDING) * _PADDING
