"""MiniLLM against its formulas in loops, and against the exact gradient by going through all continuations."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedModel, Qwen2Config

from miniplm.errors import RecipeError
from miniplm.models import head
from miniplm.models.losses import cross_entropy
from miniplm.recipe import MiniLLMSettings
from miniplm.training.data import Collator
from miniplm.training.minillm import MiniLLM, advantages, importance, shares_of, uniform_numbers
from miniplm.training.objectives import Batch

SEPARATOR = 0
EXACT = {"teacher_mix": 0.0, "next_token": 0.0, "reward_clip": 1e9, "length_normalised": False}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


def student_of(rows: int, seed: int = 0) -> PreTrainedModel:
    """A Qwen2 whose logits differ by some nats; `rows` of its head."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def teacher_of(rows: int, seed: int = 1) -> PreTrainedModel:
    """A Phi, wider than the student and with a bias in its head, which is not 0."""
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=rows, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def minillm(teacher: PreTrainedModel, vocabulary: int, length: int, seed: int = 5, **settings: Any) -> MiniLLM:
    return MiniLLM(teacher, MiniLLMSettings(**settings), vocabulary=vocabulary, sequence_length=length, seed=seed)


def batch_of(instances: int, length: int, vocabulary: int, first: int = 0) -> Batch:
    """Whole instances, those that are seen from the `first` on."""
    ids = np.random.default_rng(3).integers(1, vocabulary, (first + instances, length + 1))
    return Collator(SEPARATOR, "all")([(ids[i], length + 1, i) for i in range(first, first + instances)])


def ragged_batch(length: int, prompt: int, vocabulary: int) -> Batch:
    """Whole, with separators; ended within the prompt; ended just with it; ended after it."""
    ids = np.random.default_rng(4).integers(1, vocabulary, (4, length + 1))
    ids[0, 1] = ids[0, prompt] = ids[3, 0] = SEPARATOR
    lengths = [length + 1, prompt - 2, prompt, length - 1]
    for row, there in zip(ids, lengths, strict=True):
        row[there:] = SEPARATOR
    return Collator(SEPARATOR, "skip_after_separator")([(ids[i], lengths[i], i) for i in range(4)])


def gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= tolerance * max(float(largest), 1e-2), name


def dense_logp(model: PreTrainedModel, ids: Tensor, vocabulary: int, temperature: float = 1.0) -> Tensor:
    """Every log-probability at once, `[B, T, vocabulary]`."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[..., :vocabulary]
    return torch.log_softmax(logits / temperature, dim=-1)


def written_out(objective: MiniLLM, model: PreTrainedModel, ids: Tensor, weights: Tensor) -> Tensor:
    """A loss with MiniLLM's gradient, in loops and float64, for weights as a batch of the ragged kind has them."""
    settings, prompt, vocabulary = objective.settings, objective.prompt_tokens, objective.vocabulary
    model, teacher = model.double(), copy.deepcopy(objective.teacher).double()
    everything = torch.log_softmax(model(input_ids=ids[:, :-1]).logits, dim=-1)
    logq = dense_logp(model, ids, vocabulary)
    warm_q = dense_logp(model, ids, vocabulary, settings.temperature).detach()
    with torch.no_grad():
        logp = dense_logp(teacher, ids, vocabulary)
        warm_p = dense_logp(teacher, ids, vocabulary, settings.temperature)
    mix, length = settings.teacher_mix, ids.shape[1] - 1
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(ids)):
        own = torch.zeros((), dtype=torch.float64)
        counted = [t for t in range(prompt - 1) if weights[row, t] > 0]
        for t in counted:
            own = own - settings.next_token * everything[row, t, ids[row, t + 1]] / len(counted)
        if any(weights[row, t] > 0 for t in range(prompt - 2, length)):
            places = range(prompt - 1, length)
            tokens = [int(ids[row, t + 1]) for t in places]
            rewards = [
                float((logp - logq.detach())[row, t, y].clamp(-settings.reward_clip, settings.reward_clip))
                for t, y in zip(places, tokens, strict=True)
            ]
            for n, (t, y) in enumerate(zip(places, tokens, strict=True)):
                single = (logq[row, t].exp() * (logq[row, t] - logp[row, t])).sum()
                after, before = rewards[n + 1 :], rewards[:n]
                advantage = 0.0
                if after:
                    advantage = sum(after) / len(after) - (sum(before) / len(before) if before else 0.0)
                mixed = (1 - mix) * warm_q[row, t, y].exp() + mix * warm_p[row, t, y].exp()
                ratio = float(logq[row, t, y].detach().exp() / mixed)
                own = own + (single - ratio * advantage * logq[row, t, y]) / len(tokens)
        total = total + own / len(ids)
    return total


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"teacher_mix": 0.0, "temperature": 1.4}])
def test_the_gradient_is_that_of_the_formula_written_out(settings: dict[str, Any]) -> None:
    vocabulary, length, prompt = 11, 10, 5
    objective = minillm(
        teacher_of(13), vocabulary, length, prompt_tokens=prompt, next_token=0.7, reward_clip=1.5, **settings
    )
    model = student_of(16)
    batch = ragged_batch(length, prompt, vocabulary)
    assert batch["weights"] is not None
    ids = objective.written(model, batch)
    assert torch.equal(ids[:, :prompt], batch["input_ids"][:, :prompt])
    assert ids[:, prompt:].max() < vocabulary
    found = gradients(objective.loss(model, batch)[0], model)
    reference = student_of(16)
    expected = gradients(written_out(objective, reference, ids, batch["weights"]), reference)
    assert_same(found, expected)


