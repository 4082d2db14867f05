"""Training: the schedule, AdamW and the loss against code written out here; the promises of resume and of batches."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

import miniplm
from conftest import write_jsonl
from miniplm import artifact
from miniplm.errors import ModelError, RecipeError, TrainingError
from miniplm.models.load import new_model
from miniplm.packing.instances import counted
from miniplm.packing.prepare import Corpus
from miniplm.recipe import Compute, Counted, GivenModel, ScoreSettings, TrainSettings
from miniplm.scoring.load import load_scorer
from miniplm.training import processes
from miniplm.training import trainer as training
from miniplm.training.arguments import arguments, place_on, training_device
from miniplm.training.callbacks import Stopwatch, last_state, rates
from miniplm.training.checkpoint import Checkpoint, read_curve
from miniplm.training.data import Collator, TrainingOrder
from miniplm.training.objectives import Batch, NextToken
from miniplm.training.plan import Plan
from miniplm.training.trainer import TrainingData

T = 32
BATCH = 8  # instances
PEAK = 1e-2
VOCAB_SIZE = 384  # 300 tokens, padded
CONFIG = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A few hundred instances of easy text."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return miniplm.prepare(
            write_jsonl(folder / "text.jsonl", 120),
            tokenizer={"train": {"vocab_size": 300}},
            sequence_length=T,
            split={"reference": 0.1, "held_out": 0.2},
            out=folder / "corpus",
        )


def settings(steps: int, **given: Any) -> TrainSettings:
    usual: dict[str, Any] = {"batch_tokens": BATCH * T, "learning_rate": PEAK, "precision": "float32"}
    usual |= {"config": CONFIG} if "preset" not in given else {}
    return TrainSettings(**{"tokens": steps * BATCH * T, **usual, **given})


def train(
    corpus: Corpus,
    out: Path,
    how: TrainSettings,
    *,
    rows: datasets.Dataset | None = None,
    rule: Counted = "all",
    held_out: bool = False,
    objective: Any = None,
    **compute: Any,
) -> Checkpoint:
    """Train on the pool. Eight instances to a micro-batch unless it is said otherwise."""
    data = TrainingData(
        rows if rows is not None else corpus.pool.dataset,
        corpus.tokenizer,
        corpus.held_out.dataset if held_out else None,
        rule,
    )
    what = training.identity(how, rule, {"data": corpus.pool.fingerprint})
    return training.train(
        how, data, out, what, Compute(**{"device": "cpu", "train_micro_batch": 8, **compute}), objective=objective
    )


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of a step, the first being 0: linear from 0 to the peak, then a cosine to a tenth of it."""
    if step < warmup_steps:
        return PEAK * step / warmup_steps
    along = (step - warmup_steps) / (steps - warmup_steps)
    return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * along)) / 2)


@dataclasses.dataclass
class Watch:
    """The objective of `train`, which also keeps the parameters before each micro-batch and the micro-batches."""

    before: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    batches: list[Batch] = dataclasses.field(default_factory=list)
    stop_at: int | None = None
    nan_at: int | None = None

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        number = len(self.batches)
        self.before.append({name: value.detach().clone() for name, value in model.named_parameters()})
        self.batches.append(batch)
        if number == self.stop_at:
            raise KeyboardInterrupt
        loss, metrics = NextToken().loss(model, batch)
        return (loss * math.nan if number == self.nan_at else loss), metrics


# What comes out


