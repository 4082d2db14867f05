"""SeqKD: the teacher rewrites the end of each instance, and students learn from what it wrote.

In: a packed part, which of its rows, and a teacher. Out: a packed part of its own, an instance for each row, in their
order: the first P of its T+1 tokens as they were (`prompt_tokens`; for T = 1,024 the paper's 768), then T+1-P by the
teacher; 257 rather than the paper's 256, as an instance has a token more than it has predicted positions. Instances of
P tokens or fewer have no end to rewrite and stay as they are; they are counted. (Kim and Rush, arXiv 1606.07947; paper,
section 3, baselines.)

What is written is text: of special tokens, only the separator is ever sampled; the teacher may then begin a document of
its own. `source` is the prompt's, `documents` are those that the prompt has tokens of.

Promised: each token is decided by a random number that belongs to (seed, instance), so shards, workers and resumes
change nothing; a shard is the unit of work, retry and commit. Not covered: in low precision a token may turn out
otherwise with another `compute.generate_batch` or on another device, as logits do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.engine.base import Advance, Engine
from miniplm.errors import ModelError, RecipeError
from miniplm.models.continuation import continuations, uniform_numbers
from miniplm.models.flops import model_flops
from miniplm.models.load import check_length, check_reads, choose_device, load_model, name_of
from miniplm.packing.instances import TOKENIZER, Instances, Packed, dataset_files, open_packed, write_shard
from miniplm.packing.pack import token_dtype
from miniplm.progress import progress
from miniplm.recipe import Compute, GenerateSettings, GivenModel

VERSION = 1
_SHARD_TOKENS = 1 << 20  # of a shard: of 1,024 instances at the paper's length, a quarter of a million are written
_STREAM = int.from_bytes(b"continue", "big")  # of random numbers


def identity(settings: GenerateSettings, inputs: Mapping[str, str]) -> Identity:
    """What is made; `inputs` are the fingerprints of `data` (the pool or the selection) and `teacher`."""
    return Identity("packed", VERSION, settings.model_dump(mode="json", exclude={"data"}), inputs)


def generate(
    packed: Packed,
    rows: NDArray[np.int64] | None,
    teacher: GivenModel,
    settings: GenerateSettings,
    out: Path,
    what: Identity,
    compute: Compute,
    engine: Engine,
) -> Packed:
    """Let the teacher continue the beginnings of instances into the artifact at `out`.

    Args:
        packed: the instances.
        rows: `[N]`, which of them, in the order in which they will stand; None is all.
        teacher: what writes.
        settings: how it writes.
        out: the artifact.
        what: its identity, from `identity`.
        compute: how; `generate_batch` instances at a time.
        engine: what runs the shards.

    Raises:
        RecipeError: the prompt leaves nothing to write, or there is no instance.
        ModelError: the teacher cannot be loaded, or has too few embeddings or positions, or gives no numbers.
        TokenizerError: the teacher's own tokenizer is not that of the instances.

    """
    chosen = np.arange(len(packed), dtype=np.int64) if rows is None else rows
    prompt = prompt_tokens(settings, packed.sequence_length)
    if not len(chosen):
        raise RecipeError("there is no instance to continue.", facts={"instances": f"0 of {len(packed):,}"})

    def work(workspace: Workspace) -> Mapping[str, Any]:
        return _generate(workspace, packed, chosen, prompt, teacher, settings, what.fingerprint, compute, engine)

    artifact.make(out, what, work)
    return open_packed(out)


def prompt_tokens(settings: GenerateSettings, sequence_length: int) -> int:
    """P: how many of an instance's T+1 tokens are kept. Raises RecipeError if they leave none to write."""
    prompt = settings.prompt_tokens or 3 * sequence_length // 4
    if not 1 <= prompt <= sequence_length:
        raise RecipeError(
            "the prompt leaves the teacher nothing to write.",
            facts={
                "prompt_tokens": f"{prompt:,}",
                "tokens of an instance": f"{sequence_length + 1:,}",
            },
            remedy=f"Set `prompt_tokens` to a number from 1 to {sequence_length:,}.",
        )
    return prompt


