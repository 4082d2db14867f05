"""What happens along the way besides steps: states that can be resumed from, models that are kept, progress."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from miniplm import artifact
from miniplm.progress import Meter
from miniplm.training import processes
from miniplm.training.plan import Plan

_COMPLETE = "complete"  # in a checkpoint whose every file is on the disk; holds the seconds of training so far


class Stopwatch:
    """Seconds of training, those before an interruption counted in.

    Attributes:
        before: seconds of earlier runs that count.

    """

    def __init__(self, before: float) -> None:
        self.before = before
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

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        processes.meet()
        if processes.leads():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            artifact.fsync_tree(folder)
            (folder / _COMPLETE).write_text(json.dumps({"seconds": round(self.watch.total, 3)}))
            artifact.fsync_tree(folder)
        processes.meet()


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


def last_checkpoint(state: Path) -> tuple[Path | None, float]:
    """The newest complete checkpoint, and the seconds it took to get there; all others are removed."""
    found = sorted(state.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    complete = [p for p in found if (p / _COMPLETE).exists()]
    for other in found:
        if not complete or other != complete[-1]:
            shutil.rmtree(other)
    if not complete:
        return None, 0.0
    return complete[-1], float(json.loads((complete[-1] / _COMPLETE).read_text())["seconds"])
