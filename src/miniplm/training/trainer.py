"""The stage `train`: a causal language model from scratch, on packed instances, by the Hugging Face Trainer.

In: `TrainSettings`, rows, a tokenizer. Out: a `save_pretrained` folder: config, safetensors, tokenizer, model card, and
`training.jsonl` (loss, learning rate, gradient norm and, where held-out instances are given, their loss, against
tokens).

Promised: what is seen at each step depends on the data, the seed and the settings alone; killed and begun again,
training ends with the weights of an undisturbed run (bit-equal on CPU). The logits of a batch are never held whole.
Optimiser state lies in `state/` of the unfinished folder and is gone when the model is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.errors import RecipeError, TrainingError
from miniplm.models.flops import training_flops
from miniplm.models.head import check_head
from miniplm.models.load import check_length, choose_device, new_model
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import Meter, progress
from miniplm.recipe import Compute, Counted, TrainSettings
from miniplm.training.data import Collator, InOrder, TrainingOrder
from miniplm.training.objectives import Batch, NextToken, Objective
from miniplm.training.presets import resolve

if TYPE_CHECKING:
    import datasets

VERSION = 1
CURVE = "training.jsonl"
CURVE_POINTS = 20  # of a loss curve
CURVE_INSTANCES = 64  # held-out instances whose loss is measured at each point
_STATE = "state"
_COMPLETE = "complete"
_HOW = (
    "dataloader_",
    "ddp_",
    "fsdp",
    "deepspeed",
    "gradient_checkpointing",
    "report_to",
    "run_name",
    "tf32",
    "log_level",
)
_CURVE_NAMES = {"loss": "train_loss", "eval_loss": "held_out_loss"}
_COMPILE_FROM_FLOPS = 1e15  # on CPU compiling saves 6 to 20 % and costs 15 s a model; measured, NOTES.md


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a model is trained and measured on.

    Attributes:
        rows: instances, `input_ids [T+1]` and optionally `length`.
        tokenizer: that made them; a copy goes into the model's folder.
        held_out: instances for the loss curve, or None.
        counted: the rule for which targets count.

    """

    rows: datasets.Dataset
    tokenizer: Tokenizer
    held_out: datasets.Dataset | None = None
    counted: Counted = "all"

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
        inputs: fingerprints of `data` and, where there is one, `held_out`; those of packed rows stand for the tokenizer
            too.

    """
    recipe = settings.model_dump(mode="json", exclude={"data"})
    return Identity("model", VERSION, {**recipe, "counted": counted}, inputs)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained model on disk; `transformers` takes it where it takes a folder."""

    path: Path
    manifest: artifact.Manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Of what it was trained on and how."""
        return self.manifest.fingerprint


def train(
    settings: TrainSettings,
    data: TrainingData,
    out: Path,
    what: Identity,
    compute: Compute | None = None,
    objective: Objective | None = None,
) -> Checkpoint:
    """Train a model from scratch into the artifact at `out`.

    Raises:
        RecipeError: the settings do not fit the data or `TrainingArguments`.
        ModelError: the tokenizer's vocabulary exceeds the model's, or its head is not linear.
        TrainingError: the loss is not finite.

    """

    def work(workspace: Workspace) -> Mapping[str, Any]:
        return _train(workspace, settings, data, compute or Compute(), objective or NextToken())

    return Checkpoint(out, artifact.make(out, what, work))


def read_curve(model: Path) -> list[dict[str, Any]]:
    """The loss curve of a trained model: rows of `step`, `tokens`, `train_loss`, `held_out_loss`, `learning_rate`."""
    return [json.loads(line) for line in (model / CURVE).read_text().splitlines()]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The arithmetic of a run: what happens how often."""

    steps: int
    batch_instances: int
    batch_tokens: int
    interval_steps: int  # between points of the curve
    checkpoint_steps: int  # a multiple of the interval, so that a point's average never spans a resume

    @classmethod
    def of(cls, settings: TrainSettings, sequence_length: int, compute: Compute) -> _Plan:
        assert settings.batch_tokens is not None
        instances = settings.batch_tokens // sequence_length
        if instances == 0:
            raise RecipeError(
                "a batch is smaller than one instance.",
                facts={"batch_tokens": f"{settings.batch_tokens:,}", "sequence_length": f"{sequence_length:,}"},
            )
        steps = settings.tokens // (instances * sequence_length)
        if steps == 0:
            raise RecipeError(
                "the training is shorter than one batch.",
                facts={"tokens": f"{settings.tokens:,}", "tokens of a batch": f"{instances * sequence_length:,}"},
                remedy="Raise `tokens`, or lower `batch_tokens`.",
            )
        interval = max(1, steps // CURVE_POINTS)
        checkpoint = -(-steps // compute.checkpoints)
        return cls(steps, instances, instances * sequence_length, interval, -(-checkpoint // interval) * interval)


def _train(
    work: Workspace, settings: TrainSettings, data: TrainingData, compute: Compute, objective: Objective
) -> Mapping[str, Any]:
    resolved = resolve(settings, data.tokenizer.vocab_size, data.tokenizer.separator)
    assert resolved.config is not None
    plan = _Plan.of(resolved, data.sequence_length, compute)
    check_length(resolved.config, data.sequence_length)
    transformers_logging.disable_progress_bar()  # ours is enough
    transformers_logging.set_verbosity_error()  # the Trainer remarks on our short runs
    model = new_model(resolved.config, resolved.seed)
    check_head(model)
    arguments = _arguments(resolved, plan, compute, work.path / _STATE, data.held_out is not None)
    if _compiles(compute, model, data, plan, arguments):
        model.base_model.compile()
    with progress(f"train {work.path.name.removesuffix('.partial')}", plan.steps * plan.batch_tokens, "tok") as meter:
        trainer = _Trainer(model, arguments, data, plan, settings.seed, objective, meter)
        resume = _last_checkpoint(work.path / _STATE)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise TrainingError(
            f"the weights are no numbers after the last of {plan.steps:,} steps.",
            remedy="Lower the learning rate, or train in float32 (`precision: float32`).",
        )
    tokens = plan.steps * plan.batch_tokens
    curve = _curve(trainer.state.log_history, plan)
    counts = {
        "parameters": model.num_parameters(),
        "train_tokens": tokens,
        "steps": plan.steps,
        "batch_tokens": plan.batch_tokens,
        "instances": len(data.rows),
        "epochs": round(plan.steps * plan.batch_instances / len(data.rows), 4),
        "train_flops": training_flops(model, data.sequence_length, tokens),
        "model_type": model.config.model_type,
        "vocab_size": model.config.get_text_config().vocab_size,
        "final_train_loss": curve[-1]["train_loss"],
    }
    _save(work, model, data, curve, counts)
    work.remove(_STATE)
    work.provenance |= {"device": str(arguments.device), "micro_batch": arguments.per_device_train_batch_size}
    return counts


class _Trainer(Trainer):
    """The Trainer with our order, our loss and our progress."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        data: TrainingData,
        plan: _Plan,
        seed: int,
        objective: Objective,
        meter: Meter,
    ) -> None:
        curve_rows = None
        if data.held_out is not None:
            chosen = np.linspace(0, len(data.held_out) - 1, min(CURVE_INSTANCES, len(data.held_out))).astype(np.int64)
            curve_rows = InOrder(data.held_out.select(chosen))
        super().__init__(
            model=model,
            args=arguments,
            data_collator=Collator(data.tokenizer.separator, data.counted),
            train_dataset=TrainingOrder(data.rows, plan.steps * plan.batch_instances, seed),
            eval_dataset=curve_rows,
            callbacks=[_Checkpoints(), _Progress(meter, plan.batch_tokens)],
        )
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the micro-batch
        self.objective = objective
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The objective's loss."""
        with self.accelerator.autocast():  # the Trainer wraps model.forward only, which we do not call
            loss, _ = self.objective.loss(model, inputs)
        return loss

    def prediction_step(
        self, model: PreTrainedModel, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The objective's loss, without gradients."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


class _Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete once every file of it is on the disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        artifact.fsync_tree(folder)
        (folder / _COMPLETE).touch()
        artifact.fsync_tree(folder)


class _Progress(TrainerCallback):
    """Feeds the progress meter, and stops the run when the loss is no number."""

    def __init__(self, meter: Meter, batch_tokens: int) -> None:
        self.meter, self.batch_tokens = meter, batch_tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.meter.skip(state.global_step * self.batch_tokens)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.advance(self.batch_tokens)
        if state.global_step == args.max_steps:  # the curve ends where the training ends
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        loss = logs.get("loss", 0.0)
        if not np.isfinite(loss):
            raise TrainingError(
                f"the training loss is {loss} at step {state.global_step}.",
                remedy="Lower the learning rate, or train in float32 (`precision: float32`).",
            )


def _arguments(
    settings: TrainSettings, plan: _Plan, compute: Compute, state: Path, measures: bool
) -> TrainingArguments:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "training by several processes is not in this version.",
            facts={"WORLD_SIZE": os.environ["WORLD_SIZE"]},
            remedy="Start it with plain `miniplm`, not with torchrun or accelerate launch.",
        )
    micro = min(compute.train_micro_batch, plan.batch_instances)
    if plan.batch_instances % micro:
        raise RecipeError(
            "a batch cannot be divided evenly.",
            facts={
                "instances of a batch": plan.batch_instances,
                "compute.train_micro_batch": micro,
            },
            remedy="Make batch_tokens / sequence_length a multiple of compute.train_micro_batch.",
        )
    ours: dict[str, Any] = {
        "output_dir": str(state),
        "max_steps": plan.steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": plan.batch_instances // micro,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_ratio},
        "warmup_steps": round(settings.warmup_ratio * plan.steps),
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_epsilon": settings.epsilon,
        "max_grad_norm": settings.clip,
        "bf16": settings.precision == "bfloat16",
        "fp16": settings.precision == "float16",
        "seed": settings.seed,
        "use_cpu": choose_device(compute.device).type == "cpu",
        "save_strategy": "steps",
        "save_steps": plan.checkpoint_steps,
        "save_total_limit": 2,  # one may be half-written
        "logging_strategy": "steps",
        "logging_steps": plan.interval_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if measures else "no",
        "eval_steps": plan.interval_steps,
        "remove_unused_columns": False,
    }
    theirs = {
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not ours["use_cpu"],
        "optim": "adamw_torch_fused",
    }
    asked = {**settings.trainer, **compute.trainer}
    if taken := sorted(set(asked) & set(ours)):
        raise RecipeError(
            f"`trainer: {{{taken[0]}: ...}}` is decided by the recipe's own settings.",
            remedy="Use tokens, batch_tokens, learning_rate, warmup_ratio, precision, seed, compute.train_micro_batch.",
        )
    for name in compute.trainer:
        if not name.startswith(_HOW):
            raise RecipeError(
                f"`compute.trainer: {{{name}: ...}}` may change the model; `compute` is in no fingerprint.",
                facts={"may begin with": ", ".join(_HOW)},
                remedy="Put it under the model's own `trainer:`.",
            )
    try:
        arguments = TrainingArguments(**ours, **{**theirs, **asked})
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "transformers.TrainingArguments refuses what is under `trainer`.",
            facts={"because": str(error).splitlines()[0]},
        ) from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: never DataParallel by surprise
    return arguments


def _compiles(
    compute: Compute, model: PreTrainedModel, data: TrainingData, plan: _Plan, arguments: TrainingArguments
) -> bool:
    if compute.compile != "auto":
        return compute.compile
    flops = training_flops(model, data.sequence_length, plan.steps * plan.batch_tokens)
    return arguments.device.type == "cuda" or flops > _COMPILE_FROM_FLOPS


def _last_checkpoint(state: Path) -> Path | None:
    """The newest complete checkpoint; all others are removed."""
    found = sorted(state.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    complete = [p for p in found if (p / _COMPLETE).exists()]
    for other in found:
        if not complete or other != complete[-1]:
            shutil.rmtree(other)
    return complete[-1] if complete else None


def _curve(history: list[dict[str, Any]], plan: _Plan) -> list[dict[str, Any]]:
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        point = points.setdefault(entry["step"], {"step": entry["step"], "tokens": entry["step"] * plan.batch_tokens})
        for theirs in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            if theirs in entry:
                point[_CURVE_NAMES.get(theirs, theirs)] = entry[theirs]
    return [points[step] for step in sorted(points) if "train_loss" in points[step]]


def _save(
    work: Workspace,
    model: PreTrainedModel,
    data: TrainingData,
    curve: list[dict[str, Any]],
    counts: Mapping[str, Any],
) -> None:
    """Write the model's folder, file by file, into the artifact."""
    folder = work.path / _STATE / "final"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    separator = data.tokenizer.token(data.tokenizer.separator)
    data.tokenizer.backend.encode_special_tokens = False
    PreTrainedTokenizerFast(
        tokenizer_object=data.tokenizer.backend, eos_token=separator, pad_token=separator
    ).save_pretrained(folder)
    data.tokenizer.backend.encode_special_tokens = True
    (folder / "README.md").write_text(_card(counts), encoding="utf-8")
    (folder / CURVE).write_text("".join(json.dumps(point) + "\n" for point in curve))
    for path in sorted(folder.iterdir()):
        with work.part(path.name) as temporary:
            path.rename(temporary)


def _card(counts: Mapping[str, Any]) -> str:
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [miniplm]", "---", "",
        f"# A {counts['parameters'] / 1e6:,.1f}M-parameter {counts['model_type']} model", "",
        "Pre-trained from scratch by miniplm (MiniPLM, arXiv 2410.17215). What it was made of is in `manifest.json`,",
        "its losses in `training.jsonl`.", "",
        "| | |", "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value:,} |" for name, value in counts.items() if isinstance(value, int)),
        f"| final training loss (nats per token) | {counts['final_train_loss']:.4f} |", "",
    ]  # fmt: skip
    return "\n".join(lines)
