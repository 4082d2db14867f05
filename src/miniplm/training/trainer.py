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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.errors import MiniplmError, RecipeError, TrainingError
from miniplm.models.attention import use_blocked_attention
from miniplm.models.compiled import compile_layers
from miniplm.models.flops import forward_flops, matmul_rate
from miniplm.models.head import check_head
from miniplm.models.load import check_length, check_reads, load_model, new_model
from miniplm.progress import progress
from miniplm.recipe import Compute, Counted, GivenModel, OwnObjective, TrainSettings
from miniplm.training import processes
from miniplm.training.arguments import arguments, autocast_dtype, training_device
from miniplm.training.callbacks import CompleteCheckpoints, KeptModels, ShownProgress, Stopwatch, last_state, rates
from miniplm.training.checkpoint import Checkpoint, Point, card, curve_lines, public_name, write_model
from miniplm.training.loop import Loop
from miniplm.training.loop import TrainingData as TrainingData
from miniplm.training.matching import matched_share, passes
from miniplm.training.named import load_teacher, objective_from
from miniplm.training.objectives import Objective
from miniplm.training.plan import Plan
from miniplm.training.presets import resolve

VERSION = 2
_STATE = "state"
_POINT_NAMES = {"loss": "train_loss", "eval_loss": "held_out_loss"}
_NO_POINT = {"epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
_COMPILE_FROM_FLOPS = 5e13  # on CPU compiling saves about a fifth and costs 15 s a model; measured, NOTES.md


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
    processes.join(training_device(compute))
    asked = _Asked(settings, data, compute, teacher, objective, logs or out.parent / "logs" / out.name)
    if processes.leads():
        _lead(out, what, asked)
    else:
        _follow(out, asked)
    processes.meet()
    return Checkpoint(out, artifact.read(out))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `train` was asked."""

    settings: TrainSettings
    data: TrainingData
    compute: Compute
    teacher: GivenModel | None
    objective: Objective | None
    logs: Path


def _lead(out: Path, what: Identity, asked: _Asked) -> None:
    """Make the artifact. Tell the others whether there is anything to train, and, when they are done, how it ended."""
    they_wait = True

    def work(workspace: Workspace) -> Mapping[str, Any]:
        nonlocal they_wait
        processes.hear_leader(True)
        they_wait = False  # what stops a training stops all at once
        trained = _train(workspace, asked)
        they_wait = True
        return _write(workspace, asked, trained)

    try:
        artifact.make(out, what, work)
    except Exception as error:
        if they_wait:
            processes.hear_leader(processes.as_ours(error))
        raise
    processes.hear_leader(None)


def _follow(out: Path, asked: _Asked) -> None:
    """Hear from the leader: True, there is something to train; then, or at once, None, all is done; or an error."""
    said: bool | MiniplmError | None = processes.hear_leader(None)
    if said is True:
        _train(Workspace(artifact.partial_path(out)), asked)
        said = processes.hear_leader(None)
    if isinstance(said, MiniplmError):
        raise said


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that a training needs, the same in every process."""

    resolved: TrainSettings
    model: PreTrainedModel
    objective: Objective
    cost: _Cost
    plan: Plan
    how: TrainingArguments
    parameters: int


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a training leaves to be written down."""

    prepared: _Prepared
    weights: Mapping[str, Tensor]
    curve: list[Point]
    rates: Mapping[str, float]


def _prepare(work: Workspace, asked: _Asked) -> _Prepared:
    settings, data, compute = asked.settings, asked.data, asked.compute
    if settings.start is None:
        resolved = resolve(settings, data.tokenizer.vocab_size, data.tokenizer.separator)
    else:
        resolved = _as_before(settings, settings.start)
    length, vocabulary = data.sequence_length, data.tokenizer.vocab_size
    model = _model(resolved, data)
    teacher = load_teacher(settings, asked.teacher, data.tokenizer, length, compute)
    objective = asked.objective or objective_from(settings, teacher, vocabulary=vocabulary, sequence_length=length)
    cost = _Cost.of(settings, model, teacher, length)
    plan = Plan.of(resolved, len(data.rows), length, compute, cost.share)
    how = arguments(resolved, plan, compute, work.path / _STATE, asked.logs)
    for run, products in ((model, autocast_dtype(resolved)), (teacher, None)):
        if run is not None and how.device.type == "cpu":
            use_blocked_attention(run, products)
        if run is not None and _compiles(compute, plan, cost, how):
            compile_layers(run)
    return _Prepared(resolved, model, objective, cost, plan, how, model.num_parameters())


def _train(work: Workspace, asked: _Asked) -> _Trained:
    """Train in all processes together, from the newest state on."""
    transformers_logging.disable_progress_bar()  # ours is enough
    transformers_logging.set_verbosity_error()  # the Trainer remarks on our short runs
    made = _prepare(work, asked)
    plan, cost, how = made.plan, made.cost, made.how
    state = processes.hear_leader(last_state(work.path / _STATE) if processes.leads() else None)
    watch = Stopwatch(state)
    peak = matmul_rate(how.device, autocast_dtype(made.resolved)) * processes.count()
    name = work.path.name.removesuffix(".partial")
    with progress(f"train {name}", plan.steps * plan.batch_tokens, "tok") as meter:
        loop = Loop(made.model, how, asked.data, plan, asked.settings.seed, made.objective, cost.per_token)
        if how.fsdp and not loop.is_fsdp_enabled:
            raise RecipeError(
                f"accelerate does not shard models on the device {how.device.type!r}.",
                remedy="Take `fsdp` out of compute.trainer: each process then holds the whole model.",
            )
        if state is not None:
            state.check_readable(loop.sharded)
        loop.watch_over(asked.compute.stop_at_spike)
        for callback in (
            CompleteCheckpoints(watch, loop.sharded),
            ShownProgress(meter, plan, cost.per_token, peak, watch),
            KeptModels(plan, lambda step: loop.keep(work, step)),
        ):
            loop.add_callback(callback)
        with _autocast_left_as_it_was(how.device.type):
            loop.train(resume_from_checkpoint=None if state is None else str(state.path))
    speed = rates(watch, plan.steps * plan.batch_tokens, cost.per_token, peak)
    return _Trained(made, loop.weights(), _curve(loop.state.log_history), speed)


@contextmanager
def _autocast_left_as_it_was(kind: str) -> Iterator[None]:
    """Undo what a training leaves on: all that this process computes after it would be rounded.

    accelerate enters one and the same `torch.autocast` object around every forward pass. An objective that has the
    student continue a text (MiniLLM) calls forward within forward: the object forgets what was before.
    """
    before = torch.is_autocast_enabled(kind)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, before)


def _write(work: Workspace, asked: _Asked, trained: _Trained) -> Mapping[str, Any]:
    """Write the model that was trained; the counts for its manifest."""
    made, weights, curve = trained.prepared, trained.weights, trained.curve
    plan, settings, instances = made.plan, asked.settings, len(asked.data.rows)
    if not all(torch.isfinite(weight).all() for weight in weights.values() if weight.is_floating_point()):
        raise TrainingError(
            f"the weights are no numbers after the last of {plan.steps:,} steps.",
            remedy="Lower the learning rate, or train in float32 (`precision: float32`).",
        )
    tokens = plan.steps * plan.batch_tokens
    counts = {
        "parameters": made.parameters,
        "train_tokens": tokens,
        "steps": plan.steps,
        "batch_tokens": plan.batch_tokens,
        "learning_rate": made.resolved.learning_rate,
        "instances": instances,
        "epochs": round(plan.steps * plan.batch_instances / instances, 4),
        "train_flops": made.cost.per_token * tokens,
        "matched_share": made.cost.share,
        "model_type": made.model.config.model_type,
        "vocab_size": made.model.config.get_text_config().vocab_size,
        "final_train_loss": curve[-1]["train_loss"],
    }
    start = None if settings.start is None else settings.start.model
    readme = card(counts, _about(asked), settings.license, curve[-1], objective=_objective_name(asked), start=start)
    extra = {"README.md": readme, "training.jsonl": curve_lines(curve)}
    write_model(work, work.path / _STATE / "final", made.model, weights, asked.data.tokenizer, extra)
    work.remove(_STATE)
    work.provenance |= {
        "device": str(made.how.device),
        "processes": processes.count(),
        "micro_batch": made.how.per_device_train_batch_size,
        **trained.rates,
    }
    return counts


def _about(asked: _Asked) -> dict[str, str]:
    """What the card says of how the model was made."""
    settings = asked.settings
    usual = type(settings.objective).model_fields
    given = {
        name: value
        for name, value in settings.objective.model_dump().items()
        if name != "name" and (name not in usual or value != usual[name].default)
    }
    said = ", ".join(
        f"{name} {value:g}" if type(value) is float else f"{name} {value}" for name, value in given.items()
    )
    about = {"objective": _objective_name(asked) + (f" ({said})" if said else "")}
    if settings.needs_teacher and asked.teacher is not None:
        about["teacher"] = public_name(asked.teacher.model)
    if settings.start is not None:
        about["continued from"] = public_name(settings.start.model)
    return {**about, **asked.data.about}


def _objective_name(asked: _Asked) -> str:
    """The objective's name; of an object given in Python, which says what it is by a fingerprint, that of its class."""
    named = isinstance(asked.settings.objective, OwnObjective) or not hasattr(asked.objective, "fingerprint")
    return asked.settings.objective.name if named else type(asked.objective).__name__


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
