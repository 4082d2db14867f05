"""The stage `train`: a causal language model on packed instances, by the Hugging Face Trainer.

In: `TrainSettings`, rows, a tokenizer, and a teacher where the objective asks one. Out: a `save_pretrained` folder:
config, safetensors, tokenizer, model card, and `training.jsonl` (losses, learning rate, gradient norm against tokens
and operations); models kept along the way in `checkpoints/`. TensorBoard's events go to `logs/` beside the folder.

Promised: what is seen at each step depends on the data, the seed and the settings alone, not on how many processes see
it; killed and begun again, training ends with the weights of an undisturbed run (bit-equal on CPU, with as many
processes). The logits of a batch are never held whole. Optimiser state lies in `state/` of the unfinished folder and is
gone when the model is finished.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.errors import MiniplmError, RecipeError, TrainingError
from miniplm.models.flops import forward_flops, matmul_rate
from miniplm.models.head import check_head
from miniplm.models.load import check_length, check_reads, choose_device, load_model, new_model
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import progress
from miniplm.recipe import Compute, Counted, GivenModel, TrainSettings
from miniplm.training import processes
from miniplm.training.arguments import arguments, autocast_dtype
from miniplm.training.callbacks import CompleteCheckpoints, KeptModels, ShownProgress, Stopwatch, last_checkpoint
from miniplm.training.checkpoint import KEPT, Checkpoint, Point, card, curve_lines, save_tokenizer, write_model
from miniplm.training.data import Collator, InOrder, TrainingOrder
from miniplm.training.guard import Guard, not_finite, suspects
from miniplm.training.matching import matched_share, passes
from miniplm.training.named import load_teacher, objective_from
from miniplm.training.objectives import Batch, NextToken, Objective
from miniplm.training.plan import Plan
from miniplm.training.presets import resolve

if TYPE_CHECKING:
    import datasets

VERSION = 2
CURVE_INSTANCES = 64  # held-out instances whose loss is measured at each point
_STATE = "state"
_POINT_NAMES = {"loss": "train_loss", "eval_loss": "held_out_loss"}
_NO_POINT = {"epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
_COMPILE_FROM_FLOPS = 1e15  # on CPU compiling saves 6 to 20 % and costs 15 s a model; measured, NOTES.md


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


def identity(settings: TrainSettings, counted: Counted, inputs: Mapping[str, str]) -> Identity:
    """What a trained model is. `settings` as in the recipe: a preset's name stands for its numbers as of `VERSION`.

    Args:
        settings: of the training.
        counted: the rule for which targets count.
        inputs: fingerprints of `data` and, where there is one, `held_out`, `teacher` and `from`; those of packed rows
            stand for the tokenizer too.

    """
    recipe = settings.model_dump(mode="json", exclude={"data", "start", "license"})
    return Identity("model", VERSION, {**recipe, "counted": counted}, inputs)


def train(
    settings: TrainSettings,
    data: TrainingData,
    out: Path,
    what: Identity,
    compute: Compute | None = None,
    *,
    teacher: GivenModel | None = None,
    objective: Objective | None = None,
    logs: Path | None = None,
) -> Checkpoint:
    """Train a model into the artifact at `out`; started by torchrun or accelerate, in all its processes together.

    Args:
        settings: of the training.
        data: what it is trained and measured on.
        out: folder of the model.
        what: from `identity`.
        compute: how.
        teacher: that the objective asks, if it asks one.
        objective: instead of the one that the settings name.
        logs: folder of TensorBoard's events; None: `logs/` beside `out`.

    Raises:
        RecipeError: the settings do not fit the data or `TrainingArguments`.
        ModelError: the tokenizer's vocabulary exceeds the model's, or its head is not linear.
        TokenizerError: the teacher, or the model to go on from, has another tokenizer.
        TrainingError: the loss spikes or is not finite.

    """
    compute = compute or Compute()
    processes.join(choose_device(compute.device))
    events = logs or out.parent / "logs" / out.name

    def all_train(workspace: Workspace) -> Mapping[str, Any]:
        return _train(workspace, settings, data, compute, teacher, objective, events)

    if processes.leads():
        _lead(out, what, all_train)
    else:
        _follow(out, all_train)
    processes.meet()
    return Checkpoint(out, artifact.read(out))


def _lead(out: Path, what: Identity, all_train: Callable[[Workspace], Mapping[str, Any]]) -> None:
    """Make the artifact, and tell the other processes whether there is anything to train, or why that is not known."""
    begun = False

    def work(workspace: Workspace) -> Mapping[str, Any]:
        nonlocal begun
        begun = processes.hear_leader(True)
        return all_train(workspace)

    try:
        artifact.make(out, what, work)
    except Exception as error:
        if not begun:
            ours = isinstance(error, MiniplmError)
            processes.hear_leader(error if ours else TrainingError(f"the process that leads failed: {error}"))
        raise
    if not begun:
        processes.hear_leader(False)


def _follow(out: Path, all_train: Callable[[Workspace], Mapping[str, Any]]) -> None:
    said: bool | MiniplmError = processes.hear_leader(False)
    if isinstance(said, MiniplmError):
        raise said
    if said:
        all_train(Workspace(artifact.partial_path(out)))


def _train(
    work: Workspace,
    settings: TrainSettings,
    data: TrainingData,
    compute: Compute,
    given_teacher: GivenModel | None,
    own: Objective | None,
    logs: Path,
) -> Mapping[str, Any]:
    transformers_logging.disable_progress_bar()  # ours is enough
    transformers_logging.set_verbosity_error()  # the Trainer remarks on our short runs
    if settings.start is None:
        resolved = resolve(settings, data.tokenizer.vocab_size, data.tokenizer.separator)
    else:
        resolved = _as_before(settings, settings.start)
    length, vocabulary = data.sequence_length, data.tokenizer.vocab_size
    model = _model(resolved, data)
    teacher = load_teacher(settings, given_teacher, data.tokenizer, length, compute)
    objective = own or objective_from(settings, teacher, vocabulary=vocabulary, sequence_length=length)
    cost = _Cost.of(settings, model, teacher, length)
    plan = Plan.of(resolved, len(data.rows), length, compute, cost.share)
    state = work.path / _STATE
    name = work.path.name.removesuffix(".partial")
    how = arguments(resolved, plan, compute, state, logs)
    if _compiles(compute, plan, cost, how):
        for compiled in (model, teacher):
            if compiled is not None:
                compiled.base_model.compile()
    parameters = model.num_parameters()
    resume, before = processes.hear_leader(last_checkpoint(state) if processes.leads() else (None, 0.0))
    watch = Stopwatch(before)
    peak = matmul_rate(how.device, autocast_dtype(resolved)) * processes.count()
    with progress(f"train {name}", plan.steps * plan.batch_tokens, "tok") as meter:
        shown = ShownProgress(meter, plan, cost.per_token, peak, watch)
        trainer = _Trainer(model, how, data, plan, settings.seed, objective, cost.per_token)
        if how.fsdp and processes.count() > 1 and not trainer.is_fsdp_enabled:
            raise RecipeError(
                f"accelerate does not shard models on the device {how.device.type!r}.",
                remedy="Take `fsdp` out of compute.trainer: each process then holds the whole model.",
            )
        trainer.watch_over(compute.stop_at_spike)
        for callback in (CompleteCheckpoints(watch), shown, KeptModels(plan, lambda step: trainer.keep(work, step))):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    weights = trainer.weights()
    if not processes.leads():
        return {}
    if not all(torch.isfinite(weight).all() for weight in weights.values() if weight.is_floating_point()):
        raise TrainingError(
            f"the weights are no numbers after the last of {plan.steps:,} steps.",
            remedy="Lower the learning rate, or train in float32 (`precision: float32`).",
        )
    curve = _curve(trainer.state.log_history)
    tokens = plan.steps * plan.batch_tokens
    counts = {
        "parameters": parameters,
        "train_tokens": tokens,
        "steps": plan.steps,
        "batch_tokens": plan.batch_tokens,
        "learning_rate": resolved.learning_rate,
        "instances": len(data.rows),
        "epochs": round(plan.steps * plan.batch_instances / len(data.rows), 4),
        "train_flops": cost.per_token * tokens,
        "matched_share": cost.share,
        "model_type": model.config.model_type,
        "vocab_size": model.config.get_text_config().vocab_size,
        "final_train_loss": curve[-1]["train_loss"],
    }
    about = {"objective": settings.objective.name, **data.about}
    extra = {"README.md": card(counts, about, settings.license, curve[-1]), "training.jsonl": curve_lines(curve)}
    write_model(work, state / "final", trainer.plain_model, weights, data.tokenizer, extra)
    work.remove(_STATE)
    work.provenance |= {
        "device": str(how.device),
        "processes": processes.count(),
        "micro_batch": how.per_device_train_batch_size,
        "train_seconds": round(watch.total, 3),
        "tokens_per_s": round(shown.tokens / max(watch.now, 1e-9)),
        "flops_per_s": round(shown.flops_per_s),
        "share_of_matmul_rate": round(shown.share, 4),
    }
    return counts


def _as_before(settings: TrainSettings, start: GivenModel) -> TrainSettings:
    """The settings with what is not given taken from the training of the model to go on from, if it is one of ours."""
    folder = Path(start.model).expanduser()
    known = artifact.read(folder).counts if (folder / artifact.MANIFEST).is_file() else {}
    given = {name: getattr(settings, name) or known.get(name) for name in ("learning_rate", "batch_tokens")}
    if missing := [name for name, value in given.items() if value is None]:
        raise RecipeError(
            f"training on from {start.model} needs {' and '.join(missing)}: it does not say how it was trained.",
        )
    return settings.model_copy(update=given)


def _model(resolved: TrainSettings, data: TrainingData) -> PreTrainedModel:
    """The model to train, in float32: new, or the one to go on from."""
    if resolved.start is not None:
        model = load_model(resolved.start).train()
        check_reads(resolved.start, model.config.get_text_config().vocab_size, data.tokenizer)
    else:
        assert resolved.config is not None
        model = new_model(resolved.config, resolved.seed)
    check_length(model.config.to_dict(), data.sequence_length)
    check_head(model)
    return model


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a training costs: operations a token, the teacher's included, and the share of steps if they are matched."""

    per_token: float
    share: float

    @classmethod
    def of(cls, settings: TrainSettings, model: PreTrainedModel, teacher: PreTrainedModel | None, length: int) -> _Cost:
        asks = 0.0 if teacher is None else forward_flops(teacher, length)
        forward = forward_flops(model, length)
        share = 1.0
        if settings.match == "operations":
            share = matched_share(settings.objective, forward, asks)
        elif settings.match == "flops":
            assert teacher is not None
            share = matched_share(settings.objective, model.num_parameters(), teacher.num_parameters())
        return cls(passes(settings.objective).cost(forward, asks), share)


