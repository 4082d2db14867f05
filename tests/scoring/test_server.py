"""Scores from servers: the same as local ones, each row asked once, and no answer used that does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import miniplm
from conftest import write_jsonl
from miniplm.errors import MissingExtraError, ModelError, RecipeError, ScoreError
from miniplm.packing.instances import Packed
from miniplm.recipe import Compute, GivenModel, ScoreSettings, ServerModel, VllmModel
from miniplm.scoring import line as line_module
from miniplm.scoring import vllm as vllm_module
from miniplm.scoring.huggingface import load as load_local
from miniplm.scoring.server import ServerScorer, connect

HERE = Path(__file__).parent
KEY = "sk-very-secret-0123456789"
T = 32
LOCAL = Compute(device="cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> miniplm.packing.prepare.Corpus:  # type: ignore[name-defined]
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", 60, sources=2, words=20)
    how: dict[str, Any] = {"tokenizer": {"train": {"vocab_size": 300}}, "sequence_length": T, "block_bytes": 2000}
    return miniplm.prepare(str(folder / "a.jsonl"), out=folder / "out", split={"reference": 0, "held_out": 0.1}, **how)


@pytest.fixture(scope="module")
def pool(corpus: Any) -> Packed:
    packed: Packed = corpus.pool
    assert len(packed.shards) >= 3
    return packed


@pytest.fixture(scope="module")
def folder(pool: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose predictions are far from uniform, with the tokenizer of the instances beside it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.endswith("weight"):
                parameter.mul_(10)
    model.save_pretrained(folder)
    pool.tokenizer.save(folder)
    return folder


class Served:
    """A server process, and what it says of itself."""

    def __init__(self, folder: Path, dialect: str) -> None:
        command = [sys.executable, str(HERE / "completion_server.py"), "--model", str(folder), "--dialect", dialect]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    @cached_property
    def port(self) -> int:
        """Known when the server has loaded its model."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def faults(self, **faults: Any) -> None:
        """Misbehave so from now on, and forget what was asked."""
        self._fetch("/faults", json.dumps(faults).encode())

    def seen(self) -> SimpleNamespace:
        return SimpleNamespace(**json.loads(self._fetch("/seen")))

    def rows(self) -> list[tuple[int, ...]]:
        """The rows that it has answered; the short prompts that ask for the dialect are none."""
        return [tuple(prompt) for prompt in self.seen().answered if len(prompt) > 3]

    def model(self, **settings: Any) -> ServerModel:
        return ServerModel.model_validate({"server": self.url, "model": "tiny", **settings})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _fetch(self, path: str, body: bytes | None = None) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", body, timeout=30) as answer:
            return bytes(answer.read())


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[dict[str, Served]]:
    running = {dialect: Served(folder, dialect) for dialect in ("vllm", "echo")}
    yield running
    for served in running.values():
        served.close()


@pytest.fixture
def vllm(processes: dict[str, Served]) -> Served:
    processes["vllm"].faults()
    return processes["vllm"]


@pytest.fixture
def echo(processes: dict[str, Served]) -> Served:
    processes["echo"].faults()
    return processes["echo"]


@pytest.fixture(params=["vllm", "echo"])
def either(request: pytest.FixtureRequest, processes: dict[str, Served]) -> Served:
    processes[request.param].faults()
    return processes[request.param]


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv("MINIPLM_SERVER_KEY", "")


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make scorers that are closed after the test."""
    scorers: list[ServerScorer] = []

    def make(model: ServerModel, concurrency: int = 4) -> ServerScorer:
        scorers.append(connect(model, Compute(server_concurrency=concurrency)))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "miniplm-server"]


def batch(pool: Packed, rows: int = 8) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows of a packed part, the last of them padded, with a target here and there that does not count."""
    tokens = np.asarray(pool.dataset.with_format("numpy")[:rows]["input_ids"])
    counted = np.ones((len(tokens), T), np.bool_)
    counted[:, 5] = False
    counted[-1, 20:] = False
    return tokens, counted


