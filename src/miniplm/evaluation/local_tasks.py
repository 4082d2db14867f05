"""The examples of tasks from local files, in the shape in which the harness expects them from the Hub.

In: a folder with a folder a task. Out: `Examples`: data sets in memory, and what of the harness's settings does not fit
them. Known layouts are in one table below; a folder of any other name holds `<split>.jsonl` in the Hub's own shape for
the harness's task of that name. Nothing is read from the network, nothing is written to a cache, and no text of a file
is used as a path. A record that is no example of its task is an error that names file and line.

Not covered: tasks that are programs in the harness; training examples of more than fits in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from miniplm.errors import CorpusError
from miniplm.evaluation.task_records import (
    ARC,
    BLIMP_PAIR,
    LAMBADA,
    OPENBOOKQA,
    PIQA,
    SCIQ,
    SOCIAL_IQA,
    WIKITEXT,
    Record,
    hellaswag,
    hellaswag_prepared,
    no_example,
    records,
    story,
    winogrande,
)
from miniplm.progress import printable

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")  # as the harness's settings call them
_SCORED = ("test_split", "validation_split")  # the harness scores the first that a task has
_NAME = re.compile(r"\w[\w.+-]*")  # a task's name that may be a folder's
BLIMP = "blimp"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the files of a task lie under the tasks' folder.

    Attributes:
        folder: the task's.
        files: split, as the Hub calls it -> name of the file, maybe with `*`.
        read: a record of a file -> the Hub's record. Raises ValueError, KeyError or TypeError if it is none.
        changes: settings of the harness's task that do not fit such records.
        note: what a reader of the figures has to know.

    """

    folder: str
    files: Mapping[str, str]
    read: Callable[[Record], Record]
    changes: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a task: `splits` as the Hub has them, `changes` of the harness's settings, `note` for readers."""

    splits: datasets.DatasetDict
    changes: Mapping[str, Any]
    note: str


def available(root: Path) -> tuple[str, ...]:
    """The tasks that have files under `root`, by name."""
    folders = {layout.folder for layouts in _LAYOUTS.values() for layout in layouts} | {BLIMP}
    others = {p.parent.name for p in root.glob("*/*.jsonl")} - folders
    return tuple(sorted(name for name in {*_LAYOUTS, BLIMP, *others} if files(root, name)))


def files(root: Path, task: str) -> dict[str, Path]:
    """Split -> file of a task's examples, empty if there are none; of `blimp`, paradigm -> file."""
    if not _NAME.fullmatch(task):
        return {}
    if task == BLIMP:
        return {path.stem: path for path in sorted((root / BLIMP / "data").glob("*.jsonl"))}
    return next((found for layout in _layouts(root, task) if (found := _files(root, layout))), {})


def is_known(task: str) -> bool:
    """Whether the table has the task, so that the harness need not be asked whether it exists."""
    return task in _LAYOUTS or task == BLIMP


def examples(root: Path, task: str, settings: Mapping[str, Any], shots: int) -> Examples:
    """Read the examples of one task.

    Args:
        root: the tasks' folder.
        task: the harness's name of it, not of a group.
        settings: the harness's own for the task.
        shots: examples before each question; the split that they come from must be there.

    Raises:
        CorpusError: a file that is needed is not there, or a record is no example.

    """
    layout = next((layout for layout in _layouts(root, task) if _files(root, layout)), None)
    found = {} if layout is None else _files(root, layout)
    wanted = [settings[key] for key in _SCORED if settings.get(key)]
    scored = next((split for split in wanted if split in found), None)
    shown = next((str(settings[key]) for key in ("fewshot_split", *_SPLITS) if settings.get(key)), "")
    if layout is None or scored is None or (shots and shown not in found):
        needed = " or ".join(wanted) if scored is None else f"{shown}, of which the {shots} shots are taken"
        raise CorpusError(
            f"examples of the task {task} are not there.",
            facts={
                "expected": f"split {needed}: {_expected(root, task)}",
                "found": ", ".join(str(path) for path in found.values()) or "none of these",
            },
            remedy="The files' names and shapes are in the documentation of `tasks_data`.",
        )
    read = {split: _dataset(path, layout, task) for split, path in found.items()}
    if shots and len(read[shown]) <= shots:  # a question is never its own example
        raise CorpusError(
            f"the {shown} split of {task} has too few examples to show {shots} before each question.",
            facts={"found": f"{len(read[shown]):,}", "expected": f"more than {shots:,}"},
        )
    absent = {key: None for key in _SPLITS if settings.get(key) and settings[key] not in found}
    notes = [f"{scored} split, where the harness scores {wanted[0]}"] if scored != wanted[0] else []
    notes += [layout.note] if layout.note else []
    return Examples(datasets.DatasetDict(read), {**layout.changes, **absent}, "; ".join(notes))


