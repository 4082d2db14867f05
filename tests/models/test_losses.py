"""The chunked losses against dense float64 autograd, by hand, and against memory; cross entropy alone: test_head.py."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miniplm.errors import ModelError
from miniplm.models import head
from miniplm.models import losses as module
from miniplm.models.losses import cross_entropy, distillation, reverse_kl

Given = dict[str, Tensor]
STUDENT = ("hidden", "weight", "bias")
TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")
VOCABULARY, V, U = 197, 203, 211  # the tokenizer's, and two heads padded to different sizes


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


def problem(rows: int = 29, v: int = V, u: int = U, vocabulary: int = VOCABULARY, loud: float = 0.5) -> Given:
    """Hidden states and heads of both, targets below the vocabulary, weights that sum to 1, some of them 0."""
    draw = torch.Generator().manual_seed(3)
    weights = torch.rand(rows, generator=draw) * (torch.rand(rows, generator=draw) > 0.3)
    return {
        "hidden": torch.randn(rows, 16, generator=draw),
        "weight": torch.randn(v, 16, generator=draw) * loud,
        "bias": torch.randn(v, generator=draw),
        "teacher_hidden": torch.randn(rows, 24, generator=draw),
        "teacher_weight": torch.randn(u, 24, generator=draw) * loud,
        "teacher_bias": torch.randn(u, generator=draw),
        "targets": torch.randint(0, vocabulary, (rows,), generator=draw),
        "weights": weights / weights.sum(),
    }


def logits_of(given: Given, who: str = "") -> Tensor:
    logits = given[f"{who}hidden"] @ given[f"{who}weight"].T
    return logits + given[f"{who}bias"] if f"{who}bias" in given else logits


def mean_of(each: Tensor, given: Given) -> Tensor:
    return (each * given["weights"]).sum() if "weights" in given else each.mean()


def dense_distillation(
    given: Given, vocabulary: int | None, share: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As its definition says, all logits at once: p over the vocabulary, q over all of the student's logits."""
    logits = logits_of(given)
    p = torch.softmax(logits_of(given, "teacher_")[:, :vocabulary] / temperature, dim=1)
    logq = torch.log_softmax(logits / temperature, dim=1)[:, :vocabulary]
    ce = mean_of(nn.functional.cross_entropy(logits, given["targets"], reduction="none"), given)
    term = mean_of(-(p * logq).sum(1), given) * temperature**2
    return (1 - share) * ce + share * term, ce, term


def dense_reverse_kl(given: Given, vocabulary: int | None) -> Tensor:
    logq = torch.log_softmax(logits_of(given)[:, :vocabulary], dim=1)
    logp = torch.log_softmax(logits_of(given, "teacher_")[:, :vocabulary], dim=1)
    return mean_of((logq.exp() * (logq - logp)).sum(1), given)


