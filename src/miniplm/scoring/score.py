"""The stage `score`: every instance of a packed part under one model.

In: a packed part and a model (by name, folder, or a `Scorer`). Out: `Scores`: Parquet, one file for each shard of the
part. A shard is the unit of work and of commit; killed and begun again, scoring goes on with the next shard, and the
bytes are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.engine.base import Engine
from miniplm.engine.local import LocalEngine
from miniplm.errors import ScoreError, TokenizerError
from miniplm.models.load import check_length, check_vocabulary
from miniplm.packing.instances import Instances, Packed, counted, read_shard
from miniplm.progress import progress
from miniplm.recipe import Compute, Counted, ScoreSettings
from miniplm.scoring.base import Scorer, Scores, open_scores

VERSION = 1

ScorerFactory = Callable[[], Scorer]


def identity(packed: str, model: str, settings: ScoreSettings) -> Identity:
    """What scores are: `packed` and `model` are fingerprints."""
    return Identity("scores", VERSION, settings.model_dump(mode="json"), {"packed": packed, "model": model})


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
        make_scorer: called once, and only if there is something left to score.
        out: the artifact.
        what: its identity, from `identity`.
        compute: how.
        engine: what runs the shards.

    Raises:
        ModelError: the model cannot be loaded, or has fewer embeddings than the tokenizer has tokens.
        ScoreError: a log-probability is no number; the instance is named.

    """
    compute = compute or Compute()

    def work(workspace: Workspace) -> Mapping[str, Any]:
        return score_shards(workspace, packed, make_scorer, what.recipe["counted"], compute, engine or LocalEngine())

    artifact.make(out, what, work)
    return open_scores(out)


def score_instances(
    instances: Instances,
    scorer: Scorer,
    separator: int,
    rule: Counted,
    token_bytes: NDArray[np.int32],
    batch: int,
    advance: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Score instances in memory: `logp`, `n_tokens`, `n_bytes`, `source`. `advance` is told of counted tokens."""
    mask = counted(instances.input_ids, instances.length, separator, rule)
    logp = np.empty(len(instances), np.float64)
    for begin in range(0, len(instances), batch):
        chunk = slice(begin, begin + batch)
        found = scorer.score(instances.input_ids[chunk], mask[chunk])
        if np.shape(found) != logp[chunk].shape:
            raise ScoreError(
                "the scorer did not give one number for each instance.",
                facts={"found": f"shape {np.shape(found)}", "expected": f"shape {logp[chunk].shape}"},
            )
        logp[chunk] = found
        advance(int(mask[chunk].sum()))
    return pa.table(
        {
            "logp": logp,
            "n_tokens": mask.sum(axis=1, dtype=np.int32),
            "n_bytes": (token_bytes[instances.input_ids[:, 1:]] * mask).sum(axis=1, dtype=np.int32),
            "source": pa.array(instances.source).dictionary_encode(),
        }
    )


def score_shards(
    work: Workspace,
    packed: Packed,
    make_scorer: ScorerFactory,
    rule: Counted,
    compute: Compute,
    engine: Engine,
    label: str = "score",
) -> Mapping[str, Any]:
    """Score the shards that the workspace does not have yet, one Parquet file each; return the counts of all."""
    work.provenance["packed"] = str(packed.path.absolute())  # where it lay, for `show`; not what it is
    shards = packed.shards
    rows = [_rows(shard) for shard in shards]
    first_rows = np.concatenate([[0], np.cumsum(rows)])
    tasks = [_Task(n, shard, int(first_rows[n]), work.has(_name(n))) for n, shard in enumerate(shards)]
    waiting = [task for task in tasks if not task.done]
    scored_tokens = 0
    begun = time.monotonic()
    targets = packed.manifest.counts["tokens_out"] - len(packed)
    with progress(f"{label} {work.path.name.removesuffix('.partial')}", targets, "tok") as meter:
        meter.skip(targets * sum(rows[t.number] for t in tasks if t.done) // len(packed))
        if waiting:
            scorer = make_scorer()
            _check_fits(packed, scorer)
            work.provenance["model"] = str(getattr(scorer, "name", type(scorer).__name__))

            def run(task: _Task) -> int:
                table = score_instances(
                    read_shard(task.shard), scorer, packed.separator, rule, packed.tokenizer.token_bytes,
                    compute.score_batch, meter.advance,
                )  # fmt: skip
                return _commit(work, task, table)

            scored_tokens = sum(engine.run(run, waiting))
            seconds = time.monotonic() - begun
            work.provenance |= {"tokens_per_s": round(scored_tokens / seconds), "score_batch": compute.score_batch}
            if hasattr(scorer, "flops_per_token"):
                flops = scorer.flops_per_token(packed.sequence_length) * scored_tokens
                work.provenance |= {"flops": flops, "flops_per_s": round(flops / seconds)}
    totals = [pq.read_table(work.path / _name(t.number), columns=["logp", "n_tokens", "n_bytes"]) for t in tasks]
    table = pa.concat_tables(totals)
    logp, tokens = float(np.sum(table["logp"].to_numpy())), int(np.sum(table["n_tokens"].to_numpy()))
    return {
        "instances": len(table),
        "tokens": tokens,
        "bytes": int(np.sum(table["n_bytes"].to_numpy(), dtype=np.int64)),
        "nats_per_token": -logp / tokens,
    }


@dataclass(frozen=True, slots=True)
class _Task:
    number: int
    shard: Path
    first_row: int
    done: bool


def _commit(work: Workspace, task: _Task, table: pa.Table) -> int:
    bad = np.flatnonzero(~np.isfinite(table["logp"].to_numpy()))
    if len(bad):
        raise ScoreError(
            f"the model gave no number for instance {task.first_row + bad[0]:,}.",
            facts={"log p": table["logp"][int(bad[0])].as_py(), "in": task.shard.name},
            remedy="Score in float32 or bfloat16; float16 overflows on models trained in bfloat16.",
        )
    rows = pa.array(np.arange(task.first_row, task.first_row + len(table), dtype=np.int64))
    with work.part(_name(task.number)) as path:
        pq.write_table(table.add_column(0, "instance", rows), path, compression="zstd")
    return int(np.sum(table["n_tokens"].to_numpy(), dtype=np.int64))


def _check_fits(packed: Packed, scorer: Scorer) -> None:
    """Raise ModelError or TokenizerError if a model cannot have meant these token ids."""
    if (size := getattr(scorer, "vocab_size", None)) is not None:
        check_vocabulary(packed.vocab_size, size, "the model")
    if (config := getattr(scorer, "config", None)) is not None:
        check_length(config, packed.sequence_length)
    theirs = getattr(scorer, "vocabulary", None)
    ours = packed.tokenizer.vocabulary
    if theirs is not None and theirs != ours:
        differing = [token for token in ours if theirs.get(token) != ours[token]] or sorted(theirs.keys() - ours.keys())
        raise TokenizerError(
            "the model was trained with another tokenizer than the instances were packed with.",
            facts={
                "instances": f"{len(ours):,} tokens, {differing[0]!r} is {ours.get(differing[0])}",
                "model": f"{len(theirs):,} tokens, {differing[0]!r} is {theirs.get(differing[0])}",
            },
            remedy="Prepare the corpus with the model's tokenizer.",
        )


def _name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _rows(shard: Path) -> int:
    with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as reader:
        return sum(batch.num_rows for batch in reader)
