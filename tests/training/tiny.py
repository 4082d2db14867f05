"""What the tests of training share: a corpus of a few hundred instances, and a model that learns it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import miniplm
from conftest import write_jsonl
from miniplm.packing.prepare import Corpus
from miniplm.training.checkpoint import Checkpoint

T = 32
BATCH = 8  # instances
TOKENS = 300
CONFIG = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def make_corpus(folder: Path, documents: int = 120, **how: Any) -> Corpus:
    """A few hundred instances of easy text; the cache of hashes lies beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return miniplm.prepare(
            write_jsonl(folder / "text.jsonl", documents, **how),
            tokenizer={"train": {"vocab_size": TOKENS}},
            sequence_length=T,
            split={"reference": 0.1, "held_out": 0.2},
            out=folder / "corpus",
        )


def train(
    data: Any, out: Path, steps: int | None = None, *, model: Any = CONFIG, compute: Any = None, **settings: Any
) -> Checkpoint:
    """`miniplm.train` for so many steps of `BATCH` instances, on the CPU, in float32."""
    usual: dict[str, Any] = {"batch_tokens": BATCH * T, "learning_rate": 1e-2, "precision": "float32"}
    if steps is not None:
        usual["tokens"] = steps * BATCH * T
    how = miniplm.Compute(**{"device": "cpu", "train_micro_batch": BATCH, "report_to": "none", **(compute or {})})
    return miniplm.train(model, data, out=out, compute=how, **{**usual, **settings})
