"""Running a chain: make what is missing, in order. The state of a run is its artifacts, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from miniplm import artifact
from miniplm.errors import ArtifactMissingError, RecipeError
from miniplm.packing.prepare import counts_table
from miniplm.pipeline.chain import Chain, Stage
from miniplm.recipe import TrainSettings
from miniplm.scoring.base import throughput
from miniplm.training import processes
from miniplm.training.presets import preset

RECIPE = "recipe.yaml"

State = Literal["done", "begun", "ready", "waiting"]


@dataclass(frozen=True, slots=True)
class Status:
    """How far a stage is: `detail` says how many parts are there, or what it waits for."""

    stage: Stage
    state: State
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.state} {self.detail}".strip()


def plan(stages: Chain) -> list[Status]:
    """How far each stage is. Reads manifests; makes nothing."""
    found: dict[str, Status] = {}
    for name, stage in stages.items():
        missing = [need for need in stage.needs if found[need].state != "done"]
        if artifact.finished(stage.path, stage.identity) is not None:
            found[name] = Status(stage, "done")
        elif missing:
            found[name] = Status(stage, "waiting", f"on {', '.join(missing)}")
        elif artifact.partial_path(stage.path).exists():
            found[name] = Status(stage, "begun", _progress_of(stages, stage))
        else:
            found[name] = Status(stage, "ready")
    return list(found.values())


def run(stages: Chain, only: str | None = None, say: Callable[[str], None] = lambda _: None) -> list[Stage]:
    """Make every stage that is not there yet; `only` restricts it to a name (`score/teacher`) or a group (`score`).

    `say` is told of each stage in a line. Returns the stages that were made.

    Started by `torchrun` or `accelerate launch`, all processes train together, and the first does everything else.

    Raises:
        RecipeError: `only` names no stage.
        ArtifactMissingError: `only` names a stage whose inputs are not there.
        MiniplmError: whatever a stage raises.

    """
    chosen = _chosen(stages, only)
    if processes.leads():
        write_text(stages.root, RECIPE, stages.recipe.resolved())
    return make(stages, chosen, say)


def make(stages: Chain, chosen: Container[str], say: Callable[[str], None]) -> list[Stage]:
    """Make the chosen stages that are not there yet, in order, as `run` does; the recipe is not written."""
    if not processes.leads():
        say = _say_nothing
    made = []
    for number, stage in enumerate(stages.values(), start=1):
        if stage.name not in chosen:
            continue
        place = f"[{number}/{len(stages)}] {stage.name}"
        if artifact.finished(stage.path, stage.identity) is not None:
            say(f"{place}: done, {stage.path}")
            continue
        for need in stage.needs:
            if artifact.finished(stages[need].path, stages[need].identity) is None:
                raise ArtifactMissingError(
                    f"{stage.name} needs {need}, which is not there.", remedy=f"Make it first: run --only {need}"
                )
        say(f"{place} ...")
        stage.path.parent.mkdir(parents=True, exist_ok=True)
        if processes.leads() or stage.identity.kind == "model":
            stage.make()
        else:  # training is for all processes, everything else for the one that leads
            processes.wait_until(partial(_is_done, stage))
        how = artifact.provenance(stage.path)
        say(f"{place}: {how.get('seconds', 0):,.1f} s{throughput(how)}, {stage.path}")
        made.append(stage)
        if stage.identity.kind == "corpus":
            say("\n".join(counts_table(artifact.read(stage.path).counts)))
    return made


def write_text(root: Path, name: str, text: str) -> None:
    """Write a file of text into the run directory: whole, or not at all."""
    with artifact.storage(root):
        root.mkdir(parents=True, exist_ok=True)
        temporary = root / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(root / name)


def _chosen(stages: Chain, only: str | None) -> set[str]:
    if only is None:
        return set(stages)
    chosen = {name for name in stages if name == only or name.startswith(only + "/")}
    if not chosen:
        raise RecipeError(f"there is no stage {only!r}.", facts={"stages": ", ".join(stages)})
    return chosen


def _progress_of(stages: Chain, stage: Stage) -> str:
    """What the unfinished folder of a stage shows."""
    folder = artifact.partial_path(stage.path)
    kind = stage.identity.kind
    if kind in {"scores", "evaluation"}:
        part = stages["prepare"].path / ("pool" if kind == "scores" else "held_out")
        for packed in stage.needs:
            if packed == "proxy/sample" or packed.startswith("documents/"):
                part = stages[packed].path
        state = json.loads((part / "state.json").read_bytes())
        return f"{len(list(folder.glob('part-*.parquet')))} of {len(state['_data_files'])} shards"
    if kind == "packed":
        return f"{len(list(folder.glob('part-*.arrow')))} shards"
    if kind == "corpus":
        return f"{len(list((folder / 'blocks').glob('*.parquet')))} blocks"
    if kind == "model":
        steps = [int(p.parent.name.split("-")[1]) for p in folder.glob("state/checkpoint-*/complete")]
        return f"{max(steps, default=0):,} of {_steps(stages, stage)} steps"
    return ""


def _steps(stages: Chain, stage: Stage) -> str:
    """Optimiser steps of a training stage, if the recipe alone says."""
    role = stage.name.split("/")[1]
    recipe = stages.recipe
    length = recipe.prepare.sequence_length
    if stage.name.startswith("students/"):
        student = settings = recipe.students[role]
        if student.data in recipe.retokenize:
            length = recipe.retokenize[student.data].sequence_length or length
    else:
        settings = getattr(recipe, role)
    assert isinstance(settings, TrainSettings)
    if settings.tokens is None or settings.match is not None:
        return "?"
    batch = settings.batch_tokens or (preset(settings.preset).batch_tokens if settings.preset else 0)
    return f"{settings.tokens // (batch // length * length):,}" if batch >= length else "?"


def _is_done(stage: Stage) -> bool:
    return artifact.finished(stage.path, stage.identity) is not None


def _say_nothing(_: str) -> None:
    """What processes that do not lead say."""
