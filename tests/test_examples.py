"""The examples run as they stand, on a small corpus."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import miniplm
from conftest import write_jsonl
from miniplm.models.load import new_model
from miniplm.training.objectives import Batch

CONFIG = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_jsonl(folder / "c.jsonl", 300)
    miniplm.prepare(
        folder / "c.jsonl",
        tokenizer={"train": {"vocab_size": 300}},
        sequence_length=31,
        split={"reference": 0.2, "held_out": 0.1},
        out=folder / "corpus",
    )
    return folder / "corpus"


def run(example: str, *arguments: Path) -> str:
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_scorer_of_ones_own(corpus: Path, tmp_path: Path) -> None:
    assert "nats per token under unigrams" in run("own_scorer.py", corpus, tmp_path / "scores")
    assert len(miniplm.open_scores(tmp_path / "scores")) == len(miniplm.open_corpus(corpus).pool)


@pytest.mark.slow
def test_a_trainer_of_ones_own(corpus: Path, tmp_path: Path) -> None:
    miniplm.select({"sampler": "random"}, pool=corpus / "pool", out=tmp_path / "chosen")
    losses = [float(line.split()[2]) for line in run("own_trainer.py", corpus, tmp_path / "chosen").splitlines()]
    assert losses[-1] < losses[0]


def test_a_sampler_of_ones_own(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        fingerprint = "constant"

        def score(self, tokens: object, counted: object) -> object:
            return -0.5 * counted.sum(axis=1)  # type: ignore[attr-defined]

    pool = miniplm.open_corpus(corpus).pool
    for role in ("teacher", "reference"):
        miniplm.score(pool, Constant(), out=tmp_path / role)
    monkeypatch.syspath_prepend(os.fspath(EXAMPLES))
    chosen = miniplm.select(
        {"sampler": "own_sampler:LogRatio", "ratio": 0.25},
        teacher=tmp_path / "teacher",
        reference=tmp_path / "reference",
        out=tmp_path / "chosen",
    )
    assert chosen.rows.tolist() == list(range(len(pool) // 4)), "all ties: the lower rows"


def test_an_objective_of_ones_own_weighs_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.fspath(EXAMPLES))
    objective = importlib.import_module("own_objective").ZLoss(0.5)
    model = new_model({**CONFIG, "vocab_size": 50}, 0)
    ids = torch.arange(24).reshape(2, 12)
    batch: Batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "weights": None, "positions": torch.arange(2)}
    weights = torch.rand(2, 11, generator=torch.Generator().manual_seed(0))
    weights[1, 4:] = 0  # targets that do not count
    for given in (None, weights / weights.sum()):
        log_p = model(batch["input_ids"]).logits
        log_z = log_p.logsumexp(-1)
        share = torch.full_like(log_z, 1 / log_z.numel()) if given is None else given
        plain = log_z - log_p.gather(-1, batch["targets"][..., None])[..., 0]
        loss, told = objective.loss(model, {**batch, "weights": given})
        assert loss.item() == pytest.approx((share * (plain + 0.5 * log_z**2)).sum().item(), rel=1e-5)
        assert told["log_z"].item() == pytest.approx((share * log_z).sum().item(), rel=1e-5)
