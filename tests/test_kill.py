"""Killed at any moment and begun again, every stage ends with the bytes of an undisturbed run.

Each stage is killed with SIGKILL `KILLS` times at random moments; one of each kind also before `EVENTS` of its own
changes to the file system, so that short moments are hit too; then the command line as a whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl

pytestmark = pytest.mark.slow

KILLS = 20
KILLS_IN_A_ROW = 5  # then it may finish, is compared, and is made anew
EVENTS = 16  # moments at which a stage is killed by what it is about to do
HERE = Path(__file__).parent

MODELS = ("teacher", "reference", "miniplm", "control")
STAGES = (
    "prepare",
    "train/teacher",
    "train/reference",
    "score/teacher",
    "score/reference",
    "select/difference",
    "select/random",
    "students/miniplm",
    "students/control",
    *(f"evaluate/{name}" for name in MODELS),
)

RECIPE = """
schema: 1
name: tiny
corpus: {corpus}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: 32
  block_bytes: {block_bytes}
  split: {{reference: 0.2, teacher: 0.2, held_out: 0.2, seed: 0}}
teacher: &trained
  config: {{model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
    num_key_value_heads: 2}}
  tokens: 1536
  batch_tokens: 256
  learning_rate: 1e-3
  precision: float32
reference: {{<<: *trained, seed: 1}}
score: {{dtype: float32}}
select:
  difference: {{sampler: difference, ratio: 0.5}}
  random: {{sampler: random, ratio: 0.5, seed: 0}}
students:
  miniplm: {{<<: *trained, data: difference}}
  control: {{like: miniplm, data: random}}
compute: {{device: cpu, checkpoints: 3, train_micro_batch: 8, report_to: none}}
"""


class Server:
    """`kill_server.py` in a process of its own."""

    def __init__(self, cache: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def attempt(self, recipe: Path, root: Path, stage: str, **when: float | int) -> dict[str, Any]:
        """Make a stage, or be killed at it; whatever else happens to the child fails the test."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"recipe": str(recipe), "root": str(root), "stage": stage, **when}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["killed"] or answer["status"] == 0, f"{stage} failed; its traceback is above"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where there is one: hundreds of fsyncs to a disk take minutes."""
    shared = Path("/dev/shm")
    if not (shared.is_dir() and os.access(shared, os.W_OK)):
        yield tmp_path_factory.mktemp("kill")
        return
    with tempfile.TemporaryDirectory(prefix="miniplm-", dir=shared) as folder:
        yield Path(folder)


@pytest.fixture
def root(memory: Path) -> Iterator[Path]:
    """Where a test has its run directory."""
    yield memory / "run"
    shutil.rmtree(memory / "run", ignore_errors=True)


@pytest.fixture(scope="module")
def server(memory: Path) -> Iterator[Server]:
    server = Server(memory / "cache")
    yield server
    server.close()


class Undisturbed:
    """A run that was left alone: its recipe, its directory, and how long each stage took."""

    def __init__(self, server: Server, folder: Path, corpus: str, block_bytes: int, stages: tuple[str, ...]) -> None:
        folder.mkdir()
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(corpus=corpus, block_bytes=block_bytes))
        self.root = folder / "undisturbed"
        self.seconds = {stage: server.attempt(self.recipe, self.root, stage)["seconds"] for stage in stages}
        self.files = contents(self.root)

    def without(self, stage: str, root: Path) -> Path:
        """A copy of the run directory in which the stage has not been made; returns where it will be."""
        (made,) = self.root.glob(folder_of(stage) + "-*")
        shutil.copytree(self.root, root, ignore=lambda folder, names: [made.name] if made.name in names else [])
        return root / made.relative_to(self.root)


@pytest.fixture(scope="module")
def undisturbed(server: Server, memory: Path) -> Undisturbed:
    for number in range(2):
        write_jsonl(memory / f"{number}.jsonl", 50, seed=number)
    run = Undisturbed(server, memory / "tiny", f"{{files: '{memory}/*.jsonl'}}", 5000, STAGES)
    server.attempt(run.recipe, run.root, "report")
    run.files = contents(run.root)
    return run


