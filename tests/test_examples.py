"""The examples run as they stand, on a small corpus."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import miniplm
from conftest import write_jsonl

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
