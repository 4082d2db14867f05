"""Scores through llama-cpp-python's own server, on the weights that transformers has: a server by others."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import miniplm
from conftest import write_jsonl
from miniplm.errors import ModelError, ScoreError
from miniplm.packing.instances import Packed
from miniplm.recipe import Compute, GivenModel, ScoreSettings, ServerModel
from miniplm.scoring import line as line_module
from miniplm.scoring.huggingface import load
from miniplm.scoring.server import connect

missing = [name for name in ("llama_cpp", "gguf", "fastapi") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed; `make test-server` installs them"),
]

T = 48
CONTEXT = 128
NATS = 1e-5  # per token; measured: 5.2e-7, keys and values cached in float32
KEY = "sk-of-the-llama"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", 60, sources=2, words=20)
    tokenizer = {"train": {"vocab_size": 300}}
    split = {"reference": 0, "held_out": 0.1}
    made = miniplm.prepare(
        str(folder / "a.jsonl"), tokenizer=tokenizer, out=folder / "out", sequence_length=T, split=split
    )
    return made.pool


@pytest.fixture(scope="module")
def model(pool: Packed, tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A model whose predictions are far from uniform, with one embedding more than the tokenizer has: the BOS."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=301, num_key_value_heads=2, max_position_embeddings=CONTEXT, **sizes)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    made.save_pretrained(folder)
    pool.tokenizer.save(folder)
    return made, folder


@pytest.fixture(scope="module")
def serve(
    model: tuple[LlamaForCausalLM, Path], pool: Packed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[bool], str]]:
    """Start a server of the model, with or without a BOS in front of texts; gives its URL."""
    import tiny_gguf

    processes: list[subprocess.Popen[bytes]] = []
    folder = tmp_path_factory.mktemp("gguf")

    def start(add_bos: bool) -> str:
        path = folder / f"tiny-{add_bos}.gguf"
        tiny_gguf.write(path, model[0], pool.tokenizer, add_bos)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "model": path, "host": "127.0.0.1", "port": port, "logits_all": True, "n_ctx": CONTEXT, "n_threads": 1,
            "type_k": 0, "type_v": 0, "api_key": KEY, "n_gpu_layers": 0,
        }  # fmt: skip
        command = [sys.executable, "-m", "llama_cpp.server"]
        command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        log = (folder / f"log-{add_bos}").open("wb")
        processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        log.close()
        _wait_for(port, processes[-1], folder / f"log-{add_bos}")
        return f"http://127.0.0.1:{port}/v1"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    for _ in range(600):
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:])


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_SERVER_KEY", KEY)
    monkeypatch.setattr(line_module, "_FIRST_WAIT", 0.01)


def expected_scores(model: tuple[LlamaForCausalLM, Path], tokens: Any, counted: Any) -> Any:
    """Of the model in transformers, with the BOS in front that this server puts there."""
    in_front = np.full((len(tokens), 1), 300, tokens.dtype)
    with_bos = np.concatenate([in_front, tokens], axis=1)
    mask = np.concatenate([np.zeros((len(tokens), 1), np.bool_), counted], axis=1)
    scorer = load(GivenModel(model=str(model[1])), ScoreSettings(dtype="float32"), Compute(device="cpu"))
    return scorer.score(with_bos, mask)


def test_scores_through_llama_cpp_are_those_of_transformers(
    serve: Callable[[bool], str], model: tuple[LlamaForCausalLM, Path], pool: Packed, tmp_path: Path
) -> None:
    url = serve(True)
    tokens = np.asarray(pool.dataset.with_format("numpy")[:]["input_ids"])
    assert (tokens == pool.tokenizer.separator).any()
    counted = np.ones((len(tokens), T), np.bool_)
    expected = expected_scores(model, tokens, counted)
    settings = {"server": url, "model": "tiny", "send": "text", "tokenizer": str(model[1])}
    for dialect in ("echo", "auto"):
        served = ServerModel.model_validate({**settings, "dialect": dialect})
        scorer = connect(served, Compute(server_concurrency=2))
        found = scorer.score(tokens, counted)
        scorer.close()
        assert np.max(np.abs(found - expected) / T) < NATS
    assert np.ptp(expected / T) > 0.1, "this would compare uniform guesses"
    scores = miniplm.score(pool, served, out=tmp_path / "scores", compute=Compute(server_concurrency=2))
    np.testing.assert_allclose(scores.logp / T, expected / T, rtol=0, atol=NATS)


def test_a_model_without_a_bos_is_refused_because_its_numbers_are_of_other_tokens(
    serve: Callable[[bool], str],
    model: tuple[LlamaForCausalLM, Path],
    pool: Packed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = serve(False)
    tokens = np.asarray(pool.dataset.with_format("numpy")[:1]["input_ids"])
    served = ServerModel(server=url, model="tiny", send="text", tokenizer=str(model[1]))
    scorer = connect(served, Compute(server_concurrency=1))
    with pytest.raises(ScoreError, match="after that token, not before it"):
        scorer.score(tokens, np.ones((1, T), np.bool_))
    scorer.close()
    ids = connect(served.model_copy(update={"send": "ids"}), Compute(server_concurrency=1))
    with pytest.raises(ModelError) as caught:
        ids.score(tokens, np.ones((1, T), np.bool_))
    ids.close()
    assert "asked 3 times" in str(caught.value)
    assert "send: text" in str(caught.value)
    monkeypatch.setenv("MINIPLM_SERVER_KEY", "another")
    wrong = connect(served, Compute(server_concurrency=1))
    with pytest.raises(ModelError, match="MINIPLM_SERVER_KEY, which is set, but is not accepted"):
        wrong.score(tokens, np.ones((1, T), np.bool_))
    wrong.close()
