"""Going on from a model, models kept along the way, and what lies beside the weights: logs, card; golden curves."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import BATCH, CONFIG, T, make_corpus, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import miniplm
from miniplm import artifact
from miniplm.errors import MiniplmError, RecipeError, TokenizerError
from miniplm.packing.prepare import Corpus
from miniplm.training.checkpoint import Checkpoint, card, read_curve
from miniplm.training.data import TrainingOrder
from miniplm.training.objectives import Batch, NextToken

pytestmark = pytest.mark.slow  # each needs a training of its own

COMPUTE = miniplm.Compute(device="cpu", train_micro_batch=BATCH, report_to="none")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


STEPS = 20
KEPT = (5, 10, 15)
KEEPING: dict[str, Any] = {"keep": 3, "license": "apache-2.0", "about": {"data": "the pool | of <b>tests</b>\nwhole"}}


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of 20 steps, three kept along the way, its events logged."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "model"
    how = {"report_to": "tensorboard"}
    return train(corpus.pool, out, STEPS, held_out=corpus.held_out, compute=how, **KEEPING)


@torch.no_grad()
def loss_of(model: Path | PreTrainedModel, ids: Any) -> float:
    """The mean over instances of their mean negative log-likelihood, by transformers' own logits."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model)
    rows = torch.tensor(ids)
    logp = torch.log_softmax(model(input_ids=rows[:, :-1]).logits.double(), dim=-1)
    return -float(logp.gather(2, rows[:, 1:, None]).mean())


# Going on


def go_on(start: Any, data: Any, out: Path, **settings: Any) -> Checkpoint:
    usual = {"tokens": 4 * BATCH * T, "precision": "float32", "warmup_ratio": 0, "seed": 5}
    return miniplm.train(start, data, out=out, compute=COMPUTE, **{**usual, **settings})