@pytest.fixture(scope="module")
def drawn(server: Server, memory: Path) -> Undisturbed:
    """A run on the built-in corpus, of which only the documents are made."""
    corpus = "{source: builtin, budget_bytes: 200_000}"
    return Undisturbed(server, memory / "builtin", corpus, 5000, ("documents",))


def folder_of(stage: str) -> str:
    group, _, name = stage.partition("/")
    folders = {"prepare": "corpus", "train": "models", "score": "scores", "select": "selections"}
    folders["evaluate"] = "evaluations"
    return "/".join(filter(None, [folders.get(group, group), name]))


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file below a folder but `provenance.json`, name -> bytes; folders count too, with None."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.name != "provenance.json"}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in found.items()}


def assert_same(found: dict[str, bytes | None], expected: dict[str, bytes | None]) -> None:
    """The same names and the same bytes; a difference is told by name, not by megabytes."""
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def remove(artifact: Path) -> None:
    shutil.rmtree(artifact, ignore_errors=True)
    shutil.rmtree(artifact.with_name(artifact.name + ".partial"), ignore_errors=True)


def check_random_kills(server: Server, run: Undisturbed, stage: str, root: Path) -> None:
    artifact = run.without(stage, root)
    draw = random.Random(stage)
    hit = 0
    while hit < KILLS:
        remove(artifact)
        row = 0
        while not artifact.exists():
            when = {"delay": draw.uniform(0, run.seconds[stage])} if row < KILLS_IN_A_ROW and hit < KILLS else {}
            killed = server.attempt(run.recipe, root, stage, **when)["killed"]
            row += killed
            hit += killed
        assert_same(contents(root), run.files)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_a_stage_ends_with_the_same_bytes(
    stage: str, server: Server, undisturbed: Undisturbed, root: Path
) -> None:
    check_random_kills(server, undisturbed, stage, root)


def test_killed_at_random_moments_the_built_in_documents_end_with_the_same_bytes(
    server: Server, drawn: Undisturbed, root: Path
) -> None:
    check_random_kills(server, drawn, "documents", root)


@pytest.mark.parametrize(
    ("stage", "events"),
    [("prepare", EVENTS), ("students/miniplm", EVENTS // 2), ("score/teacher", EVENTS // 2), ("select/random", EVENTS)],
)
def test_killed_before_a_change_to_the_file_system_a_stage_ends_with_the_same_bytes(
    stage: str, events: int, server: Server, undisturbed: Undisturbed, root: Path
) -> None:
    artifact = undisturbed.without(stage, root)
    changes = server.attempt(undisturbed.recipe, root, stage, event=10**9)["events"]
    assert changes > events / 2
    early, late = (
        range(changes // 2),
        range(changes // 2, changes),
    )  # the later half is mostly tidying up and committing
    draw = random.Random(stage)
    for event in [*draw.sample(early, events // 4), *draw.sample(late, min(events * 3 // 4, len(late)))]:
        remove(artifact)
        assert server.attempt(undisturbed.recipe, root, stage, event=event)["killed"]
        server.attempt(undisturbed.recipe, root, stage)
        assert_same(contents(root), undisturbed.files)


def test_the_command_line_killed_and_typed_again_ends_with_the_same_run_directory(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("miniplm")), "run", str(undisturbed.recipe), "--out", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    draw = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        known = set(root.rglob("*"))
        while process.poll() is None and set(root.rglob("*")) <= known:  # it is importing
            time.sleep(0.01)
        time.sleep(draw.uniform(0, sum(undisturbed.seconds.values()) / 3))
        assert process.poll() is None, "it had ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert "report:" in done.stdout
    found, expected = contents(root), dict(undisturbed.files)
    for name in ("report.html", "report.json", "students.csv"):  # they tell how long it took
        assert found.pop(name)
        del expected[name]
    assert found.pop("recipe.yaml")
    assert_same(found, expected)