def all_continuations(prompt: Tensor, vocabulary: int, count: int) -> Tensor:
    endings = torch.tensor(list(itertools.product(range(vocabulary), repeat=count)))
    return torch.cat([prompt.expand(len(endings), -1), endings], dim=1)


def sequence_logp(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities of the continuations, `[B]`."""
    logp = torch.log_softmax(model(input_ids=ids[:, :-1]).logits, dim=-1).gather(2, ids[:, 1:, None])
    return logp[:, prompt - 1 :, 0].sum(dim=1)


def exact_gradients(model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, prompt: int) -> dict[str, Tensor]:
    """Of KL(q || p) over whole continuations, per token, from its definition in float64."""
    model, teacher = model.double(), copy.deepcopy(teacher).double()
    logq, logp = sequence_logp(model, ids, prompt), sequence_logp(teacher, ids, prompt).detach()
    assert float(logq.detach().exp().sum()) == pytest.approx(1)
    return gradients((logq.exp() * (logq - logp)).sum() / (ids.shape[1] - prompt), model)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(("vocabulary", "count"), [(5, 2), (4, 4)])
def test_the_expected_gradient_is_that_of_the_reverse_kl_of_whole_continuations(
    vocabulary: int, count: int, baseline: bool
) -> None:
    prompt = 3
    ids = all_continuations(torch.tensor([[1, 3, 2]]), vocabulary, count)
    teacher, model = teacher_of(vocabulary), student_of(vocabulary)
    objective = minillm(teacher, vocabulary, ids.shape[1] - 1, prompt_tokens=prompt, baseline=baseline, **EXACT)
    with torch.no_grad():
        chances = sequence_logp(model, ids, prompt).exp()
    weights = (chances[:, None] / (ids.shape[1] - 1)).expand(-1, ids.shape[1] - 1)  # the mean is the expectation
    found = gradients(objective.judge(model, ids, weights)[0], model)
    assert_same(found, exact_gradients(student_of(vocabulary), teacher, ids, prompt))


def test_without_the_long_term_it_would_not_be() -> None:
    """The test above sees what it is there to see."""
    vocabulary, prompt = 5, 3
    ids = all_continuations(torch.tensor([[1, 3, 2]]), vocabulary, 2)
    teacher, model = teacher_of(vocabulary), student_of(vocabulary)
    objective = minillm(teacher, vocabulary, 4, prompt_tokens=prompt, **{**EXACT, "reward_clip": 1e-9})
    with torch.no_grad():
        weights = (sequence_logp(model, ids, prompt).exp()[:, None] / 4).expand(-1, 4)
    found = gradients(objective.judge(model, ids, weights)[0], model)
    with pytest.raises(AssertionError):
        assert_same(found, exact_gradients(student_of(vocabulary), teacher, ids, prompt), tolerance=0.05)


def test_what_is_sampled_is_student_and_teacher_mixed() -> None:
    """Frequencies of 4,000 first tokens against (1 - a) q + a p."""
    vocabulary, prompt = 6, 3
    teacher, model = teacher_of(8), student_of(7)
    objective = minillm(teacher, vocabulary, prompt, prompt_tokens=prompt, teacher_mix=0.6)
    ids = torch.tensor([[1, 3, 2]]).expand(4000, -1)
    ids = objective.written(model, Batch(input_ids=ids, targets=ids, weights=None, positions=torch.arange(4000)))
    with torch.no_grad():
        q, p = (dense_logp(m, ids[:1], vocabulary)[0, -1].exp() for m in (model, teacher))
    found = torch.bincount(ids[:, -1], minlength=vocabulary) / len(ids)
    assert (p - q).abs().max() > 0.1
    assert (found - (0.4 * q + 0.6 * p)).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("mix", [0.0, 0.2, 0.9])
def test_importance_weights_are_one_on_average_of_what_is_sampled_from(mix: float, temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, theirs = torch.randn(2, 50, generator=draw) * 3
    q, s, p = (torch.log_softmax(x, 0) for x in (logits, logits / temperature, theirs / temperature))
    weights = importance(q, s, p, mix)
    mixed = (1 - mix) * s.exp() + mix * p.exp()
    torch.testing.assert_close(weights, q.exp() / mixed)
    assert float((weights * mixed).sum()) == pytest.approx(1, abs=1e-5)
    if temperature == 1:
        assert weights.max() <= 1 / (1 - mix) + 1e-5


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [-1.0, 0.0, 0.0, 5.0]])
    sums = advantages(rewards, length_normalised=False, baseline=False)
    assert sums.tolist() == [[14.0, 12.0, 8.0, 0.0], [5.0, 5.0, 5.0, 0.0]]
    means = advantages(rewards, length_normalised=True, baseline=False)
    torch.testing.assert_close(means, sums / torch.tensor([3.0, 2.0, 1.0, 1.0]))
    less = advantages(rewards, length_normalised=True, baseline=True)
    torch.testing.assert_close(less, torch.tensor([[14 / 3, 6 - 1, 8 - 1.5, 0.0], [5 / 3, 2.5 + 1, 5 + 0.5, 0.0]]))
    whole = advantages(rewards, length_normalised=False, baseline=True)
    torch.testing.assert_close(whole, less * torch.tensor([3.0, 2.0, 1.0, 1.0]))


def test_shares_of_whole_instances_are_even() -> None:
    shares = shares_of(None, torch.zeros(2, 9, dtype=torch.int64), 4)
    torch.testing.assert_close(shares.prompt, torch.full((2, 3), 1 / 6))
    torch.testing.assert_close(shares.continuation, torch.full((2, 5), 1 / 10))


def test_an_instance_that_ends_within_its_prompt_is_not_continued_and_keeps_its_weight_on_the_prompt() -> None:
    length, prompt = 8, 5
    batch = ragged_batch(length, prompt, 11)
    shares = shares_of(batch["weights"], torch.zeros(4, length + 1, dtype=torch.int64), prompt)
    torch.testing.assert_close(shares.prompt.sum(dim=1), torch.full((4,), 0.25))
    torch.testing.assert_close(shares.continuation.sum(dim=1), torch.tensor([0.25, 0.0, 0.25, 0.25]))
    third, half, quarter = 1 / 12, 1 / 8, 1 / 16
    expected = [[third, 0, third, third], [half, half, 0, 0], [quarter] * 4, [0, third, third, third]]
    torch.testing.assert_close(shares.prompt, torch.tensor(expected))


def test_an_instance_in_which_nothing_counts_weighs_nothing() -> None:
    weights = torch.tensor([[0.0] * 6, [1 / 12] * 6])
    shares = shares_of(weights, torch.zeros(2, 7, dtype=torch.int64), 3)
    assert shares.prompt.tolist()[0] == [0.0, 0.0]
    assert shares.continuation.tolist()[0] == [0.0] * 4
    assert float(shares.prompt.sum()) == pytest.approx(0.5)


def test_weights_below_zero_hold_in_the_cross_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=draw), torch.randn(30, 8, generator=draw)
    targets, weights = torch.randint(0, 30, (40,), generator=draw), torch.randn(40, generator=draw)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    cross_entropy(*leaves, None, targets, weights).backward()
    dense = [t.double().requires_grad_() for t in (hidden, weight)]
    logp = torch.log_softmax(dense[0] @ dense[1].T, dim=1)[torch.arange(40), targets]
    (-(logp * weights).sum()).backward()
    for found, expected in zip(leaves, dense, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


def test_the_value_is_cross_entropy_and_reverse_kl_alone_with_gradients_or_without() -> None:
    objective = minillm(teacher_of(13), 11, 10, next_token=0.5)
    model, batch = student_of(16), batch_of(3, 10, 11)
    loss, metrics = objective.loss(model, batch)
    assert set(metrics) == {"cross_entropy", "reverse_kl", "reward", "entropy"}
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(loss.detach(), 0.5 * metrics["cross_entropy"] + metrics["reverse_kl"])
    with torch.no_grad():
        torch.testing.assert_close(objective.loss(model, batch)[0], loss.detach())


def test_metrics_are_means_of_what_was_sampled() -> None:
    objective = minillm(teacher_of(13), 11, 10, teacher_mix=0.3)
    model, batch = student_of(16), batch_of(3, 10, 11)
    ids, prompt = objective.written(model, batch), objective.prompt_tokens
    with torch.no_grad():
        _, metrics = objective.judge(model, ids, None)
        q, p = (dense_logp(m, ids, 11)[:, prompt - 1 :] for m in (model, objective.teacher))
    logq, logp = (x.gather(2, ids[:, prompt:, None])[..., 0] for x in (q, p))
    torch.testing.assert_close(metrics["reward"], (logp - logq).mean())
    torch.testing.assert_close(metrics["reverse_kl"], (q.exp() * (q - p)).sum(dim=2).mean())
    ratio = logq.exp() / (0.7 * logq.exp() + 0.3 * logp.exp())
    torch.testing.assert_close(metrics["entropy"], -(ratio * logq).mean())


def part_of(batch: Batch, rows: slice) -> Batch:
    """A micro-batch as the collator makes it: its weights sum to 1 again."""
    weights = batch["weights"]
    share = len(batch["positions"]) / len(batch["positions"][rows])
    return Batch(
        input_ids=batch["input_ids"][rows],
        targets=batch["targets"][rows],
        weights=None if weights is None else weights[rows] * share,
        positions=batch["positions"][rows],
    )


@pytest.mark.parametrize("kind", ["whole", "ragged"])
def test_a_batch_is_the_mean_of_its_micro_batches(kind: str) -> None:
    objective = minillm(teacher_of(13), 11, 10, prompt_tokens=5)
    batch = batch_of(4, 10, 11) if kind == "whole" else ragged_batch(10, 5, 11)
    model = student_of(16)
    whole = gradients(objective.loss(model, batch)[0], model)
    halves = [objective.loss(model, part_of(batch, rows))[0] for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, objective.loss(model, batch)[0])
    assert_same(gradients((halves[0] + halves[1]) / 2, model), whole)


def test_what_is_sampled_depends_on_seed_and_position_alone() -> None:
    model, teacher = student_of(16), teacher_of(13)
    batch = batch_of(5, 10, 11)
    all_rows = minillm(teacher, 11, 10).written(model, batch)
    for number in (4, 0, 2):
        alone = minillm(teacher, 11, 10).written(model, part_of(batch, slice(number, number + 1)))
        assert torch.equal(alone[0], all_rows[number])
    other_seed = minillm(teacher, 11, 10, seed=6).written(model, batch)
    assert not torch.equal(other_seed, all_rows)
    later = Batch(**{**batch, "positions": batch["positions"] + 5})  # type: ignore[typeddict-item]
    assert not torch.equal(minillm(teacher, 11, 10).written(model, later), all_rows)


def test_random_numbers_are_apart_for_seeds_positions_and_other_draws() -> None:
    rows = uniform_numbers(7, 0, [0, 1, 2**33], 50)
    assert rows.shape == (3, 50)
    assert rows.dtype == np.float32
    assert ((rows >= 0) & (rows < 1)).all()
    others = [
        *uniform_numbers(7, 1, [0, 1], 50),
        np.random.Generator(np.random.Philox(key=[0, 1])).random(50, np.float32),
    ]
    assert len(np.unique(np.round([*rows, *others], 6)[:, :4], axis=0)) == 6
    np.testing.assert_array_equal(uniform_numbers(7, 0, [2**33], 20)[0], rows[2, :20])


def test_training_with_it_brings_the_student_nearer_to_the_teacher() -> None:
    vocabulary, length = 11, 16
    teacher, model = teacher_of(13), student_of(16)
    objective = minillm(teacher, vocabulary, length, prompt_tokens=4, next_token=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    fixed = batch_of(16, length, vocabulary, first=10_000)

    def away() -> float:
        with torch.no_grad():
            return float(objective.loss(model, fixed)[1]["reverse_kl"])

    before = away()
    for step in range(30):
        loss, _ = objective.loss(model, batch_of(8, length, vocabulary, first=8 * step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert away() < before / 2


def test_under_autocast_everything_learns_and_the_loss_is_near() -> None:
    teacher, model = teacher_of(13), student_of(16)
    batch = batch_of(4, 10, 11)
    exact = minillm(copy.deepcopy(teacher), 11, 10)
    ids = exact.written(model, batch)
    expected = float(exact.judge(model, ids, None)[0].detach())
    objective = minillm(teacher.bfloat16(), 11, 10)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = objective.judge(model, ids, None)
        whole, _ = objective.loss(model, batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(expected, rel=0.05)
    assert all(torch.isfinite(value) for value in metrics.values())
    found = gradients(whole, model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_the_teacher_judges_in_its_own_dtype() -> None:
    objective = minillm(teacher_of(13), 11, 10)
    ids = torch.randint(0, 11, (2, 11), generator=torch.Generator().manual_seed(0))
    found: list[torch.dtype] = []
    for module in objective.teacher.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _given, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        objective.judge(student_of(16), ids, None)
    assert set(found) == {torch.float32}


def test_the_teacher_stays_as_it_is_and_the_student_goes_on_training() -> None:
    teacher, model = teacher_of(13).train(), student_of(16).train()
    before = copy.deepcopy(teacher.state_dict())
    objective = minillm(teacher, 11, 10)
    objective.loss(model, batch_of(2, 10, 11))[0].backward()
    assert model.training
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest piece of memory had that any operation made; views take none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        ]
        self.elements = max([self.elements, *made])
        return result


def test_no_tensor_is_as_large_as_the_logits_of_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(head, "_SMALLEST_CHUNK_ROWS", 8)
    monkeypatch.setattr(head, "_BLOCK", (8, 64))
    instances, length, prompt, vocabulary = 8, 32, 8, 1000
    objective = minillm(teacher_of(1010), vocabulary, length, prompt_tokens=prompt)
    model = student_of(1020)
    with Largest() as seen:
        objective.loss(model, batch_of(instances, length, vocabulary))[0].backward()
    assert seen.elements < instances * (length + 1 - prompt) * vocabulary / 3
    assert seen.elements >= 8 * vocabulary  # a chunk, or a head: the counting works


def test_the_prompt_is_three_quarters_of_an_instance() -> None:
    assert minillm(teacher_of(13), 11, 1024).prompt_tokens == 768
    assert minillm(teacher_of(13), 11, 1024, prompt_tokens=1024).prompt_tokens == 1024


@pytest.mark.parametrize(("length", "prompt"), [(16, 17), (16, 1), (2, None)])
def test_a_prompt_that_leaves_nothing_to_predict_or_to_write_is_refused(length: int, prompt: int | None) -> None:
    with pytest.raises(RecipeError, match=rf"2 to {length}, which is sequence_length"):
        minillm(teacher_of(13), 11, length, prompt_tokens=prompt)
