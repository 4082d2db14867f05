"""A scorer behind an OpenAI-compatible server: `POST {server}/completions`, one request a row.

In: token ids and which targets count. Out: log p in nats, a float64 sum of what the server says of the prompt's tokens.
Two dialects: vLLM's `prompt_logprobs`, and `echo` with `logprobs`; `auto` asks which on the first row.

Promised: an answer is used only if it fits our tokens (`completions`), and a server that fails is asked again (`line`).
Some servers echo the probability of a token *after* it has been read (llama-cpp-python, where the tokenizer puts no BOS
in front); three short prompts find that out before anything is scored. The first of them is tried a few times only.

Not covered: a BOS that a server adds in front of a text is left out of the sum, but the model has seen it. A server's
context must hold a row and one token more: every server generates one, because some take 0 for "no limit".
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import MiniplmError, ModelError, RecipeError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import Compute, ServerModel
from miniplm.scoring import completions
from miniplm.scoring.completions import Dialect, Prompt
from miniplm.scoring.line import Line, RefusedError

_NO_SUCH_REQUEST = {400, 404, 422}


def connect(model: ServerModel, compute: Compute) -> ServerScorer:
    """Make a scorer of a served model; the server is not asked anything yet.

    Raises:
        MissingExtraError: `httpx` is not installed.
        RecipeError: the URL or the key cannot be used, or `send: text` has no tokenizer.
        TokenizerError: the tokenizer cannot be loaded.

    """
    if model.send == "text" and model.tokenizer is None:
        raise RecipeError(
            f"the server of {model.model!r} is to be sent text, but its tokenizer is not named.",
            remedy="Name it (`tokenizer: folder or Hub id`): the tokens that come back are compared with it.",
        )
    line = Line(model, compute.server_concurrency)
    tokenizer = None if model.tokenizer is None else tokenizers.load(model.tokenizer)
    return ServerScorer(model, line, tokenizer)


class ServerScorer:
    """Scores with a model behind a server.

    Attributes:
        unreadable: tokens so far whose spelling came back unreadable, because they are parts of characters.

    """

    most_rows = 1
    costly = True

    def __init__(self, model: ServerModel, line: Line, tokenizer: Tokenizer | None) -> None:
        self.name = f"{model.model}{'@' if model.revision else ''}{model.revision} at {line.url}"
        self.tokenizer = tokenizer
        self.in_flight = 2 * line.concurrency
        self._model = model
        self._line = line
        self._spelling = None if tokenizer is None else completions.Spelling(tokenizer)
        self._dialect: Dialect | None = "vllm" if model.dialect == "vllm" else None
        self._choosing = asyncio.Lock()
        self._failures = 0
        self._failure: MiniplmError | None = None

    @property
    def unreadable(self) -> int:
        """See the attributes of the class."""
        return 0 if self._spelling is None else self._spelling.unreadable

    def expect(self, tokenizer: Tokenizer) -> None:
        """Compare what comes back with this tokenizer's spelling; the model's own was not named."""
        if self._spelling is None:
            self._spelling = completions.Spelling(tokenizer)

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See `Scorer.score`."""
        return self.submit(tokens, counted).result()

    def submit(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> _Answers:
        """Ask for some rows, `[B, t+1]` and `[B, t]`, without waiting; at most `server_concurrency` are under way."""
        answers = []
        for row, mask in zip(tokens, counted, strict=True):
            answers.append(self._line.begin(self._score_row(completions.needed(row, mask), mask, self._failures)))
        return _Answers(answers)

    def close(self) -> None:
        """Give up what is under way and close the connections; done by itself when the scorer goes."""
        self._line.close()

    async def _score_row(self, ids: list[int], counted: NDArray[np.bool_], failures: int) -> float:
        if not ids:
            return 0.0
        try:
            self._give_up_after(failures)
            prompt = self._prompt(ids)
            dialect = self._dialect or await self._choose(ids, failures)
            answer = await self._line.post(
                completions.request(self._model, dialect, prompt), lambda: self._give_up_after(failures)
            )
            read = completions.read_prompt_logprobs if dialect == "vllm" else completions.read_echo
            logp = read(answer, ids, isinstance(prompt, str), self._spelling)
        except MiniplmError as error:
            if self._failures == failures:
                self._failures, self._failure = failures + 1, error
            raise
        return float(logp[counted[: len(logp)]].sum())

    def _give_up_after(self, failures: int) -> None:
        """Do not ask, and pay, for rows that were handed over with one that has failed for good."""
        if self._failures != failures and self._failure is not None:
            raise ModelError(f"a row was given up, because another one failed: {self._failure}") from self._failure

    async def _choose(self, ids: list[int], failures: int) -> Dialect:
        """The server's dialect; asked for once, with prompts of a few tokens."""
        async with self._choosing:
            self._give_up_after(failures)
            if self._dialect is None:
                as_text = self._model.send == "text"
                trials: list[Prompt] = ["1 2 3", "1 2 (", "1 2 a"] if as_text else completions.trials(ids)
                if self._model.dialect == "auto" and await self._has_prompt_logprobs(trials[0]):
                    self._dialect = "vllm"
                else:
                    answers = [
                        await self._line.post(completions.request(self._model, "echo", trial), first=number == 0)
                        for number, trial in enumerate(trials)
                    ]
                    completions.check_alignment(answers, None if as_text else 1, self._line.url)
                    self._dialect = "echo"
            return self._dialect

    async def _has_prompt_logprobs(self, trial: Prompt) -> bool:
        try:
            answer = await self._line.post(completions.request(self._model, "vllm", trial), first=True)
        except RefusedError as error:
            if error.status in _NO_SUCH_REQUEST:  # strict about settings that it does not know
                return False
            raise
        return isinstance(completions.choice_of(answer).get("prompt_logprobs"), list)

    def _prompt(self, ids: list[int]) -> Prompt:
        if self._model.send == "ids":
            return ids
        assert self.tokenizer is not None  # `connect` sees to it
        return completions.text_of(ids, self.tokenizer)


class _Answers:
    """The log-probabilities of some rows, on their way."""

    def __init__(self, rows: list[Future[float]]) -> None:
        self._rows = rows

    def done(self) -> bool:
        """Whether all of them are there."""
        return all(row.done() for row in self._rows)

    def result(self) -> NDArray[np.float64]:
        """Wait for all of them: `[B]`, nats."""
        return np.array([row.result() for row in self._rows], np.float64)