def _generate(
    work: Workspace,
    packed: Packed,
    chosen: NDArray[np.int64],
    prompt: int,
    teacher: GivenModel,
    settings: GenerateSettings,
    fingerprint: str,
    compute: Compute,
    engine: Engine,
) -> Mapping[str, Any]:
    width = packed.sequence_length + 1
    if not work.has(TOKENIZER):
        with work.part(TOKENIZER) as folder:
            packed.tokenizer.save(folder)
    length = packed.dataset.data.column("length").to_numpy()[chosen]
    step = max(1, _SHARD_TOKENS // width)
    tasks = [
        _Task(f"part-{begin // step:05d}.arrow", begin, chosen[begin : begin + step])
        for begin in range(0, len(chosen), step)
    ]
    done = [task for task in tasks if work.has(task.name)]
    waiting = [task for task in tasks if not work.has(task.name)]
    written = (length > prompt) * (width - prompt)  # tokens, by instance
    begun = time.monotonic()
    with progress(f"generate {work.path.name.removesuffix('.partial')}", int(written.sum()), "tok") as meter:
        meter.skip(sum(int(written[task.place :][:step].sum()) for task in done))
        if waiting:
            make_worker = partial(_Writer, work.path, packed, prompt, teacher, settings, compute)
            finished = list(engine.run(make_worker, waiting, meter.advance))
            tokens, seconds = sum(shard.tokens for shard in finished), time.monotonic() - begun
            work.provenance |= {
                "teacher": finished[0].teacher,
                "tokens_per_s": round(tokens / seconds),
                "generate_batch": compute.generate_batch,
                "engine": compute.engine,
                "device": finished[0].device,
            }
    shards = [task.name for task in tasks]
    for name, content in dataset_files(shards, width, token_dtype(packed.vocab_size), fingerprint).items():
        work.write_json(name, content)
    there = packed.manifest.counts
    per_token = model_flops(teacher, packed.sequence_length) or 0.0
    return {
        "teacher_flops": per_token * packed.sequence_length * int((length > prompt).sum()),  # prompts are read too
        "tokens_out": int(np.where(length > prompt, width, length).sum(dtype=np.int64)),
        "generated_tokens": int(written.sum()),
        "instances": len(chosen),
        "kept_unchanged": int((length <= prompt).sum()),
        "prompt_tokens": prompt,
        "sources": _sources(packed, chosen),
        "shards": shards,
        **{name: there[name] for name in ("sequence_length", "vocab_size", "separator", "tokenizer")},
    }


def _sources(packed: Packed, chosen: NDArray[np.int64]) -> dict[str, int]:
    """Source -> chosen instances, in order of name."""
    encoded = packed.dataset.data.column("source").dictionary_encode().combine_chunks()
    names = encoded.dictionary.to_pylist()
    counts = np.bincount(encoded.indices.to_numpy()[chosen], minlength=len(names))
    return {name: int(count) for name, count in sorted(zip(names, counts, strict=True)) if count}


@dataclass(frozen=True, eq=False)
class _Task:
    """A shard: its file, the place of its first instance among those that are chosen, and their rows of the pool."""

    name: str
    place: int
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Finished:
    """How a shard went."""

    tokens: int
    teacher: str
    device: str


class _Writer:
    """Writes shards; the teacher is loaded where the work is done."""

    def __init__(
        self,
        folder: Path,
        packed: Packed,
        prompt: int,
        teacher: GivenModel,
        settings: GenerateSettings,
        compute: Compute,
        advance: Advance,
    ) -> None:
        self.work = Workspace(folder)
        self.packed, self.prompt, self.settings = packed, prompt, settings
        self.batch, self.advance = compute.generate_batch, advance
        self.device = choose_device(compute.device)
        if self.device.type not in {"cpu", "cuda"}:
            raise ModelError(
                f"generating does not run on {self.device.type}: it needs float64 sums.",
                remedy="Use `device: cpu` or `cuda`.",
            )
        self.model = load_model(teacher, settings.dtype, str(self.device))
        config = self.model.config.get_text_config()
        check_reads(teacher, config.vocab_size, packed.tokenizer)
        check_length(config.to_dict(), packed.sequence_length)
        self.forbidden = torch.from_numpy(packed.tokenizer.unspeakable).to(self.device)
        self.name = name_of(teacher)

    def __call__(self, task: _Task) -> _Finished:
        """Write a shard and commit it."""
        there = self.packed.take(task.rows)
        ids = there.input_ids.copy()
        width = ids.shape[1]
        continued = there.length > self.prompt
        (open_ends,) = np.nonzero(continued)
        for begin in range(0, len(open_ends), self.batch):
            some = open_ends[begin : begin + self.batch]
            ids[some, self.prompt :] = self._continue(ids[some, : self.prompt], task.place + some, width - self.prompt)
            self.advance(len(some) * (width - self.prompt))
        n_bytes = self.packed.tokenizer.token_bytes[ids].sum(axis=1, dtype=np.int32)
        instances = Instances(
            input_ids=ids,
            length=np.where(continued, width, there.length).astype(np.int32),
            n_bytes=np.where(continued, n_bytes, there.n_bytes).astype(np.int32),
            source=there.source,
            documents=[
                names[: self._documents(row)] if open_end else names
                for names, row, open_end in zip(there.documents, ids, continued, strict=True)
            ],
        )
        with self.work.part(task.name) as path:
            write_shard(path, instances)
        return _Finished(len(open_ends) * (width - self.prompt), self.name, str(self.device))

    def _continue(self, prompts: NDArray[Any], places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        uniform = uniform_numbers(_STREAM, self.settings.seed, places.tolist(), count)
        written = continuations(
            self.model,
            torch.from_numpy(prompts.astype(np.int64)).to(self.device),
            torch.from_numpy(uniform).to(self.device),
            vocabulary=self.packed.vocab_size,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            forbidden=self.forbidden,
        )
        return np.asarray(written.cpu().numpy())

    def _documents(self, ids: NDArray[Any]) -> int:
        """How many documents the prompt has tokens of; one more begins after each separator but a last one."""
        return 1 + int(np.count_nonzero(ids[: self.prompt - 1] == self.packed.separator))
