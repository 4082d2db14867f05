"""Scores a packed part again and again in forked children and kills them; `test_local.py` starts it.

Arguments: the packed part, the folder for the runs, how many kills. Everything slow to import is imported once; nothing
is computed before the forks. Prints the kills that have really happened.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pyarrow.dataset  # noqa: F401
from small import score_slowly

from miniplm.packing.instances import Packed, open_packed

KILLS_IN_A_ROW = 8  # then the run may finish
PACE_SECONDS = 0.003  # a shard, on average


def main(pool: Path, root: Path, kills: int) -> None:
    packed = open_packed(pool)
    assert packed.tokenizer  # loaded once
    assert not attempt(packed, root / "0", None)
    begun = time.monotonic()
    assert not attempt(packed, root / "1", None)
    whole = time.monotonic() - begun
    draw = random.Random(kills)
    killed, run = 0, 1
    while killed < kills:
        run += 1
        row = 0
        while not (root / str(run)).exists():
            at = draw.uniform(0, whole / 2) if row < KILLS_IN_A_ROW and killed < kills else None
            hit = attempt(packed, root / str(run), at)
            row += hit
            killed += hit
    print(killed)


def attempt(packed: Packed, out: Path, delay: float | None) -> bool:
    """Score in a child; kill it after `delay` seconds. Whether it was killed; any other failure ends this program."""
    child = os.fork()
    if child == 0:
        try:
            score_slowly(packed, out, seconds=PACE_SECONDS, seed=0)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # it may have ended: nobody has asked for its status yet, so its id is its own
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        sys.exit("scoring failed; its traceback is above")
    return killed


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
