"""From a recipe's settings to `transformers.TrainingArguments`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from miniplm.errors import RecipeError
from miniplm.models.load import choose_device
from miniplm.recipe import Compute, TrainSettings
from miniplm.training import processes
from miniplm.training.plan import Plan

_NO_EFFECT = {  # an argument of the Trainer's that a loss, an order and a resume of our own leave without its effect
    "label_smoothing_factor": "the loss is the objective's",
    "train_sampling_strategy": "the order follows from the seed",
    "length_column_name": "the order follows from the seed",
    "num_train_epochs": "`tokens` or `epochs` of the model say how long",
    "auto_find_batch_size": "`batch_tokens` says how large",
    "ignore_data_skip": "a training goes on where it stopped",
    "save_only_model": "a training goes on where it stopped",
}
_HOW = ("dataloader_", "ddp_", "fsdp", "deepspeed", "tf32", "log_level")
_NAMES = TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


def arguments(settings: TrainSettings, plan: Plan, compute: Compute, state: Path, logs: Path) -> TrainingArguments:
    """The Trainer's arguments; `state` is where it saves its own, `logs` where TensorBoard's events go.

    Raises:
        RecipeError: what is under `trainer` is decided elsewhere or refused by transformers, or a batch cannot be
            divided.

    """
    device = training_device(compute)
    if settings.precision == "float16" and device.type == "cpu":
        raise RecipeError(
            "float16 cannot be trained in on a CPU: it has no loss scaling there.",
            remedy="Use `precision: bfloat16`, which needs none.",
        )
    micro = plan.micro_batch(compute.train_micro_batch, processes.count())
    ours: dict[str, Any] = {
        "output_dir": str(state),
        "max_steps": plan.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": plan.batch_instances // (micro * processes.count()),
        _CHECKPOINTING: compute.activation_checkpointing,
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
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps",
        "save_steps": plan.checkpoint_steps,
        "save_total_limit": 2,  # one may be half-written
        "logging_strategy": "steps",
        "logging_steps": plan.interval_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",  # the curve is measured with the log, see trainer.py
        "remove_unused_columns": False,
        "report_to": compute.report_to if processes.leads() else "none",
        "run_name": logs.name,
    }
    theirs = {
        "disable_tqdm": True,
        "dataloader_pin_memory": not ours["use_cpu"],
        "ddp_find_unused_parameters": False,
        "optim": "adamw_torch_fused",
    }
    _check_asked(settings, compute, set(ours))
    asked = {**settings.trainer, **compute.trainer}
    if processes.count() == 1:  # nobody to share weights with
        asked = {name: value for name, value in asked.items() if not name.startswith("fsdp")}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)  # the Trainer has no argument for it any more
    try:
        made = TrainingArguments(**ours, **{**theirs, **asked})
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise RecipeError(
            "transformers.TrainingArguments refuses these settings.",
            facts={"because": str(error).splitlines()[0]},
        ) from error
    processes.led(lambda: _check_reporters(made.report_to))  # the others report to nobody
    made._n_gpu = min(made.n_gpu, 1)  # a process has one device: never DataParallel by surprise
    place_on(made, device)
    return made


def training_device(compute: Compute) -> torch.device:
    """The device that `compute.device` stands for.

    Raises:
        ModelError: there is none.
        RecipeError: it cannot be trained on, or is one for several processes.

    """
    device = choose_device(compute.device)
    if device.type not in {"cpu", "cuda"}:
        raise RecipeError(
            f"training does not run on {device.type}: it needs float64 sums.", remedy="Use `device: cpu` or `cuda`."
        )
    if device.index is not None and processes.count() > 1:
        raise RecipeError(
            f"`device: {compute.device}` is one device for {processes.count()} processes.",
            remedy="Use `device: cuda`: each process takes its own; CUDA_VISIBLE_DEVICES says which there are.",
        )
    return device


def place_on(made: TrainingArguments, device: torch.device) -> None:
    """Have the Trainer use this very device, where one is named: by itself it takes the first."""
    if device.index is not None:
        made.__dict__["_setup_devices"] = device  # what the cached property of this name has found
        torch.cuda.set_device(device)


def _check_asked(settings: TrainSettings, compute: Compute, ours: set[str]) -> None:
    """Refuse what is decided elsewhere, has no effect, or may change the model without entering its fingerprint."""
    asked = set(settings.trainer) | set(compute.trainer)
    if taken := sorted(asked & ours):
        raise RecipeError(
            f"`trainer: {{{taken[0]}: ...}}` is decided by the recipe's own settings.",
            remedy="Use tokens, batch_tokens, learning_rate, warmup_ratio, precision, seed, and of compute "
            "train_micro_batch, activation_checkpointing, report_to.",
        )
    if idle := sorted(asked & set(_NO_EFFECT)):
        raise RecipeError(
            f"`trainer: {{{idle[0]}: ...}}` would not do here what it says: {_NO_EFFECT[idle[0]]}.",
            remedy="Leave it out; a loss of your own is `objective: package.module:Class`.",
        )
    for name in compute.trainer:
        if not name.startswith(_HOW):
            raise RecipeError(
                f"`compute.trainer: {{{name}: ...}}` may change the model; `compute` is in no fingerprint.",
                facts={"may begin with": ", ".join(_HOW)},
                remedy="Put it under the model's own `trainer:`.",
            )
    for where, given in (("compute.trainer", compute.trainer), ("trainer", settings.trainer)):
        config = given.get("deepspeed")
        sections = sorted({"optimizer", "scheduler"} & set(_deepspeed(config)))
        if sections and (where == "compute.trainer" or isinstance(config, str)):
            raise RecipeError(
                f"`{where}: {{deepspeed: ...}}` has sections that change the model and are in no fingerprint.",
                facts={"sections": ", ".join(sections)},
                remedy="Take them out: optimiser and schedule are the model's settings. Or write the whole "
                "configuration, no path, under the model's own `trainer: {deepspeed: ...}`.",
            )


def _deepspeed(config: object) -> Mapping[str, object]:
    """A DeepSpeed configuration, itself or by its path; empty if there is none."""
    if isinstance(config, str | os.PathLike):
        try:
            config = json.loads(Path(config).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                "the DeepSpeed configuration cannot be read.",
                facts={"file": config, "because": str(error).splitlines()[0]},
            ) from error
    return config if isinstance(config, Mapping) else {}


def _check_reporters(names: Sequence[str]) -> None:
    """Find out now what the Trainer would find out later, in words of its own."""
    for name in names:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise RecipeError(
                f"`compute.report_to`: there is no reporting to {name!r} here.",
                facts={"because": str(error).splitlines()[0]},
                remedy="Install what it needs, or say `report_to: none`.",
            ) from error


def autocast_dtype(settings: TrainSettings) -> torch.dtype:
    """What products are taken in."""
    found: torch.dtype = getattr(torch, settings.precision)
    return found
