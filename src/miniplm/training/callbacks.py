"""What happens along the way besides steps: states that can be resumed from, models that are kept, progress."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from miniplm import artifact
from miniplm.errors import TrainingError
from miniplm.progress import Meter
from miniplm.training import processes
from miniplm.training.plan import Plan

_COMPLETE = "complete"  # in a state whose every file is on the disk; holds `State` but for the path
_SHARDED_WEIGHTS = "pytorch_model_fsdp*"


@dataclass(frozen=True, slots=True)
class State:
    """A state that a training can go on from.

    Attributes:
        path: of its folder.
        seconds: of training that led to it.
        processes: that made it.
        sharded: whether the weights were shared out among them.

    """

    path: Path
    seconds: float
    processes: int
    sharded: bool

    def check_readable(self, sharded: bool) -> None:
        """Raise TrainingError if a run cannot read the state, for one has shared out the weights and one has not."""
        if self.sharded == sharded:
            return
        asked = "with `fsdp` or `deepspeed` under compute.trainer" if self.sharded else "without `fsdp` and `deepspeed`"
        raise TrainingError(
            "the state of the interrupted training cannot be read by this run.",
            facts={
                "state": f"{_kind(self.sharded)}, {self.processes} process{'es' * (self.processes > 1)}",
                "this run": f"{_kind(sharded)}, {processes.count()} process{'es' * (processes.count() > 1)}",
            },
            remedy=f"Start it as it was begun: {asked}"
            f"{', in several processes' * self.sharded}. Or remove {self.path.parent}, and it begins anew.",
        )


def _kind(sharded: bool) -> str:
    return "weights shared out" if sharded else "weights whole"


class Stopwatch:
    """Seconds of training, those before an interruption counted in.

    Attributes:
        resumed: whether there were earlier runs.
        before: seconds of earlier runs that count.

    """

    def __init__(self, state: State | None) -> None:
        self.resumed = state is not None
        self.before = 0.0 if state is None else state.seconds
        self.begun = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds of this run."""
        return time.monotonic() - self.begun

    @property
    def total(self) -> float:
        """Seconds of all runs."""
        return self.before + self.now


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once every file of every process is on the disk."""

    def __init__(self, watch: Stopwatch, sharded: bool) -> None:
        self.watch, self.sharded = watch, sharded

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        processes.meet()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        said = {"seconds": round(self.watch.total, 3), "processes": processes.count(), "sharded": self.sharded}

        def mark() -> None:
            artifact.fsync_tree(folder)
            (folder / _COMPLETE).write_text(json.dumps(said))
            artifact.fsync_tree(folder)

        processes.led(mark)


class KeptModels(TrainerCallback):
    """Has the model itself written after the steps that the plan names."""

    def __init__(self, plan: Plan, write: Callable[[int], None]) -> None:
        self.plan, self.write = plan, write

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.plan.kept:
            self.write(state.global_step)


class ShownProgress(TrainerCallback):
    """Feeds the progress meter: tokens, and the share of the machine's matrix products."""

    def __init__(self, meter: Meter, plan: Plan, flops_per_token: float, peak: float, watch: Stopwatch) -> None:
        self.meter, self.plan, self.watch = meter, plan, watch
        self.flops_per_token, self.peak = flops_per_token, peak
        self.tokens = 0  # of this run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.watch.begun = time.monotonic()
        if state.global_step:
            self.meter.skip(state.global_step * self.plan.batch_tokens)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.tokens += self.plan.batch_tokens
        self.meter.note(f"{self.share:.0%} of peak")
        self.meter.advance(self.plan.batch_tokens)
        if state.global_step == args.max_steps:  # the curve ends where the training ends
            control.should_log = True

    @property
    def flops_per_s(self) -> float:
        """Operations per second of this run, by all processes."""
        return self.tokens * self.flops_per_token / max(self.watch.now, 1e-9)

    @property
    def share(self) -> float:
        """Of what the processes' matrix products reach."""
        return self.flops_per_s / self.peak


def last_state(folder: Path) -> State | None:
    """The newest complete state below a folder, None if there is none; all others are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    complete = [p for p in found if (p / _COMPLETE).exists()]
    for other in found:
        if not complete or other != complete[-1]:
            shutil.rmtree(other)
    if not complete:
        return None
    newest = complete[-1]
    said = json.loads((newest / _COMPLETE).read_text())
    sharded = said.get("sharded", any(newest.glob(_SHARDED_WEIGHTS)))  # states of before say seconds alone
    return State(newest, float(said["seconds"]), int(said.get("processes", 1)), bool(sharded))


def rates(watch: Stopwatch, tokens: int, flops_per_token: float, peak: float) -> dict[str, float]:
    """How fast a whole training went, earlier runs counted in; empty where its seconds are not known.

    Args:
        watch: of the training.
        tokens: predicted in all.
        flops_per_token: operations of each.
        peak: what the processes' matrix products reach, operations per second.

    """
    if watch.total <= 0 or (watch.resumed and watch.before <= 0):
        return {}
    flops_per_s = tokens * flops_per_token / watch.total
    return {
        "train_seconds": round(watch.total, 3),
        "tokens_per_s": round(tokens / watch.total),
        "flops_per_s": round(flops_per_s),
        "share_of_matmul_rate": round(flops_per_s / peak, 4),
    }
