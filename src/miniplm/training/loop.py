"""The Hugging Face Trainer with our order, our loss and our curve.

In: a model, `TrainingArguments`, data, a plan and an objective. Out: the model trained in place, the points of the
curve in `state.log_history`, and the weights, whole, from `weights`.

Promised: the loss is computed inside the model's forward pass, for DDP, FSDP and DeepSpeed wrap `forward` and know
nothing of what happens outside of it; what stops the process that leads while it saves stops all.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from miniplm.artifact import Workspace
from miniplm.errors import TrainingError
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import Counted
from miniplm.training import processes
from miniplm.training.checkpoint import KEPT, save_tokenizer
from miniplm.training.data import Collator, InOrder, TrainingOrder
from miniplm.training.guard import Guard, not_finite, suspects, whole_step
from miniplm.training.objectives import Batch, NextToken, Objective
from miniplm.training.plan import Plan

if TYPE_CHECKING:
    import datasets

CURVE_INSTANCES = 64  # held-out instances whose loss is measured at each point


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a model is trained and measured on.

    Attributes:
        rows: instances, `input_ids [T+1]` and optionally `length`.
        tokenizer: that made them; a copy goes into the model's folder.
        held_out: instances for the loss curve, or None.
        counted: the rule for which targets count.
        about: what the model card says of the data and how it was chosen: name -> value.

    """

    rows: datasets.Dataset
    tokenizer: Tokenizer
    held_out: datasets.Dataset | None = None
    counted: Counted = "all"
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def sequence_length(self) -> int:
        """T: predicted positions of an instance."""
        length = int(getattr(self.rows.features["input_ids"], "length", -1))
        if length < 2:
            raise TrainingError(
                "the rows are not packed: their `input_ids` have no fixed length.",
                remedy="Pack them with miniplm.prepare, or cast the column to a fixed-length list.",
            )
        return length - 1


