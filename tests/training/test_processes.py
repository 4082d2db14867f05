"""Two processes at one training: the same instances at each step, the same losses, interrupted or not, and one voice.

What each process does is in `in_processes.py`; two launches of it serve most tests, for a launch takes seconds.

Not covered: `accelerate launch`, which starts several processes on GPUs or by MPI only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from in_processes import train as train_here
from safetensors.torch import load_file
from tiny import BATCH, CONFIG, T, make_corpus
from transformers import AutoModelForCausalLM

from miniplm import artifact
from miniplm.artifact import provenance
from miniplm.errors import TrainingError
from miniplm.training.checkpoint import read_curve

pytestmark = pytest.mark.slow

STEPS = 8
SAVED = 4  # steps after which there is a state
MICRO = 2
BATCHES = BATCH // MICRO // 2  # that a process of two sees at a step
STOPPED_AT = 5 * BATCHES + 1  # in the middle of the sixth step
HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "config": CONFIG, "tokens": STEPS * BATCH * T, "batch_tokens": BATCH * T, "learning_rate": 1e-2, "seed": 2,
    "precision": "float32", "counted": "skip_after_separator",
}  # fmt: skip
DISTILLED = {**SETTINGS, "objective": {"name": "vanilla_kd", "dtype": "float32"}}
COMPUTE: dict[str, Any] = {"train_micro_batch": MICRO, "checkpoints": STEPS // SAVED, "report_to": "none"}
SHARDED = {**COMPUTE, "trainer": {"fsdp": "full_shard", "fsdp_config": {"version": 2}}}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SAME_BYTES = ("model.safetensors", "training.jsonl", "manifest.json", "README.md")


def launch(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a command in two processes and wait for them."""
    usual = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *TORCHRUN, *command], env={**usual, **environment}, capture_output=True, text=True, timeout=120
    )


class Runs:
    """What was trained, below one folder, all on the same corpus."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = make_corpus(root)

    def asked(self, out: str, settings: dict[str, Any], compute: dict[str, Any], **more: Any) -> dict[str, Any]:
        paths = {"corpus": str(self.corpus.path), "out": str(self.root / out)}
        return {**paths, "settings": settings, "compute": compute, **more}

    def in_two(self, *asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        return launch(str(HERE / "in_processes.py"), json.dumps(asked), folder=self.root)

    def seen(self, out: str) -> list[list[tuple[int, list[int]]]]:
        """What each process saw since it was last begun: (position, first tokens) of its instances."""
        files = sorted((self.root / f"{out}.seen").glob("*.jsonl"))
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [[pair for batch in process for pair in zip(*batch, strict=True)] for process in lines]

    def interrupted(self, out: str, new: str) -> str:
        """A copy of what was interrupted; what it has seen so far is forgotten."""
        shutil.copytree(self.root / f"{out}.partial", self.root / f"{new}.partial")
        return new

    def assert_same_bytes(self, found: str, expected: str) -> None:
        for name in SAME_BYTES:
            assert (self.root / found / name).read_bytes() == (self.root / expected / name).read_bytes(), name

    def assert_alike(self, found: str, expected: str) -> None:
        """The same but for the order of float32 sums."""
        for point, other in zip(read_curve(self.root / found), read_curve(self.root / expected), strict=True):
            assert point.keys() == other.keys()
            for name in point:
                assert point[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
        weights = load_file(self.root / found / "model.safetensors")
        others = load_file(self.root / expected / "model.safetensors")
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Undisturbed in one process, and interrupted there."""
    torch.set_num_threads(1)
    made = Runs(tmp_path_factory.mktemp("processes"))
    train_here(**made.asked("one", SETTINGS, COMPUTE))
    train_here(**made.asked("one-distilled", DISTILLED, COMPUTE, teacher=str(made.root / "one")))
    with pytest.raises(KeyboardInterrupt):
        train_here(**made.asked("one-stopped", SETTINGS, COMPUTE, trouble=("stop", [0], 2 * STOPPED_AT)))
    return made


@pytest.fixture(scope="module")
def two(one: Runs) -> Runs:
    """Undisturbed in two processes, and interrupted there; then the same with the weights shared out among them."""
    ended = one.in_two(
        one.asked("two", SETTINGS, COMPUTE),
        one.asked("two-distilled", DISTILLED, COMPUTE, teacher=str(one.root / "one")),
        one.asked("two-stopped", SETTINGS, COMPUTE, trouble=("stop", [0, 1], STOPPED_AT)),
        one.asked("refused", SETTINGS, SHARDED),
        one.asked("sharded", {**SETTINGS, "keep": 1}, SHARDED, sharded=True),
        one.asked("sharded-killed", {**SETTINGS, "keep": 1}, SHARDED, trouble=("kill", [1], STOPPED_AT)),
    )
    assert ended.returncode != 0, "nobody was killed"
    state = one.root / "sharded-killed.partial" / "state" / f"checkpoint-{SAVED}"
    assert (state / "complete").exists(), ended.stderr
    assert (state / "pytorch_model_fsdp.bin").exists(), "nothing was shared out"
    (one.root / "two.said").write_text(ended.stderr)
    return one


