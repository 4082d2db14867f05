"""A training whose loss spikes, or is no number, is stopped before the step is taken, and the instances are named.

In: the loss of each step, of all processes. A spike is a loss that many nats above the median of the last 100 steps.
Out: nothing, or a `TrainingError` that names step, rows, sources and documents of the instances with the largest loss,
computed again with the weights that the step began with.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from miniplm.errors import TrainingError
from miniplm.models.head import head_of, hidden_states, token_logp
from miniplm.progress import printable
from miniplm.training.data import Collator, TrainingOrder
from miniplm.training.plan import Plan

_WINDOW = 100  # steps
_ENOUGH = 20  # steps before a spike is judged
_NAMED = 3  # instances


class Guard(TrainerCallback):
    """Looks at every step's loss and gradient before the step is taken.

    Args:
        spike: nats above the median at which to stop; None: only at what is no number.
        step_loss: gives the loss of the step, averaged over micro-batches and processes.
        suspects: gives the instances of a step with the largest loss: name -> loss.
        scaled: whether the loss is scaled (float16), where gradients are infinite now and then by design.

    """

    def __init__(
        self,
        spike: float | None,
        step_loss: Callable[[], float],
        suspects: Callable[[int], dict[str, str]],
        scaled: bool,
    ) -> None:
        self.spike, self.step_loss, self.suspects, self.scaled = spike, step_loss, suspects, scaled
        self.recent: deque[float] = deque(maxlen=_WINDOW)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> None:
        step, loss = state.global_step + 1, self.step_loss()
        assert model is not None
        if not math.isfinite(loss):
            raise self._error(f"the training loss is {loss} at step {step:,}.", step)
        if not self.scaled and not _finite_gradient(model):
            raise self._error(f"the gradient is no number at step {step:,}, at a loss of {loss:.4f} nats.", step)
        if self.spike is not None and len(self.recent) >= _ENOUGH:
            above = loss - median(self.recent)
            if above > self.spike:
                raise self._error(
                    f"the training loss spiked at step {step:,}: {loss:.4f} nats, {above:.2f} above the median of the "
                    f"last {len(self.recent)} steps.",
                    step,
                    " If such instances are meant, raise `compute.stop_at_spike`, or set it to null.",
                )
        self.recent.append(loss)

    def _error(self, summary: str, step: int, otherwise: str = "") -> TrainingError:
        remedy = "Lower the learning rate, lengthen the warm-up, or train in float32 (`precision: float32`)."
        return TrainingError(summary, facts=self.suspects(step), remedy=remedy + otherwise)


def _finite_gradient(model: PreTrainedModel) -> bool:
    """Whether gradients are numbers. Clipping by their norm makes all of them NaN if one is: a small one tells."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    smallest = min(gradients, key=lambda gradient: gradient.numel(), default=None)
    return smallest is None or bool(torch.isfinite(smallest.sum()))


@torch.no_grad()
def suspects(
    model: PreTrainedModel, order: TrainingOrder, collator: Collator, plan: Plan, micro: int, step: int
) -> dict[str, str]:
    """The instances of a step (counted from 1) with the largest mean loss: `row ..., source, document` -> nats."""
    begin = (step - 1) * plan.batch_instances
    positions = range(begin, begin + plan.batch_instances)
    losses: list[float] = []
    for first in range(0, len(positions), micro):
        batch = collator(order.__getitems__(positions[first : first + micro]))
        ids, targets = batch["input_ids"].to(model.device), batch["targets"].to(model.device)
        hidden = hidden_states(model, ids)
        weight, bias = head_of(model)
        logp = token_logp(hidden.flatten(0, 1).to(weight.dtype), weight, bias, targets.flatten())
        losses += _per_instance(logp.view(targets.shape).cpu(), batch["weights"])
    worst = sorted(range(len(losses)), key=lambda i: -math.inf if math.isnan(losses[i]) else -losses[i])[:_NAMED]
    return {_name(order, positions[i]): f"{losses[i]:.4f} nats per token" for i in worst}


def _per_instance(logp: Tensor, weights: Tensor | None) -> list[float]:
    if weights is None:
        return [float(mean) for mean in -logp.mean(dim=1)]
    return [float(mean) for mean in -(logp * weights).sum(dim=1) / weights.sum(dim=1)]


def _name(order: TrainingOrder, position: int) -> str:
    row = order.row(position)
    columns = [name for name in ("source", "documents") if name in order.rows.column_names]
    instance = order.rows.select_columns(columns)[row] if columns else {}
    documents = [str(document) for document in instance.get("documents", ())]
    said = [f"row {row:,}", str(instance.get("source", "")), *documents[:1]]
    return printable(", ".join(part for part in said if part), 100)
