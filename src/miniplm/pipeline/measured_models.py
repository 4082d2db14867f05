"""A folder of `miniplm eval`: `<model>/{held_out,documents,tasks}`, and a table of all that is finished there."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.artifact import MANIFEST
from miniplm.errors import ModelError, RecipeError
from miniplm.evaluation import tasks as asking
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.evaluation.loss import ALL, Row, as_csv
from miniplm.evaluation.tasks import TaskResults, open_tasks
from miniplm.progress import printable

_FOLDERS = ("held_out", "documents", "tasks")  # of a model
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Measured:
    """All that is measured of one model in a folder of `miniplm eval`.

    Attributes:
        rows: every figure.
        tasks: on benchmarks, if it was asked some.
        alike: folder or task -> data and settings, which have to be the same for models that are compared.

    """

    rows: tuple[Row, ...]
    tasks: TaskResults | None
    alike: Mapping[str, object]


def check_models(models: Sequence[str]) -> None:
    """Make sure that each is a folder, or could be a Hub id, before the first is measured. Raises ModelError."""
    for model in models:
        path = Path(model).expanduser()
        if path.is_dir() or (_HUB_ID.fullmatch(model) and not path.exists()):
            continue
        remedy = "If the shell made it of a glob, quote the glob, so that it stays one: --documents 'dclm/*.jsonl'."
        raise ModelError(
            f"{printable(model)} is no model.",
            facts={"found": "a file" if path.exists() else "no such folder", "expected": "a folder, or a Hub id"},
            remedy=remedy if path.exists() else "",
        )


def folder_names(models: Sequence[str]) -> dict[str, str]:
    """A folder's name for each model: the last part of its name, numbered where two are the same.

    Raises RecipeError if a model is there twice.
    """
    found: dict[str, str] = {}
    for model in models:
        if Path(model) in map(Path, found.values()):
            raise RecipeError(f"the model {model!r} is there twice.")
        last = Path(model).name.strip(".") or "model"
        numbered = (f"{last}-{number}" for number in itertools.count(2))
        found[next(name for name in itertools.chain([last], numbered) if name not in found)] = model
    return found


def measured(folder: Path, named: Sequence[str] = ()) -> dict[str, Measured]:
    """All that is finished in a folder of `miniplm eval`, by model: those `named` first, then the others by name.

    Raises ArtifactError if some of it is damaged.
    """
    others = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = {name: _measured(folder / name) for name in dict.fromkeys([*named, *others])}
    return {name: one for name, one in found.items() if one.rows}


def write_table(folder: Path, models: Mapping[str, Measured]) -> None:
    """Write `evaluations.csv`, and `evaluations.json`: rows, and by model tasks that are missing, and notes."""
    asked = {name: one.tasks for name, one in models.items() if one.tasks is not None}
    notes = {name: dict(tasks.notes) for name, tasks in asked.items()}
    for name, unlike in _unlike(models).items():
        known = notes.setdefault(name, {})
        known |= {of: f"{known[of]}; {what}" if of in known else what for of, what in unlike.items()}
    whole = {
        "rows": [{"model": name, **asdict(row)} for name, one in models.items() for row in one.rows],
        "missing": {name: list(tasks.missing) for name, tasks in asked.items() if tasks.missing},
        "notes": {name: found for name, found in notes.items() if found},
    }
    with artifact.storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "evaluations.csv", as_csv({name: one.rows for name, one in models.items()}).encode())
        _replace(folder / "evaluations.json", artifact.pretty_json(whole))


def table(models: Mapping[str, Measured]) -> list[str]:
    """Models side by side, a line for each dataset, source and metric; under them, what a reader has to know."""
    by_key = {m: {(row.dataset, row.source, row.metric): row for row in one.rows} for m, one in models.items()}
    keys = list(dict.fromkeys(key for found in by_key.values() for key in found))
    heads = [printable(model) for model in models]
    names = [" ".join(printable(part) for part in key if part != ALL) for key in keys]
    width, named = max(17, *(len(head) + 2 for head in heads)), max(map(len, names), default=0)
    lines = [" " * named + "".join(f"{head:>{width}}" for head in heads)]
    for name, key in zip(names, keys, strict=True):
        lines.append(f"{name:<{named}}" + "".join(f"{_cell(by_key[model].get(key)):>{width}}" for model in models))
    return [*lines, "± is one standard error.", *_remarks(models)]


def _measured(folder: Path) -> Measured:
    """What is finished of one model; folders that hold something else (a corpus's held_out) are none of ours."""
    rows: list[Row] = []
    tasks = None
    alike: dict[str, object] = {}
    for name in _FOLDERS:
        path, packed = folder / name, folder / f"{name}-packed"
        what = artifact.read(path).identity if (path / MANIFEST).is_file() else None
        if what is None or what.kind not in ("evaluation", "tasks"):
            continue
        if what.kind == "tasks":
            tasks = open_tasks(path)
            rows += tasks.rows
            alike |= _asked(path, what.recipe)
            continue
        rows += open_evaluation(path).rows
        of: object = {key: value for key, value in what.inputs.items() if key not in ("model", "tokenizer")}
        if (packed / MANIFEST).is_file():  # each model's own, by its tokenizer: what they share is what was packed
            shared = artifact.read(packed).identity
            of = shared.recipe, shared.inputs.get("documents")
        alike[name] = what.recipe, of
    return Measured(tuple(rows), tasks, alike)


def _asked(path: Path, recipe: Mapping[str, Any]) -> dict[str, object]:
    """Of tasks: the settings, each task's files, and which are in the average; others may have been asked besides."""
    files = {name: json.loads((path / "raw" / f"{name}.json").read_bytes())["files"] for name in recipe["tasks"]}
    settings = {key: recipe[key] for key in ("shots", "limit", "dtype", "harness")}
    return {**files, asking.AVERAGE: recipe.get("averaged", recipe["tasks"]), "tasks": settings}


def _unlike(models: Mapping[str, Measured]) -> dict[str, dict[str, str]]:
    """Model -> folder or task -> that it cannot be compared with the first model that has one."""
    found: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for one in models.values() for name in one.alike):
        first, *others = [model for model, one in models.items() if name in one.alike]
        for model in others:
            if models[model].alike[name] != models[first].alike[name]:
                found.setdefault(model, {})[name] = f"other data or settings than those of {first}"
    return found


def _remarks(models: Mapping[str, Measured]) -> list[str]:
    """Each thing to know once, with the models that it is true of if it is not true of all."""
    unlike, who = _unlike(models), dict[str, list[str]]()
    for model, one in models.items():
        lines: Iterable[str] = () if one.tasks is None else one.tasks.remarks
        for line in (*lines, *(f"{name}: {what}" for name, what in unlike.get(model, {}).items())):
            who.setdefault(line, []).append(model)
    return [printable(line if len(of) == len(models) else f"{line} ({', '.join(of)})") for line, of in who.items()]


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.rename(path)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row.value:.4f}" if row.standard_error is None else f"{row.value:.4f} ± {row.standard_error:.4f}"
