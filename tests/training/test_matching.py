"""Matched operations: the paper's steps, and trainings that take as many; how often each instance is seen."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BATCH, CONFIG, T, make_corpus, train
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from miniplm import artifact, cli
from miniplm.errors import RecipeError
from miniplm.models.flops import forward_flops
from miniplm.packing.prepare import Corpus
from miniplm.recipe import Compute, MiniLLMSettings, NextTokenSettings, TrainSettings, VanillaKDSettings
from miniplm.training.checkpoint import Checkpoint
from miniplm.training.matching import matched_share, passes
from miniplm.training.objectives import Batch, NextToken
from miniplm.training.plan import Plan

TEACHER_CONFIG = {**CONFIG, "hidden_size": 64, "num_hidden_layers": 3}
COMPUTE = Compute(device="cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def teacher(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return train(corpus.pool, tmp_path_factory.mktemp("teacher") / "teacher", 2, model=TEACHER_CONFIG)


# The paper's table

T_STEPS = 100_000
N_TEACHER = 1.8e9


@pytest.mark.parametrize(
    ("objective", "student", "published", "exact"),
    [  # Table 1, section 3.1. The paper prints multiples of 5K, rounded up for some and down for others.
        (VanillaKDSettings(), 200e6, 25_000, 25_000.0),
        (VanillaKDSettings(), 500e6, 45_000, 45_454.5),
        (VanillaKDSettings(), 1.2e9, 65_000, 66_666.7),
        (MiniLLMSettings(), 200e6, 15_000, 13_636.4),
        (MiniLLMSettings(), 500e6, 30_000, 26_785.7),
        (MiniLLMSettings(), 1.2e9, 40_000, 42_857.1),
    ],
)
def test_the_steps_are_the_papers(objective: Any, student: float, published: int, exact: float) -> None:
    steps = matched_share(objective, student, N_TEACHER) * T_STEPS
    assert steps == pytest.approx(exact, abs=0.1)
    assert abs(steps - published) < 5000, "further away than the paper's rounding"


def test_what_a_step_consists_of() -> None:
    """Student and teacher of 1 and 10: forward and backward are 3, sampling 1 more."""
    assert passes(NextTokenSettings()).cost(1, 10) == 3
    assert passes(VanillaKDSettings()).cost(1, 10) == 3 + 10
    assert passes(MiniLLMSettings()).cost(1, 10) == 4 + 20
    assert passes(MiniLLMSettings(teacher_mix=0)).cost(1, 10) == 4 + 10  # the teacher judges, and does not write
    assert matched_share(NextTokenSettings(), 1, 10) == 1


# Trainings


def expected_steps(corpus: Corpus, teacher: Checkpoint, steps: int, unit: str) -> int:
    """As many as 3N / (3N + M) of them, N and M taken from models made here."""
    from miniplm.models.load import new_model

    student = new_model({"vocab_size": 384, **CONFIG}, 0)
    other = AutoModelForCausalLM.from_pretrained(teacher.path)
    count = {"flops": lambda m: m.num_parameters(), "operations": lambda m: forward_flops(m, T)}[unit]
    return math.floor(steps * 3 * count(student) / (3 * count(student) + count(other)))


@pytest.mark.parametrize("match", ["flops", "operations"])
def test_a_matched_training_takes_fewer_steps_and_counts_the_teachers_passes(
    match: str, corpus: Corpus, teacher: Checkpoint, tmp_path: Path
) -> None:
    distilled = {"name": "vanilla_kd", "dtype": "float32"}
    made = train(corpus.pool, tmp_path / "m", 20, objective=distilled, teacher=teacher.path, match=match)
    counts = made.manifest.counts
    assert counts["steps"] == expected_steps(corpus, teacher, 20, match)
    assert 3 < counts["steps"] < 17
    assert counts["train_tokens"] == counts["steps"] * BATCH * T
    student, other = (AutoModelForCausalLM.from_pretrained(path) for path in (made.path, teacher.path))
    per_token = 3 * forward_flops(student, T) + forward_flops(other, T)
    assert counts["train_flops"] == per_token * counts["train_tokens"]
    if match == "operations":  # within one step of plain pre-training's
        plain = 3 * forward_flops(student, T) * 20 * BATCH * T
        assert 0 <= plain - counts["train_flops"] < per_token * BATCH * T


def test_plain_training_counts_three_passes_of_its_own(corpus: Corpus, tmp_path: Path) -> None:
    made = train(corpus.pool, tmp_path / "m", 2)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    assert made.manifest.counts["train_flops"] == 3 * forward_flops(model, T) * 2 * BATCH * T
    assert made.manifest.counts["matched_share"] == 1.0


def test_the_command_line_matches_too(corpus: Corpus, teacher: Checkpoint, tmp_path: Path) -> None:
    """`qwen-0.5m` against the teacher here: what is printed is of the shortened training."""
    cli.app(
        ["train", "qwen-0.5m", "--data", str(corpus.pool.path), "--out", str(tmp_path / "m"), "--tokens", "5120",
         "--objective", "vanilla_kd", "--teacher", str(teacher.path), "--match", "flops", "--device", "cpu",
         "--set", "batch_tokens=256", "--report-to", "none"],
        standalone_mode=False,
    )  # fmt: skip
    counts = artifact.read(tmp_path / "m").counts
    parameters, others = counts["parameters"], teacher.manifest.counts["parameters"]
    assert counts["steps"] == math.floor(20 * 3 * parameters / (3 * parameters + others))
    assert counts["steps"] < 20


def test_matching_what_has_no_teacher_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to match"):
        train(corpus.pool, tmp_path / "m", 2, match="flops")


def test_a_matched_training_shorter_than_a_step_is_refused_with_the_share() -> None:
    how = TrainSettings(config=CONFIG, tokens=BATCH * T, batch_tokens=BATCH * T, learning_rate=1e-3)
    with pytest.raises(RecipeError, match=r"(?s)shorter than one batch.*FLOPs matched +25\.0%"):
        Plan.of(how, 100, T, COMPUTE, 0.25)


# Few data, seen again


def plan(instances: int, **settings: Any) -> Plan:
    given = {"config": CONFIG, "batch_tokens": BATCH * T, "learning_rate": 1e-3, **settings}
    return Plan.of(TrainSettings(**given), instances, T, COMPUTE)


def test_half_the_pool_twice_a_quarter_four_times_and_an_eighth_eight_times_are_as_many_tokens() -> None:
    """The data-limited setting (paper, section 3.4), with pools that no batch divides."""
    for pool in (4096, 4099, 10_007):
        tokens = {
            epochs: plan(int(pool * ratio), epochs=epochs).steps * BATCH * T
            for ratio, epochs in ((0.5, 2), (0.25, 4), (0.125, 8))
        }
        assert max(tokens.values()) <= pool * T
        lost = {epochs: epochs + BATCH for epochs in tokens}  # an instance an epoch when selecting, and a batch
        assert all(pool * T - found < lost[epochs] * T for epochs, found in tokens.items())


@pytest.mark.parametrize(("epochs", "tokens"), [(1, 800), (2.5, 2000), (0.25, 200)])
def test_epochs_are_tokens_of_the_data(epochs: float, tokens: int) -> None:
    assert plan(800, epochs=epochs) == plan(800, tokens=tokens * T)
    assert plan(800, epochs=epochs).steps == tokens // BATCH


class Counting:
    """Next-token prediction that counts which rows it sees, known by their tokens."""

    fingerprint = "counting"

    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        whole = torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1)
        self.seen.update(row.numpy().tobytes() for row in whole)
        return NextToken().loss(model, batch)


@pytest.mark.parametrize(("instances", "epochs"), [(64, 2), (32, 4), (16, 8)])
def test_every_instance_is_seen_once_in_each_epoch(instances: int, epochs: int, corpus: Corpus, tmp_path: Path) -> None:
    counting = Counting()
    rows = corpus.pool.select(range(instances))
    made = train(rows, tmp_path / "m", objective=counting, epochs=epochs)
    assert len({bytes(str(row), "ascii") for row in rows["input_ids"]}) == instances, "two rows are alike"
    assert sorted(counting.seen.values()) == [epochs] * instances
    assert made.manifest.counts["epochs"] == epochs
    assert made.manifest.counts["train_tokens"] == 128 * T


def test_more_tokens_than_the_data_has_are_seen_in_further_epochs(corpus: Corpus, tmp_path: Path) -> None:
    counting = Counting()
    made = train(corpus.pool.select(range(24)), tmp_path / "m", 7, objective=counting)  # 56 instances
    assert Counter(counting.seen.values()) == {2: 16, 3: 8}
    assert made.manifest.counts["epochs"] == pytest.approx(56 / 24, abs=1e-4)
