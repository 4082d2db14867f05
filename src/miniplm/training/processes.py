"""Several processes at one training, as `torchrun` and `accelerate launch` start them: one leads, the others follow.

The leader alone holds the artifact and writes; all compute. What follows here is only what the Trainer does not do
itself: agree on whether there is work and on what stops it, and meet at its end. Started plainly, a process is alone
and leads.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from miniplm.errors import MiniplmError, TrainingError

_Said = TypeVar("_Said")
_LOOK_EVERY_SECONDS = 0.5


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def join(device: torch.device) -> None:
    """Connect the processes, if there are several and they are not yet: gloo between CPUs, nccl between GPUs."""
    if not leads():
        os.environ["MINIPLM_PROGRESS"] = "off"  # one meter is enough
    if count() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_part)


def hear_leader(say: _Said) -> _Said:
    """What the leader says; what the others would say is of no account."""
    if count() == 1:
        return say
    said = [say]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def led(work: Callable[[], object]) -> None:
    """Have the leader do what it does alone; all wait, and what stops it stops all.

    Raises:
        MiniplmError: what stopped the leader; in the leader, the error as it was.

    """
    found: Exception | None = None
    if leads():
        try:
            work()
        except Exception as error:
            found = error
    agree(found)


def agree(found: Exception | None) -> None:
    """Go on together or stop together: what stopped the leader (None: nothing) is raised in all, after they have met.

    Raises:
        MiniplmError: what stopped the leader; in each process, what stopped itself as it was.

    """
    told = hear_leader(None if found is None else as_ours(found))
    if (error := found or told) is not None:
        raise error


def as_ours(error: Exception) -> MiniplmError:
    """An error of the leader's as the others hear of it."""
    return error if isinstance(error, MiniplmError) else TrainingError(f"the process that leads failed: {error}")


def meet() -> None:
    """Wait for all."""
    if count() > 1:
        dist.barrier()


def wait_until(there: Callable[[], bool]) -> None:
    """Wait for what the leader makes alone, however long it takes; a leader that fails ends all processes."""
    while not there():
        time.sleep(_LOOK_EVERY_SECONDS)


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
