"""What the engine tests share: a small packed pool of many shards, a scorer that needs no torch, comparisons by name.

Ray's workers import this module too, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from miniplm.packing.instances import Packed
    from miniplm.packing.prepare import Corpus

FILES = 16


def write_documents(folder: Path) -> str:
    """The files of a corpus; returns the pattern of their names."""
    from conftest import write_jsonl

    for number in range(FILES):
        write_jsonl(folder / f"{number:02d}.jsonl", 10, seed=number)
    return f"{folder}/*.jsonl"


def prepare_small(documents: str, out: Path, compute: Any = None) -> Corpus:
    """Each file is a group and has one or two blocks, so the pool has about 40 shards of a few instances."""
    from miniplm.pipeline.library import prepare

    return prepare(
        documents,
        tokenizer={"train": {"vocab_size": 300}},
        out=out,
        sequence_length=32,
        block_bytes=2000,
        split={"reference": 0.2, "held_out": 0.1},
        columns={"id": "text"},  # the files number their documents alike
        compute=compute,
    )


class SlowScorer:
    """Log p by arithmetic on the token ids, `seconds` for a batch (0 to twice as much at random if a seed is given).

    Where there is a `log` folder, each process has a file in it, named by its process id: first the name of the Ray
    node, then a line for each batch it has begun. A process on the node that the file `log.hold` names stays in its
    batch until it is killed.
    """

    def __init__(self, seconds: float = 0.0, log: Path | None = None, seed: int | None = None) -> None:
        self.seconds, self.log = seconds, log and log / str(os.getpid())
        self.draw = None if seed is None else random.Random(f"{seed} {os.getpid()}")
        self._note(node())

    def score(self, tokens: np.ndarray[Any, Any], counted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self._note("batch")
        while self.log is not None and self._held(self.log.parent.with_suffix(".hold")):
            time.sleep(0.05)
        time.sleep(self.seconds if self.draw is None else self.draw.uniform(0, 2 * self.seconds))
        return -np.where(counted, np.sqrt(1.0 + tokens[:, 1:] % 17), 0.0).sum(axis=1)

    def _held(self, hold: Path) -> bool:
        held = hold.exists() and hold.read_text() == node()
        if held:
            self._note("held")
        return held

    def _note(self, line: str) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(line + "\n")


def node() -> str:
    """The Ray node that this process is on; nothing if it is no worker of Ray."""
    if "RAY_JOB_ID" not in os.environ:
        return ""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def score_slowly(packed: Packed, out: Path, compute: Any = None, **how: Any) -> Path:
    """Score with a `SlowScorer`; the identity is the same whatever its pace."""
    from miniplm.pipeline.engines import engine_of
    from miniplm.recipe import Compute, ScoreSettings
    from miniplm.scoring.score import identity, score

    compute = compute or Compute()
    make_scorer: Callable[[], SlowScorer] = partial(SlowScorer, **how)
    what = identity(packed.fingerprint, "slow", ScoreSettings())
    score(packed, make_scorer, out, what, compute, engine_of(compute))
    return out


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder but `provenance.json`: name -> bytes."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != "provenance.json"}


def assert_same(found: Path, expected: Path) -> None:
    """The same names and bytes; a difference is told by name."""
    ours, theirs = contents(found), contents(expected)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def assert_each_once(scores: Path, instances: int) -> None:
    """Every instance is in exactly one shard, in order."""
    rows = np.concatenate([pq.read_table(path)["instance"].to_numpy() for path in sorted(scores.glob("*.parquet"))])
    assert rows.tolist() == list(range(instances))
