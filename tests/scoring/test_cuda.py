"""On a GPU the same scores as on the CPU. Run with `pytest -m gpu` on a machine that has one; elsewhere it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from miniplm.models.flops import matmul_rate
from miniplm.recipe import Compute, GivenModel, ScoreSettings
from miniplm.scoring.huggingface import HuggingFaceScorer, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # importing torch's compiler causes them
]
T = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=5000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, initializer_range=0.1,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return made


def scorer(folder: Path, device: str, compiled: bool = False, **settings: str) -> HuggingFaceScorer:
    how = ScoreSettings.model_validate({"dtype": "float32", **settings})
    return load(GivenModel(model=str(folder)), how, Compute(device=device, compile=compiled))


def rows(number: int = 8) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    draw = np.random.default_rng(0)
    return draw.integers(0, 5000, (number, T + 1)).astype(np.uint32), draw.random((number, T)) < 0.9


@pytest.mark.parametrize("device", [f"cuda:{n}" for n in range(max(1, torch.cuda.device_count()))])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_scores_are_those_of_the_cpu(
    folder: Path, device: str, compiled: bool, dtype: str, tolerance: float
) -> None:  # fmt: skip
    tokens, mask = rows()
    expected = scorer(folder, "cpu").score(tokens, mask) / mask.sum(axis=1)
    found = scorer(folder, device, compiled, dtype=dtype).score(tokens, mask) / mask.sum(axis=1)
    assert np.abs(found - expected).max() < tolerance


def test_answers_that_are_taken_later_are_those_of_their_own_batch(folder: Path) -> None:
    on_gpu = scorer(folder, "cuda")
    tokens, mask = rows(64)
    one_by_one = [on_gpu.score(tokens[n : n + 8], mask[n : n + 8]) for n in range(0, 64, 8)]
    queued = [on_gpu.submit(tokens[n : n + 8], mask[n : n + 8]) for n in range(0, 64, 8)]
    for expected, pending in zip(one_by_one, queued, strict=True):
        assert (pending.result() == expected).all()


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_a_quantised_row_does_not_depend_on_its_neighbours(folder: Path, how: str) -> None:
    if how == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply in fp8")
    quantised = scorer(folder, "cuda", dtype="bfloat16", quantize=how)
    tokens, mask = rows()
    before = quantised.score(tokens, mask)[0]
    tokens[1:] = tokens[1:] // 50
    assert quantised.score(tokens, mask)[0] == before


def test_the_rate_is_that_of_a_device_that_was_waited_for() -> None:
    assert 1e12 < matmul_rate(torch.device("cuda"), torch.bfloat16) < 1e16
