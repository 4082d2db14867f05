"""Score truth: `HuggingFaceScorer` against a float64 log-softmax over the dense logits, one position at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MambaConfig, Qwen2Config

from miniplm.models import head
from miniplm.models.head import token_logp
from miniplm.packing.instances import counted
from miniplm.recipe import Compute, GivenModel, ScoreSettings
from miniplm.scoring.huggingface import HuggingFaceScorer, load

SEPARATOR = 7
SCALE = 10.0  # of random weights
T = 21
LENGTHS = [T + 1, T + 1, 15, 2, 9]  # ragged: tokens that are there, of T + 1
ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "qwen2": Qwen2Config(vocab_size=389, num_key_value_heads=4, **ATTENTION),
    "qwen2-tied": Qwen2Config(vocab_size=389, num_key_value_heads=2, tie_word_embeddings=True, **ATTENTION),
    "llama": LlamaConfig(vocab_size=1009, num_key_value_heads=2, **ATTENTION),
    "gpt_neox": GPTNeoXConfig(vocab_size=512, **ATTENTION),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "mamba": MambaConfig(vocab_size=641, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.02),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


def saved(name: str, folder: Path) -> Path:
    """A model with random weights, large enough that its predictions are far from uniform, in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter_name.endswith("weight"):
                parameter.mul_(SCALE)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each of `CONFIGS`, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def instances(vocab_size: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Random tokens with separators among them, padded with the separator after each length."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, vocab_size, (len(LENGTHS), T + 1)).astype(np.uint16)
    tokens[:, 5] = SEPARATOR
    tokens[1, 11] = SEPARATOR
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = SEPARATOR
    return tokens, LENGTHS


def slow_scores(
    folder: Path, tokens: np.ndarray[Any, Any], lengths: list[int], rule: str
) -> tuple[list[float], list[int]]:
    """Log p and counted targets of each instance: every logit in float64, then one target after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    sums, counts = [], []
    for row, length in zip(tokens.astype(np.int64), lengths, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row[:-1])[None], use_cache=False).logits[0].double()
        total, count = 0.0, 0
        for position in range(len(row) - 1):
            target = int(row[position + 1])
            is_there = position + 1 < length
            if not is_there or (rule == "skip_after_separator" and row[position] == SEPARATOR):
                continue
            values = logits[position].tolist()
            largest = max(values)
            total += values[target] - largest - math.log(sum(math.exp(value - largest) for value in values))
            count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def scorer_of(folder: Path, dtype: str = "float32") -> HuggingFaceScorer:
    return load(GivenModel(model=str(folder)), ScoreSettings.model_validate({"dtype": dtype}), Compute(device="cpu"))


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions at a time, and fewer logits to a block than the vocabulary has tokens."""
    monkeypatch.setattr(head, "_BLOCK", (7, 100))


@pytest.mark.parametrize("rule", ["all", "skip_after_separator"])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_scores_are_the_sum_of_float64_dense_log_softmax_over_counted_targets(
    name: str, rule: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    tokens, lengths = instances(CONFIGS[name].vocab_size)
    expected, counts = slow_scores(folder, tokens, lengths, rule)
    mask = counted(tokens, lengths, SEPARATOR, rule)  # type: ignore[arg-type]
    found = scorer_of(folder).score(tokens, mask)
    assert found.dtype == np.float64
    assert mask.sum(axis=1).tolist() == counts
    worst = np.max(np.abs(found - np.array(expected)) / np.array(counts))
    assert worst < 1e-5
    uniform = -math.log(CONFIGS[name].vocab_size)
    assert np.max(np.abs(np.array(expected) / counts - uniform)) > 0.1, "this would compare uniform guesses"


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_scores_are_the_same_when_the_vocabulary_is_larger_than_a_chunk_of_logits(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(name)
    tokens, lengths = instances(CONFIGS[name].vocab_size)
    expected, counts = slow_scores(folder, tokens, lengths, "all")
    small_chunks(monkeypatch)
    assert (len(tokens) * T) % 7 == 0
    assert (2 * T + 1) % 7 != 0
    for rows in (slice(None), slice(0, 1), slice(1, 4)):
        found = scorer_of(folder).score(tokens[rows], counted(tokens[rows], lengths[rows], SEPARATOR, "all"))
        assert np.max(np.abs(found - np.array(expected)[rows]) / np.array(counts)[rows]) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mamba"])
def test_what_else_is_in_the_batch_does_not_move_a_float32_score(name: str, folder_of: Callable[[str], Path]) -> None:
    tokens, lengths = instances(CONFIGS[name].vocab_size)
    mask = counted(tokens, lengths, SEPARATOR, "all")
    scorer = scorer_of(folder_of(name))
    together = scorer.score(tokens, mask)
    alone = np.concatenate([scorer.score(tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))])
    assert np.max(np.abs(together - alone) / mask.sum(axis=1)) < 1e-5


def test_tokens_after_the_length_of_an_instance_do_not_move_its_score(folder_of: Callable[[str], Path]) -> None:
    tokens, lengths = instances(CONFIGS["qwen2"].vocab_size)
    mask = counted(tokens, lengths, SEPARATOR, "all")
    other = tokens.copy()
    for row, length in enumerate(lengths):
        other[row, length:] = 3
    scorer = scorer_of(folder_of("qwen2"))
    np.testing.assert_allclose(scorer.score(other, mask), scorer.score(tokens, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_scores_are_finite_and_within_a_twentieth_of_a_nat_per_token(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    tokens, lengths = instances(CONFIGS[name].vocab_size)
    expected, counts = slow_scores(folder, tokens, lengths, "all")
    found = scorer_of(folder, "bfloat16").score(tokens, counted(tokens, lengths, SEPARATOR, "all"))
    assert np.isfinite(found).all()
    assert np.max(np.abs(found - np.array(expected)) / np.array(counts)) < 0.05  # measured: up to 0.018


@pytest.mark.parametrize("vocab_size", [300, 20_000])
def test_the_head_accumulates_bfloat16_products_in_float32(vocab_size: int) -> None:
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(37, 64, generator=draw).bfloat16()
    weight = torch.randn(vocab_size, 64, generator=draw).bfloat16()
    bias = torch.randn(vocab_size, generator=draw).bfloat16()
    targets = torch.randint(0, vocab_size, (37,), generator=draw)
    exact = torch.log_softmax(hidden.double() @ weight.double().T + bias.double(), dim=1)
    found = token_logp(hidden, weight, bias, targets)
    assert found.dtype == torch.float32
    assert (found - exact[torch.arange(37), targets]).abs().max() < 1e-4


def test_the_bfloat16_scorer_loses_next_to_nothing_in_its_head(folder_of: Callable[[str], Path]) -> None:
    tokens, lengths = instances(CONFIGS["llama"].vocab_size)
    mask = counted(tokens, lengths, SEPARATOR, "all")
    scorer = scorer_of(folder_of("llama"), "bfloat16")
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        hidden = scorer.model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        assert hidden.dtype == torch.bfloat16
        logp = torch.log_softmax(hidden.double() @ scorer.model.lm_head.weight.double().T, dim=-1)
    exact = np.zeros(len(tokens))
    for row in range(len(tokens)):
        for position in range(T):
            if mask[row, position]:
                exact[row] += float(logp[row, position, ids[row, position + 1]])
    # products come back in bfloat16 on CPU: each log p is right to its 256th part, to either side
    assert np.max(np.abs(scorer.score(tokens, mask) / exact - 1)) < 2**-12


def test_scoring_leaves_the_weights_of_the_model_as_they_were(folder_of: Callable[[str], Path]) -> None:
    scorer = scorer_of(folder_of("gpt2"), "bfloat16")
    before = {name: value.clone() for name, value in scorer.model.state_dict().items()}
    tokens, lengths = instances(300)
    scorer.score(tokens, counted(tokens, lengths, SEPARATOR, "all"))
    after = scorer.model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_the_scorer_states_its_vocabulary_with_padding(folder_of: Callable[[str], Path]) -> None:
    assert scorer_of(folder_of("llama")).vocab_size == 1009
