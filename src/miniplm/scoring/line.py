"""The line to a completions server: an HTTP client with a thread of its own; the only file that imports `httpx`.

In: the JSON of a request. Out: the JSON of its answer, whatever that says; at most `concurrency` requests are under
way. The URL and the key are looked at before anything is asked.

Promised: a busy or failing server is asked again, later and later, until it has been asked `_TRIES` times, or
`_FIRST_TRIES` times what the caller says is its first request. What a server refuses is told at once.
Redirects are not followed: the key stays. It is in no message, whatever the server sends back.
The thread ends with its owner or with the program.

Not covered: what an answer means (`completions`); a `Retry-After` that is a date, which is taken for none.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
import weakref
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from miniplm.errors import MissingExtraError, ModelError, RecipeError
from miniplm.progress import printable
from miniplm.recipe import ServerModel

if TYPE_CHECKING:
    import httpx

_T = TypeVar("_T")

_TRIES = 8
_FIRST_TRIES = 3  # of a first request: some servers answer 500 to what they do not take, which is to be told soon
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds; doubled from one try to the next
_TIMEOUT = 600.0  # seconds without a byte of the answer; a request may wait in the server's own queue
_BUSY = {429, 500, 502, 503, 504}


class RefusedError(ModelError):
    """A request that the server does not take."""

    def __init__(self, status: int, summary: str, facts: Mapping[str, object], remedy: str) -> None:
        super().__init__(summary, facts=facts, remedy=remedy)
        self.status = status
        self._made_of = (status, summary, facts, remedy)

    def __reduce__(
        self,
    ) -> tuple[type[RefusedError], tuple[int, str, Mapping[str, object], str]]:  # workers send it back
        return RefusedError, self._made_of


class Line:
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

    async def post(
        self, body: Mapping[str, Any], give_up: Any = lambda: None, *, first: bool = False
    ) -> Mapping[str, Any]:
        """The server's answer to one request; `give_up` is called before each try and may raise.

        Raises:
            ModelError: the server refuses, or does not answer in `_TRIES` tries; `_FIRST_TRIES` if it is the `first`.

        """
        tries = _FIRST_TRIES if first else _TRIES
        async with self._under_way:
            for number in range(1, tries + 1):
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
                if number < tries:
                    longest = min(_FIRST_WAIT * 2 ** (number - 1), _LONGEST_WAIT)
                    jittered = longest * random.uniform(0.5, 1)  # noqa: S311 (no secret)
                    await asyncio.sleep(jittered if wait is None else min(wait, _LONGEST_WAIT))
        raise ModelError(
            f"the server does not answer; it was asked {tries} times.",
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

    def _refused(self, response: httpx.Response) -> RefusedError:
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
        return RefusedError(status, "the server refuses the request.", facts, remedy)

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