class Loop(Trainer):
    """The Trainer of a training; see the file's contract."""

    def __init__(
        self,
        model: PreTrainedModel,
        how: TrainingArguments,
        data: TrainingData,
        plan: Plan,
        seed: int,
        objective: Objective,
        flops_per_token: float,
    ) -> None:
        self.data, self.plan, self.flops_per_token = data, plan, flops_per_token
        self.order = TrainingOrder(data.rows, plan.steps * plan.batch_instances, seed)
        self.plain_model = model
        self.measured = curve_batches(data, how)
        self.step_losses: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}  # of the objective's metrics since the last point
        self.summed = 0
        compute_losses_in_forward(model, objective)
        super().__init__(
            model=model,
            args=how,
            data_collator=Collator(data.tokenizer.separator, data.counted),
            train_dataset=self.order,
        )
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the micro-batch
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)

    @property
    def sharded(self) -> bool:
        """Whether the weights are shared out among the processes; a state of one kind cannot be read as the other."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def watch_over(self, spike: float | None) -> None:
        """Have the training stopped where the loss spikes by so many nats, or is no number."""
        self.add_callback(Guard(spike, self.step_figures, self.suspects))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def get_decay_parameter_names(self, model: PreTrainedModel) -> list[str]:
        """Weights that decay: not biases and norms, nor what a model marks (the state matrices of Mamba)."""
        marked = {name for name, weight in model.named_parameters() if getattr(weight, "_no_weight_decay", False)}
        return [name for name in super().get_decay_parameter_names(model) if name not in marked]

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The objective's loss of a micro-batch."""
        loss: Tensor
        loss, metrics = model(batch=inputs)
        self.step_losses.append(loss.detach())
        for name, value in metrics.items():
            figure = torch.as_tensor(value, device=loss.device).detach().float()
            self.sums[name] = self.sums.get(name, 0.0) + figure
        self.summed += 1
        return loss

    def step_figures(self) -> tuple[float, float]:
        """Of all processes since the last call: the micro-batches' mean loss, and 0 or, where a gradient is none, NaN.

        In float16 gradients are infinite now and then by design, and the step is left out.
        """
        loss = torch.stack(self.step_losses).float().mean()
        self.step_losses.clear()
        gradient = loss.new_zeros(()) if self.args.fp16 else not_finite(self.plain_model).to(loss.device)
        means = self.accelerator.reduce(torch.stack([loss, gradient]), "mean").tolist()
        return means[0], means[1]

    def suspects(self, step: int, gradients: bool) -> dict[str, str]:
        """The worst instances of a step, see guard.py; where weights are elsewhere (FSDP), the rows of all."""
        first = (step - 1) * self.plan.batch_instances
        positions = range(first, first + self.plan.batch_instances)
        if self.sharded:
            return whole_step(self.order, positions)
        return suspects(self.loss_of, self.plain_model, self.order, positions, gradients)

    def loss_of(self, position: int) -> Tensor:
        """The objective's loss of one instance."""
        batch = self._prepare_inputs(self.data_collator(self.order.__getitems__([position])))
        loss: Tensor = self.plain_model(batch=batch)[0]
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a point of the curve: the objective's metrics, the held-out loss, tokens, operations."""
        if "loss" in logs:
            tokens = self.state.global_step * self.plan.batch_tokens
            for name, total in sorted(self.sums.items()):
                logs[name] = float(self.accelerator.reduce(total / self.summed, "mean"))
            self.sums, self.summed = {}, 0
            if self.measured:
                logs["eval_loss"] = self.held_out_loss()
            logs |= {"tokens": tokens, "flops": tokens * self.flops_per_token}
        super().log(logs, start_time)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Plain cross entropy of the held-out instances of the curve, nats per token; all processes share the work."""
        model, plain = self.model_wrapped, NextToken()
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for number in range(processes.rank(), len(self.measured), processes.count()):
            batch, instances = self.measured[number]
            loss, _ = model(batch=self._prepare_inputs(batch), objective=plain)
            total += torch.tensor([float(loss) * instances, instances], dtype=torch.float64, device=total.device)
        model.train()
        summed, instances = self.accelerator.reduce(total, "sum").tolist()
        return float(summed / instances)

    def weights(self) -> Mapping[str, Tensor]:
        """All weights, whole, wherever parts of them lie; every process has to ask."""
        found: Mapping[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return found

    def keep(self, work: Workspace, step: int) -> None:
        """Write the model as it is into `checkpoints/`."""
        weights = self.weights()

        def write() -> None:
            if not work.has(name := f"{KEPT}/step-{step:07d}"):
                with work.part(name) as folder:
                    self.plain_model.save_pretrained(folder, state_dict=weights)
                    save_tokenizer(self.data.tokenizer, folder)

        processes.led(write)

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        """Save a state; a disk that is full for the process that leads stops all."""
        found: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            found = error
        processes.agree(found)


def compute_losses_in_forward(model: PreTrainedModel, objective: Objective) -> None:
    """Make `model(batch=...)` return (loss, metrics); without `batch` it is what it was."""
    plain = type(model).forward
    own = objective

    def forward(
        self: PreTrainedModel,
        *given: Any,
        batch: Batch | None = None,
        objective: Objective | None = None,
        **named: Any,
    ) -> Any:
        if batch is None:
            return plain(self, *given, **named)
        return (objective or own).loss(self, batch)

    model.forward = types.MethodType(forward, model)


def curve_batches(data: TrainingData, how: TrainingArguments) -> Sequence[tuple[Batch, int]]:
    """The held-out batches of the curve and how many instances of each count: as many batches for each process.

    Where batches do not go round, the first is there again and counts nothing: under FSDP all have to take part.
    """
    if data.held_out is None:
        return []
    chosen = np.linspace(0, len(data.held_out) - 1, min(CURVE_INSTANCES, len(data.held_out))).astype(np.int64)
    rows, collator = InOrder(data.held_out.select(chosen)), Collator(data.tokenizer.separator, data.counted)
    micro = how.per_device_train_batch_size
    parts = [range(begin, min(begin + micro, len(rows))) for begin in range(0, len(rows), micro)]
    batches = [(collator(rows.__getitems__(part)), len(part)) for part in parts]
    missing = -len(batches) % processes.count()
    return batches + [(batches[0][0], 0)] * missing
