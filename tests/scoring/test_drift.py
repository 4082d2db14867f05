"""Drift: what does not change anything changes nothing, and what does is told by how much."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import miniplm
from conftest import write_jsonl
from miniplm.packing.prepare import Corpus
from miniplm.recipe import Compute, GivenModel, ScoreSettings
from miniplm.report.write import write_drift
from miniplm.scoring.drift import Way, drift

CPU = Compute(device="cpu", compile=False)
FLOAT32 = ScoreSettings(dtype="float32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return miniplm.prepare(
            str(write_jsonl(folder / "text.jsonl", 60)), tokenizer={"train": {"vocab_size": 300}}, sequence_length=32,
            split={"reference": 0.2, "held_out": 0}, out=folder / "corpus",
        )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[GivenModel]:
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=64, initializer_range=0.3,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        found.append(GivenModel(model=str(folder)))
    return found


def test_it_tells_how_far_log_p_and_the_picks_are_from_the_first_way(
    corpus: Corpus, models: list[GivenModel], tmp_path: Path
) -> None:
    teacher, reference, another = models
    ways = [
        Way("first"),
        Way("again"),
        Way("bfloat16", settings={"dtype": "bfloat16"}),
        Way("another model", teacher=another),
    ]
    said: list[object] = []
    first, again, low, other = drift(
        corpus.pool, teacher, reference, FLOAT32, ways, sample=len(corpus.pool), ratio=0.4, compute=CPU, say=said.append
    )
    assert said == [first, again, low, other]
    assert (again.mean_nats, again.largest_nats, again.jaccard, again.changed) == (0, 0, 1, 0)
    assert 0 < low.mean_nats < 0.1
    assert abs(low.bias_nats) <= low.mean_nats <= low.largest_nats

    scores = [
        miniplm.score(corpus.pool, model, out=tmp_path / str(n), dtype="float32", compute=CPU)
        for n, model in enumerate(models)
    ]
    picks = [
        set(miniplm.DifferenceSampling(ratio=0.4).select(scores[n], scores[1]).rows.tolist()) for n in (0, 2)
    ]  # fmt: skip
    moved = scores[2].per("token") - scores[0].per("token")
    np.testing.assert_allclose(other.mean_nats, np.abs(moved).mean(), rtol=1e-4)
    np.testing.assert_allclose(other.largest_nats, np.abs(moved).max(), rtol=1e-4)
    assert other.jaccard == len(picks[0] & picks[1]) / len(picks[0] | picks[1])
    assert other.changed == len(picks[0] ^ picks[1])


def test_an_int8_teacher_is_another_way(corpus: Corpus, models: list[GivenModel]) -> None:
    pytest.importorskip("torchao", reason='needs pip install "miniplm[quantize]"')
    ways = [Way("first"), Way("int8", settings={"quantize": "int8"})]
    _, int8 = drift(corpus.pool, models[0], models[1], FLOAT32, ways, sample=40, compute=CPU)
    assert 0 < int8.mean_nats < 0.2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing torch's compiler causes them
def test_it_is_written_as_json_csv_and_a_drawing(corpus: Corpus, models: list[GivenModel], tmp_path: Path) -> None:
    found = miniplm.drift(corpus.pool, models[0], models[1], sample=20, dtype="float32", compute=CPU)
    assert [way.way for way in found][:2] == ["as asked", "as asked, again"]
    write_drift(tmp_path / "drift", found)
    rows = json.loads((tmp_path / "drift" / "drift.json").read_bytes())
    lines = list(csv.DictReader((tmp_path / "drift" / "drift.csv").read_text().splitlines()))
    assert [row["way"] for row in rows] == [line["way"] for line in lines] == [way.way for way in found]
    assert [float(line["jaccard"]) for line in lines] == [row["jaccard"] for row in rows]
    assert (tmp_path / "drift" / "drift.svg").read_text().startswith("<svg ")