def local_scores(folder: Path, tokens: Any, counted: Any) -> Any:
    return load_local(GivenModel(model=str(folder)), ScoreSettings(dtype="float32"), LOCAL).score(tokens, counted)


# --- the same numbers


@pytest.mark.parametrize(
    ("speaks", "dialect"), [("vllm", "vllm"), ("vllm", "auto"), ("echo", "echo"), ("echo", "auto")]
)
@pytest.mark.parametrize("send", ["ids", "text"])
def test_scores_are_those_of_the_model_itself(
    speaks: str, dialect: str, send: str, processes: dict[str, Served], pool: Packed, folder: Path, connected: Any
) -> None:
    served = processes[speaks]
    served.faults()
    scorer = connected(served.model(dialect=dialect, send=send, tokenizer=str(folder)))
    tokens, counted = batch(pool)
    found = scorer.score(tokens, counted)
    expected = local_scores(folder, tokens, counted)
    assert found.dtype == np.float64
    assert np.max(np.abs(found - expected) / counted.sum(axis=1)) < 1e-5
    assert np.ptp(expected / counted.sum(axis=1)) > 0.1
    asked = served.seen().bodies[-1]
    assert ("prompt_logprobs" in asked) == (speaks == "vllm")
    if send == "ids":
        assert sorted(len(row) for row in served.rows()) == [21] + [T + 1] * 7  # no padding is paid for


def test_a_whole_part_scored_through_a_server_equals_the_local_scores(
    either: Served, pool: Packed, folder: Path, tmp_path: Path
) -> None:
    local = miniplm.score(pool, folder, out=tmp_path / "local", dtype="float32", compute=LOCAL)
    model = either.model(tokenizer=str(folder))
    remote = miniplm.score(pool, model, out=tmp_path / "remote", compute=Compute(server_concurrency=4))
    assert np.max(np.abs(remote.logp - local.logp) / local.n_tokens) < 1e-5
    assert np.array_equal(remote.n_tokens, local.n_tokens)
    assert np.array_equal(remote.n_bytes, local.n_bytes)
    assert remote.tokenizer == local.tokenizer
    expected = [tuple(int(i) for i in row) for row in np.asarray(pool.dataset.with_format("numpy")[:]["input_ids"])]
    assert sorted(either.rows()) == sorted(expected)  # each exactly once
    assert not list(tmp_path.glob("**/*.journal"))


def test_a_token_that_the_server_puts_in_front_of_a_text_is_left_out(
    echo: Served, pool: Packed, folder: Path, connected: Any
) -> None:
    tokens, counted = batch(pool)
    in_front = np.concatenate([np.ones((len(tokens), 1), tokens.dtype), tokens], axis=1)
    expected = local_scores(folder, in_front, np.concatenate([np.zeros((len(tokens), 1), np.bool_), counted], axis=1))
    for bos in (True, "hidden"):
        echo.faults(bos=bos)
        scorer = connected(echo.model(dialect="echo", send="text", tokenizer=str(folder)))
        found = scorer.score(tokens, counted)
        assert np.max(np.abs(found - expected) / counted.sum(axis=1)) < 1e-5


def test_a_strict_server_is_spoken_to_in_echo(echo: Served, pool: Packed, folder: Path, connected: Any) -> None:
    echo.faults(strict=True)
    tokens, counted = batch(pool, 2)
    found = connected(echo.model()).score(tokens, counted)
    np.testing.assert_allclose(found, local_scores(folder, tokens, counted), rtol=0, atol=1e-4)


def test_tokens_that_are_parts_of_characters_are_counted_not_refused(
    echo: Served, pool: Packed, folder: Path, connected: Any
) -> None:
    (ids,) = pool.tokenizer.encode(["the model é 日本 of"])
    tokens = ids[None].astype(np.int64)
    counted = np.ones((1, len(ids) - 1), np.bool_)
    expected = local_scores(folder, tokens, counted)
    for send in ("ids", "text"):
        scorer = connected(echo.model(send=send, tokenizer=str(folder)))
        np.testing.assert_allclose(scorer.score(tokens, counted), expected, rtol=0, atol=1e-4)
        assert scorer.unreadable == 8  # the bytes of three characters


