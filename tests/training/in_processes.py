"""Trains in each of several processes; `test_processes.py` starts it with torchrun, and calls `train`.

On the command line: JSON, a list of trainings that follow each other. A training: `corpus`, `out`, `settings` and
`compute`; `teacher`, if any; `trouble`, if any: what happens to which ranks at which of their micro-batches, counted
from 0 (`kill`: it kills itself; `stop`: what control-C raises; `nan`: its loss is no number; `full disk`: from then on
no model can be kept); `sharded`: whether accelerate is made to shard between CPUs from here on. An error of ours is
printed, and the next training begun. Each process writes what it sees to `<out>.seen/<rank>.jsonl`: a line for a micro-
batch, the positions in the training and the rows' first tokens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor
from transformers import PreTrainedModel

import miniplm
from miniplm.training import processes
from miniplm.training import trainer as training
from miniplm.training.objectives import Batch, Objective


def shard_on_cpu() -> None:
    """Make accelerate shard between CPUs too: it does so between accelerators only, and torch can."""
    begin = AcceleratorState.__init__

    def begun(self: AcceleratorState, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        begin(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begun


def no_room(*given: Any, **named: Any) -> None:
    raise OSError("the disk is full, for a test")


class Seen:
    """An objective that writes down what another one sees, and gets into trouble."""

    def __init__(self, other: Objective, log: Path, trouble: str, at: int) -> None:
        self.other, self.log, self.trouble, self.at = other, log, trouble, at
        self.batches = 0

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        trouble = self.trouble if self.batches == self.at else ""
        if trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "stop":
            raise KeyboardInterrupt
        if trouble == "full disk":
            model.save_pretrained = no_room
        loss, metrics = self.other.loss(model, batch)
        with self.log.open("a") as file:
            file.write(json.dumps([batch["positions"].tolist(), batch["input_ids"][:, :8].tolist()]) + "\n")
        self.batches += 1
        return (loss * torch.nan if trouble == "nan" else loss), metrics


def train(
    corpus: str,
    out: str,
    settings: dict[str, Any],
    compute: dict[str, Any],
    teacher: str | None = None,
    trouble: tuple[str, Sequence[int], int] = ("", (), 0),
) -> None:
    """`miniplm.train` in this process, with its objective watched."""
    what, whose, at = trouble
    rank = processes.rank()
    seen = Path(f"{out}.seen")
    seen.mkdir(exist_ok=True, parents=True)
    make = training.objective_from

    def watched(*given: Any, **named: Any) -> Objective:
        return Seen(make(*given, **named), seen / f"{rank}.jsonl", what if rank in whose else "", at)

    opened = miniplm.open_corpus(corpus)
    training.objective_from = watched
    try:
        miniplm.train(
            settings["config"],
            opened.pool,
            out=out,
            held_out=opened.held_out,
            teacher=teacher,
            compute=miniplm.Compute(device="cpu", **compute),
            **{name: value for name, value in settings.items() if name != "config"},
        )
    finally:
        training.objective_from = make


if __name__ == "__main__":
    torch.set_num_threads(1)
    for asked in json.loads(sys.argv[1]):
        if asked.pop("sharded", False):
            shard_on_cpu()
        try:
            train(**asked)
        except (miniplm.MiniplmError, KeyboardInterrupt, OSError) as error:
            print(f"process {processes.rank()}: {error}", file=sys.stderr)