def test_a_training_goes_on_with_the_weights_and_the_settings_of_the_model(
    trained: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    made = go_on(trained, corpus.pool, tmp_path / "m")
    order = TrainingOrder(corpus.pool.dataset, BATCH, 5)
    first = [corpus.pool.dataset[order.row(position)]["input_ids"] for position in range(BATCH)]
    curve = read_curve(made.path)
    assert curve[0]["train_loss"] == pytest.approx(loss_of(trained.path, first), abs=1e-4)
    assert curve[0]["learning_rate"] == trained.manifest.counts["learning_rate"] == 1e-2
    assert made.manifest.counts["batch_tokens"] == trained.manifest.counts["batch_tokens"] == BATCH * T
    assert made.manifest.counts["parameters"] == trained.manifest.counts["parameters"]
    assert curve[-1]["train_loss"] < read_curve(trained.path)[0]["train_loss"] - 1


def test_what_is_given_wins_over_the_models_own_settings(trained: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    made = go_on(trained.path, corpus.pool, tmp_path / "m", learning_rate=3e-3, batch_tokens=4 * T)
    assert read_curve(made.path)[0]["learning_rate"] == 3e-3
    assert made.manifest.counts["batch_tokens"] == 4 * T


def test_a_folder_that_does_not_say_how_it_was_trained_needs_learning_rate_and_batch(
    trained: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    AutoModelForCausalLM.from_pretrained(trained.path).save_pretrained(foreign)
    with pytest.raises(RecipeError, match=r"foreign needs learning_rate and batch_tokens"):
        go_on(foreign, corpus.pool, tmp_path / "m")
    with pytest.raises(RecipeError, match=r"foreign needs batch_tokens:"):
        go_on(foreign, corpus.pool, tmp_path / "m2", learning_rate=1e-3)
    made = go_on(foreign, corpus.pool, tmp_path / "other", learning_rate=1e-3, batch_tokens=BATCH * T)
    assert made.manifest.counts["steps"] == 4


@pytest.mark.slow
def test_a_model_is_gone_on_from_by_what_it_is_not_by_where_it_lies(
    trained: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained.path, moved)
    made = go_on(trained.path, corpus.pool, tmp_path / "m")
    modified = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    assert go_on(moved, corpus.pool, tmp_path / "m").fingerprint == made.fingerprint
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == modified, "it was made again"
    assert made.manifest.identity.inputs["from"] == trained.fingerprint
    assert str(trained.path) not in json.dumps(made.manifest.identity.as_dict())
    other = train(corpus.pool, tmp_path / "another", 2, seed=7)
    with pytest.raises(MiniplmError, match="from"):
        go_on(other, corpus.pool, tmp_path / "m")


def test_a_model_of_another_tokenizer_is_not_gone_on_from(trained: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_corpus(tmp_path / "other", 200, words=40, seed=9)
    text = (tmp_path / "other" / "text.jsonl").read_text().replace("the", "zebra")
    (tmp_path / "other" / "text.jsonl").write_text(text)
    other = miniplm.prepare(
        tmp_path / "other" / "text.jsonl", tokenizer={"train": {"vocab_size": 300}}, sequence_length=T,
        split={"held_out": 0.1, "reference": 0.1}, out=tmp_path / "o",
    )  # fmt: skip
    with pytest.raises(TokenizerError, match="another tokenizer"):
        go_on(trained, other.pool, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Kept along the way


def kept_at(model: Path, step: int) -> Path:
    return model / "checkpoints" / f"step-{step:07d}"


def test_models_are_kept_at_even_distances_and_are_those_of_their_step(trained: Checkpoint, corpus: Corpus) -> None:
    assert {path.name for path in (trained.path / "checkpoints").iterdir()} == {f"step-{n:07d}" for n in KEPT}
    rows = corpus.held_out.dataset
    measured = [rows[int(row)]["input_ids"] for row in torch.linspace(0, len(rows) - 1, 64, dtype=torch.float64)]
    curve = {point["step"]: point["held_out_loss"] for point in read_curve(trained.path)}
    found = [loss_of(kept_at(trained.path, step), measured) for step in KEPT]
    assert found == pytest.approx([curve[step] for step in KEPT], abs=1e-4)
    assert found[0] > found[1] > found[2] > curve[STEPS]
    text = "the teacher reads"
    ids = PreTrainedTokenizerFast.from_pretrained(kept_at(trained.path, 5))(text)["input_ids"]
    assert ids == corpus.tokenizer.encode([text])[0].tolist()
    assert list(artifact.verify(trained.path)) == []


@dataclasses.dataclass
class Stopped:
    """Next-token prediction until so many micro-batches were seen."""

    after: int
    fingerprint: str = "same"
    batches: int = 0

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.is_grad_enabled():
            if self.batches == self.after:
                raise KeyboardInterrupt
            self.batches += 1
        return NextToken().loss(model, batch)


@pytest.mark.slow
def test_interrupted_a_training_keeps_the_same_models(corpus: Corpus, tmp_path: Path) -> None:
    """Interrupted after a model was kept and before the next state, so that its step is taken again; states each 7."""

    def run(name: str, after: int) -> None:
        train(corpus.pool, tmp_path / name, STEPS, keep=3, objective=Stopped(after), compute={"checkpoints": 3})

    run("whole", -1)
    for after in (6, 12):  # there is the model of step 5 and no state; then that of 10, and the state of 7
        with pytest.raises(KeyboardInterrupt):
            run("m", after)
    assert kept_at(tmp_path / "m.partial", 10).is_dir()
    run("m", -1)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert sum("checkpoints" in path.parts for path in files) > 9
    for file in files:
        if file.name != "provenance.json":
            assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


# How, not what


def test_float16_is_refused_on_a_cpu(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)float16.*CPU.*bfloat16"):
        train(corpus.pool, tmp_path / "m", 2, precision="float16")


class CountsLayers:
    """Next-token prediction that counts how often the first layer's attention is computed."""

    fingerprint = "counts layers"

    def __init__(self) -> None:
        self.calls = 0
        self.hooked = False

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.hooked:
            self.hooked = True
            model.base_model.layers[0].self_attn.register_forward_hook(self.count)
        return NextToken().loss(model, batch)

    def count(self, layer: nn.Module, given: object, out: object) -> None:
        self.calls += 1


def test_activations_computed_twice_give_the_same_model(corpus: Corpus, tmp_path: Path) -> None:
    curves = []
    for twice in (False, True):
        counts = CountsLayers()
        how = {"activation_checkpointing": twice}
        made = train(corpus.pool, tmp_path / str(twice), 4, objective=counts, compute=how)
        assert counts.calls == (8 if twice else 4)
        curves.append(read_curve(made.path))
    for plain, other in zip(*curves, strict=True):
        assert plain == pytest.approx(other, rel=1e-6)


def test_events_are_logged_beside_the_model_and_nothing_of_them_is_in_it(trained: Checkpoint) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = trained.path.parent / "logs" / trained.path.name
    events = EventAccumulator(str(logs)).Reload()
    curve = read_curve(trained.path)
    for tag, name in (("train/loss", "train_loss"), ("eval/loss", "held_out_loss"), ("train/tokens", "tokens")):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx({point["step"]: point[name] for point in curve}, rel=1e-5)
    names = [path.name for path in trained.path.rglob("*")]
    assert not [name for name in names if "events" in name or "logs" in name]


@pytest.mark.parametrize("reporter", ["wandb", "no-such-service"])
def test_reporting_to_what_is_not_here_is_an_error_of_ours(reporter: str, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(MiniplmError, match=reporter):
        train(corpus.pool, tmp_path / "m", 2, compute={"report_to": reporter})


# The card


def test_the_model_card_says_of_what_and_how_the_model_was_made(trained: Checkpoint) -> None:
    text = (trained.path / "README.md").read_text()
    last = read_curve(trained.path)[-1]
    head = text.split("---")[1]
    assert '\nlicense: "apache-2.0"\n' in head
    assert "## Licence\n\napache-2.0." in text
    rows = dict(
        line[2:-2].split(" | ", 1) for line in text.splitlines() if line.startswith("| ") and " | " in line[2:-2]
    )
    assert rows["objective"] == "next_token"
    assert rows["data"] == r"the pool \| of &lt;b>tests&lt;/b> whole"
    assert rows["train tokens"] == f"{STEPS * BATCH * T:,}"
    assert rows["final training loss (nats per token)"] == f"{last['train_loss']:.4f}"
    assert rows["final held-out loss (nats per token)"] == f"{last['held_out_loss']:.4f}"
    assert "final cross entropy (nats per token)" not in rows
    assert "\nPre-trained by miniplm" in text
    assert "base_model" not in head


def rows_of(model: Path) -> dict[str, str]:
    lines = (model / "README.md").read_text().splitlines()
    return dict(line[2:-2].split(" | ", 1) for line in lines if line.startswith("| ") and " | " in line[2:-2])


def test_the_card_of_a_distilled_model_names_the_teacher_and_calls_its_losses_what_they_are(
    trained: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    objective = {"name": "vanilla_kd", "share": 0.25, "dtype": "float32"}
    made = train(corpus.pool, tmp_path / "m", 2, objective=objective, teacher=trained.path)
    last = read_curve(made.path)[-1]
    rows = rows_of(made.path)
    assert rows["objective"] == "vanilla_kd (share 0.25, dtype float32)"
    assert rows["teacher"] == trained.path.name
    assert rows["final training loss (vanilla_kd)"] == f"{last['train_loss']:.4f}"
    assert rows["final cross entropy (nats per token)"] == f"{last['cross_entropy']:.4f}"
    assert "final training loss (nats per token)" not in rows
    assert str(trained.path.parent) not in (made.path / "README.md").read_text()


def test_the_card_of_a_model_trained_further_says_from_what(
    trained: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    made = go_on(trained.path, corpus.pool, tmp_path / "m")
    text = (made.path / "README.md").read_text()
    assert rows_of(made.path)["continued from"] == trained.path.name
    assert "\nTrained further by miniplm" in text
    assert "Pre-trained" not in text
    assert "base_model" not in text, "a folder is no model of the Hub's"
    assert str(trained.path.parent) not in text


def test_a_model_of_the_hubs_is_the_base_model_of_a_card() -> None:
    counts = {"parameters": 10, "train_flops": 30.0, "model_type": "qwen2"}
    text = card(counts, {}, None, {"train_loss": 1.0}, start="someone/some-model")
    assert '\nbase_model: "someone/some-model"\n' in text.split("---")[1]


HOSTILE = "a|b ![](https://example.org/seen)\n---\n# Title <script>alert(1)</script>\\ \r\n| x | y |"


def test_a_card_of_hostile_text_is_a_card_of_the_same_shape() -> None:
    counts = {"parameters": 10, "train_tokens": 20, "train_flops": 30.0, "model_type": "qwen2"}
    plain = card(counts, {"data": "text"}, "mit", {"train_loss": 1.0})
    hostile = card(counts, {HOSTILE: HOSTILE}, HOSTILE, {"train_loss": 1.0})
    assert len(hostile.splitlines()) == len(plain.splitlines())
    assert "<script>" not in hostile.split("\n---\n", 1)[1]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in hostile.splitlines() if line.startswith("|")]
    assert set(cells) == {3}, "a bar of the text ends a cell"
    assert "![" not in hostile.split("\n---\n", 1)[1], "an image is fetched from somewhere"


def test_a_card_without_a_licence_says_so() -> None:
    counts = {"parameters": 10, "train_flops": 30.0, "model_type": "qwen2"}
    text = card(counts, {}, None, {"train_loss": 1.0})
    assert "license:" not in text
    assert "Not stated" in text


# Objectives of the user's


OWN = """
from miniplm.training.objectives import NextToken

class Scaled:
    fingerprint = "scaled"

    def __init__(self, by=1.0):
        self.by = by

    def loss(self, model, batch):
        loss, _ = NextToken().loss(model, batch)
        return loss * self.by, {"plain": loss.detach()}

class Silent:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_objectives.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_objectives"


def test_an_objective_of_ones_own_by_name_takes_settings_and_logs_its_figures(
    own_module: str, corpus: Corpus, tmp_path: Path
) -> None:
    made = train(corpus.pool, tmp_path / "m", 2, objective={"name": f"{own_module}:Scaled", "by": 2.0})
    plain = train(corpus.pool, tmp_path / "plain", 2)
    point, expected = read_curve(made.path)[0], read_curve(plain.path)[0]
    assert point["plain"] == pytest.approx(expected["train_loss"], abs=1e-5)
    assert point["train_loss"] == pytest.approx(2 * expected["train_loss"], abs=1e-5)
    assert made.manifest.identity.recipe["objective"] == {"name": f"{own_module}:Scaled", "by": 2.0}
    assert f"| objective | {own_module}:Scaled (by 2) |" in (made.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        ("{}:Missing", "cannot be made"),
        ("no_such_module_of_ours:Scaled", "cannot be made"),
        ({"name": "{}:Scaled", "with": 3}, "cannot be made"),
        ("{}:Silent", "has no `loss"),
        ("next_tokens", "objective cannot be used"),
    ],
)
def test_an_objective_that_cannot_be_had_is_a_recipe_error(
    objective: Any, why: str, own_module: str, corpus: Corpus, tmp_path: Path
) -> None:
    if isinstance(objective, dict):
        objective = {**objective, "name": objective["name"].format(own_module)}
    else:
        objective = objective.format(own_module)
    with pytest.raises(RecipeError, match=why):
        train(corpus.pool, tmp_path / "m", 2, objective=objective)
    assert not (tmp_path / "m").exists()


def test_an_objective_as_an_object_enters_the_fingerprint_by_what_it_says_it_is(corpus: Corpus, tmp_path: Path) -> None:
    first = train(corpus.pool, tmp_path / "first", 1, objective=Stopped(-1, "one"))
    second = train(corpus.pool, tmp_path / "second", 1, objective=Stopped(-1, "two"))
    assert first.fingerprint != second.fingerprint
    with pytest.raises(RecipeError, match="does not say what it is"):
        train(corpus.pool, tmp_path / "m", 1, objective=NextToken())


class Floats:
    """Next-token prediction that logs a figure that is no tensor."""

    fingerprint = "floats"

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        loss, _ = NextToken().loss(model, batch)
        return loss, {"half": 0.5, "whole": 2}


def test_a_figure_of_an_objective_may_be_a_plain_number(corpus: Corpus, tmp_path: Path) -> None:
    made = train(corpus.pool, tmp_path / "m", 2, objective=Floats(), compute={"train_micro_batch": 2})
    assert [(point["half"], point["whole"]) for point in read_curve(made.path)] == [(0.5, 2.0)] * 2
    assert rows_of(made.path)["objective"] == "Floats"


# Golden curves

GOLDEN_STEPS = 50
GOLDEN_AT = (2, 4, 10, 20, 30, 40, 50)


@pytest.fixture(scope="module")
def written_out() -> datasets.Dataset:
    """Sequences in which each token follows from the one before by the row's rule: x -> 2x, or 2x + 1, modulo 101."""
    rows = []
    for number in range(96):
        ids = [number]
        for _ in range(T):
            ids.append((2 * ids[-1] + number % 2) % 101)
        rows.append(ids)
    length = datasets.List(datasets.Value("uint16"), length=T + 1)
    return datasets.Dataset.from_dict({"input_ids": rows}, features=datasets.Features({"input_ids": length}))


def golden(rows: datasets.Dataset, corpus: Corpus, out: Path, **settings: Any) -> Checkpoint:
    model = {**CONFIG, "vocab_size": 384}
    return train(rows, out, GOLDEN_STEPS, model=model, tokenizer=corpus.tokenizer, **settings)


def at_golden(made: Checkpoint) -> dict[int, float]:
    """What the curve says at these steps: the mean of the step and the one before."""
    return {p["step"]: round(p["train_loss"], 5) for p in read_curve(made.path) if p["step"] in GOLDEN_AT}


PLAIN = {2: 5.94731, 4: 5.50064, 10: 4.23134, 20: 2.35433, 30: 1.30957, 40: 0.81683, 50: 0.67285}
DISTILLED = {2: 5.94876, 4: 5.5347, 10: 4.33643, 20: 2.72379, 30: 1.91249, 40: 1.61923, 50: 1.53168}


def test_the_loss_curve_does_not_move(written_out: datasets.Dataset, corpus: Corpus, tmp_path: Path) -> None:
    """In float32, by one thread. *Measured 2026-11-21, torch 2.13, transformers 5.23.*"""
    made = golden(written_out, corpus, tmp_path / "m")
    assert at_golden(made) == pytest.approx(PLAIN, abs=2e-4)


@pytest.mark.slow
def test_the_loss_curve_of_vanilla_kd_does_not_move(
    written_out: datasets.Dataset, corpus: Corpus, tmp_path: Path
) -> None:
    teacher = golden(written_out, corpus, tmp_path / "teacher", seed=1)
    distilled = {"name": "vanilla_kd", "dtype": "float32"}
    made = golden(written_out, corpus, tmp_path / "m", objective=distilled, teacher=teacher.path)
    assert at_golden(made) == pytest.approx(DISTILLED, abs=2e-4)
