"""Continuations against the slow and obvious: every token from a forward pass over all that is before it, no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from miniplm.errors import ModelError
from miniplm.models.continuation import continuations
from miniplm.models.load import new_model

VOCABULARY = 50  # of 64 embeddings
B, P, G = 3, 9, 12
ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": ATTENTION,
    "llama": ATTENTION,
    "gpt_neox": {"intermediate_size": 64, "num_attention_heads": 4},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 4},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


def tiny(family: str = "qwen2", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A new model whose distributions are far from even, so that what is before a token matters."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    model = new_model({"model_type": family, **size, **FAMILIES[family], **config}, seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight *= 4
    return model.eval()


def prompts_and_numbers(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(0, VOCABULARY, (B, P)), torch.rand(B, G)


def distribution(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    """Of the next token, over the vocabulary; in float64 from float32 logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCABULARY].double()
    if temperature == 0:
        return [float(i == int(logits.argmax())) for i in range(VOCABULARY)]
    weights = (logits / temperature).exp()
    return [float(share) for share in weights / weights.sum()]


def token_at(shares: list[float], number: float) -> int:
    """The first id at which the summed shares exceed the number."""
    total = 0.0
    for token, share in enumerate(shares):
        total += share
        if total > number * sum(shares):
            return token
    raise AssertionError(number)


def slowly(prompts: Tensor, uniform: Tensor, next_shares: Callable[[list[int]], list[float]]) -> list[list[int]]:
    """Every row by itself, every token from the distribution after all tokens before it."""
    rows = []
    for prompt, numbers in zip(prompts.tolist(), uniform.tolist(), strict=True):
        ids = list(prompt)
        for number in numbers:
            ids.append(token_at(next_shares(ids), number))
        rows.append(ids[len(prompt) :])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_model_without_a_cache(family: str) -> None:
    model = tiny(family)
    prompts, uniform = prompts_and_numbers()
    written = continuations(model, prompts, uniform, vocabulary=VOCABULARY)
    assert written.dtype == torch.int64
    assert written.tolist() == slowly(prompts, uniform, lambda ids: distribution(model, ids))
    alone = [
        continuations(model, prompts[row : row + 1], uniform[row : row + 1], vocabulary=VOCABULARY) for row in (0,)
    ]
    assert alone[0].tolist() == written[:1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_token_is_enough(family: str) -> None:
    model = tiny(family)
    prompts, uniform = prompts_and_numbers()
    written = continuations(model, prompts[:, :1], uniform, vocabulary=VOCABULARY)
    assert written.tolist() == slowly(prompts[:, :1], uniform, lambda ids: distribution(model, ids))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_logits_are_divided_by_the_temperature(temperature: float) -> None:
    model = tiny()
    prompts, uniform = prompts_and_numbers()
    written = continuations(model, prompts, uniform, vocabulary=VOCABULARY, temperature=temperature)
    assert written.tolist() == slowly(prompts, uniform, lambda ids: distribution(model, ids, temperature))


def test_at_temperature_0_the_numbers_do_not_matter() -> None:
    model = tiny()
    prompts, uniform = prompts_and_numbers()
    greedy = continuations(model, prompts, uniform, vocabulary=VOCABULARY, temperature=0)
    assert greedy.tolist() == continuations(model, prompts, 1 - uniform, vocabulary=VOCABULARY, temperature=0).tolist()
    assert greedy.tolist() != continuations(model, prompts, uniform, vocabulary=VOCABULARY).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("other", ["qwen2", "mamba"])
def test_two_models_are_mixed_as_their_dense_distributions_are(other: str, temperature: float) -> None:
    q, p, mix = tiny(), tiny(other, seed=1, vocab_size=70), 0.3
    prompts, uniform = prompts_and_numbers()

    def mixture(ids: list[int]) -> list[float]:
        pairs = zip(distribution(q, ids, temperature), distribution(p, ids, temperature), strict=True)
        return [(1 - mix) * own + mix * others for own, others in pairs]

    how = {"vocabulary": VOCABULARY, "temperature": temperature}
    written = continuations(q, prompts, uniform, mixed_with=p, mix=mix, **how).tolist()  # type: ignore[arg-type]
    assert written == slowly(prompts, uniform, mixture)
    assert written != continuations(q, prompts, uniform, **how).tolist()  # type: ignore[arg-type]


def nucleus(shares: list[float], top_p: float) -> list[float]:
    """The likeliest, one after the other, until they have `top_p` together."""
    kept, total = [0.0] * len(shares), 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if total >= top_p:
            break
        kept[token] = shares[token]
        total += shares[token]
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95])
def test_top_p_leaves_the_likeliest_tokens(top_p: float) -> None:
    model = tiny()
    prompts, uniform = prompts_and_numbers()
    written = continuations(model, prompts, uniform, vocabulary=VOCABULARY, top_p=top_p).tolist()
    assert written == slowly(prompts, uniform, lambda ids: nucleus(distribution(model, ids), top_p))
    assert written != continuations(model, prompts, uniform, vocabulary=VOCABULARY).tolist()


