"""From a recipe's settings to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from collections.abc import Sequence
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

_HOW = ("dataloader_", "ddp_", "fsdp", "deepspeed", "tf32", "log_level")
_NAMES = TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


def arguments(settings: TrainSettings, plan: Plan, compute: Compute, state: Path, logs: Path) -> TrainingArguments:
    """The Trainer's arguments; `state` is where it saves its own, `logs` where TensorBoard's events go.

    Raises:
        RecipeError: what is under `trainer` is decided elsewhere or refused by transformers, or a batch cannot be
            divided.

    """
    device = choose_device(compute.device)
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
    asked = {**settings.trainer, **compute.trainer}
    if taken := sorted(set(asked) & set(ours)):
        raise RecipeError(
            f"`trainer: {{{taken[0]}: ...}}` is decided by the recipe's own settings.",
            remedy="Use tokens, batch_tokens, learning_rate, warmup_ratio, precision, seed, and of compute "
            "train_micro_batch, activation_checkpointing, report_to.",
        )
    for name in compute.trainer:
        if not name.startswith(_HOW):
            raise RecipeError(
                f"`compute.trainer: {{{name}: ...}}` may change the model; `compute` is in no fingerprint.",
                facts={"may begin with": ", ".join(_HOW)},
                remedy="Put it under the model's own `trainer:`.",
            )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)  # the Trainer has no argument for it any more
    try:
        made = TrainingArguments(**ours, **{**theirs, **asked})
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(
            "transformers.TrainingArguments refuses these settings.",
            facts={"because": str(error).splitlines()[0]},
        ) from error
    _check_reporters(made.report_to)
    made._n_gpu = min(made.n_gpu, 1)  # a process has one device: never DataParallel by surprise
    return made


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