def _layouts(root: Path, task: str) -> tuple[Layout, ...]:
    """The ways in which a task's files may lie; the first that is there counts."""
    if task in _LAYOUTS:
        return _LAYOUTS[task]
    if task.startswith(f"{BLIMP}_"):
        return (Layout(BLIMP, {"train": f"data/{task.removeprefix(f'{BLIMP}_')}.jsonl"}, BLIMP_PAIR, {}),)
    return (Layout(task, {path.stem: path.name for path in sorted((root / task).glob("*.jsonl"))}, dict, {}),)


def _files(root: Path, layout: Layout) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split, pattern in layout.files.items():
        matches = sorted((root / layout.folder).glob(pattern))
        if len(matches) > 1:
            raise CorpusError(
                f"several files could be the {split} split in {root / layout.folder}.",
                facts={"found": ", ".join(path.name for path in matches)},
                remedy="Leave one of them there.",
            )
        if matches:
            found[split] = matches[0]
    return found


def _expected(root: Path, task: str) -> str:
    names = [f"{root / layout.folder / name}" for layout in _layouts(root, task) for name in layout.files.values()]
    return ", ".join(names) or f"{root / task}/<split>.jsonl"


def _dataset(path: Path, layout: Layout, task: str) -> datasets.Dataset:
    rows: list[Record] = []
    for line, record in records(path):
        try:
            rows.append(layout.read(record))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise no_example(path, line, task, reason) from error
    if not rows:
        raise CorpusError(f"{path} is empty.", facts={"expected": f"examples of the task {task}"})
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's own are ValueErrors and TypeErrors
        raise CorpusError(
            f"the records of {path} are not all of one shape.", facts={"because": printable(str(error))}
        ) from error


_JSONL = {split: f"{split}.jsonl" for split in ("test", "validation", "train")}
_UNKNOWNS = "word-tokenised with <unk>, where the harness has the raw text"


_LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "hellaswag": (
        Layout("hellaswag", _JSONL, hellaswag, {}),
        Layout("hellaswag", {"validation": "hellaswag_val.jsonl", "train": "hellaswag_train.jsonl"}, hellaswag, {}),
        Layout(
            "hellaswag", {"validation": "hellaswag_val_lmeval_style.jsonl"}, hellaswag_prepared, {"process_docs": None}
        ),
    ),
    "lambada_openai": (
        Layout("lambada_openai", _JSONL, LAMBADA, {}),
        Layout("lambada_openai", {"test": "lambada_test.jsonl"}, LAMBADA, {}),
    ),
    "winogrande": (Layout("winogrande", _JSONL, winogrande, {}),),
    "openbookqa": (Layout("openbookqa", _JSONL, OPENBOOKQA, {}),),
    "arc_easy": (Layout("arc_easy", _JSONL, ARC, {}),),
    "arc_challenge": (Layout("arc_challenge", _JSONL, ARC, {}),),
    "piqa": (Layout("piqa", _JSONL, PIQA, {}),),
    "social_iqa": (Layout("siqa", _JSONL, SOCIAL_IQA, {}), Layout("social_iqa", _JSONL, SOCIAL_IQA, {})),
    "storycloze_2016": (Layout("storycloze", {"test": "*test*2016*.csv", "validation": "*val*2016*.csv"}, story, {}),),
    "storycloze_2018": tuple(  # the answers to its test split were never published; the paper's is the validation split
        Layout("storycloze", {"validation": name}, story, {})
        for name in ("*val*2018*.csv", "validation.csv", "validation.jsonl")
    ),
    "sciq": (Layout("sciq", _JSONL, SCIQ, {}),),
    "wikitext": (Layout("wikitext2", {"test": "test.txt", "validation": "valid.txt"}, WIKITEXT, {}, _UNKNOWNS),),
}