class _Trainer(Trainer):
    """The Trainer with our order and our loss, which is computed inside the model's forward pass.

    DDP, FSDP and DeepSpeed wrap `forward`, and know nothing of what happens outside of it.
    """

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
        self.measured = _curve_batches(data, how)
        self.step_losses: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}  # of the objective's metrics since the last point
        self.summed = 0
        _compute_losses_in_forward(model, objective)
        super().__init__(
            model=model,
            args=how,
            data_collator=Collator(data.tokenizer.separator, data.counted),
            train_dataset=self.order,
        )
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the micro-batch
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)

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
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
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
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {"rows of the step": ", ".join(str(self.order.row(position)) for position in positions)}
        return suspects(self._loss_of, self.plain_model, self.order, positions, gradients)

    def _loss_of(self, position: int) -> Tensor:
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
        if processes.leads() and not work.has(name := f"{KEPT}/step-{step:07d}"):
            with work.part(name) as folder:
                self.plain_model.save_pretrained(folder, state_dict=weights)
                save_tokenizer(self.data.tokenizer, folder)


def _compute_losses_in_forward(model: PreTrainedModel, objective: Objective) -> None:
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


def _curve_batches(data: TrainingData, how: TrainingArguments) -> Sequence[tuple[Batch, int]]:
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


def _compiles(compute: Compute, plan: Plan, cost: _Cost, how: TrainingArguments) -> bool:
    if compute.compile != "auto":
        return compute.compile
    return how.device.type == "cuda" or cost.per_token * plan.steps * plan.batch_tokens > _COMPILE_FROM_FLOPS


def _curve(history: list[dict[str, Any]]) -> list[Point]:
    """The points of the curve in the Trainer's log."""
    return [
        {_POINT_NAMES.get(name, name): value for name, value in sorted(entry.items()) if name not in _NO_POINT}
        for entry in history
        if "loss" in entry
    ]
