"""lm-evaluation-harness as a library: the tasks it has, and its silence.

The harness's own YAML files say what is asked, and its own code counts; what is replaced is where the examples come
from, when they are local. The model it asks is in `harness_model.py`.

Imported when tasks are run, never before: `lm_eval` is an extra, and takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import tqdm
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from miniplm.errors import CorpusError, RecipeError
from miniplm.evaluation.local_tasks import Examples
from miniplm.progress import printable

_TASKS = Path(lm_eval.__file__).parent / "tasks"
_FOLDERS = {  # of tasks that are often asked for: reading all of the harness's takes eight seconds
    "arc": "arc", "blimp": "blimp", "hellaswag": "hellaswag", "lambada": "lambada", "openbookqa": "openbookqa",
    "piqa": "piqa", "sciq": "sciq", "social": "siqa", "storycloze": "storycloze", "wikitext": "wikitext",
    "winogrande": "winogrande",
}  # fmt: skip
_NEAR = 0.75  # assumed; among thousands of names, one that is half like any word is always there
_FEWSHOT_SEED = 1234  # the harness's own default
_BOOTSTRAP = 1000  # resamples for the standard error of a perplexity; the harness's 100,000 take minutes

Local = Callable[[str, Mapping[str, Any]], Examples]
"""From a task's name and the harness's settings of it to its examples."""


def members(name: str) -> tuple[str, ...]:
    """The tasks that a name stands for: itself, or those of a tag. Raises RecipeError if the harness has none such."""
    index = _manager(name).task_index
    if name not in index:
        close = difflib.get_close_matches(name, index, n=1, cutoff=_NEAR)
        raise RecipeError(
            f"lm-evaluation-harness has no task {printable(name)!r}.",
            remedy=f"Did you mean `{close[0]}`?" if close else "`lm-eval ls tasks` lists them.",
        )
    entry = index[name]
    return tuple(sorted(entry.tags)) if entry.cfg is None else (name,)


def load(name: str, shots: int, local: Local | None) -> dict[str, Any]:
    """A task, or a group of them, as the harness's `evaluate` takes it.

    Raises:
        CorpusError: the examples cannot be had.
        RecipeError: the task cannot be run on local files.

    """
    manager = _manager(name)
    try:
        loaded = manager.load([name]) if local is None else _load_local(manager, name, local)
    except (CorpusError, RecipeError):
        raise
    except Exception as error:  # datasets, the Hub's client and each task raise what they like
        raise CorpusError(
            f"the examples of the task {name} cannot be had.",
            facts={"because": printable(str(error).strip().split("\n")[0] or type(error).__name__)},
            remedy="Give them as files: `tasks_data: FOLDER` with a folder a task.",
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:  # a task that says 0 is meant so
            task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return dict(loaded)


def _load_local(manager: TaskManager, name: str, local: Local) -> dict[str, Any]:
    """As `TaskManager.load`, but for the examples: the harness lets the members of a group be overridden."""
    index = manager.task_index
    entry = index[name]
    leaves = entry.cfg["task"] if "group" in entry.cfg else [name]
    if any(not isinstance(leaf, str) or "class" in index[leaf].cfg or "group" in index[leaf].cfg for leaf in leaves):
        raise RecipeError(
            f"the task {name} cannot be run on local files: in the harness it is a program, or a group of groups.",
            remedy="Ask for the tasks that it is made of, or leave it out.",
        )
    overrides = []
    for leaf in leaves:
        found = local(leaf, index[leaf].cfg)
        overrides.append({"task": leaf, "custom_dataset": _giving(found.splits), **found.changes})
    tasks = manager.load([{"group": "local", "task": overrides}])["tasks"]
    groups = {}
    if "group" in entry.cfg:
        groups[name] = Group.from_config(dict(entry.cfg))
        for task in tasks.values():
            groups[name].add(task)
    return {"tasks": tasks, "groups": groups}


def _giving(splits: datasets.DatasetDict) -> Callable[..., datasets.DatasetDict]:
    """What the harness calls for a task's data set: a function, for it copies all else that it is given."""

    def custom_dataset(**_: object) -> datasets.DatasetDict:
        return splits

    return custom_dataset


@cache
def _manager(name: str) -> TaskManager:
    """One that knows the name, if the harness has it: of one folder where that is enough, else of all."""
    folder = next((folder for begin, folder in _FOLDERS.items() if name.startswith(begin)), None)
    if folder is not None and (_TASKS / folder).is_dir():
        some = _manager_of(folder)
        if name in some.task_index:
            return some
    return _manager_of(None)


@cache
def _manager_of(folder: str | None) -> TaskManager:
    if folder is None:
        return TaskManager()
    return TaskManager(include_defaults=False, include_path=str(_TASKS / folder))


def run(lm: LM, task: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Put a task's questions to a model: the harness's results, with `samples`."""
    with quiet():
        found = evaluator.evaluate(lm, dict(task), limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=True)
    assert found is not None  # it is for other processes than the first, and there is one
    return dict(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's bars, prints and warnings from the user, whose progress is ours, and two habits from it.

    It compiles a template anew for every example, and forks as many processes as there are cores to resample, which a
    process with threads or a GPU should not do.
    """
    environment = lm_eval.utils.env
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    silent = partial(tqdm.tqdm, disable=True)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (lm_eval.api.task, "tqdm", silent),
            (tqdm, "tqdm", silent),  # it is imported anew where resampling begins
            (environment, "from_string", lru_cache(maxsize=None)(environment.from_string)),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.callback(_set_environment, "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC"))
        os.environ["DISABLE_MULTIPROC"] = "1"
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.ERROR)
        stack.callback(datasets.disable_progress_bars if bars else datasets.enable_progress_bars)
        datasets.disable_progress_bars()
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
