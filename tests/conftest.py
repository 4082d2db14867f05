"""Shared by all tests: no network, no progress bars, a cache of their own, and small corpora."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MINIPLM_PROGRESS"] = "off"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are tiny: a second thread only waits for the first
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def _leaves_precision_alone() -> Iterator[None]:
    """What leaves another default dtype, or autocast on, changes what all tests after it compute."""
    yield
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_default_dtype"):
        left = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
        torch.set_default_dtype(torch.float32)
        torch.set_autocast_enabled("cpu", False)
        assert left == (torch.float32, False)


WORDS = (
    "the", "a", "model", "corpus", "token", "score", "teacher", "reference", "student", "learns", "reads", "keeps",
    "drops", "hard", "easy", "text", "of", "and", "in",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content hashes that a test remembers are not left in the home of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_jsonl(path: Path, documents: int, *, sources: int = 3, words: int = 60, seed: int = 0) -> Path:
    """A JSON lines file of documents made of `WORDS`, each with id, source and a number of words around `words`."""
    import random

    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(words // 2, words * 3 // 2))) + ".\n"
            file.write(json.dumps({"id": f"d{number}", "text": text, "source": f"s{number % sources}"}) + "\n")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write a corpus: `jsonl("a.jsonl", documents=100)`."""

    def write(name: str = "corpus.jsonl", documents: int = 200, **how: int) -> Path:
        return write_jsonl(tmp_path / name, documents, **how)

    return write


LONGEST = (
    "test_kill.py", "test_ray.py", "test_processes.py", "test_readme.py", "test_findings.py", "test_study.py",
    "test_cli.py", "test_costs.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first: `--dist loadfile` would leave one of them to run alone at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