# --- answers that do not fit


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("short", "does not have a log-probability for each token"),
        ("long", "does not have a log-probability for each token"),
        ("other_id", "at token 2 it tells of another token"),
        ("null", "log p of token 2 is None"),
        ("nan", "log p of token 2 is nan"),
        ("positive", "log p of token 2 is 0.5"),
    ],
)
def test_an_answer_of_the_vllm_dialect_that_does_not_fit_is_an_error(
    how: str, says: str, vllm: Served, pool: Packed, connected: Any
) -> None:
    vllm.faults(spoil=how)
    tokens, counted = batch(pool, 1)
    with pytest.raises(ScoreError) as caught:
        connected(vllm.model()).score(tokens, counted)
    assert says in str(caught.value)
    assert f"row of 21 tokens beginning {' '.join(str(i) for i in tokens[0, :8])}" in str(caught.value)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("short", "log-probability for each token"),
        ("long", "log-probability for each token"),
        ("other_text", "token 2 is another one"),
        ("null", "log p of token 2 is None"),
        ("nan", "log p of token 2 is nan"),
        ("late", "after that token, not before it"),
    ],
)
@pytest.mark.parametrize("send", ["ids", "text"])
def test_an_echo_that_does_not_fit_is_an_error(
    how: str, says: str, send: str, echo: Served, pool: Packed, folder: Path, connected: Any
) -> None:
    echo.faults(spoil=how)
    tokens, counted = batch(pool, 1)
    with pytest.raises(ScoreError) as caught:
        connected(echo.model(send=send, tokenizer=str(folder))).score(tokens, counted)
    if how == "short":
        assert says in str(caught.value) or "is another one" in str(caught.value)
    else:
        assert says in str(caught.value)


def test_ids_with_a_token_in_front_are_refused(echo: Served, pool: Packed, folder: Path, connected: Any) -> None:
    echo.faults(bos=True)
    (other,) = pool.tokenizer.encode(["<|endoftext|> written by a person"])  # a server makes the control token of it
    scorer = connected(echo.model(send="text", tokenizer=str(folder)))
    with pytest.raises(ScoreError, match="the text of a row cannot be used"):
        scorer.score(other[None], np.ones((1, len(other) - 1), np.bool_))
    (ids,) = pool.tokenizer.encode(["日"])
    with pytest.raises(ScoreError, match="inside a character"):
        scorer.score(ids[None, 1:], np.ones((1, len(ids) - 2), np.bool_))
    assert echo.seen().requests == 0  # nothing is paid for it


def test_the_error_of_the_first_bad_row_stops_those_that_wait(vllm: Served, pool: Packed, connected: Any) -> None:
    vllm.faults(spoil="null", slow=0.05)
    tokens, counted = batch(pool, 16)
    scorer = connected(vllm.model(), concurrency=2)
    with pytest.raises(ScoreError):
        scorer.score(tokens, counted)
    time.sleep(0.3)
    assert vllm.seen().requests <= 5  # one to ask for the dialect, and what was under way


# --- a server that fails


@pytest.mark.parametrize(
    "every",
    [
        {"n": 3, "status": 429, "retry_after": "0"},
        {"n": 3, "status": 500},
        {"n": 2, "status": 503, "retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"},
    ],
)
def test_busy_and_failing_servers_are_asked_again_and_each_row_is_answered_once(
    every: dict[str, Any], either: Served, pool: Packed, folder: Path, connected: Any
) -> None:
    either.faults(every=every)
    tokens, counted = batch(pool, 12)
    found = connected(either.model()).score(tokens, counted)
    np.testing.assert_allclose(found, local_scores(folder, tokens, counted), rtol=0, atol=3e-4)
    assert len(either.rows()) == len(set(either.rows())) == 12
    assert either.seen().requests > 12