def ours_distillation(given: Given, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    both = (given.get(name) for name in (*STUDENT, *TEACHER))
    return distillation(*both, given["targets"], given.get("weights"), **settings)  # type: ignore[arg-type, call-arg]


def ours_reverse_kl(given: Given, **settings: Any) -> Tensor:
    both = (given.get(name) for name in (*STUDENT, *TEACHER))
    return reverse_kl(*both, given.get("weights"), **settings)  # type: ignore[arg-type, call-arg]


def without(given: Given, *names: str) -> Given:
    return {name: tensor for name, tensor in given.items() if name not in names}


def to(given: Given, dtype: torch.dtype, names: tuple[str, ...] = (*STUDENT, *TEACHER, "weights")) -> Given:
    return {name: tensor.to(dtype) if name in names else tensor for name, tensor in given.items()}


def with_gradients(
    loss_of: Callable[[Given], Tensor | tuple[Tensor, ...]], given: Given, scale: float = 1.0
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What it returns, and the gradients of `scale` times the first to hidden states, weight and, if any, bias."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in STUDENT if name in given}
    found = loss_of({**given, **leaves})
    found = (found,) if isinstance(found, Tensor) else found
    (found[0] * scale).backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return tuple(value.detach() for value in found), gradients


def small(monkeypatch: pytest.MonkeyPatch, rows: int, strip_rows: int = 3) -> None:
    """Chunks of so many positions, in strips that do not divide them."""
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(head, "_SMALLEST_CHUNK_ROWS", rows)
    monkeypatch.setattr(module, "_STRIP_ELEMENTS", {"cpu": strip_rows * V})


def assert_all_close(found: list[Tensor], exact: list[Tensor]) -> None:
    for gradient, slow in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient.double(), slow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_distillation_and_its_gradients_are_those_of_dense_float64(
    rows: int, share: float, temperature: float, bias: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = without(problem(), *([] if bias else ["bias", "teacher_bias"]), *([] if weighted else ["weights"]))
    expected, exact = with_gradients(
        lambda g: dense_distillation(g, VOCABULARY, share, temperature), to(given, torch.float64)
    )
    small(monkeypatch, rows)
    settings = {"share": share, "temperature": temperature, "vocabulary": VOCABULARY}
    found, gradients = with_gradients(lambda g: ours_distillation(g, **settings), given)
    for value, slow in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.shape == ()
        torch.testing.assert_close(value.double(), slow, rtol=1e-6, atol=1e-6)
    assert len(gradients) == (3 if bias else 2)
    assert_all_close(gradients, exact)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 8, 100])
def test_reverse_kl_and_its_gradients_are_those_of_dense_float64(
    rows: int, bias: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = without(problem(), *([] if bias else ["bias", "teacher_bias"]), *([] if weighted else ["weights"]))
    (expected,), exact = with_gradients(lambda g: dense_reverse_kl(g, VOCABULARY), to(given, torch.float64))
    small(monkeypatch, rows)
    (found,), gradients = with_gradients(lambda g: ours_reverse_kl(g, vocabulary=VOCABULARY), given)
    assert found.dtype == torch.float32
    assert expected > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert_all_close(gradients, exact)


@pytest.mark.parametrize(("v", "u"), [(VOCABULARY, VOCABULARY), (VOCABULARY, U), (V, VOCABULARY), (U, V)])
def test_either_head_may_be_padded_or_none(v: int, u: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(v=v, u=u)
    exact = to(given, torch.float64)
    vocabulary = None if v == u else VOCABULARY
    small(monkeypatch, 8)
    expected, slow = with_gradients(lambda g: dense_distillation(g, VOCABULARY, 0.5, 1.0), exact)
    found, gradients = with_gradients(lambda g: ours_distillation(g, vocabulary=vocabulary), given)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)
    assert_all_close(gradients, slow)
    expected, slow = with_gradients(lambda g: dense_reverse_kl(g, VOCABULARY), exact)
    found, gradients = with_gradients(lambda g: ours_reverse_kl(g, vocabulary=vocabulary), given)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)
    assert_all_close(gradients, slow)


def by_hand(q: float, p: float) -> Given:
    """One position and two tokens, of which the student gives the first the probability q and the teacher p."""
    one = torch.ones(1, 1)
    return {
        "hidden": one, "weight": torch.tensor([[log(q)], [log(1 - q)]]),
        "teacher_hidden": one, "teacher_weight": torch.tensor([[log(p)], [log(1 - p)]]),
        "targets": torch.tensor([1]),
    }  # fmt: skip


def test_two_tokens_by_hand() -> None:
    loss, ce, term = ours_distillation(by_hand(q=0.75, p=0.2), share=0.25)
    assert ce.item() == pytest.approx(-log(0.25), rel=1e-6)
    assert term.item() == pytest.approx(-0.2 * log(0.75) - 0.8 * log(0.25), rel=1e-6)
    assert loss.item() == pytest.approx(0.75 * ce.item() + 0.25 * term.item(), rel=1e-6)
    kl = ours_reverse_kl(by_hand(q=0.75, p=0.2))
    assert kl.item() == pytest.approx(0.75 * log(0.75 / 0.2) + 0.25 * log(0.25 / 0.8), rel=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    given = problem()
    same = given | {f"teacher_{name}": given[name] for name in STUDENT}
    (kl,), by_kl = with_gradients(ours_reverse_kl, same)
    assert abs(kl.item()) < 1e-6
    (loss, _, entropy), by_term = with_gradients(lambda g: ours_distillation(g, share=1.0), same)
    p = torch.softmax(logits_of(given), dim=1)
    torch.testing.assert_close(entropy, mean_of(-(p * p.log()).sum(1), given))
    assert torch.equal(loss, entropy)
    _, by_ce = with_gradients(lambda g: ours_distillation(g, share=0.0), same)
    for small_ones, large in zip((*by_kl, *by_term), (*by_ce, *by_ce), strict=True):
        assert small_ones.abs().max() < 1e-5 * large.abs().max()


def test_cross_entropy_is_what_it_is_without_a_teacher() -> None:
    given = problem()
    names = (*STUDENT, "targets", "weights")
    alone, exact = with_gradients(lambda g: cross_entropy(*(g[name] for name in names)), given)
    for share in (0.0, 0.7):
        _, ce, _ = ours_distillation(given, share=share, vocabulary=VOCABULARY)
        torch.testing.assert_close(ce, alone[0], rtol=1e-6, atol=0)
    found, gradients = with_gradients(lambda g: ours_distillation(g, share=0.0, vocabulary=VOCABULARY), given)
    torch.testing.assert_close(found[0], alone[0], rtol=1e-6, atol=0)
    for gradient, slow in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_both_terms_of_distillation_push_the_students_padding_down(share: float) -> None:
    given = problem()
    _, (_, _, by_bias) = with_gradients(lambda g: ours_distillation(g, share=share, vocabulary=VOCABULARY), given)
    mass = torch.softmax(logits_of(given), dim=1)[:, VOCABULARY:]
    torch.testing.assert_close(by_bias[VOCABULARY:], (mass * given["weights"][:, None]).sum(0), rtol=1e-5, atol=0)
    assert (by_bias[VOCABULARY:] > 0).all()


def test_the_teachers_term_counts_the_mass_that_the_student_wastes_on_padding() -> None:
    given = problem()
    _, _, term = ours_distillation(given, vocabulary=VOCABULARY)
    inside = given | {"weight": given["weight"][:VOCABULARY], "bias": given["bias"][:VOCABULARY]}
    _, _, renormalised = ours_distillation(inside, vocabulary=VOCABULARY)
    mass = torch.softmax(logits_of(given), dim=1)[:, :VOCABULARY].sum(1)
    wasted = mean_of(-mass.log(), given)
    assert wasted > 1e-3
    torch.testing.assert_close(term, renormalised + wasted, rtol=1e-5, atol=0)


def test_reverse_kl_leaves_padding_alone() -> None:
    given = problem()
    (found,), gradients = with_gradients(lambda g: ours_reverse_kl(g, vocabulary=VOCABULARY), given)
    for gradient in gradients[1:]:
        assert (gradient[VOCABULARY:] == 0).all()
        assert (gradient[:VOCABULARY] != 0).any()
    louder = given | {"weight": given["weight"].clone()}
    louder["weight"][VOCABULARY:] = 9.0
    assert torch.equal(ours_reverse_kl(louder, vocabulary=VOCABULARY), found)


def test_the_teachers_padding_does_not_count() -> None:
    given = problem()
    louder = given | {"teacher_weight": given["teacher_weight"].clone()}
    louder["teacher_weight"][VOCABULARY:] = 9.0
    assert ours_distillation(louder, vocabulary=VOCABULARY) == ours_distillation(given, vocabulary=VOCABULARY)
    assert ours_reverse_kl(louder, vocabulary=VOCABULARY) == ours_reverse_kl(given, vocabulary=VOCABULARY)
    louder["teacher_weight"][VOCABULARY - 1] = 9.0
    assert ours_distillation(louder, vocabulary=VOCABULARY) != ours_distillation(given, vocabulary=VOCABULARY)
    assert ours_reverse_kl(louder, vocabulary=VOCABULARY) != ours_reverse_kl(given, vocabulary=VOCABULARY)


@pytest.mark.parametrize("scale", [0.0, 0.125, -3.0])
def test_an_upstream_gradient_scales_all_gradients(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    small(monkeypatch, 8)
    _, once = with_gradients(lambda g: ours_distillation(g, vocabulary=VOCABULARY), given)
    _, scaled = with_gradients(lambda g: ours_distillation(g, vocabulary=VOCABULARY), given, scale)
    for gradient, unit in zip(scaled, once, strict=True):
        torch.testing.assert_close(gradient, unit * scale, rtol=1e-6, atol=0)
    (_, once), (_, scaled) = (
        with_gradients(lambda g: ours_reverse_kl(g, vocabulary=VOCABULARY), given, s) for s in (1.0, scale)
    )
    for gradient, unit in zip(scaled, once, strict=True):
        torch.testing.assert_close(gradient, unit * scale, rtol=1e-6, atol=0)


def test_a_second_backward_pass_gives_the_same_gradients_again() -> None:
    given = problem()
    weight = given["weight"].requires_grad_()
    loss = ours_distillation(given, vocabulary=VOCABULARY)[0]
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_the_loss_alone_has_a_graph_and_only_to_what_asks_for_it() -> None:
    given = problem()
    hidden = given["hidden"].requires_grad_()
    for name in TEACHER:
        given[name].requires_grad_()
    loss, ce, term = ours_distillation(given, vocabulary=VOCABULARY)
    assert loss.requires_grad
    assert not ce.requires_grad
    assert not term.requires_grad
    loss.backward()
    ours_reverse_kl(given, vocabulary=VOCABULARY).backward()
    assert hidden.grad is not None
    assert all(given[name].grad is None for name in (*TEACHER, "weight", "bias"))
    only_teachers = given | {"hidden": hidden.detach()}
    assert not ours_distillation(only_teachers, vocabulary=VOCABULARY)[0].requires_grad


class Operations(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes, of each dtype, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest[leaf.dtype] = max(self.largest.get(leaf.dtype, 0), leaf.numel())
        self.products += "mm" in str(func)
        return out


def test_without_gradients_the_numbers_are_the_same_and_nothing_is_spent_on_gradients() -> None:
    given = problem()
    found, _ = with_gradients(lambda g: ours_distillation(g, vocabulary=VOCABULARY), given)
    (kl,), _ = with_gradients(lambda g: ours_reverse_kl(g, vocabulary=VOCABULARY), given)
    given["weight"].requires_grad_()
    with torch.no_grad(), Operations() as operations:
        assert ours_distillation(given, vocabulary=VOCABULARY) == found
        assert operations.products == 2
        assert ours_reverse_kl(given, vocabulary=VOCABULARY) == kl
    assert operations.products == 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_close_to_dense_float64(
    dtype: torch.dtype, temperature: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = without(to(problem(), dtype, (*STUDENT, *TEACHER)), *([] if weighted else ["weights"]))
    exact = to(given, torch.float64)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    small(monkeypatch, 10)
    expected, slow = with_gradients(lambda g: dense_distillation(g, VOCABULARY, 0.5, temperature), exact)
    settings = {"temperature": temperature, "vocabulary": VOCABULARY}
    found, gradients = with_gradients(lambda g: ours_distillation(g, **settings), given)
    kl, slow_kl = with_gradients(lambda g: dense_reverse_kl(g, VOCABULARY), exact)
    found_kl, gradients_kl = with_gradients(lambda g: ours_reverse_kl(g, vocabulary=VOCABULARY), given)
    for value, right in zip((*found, *found_kl), (*expected, *kl), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=0)
    for gradient, right in zip((*gradients, *gradients_kl), (*slow, *slow_kl), strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16])
def test_under_autocast_the_student_is_multiplied_in_bfloat16_and_the_teacher_in_its_own_dtype(
    teacher: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = to(problem(), teacher, ("teacher_weight", "teacher_bias"))
    exact = to(given, torch.float64)
    small(monkeypatch, 10)
    dtypes: list[torch.dtype] = []
    linear = module._linear

    def listening(part: Tensor, *others: Any) -> Tensor:
        dtypes.append(part.dtype)
        return linear(part, *others)

    monkeypatch.setattr(module, "_linear", listening)
    expected, slow = with_gradients(lambda g: dense_distillation(g, VOCABULARY, 0.5, 1.0), exact)
    kl, slow_kl = with_gradients(lambda g: dense_reverse_kl(g, VOCABULARY), exact)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = with_gradients(lambda g: ours_distillation(g, vocabulary=VOCABULARY), given)
        found_kl, gradients_kl = with_gradients(lambda g: ours_reverse_kl(g, vocabulary=VOCABULARY), given)
    assert dtypes == [torch.bfloat16, teacher] * 6
    for value, right in zip((*found, *found_kl), (*expected, *kl), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), right, rtol=0.01, atol=0)
    for gradient, right in zip((*gradients, *gradients_kl), (*slow, *slow_kl), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient.double() - right).norm() < 0.02 * right.norm()


def test_the_losses_of_a_bfloat16_batch_are_summed_in_more_than_bfloat16() -> None:
    """Thousands of equal losses: a bfloat16 sum would stop growing long before the end."""
    given = {
        "hidden": torch.zeros(4096, 4, dtype=torch.bfloat16), "weight": torch.ones(16, 4, dtype=torch.bfloat16),
        "teacher_hidden": torch.zeros(4096, 4), "teacher_weight": torch.ones(16, 4),
        "targets": torch.zeros(4096, dtype=torch.int64),
    }  # fmt: skip
    for value in ours_distillation(given):
        torch.testing.assert_close(value, torch.tensor(16.0).log(), rtol=0, atol=1e-6)


ROWS, WIDE, TOKENS = 2048, 4096, 4000


def test_the_memory_tests_would_see_dense_logits() -> None:
    given = problem(ROWS, WIDE, WIDE + 64, TOKENS)
    with Operations() as operations:
        dense_distillation(given, TOKENS, 0.5, 1.0)
    assert operations.largest[torch.float32] == ROWS * (WIDE + 64)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, None])
def test_losses_and_backward_passes_never_hold_more_than_an_eighth_of_the_logits(
    temperature: float | None, autocast: bool
) -> None:
    given = problem(ROWS, WIDE, WIDE + 64, TOKENS)
    weight = given["weight"].requires_grad_()
    given["hidden"].requires_grad_()
    with Operations() as operations, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if temperature is None:
            ours_reverse_kl(given, vocabulary=TOKENS).backward()
        else:
            ours_distillation(given, temperature=temperature, vocabulary=TOKENS)[0].backward()
    assert weight.grad is not None
    assert WIDE < max(operations.largest.values()) <= ROWS * WIDE // 8


def test_of_16_bit_logits_no_more_than_a_strip_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_ELEMENTS", {"cpu": 20 * WIDE})
    given = to(problem(ROWS, WIDE, WIDE + 64, TOKENS), torch.bfloat16, (*STUDENT, *TEACHER))
    given["weight"].requires_grad_()
    with Operations() as operations:
        ours_distillation(given, vocabulary=TOKENS)[0].backward()
        ours_reverse_kl(given, vocabulary=TOKENS).backward()
    assert operations.largest[torch.bfloat16] == 256 * WIDE
    assert operations.largest[torch.float32] == 20 * WIDE


@pytest.mark.parametrize("loss_of", [ours_distillation, ours_reverse_kl])
@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (None, rf"(?s)vocabularies of different sizes.*student +{V} tokens.*teacher +{U} tokens"),
        (V + 1, rf"(?s)exceeds.*tokenizer +{V + 1} tokens.*student +{V} tokens.*teacher +{U} tokens"),
        (U + 1, rf"(?s)exceeds.*tokenizer +{U + 1} tokens.*student +{V} tokens.*teacher +{U} tokens"),
    ],
)
def test_vocabularies_that_cannot_be_compared_are_refused_with_their_sizes(
    vocabulary: int | None, message: str, loss_of: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=message):
        loss_of(problem(), vocabulary=vocabulary)


def test_a_vocabulary_beyond_the_teachers_alone_is_refused() -> None:
    with pytest.raises(ModelError, match=rf"(?s)exceeds.*tokenizer +{V} tokens.*teacher +{VOCABULARY} tokens"):
        ours_distillation(problem(u=VOCABULARY), vocabulary=V)
