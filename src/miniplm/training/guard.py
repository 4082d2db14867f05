"""A training whose loss spikes, or is no number, is stopped before the step is taken, and the instances are named.

In: the loss of each step, of all processes. A spike is a loss that many nats above the median of the last 100 steps,
those before an interruption counted in.
Out: nothing, or a `TrainingError` that names step, rows, sources and documents of the worst instances, by the loss of
each (or the gradient, if only that is no number), computed again with the weights that the step began with.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from miniplm.errors import TrainingError
from miniplm.progress import printable
from miniplm.training import processes
from miniplm.training.data import TrainingOrder

_WINDOW = 100  # steps
_ENOUGH = 20  # steps before a spike is judged
_NAMED = 3  # instances
_LISTED = 8  # instances of a step whose losses cannot be told apart
_RECENT = "recent_losses.json"  # in a checkpoint


class Guard(TrainerCallback):
    """Looks at every step's loss and gradient before the step is taken.

    Args:
        spike: nats above the median at which to stop; None: only at what is no number.
        figures: gives the loss of the step, averaged over micro-batches and processes, and NaN if a gradient is none.
        suspects: gives the worst instances of a step: name -> loss; by gradient, or by loss alone.

    """

    def __init__(
        self,
        spike: float | None,
        figures: Callable[[], tuple[float, float]],
        suspects: Callable[[int, bool], dict[str, str]],
    ) -> None:
        self.spike, self.figures, self.suspects = spike, figures, suspects
        self.recent: deque[float] = deque(maxlen=_WINDOW)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.recent.extend(json.loads(_recent_file(args, state).read_text()))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        processes.led(lambda: _recent_file(args, state).write_text(json.dumps(list(self.recent))))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, (loss, gradient) = state.global_step + 1, self.figures()
        if not math.isfinite(loss):
            raise self._error(f"the training loss is {loss} at step {step:,}.", step)
        if not math.isfinite(gradient):
            raise self._error(
                f"the gradient is no number at step {step:,}, at a loss of {loss:.4f} nats.", step, gradients=True
            )
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

    def _error(self, summary: str, step: int, otherwise: str = "", *, gradients: bool = False) -> TrainingError:
        remedy = "Lower the learning rate, lengthen the warm-up, or train in float32 (`precision: float32`)."
        return TrainingError(summary, facts=self.suspects(step, gradients), remedy=remedy + otherwise)


def _recent_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _RECENT


def not_finite(model: PreTrainedModel) -> Tensor:
    """NaN where some gradient of this process is no number, else 0.

    Clipping has been at them: if one was NaN all are, if one was infinite it is NaN now and the others are 0.
    """
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    parts = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in gradients]
    return torch.stack([part.sum().float() for part in parts] or [torch.zeros(())]).sum() * 0.0


def suspects(
    loss_of: Callable[[int], Tensor],
    model: PreTrainedModel,
    order: TrainingOrder,
    positions: Sequence[int],
    gradients: bool,
) -> dict[str, str]:
    """The worst of the instances at these positions: `row ..., source, document` -> loss.

    Args:
        loss_of: gives the loss of the instance at a position.
        model: what it is the loss of; its gradients are lost.
        order: of the training.
        positions: of a step.
        gradients: whether the worst are those whose gradient is no number, then those with the largest loss.

    """
    found: list[tuple[bool, float, int]] = []
    for position in positions:
        model.zero_grad()
        with torch.set_grad_enabled(gradients):
            loss = loss_of(position)
        if gradients:
            loss.backward()  # type: ignore[no-untyped-call]
        found.append((not math.isfinite(not_finite(model)), float(loss.detach()), position))
    found.sort(key=lambda one: (not one[0], -math.inf if math.isnan(one[1]) else -one[1], one[2]))
    note = {True: ", and its gradient is no number", False: ""}
    return {_name(order, position): f"{value:.4f} nats per token{note[bad]}" for bad, value, position in found[:_NAMED]}


def whole_step(order: TrainingOrder, positions: range) -> dict[str, str]:
    """The instances of a step where the loss of each cannot be had: the weights are elsewhere (FSDP, DeepSpeed)."""
    listed = positions if len(positions) <= _LISTED else [*positions[: _LISTED - 1], positions[-1]]
    span = f"{positions[0]:,} to {positions[-1]:,} of the training"
    found = {"instances": f"{len(positions):,}, positions {span}"}
    found |= {f"position {position:,}": _name(order, position) for position in listed}
    return found if len(listed) == len(positions) else found | {"left out": f"{len(positions) - len(listed):,} more"}


def _name(order: TrainingOrder, position: int) -> str:
    row = order.row(position)
    columns = [name for name in ("source", "documents") if name in order.rows.column_names]
    instance = order.rows.select_columns(columns)[row] if columns else {}
    documents = [str(document) for document in instance.get("documents", ())]
    said = [f"row {row:,}", str(instance.get("source", "")), *documents[:1]]
    return printable(", ".join(part for part in said if part), 100)
