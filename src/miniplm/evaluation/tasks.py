"""The stage `tasks`: a model on benchmarks, asked and counted by lm-evaluation-harness (paper, section 3.1).

In: a model and the names of tasks; their examples from the Hub, or from files (`local_tasks.py`). Out: `TaskResults`,
a figure a task by the paper's rule, acc_norm where the harness has it, else acc, with the harness's standard error, and
the unweighted mean of them: of the paper's alone, where `paper` was asked for.

On disk: `results.json` and `results.csv`, the rows; `raw/<task>.json`, all that the harness found, its settings and
versions; `raw/<task>.samples.jsonl`, a line an example: log-likelihoods, gold, each metric. A task is the unit of
resume. Examples from the Hub are those of the day: only files can be told by their content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.errors import CorpusError, MissingExtraError, RecipeError
from miniplm.evaluation import local_tasks
from miniplm.evaluation.loss import as_csv
from miniplm.evaluation.task_results import AVERAGE as AVERAGE
from miniplm.evaluation.task_results import TaskResults as TaskResults
from miniplm.evaluation.task_results import open_tasks as open_tasks
from miniplm.evaluation.task_results import results
from miniplm.progress import printable
from miniplm.recipe import Compute, GivenModel, ScoredModel, TaskSettings

VERSION = 1
PAPER = "paper"
PAPER_TASKS = (
    "hellaswag", "lambada_openai", "winogrande", "openbookqa", "arc_easy", "arc_challenge", "piqa", "social_iqa",
    "storycloze_2018",
)  # fmt: skip
_NOT_ON_HUB = ("storycloze_2016", "storycloze_2018")  # may not be redistributed: each user asks the authors


def task_names(settings: TaskSettings) -> tuple[str, ...]:
    """The tasks that the settings ask for, each once: `paper` and the harness's tags expanded.

    Of the paper's nine, those whose examples cannot be had are left out (`missing_tasks`).

    Raises:
        RecipeError: there is no such task, or a task asked for by name has no examples here.
        CorpusError: there is no such folder of local files.
        MissingExtraError: the harness is needed to tell, and is not installed.

    """
    missing = missing_tasks(settings)
    asked = (name for entry in settings.tasks for name in (PAPER_TASKS if entry == PAPER else (entry,)))
    names: dict[str, None] = {}
    for name in asked:
        known = local_tasks.is_known(name) or _has_files(settings, name)
        names |= dict.fromkeys([name] if known else _harness().members(name))
    for name in names:
        if name not in missing:
            _check_there(settings, name)
    if settings.tasks and not names.keys() - set(missing):
        there = local_tasks.available(_folder(settings))
        raise RecipeError(
            f"none of the paper's tasks has files in {settings.tasks_data}.",
            facts={"found": f"files of {', '.join(there) or 'no task'}"},
            remedy="Put their files there, a folder a task.",
        )
    return tuple(name for name in names if name not in missing)


def missing_tasks(settings: TaskSettings) -> tuple[str, ...]:
    """Of the tasks that `paper` stands for, where it is asked for, those whose examples cannot be had."""
    if PAPER not in settings.tasks:
        return ()
    expected = [name for name in PAPER_TASKS if name not in settings.tasks]
    if settings.tasks_data is None:
        return tuple(name for name in expected if name in _NOT_ON_HUB)
    return tuple(name for name in expected if not _has_files(settings, name))


def identity(model: str, settings: TaskSettings) -> Identity:
    """What the results are: `model` is a fingerprint; local examples are told by their content, not by their path.

    Raises:
        RecipeError, CorpusError: as `task_names`.
        MissingExtraError: the harness is not installed; its version is part of what the results are.

    """
    names = task_names(settings)
    recipe: dict[str, Any] = {
        "tasks": list(names), "missing": list(missing_tasks(settings)), "shots": settings.shots,
        "limit": settings.limit, "dtype": settings.dtype, "harness": _harness_version(),
    }  # fmt: skip
    if PAPER in settings.tasks and not set(names) <= set(PAPER_TASKS):  # else all that are asked are averaged
        recipe["averaged"] = [name for name in names if name in PAPER_TASKS]
    inputs = {"model": model}
    if settings.tasks_data is not None:
        hashes = {name: _hashes(settings, name) for name in names}
        inputs["examples"] = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return Identity("tasks", VERSION, recipe, inputs)


def evaluate_tasks(
    model: ScoredModel, settings: TaskSettings, out: Path, what: Identity, compute: Compute | None = None
) -> TaskResults:
    """Put the questions of tasks to a model, into the artifact at `out`.

    Raises:
        RecipeError: the model is behind a server or in vLLM, or a task cannot be run.
        CorpusError: a task's examples cannot be had, or are none.
        ModelError, TokenizerError, ScoreError: the model cannot be loaded or gives no numbers.
        MissingExtraError: the harness is not installed.
        ArtifactError, StorageError: as `artifact.make`.

    """
    if not isinstance(model, GivenModel):
        raise RecipeError(
            "tasks are asked of a model that transformers runs, not of one behind a server or in vLLM.",
            facts={"found": type(model).__name__, "expected": "model: a folder or a Hub id"},
        )

    def work(workspace: Workspace) -> Mapping[str, Any]:
        names = what.recipe["tasks"]
        if left := [name for name in names if not workspace.has(f"raw/{name}.json")]:
            harness = _harness()
            from miniplm.evaluation.harness_model import language_model

            lm = language_model(model, settings.dtype, compute or Compute())
            for name in left:
                _run(workspace, harness, lm, settings, name)
        raw = {name: json.loads((workspace.path / "raw" / f"{name}.json").read_bytes()) for name in names}
        averaged = what.recipe.get("averaged")
        rows = results(raw, names if averaged is None else averaged)
        workspace.write_json("results.json", [row.as_dict() for row in rows])
        with workspace.part("results.csv") as path:
            path.write_text(as_csv({what.inputs["model"][:12]: rows}), encoding="utf-8")
        notes = {name: found["note"] for name, found in raw.items() if found["note"]}
        if averaged is not None:
            notes[AVERAGE] = "of the paper's tasks alone"
        return {
            "tasks": len(names),
            "examples": sum(row.n for row in rows if row.dataset != AVERAGE),
            "missing": what.recipe["missing"],
            "notes": notes,
        }

    artifact.make(out, what, work)
    return open_tasks(out)


def _run(workspace: Workspace, harness: ModuleType, lm: Any, settings: TaskSettings, name: str) -> None:
    """One task: its samples, then what the harness found, which is the mark that it is done."""
    notes: list[str] = []

    def local(task: str, theirs: Mapping[str, Any]) -> local_tasks.Examples:
        found = local_tasks.examples(_folder(settings), task, theirs, settings.shots)
        notes.append(found.note)
        return found

    lm.label, lm.shortened = name, 0
    with harness.quiet():
        task = harness.load(name, settings.shots, None if settings.tasks_data is None else local)
    found = harness.run(lm, task, settings.limit)
    if lm.shortened:
        notes.append(f"{lm.shortened:,} requests were too long for the model and lost their beginning")
    samples = found.pop("samples")
    with workspace.part(f"raw/{name}.samples.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for of, lines in samples.items():
            kept = (_sample(of, task["tasks"][of], sample) for sample in lines)
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in kept)
    for config in found["configs"].values():
        config.pop("custom_dataset", None)  # ours
        config.get("metadata", {}).pop("config_source", None)  # a path of this machine
    workspace.write_json(
        f"raw/{name}.json",
        {
            "task": name,
            "note": "; ".join(note for note in dict.fromkeys(notes) if note),
            "files": _hashes(settings, name) if settings.tasks_data is not None else {},
            "harness": _plain(found),
        },
    )


def _sample(name: str, task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an example; its text is in the data set, under its number."""
    several_contexts = getattr(task, "multiple_input", 0)  # WinoGrande: the answer is in front of what is asked for
    answers = sample["filtered_resps"]
    likelihoods = [a[0] if isinstance(a, tuple | list) else a for a in answers]
    kept = {"doc_id": sample["doc_id"], "prompt_hash": sample["prompt_hash"], "doc_hash": sample["doc_hash"]}
    kept |= {"gold": task.doc_to_text(sample["doc"]) if several_contexts else sample["target"]}
    if all(isinstance(value, float) for value in likelihoods):
        kept |= {"logp": likelihoods}
        kept |= {"greedy": [a[1] for a in answers]} if all(isinstance(a, tuple | list) for a in answers) else {}
    else:
        kept |= {"filter": sample["filter"], "answer": answers}
    return dict(_plain({"task": name, **kept, **{metric: sample[metric] for metric in sample["metrics"]}}))