def test_a_server_that_never_recovers_is_given_up(vllm: Served, pool: Packed, connected: Any) -> None:
    vllm.faults(every={"n": 1, "status": 503, "retry_after": "0"})
    with pytest.raises(ModelError, match="asked 8 times") as caught:
        connected(vllm.model(dialect="vllm")).score(*batch(pool, 1))
    assert vllm.seen().requests == 8
    assert "503: not now" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("dialect", ["auto", "echo"])
def test_a_server_that_takes_no_ids_and_says_500_is_told_of_soon(
    dialect: str, echo: Served, pool: Packed, connected: Any
) -> None:
    echo.faults(every={"n": 1, "status": 500})
    with pytest.raises(ModelError, match=r"(?s)asked 3 times.*send: text"):
        connected(echo.model(dialect=dialect)).score(*batch(pool, 2))
    assert echo.seen().requests == 3  # the second row is not asked for


def test_nobody_there_is_an_error_that_says_where(connected: Any, pool: Packed) -> None:
    with pytest.raises(ModelError, match=r"(?s)127\.0\.0\.1:9.*ConnectError"):
        connected(ServerModel(server="http://127.0.0.1:9/v1", model="tiny")).score(*batch(pool, 1))


def test_a_server_that_does_not_answer_in_time_is_asked_again(
    vllm: Served, pool: Packed, connected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "_TIMEOUT", 0.05)
    monkeypatch.setattr(line_module, "_TRIES", 2)
    vllm.faults(slow=0.4)
    with pytest.raises(ModelError, match="ReadTimeout"):
        connected(vllm.model(dialect="vllm")).score(*batch(pool, 1))
    assert vllm.seen().requests == 2


def test_waits_grow_are_jittered_and_have_an_end(
    vllm: Served, pool: Packed, connected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(line_module, "asyncio", SimpleNamespace(**vars(line_module.asyncio) | {"sleep": sleep}))
    monkeypatch.setattr(line_module, "_FIRST_WAIT", 0.5)
    monkeypatch.setattr(line_module, "_LONGEST_WAIT", 4.0)
    for every in ({"n": 1, "status": 500}, {"n": 1, "status": 429, "retry_after": "3"}):
        vllm.faults(every=every)
        with pytest.raises(ModelError):
            connected(vllm.model(dialect="vllm")).score(*batch(pool, 1))
    longest = [0.5, 1, 2, 4, 4, 4, 4]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=False))
    assert len(set(waits[3:7])) > 1
    assert waits[7:] == [3.0] * 7


def test_a_refusal_is_told_at_once_and_redirects_are_not_followed(vllm: Served, pool: Packed, connected: Any) -> None:
    vllm.faults(spoil="redirect")
    with pytest.raises(ModelError, match="Redirects are not followed"):
        connected(vllm.model()).score(*batch(pool, 1))
    vllm.faults(strict=True)
    with pytest.raises(ModelError, match=r"(?s)400.*Unrecognized request argument"):
        connected(vllm.model(dialect="vllm")).score(*batch(pool, 1))
    assert vllm.seen().requests == 1
    vllm.faults(spoil="html")
    with pytest.raises(ModelError, match="not JSON"):
        connected(vllm.model()).score(*batch(pool, 1))


def test_no_more_requests_at_a_time_than_asked_for(vllm: Served, pool: Packed, connected: Any) -> None:
    vllm.faults(slow=0.03)
    connected(vllm.model(), concurrency=3).score(*batch(pool, 12))
    assert vllm.seen().most_under_way == 3


# --- the key


