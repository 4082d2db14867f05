"""A scorer of vLLM's offline engine; the only file that imports `vllm`.

In: token ids and which targets count. Out: log p in nats, a float64 sum of the engine's `prompt_logprobs`, each of
which is filed under a token id that must be ours.

A batch goes to the engine whole; the engine makes batches of its own of it, so ours are large.
The engine generates one token that nobody needs, so its context must hold a row and one token more. It works on the
device that it was built for, whatever `compute.device` says.
Not covered: this has been run against a stand-in with the engine's signatures, not against vLLM itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import MissingExtraError, ModelError, RecipeError
from miniplm.models.load import hub_commit, name_of, own_tokenizer
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import Compute, GivenModel, ScoreSettings, VllmModel
from miniplm.scoring.completions import checked, needed, unusable

_WHOSE = "vLLM's answer"


class VllmScorer:
    """Scores with an engine that is already loaded.

    Args:
        engine: a `vllm.LLM`.
        sampling: the `vllm.SamplingParams` that ask for the log-probabilities of the prompt.
        tokenizer: the model's own, where it is known; compared with that of the instances.
        name: what provenance calls it.

    """

    token_budget = 131_072  # assumed: enough to keep the engine busy, and few enough numbers to hold as objects

    def __init__(self, engine: Any, sampling: Any, tokenizer: Tokenizer | None, name: str) -> None:
        self.engine = engine
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.name = name
        longest = getattr(getattr(engine, "model_config", None), "max_model_len", None)
        # of its context, a row takes one token more than it has predictions, and one is generated
        self.config = {} if longest is None else {"max_position_embeddings": longest - 2}

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See `Scorer.score`.

        Raises:
            ModelError: the engine refuses a row: it is too long, or has ids that the model has not.
            ScoreError: a log-probability is missing, of another token, or no number.

        """
        rows = [needed(row, mask) for row, mask in zip(tokens, counted, strict=True)]
        asked = [number for number, ids in enumerate(rows) if ids]
        prompts = [{"prompt_token_ids": rows[number]} for number in asked]
        try:
            outputs = self.engine.generate(prompts, self.sampling, use_tqdm=False) if prompts else []
        except ValueError as error:
            raise ModelError(
                "vLLM refuses these instances.", facts={"because": str(error).strip().splitlines()[0]}
            ) from error
        summed = np.zeros(len(rows), np.float64)
        for number, output in zip(asked, outputs, strict=True):
            ids = rows[number]
            logp = _prompt_logp(output, ids)
            summed[number] = logp[counted[number, : len(ids) - 1]].sum()
        return summed


def load(model: VllmModel, settings: ScoreSettings, compute: Compute) -> VllmScorer:
    """Load a model with vLLM and make a scorer of it.

    Raises:
        MissingExtraError: vLLM is not installed.
        RecipeError: it is to be quantised, which only the transformers scorer does.
        ModelError: vLLM cannot load it.

    """
    if settings.quantize != "none":
        raise RecipeError(
            f"score.quantize is {settings.quantize!r}, which is for models that transformers runs.",
            remedy="Use `quantize: none` and a checkpoint that is quantised already, which vLLM finds out by itself; "
            "or `model:` in place of `vllm:`.",
        )
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        raise MissingExtraError("vllm", "vllm") from error
    given = GivenModel(model=model.vllm, revision=model.revision, trust_remote_code=model.trust_remote_code)
    folder = Path(model.vllm).expanduser()
    try:
        engine = LLM(
            model=str(folder) if folder.is_dir() else model.vllm,
            revision=None if folder.is_dir() else hub_commit(given),
            dtype=settings.dtype,
            trust_remote_code=model.trust_remote_code,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(
            f"vLLM cannot load the model {model.vllm!r}.",
            facts={"because": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__},
        ) from error
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    return VllmScorer(engine, sampling, own_tokenizer(given), name_of(given))


def _prompt_logp(output: Any, ids: list[int]) -> NDArray[np.float64]:
    """Log p of the tokens of a row but the first, `[t]`, from a `vllm.RequestOutput`."""
    entries = output.prompt_logprobs
    if entries is None or len(entries) != len(ids):
        found = "none" if entries is None else f"{len(entries):,}"
        raise unusable(_WHOSE, ids, f"it has {found} tokens")
    values = []
    for place, token in enumerate(ids[1:], start=1):
        entry = entries[place] or {}
        if token not in entry:
            raise unusable(
                _WHOSE, ids, f"at token {place} it tells of another token", found=list(entry), expected=token
            )
        values.append(entry[token].logprob)
    return checked(values, ids, _WHOSE)
