"""The chunked head against dense float64 autograd, against models that do more to their logits, and against memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from miniplm.errors import ModelError
from miniplm.models import head
from miniplm.models.head import check_head, compiled_logsumexp, head_of, hidden_states, token_logp
from miniplm.models.losses import cross_entropy
from miniplm.training.data import Collator
from miniplm.training.objectives import NextToken

TINY = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
PLAIN: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**TINY, num_key_value_heads=4),
    "qwen2-tied": Qwen2Config(**TINY, num_key_value_heads=4, tie_word_embeddings=True),
    "llama": LlamaConfig(**TINY, num_key_value_heads=4, **SPECIAL),
    "gpt_neox": GPTNeoXConfig(**TINY, **SPECIAL),
    "gpt2": GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4, **SPECIAL),
    "mamba": MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=8, **SPECIAL),
    "phi (a head with bias)": PhiConfig(**TINY, **SPECIAL),
}
PROCESSED: dict[str, PreTrainedConfig] = {
    "gemma2, logits capped": Gemma2Config(
        **TINY, head_dim=8, num_key_value_heads=4, final_logit_softcapping=30.0, **SPECIAL
    ),
    "granite, logits divided": GraniteConfig(**TINY, num_key_value_heads=4, logits_scaling=8.0, **SPECIAL),
    "cohere, logits multiplied": CohereConfig(**TINY, num_key_value_heads=4, logit_scale=0.0625, **SPECIAL),
    "minicpm3, states divided": MiniCPM3Config(
        **TINY,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        dim_model_base=8,
        **SPECIAL,
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


def new(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def problem(rows: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Hidden states, a head, targets and weights that sum to 1, some of them 0."""
    draw = torch.Generator().manual_seed(3)
    weights = torch.rand(rows, generator=draw) * (torch.rand(rows, generator=draw) > 0.3)
    return {
        "hidden": torch.randn(rows, width, generator=draw).to(dtype),
        "weight": torch.randn(vocab_size, width, generator=draw).to(dtype),
        "bias": torch.randn(vocab_size, generator=draw).to(dtype),
        "targets": torch.randint(0, vocab_size, (rows,), generator=draw),
        "weights": weights / weights.sum(),
    }


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The loss as its definition says, every logit at once."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log_softmax(logits, dim=1)[torch.arange(len(targets)), targets]
    return -logp.mean() if weights is None else -(logp * weights).sum()


