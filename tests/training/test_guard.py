"""What stops a training: a loss or a gradient that is no number, a spike; the instance that did it is named first."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny import BATCH, T, make_corpus, train
from torch import Tensor
from transformers import PreTrainedModel

from miniplm.errors import TrainingError
from miniplm.packing.prepare import Corpus
from miniplm.training.checkpoint import read_curve
from miniplm.training.data import TrainingOrder
from miniplm.training.guard import Guard, whole_step
from miniplm.training.objectives import Batch, NextToken


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@dataclasses.dataclass
class Poisoned:
    """Next-token prediction, but for one instance; keeps the weights that its step began with."""

    tokens: list[int]
    how: str
    model: PreTrainedModel | None = None
    before: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return f"poisoned {self.how}"

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = NextToken().loss(model, batch)
        if not (batch["input_ids"] == torch.tensor(self.tokens[:-1])).all(dim=1).any():
            return loss, metrics
        self.model = model
        self.before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        embeddings = model.get_input_embeddings().weight
        if self.how == "nan gradient":  # of value 0; the derivative of the root is infinite, that of its inside is 0
            return loss + (embeddings * 0).sum().sqrt(), metrics
        if self.how == "infinite gradient":
            return loss + (embeddings - embeddings.detach()).sum().sqrt(), metrics
        return loss * float(self.how), metrics

    def assert_weights_are_as_before(self) -> None:
        assert self.model is not None
        for name, weight in self.model.named_parameters():
            assert torch.equal(weight, self.before[name]), name


@pytest.mark.parametrize("micro", [BATCH, 2])
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("nan", "the training loss is nan at step 4."),
        ("inf", "the training loss is inf at step 4."),
        ("nan gradient", "the gradient is no number at step 4, at a loss of"),
        ("infinite gradient", "the gradient is no number at step 4, at a loss of"),
    ],
)
def test_the_instance_whose_loss_or_gradient_is_no_number_is_named_before_the_step_is_taken(
    how: str, what: str, micro: int, corpus: Corpus, tmp_path: Path
) -> None:
    row = TrainingOrder(corpus.pool.dataset, 100, 0).row(3 * BATCH + 5)
    instance = corpus.pool.dataset[row]
    objective = Poisoned(instance["input_ids"], how)
    with pytest.raises(TrainingError) as error:
        train(corpus.pool, tmp_path / "m", 6, objective=objective, compute={"train_micro_batch": micro})
    message, worst, second, *_ = str(error.value).splitlines()
    assert message.startswith(what)
    assert worst.startswith(f"  row {row}, {instance['source']}, {instance['documents'][0]}  ")
    shown = {"nan": "nan nats", "inf": "inf nats"}.get(how, "its gradient is no number")
    assert shown in worst
    assert shown not in second
    objective.assert_weights_are_as_before()


def test_a_document_whose_name_steers_terminals_is_named_harmlessly(corpus: Corpus, tmp_path: Path) -> None:
    rows = repeated(corpus, 16, document="\x1b[31mred\nerror: none")
    with pytest.raises(TrainingError) as error:
        train(rows, tmp_path / "m", 2, tokenizer=corpus.tokenizer, objective=Poisoned(rows[0]["input_ids"], "nan"))
    assert "\x1b" not in str(error.value)
    assert "red⏎error" in str(error.value)


@pytest.mark.parametrize(("instances", "named"), [(5, 5), (8, 8), (512, 8)])
def test_where_the_worst_cannot_be_told_the_first_rows_of_the_step_and_the_last_are_named(
    instances: int, named: int, corpus: Corpus
) -> None:
    order = TrainingOrder(corpus.pool.dataset, 4096, 0)
    facts = whole_step(order, range(1024, 1024 + instances))
    assert facts["instances"] == f"{instances}, positions 1,024 to {1023 + instances:,} of the training"
    rows = {name: value for name, value in facts.items() if name.startswith("position ")}
    assert len(rows) == named
    for position in (1024, 1023 + instances):
        row = order.row(position)
        document = corpus.pool.dataset[row]["documents"][0]
        assert rows[f"position {position:,}"].startswith(f"row {row}, ")
        assert document in rows[f"position {position:,}"]
    assert facts.get("left out") == (None if instances == named else f"{instances - named} more")


# Spikes

SPIKE_STEPS = 48
SPIKE_AT = 45  # counted from 1; the state before it is of step 44
SPIKE: dict[str, Any] = {"learning_rate": 1e-2, "seed": 4}


def repeated(corpus: Corpus, instances: int, document: str = "same", odd_row: int | None = None) -> datasets.Dataset:
    """Rows of one text, and one of random tokens."""
    text = np.tile(np.arange(20, 28), T)[: T + 1]
    ids = np.tile(text, (instances, 1))
    names = [document] * instances
    if odd_row is not None:
        ids[odd_row] = np.random.default_rng(0).integers(30, 290, T + 1)
        names[odd_row] = "odd"
    length = datasets.List(datasets.Value("uint16"), length=T + 1)
    columns = {"input_ids": ids.tolist(), "source": ["made"] * instances, "documents": [[name] for name in names]}
    features = {"source": datasets.Value("string"), "documents": datasets.List(datasets.Value("string"))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"input_ids": length, **features}))


@pytest.fixture(scope="module")
def spiking(corpus: Corpus) -> tuple[datasets.Dataset, int]:
    """Rows of which one, the number of which comes with them, is unlike the others; it is seen at `SPIKE_AT`."""
    instances = SPIKE_STEPS * BATCH
    plain = repeated(corpus, instances)
    odd_row = TrainingOrder(plain, instances, SPIKE["seed"]).row((SPIKE_AT - 1) * BATCH + 3)
    return repeated(corpus, instances, odd_row=odd_row), odd_row


@pytest.mark.slow
def test_a_spike_names_the_instance_and_is_found_again_after_a_resume(
    spiking: tuple[datasets.Dataset, int], corpus: Corpus, tmp_path: Path
) -> None:
    """Also where the state resumed from is of the step before: the losses before it are remembered."""
    rows, odd_row = spiking
    messages = []
    for _ in range(2):
        with pytest.raises(TrainingError) as error:
            train(
                rows, tmp_path / "m", SPIKE_STEPS, tokenizer=corpus.tokenizer,
                compute={"stop_at_spike": 0.7, "checkpoints": 12}, **SPIKE,
            )  # fmt: skip
        messages.append(str(error.value))
    message, worst, *_ = messages[0].splitlines()
    assert re.match(rf"the training loss spiked at step {SPIKE_AT}: \d\.\d+ nats, \d\.\d+ above the median of the last "
                    rf"{SPIKE_AT - 1} steps", message)  # fmt: skip
    assert worst.startswith(f"  row {odd_row}, made, odd  ")
    assert "compute.stop_at_spike" in messages[0]
    assert messages[1] == messages[0]
    assert (tmp_path / "m.partial" / "state" / f"checkpoint-{SPIKE_AT - 1}").is_dir()


@pytest.mark.slow
def test_stopped_at_a_spike_a_training_goes_on_without_the_guard_as_if_it_never_was(
    spiking: tuple[datasets.Dataset, int], corpus: Corpus, tmp_path: Path
) -> None:
    rows, _ = spiking

    def run(name: str, spike: float | None) -> None:
        train(
            rows, tmp_path / name, SPIKE_STEPS, tokenizer=corpus.tokenizer,
            compute={"stop_at_spike": spike, "checkpoints": 2}, **SPIKE,
        )  # fmt: skip

    with pytest.raises(TrainingError, match="spiked"):
        run("stopped", 0.7)
    run("stopped", None)
    run("never", None)
    for file in ("model.safetensors", "training.jsonl", "manifest.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "never" / file).read_bytes(), file
    assert max(point["train_loss"] for point in read_curve(tmp_path / "never")[5:]) > 0.2, "there was no spike"


class Losses:
    """A guard that is shown a loss at a time."""

    def __init__(self, spike: float | None) -> None:
        self.next = 0.0
        self.guard = Guard(spike, lambda: (self.next, 0.0), lambda step, gradients: {"row": str(step)})
        self.steps = 0

    def show(self, *losses: float) -> None:
        for self.next in losses:
            state: Any = SimpleNamespace(global_step=self.steps)
            self.guard.on_pre_optimizer_step(None, state, None)  # type: ignore[arg-type]
            self.steps += 1


def test_a_spike_is_so_much_above_the_median_of_the_last_hundred_steps() -> None:
    losses = Losses(1.0)
    losses.show(*[9.0] * 60, *[2.0] * 60)  # 40 nines and 60 twos
    losses.show(2.999)
    with pytest.raises(
        TrainingError, match=r"spiked at step 122: 3\.0010 nats, 1\.00 above the median of the last 100"
    ):
        losses.show(3.001)


def test_no_spike_is_judged_in_the_first_steps() -> None:
    losses = Losses(1.0)
    losses.show(*[1.0] * 19, 50.0)
    with pytest.raises(TrainingError, match="spiked at step 21"):
        losses.show(50.0)


def test_ordinary_noise_is_no_spike_and_none_is_one_where_that_is_said() -> None:
    """A loss that falls from 10 to 2 nats, with noise of 0.3 nats on top: four times that of a batch of 8 here."""
    draw = np.random.default_rng(0)
    falling = 2 + 8 * np.exp(-np.arange(3000) / 200) + 0.3 * draw.standard_normal(3000)
    Losses(3.0).show(*falling)
    Losses(None).show(*falling, 1000.0)
    with pytest.raises(TrainingError):
        Losses(3.0).show(*falling, 1000.0)


def test_a_loss_that_is_no_number_stops_also_where_spikes_do_not() -> None:
    with pytest.raises(TrainingError, match="is nan at step 2"):
        Losses(None).show(1.0, float("nan"))