def _plain(value: Any) -> Any:
    """As JSON has it: numbers of numpy as Python's, those that are none as null, what is unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "tolist") and not isinstance(value, float):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _has_files(settings: TaskSettings, name: str) -> bool:
    return settings.tasks_data is not None and bool(local_tasks.files(_folder(settings), name))


def _check_there(settings: TaskSettings, name: str) -> None:
    """Make sure that a task's examples can be had, as far as can be told without the network."""
    if settings.tasks_data is None and name in _NOT_ON_HUB:
        raise RecipeError(
            f"the examples of {name} are not on the Hub: StoryCloze may not be redistributed.",
            remedy="Ask its authors for them (https://cs.rochester.edu/nlp/rocstories), put the files in a folder "
            "`storycloze`, and name the folder that it is in as `tasks_data`.",
        )
    if settings.tasks_data is not None and not _has_files(settings, name):
        there = local_tasks.available(_folder(settings))
        raise RecipeError(
            f"the task {printable(name)} has no files in {settings.tasks_data}.",
            facts={"found": f"files of {', '.join(there) or 'no task'}"},
            remedy="Put its files there, a folder a task.",
        )


def _folder(settings: TaskSettings) -> Path:
    """The tasks' folder. Raises CorpusError if it is not there."""
    folder = Path(str(settings.tasks_data)).expanduser()
    if not folder.is_dir():
        raise CorpusError(f"there is no folder {folder}.", remedy="Name one that has a folder for each task.")
    return folder


def _hashes(settings: TaskSettings, name: str) -> dict[str, str]:
    """Split -> sha256 of the file that it is read from."""
    found = local_tasks.files(_folder(settings), name)
    return {split: artifact.remembered_sha256(path) for split, path in found.items()}


def _harness() -> ModuleType:
    """The module that imports the harness. Raises MissingExtraError if it is not installed."""
    _harness_version()
    from miniplm.evaluation import harness

    return harness


def _harness_version() -> str:
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError("eval", "lm_eval") from error
