"""A scorer behind an OpenAI-compatible server: `POST {server}/completions`, one request a row.

In: token ids and which targets count. Out: log p in nats, a float64 sum of what the server says of the prompt's tokens.
Two dialects: vLLM's `prompt_logprobs`, and `echo` with `logprobs`; `auto` asks which on the first row.

Promised: an answer is used only if it has a log-probability for each of our tokens, and these are our tokens, as
strictly as the answer lets one see it: by id where ids come back, else by spelling; what does not fit is an error that
names the row. Some servers echo the probability of a token *after* it has been read (llama-cpp-python, where the
tokenizer puts no BOS in front); three short prompts find that out before anything is scored.
A busy or failing server is asked again, later and later, `_TRIES` times. Redirects are not followed: the key stays.

Not covered: a BOS that a server adds in front of a text is left out of the sum, but the model has seen it. A server's
context must hold a row and one token more: every server generates one, because some take 0 for "no limit".
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import MiniplmError, MissingExtraError, ModelError, RecipeError, ScoreError, TokenizerError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import printable
from miniplm.recipe import Compute, ServerModel

if TYPE_CHECKING:
    import httpx

Dialect = Literal["vllm", "echo"]
Prompt = list[int] | str
_T = TypeVar("_T")

_TRIES = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds; doubled from one try to the next
_TIMEOUT = 600.0  # seconds without a byte of the answer; a request may wait in the server's own queue
_BUSY = {429, 500, 502, 503, 504}
_NO_SUCH_REQUEST = {400, 404, 422}
_NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity, which JSON does not have
_ROUNDING = 1e-3  # nats above 0 that a sum of rounded numbers may come to


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
    line = _Line(model, compute.server_concurrency)
    tokenizer = None if model.tokenizer is None else tokenizers.load(model.tokenizer)
    return ServerScorer(model, line, tokenizer)


class ServerScorer:
    """Scores with a model behind a server.

    Attributes:
        unreadable: tokens so far whose spelling came back unreadable, because they are parts of characters.

    """

    most_rows = 1
    costly = True

    def __init__(self, model: ServerModel, line: _Line, tokenizer: Tokenizer | None) -> None:
        self.name = f"{model.model}{'@' if model.revision else ''}{model.revision} at {line.url}"
        self.tokenizer = tokenizer
        self.in_flight = 2 * line.concurrency
        self._model = model
        self._line = line
        self._spelling = None if tokenizer is None else _Spelling(tokenizer)
        self._dialect: Dialect | None = "vllm" if model.dialect == "vllm" else None
        self._choosing = asyncio.Lock()
        self._failures = 0
        self._failure: MiniplmError | None = None

    @property
    def unreadable(self) -> int:
        """See the attributes of the class."""
        return 0 if self._spelling is None else self._spelling.unreadable

    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See `Scorer.score`."""
        return self.submit(tokens, counted).result()

    def submit(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> _Answers:
        """Ask for some rows, `[B, t+1]` and `[B, t]`, without waiting; at most `server_concurrency` are under way."""
        answers = []
        for row, mask in zip(tokens, counted, strict=True):
            answers.append(self._line.begin(self._score_row(needed(row, mask), mask, self._failures)))
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
                _request(self._model, dialect, prompt), lambda: self._give_up_after(failures)
            )
            read = _read_prompt_logprobs if dialect == "vllm" else _read_echo
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
                trials: list[Prompt] = ["1 2 3", "1 2 (", "1 2 a"] if as_text else _trials(ids)
                if self._model.dialect == "auto" and await self._has_prompt_logprobs(trials[0]):
                    self._dialect = "vllm"
                else:
                    answers = [await self._line.post(_request(self._model, "echo", trial)) for trial in trials]
                    _check_alignment(answers, None if as_text else 1, self._line.url)
                    self._dialect = "echo"
            return self._dialect

    async def _has_prompt_logprobs(self, trial: Prompt) -> bool:
        try:
            answer = await self._line.post(_request(self._model, "vllm", trial))
        except _RefusedError as error:
            if error.status in _NO_SUCH_REQUEST:  # strict about settings that it does not know
                return False
            raise
        return isinstance(_choice(answer).get("prompt_logprobs"), list)

    def _prompt(self, ids: list[int]) -> Prompt:
        if self._model.send == "ids":
            return ids
        assert self.tokenizer is not None  # `connect` sees to it
        return _text_of(ids, self.tokenizer)


