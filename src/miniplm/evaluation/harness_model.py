"""A model of ours as the `LM` of lm-evaluation-harness.

The harness turns texts into requests of tokens; this answers them: cut into batches by tokens, not by number, a row
that several requests share read once, and logits only where an answer is. Log-probabilities are computed in float32
whatever the dtype of the weights (the harness's `softmax_dtype: float32`), and summed in float64.

Imported when tasks are run, never before: `lm_eval` is an extra.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from miniplm.errors import ScoreError, TokenizerError
from miniplm.evaluation.harness import quiet
from miniplm.models.load import check_vocabulary, choose_device, hub_commit, load_model, own_tokenizer
from miniplm.progress import printable, progress
from miniplm.recipe import Compute, GivenModel, Precision

_TOKENS = {"cpu": 1024, "cuda": 32_768}  # of a batch; measured on CPU (4,096 take a fifth longer), else assumed
_LOGITS = 1 << 27  # of a batch: 512 MB in float32
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits made probabilities: the cache, as in models/head

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text, their ids."""
Row = tuple[int, ...]
"""The tokens that a model reads to answer a request, or several."""


class LanguageModel(HFLM):
    """A model of ours as the harness's `LM`.

    Texts are cut at the model's `max_position_embeddings`, as the harness does, not at the length it was trained at.

    Attributes:
        label: what the progress is of.
        shortened: requests that were too long for the model and lost their beginning.

    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, compute: Compute) -> None:
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer)
        self.batch_size_per_gpu: int = compute.generate_batch
        self.label = "tasks"
        self.shortened = 0
        self._keeps = "logits_to_keep" in signature(model.forward).parameters
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._at_once = max(1, _AT_ONCE.get(model.device.type, 1 << 24) // self._vocabulary)
        self._tokens = compute.score_tokens or _TOKENS.get(model.device.type, 16_384)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log p of continuations in nats, and whether greedy decoding would give them. Raises ScoreError."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log p of whole texts in nats, in windows of `max_length`. Raises ScoreError."""
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, 1 << 60  # all windows in one call
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = before
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """What the harness asks of its models. A row of tokens that several requests share is read once."""
        sharing: dict[Row, list[int]] = {}
        for number, (text, context, asked) in enumerate(requests):
            if not 0 < len(asked) <= self.max_length:
                raise ScoreError(
                    "an answer cannot be asked for: its tokens are none, or more than the model reads.",
                    facts={"task": self.label, "tokens": len(asked), "positions": self.max_length, "of": _shown(text)},
                    remedy="Leave the task out for this model.",
                )
            self.shortened += len(context) + len(asked) - 1 > self.max_length
            sharing.setdefault(tuple((context + asked)[-self.max_length - 1 : -1]), []).append(number)
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        with progress(self.label, len(requests), "requests") as meter:
            for rows in self._batches(sharing, requests):
                found = self._answers(rows, [[requests[number][2] for number in sharing[row]] for row in rows])
                numbers = [number for row in rows for number in sharing[row]]
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
                meter.advance(len(numbers))
        if wrong := [request for request, answer in zip(requests, answers, strict=True) if math.isnan(answer[0])]:
            raise ScoreError(
                "the model gives a log-likelihood that is no number.",
                facts={
                    "task": self.label, "requests": f"{len(wrong):,} of {len(requests):,}", "first": _shown(wrong[0][0])
                },
                remedy="Its weights may be damaged, or too large for the dtype; try `dtype: float32`.",
            )  # fmt: skip
        return answers

    def _batches(self, sharing: Mapping[Row, list[int]], requests: Sequence[Request]) -> Iterator[list[Row]]:
        """The rows, the longest first, as many at a time as the device bears."""
        batch: list[Row] = []
        kept = 0
        for row in sorted(sharing, key=lambda row: (-len(row), row)):
            longest = len(batch[0] if batch else row)
            asked = max(len(requests[number][2]) for number in sharing[row])
            kept = max(kept, longest - len(row) + asked)
            rows = len(batch) + 1
            if batch and (rows * longest > self._tokens or rows * kept * self._vocabulary > _LOGITS):
                yield batch
                batch, kept = [], asked
            batch.append(row)
        if batch:
            yield batch

    def _answers(self, rows: Sequence[Row], asked: Sequence[Sequence[list[int]]]) -> list[tuple[float, bool]]:
        """For each row and each continuation asked of its end: log p, float32 summed in float64, and whether greedy."""
        longest = max(map(len, rows))
        kept = max(longest - len(row) + len(ids) for row, several in zip(rows, asked, strict=True) for ids in several)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)
        how = {"logits_to_keep": kept} if self._keeps else {}
        logits = self.model(padded, use_cache=False, **how).logits  # [B, kept, V], or [B, longest, V]
        left_out = longest - logits.shape[1]
        wanted = [
            (number, len(row) - len(ids) + place - left_out, token)
            for number, (row, several) in enumerate(zip(rows, asked, strict=True))
            for ids in several
            for place, token in enumerate(ids)
        ]
        logp, greedy = [], []
        for begin in range(0, len(wanted), self._at_once):
            number, place, token = torch.tensor(wanted[begin : begin + self._at_once], device=self.device).T
            each = logits[number, place].float().log_softmax(dim=-1)
            logp.append(each.gather(1, token[:, None]).squeeze(1))
            greedy.append(each.argmax(dim=-1) == token)
        nats, hits = torch.cat(logp).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()
        ends = np.cumsum([len(ids) for several in asked for ids in several])
        parts = zip([0, *ends[:-1]], ends, strict=True)
        return [(float(nats[begin:end].sum()), bool(hits[begin:end].all())) for begin, end in parts]


def _shown(text: tuple[str, str] | None) -> str:
    return printable("".join(text or ("a whole text",)), 80)


def language_model(given: GivenModel, dtype: Precision, compute: Compute) -> LanguageModel:
    """Load a model with its own tokenizer.

    The tokenizer is what `tokenizer.json` says. `AutoTokenizer` is not asked: for some architectures (qwen2) it makes
    the tokenizer anew with the rules of that family, whatever the file says. *Found 2026-11, transformers 5.23.*

    Raises:
        ModelError, TokenizerError: one of the two cannot be loaded.

    """
    loaded = load_model(given, dtype, str(choose_device(compute.device)))
    if (own := own_tokenizer(given)) is None:
        raise TokenizerError(
            f"the model {given.model!r} has no tokenizer that can be loaded; tasks are asked in text.",
            remedy="Save one beside its weights: a tokenizer.json in its folder.",
        )
    check_vocabulary(own.vocab_size, int(loaded.config.get_text_config().vocab_size), given.model)
    is_folder = Path(given.model).expanduser().is_dir()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(Path(given.model).expanduser()) if is_folder else given.model,
        revision=None if is_folder else hub_commit(given),
        split_special_tokens=True,  # special tokens spelt in an example are text
    )
    if tokenizer.eos_token is None:  # it stands in front of a text that has nothing in front
        tokenizer.eos_token = own.token(own.separator)
    return LanguageModel(loaded, tokenizer, compute)
