"""An objective of your own: next-token cross entropy that pulls the logits' normaliser towards 1 (z-loss).

python examples/own_objective.py runs/quickstart/corpus-*

In a recipe the same class is `objective: {name: "own_objective:ZLoss", strength: 1e-4}`, where Python finds the module.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

import miniplm
from miniplm.models.head import head_of, hidden_states
from miniplm.models.losses import cross_entropy
from miniplm.training.objectives import Batch


class ZLoss:
    """CE + strength · mean (log Z)²; it needs the logits, and so holds them: for small vocabularies."""

    def __init__(self, strength: float = 1e-4) -> None:
        self.strength = strength
        self.fingerprint = f"z-loss {strength}"  # what it is; another strength is another model

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar to differentiate, and figures to log."""
        hidden = hidden_states(model, batch["input_ids"]).flatten(0, 1)
        weight, bias = head_of(model)
        weights = None if batch["weights"] is None else batch["weights"].flatten()  # None: all targets weigh alike
        plain = cross_entropy(hidden, weight, bias, batch["targets"].flatten(), weights)
        log_z = torch.nn.functional.linear(hidden, weight, bias).float().logsumexp(dim=1)
        share = torch.full_like(log_z, 1 / len(log_z)) if weights is None else weights
        return plain + self.strength * log_z.square() @ share, {"cross_entropy": plain, "log_z": log_z @ share}


if __name__ == "__main__":
    corpus = miniplm.open_corpus(sys.argv[1])
    made = miniplm.train("qwen-0.5m", corpus.pool, tokens=100e3, objective=ZLoss(), out="with-z-loss")
    print(f"{made.manifest.counts['final_train_loss']:.3f} nats per token (z-loss included)")