class _Answers:
    """The log-probabilities of some rows, on their way."""

    def __init__(self, rows: list[Future[float]]) -> None:
        self._rows = rows

    def result(self) -> NDArray[np.float64]:
        """Wait for all of them: `[B]`, nats."""
        return np.array([row.result() for row in self._rows], np.float64)


def needed(tokens: NDArray[Any], counted: NDArray[np.bool_]) -> list[int]:
    """The ids of a row up to its last counted target; what follows cannot move the sum."""
    last = np.flatnonzero(counted)[-1:]
    return [int(i) for i in tokens[: int(last[0]) + 2]] if len(last) else []


def checked(values: Sequence[object], ids: Sequence[int], whose: str) -> NDArray[np.float64]:
    """Log-probabilities of the tokens of a row but the first, `[t]`.

    Raises:
        ScoreError: one of them is no number, infinite, or above 0.

    """
    for place, value in enumerate(values, start=1):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not _NO_PROBABILITY < value <= _ROUNDING:  # type: ignore[operator]  # NaN is refused here too
            raise unusable(whose, ids, f"log p of token {place} is {value!r}, not a finite number below 0")
    return np.array(values, np.float64)


def unusable(whose: str, ids: Sequence[int], problem: str, **facts: object) -> ScoreError:
    """The error for an answer that does not fit the row that was asked for."""
    row = f"row of {len(ids):,} tokens beginning {' '.join(map(str, ids[:8]))}"
    return ScoreError(f"{whose} cannot be used: {problem}.", facts={"for": row, **facts})


# --- requests and answers


