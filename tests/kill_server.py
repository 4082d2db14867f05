"""Runs stages in forked children and kills them; `test_kill.py` starts it and talks to it in JSON lines.

Everything slow to import is imported once; no tensor is computed here, so a forked child finds no threads it has lost.
An order: `recipe`, `root`, `stage` (or `report`), and `delay` (seconds after the stage has begun; null: no kill) or
`event` (the stage kills itself before its n-th change to the file system). An answer: `killed`, `status`, `seconds`,
`events`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import datasets  # noqa: F401
import pyarrow.dataset  # noqa: F401
import torch
import transformers
import transformers.models.qwen2.modeling_qwen2

from miniplm.corpus import builtin
from miniplm.pipeline.chain import Chain, chain
from miniplm.recipe import load

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
WRITES = os.O_WRONLY | os.O_RDWR


def main() -> None:
    transformers.AutoModelForCausalLM, transformers.Trainer  # noqa: B018 (their modules load when first touched)
    builtin.draw = functools.cache(builtin.draw)  # walks over everything installed: once is enough
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a stage that prints does not spoil the answers
    for line in sys.stdin:
        order = json.loads(line)
        chain_of(order["recipe"], order["root"])
        answers.write(json.dumps(attempt(order)) + "\n")
        answers.flush()


@functools.cache
def chain_of(recipe: str, root: str) -> Chain:
    """The stages, made once: reading YAML and hashing files is not what is tested."""
    return chain(load(recipe), Path(root))


def attempt(order: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, let it work, kill it when it is time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        work(order, writer)
    os.close(writer)
    os.read(reader, 1)  # the stage begins (or the child has ended before)
    begun = time.monotonic()
    if order.get("delay") is None:
        _, status = os.waitpid(child, 0)
    else:
        if signal.sigtimedwait({signal.SIGCHLD}, order["delay"]) is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    while signal.sigtimedwait({signal.SIGCHLD}, 0) is not None:
        pass  # its signal is not that of the next child
    seconds = time.monotonic() - begun
    count = os.read(reader, 4)
    os.close(reader)
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "status": status,
        "seconds": seconds,
        "events": struct.unpack("I", count)[0] if count else 0,
    }


def work(order: dict[str, Any], writer: int) -> None:
    """The child: make one stage; never returns."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        torch.set_num_threads(1)
        stages = chain_of(order["recipe"], order["root"])
        events = 0
        if order.get("event") is not None:

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal events
                if event not in CHANGES or (event == "open" and not arguments[2] & WRITES):
                    return
                inside = str(arguments[0]).startswith(order["root"])
                if inside or (event != "open" and arguments[-1] != -1):  # the latter: inside a folder that is removed
                    if events == order["event"]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    events += 1

            sys.addaudithook(hook)
        if order["stage"] == "report":
            from miniplm.report.write import write_report

            os.write(writer, b"b")
            write_report(stages)
        else:
            stage = stages[order["stage"]]
            stage.path.parent.mkdir(parents=True, exist_ok=True)
            os.write(writer, b"b")
            stage.make()
        os.write(writer, struct.pack("I", events))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