STEPS = 60


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model after `STEPS` steps, with a warm-up of 6 and a held-out curve of 24-instance batches."""
    torch.set_num_threads(1)
    how = settings(STEPS, warmup_ratio=0.1)
    return train(corpus, tmp_path_factory.mktemp("trained") / "model", how, held_out=True)


def test_training_brings_the_loss_of_easy_text_far_below_that_of_a_uniform_guess(trained: Checkpoint) -> None:
    curve = read_curve(trained.path)
    assert abs(curve[0]["train_loss"] - math.log(VOCAB_SIZE)) < 0.3
    for name in ("train_loss", "held_out_loss"):
        assert curve[-1][name] < 0.6 * math.log(300)
    assert trained.manifest.counts["final_train_loss"] == curve[-1]["train_loss"]


def test_the_result_is_loaded_by_transformers_as_it_is_and_generates(trained: Checkpoint, corpus: Corpus) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained.path)
    text = "the teacher reads a model"
    mixed = "1234567 don't  Cafe\u0301\n\n  x==y; 日本語 🙂\tend "  # where Qwen2's own splitter would differ
    assert tokenizer(mixed)["input_ids"] == corpus.tokenizer.encode([mixed])[0].tolist()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == corpus.tokenizer.encode([text])[0].tolist()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0]).startswith(text)
    assert tokenizer.eos_token_id == corpus.tokenizer.separator


def test_the_manifest_counts_what_was_trained(trained: Checkpoint, corpus: Corpus) -> None:
    counts = trained.manifest.counts
    assert counts["steps"] == STEPS
    assert counts["train_tokens"] == STEPS * BATCH * T
    assert counts["epochs"] == pytest.approx(STEPS * BATCH / len(corpus.pool), abs=1e-4)
    distinct = {id(p): p.numel() for p in AutoModelForCausalLM.from_pretrained(trained.path).parameters()}
    assert counts["parameters"] == sum(distinct.values())
    assert counts["vocab_size"] == VOCAB_SIZE


def test_nothing_of_the_training_state_is_left_in_the_artifact(trained: Checkpoint) -> None:
    names = {path.name for path in trained.path.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors", "provenance.json",
        "tokenizer.json", "tokenizer_config.json", "training.jsonl",
    }  # fmt: skip
    assert list(artifact.verify(trained.path)) == []


def test_the_curve_has_its_figures_at_even_distances_up_to_the_last_token(trained: Checkpoint) -> None:
    lines = (trained.path / "training.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    assert [point["step"] for point in curve] == list(range(3, STEPS + 1, 3))
    for point in curve:
        assert point["tokens"] == point["step"] * BATCH * T
        assert set(point) == {"step", "tokens", "train_loss", "held_out_loss", "learning_rate", "grad_norm", "flops"}


def test_the_learning_rate_warms_up_from_zero_and_falls_along_a_cosine_to_a_tenth(trained: Checkpoint) -> None:
    for point in read_curve(trained.path):
        assert point["learning_rate"] == pytest.approx(schedule(point["step"] - 1, STEPS, 6), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("rule", ["all", "skip_after_separator"])
def test_the_held_out_loss_of_the_curve_is_what_the_scorer_measures_on_the_same_instances(
    rule: Counted, corpus: Corpus, tmp_path: Path
) -> None:
    """In batches that do not divide the 64 instances evenly; Eq. 5 is the mean over instances of means."""
    how = settings(4, batch_tokens=24 * T, tokens=4 * 24 * T)
    made = train(corpus, tmp_path / "model", how, held_out=True, rule=rule, train_micro_batch=24)
    assert len(corpus.held_out) > 64
    chosen = np.linspace(0, len(corpus.held_out) - 1, 64).astype(np.int64)
    rows = corpus.held_out.select(chosen).with_format("numpy")
    tokens = np.stack(list(rows["input_ids"]))
    mask = counted(tokens, rows["length"], corpus.held_out.separator, rule)
    scorer = load_scorer(GivenModel(model=str(made.path)), ScoreSettings(dtype="float32"), Compute(device="cpu"))
    expected = float(np.mean(-scorer.score(tokens, mask) / mask.sum(axis=1)))
    assert read_curve(made.path)[-1]["held_out_loss"] == pytest.approx(expected, abs=2e-5)


def test_a_curve_without_held_out_instances_has_the_training_loss_alone(corpus: Corpus, tmp_path: Path) -> None:
    made = train(corpus, tmp_path / "model", settings(2))
    assert [set(point) for point in read_curve(made.path)] == [
        {"step", "tokens", "train_loss", "learning_rate", "grad_norm", "flops"}
    ] * 2


def test_the_curve_ends_where_the_training_ends(corpus: Corpus, tmp_path: Path) -> None:
    """Also where the number of steps (41) is no multiple of the distance between points (2)."""
    how = settings(41, batch_tokens=T, tokens=41 * T)
    made = train(corpus, tmp_path / "model", how, held_out=True)
    curve = read_curve(made.path)
    assert curve[-1]["step"] == 41
    assert curve[-1]["tokens"] == made.manifest.counts["train_tokens"] == 41 * T
    assert "held_out_loss" in curve[-1]


# Steps


def slow_steps(
    rows: datasets.Dataset, how: TrainSettings, separator: int, rule: Counted, steps: int
) -> list[dict[str, Tensor]]:
    """AdamW, the schedule, clipping and Eq. 5 written out, with dense logits; the parameters after each step."""
    assert how.config is not None
    model = new_model({"vocab_size": VOCAB_SIZE, **how.config}, how.seed)
    order = TrainingOrder(rows, steps * BATCH, how.seed)
    warmup = round(how.warmup_ratio * steps)
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    after = []
    for step in range(steps):
        losses = []
        for ids, length, _ in order.__getitems__(list(range(step * BATCH, (step + 1) * BATCH))):
            row = torch.from_numpy(ids.astype(np.int64))
            logp = torch.log_softmax(model(input_ids=row[None, :-1]).logits[0], dim=-1)
            own = [
                -logp[t, row[t + 1]] for t in range(T) if t + 1 < length and (rule == "all" or int(row[t]) != separator)
            ]
            losses.append(torch.stack(own).mean())
        model.zero_grad()
        torch.stack(losses).mean().backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
        shrink = min(1.0, how.clip / (norm + 1e-6))
        rate = schedule(step, steps, warmup)
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                gradient = p.grad * shrink
                mean[name] = how.beta1 * mean[name] + (1 - how.beta1) * gradient
                square[name] = how.beta2 * square[name] + (1 - how.beta2) * gradient**2
                unbiased = mean[name] / (1 - how.beta1 ** (step + 1))
                spread = (square[name] / (1 - how.beta2 ** (step + 1))).sqrt()
                decay = 0.0 if name.endswith("bias") or "norm" in name else how.weight_decay
                p.mul_(1 - rate * decay).sub_(rate * unbiased / (spread + how.epsilon))
        after.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return after


@pytest.mark.parametrize(("rule", "clip"), [("all", 1.0), ("skip_after_separator", 0.3)])
def test_steps_are_those_of_adamw_written_out(rule: Counted, clip: float, corpus: Corpus, tmp_path: Path) -> None:
    """Decay on matrices but not on biases and norms, clipping by the norm of all gradients, a first step at rate 0."""
    how = settings(4, warmup_ratio=0.25, clip=clip, seed=5)
    watch = Watch()
    made = train(corpus, tmp_path / "model", how, rule=rule, objective=watch)
    slow = slow_steps(corpus.pool.dataset, how, corpus.pool.separator, rule, 4)
    final = dict(AutoModelForCausalLM.from_pretrained(made.path).named_parameters())
    for before, after, expected in zip(watch.before, [*watch.before[1:], final], slow, strict=True):
        assert set(after) == set(expected)
        for name in expected:
            torch.testing.assert_close(
                after[name] - before[name],
                expected[name] - before[name],
                rtol=0,
                atol=1e-5,
                msg=f"{name} moved otherwise",
            )
    first = {name: bool((watch.before[1][name] != watch.before[0][name]).any()) for name in final}
    assert not any(first.values()), "the rate of the first step is 0"
    assert all(bool((watch.before[2][name] != watch.before[1][name]).any()) for name in final)


def test_matrices_decay_and_biases_and_norms_do_not(corpus: Corpus, tmp_path: Path) -> None:
    """With a constant gradient-free objective, decay is all that moves a parameter."""

    class Still:
        def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return sum((p.sum() * 0.0 for p in model.parameters()), torch.zeros(())), {}

    how = settings(1, warmup_ratio=0.0, weight_decay=0.5)
    made = train(corpus, tmp_path / "model", how, objective=Still())
    begun = dict(new_model({"vocab_size": VOCAB_SIZE, **CONFIG}, 0).named_parameters())
    for name, p in AutoModelForCausalLM.from_pretrained(made.path).named_parameters():
        factor = 1.0 if name.endswith("bias") or "norm" in name else 1 - PEAK * 0.5
        torch.testing.assert_close(p, begun[name] * factor, rtol=1e-6, atol=0, msg=name)


def test_batches_are_those_of_the_training_order(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch()
    train(corpus, tmp_path / "model", settings(5, seed=3), objective=watch, train_micro_batch=4)
    order = TrainingOrder(corpus.pool.dataset, 40, 3)
    collate = Collator(corpus.pool.separator, "all")
    assert len(watch.batches) == 10
    for number, batch in enumerate(watch.batches):
        expected = collate(order.__getitems__(list(range(4 * number, 4 * number + 4))))
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["targets"], expected["targets"])


@pytest.mark.parametrize("rule", ["all", "skip_after_separator"])
def test_the_size_of_the_micro_batch_does_not_change_the_losses(rule: Counted, corpus: Corpus, tmp_path: Path) -> None:
    curves = []
    for micro_batch in (4, 16):
        made = train(
            corpus, tmp_path / str(micro_batch), settings(8, batch_tokens=16 * T, tokens=8 * 16 * T), rule=rule,
            held_out=True, train_micro_batch=micro_batch,
        )  # fmt: skip
        curves.append(read_curve(made.path))
    assert curves[0][-1]["train_loss"] < curves[0][0]["train_loss"] - 0.3
    for small, large in zip(*curves, strict=True):
        for name in ("train_loss", "held_out_loss", "learning_rate"):
            assert small[name] == pytest.approx(large[name], abs=1e-4)


def test_data_loader_workers_do_not_change_the_model(corpus: Corpus, tmp_path: Path) -> None:
    models = [
        train(corpus, tmp_path / str(workers), settings(3), trainer={"dataloader_num_workers": workers}).path
        for workers in (0, 2)
    ]
    assert len({(model / "model.safetensors").read_bytes() for model in models}) == 1


def test_a_micro_batch_larger_than_the_batch_is_the_batch(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch()
    train(corpus, tmp_path / "model", settings(2), objective=watch, train_micro_batch=64)
    assert [len(batch["input_ids"]) for batch in watch.batches] == [BATCH, BATCH]


def test_seeds_give_different_models(corpus: Corpus, tmp_path: Path) -> None:
    weights = [
        (train(corpus, tmp_path / str(run), settings(2, seed=seed)).path / "model.safetensors").read_bytes()
        for run, seed in enumerate((0, 1, 0))
    ]
    assert weights[0] == weights[2]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("family", ["mamba", "llama", "gpt2", "gpt_neox"])
def test_other_families_train_in_bfloat16(family: str, corpus: Corpus, tmp_path: Path) -> None:
    config = {"model_type": family, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": True}
    config |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "mamba":
        config |= {"state_size": 4, "residual_in_fp32": True}
    else:
        config |= {"num_attention_heads": 2, "intermediate_size": 64}
    how = settings(3, config=config, precision="bfloat16", warmup_ratio=0.0)
    curve = read_curve(train(corpus, tmp_path / "model", how).path)
    assert abs(curve[0]["train_loss"] - math.log(VOCAB_SIZE)) < 0.5
    assert curve[-1]["train_loss"] < curve[0]["train_loss"]


def test_bfloat16_and_float32_begin_with_the_same_loss_but_for_rounding(corpus: Corpus, tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        curve = read_curve(train(corpus, tmp_path / precision, settings(1, precision=precision), held_out=True).path)
        losses.append((curve[0]["train_loss"], curve[0]["held_out_loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert losses[0] != losses[1], "both were float32"


def test_bfloat16_training_takes_products_in_bfloat16_and_keeps_weights_in_float32(
    corpus: Corpus, tmp_path: Path
) -> None:
    products = []

    class Look:
        def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            products.append(model.base_model.layers[0].mlp.up_proj(torch.zeros(1, 32)).dtype)
            return NextToken().loss(model, batch)

    made = train(corpus, tmp_path / "model", settings(2, precision="bfloat16"), objective=Look())
    assert products == [torch.bfloat16] * 2
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(made.path).parameters()} == {torch.float32}


# Interruption


SAME_BYTES = ("model.safetensors", "training.jsonl", "manifest.json", "config.json", "tokenizer.json", "README.md")


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """24 steps, a checkpoint every 6, more than an epoch of the 128 rows."""
    torch.set_num_threads(1)
    return train(corpus, tmp_path_factory.mktemp("undisturbed") / "model", **interruptible(corpus))


def interruptible(corpus: Corpus) -> dict[str, Any]:
    return {
        "how": settings(24, warmup_ratio=0.1, seed=2), "rows": corpus.pool.select(range(128)), "held_out": True,
        "checkpoints": 4, "rule": "skip_after_separator", "train_micro_batch": 4,
    }  # fmt: skip


@pytest.mark.parametrize("steps", [0, 3, 6, 11, 23])
def test_interrupted_and_begun_again_training_ends_with_the_same_bytes(
    steps: int, undisturbed: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    """Interrupted at the second micro-batch of the step after so many steps; measuring counts no loss here."""
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        train(corpus, out, **interruptible(corpus), objective=StopTraining(2 * steps + 1))
    assert not out.exists()
    second = StopTraining(None)
    train(corpus, out, **interruptible(corpus), objective=second)
    assert second.training_batches == 2 * (24 - steps // 6 * 6), "it did not go on from the newest checkpoint"
    for name in SAME_BYTES:
        assert (out / name).read_bytes() == (undisturbed.path / name).read_bytes(), name


def test_interrupted_three_times_training_ends_with_the_same_bytes(
    undisturbed: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    for batches in (15, 15, 3):  # steps 0 to 7, then 6 to 13, then 12 and 13 once more
        with pytest.raises(KeyboardInterrupt):
            train(corpus, out, **interruptible(corpus), objective=StopTraining(batches))
    train(corpus, out, **interruptible(corpus))
    for name in SAME_BYTES:
        assert (out / name).read_bytes() == (undisturbed.path / name).read_bytes(), name


def test_a_checkpoint_that_was_not_finished_is_not_resumed_from(
    undisturbed: Checkpoint, corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        train(corpus, out, **interruptible(corpus), objective=StopTraining(2 * 14))
    newest = tmp_path / "model.partial" / "state" / "checkpoint-12"
    (newest / "complete").unlink()
    (newest / "optimizer.pt").write_bytes(b"half of it")
    second = StopTraining(None)
    train(corpus, out, **interruptible(corpus), objective=second)
    assert second.training_batches == 2 * (24 - 6)
    for name in SAME_BYTES:
        assert (out / name).read_bytes() == (undisturbed.path / name).read_bytes(), name


def test_interrupted_training_with_dropout_ends_with_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    """What is dropped after a resume is what would have been dropped."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5, "eos_token_id": 0}
    how = {
        "how": settings(8, config={**config, "bos_token_id": 0}, seed=3, precision="bfloat16"),
        "held_out": True,
        "checkpoints": 4,
    }
    torch.manual_seed(11)
    whole = train(corpus, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "model", **how, objective=StopTraining(5))
    torch.manual_seed(12)
    train(corpus, tmp_path / "model", **how)
    for name in SAME_BYTES:
        assert (tmp_path / "model" / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_training_goes_on_with_another_micro_batch_where_it_stopped(corpus: Corpus, tmp_path: Path) -> None:
    how = interruptible(corpus)
    expected = Watch()
    train(corpus, tmp_path / "expected", **{**how, "held_out": False}, objective=expected)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "model", **{**how, "held_out": False}, objective=StopTraining(15))
    found = Watch()
    made = train(
        corpus, tmp_path / "model", **{**how, "held_out": False, "train_micro_batch": 8, "checkpoints": 2},
        objective=found,
    )  # fmt: skip
    assert len(found.batches) == 24 - 6
    for number, batch in enumerate(found.batches):
        pair = expected.batches[2 * (6 + number) : 2 * (6 + number) + 2]
        assert torch.equal(batch["input_ids"], torch.cat([half["input_ids"] for half in pair]))
    for point, same in zip(read_curve(made.path), read_curve(tmp_path / "expected"), strict=True):
        assert point["step"] == same["step"]
        assert point["train_loss"] == pytest.approx(same["train_loss"], abs=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_how_fast_a_training_was_is_told_of_all_its_runs(last: bool, corpus: Corpus, tmp_path: Path) -> None:
    """Interrupted in the middle, or after the last state, where the second run takes no step."""
    out, how = tmp_path / "model", settings(12)
    with pytest.MonkeyPatch.context() as patch:
        if last:
            patch.setattr(training, "write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            train(corpus, out, how, checkpoints=2, objective=StopTraining(None if last else 7))
    (newest,) = (tmp_path / "model.partial" / "state").glob(f"checkpoint-{12 if last else 6}")
    told = json.loads((newest / "complete").read_text())
    assert (told["processes"], told["sharded"]) == (1, False)
    (newest / "complete").write_text(json.dumps({**told, "seconds": 100.0}))
    found = artifact.provenance(train(corpus, out, how, checkpoints=2).path)
    seconds, tokens = found["train_seconds"], 12 * BATCH * T
    assert 100 <= seconds < 160
    assert found["tokens_per_s"] == round(tokens / seconds)
    flops = artifact.read(out).counts["train_flops"]
    assert found["flops_per_s"] == pytest.approx(flops / seconds, rel=1e-3)
    assert 0 <= found["share_of_matmul_rate"] < 1


def stop(*given: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_what_is_not_known_of_earlier_runs_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "complete").write_text(json.dumps({"seconds": 0}))
    state = last_state(tmp_path)
    assert state is not None
    assert not state.sharded
    assert rates(Stopwatch(state), 1000, 1e6, 1e12) == {}


def test_unfinished_training_is_not_gone_on_with_under_other_settings(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "model", settings(8), objective=StopTraining(3))
    with pytest.raises(miniplm.MiniplmError, match="learning_rate"):
        train(corpus, tmp_path / "model", settings(8, learning_rate=PEAK / 2))


def test_a_finished_model_is_not_trained_again(undisturbed: Checkpoint, corpus: Corpus) -> None:
    second = StopTraining(0)
    again = train(corpus, undisturbed.path, **interruptible(corpus), objective=second)
    assert again.fingerprint == undisturbed.fingerprint
    assert second.training_batches == 0


@dataclasses.dataclass
class StopTraining:
    """The objective of `train` until so many micro-batches were seen; then what control-C raises."""

    stop_after: int | None
    training_batches: int = 0

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.is_grad_enabled():
            if self.training_batches == self.stop_after:
                raise KeyboardInterrupt
            self.training_batches += 1
        return NextToken().loss(model, batch)


# Refusals


@pytest.mark.parametrize(
    ("trainer", "named"),
    [({"no_such_argument": 1}, "no_such_argument"), ({"optim": "no_such_optimizer"}, "no_such_optimizer")],
)
def test_a_trainer_setting_that_transformers_does_not_know_is_a_recipe_error(
    trainer: Mapping[str, Any], named: str, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=named):
        train(corpus, tmp_path / "model", settings(2, trainer=trainer))


def test_what_changes_the_model_may_not_stand_under_compute(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"optim.*in no fingerprint"):
        train(corpus, tmp_path / "model", settings(2), trainer={"optim": "sgd"})


@pytest.mark.parametrize(
    "trainer",
    [
        {"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "group_by_length"}, {"num_train_epochs": 2},
        {"group_by_length": True}, {"ignore_data_skip": True}, {"save_only_model": True},
    ],
)  # fmt: skip
def test_a_trainer_setting_that_would_have_no_effect_is_a_recipe_error(
    trainer: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=next(iter(trainer))):
        train(corpus, tmp_path / "model", settings(2, trainer=trainer))


def test_noise_on_the_embeddings_has_its_effect(corpus: Corpus, tmp_path: Path) -> None:
    curves = [
        read_curve(train(corpus, tmp_path / str(len(trainer)), settings(2, trainer=trainer)).path)[0]["train_loss"]
        for trainer in ({}, {"neftune_noise_alpha": 50.0})
    ]
    assert curves[0] != pytest.approx(curves[1], abs=1e-4)


CHANGES = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}, "scheduler": {"type": "OneCycle"}}


@pytest.mark.parametrize("as_file", [False, True])
def test_a_deepspeed_configuration_under_compute_that_changes_the_model_is_a_recipe_error(
    as_file: bool, corpus: Corpus, tmp_path: Path
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(CHANGES))
    config = str(file) if as_file else CHANGES
    with pytest.raises(RecipeError, match=r"(?s)deepspeed.*no fingerprint.*optimizer, scheduler.*model's own `trainer"):
        train(corpus, tmp_path / "model", settings(2), trainer={"deepspeed": config})
    if as_file:
        with pytest.raises(RecipeError, match=r"(?s)`trainer: {deepspeed.*optimizer, scheduler"):
            train(corpus, tmp_path / "model", settings(2, trainer={"deepspeed": config}))


@pytest.mark.parametrize("content", [None, "{"])
@pytest.mark.parametrize("name", ["fsdp_config", "deepspeed"])
def test_a_configuration_of_the_trainers_that_cannot_be_read_is_a_recipe_error(
    name: str, content: str | None, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    compute = Compute(device="cpu", trainer={"fsdp": "full_shard", name: str(file)})
    how = settings(2)
    with pytest.raises(RecipeError, match=r"(?s)(refuses these settings|cannot be read).*because"):
        arguments(how, Plan.of(how, 100, T, compute), compute, tmp_path / "state", tmp_path / "logs")


# Devices


def test_a_device_without_float64_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training does not run on mps.*\n.*cpu"):
        train(corpus, tmp_path / "model", settings(2), device="mps")


def test_the_trainer_uses_the_device_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    made = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    place_on(made, training_device(Compute(device="cuda:1")))
    assert made.device == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(RecipeError, match="one device for 2 processes"):
        training_device(Compute(device="cuda:1"))


@pytest.mark.parametrize("where", ["settings", "compute"])
@pytest.mark.parametrize(
    "name", ["max_steps", "learning_rate", "seed", "output_dir", "bf16", "per_device_train_batch_size"]
)
def test_a_trainer_setting_that_the_recipe_decides_is_a_recipe_error(
    where: str, name: str, corpus: Corpus, tmp_path: Path
) -> None:
    how, compute = ({"trainer": {name: 1}}, {}) if where == "settings" else ({}, {"trainer": {name: 1}})
    with pytest.raises(RecipeError, match=rf"{name}.*decided by the recipe's own settings"):
        train(corpus, tmp_path / "model", settings(2, **how), **compute)


def test_a_trainer_setting_of_ones_own_reaches_the_trainer(corpus: Corpus, tmp_path: Path) -> None:
    usual, other = (
        train(corpus, tmp_path / name, settings(2, warmup_ratio=0, trainer=trainer)).path / "model.safetensors"
        for name, trainer in (("usual", {}), ("other", {"optim": "sgd"}))
    )
    assert usual.read_bytes() != other.read_bytes()


def test_fewer_tokens_than_a_batch_are_a_recipe_error_with_both_numbers(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)shorter than one batch.*255.*256"):
        train(corpus, tmp_path / "model", settings(1, tokens=BATCH * T - 1))


def test_a_batch_smaller_than_an_instance_is_a_recipe_error_with_both_numbers(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)smaller than one instance.*31.*32"):
        train(corpus, tmp_path / "model", settings(1, batch_tokens=T - 1))


def test_a_micro_batch_that_does_not_divide_the_batch_is_a_recipe_error_with_both_numbers(
    corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"(?s)divided evenly.*instances of a batch +8.*train_micro_batch +3"):
        train(corpus, tmp_path / "model", settings(1), train_micro_batch=3)


def test_a_model_with_fewer_embeddings_than_tokens_is_a_model_error(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)300 tokens.*256 embeddings"):
        train(corpus, tmp_path / "model", settings(1, config={**CONFIG, "vocab_size": 256}))


def test_a_loss_that_is_no_number_is_a_training_error_that_names_the_step(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the training loss is nan at step 3"):
        train(corpus, tmp_path / "model", settings(6), objective=Watch(nan_at=2))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("step", [40, 41])
def test_a_loss_that_is_no_number_in_the_last_steps_is_a_training_error(
    step: int, corpus: Corpus, tmp_path: Path
) -> None:
    """Of 41 steps, when the curve has a point every two: also after the last point, weights of NaN are no model."""
    with pytest.raises(TrainingError, match="the training loss is nan"):
        train(corpus, tmp_path / "model", settings(41, batch_tokens=T, tokens=41 * T), objective=Watch(nan_at=step - 1))


def test_a_training_that_diverges_is_a_training_error(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the training loss is (nan|inf) at step \d"):
        train(corpus, tmp_path / "model", settings(8, learning_rate=1e30, warmup_ratio=0))


def test_after_a_loss_that_is_no_number_the_same_command_fails_again_at_the_same_step(
    corpus: Corpus, tmp_path: Path
) -> None:
    """No checkpoint is made of weights that are no numbers, so that a second run cannot pass it by."""
    how = settings(8, learning_rate=1e30, warmup_ratio=0)
    messages = []
    for _ in range(2):
        with pytest.raises(TrainingError) as error:
            train(corpus, tmp_path / "model", how)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