def _request(model: ServerModel, dialect: Dialect, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    if dialect == "echo":
        return body | {"echo": True, "logprobs": 1}  # servers differ on what 0 means
    return body | {"prompt_logprobs": 0, "return_token_ids": True, "add_special_tokens": False}


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ScoreError(
            "the server's answer is no completion.",
            facts={"found": printable(json.dumps(answer), 160), "expected": "one entry in `choices`"},
        )
    return choices[0]


_WHOSE = "the server's answer"


def _read_prompt_logprobs(
    answer: Mapping[str, Any], ids: list[int], as_text: bool, spelling: _Spelling | None
) -> NDArray[np.float64]:
    """Log p of the tokens but the first from vLLM's `prompt_logprobs`, whose entries are filed under token ids."""
    choice = _choice(answer)
    entries, theirs = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
    if not isinstance(entries, list):
        raise unusable(_WHOSE, ids, "it has no `prompt_logprobs`", remedy="another `dialect` may fit this server")
    begin = 1 if as_text and len(entries) == len(ids) + 1 else 0  # a BOS that the server has put in front
    if len(entries) != len(ids) + begin:
        raise _wrong_count(ids, len(entries))
    if isinstance(theirs, list) and theirs[begin:] != ids:
        raise _other_tokens(ids, theirs[begin:])
    values = []
    for place, token in enumerate(ids[1:], start=1):
        entry = entries[begin + place]
        found = entry.get(str(token)) if isinstance(entry, dict) else None
        if not isinstance(found, dict):
            there = ", ".join(entry) if isinstance(entry, dict) else entry
            raise unusable(_WHOSE, ids, f"at token {place} it tells of another token", found=there, expected=token)
        values.append(found.get("logprob"))
    return checked(values, ids, _WHOSE)


def _read_echo(
    answer: Mapping[str, Any], ids: list[int], as_text: bool, spelling: _Spelling | None
) -> NDArray[np.float64]:
    """Log p of the tokens but the first from an echoed prompt; what was generated after it is left out."""
    choice = _choice(answer)
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(logprobs, dict) or not isinstance(values, list):
        raise unusable(_WHOSE, ids, "it has no `logprobs.token_logprobs`")
    prompt_tokens, generated = _usage(answer)
    if prompt_tokens not in ((None, len(ids), len(ids) + 1) if as_text else (None, len(ids))):
        raise _wrong_count(ids, prompt_tokens)
    if len(values) < len(ids):
        raise _wrong_count(ids, len(values))
    said = _spelt(choice, logprobs, len(values))
    if as_text and (said is None or spelling is None):
        raise unusable(_WHOSE, ids, "it spells no tokens, so whose log-probabilities these are cannot be seen")
    # A BOS in front is echoed or not; if it is, its own entry is the one without a number.
    begins = [0, 1] if as_text and prompt_tokens != len(ids) and len(values) > len(ids) else [0]
    if said is not None and spelling is not None:
        there = {begin: spelling.difference(said[begin : begin + len(ids)], ids) for begin in begins}
        begins = [begin for begin in begins if there[begin] is None]
        if not begins:
            place, found = next(iter(there.values())) or (0, "")
            expected = printable(repr(spelling.of(ids[place])), 60)
            raise unusable(
                _WHOSE, ids, f"token {place} is another one", found=printable(repr(found), 60), expected=expected
            )
    if len(begins) > 1:
        raise unusable(_WHOSE, ids, "whether the server has put a token in front cannot be seen")
    begin = begins[0]
    if len(values) > begin + len(ids) + generated:
        raise _wrong_count(ids, len(values) - generated)
    if said is not None and spelling is not None:
        spelling.count(ids)
    return checked(values[begin + 1 : begin + len(ids)], ids, _WHOSE)


def _usage(answer: Mapping[str, Any]) -> tuple[int | None, int]:
    """Tokens of the prompt, None if the answer does not say, and tokens generated; 1 was asked for."""
    usage = answer.get("usage")
    found = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, generated = (value if isinstance(value, int) else None for value in found)
    return prompt, 1 if generated is None else generated


def _spelt(choice: Mapping[str, Any], logprobs: Mapping[str, Any], entries: int) -> list[str] | None:
    """How the answer spells its tokens: as it says, or as its offsets cut its text; None if it says neither."""
    tokens, offsets, text = logprobs.get("tokens"), logprobs.get("text_offset"), choice.get("text")
    if isinstance(tokens, list) and len(tokens) == entries:
        return [str(token) for token in tokens]
    if isinstance(offsets, list) and len(offsets) == entries and all(isinstance(offset, int) for offset in offsets):
        text = text if isinstance(text, str) else ""
        return [text[begin:end] for begin, end in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    return None


def _wrong_count(ids: list[int], found: object) -> ScoreError:
    error = "it does not have a log-probability for each token"
    hint = "the server tokenises otherwise, cuts long prompts, or drops special tokens"
    return unusable(_WHOSE, ids, error, found=f"{found} tokens", expected=f"{len(ids):,} tokens", perhaps=hint)


def _other_tokens(ids: list[int], theirs: list[Any]) -> ScoreError:
    place = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
    found, expected = theirs[place : place + 1], ids[place : place + 1]
    return unusable(_WHOSE, ids, f"token {place} is another one", found=found, expected=expected)


def _trials(ids: list[int]) -> list[Prompt]:
    """Prompts that differ in their second and last token only."""
    lasts = list(dict.fromkeys([*ids[1:], 0, 1, 2]))[:3]
    return [[ids[0], last] for last in lasts]


def _check_alignment(answers: list[Mapping[str, Any]], place: int | None, url: str) -> None:
    """Raise ScoreError if the entry of a token is computed after the token was read, not before.

    What a model expects at a place does not depend on the token that is there: where the prompts differ for the first
    time, at `place` if it is known, the likeliest token and its log p are the same, but for the noise of batches.
    Where the answers do not say which token is the likeliest, there is nothing to see.
    """
    seen = [found for answer in answers if (found := _tokens_and_tops(answer)) is not None]
    if place is None:
        columns = zip(*(tokens for tokens, _ in seen), strict=False)
        place = next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)
    likeliest = []
    for tokens, tops in seen:
        own, top = (tokens[place], tops[place]) if min(len(tokens), len(tops)) > place > 0 else ("", None)
        if own and "\ufffd" not in own and isinstance(top, dict):  # else another token may have its name
            numbers = [(value, token) for token, value in top.items() if isinstance(value, float)]
            likeliest += [max(numbers)] if numbers else []
    if len(likeliest) < 2:
        return
    spread = max(likeliest)[0] - min(likeliest)[0]
    same_token = len({token for _, token in likeliest}) == 1
    if spread > (0.2 if same_token else 0.05):  # nats; assumed: bfloat16 in other batches moves log p by less
        raise ScoreError(
            "the server gives the log-probability of a token after that token, not before it.",
            facts={
                "server": url,
                "seen": "what it expects at a place changes with the token that is there: "
                + ", ".join(f"{printable(repr(token), 20)} {value:.2f}" for value, token in likeliest),
            },
            remedy="llama-cpp-python does so for models whose tokenizer puts no BOS in front; use another server.",
        )


def _tokens_and_tops(answer: Mapping[str, Any]) -> tuple[list[str], list[Any]] | None:
    logprobs = _choice(answer).get("logprobs")
    found = [logprobs.get(name) if isinstance(logprobs, dict) else None for name in ("tokens", "top_logprobs")]
    if not all(isinstance(values, list) for values in found):
        return None
    return [str(token) for token in found[0] or []], found[1] or []


# --- text


def _text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text that a server will make these very ids of, special tokens as they are spelt.

    Raises:
        ScoreError: there is none; before anything is asked, and paid, for it.

    """
    text = tokenizer.decode(ids)
    separator = tokenizer.token(tokenizer.separator)
    special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    pieces = text.split(separator)
    again: list[int] = []
    for number, encoded in enumerate(tokenizer.encode(pieces)):
        again += [tokenizer.separator] * bool(number) + encoded.tolist()
    if again != ids or any(token in piece for token in special for piece in pieces):
        place = next((i for i, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), min(len(ids), len(again)))
        raise unusable(
            "the text of a row",
            ids,
            f"its tokenizer makes other tokens of it, from token {place} on",
            text=printable(tokenizer.decode(ids[max(place - 4, 0) : place + 4]), 60),
            perhaps="the row begins or ends inside a character, or the text spells a special token; `send: ids` "
            "has no such limits",
        )
    return text


class _Spelling:
    """Compares the strings that a server shows for tokens with the tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.unreadable = 0
        self._known: dict[int, tuple[frozenset[str], bool]] = {}

    def of(self, token: int) -> str:
        """How the vocabulary spells it."""
        return self.tokenizer.token(token)

    def difference(self, said: list[str], ids: list[int]) -> tuple[int, str] | None:
        """The first place where a string cannot be our token's, and the string."""
        for place, (string, token) in enumerate(zip(said, ids, strict=True)):
            spellings, is_part = self._spellings(token)
            if not is_part and string not in spellings and string != f"token_id:{token}":
                return place, string
        return None

    def count(self, ids: list[int]) -> None:
        """Count the tokens of a row that no string can tell."""
        self.unreadable += sum(self._spellings(token)[1] for token in ids)

    def _spellings(self, token: int) -> tuple[frozenset[str], bool]:
        """The strings that servers may show for a token; True if it is a part of a character, which has none."""
        if token not in self._known:
            self._known[token] = self._look(token)
        return self._known[token]

    def _look(self, token: int) -> tuple[frozenset[str], bool]:
        raw = self.of(token)
        added = self.tokenizer.backend.get_added_tokens_decoder().get(token)
        if added is not None:
            return frozenset({raw, ""} if added.special else {raw}), False
        try:
            text = self.tokenizer.spelling[token].decode()
        except UnicodeDecodeError:
            return frozenset({raw}), True
        except TokenizerError:  # not byte-level
            plain = raw.replace("▁", " ")
            return frozenset({raw, plain, plain.lstrip(" ")}), raw.startswith("<0x")
        return frozenset({raw, text}), False


# --- the line to the server


class _RefusedError(ModelError):
    """A request that the server does not take."""

    def __init__(self, status: int, summary: str, facts: Mapping[str, object], remedy: str) -> None:
        super().__init__(summary, facts=facts, remedy=remedy)
        self.status = status


class _Line:
    """A client, and a thread whose event loop does its requests; it ends with its owner or with the program."""

    def __init__(self, model: ServerModel, concurrency: int) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise MissingExtraError("server", "httpx") from error
        self.url = _checked_url(model.server)
        self.concurrency = concurrency
        self._key_env = model.key_env
        self._key = _key_from(model.key_env)
        self._request_errors = httpx.RequestError
        client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(_TIMEOUT, connect=30, pool=None),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            follow_redirects=False,
        )
        self._client = client
        self._under_way = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(self._loop, client), name="miniplm-server", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _stop, self._loop, thread)

    def begin(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin some work; its Future is cancelled if the line is closed."""
        if not self.close.alive:
            work.close()
            raise ModelError(f"the connection to {self.url} has been closed.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def post(self, body: Mapping[str, Any], give_up: Any = lambda: None) -> Mapping[str, Any]:
        """The server's answer to one request; `give_up` is called before each try and may raise.

        Raises:
            ModelError: the server refuses, or does not answer in `_TRIES` tries.

        """
        async with self._under_way:
            for tries in range(1, _TRIES + 1):
                give_up()
                wait: float | None = None
                try:
                    response = await self._client.post(f"{self.url}/completions", json=body)
                except self._request_errors as error:
                    problem = f"{type(error).__name__} {self._shown(str(error))}".strip()
                else:
                    if response.status_code == 200:
                        return self._read(response)
                    if response.status_code not in _BUSY:
                        raise self._refused(response)
                    problem = f"{response.status_code}: {self._message(response)}"
                    wait = _seconds(response.headers.get("Retry-After"))
                if tries < _TRIES:
                    longest = min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT)
                    jittered = longest * random.uniform(0.5, 1)  # noqa: S311 (no secret)
                    await asyncio.sleep(jittered if wait is None else min(wait, _LONGEST_WAIT))
        raise ModelError(
            f"the server does not answer; it was asked {_TRIES} times.",
            facts={"server": self.url, "last": problem},
            remedy="What has been answered is kept: run the same command again when the server is well. If it fails "
            "on every request, it may take no token ids: `send: text`.",
        )

    def _read(self, response: httpx.Response) -> Mapping[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ModelError(
                "the server's answer is not JSON.",
                facts={"server": self.url, "found": self._shown(response.text)},
                remedy="`server:` is the base URL, with /v1: http://localhost:8000/v1",
            )
        return answer

    def _refused(self, response: httpx.Response) -> _RefusedError:
        status = response.status_code
        facts = {"server": self.url, "status": status, "message": self._message(response)}
        if status in (401, 403):
            whether = "is set, but is not accepted" if self._key else "is not set"
            remedy = f"The key is looked for in the environment variable {self._key_env}, which {whether}."
        elif 300 <= status < 400:
            remedy = "Redirects are not followed, so that the key goes nowhere else; name the final URL as `server:`."
        else:
            remedy = (
                "Look at `server`, `model`, and whether a row fits its context; one that takes no ids: `send: text`."
            )
        return _RefusedError(status, "the server refuses the request.", facts, remedy)

    def _message(self, response: httpx.Response) -> str:
        """What a server says of an error, in one of the usual shapes."""
        try:
            said = response.json()
        except ValueError:
            said = response.text
        for name in ("error", "message", "detail"):
            if isinstance(said, dict) and said.get(name):
                said = said[name]
        return self._shown(said if isinstance(said, str) else json.dumps(said))

    def _shown(self, text: str) -> str:
        return printable(text.replace(self._key, "***") if self._key else text, 200)


def _run(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """The thread: serve until stopped, then give up what is left and close."""
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(_end(client))
        loop.close()


async def _end(client: httpx.AsyncClient) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # the last reference may go there
        thread.join()


def _checked_url(url: str) -> str:
    """The base URL without a slash at the end. Raises RecipeError if it holds more than a place."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    shown = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
    if parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError(
            f"the server's URL holds more than a place: {shown} is what it may say.",
            remedy="A key belongs in the environment, in the variable that `key_env` names.",
        )
    if not host:
        raise RecipeError(f"{printable(url, 80)!r} is no URL of a server.", remedy="Like http://localhost:8000/v1")
    return url.rstrip("/")


def _key_from(variable: str) -> str:
    """The key, or "". Raises RecipeError, which does not show it, if it cannot stand in a header."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise RecipeError(f"the key in the environment variable {variable} has characters that no key has.")
    return key


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; None if it is not there, or is a date."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
