"""Sentence encoders: texts to unit vectors, by a model of a local folder or the Hub.

The last hidden states, averaged over the tokens of a text, at unit length: what the encoders of `sentence-transformers`
that pool by the mean do (all-MiniLM, all-mpnet, e5). One that was trained to be read at its first token (bge) is
averaged all the same. Texts are cut to `MAX_TOKENS`, or to the model's positions. float32, safetensors only, no code of
the model's own; the Hub is asked as everywhere (`HF_HUB_OFFLINE` and the local cache count). What spells a special
token in a text is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import ModelError
from miniplm.models.load import choose_device, hub_commit, positions
from miniplm.recipe import GivenModel

MAX_TOKENS = 512
_REMEDY = (
    "It must be a folder or a Hub id with config.json, *.safetensors and a tokenizer, as "
    "sentence-transformers/all-MiniLM-L6-v2 has; none is needed if no encoder is named."
)


@dataclass(frozen=True)
class SentenceEncoder:
    """A loaded encoder.

    Attributes:
        name: which it is, for people: the folder, or the Hub id with its commit.
        model: a `transformers` model without a head, on its device.
        tokenizer: its own.
        max_tokens: what a text is cut to, special tokens included.
        batch: texts that it reads at a time.

    """

    name: str
    model: Any
    tokenizer: Any
    max_tokens: int
    batch: int

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, `[N, D]`. Texts of about one length are read together, so that little is padding."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        vectors = np.zeros((len(texts), int(self.model.config.hidden_size)), np.float32)
        for start in range(0, len(texts), self.batch):
            rows = order[start : start + self.batch]
            vectors[rows] = self._read([texts[row] for row in rows])
        return vectors

    def _read(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(
            self.model.device
        )
        if not read["input_ids"].shape[1]:  # a batch of empty texts, to a tokenizer that adds no token
            return np.zeros((len(texts), int(self.model.config.hidden_size)), np.float32)
        with torch.inference_mode():
            states = self.model(**read).last_hidden_state.float()
        there = read["attention_mask"].unsqueeze(-1).float()
        mean = (states * there).sum(1) / there.sum(1).clamp(min=1)
        unit: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return unit


def load_encoder(model: str, *, revision: str | None = None, device: str = "auto", batch: int = 32) -> SentenceEncoder:
    """Load an encoder.

    Args:
        model: a folder or a Hub id.
        revision: of the Hub id.
        device: as `compute.device`.
        batch: texts that it reads at a time.

    Raises:
        ModelError: it is not there, has no safetensors, or needs code of its own.

    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = Path(model).expanduser()
    commit = None if folder.is_dir() else hub_commit(GivenModel(model=model, revision=revision))
    where: dict[str, Any] = {"revision": commit, "trust_remote_code": False}
    name = str(folder) if folder.is_dir() else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, split_special_tokens=True, **where)
        loaded = AutoModel.from_pretrained(name, use_safetensors=True, dtype="float32", **where)
    except Exception as error:  # OSError, ValueError, ImportError, safetensors' own: all are "cannot be loaded"
        raise ModelError(
            f"the encoder {model!r} cannot be loaded.",
            facts={"because": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__},
            remedy=_REMEDY,
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"the encoder {model!r} has no fast tokenizer (tokenizer.json).", remedy=_REMEDY)
    if tokenizer.pad_token is None:  # of a language model: any token will do, the mask leaves it out
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(MAX_TOKENS, int(tokenizer.model_max_length), positions(loaded.config.to_dict()) or MAX_TOKENS)
    return SentenceEncoder(
        name=name if commit is None else f"{name}@{commit}",
        model=loaded.to(choose_device(device)).eval(),
        tokenizer=tokenizer,
        max_tokens=longest,
        batch=batch,
    )