def with_gradients(
    loss_of: Callable[..., Tensor],
    given: dict[str, Tensor],
    bias: bool,
    weighted: bool,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of `scale` times it to hidden states, weight and, where there is one, bias."""
    names = ["hidden", "weight", *(["bias"] if bias else [])]
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in names}
    weights = given["weights"].to(dtype) if weighted else None
    loss = loss_of(leaves["hidden"], leaves["weight"], leaves.get("bias"), given["targets"], weights)
    (loss * scale).backward()
    return loss.detach(), [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(head, "_SMALLEST_CHUNK_ROWS", rows)
    monkeypatch.setattr(head, "_BLOCK", (rows, 3 * rows))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 7, 8, 100])
def test_cross_entropy_and_its_gradients_are_those_of_dense_float64(
    rows: int, bias: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(29, 16, 203)
    expected, exact = with_gradients(dense, given, bias, weighted, 1.0, torch.float64)
    small_chunks(monkeypatch, rows)
    found, gradients = with_gradients(cross_entropy, given, bias, weighted, 1.0, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert len(gradients) == len(exact) == (3 if bias else 2)
    for gradient, slow in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), slow, rtol=1e-5, atol=1e-7)


def test_cross_entropy_of_a_float64_model_is_as_good_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(13, 8, 57)
    expected, exact = with_gradients(dense, given, True, True, 1.0, torch.float64)
    small_chunks(monkeypatch, 4)
    found, gradients = with_gradients(cross_entropy, given, True, True, 1.0, torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert [g.dtype for g in gradients] == [torch.float64] * 3
    for gradient, slow in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 0.125, -3.0])
def test_an_upstream_gradient_scales_all_gradients(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(29, 16, 203)
    _, exact = with_gradients(dense, given, True, True, scale, torch.float64)
    small_chunks(monkeypatch, 8)
    _, gradients = with_gradients(cross_entropy, given, True, True, scale, torch.float32)
    for gradient, slow in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), slow, rtol=1e-5, atol=1e-6)


def test_gradients_reach_only_what_asks_for_them() -> None:
    given = problem(9, 8, 31)
    hidden = given["hidden"].requires_grad_()
    cross_entropy(hidden, given["weight"], given["bias"], given["targets"]).backward()
    _, exact = with_gradients(dense, problem(9, 8, 31), True, False, 1.0, torch.float64)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact[0], rtol=1e-5, atol=1e-7)
    assert given["weight"].grad is None
    assert given["bias"].grad is None


def test_cross_entropy_without_gradients_is_the_same_number() -> None:
    given = problem(29, 16, 203)
    names = ("hidden", "weight", "bias", "targets", "weights")
    with_graph, _ = with_gradients(cross_entropy, given, True, True, 1.0, torch.float32)
    with torch.no_grad():
        assert torch.equal(cross_entropy(*(given[name] for name in names)), with_graph)


@pytest.mark.parametrize("weighted", [False, True])
def test_under_bfloat16_autocast_loss_and_gradients_stay_close_to_dense_float64(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(64, 32, 307)
    given["weight"] *= 0.1
    expected, exact = with_gradients(dense, given, True, weighted, 1.0, torch.float64)
    small_chunks(monkeypatch, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = with_gradients(cross_entropy, given, True, weighted, 1.0, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)
    for gradient, slow in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient.double() - slow).norm() < 0.02 * slow.norm()


def test_the_loss_of_a_bfloat16_batch_is_summed_in_more_than_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of equal losses: a bfloat16 sum would stop growing long before the end."""
    rows, vocab_size = 4096, 16
    hidden, weight = torch.zeros(rows, 4, dtype=torch.bfloat16), torch.ones(vocab_size, 4, dtype=torch.bfloat16)
    small_chunks(monkeypatch, 256)
    loss = cross_entropy(hidden, weight, None, torch.zeros(rows, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(float(vocab_size)).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_logp_of_16_bit_models_errs_by_a_256th_of_itself_to_either_side(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 64, generator=draw).to(dtype)
    weight = (torch.randn(1001, 64, generator=draw) * 0.6).to(dtype)  # logits of about 5, the largest beyond 20
    logits = hidden.double() @ weight.double().T
    targets = logits.argmax(dim=1)
    targets[::2] = torch.randint(0, 1001, (150,), generator=draw)
    exact = torch.log_softmax(logits, dim=1)[torch.arange(300), targets]
    assert logits.abs().max() > 20
    monkeypatch.setattr(head, "_BLOCK", (128, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # importing torch's compiler causes them
        found = token_logp(hidden, weight, None, targets, compiled_logsumexp() if compiled else None).double()
    error = (found - exact) / exact.abs().clamp(min=0.1)
    assert error.abs().max() < 2**-7
    assert error.mean().abs() < 3e-4
    assert (found <= 0).all()
    in_halves = (hidden @ weight.T).double()  # as models give their logits
    plain = torch.log_softmax(in_halves, dim=1)[torch.arange(300), targets]
    likely = slice(1, None, 2)  # where a model is sure, the rounding of its logits is all of the error
    assert (found - exact)[likely].abs().mean() < (plain - exact)[likely].abs().mean() / 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 8, 100])
def test_token_logp_is_dense_float64_log_softmax(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(29, 16, 203)
    offset = given["bias"] if bias else None
    logits = given["hidden"].double() @ given["weight"].double().T + (0 if offset is None else offset.double())
    exact = torch.log_softmax(logits, dim=1)[torch.arange(29), given["targets"]]
    small_chunks(monkeypatch, rows)
    found = token_logp(given["hidden"], given["weight"], offset, given["targets"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_check_head_accepts_a_linear_head(name: str, dtype: torch.dtype) -> None:
    check_head(new(PLAIN[name]).to(dtype))


@pytest.mark.parametrize("name", PLAIN)
def test_head_and_backbone_together_are_the_models_logits(name: str) -> None:
    model = new(PLAIN[name]).eval()
    ids = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = nn.functional.linear(hidden_states(model, ids), *head_of(model))
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSED)
def test_check_head_refuses_a_trained_model_that_changes_its_logits_afterwards(name: str) -> None:
    model = new(PROCESSED[name]).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():  # a trained model's logits are around ten; embeddings are tied, so scaled by the square root
        head_of(model)[0].mul_(400.0)
        assert model(input_ids=ids).logits.abs().max() > 1
    with pytest.raises(ModelError, match="does more to its logits than a linear head"):
        check_head(model)


@pytest.mark.parametrize("name", PROCESSED)
def test_check_head_refuses_a_new_model_that_changes_its_logits_afterwards(name: str) -> None:
    """As `train` asks it, before the first step: the logits are still so small that a soft cap hardly shows."""
    with pytest.raises(ModelError, match="does more to its logits than a linear head"):
        check_head(new(PROCESSED[name]))


def test_check_head_leaves_the_mode_of_the_model_as_it_was() -> None:
    model = new(PLAIN["qwen2"])
    for training in (True, False):
        model.train(training)
        check_head(model)
        assert model.training is training


def test_a_model_without_a_linear_head_is_refused_by_name() -> None:
    model = new(PLAIN["qwen2"])
    model.set_output_embeddings(nn.Bilinear(2, 2, 2))
    with pytest.raises(ModelError, match=r"(?s)Qwen2ForCausalLM has no linear output head.*Bilinear"):
        head_of(model)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


ROWS, VOCAB = 2048, 4096


def test_the_memory_tests_would_see_dense_logits() -> None:
    given = problem(ROWS, 8, VOCAB)
    with LargestTensor() as largest:
        nn.functional.cross_entropy(given["hidden"] @ given["weight"].T, given["targets"])
    assert largest.numel == ROWS * VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logp_never_holds_more_than_an_eighth_of_the_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_BLOCK", (256, 1024))
    given = problem(ROWS, 8, VOCAB, dtype)
    with LargestTensor() as largest:
        token_logp(given["hidden"], given["weight"], given["bias"], given["targets"])
    assert VOCAB < largest.numel <= ROWS * VOCAB // 8


@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_and_its_backward_pass_never_hold_more_than_an_eighth_of_the_logits(autocast: bool) -> None:
    given = problem(ROWS, 8, VOCAB)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cross_entropy(hidden, weight, given["bias"], given["targets"], given["weights"]).backward()
    assert weight.grad is not None
    assert VOCAB < largest.numel <= ROWS * VOCAB // 8


@pytest.mark.parametrize("rule", ["all", "skip_after_separator"])
def test_a_whole_training_step_never_holds_more_than_an_eighth_of_the_logits(rule: str) -> None:
    model = new(Qwen2Config(**{**TINY, "vocab_size": VOCAB}, num_key_value_heads=4, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters())
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCAB, (16, ROWS // 16 + 1), generator=draw).numpy()
    batch = Collator(separator=int(rows[0, 3]), rule=rule)([(row, len(row), i) for i, row in enumerate(rows)])  # type: ignore[arg-type]
    assert (batch["weights"] is None) == (rule == "all")
    before = model.get_output_embeddings().weight.detach().clone()
    with LargestTensor() as largest:
        loss, _ = NextToken().loss(model, batch)
        loss.backward()
        optimizer.step()
    assert not torch.equal(before, model.get_output_embeddings().weight)
    assert VOCAB < largest.numel <= ROWS * VOCAB // 8


def test_where_nothing_can_be_compiled_the_log_sum_exp_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> Callable[..., Tensor]:
        def fails(logits: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert compiled_logsumexp() is None