@pytest.fixture(scope="module")
def again(two: Runs) -> Runs:
    """What was interrupted, gone on with in two processes; and two trainings that cannot be."""
    ended = two.in_two(
        two.asked(two.interrupted("two-stopped", "two-again"), SETTINGS, COMPUTE),
        two.asked(two.interrupted("one-stopped", "one-in-two"), SETTINGS, COMPUTE),
        two.asked("two", {**SETTINGS, "seed": 3}, COMPUTE),
        two.asked("poisoned", SETTINGS, COMPUTE, trouble=("nan", [1], 5)),
        two.asked("unreported", SETTINGS, {**COMPUTE, "report_to": "no-such-service"}),
        two.asked("infinite", {**SETTINGS, "tokens": BATCH * T, "learning_rate": 1e39, "warmup_ratio": 0}, COMPUTE),
        two.asked("kept", {**SETTINGS, "keep": 1}, COMPUTE, trouble=("full disk", [0], 0)),
        two.asked(two.interrupted("sharded-killed", "sharded-again"), {**SETTINGS, "keep": 1}, SHARDED, sharded=True),
        two.asked(two.interrupted("two-stopped", "whole-in-shards"), SETTINGS, SHARDED),
    )
    assert ended.returncode == 0, ended.stderr
    (two.root / "again.said").write_text(ended.stderr)
    return two


# Undisturbed


