"""Objectives: what a student minimises. An objective is `loss(model, batch) -> (loss, metrics)`.

`NextToken` is the paper's Eq. 5: the mean over instances of each instance's mean negative log-likelihood. `VanillaKD`
adds what the teacher predicts for the same tokens; MiniLLM is in a file of its own.
"""

from __future__ import annotations

from typing import Protocol, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from miniplm.models.head import head_of, hidden_states
from miniplm.models.losses import cross_entropy, distillation
from miniplm.recipe import VanillaKDSettings


class Batch(TypedDict):
    """A batch of instances.

    input_ids: `[B, T]` int64; targets: `[B, T]` int64, the token after each; weights: `[B, T]` float32, what each
    target weighs in the loss, summing to 1, or None where all weigh alike; positions: `[B]` int64, the how manieth
    instance of the training each is, for objectives that draw random numbers.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor | None
    positions: Tensor


class Objective(Protocol):
    """What is minimised."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate (a scalar, nats) and further figures to log: name -> scalar without gradient."""


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


class VanillaKD:
    """Token-level distillation, online: (1 − λ)·CE + λ·H(p, q) over the whole vocabulary (paper, section 3).

    Attributes:
        teacher: frozen; it reads each batch in its own dtype.
        vocabulary: tokens of the tokenizer; what teacher and student have beyond is padding.

    """

    def __init__(self, teacher: PreTrainedModel, settings: VanillaKDSettings, vocabulary: int) -> None:
        self.teacher, self.settings, self.vocabulary = teacher, settings, vocabulary

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`. Metrics: `cross_entropy` and `teacher_term` (H), in nats per token."""
        ids, weights = batch["input_ids"], batch["weights"]
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            told = hidden_states(self.teacher, ids)
        hidden = hidden_states(model, ids)
        loss, plain, teacher_term = distillation(
            hidden.flatten(0, 1),
            *head_of(model),
            told.flatten(0, 1),
            *head_of(self.teacher),
            batch["targets"].flatten(),
            None if weights is None else weights.flatten(),
            share=self.settings.share,
            temperature=self.settings.temperature,
            vocabulary=self.vocabulary,
        )
        return loss, {"cross_entropy": plain, "teacher_term": teacher_term}
