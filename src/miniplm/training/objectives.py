"""Objectives: what a student minimises. An objective is `loss(model, batch) -> (loss, metrics)`.

`NextToken` is the paper's Eq. 5: the mean over instances of each instance's mean negative log-likelihood.
"""

from __future__ import annotations

from typing import Protocol, TypedDict

from torch import Tensor
from transformers import PreTrainedModel

from miniplm.models.head import cross_entropy, head_of, hidden_states


class Batch(TypedDict):
    """A batch of instances.

    input_ids: `[B, T]` int64; targets: `[B, T]` int64, the token after each; weights: `[B, T]` float32, what each
    target weighs in the loss, summing to 1, or None where all weigh alike.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor | None


class Objective(Protocol):
    """What is minimised."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate (a scalar, nats) and further figures to log."""


class NextToken:
    """Plain next-token cross entropy (paper, Eq. 5)."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`."""
        hidden = hidden_states(model, batch["input_ids"])
        weights = batch["weights"]
        loss = cross_entropy(
            hidden.flatten(0, 1),
            *head_of(model),
            batch["targets"].flatten(),
            None if weights is None else weights.flatten(),
        )
        return loss, {}