def test_the_key_goes_to_the_server_and_nowhere_else(
    vllm: Served, pool: Packed, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connected: Any
) -> None:
    vllm.faults(key=KEY)
    model = vllm.model(key_env="TEST_KEY")
    with pytest.raises(ModelError, match="TEST_KEY, which is not set"):
        connected(model).score(*batch(pool, 1))
    monkeypatch.setenv("TEST_KEY", KEY + "x")
    with pytest.raises(ModelError, match=r"(?s)Bearer \*\*\*.*TEST_KEY, which is set, but is not accepted") as caught:
        connected(model).score(*batch(pool, 1))
    assert KEY not in str(caught.value)
    monkeypatch.setenv("TEST_KEY", KEY)
    scorer = connected(model)
    scorer.score(*batch(pool, 1))
    assert set(vllm.seen().keys[-2:]) == {f"Bearer {KEY}"}
    miniplm.score(pool, model, out=tmp_path / "scores")
    told = [scorer.name, repr(scorer), repr(vars(scorer)), repr(scorer._line._client.headers), repr(model)]
    told += [path.read_text(errors="replace") for path in tmp_path.glob("**/*") if path.is_file()]
    assert not [text for text in told if KEY in text]
    monkeypatch.setenv("TEST_KEY", "two\nlines")
    with pytest.raises(RecipeError, match="characters that no key has") as caught:
        connect(model, Compute())
    assert "two" not in str(caught.value)


@pytest.mark.parametrize("place", ["me:hunter2@127.0.0.1/v1", "127.0.0.1/v1?key=hunter2", "hunter2@127.0.0.1/v1"])
def test_a_url_that_holds_a_secret_is_refused_and_not_shown(place: str) -> None:
    with pytest.raises(RecipeError, match="more than a place") as caught:
        connect(ServerModel(server=f"http://{place}", model="tiny"), Compute())
    assert "hunter2" not in str(caught.value)


def test_text_needs_a_tokenizer_and_a_server_needs_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="its tokenizer is not named"):
        connect(ServerModel(server="http://127.0.0.1:9/v1", model="tiny", send="text"), Compute())
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"miniplm\[server\]"):
        connect(ServerModel(server="http://127.0.0.1:9/v1", model="tiny"), Compute())


# --- resuming, and the end

SCORE = """
import sys
import miniplm
from miniplm.packing.instances import open_packed
from miniplm.recipe import Compute, ServerModel
url, packed, tokenizer, out = sys.argv[1:]
model = ServerModel(server=url, model="tiny", tokenizer=tokenizer)
miniplm.score(open_packed(packed), model, out=out, compute=Compute(server_concurrency=2))
"""


def test_killed_in_a_shard_and_begun_again_what_was_answered_is_not_asked_for_again(
    vllm: Served, pool: Packed, folder: Path, tmp_path: Path
) -> None:
    miniplm.score(pool, vllm.model(tokenizer=str(folder)), out=tmp_path / "undisturbed")
    vllm.faults(slow=0.05)
    command = [sys.executable, "-c", SCORE, vllm.url, str(pool.path), str(folder), str(tmp_path / "scores")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while (
        not (journals := list(tmp_path.glob("scores.partial/*.journal"))) or journals[0].read_bytes().count(b"\n") < 3
    ):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,) = tmp_path.glob("scores.partial/*.journal")
    kept = len(journal.read_bytes().splitlines())
    assert kept > 0
    time.sleep(0.2)  # what was under way when it was killed
    before = vllm.rows()
    vllm.faults()
    miniplm.score(pool, vllm.model(tokenizer=str(folder)), out=tmp_path / "scores")
    again = vllm.rows()
    committed = len(pool) - len(again) - kept
    assert committed >= 0
    assert len(before) - committed - kept <= 4  # in flight: answered, but not on the disk yet
    assert len(set(before) & set(again)) == len(before) - committed - kept
    assert set(before) | set(again) == {
        tuple(int(i) for i in row) for row in np.asarray(pool.dataset.with_format("numpy")[:]["input_ids"])
    }
    for path in sorted((tmp_path / "undisturbed").glob("*.parquet")):
        assert (tmp_path / "scores" / path.name).read_bytes() == path.read_bytes()


