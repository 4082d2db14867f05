"""A scorer for any `transformers` causal language model.

In: token ids and which targets count. Out: log p in nats, a float64 sum of float32 log-probabilities for each instance,
whatever the dtype of the weights. The backbone runs over the batch; the head runs over a chunk of positions at a time,
so the logits are never held whole (`models/head.py`). Attention runs across documents of one instance, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from miniplm.models.flops import forward_flops
from miniplm.models.head import check_head, head_of, hidden_states, token_logp
from miniplm.models.load import choose_device, load_model, name_of, own_vocabulary
from miniplm.recipe import Compute, GivenModel, Precision


class HuggingFaceScorer:
    """Scores with a `transformers` model that is already loaded.

    Args:
        model: in evaluation mode, on its device. Raises ModelError if its head is not linear.
        vocabulary: token -> id of the model's own tokenizer, where it is known; compared with that of the instances.
        name: what provenance calls it.

    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: Mapping[str, int] | None = None, name: str = "a model in memory"
    ) -> None:
        check_head(model)
        self.model = model
        self.vocabulary = vocabulary
        self.name = name
        weight, self.bias = head_of(model)
        self.weight = weight if weight.is_cuda else weight.float()  # once, not for every batch

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return dict(self.model.config.to_dict())

    @property
    def vocab_size(self) -> int:
        """Embeddings of the model, padding included."""
        return int(self.model.config.get_text_config().vocab_size)

    def flops_per_token(self, sequence_length: int) -> float:
        """Operations of a forward pass per predicted token."""
        return forward_flops(self.model, sequence_length)

    @torch.inference_mode()
    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See `Scorer.score`."""
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)
        hidden = hidden_states(self.model, ids[:, :-1])
        logp = token_logp(hidden.flatten(0, 1), self.weight, self.bias, ids[:, 1:].flatten())
        mask = torch.from_numpy(counted).to(logp.device)
        summed = torch.where(mask, logp.view(mask.shape).double(), 0.0).sum(dim=1)
        return np.asarray(summed.cpu().numpy())


def load_scorer(given: GivenModel, dtype: Precision, compute: Compute) -> HuggingFaceScorer:
    """Load a model and make a scorer of it. Raises ModelError if it cannot be loaded or used."""
    device = choose_device(compute.device)
    return HuggingFaceScorer(load_model(given, dtype, str(device)), own_vocabulary(given), name_of(given))