def test_two_processes_see_at_each_step_what_one_sees_and_each_half_of_it(two: Runs) -> None:
    (alone,) = two.seen("one")
    halves = two.seen("two")
    assert [position for position, _ in alone] == list(range(STEPS * BATCH))
    assert [len(half) for half in halves] == [STEPS * BATCH // 2] * 2
    for step in range(STEPS):
        together = [pair for half in halves for pair in half[step * BATCH // 2 : (step + 1) * BATCH // 2]]
        assert sorted(together) == alone[step * BATCH : (step + 1) * BATCH]


@pytest.mark.parametrize("objective", ["", "-distilled"])
def test_two_processes_end_with_the_losses_and_weights_of_one(objective: str, two: Runs) -> None:
    two.assert_alike(f"two{objective}", f"one{objective}")
    curve = read_curve(two.root / f"two{objective}")
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"] - 1, "it has learned something"
    assert provenance(two.root / f"two{objective}")["processes"] == 2


def test_weights_shared_out_among_processes_end_as_those_of_one(two: Runs) -> None:
    two.assert_alike("sharded", "one")
    model = AutoModelForCausalLM.from_pretrained(two.root / "sharded")
    kept = AutoModelForCausalLM.from_pretrained(two.root / "sharded" / "checkpoints" / f"step-{STEPS // 2:07d}")
    ids = torch.tensor([tokens for _, tokens in two.seen("one")[0][:8]])
    losses = [float(m(input_ids=ids, labels=ids).loss.detach()) for m in (kept, model)]
    assert losses[1] < losses[0] - 0.3
    assert list(artifact.verify(two.root / "sharded")) == []


# Interrupted


def test_begun_by_two_and_interrupted_training_ends_with_the_same_bytes_in_two(again: Runs) -> None:
    assert [len(half) for half in again.seen("two-again")] == [(STEPS - SAVED) * BATCH // 2] * 2, (
        "not from the newest state"
    )
    again.assert_same_bytes("two-again", "two")


def test_begun_by_two_and_interrupted_training_is_ended_by_one(two: Runs) -> None:
    train_here(**two.asked(two.interrupted("two-stopped", "two-in-one"), SETTINGS, COMPUTE))
    assert [position for position, _ in two.seen("two-in-one")[0]] == list(range(SAVED * BATCH, STEPS * BATCH))
    two.assert_alike("two-in-one", "one")


def test_begun_by_one_and_interrupted_training_is_ended_by_two(again: Runs) -> None:
    together = [position for half in again.seen("one-in-two") for position, _ in half]
    assert sorted(together) == list(range(SAVED * BATCH, STEPS * BATCH))
    again.assert_alike("one-in-two", "one")


def test_killed_with_weights_shared_out_training_ends_with_the_same_bytes(again: Runs) -> None:
    assert [len(half) for half in again.seen("sharded-again")] == [(STEPS - SAVED) * BATCH // 2] * 2
    again.assert_same_bytes("sharded-again", "sharded")


# Errors


def test_what_stops_the_leader_before_training_stops_all_alike(again: Runs) -> None:
    said = (again.root / "again.said").read_text()
    for rank in (0, 1):
        assert re.search(rf"process {rank}: \S*two holds something else than what was asked for", said)


def test_a_loss_that_is_no_number_in_one_process_stops_all_at_that_step(again: Runs) -> None:
    said = (again.root / "again.said").read_text()
    for rank in (0, 1):
        assert f"process {rank}: the training loss is nan at step {5 // BATCHES + 1}." in said
    assert not (again.root / "poisoned").exists()


@pytest.mark.parametrize(
    "what",
    [
        "`compute.report_to`: there is no reporting to 'no-such-service' here",
        "the weights are no numbers after the last of 1 steps",
        "(the process that leads failed: )?the disk is full, for a test",
    ],
)
def test_what_only_the_leader_finds_stops_all(what: str, again: Runs) -> None:
    """And nobody waits for the others: the next training begins."""
    said = (again.root / "again.said").read_text()
    for rank in (0, 1):
        assert re.search(f"process {rank}: {what}", said), said


def test_a_state_of_whole_weights_is_not_gone_on_from_with_weights_shared_out(again: Runs) -> None:
    said = (again.root / "again.said").read_text()
    for rank in (0, 1):
        assert f"process {rank}: the state of the interrupted training cannot be read by this run." in said
    assert re.search(r"state +weights whole, 2 processes\n +this run +weights shared out, 2 processes", said)
    assert "without `fsdp` and `deepspeed`" in said


@pytest.mark.parametrize("compute", [COMPUTE, SHARDED])
def test_a_state_of_weights_shared_out_is_not_gone_on_from_by_one_process(compute: dict[str, Any], two: Runs) -> None:
    new = two.interrupted("sharded-killed", f"sharded-in-one-{len(compute)}")
    with pytest.raises(TrainingError, match=r"(?s)shared out, 2 processes.*weights whole, 1 process\n.*with `fsdp`"):
        train_here(**two.asked(new, {**SETTINGS, "keep": 1}, compute))
    shutil.rmtree(two.root / f"{new}.partial")


def test_one_process_has_nobody_to_share_weights_with_and_trains_as_if_it_was_not_asked(one: Runs) -> None:
    train_here(**one.asked("alone", SETTINGS, SHARDED))
    one.assert_same_bytes("alone", "one")


def test_the_command_line_names_an_error_once(one: Runs) -> None:
    """Divergence at the second step, which both processes find."""
    ended = launch(
        "-m", "miniplm", "train", "qwen-0.5m", "--data", str(one.corpus.pool.path), "--tokens", "4096",
        "--device", "cpu", "--out", str(one.root / "diverged"), "--report-to", "none", "--set", "batch_tokens=512",
        "--set", "learning_rate=1e30", "--set", "warmup_ratio=0", folder=one.root,
    )  # fmt: skip
    assert ended.returncode != 0
    (named,) = re.findall("^error: .*", ended.stderr, re.M)
    assert re.fullmatch(r"error: the (training loss|gradient) is .* at step 2.*", named)
    assert "miniplm/" not in ended.stderr, "it has a traceback of ours, or a warning"


def test_sharding_where_accelerate_does_not_shard_is_refused_before_training(two: Runs) -> None:
    said = (two.root / "two.said").read_text()
    for rank in (0, 1):
        assert f"process {rank}: accelerate does not shard models on the device 'cpu'." in said
    assert two.seen("refused") == []


# A whole recipe

RECIPE = """
schema: 1
name: tiny
corpus: {{files: '{corpus}'}}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: 32
  split: {{reference: 0.2, teacher: 0.2, held_out: 0.2, seed: 0}}
teacher: &trained
  config: {{model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
    num_key_value_heads: 2}}
  tokens: 1536
  batch_tokens: 256
  learning_rate: 1e-2
  precision: float32
reference: {{<<: *trained, seed: 1}}
score: {{dtype: float32}}
select:
  difference: {{sampler: difference, ratio: 0.5}}
students:
  miniplm: {{<<: *trained, data: difference}}
  distilled: {{<<: *trained, data: pool, objective: vanilla_kd, match: flops}}
compute: {{device: cpu, train_micro_batch: 4}}
"""


def test_a_recipe_is_made_once_by_two_processes_and_told_by_one(one: Runs, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(corpus=one.root / "text.jsonl"))
    command = ("-m", "miniplm", "run", str(recipe), "--out", str(tmp_path / "run"))
    ended = launch(*command, folder=one.root, MINIPLM_PROGRESS="on")
    assert ended.returncode == 0, ended.stderr
    begun = re.findall(r"^\[(\d+)/(\d+)\] (\S+) \.\.\.$", ended.stdout, re.M)
    stages = int(begun[0][1])
    assert [int(number) for number, _, _ in begun] == list(range(1, stages + 1))
    assert len(re.findall(r"^\[\d+/\d+\] \S+: [\d.,]+ s", ended.stdout, re.M)) == stages
    assert len(re.findall("^report: ", ended.stdout, re.M)) == 1
    assert (tmp_path / "run" / "report.html").is_file()
    for model in ("train miniplm", "train distilled"):
        assert len(re.findall(f"^{model}-[^:]*: .*100%", ended.stderr, re.M)) == 1, "one meter, not two"
    made = artifact.find(tmp_path / "run")
    models = [folder for folder in made if artifact.read(folder).identity.kind == "model"]
    assert len(models) == 4
    assert {provenance(folder)["processes"] for folder in models} == {2}
    assert [line for folder in made for line in artifact.verify(folder)] == []