def test_a_scorer_that_goes_takes_its_thread_with_it(vllm: Served, pool: Packed) -> None:
    scorer = connect(vllm.model(), Compute(server_concurrency=2))
    scorer.score(*batch(pool, 2))
    vllm.faults(slow=5)
    pending = scorer.submit(*batch(pool, 4))
    scorer.close()
    with pytest.raises(CancelledError):
        pending.result()
    with pytest.raises(ModelError, match="closed"):
        scorer.submit(*batch(pool, 1))
    other = connect(vllm.model(), Compute())
    thread = next(thread for thread in threading.enumerate() if thread.name == "miniplm-server")
    del other
    thread.join(5)
    assert not thread.is_alive()


# --- vLLM's offline engine


class FakeLLM:
    """`vllm.LLM` with the arguments that it takes, computing with transformers."""

    def __init__(
        self, model: str, *, trust_remote_code: bool = False, dtype: str = "auto", revision: str | None = None,
        **others: Any,
    ) -> None:  # fmt: skip
        assert set(others) <= {"seed"}
        self.settings = (dtype, revision, trust_remote_code)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.spoil = ""

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None
    ) -> list[Any]:
        assert not use_tqdm
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            if len(ids) + sampling_params.max_tokens > 40:
                raise ValueError("The decoder prompt (length 41) is longer than the maximum model length of 40.")
            with torch.inference_mode():
                logp = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), dim=-1)
            entries = [None] + [
                {token: SimpleNamespace(logprob=float(logp[place, token]), rank=1, decoded_token=None)}
                for place, token in enumerate(ids[1:])
            ]
            if self.spoil == "short":
                entries.pop()
            if self.spoil == "other":
                entries[3] = {ids[3] + 1: next(iter(entries[3].values()))}  # type: ignore[union-attr]
            outputs.append(SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=entries, outputs=[]))
        return outputs


class FakeSamplingParams:
    def __init__(
        self, *, max_tokens: int | None = 16, temperature: float = 1.0, prompt_logprobs: int | None = None,
        detokenize: bool = True,
    ) -> None:  # fmt: skip
        assert prompt_logprobs == 0
        self.max_tokens = max_tokens


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=FakeSamplingParams))


@pytest.mark.usefixtures("fake_vllm")
def test_the_offline_engine_is_asked_for_whole_batches_and_believed_by_id(
    pool: Packed, folder: Path, tmp_path: Path
) -> None:
    settings = ScoreSettings(dtype="float32")
    scorer = vllm_module.load(VllmModel(vllm=str(folder)), settings, LOCAL)
    assert scorer.tokenizer is not None
    assert scorer.tokenizer.fingerprint == pool.tokenizer.fingerprint
    tokens, counted = batch(pool)
    counted[3] = False
    found = scorer.score(tokens, counted)
    np.testing.assert_allclose(found, local_scores(folder, tokens, counted), rtol=0, atol=1e-4)
    assert found[3] == 0
    scores = miniplm.score(pool, VllmModel(vllm=str(folder)), out=tmp_path / "scores", dtype="float32")
    local = miniplm.score(pool, folder, out=tmp_path / "local", dtype="float32", compute=LOCAL)
    assert np.max(np.abs(scores.logp - local.logp)) < 1e-4
    for how, says in (("short", "has 20 tokens"), ("other", "at token 3")):
        scorer.engine.spoil = how
        with pytest.raises(ScoreError, match=says):
            scorer.score(*batch(pool, 1))
    long = np.ones((1, 41), np.int64)
    with pytest.raises(ModelError, match="longer than the maximum model length"):
        scorer.score(long, np.ones((1, 40), np.bool_))


@pytest.mark.usefixtures("fake_vllm")
def test_the_offline_engine_does_not_quantize(folder: Path) -> None:
    with pytest.raises(RecipeError, match="transformers"):
        vllm_module.load(VllmModel(vllm=str(folder)), ScoreSettings(quantize="int8"), LOCAL)


def test_without_vllm_the_error_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"miniplm\[vllm\]"):
        vllm_module.load(VllmModel(vllm=str(folder)), ScoreSettings(), LOCAL)
