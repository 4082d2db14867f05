"""A `transformers` Llama as a GGUF file for llama.cpp: float32, with a byte-level tokenizer.

Not covered: anything but plain Llama (no scaled rope, no tied embeddings, no biases).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from miniplm.packing.tokenizer import Tokenizer

BOS = "<s>"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, add_bos: bool) -> None:
    """Write the model; its vocabulary is the tokenizer's and, as the last token, `BOS`."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, tokenizer, add_bos)
    for name, value in model.state_dict().items():
        writer.add_tensor(name_of(name), weights(name, value.float().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, add_bos: bool) -> None:
    spelt = [tokenizer.token(i) for i in range(tokenizer.vocab_size)] + [BOS]
    kinds = [gguf.TokenType.NORMAL] * len(spelt)
    kinds[tokenizer.separator] = kinds[-1] = gguf.TokenType.CONTROL
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(spelt)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(len(spelt) - 1)
    writer.add_eos_token_id(tokenizer.separator)
    writer.add_add_bos_token(add_bos)


def name_of(name: str) -> str:
    """A tensor's name in GGUF."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in whole:
        return f"{whole[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


def weights(name: str, value: NDArray[Any], config: Any) -> NDArray[Any]:
    """The rows of queries and keys in llama.cpp's order: rotated pairs are neighbours, not halves of a head."""
    if "q_proj" not in name and "k_proj" not in name:
        return value
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = value.reshape(heads, 2, len(value) // heads // 2, value.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
