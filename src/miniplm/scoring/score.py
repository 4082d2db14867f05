"""The stage `score`: every instance of a packed part under one model.

In: a packed part and a model (by name, folder, server, or a `Scorer`). Out: `Scores`: Parquet, one file for each shard
of the part. A shard is the unit of work, retry and commit; killed and begun again, scoring goes on with the next shard,
and the bytes are the same. While a batch is computed, the next are prepared and handed over (`Scorer.submit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.engine.base import Advance, Engine
from miniplm.engine.local import LocalEngine
from miniplm.errors import ScoreError
from miniplm.packing.instances import Instances, Packed, read_shard, shard_rows
from miniplm.progress import progress
from miniplm.recipe import Compute, ScoreSettings
from miniplm.scoring.base import Scorer, Scores, open_scores
from miniplm.scoring.instances import Scored, row_rule, score_instances
from miniplm.scoring.journal import Journal

VERSION = 2

ScorerFactory = Callable[[], Scorer]


def identity(packed: str, model: str, settings: ScoreSettings, tokenizer: str = "") -> Identity:
    """What scores are: `packed`, `model` and, with `tokenizer: own`, that of the model are fingerprints."""
    inputs = {"packed": packed, "model": model}
    if settings.tokenizer == "own" and tokenizer:
        inputs["tokenizer"] = tokenizer
    return Identity("scores", VERSION, settings.model_dump(mode="json"), inputs)


def score(
    packed: Packed,
    make_scorer: ScorerFactory,
    out: Path,
    what: Identity,
    compute: Compute | None = None,
    engine: Engine | None = None,
) -> Scores:
    """Score every instance of `packed` into the artifact at `out`.

    Args:
        packed: the instances.
        make_scorer: called once by each worker, and only if there is something left to score.
        out: the artifact.
        what: its identity, from `identity`.
        compute: how.
        engine: what runs the shards.

    Raises:
        ModelError: the model cannot be loaded, or has fewer embeddings than the tokenizer has tokens.
        TokenizerError: the model's tokenizer is not that of the instances, or is needed and not there.
        ScoreError: a log-probability is no number; the instance is named.

    """
    settings = ScoreSettings.model_validate(what.recipe)

    def work(workspace: Workspace) -> Mapping[str, Any]:
        return score_shards(workspace, packed, make_scorer, settings, compute or Compute(), engine or LocalEngine())

    artifact.make(out, what, work)
    return open_scores(out)


def score_shards(
    work: Workspace,
    packed: Packed,
    make_scorer: ScorerFactory,
    settings: ScoreSettings,
    compute: Compute,
    engine: Engine,
    label: str = "score",
) -> Mapping[str, Any]:
    """Score the shards that the workspace does not have yet, one Parquet file each; return the counts of all."""
    work.provenance["packed"] = str(packed.path.absolute())  # where it lay, for `show`; not what it is
    shards = packed.shards
    rows = [shard_rows(shard) for shard in shards]
    first_rows = np.concatenate([[0], np.cumsum(rows)])
    tasks = [_Task(n, shard, int(first_rows[n])) for n, shard in enumerate(shards)]
    done = [task for task in tasks if work.has(_name(task.number))]
    waiting = [task for task in tasks if not work.has(_name(task.number))]
    for task in done:
        work.remove(_journal(task.number))  # killed between the commit of a shard and the end of its journal
    begun = time.monotonic()
    targets = packed.manifest.counts["tokens_out"] - len(packed)
    with progress(f"{label} {work.path.name.removesuffix('.partial')}", targets, "tok") as meter:
        meter.skip(targets * sum(rows[task.number] for task in done) // len(packed))
        if waiting:
            make_worker = partial(_Worker, work.path, packed, make_scorer, settings, compute)
            finished = list(engine.run(make_worker, waiting, meter.advance))
            work.provenance |= _provenance(finished, time.monotonic() - begun, settings, compute)
    totals = [pq.read_table(work.path / _name(task.number)) for task in tasks]
    kinds = {table.schema.metadata[_TOKENIZER].decode() for table in totals}
    if len(kinds) != 1:
        raise ScoreError(f"{work.path}: shards were scored under {len(kinds)} tokenizers.")
    table = pa.concat_tables(totals).select(["logp", "n_tokens", "n_bytes"])
    logp, tokens = float(np.sum(table["logp"].to_numpy())), int(np.sum(table["n_tokens"].to_numpy()))
    return {
        "instances": len(table),
        "tokens": tokens,
        "bytes": int(np.sum(table["n_bytes"].to_numpy(), dtype=np.int64)),
        "nats_per_token": -logp / tokens,
        "tokenizer": kinds.pop(),
    }


@dataclass(frozen=True, slots=True)
class _Task:
    number: int
    shard: Path
    first_row: int


@dataclass(frozen=True, slots=True)
class _Finished:
    """How a shard went; `ceiling` is the operations per second that the device is able to do."""

    tokens: int
    seconds: float
    flops: float | None
    ceiling: float | None
    model: str
    token_budget: int


class _Worker:
    """Scores shards; the model is loaded where the work is done."""

    def __init__(
        self,
        folder: Path,
        packed: Packed,
        make_scorer: ScorerFactory,
        settings: ScoreSettings,
        compute: Compute,
        advance: Advance,
    ) -> None:
        self.work = Workspace(folder)
        self.advance = advance
        self.scorer = make_scorer()
        self.token_budget = compute.score_tokens or int(getattr(self.scorer, "token_budget", _TOKEN_BUDGET))
        self.rule, self.tokenizer = row_rule(packed, self.scorer, settings)

    def __call__(self, task: _Task) -> _Finished:
        """Score a shard and commit it."""
        begun = time.monotonic()
        instances = read_shard(task.shard)
        if getattr(self.scorer, "costly", False):
            with Journal(self.work.path / _journal(task.number)) as journal:
                scored = self._score(instances, task, journal)
        else:
            scored = self._score(instances, task, None)
        table = scored.table
        _refuse_unusable(table, task)
        rows = pa.array(np.arange(task.first_row, task.first_row + len(table), dtype=np.int64))
        table = table.add_column(0, "instance", rows).replace_schema_metadata({_TOKENIZER: self.tokenizer})
        with self.work.part(_name(task.number)) as path:
            pq.write_table(table, path, compression="zstd")
        self.work.remove(_journal(task.number))
        return self._finished(scored, time.monotonic() - begun)

    def _score(self, instances: Instances, task: _Task, journal: Journal | None) -> Scored:
        return score_instances(
            instances, self.scorer, self.rule, self.token_budget, self.advance, journal, task.first_row
        )

    def _finished(self, scored: Scored, seconds: float) -> _Finished:
        scorer = self.scorer
        tokens = int(np.sum(scored.table["n_tokens"].to_numpy(), dtype=np.int64))
        flops = None
        if hasattr(scorer, "flops_per_token"):
            flops = sum(rows * length * scorer.flops_per_token(length) for length, rows in scored.lengths.items())
        ceiling = scorer.ceiling() if hasattr(scorer, "ceiling") else None
        return _Finished(
            tokens, seconds, flops, ceiling, str(getattr(scorer, "name", type(scorer).__name__)), self.token_budget
        )


def _refuse_unusable(table: pa.Table, task: _Task) -> None:
    empty = np.flatnonzero(table["n_tokens"].to_numpy() == 0)
    if len(empty):
        raise ScoreError(
            f"instance {task.first_row + empty[0]:,} has no token that counts.",
            facts={"in": task.shard.name},
            remedy="It is all separators, or one token of the model's own: use `counted: all`, `tokenizer: packed`.",
        )
    bad = np.flatnonzero(~np.isfinite(table["logp"].to_numpy()))
    if len(bad):
        raise ScoreError(
            f"the model gave no number for instance {task.first_row + bad[0]:,}.",
            facts={"log p": table["logp"][int(bad[0])].as_py(), "in": task.shard.name},
            remedy="Score in float32 or bfloat16; float16 overflows on models trained in bfloat16.",
        )


def _provenance(finished: list[_Finished], seconds: float, settings: ScoreSettings, compute: Compute) -> dict[str, Any]:
    """How fast it went. Throughput is by the wall clock; the share of the ceiling is that of the workers' own time."""
    tokens = sum(shard.tokens for shard in finished)
    found: dict[str, Any] = {
        "model": finished[0].model,
        "tokens_per_s": round(tokens / seconds),
        "score_tokens": finished[0].token_budget,
        "engine": compute.engine,
    }
    operations = [(s.flops, s.seconds, s.ceiling) for s in finished if s.flops is not None and s.ceiling is not None]
    if operations and settings.quantize == "none":
        flops = sum(flops for flops, _, _ in operations)
        possible = sum(seconds * ceiling for _, seconds, ceiling in operations)
        found |= {
            "flops": flops,
            "flops_per_s": round(flops / seconds),
            "matmul_flops_per_s": round(operations[0][2]),
            "share_of_matmul_rate": round(flops / possible, 4),
        }
    return found


_TOKEN_BUDGET = 16_384
_TOKENIZER = b"tokenizer"


def _name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _journal(number: int) -> str:
    return f"part-{number:05d}.journal"