def test_sampled_tokens_are_as_frequent_as_they_are_likely() -> None:
    model, draws = tiny(), 20_000
    prompt = torch.arange(P)[None, :]
    torch.manual_seed(1)
    found = continuations(model, prompt.expand(draws, P), torch.rand(draws, 1), vocabulary=VOCABULARY)
    expected = torch.tensor(distribution(model, prompt[0].tolist())) * draws
    counted = torch.bincount(found[:, 0], minlength=VOCABULARY)
    common = expected >= 5
    assert common.sum() > 10
    chi_square = ((counted - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations above what is expected
    even = torch.full_like(expected, draws / VOCABULARY)
    assert ((even - expected)[common] ** 2 / expected[common]).sum() > 10 * degrees  # the test can tell them apart


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_padding_and_forbidden_tokens_are_never_sampled_not_even_at_the_ends(number: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCABULARY:] *= 1000  # what pads the logits is the likeliest of all
    forbidden = torch.zeros(VOCABULARY, dtype=torch.bool)
    forbidden[[0, 1, VOCABULARY - 1]] = True
    prompts, _ = prompts_and_numbers()
    uniform = torch.full((B, G), number)
    for temperature in (0.0, 1.0, 30.0):
        written = continuations(model, prompts, uniform, vocabulary=VOCABULARY, temperature=temperature)
        assert int(written.max()) < VOCABULARY
        how = {"temperature": temperature, "forbidden": forbidden}
        written = continuations(model, prompts, uniform, vocabulary=VOCABULARY, **how)  # type: ignore[arg-type]
        assert not forbidden[written].any()
        if temperature == 30:  # all are about alike, so the ends are the ends of what may be sampled
            assert set(written.flatten().tolist()) == {2 if number == 0 else VOCABULARY - 2}


def test_forbidden_tokens_leave_their_share_to_all_others() -> None:
    model = tiny()
    prompts, uniform = prompts_and_numbers()
    forbidden = torch.arange(VOCABULARY) % 3 == 0

    def without(ids: list[int]) -> list[float]:
        return [0.0 if token % 3 == 0 else share for token, share in enumerate(distribution(model, ids))]

    written = continuations(model, prompts, uniform, vocabulary=VOCABULARY, forbidden=forbidden)
    assert written.tolist() == slowly(prompts, uniform, without)


def test_a_training_model_with_dropout_checkpointing_and_a_wrapped_forward_writes_alike_and_goes_on_training() -> None:
    model = tiny(attention_dropout=0.5)
    prompts, uniform = prompts_and_numbers()
    expected = continuations(model, prompts, uniform, vocabulary=VOCABULARY)
    model.train()
    model.activation_checkpointing_enable()
    forward, calls = model.forward, []

    def wrapped(*arguments: Any, **named: Any) -> Any:  # its signature says nothing, as that of accelerate's wrapper
        calls.append(named["input_ids"].shape[1])
        return forward(*arguments, **named)

    model.forward = wrapped
    before = torch.get_rng_state()
    found = continuations(model, prompts, uniform, vocabulary=VOCABULARY)
    assert found.tolist() == expected.tolist()
    assert calls == [P] + [1] * (G - 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not found.requires_grad


def test_modes_are_restored_after_an_error_too() -> None:
    q, p = tiny().train(), tiny(seed=1)
    with torch.no_grad():
        p.get_output_embeddings().weight[3] = torch.nan
    prompts, uniform = prompts_and_numbers()
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="no numbers"):
            continuations(q, prompts, uniform, vocabulary=VOCABULARY, mixed_with=p, mix=0.1, temperature=temperature)
    assert q.training
    assert not p.training


def test_only_the_last_position_of_the_prompts_is_given_logits() -> None:
    model = tiny()
    shapes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, given, logits: shapes.append(tuple(logits.shape)))
    prompts, uniform = prompts_and_numbers()
    continuations(model, prompts, uniform, vocabulary=VOCABULARY)
    assert shapes == [(B, 1, 64)] * G


def test_what_is_trained_in_the_same_autocast_has_gradients() -> None:
    # autocast keeps casts of weights; torch before 2.11 kept those without a gradient too (pytorch/pytorch#112583)
    model = tiny().train()
    prompts, uniform = prompts_and_numbers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = continuations(model, prompts, uniform, vocabulary=VOCABULARY)
        loss = model(input_ids=written, labels=written).loss
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_compiled_backbone_is_not_compiled_again_for_caches() -> None:
    model = tiny()
    prompts, uniform = prompts_and_numbers()
    expected = continuations(model, prompts, uniform, vocabulary=VOCABULARY)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.base_model.compile(backend=backend)
    assert continuations(model, prompts, uniform, vocabulary=VOCABULARY).tolist() == expected.tolist()
    assert graphs == []
    model.base_model(input_ids=prompts, use_cache=False)
    assert graphs


def test_a_model_that_keeps_no_cache_is_refused() -> None:
    model = tiny()
    forward = model.forward
    model.forward = lambda **named: forward(**{**named, "use_cache": False})
    prompts, uniform = prompts_and_numbers()
    with pytest.raises(ModelError, match="no cache"):
        continuations(model, prompts, uniform, vocabulary=VOCABULARY)


def test_nothing_to_write_asks_no_model() -> None:
    prompts, uniform = prompts_and_numbers()
    assert continuations(nn.Identity(), prompts, uniform[:, :0], vocabulary=VOCABULARY).shape == (B, 0)
