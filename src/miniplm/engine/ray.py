"""The Ray engine: workers on all machines of a Ray cluster.

In: items, and what makes a worker. Out: results as they come. Each worker is an actor: it loads its model once and is
then given one item after the other. The committed shard on a file system that all machines share is the only state, so
a worker may be lost at any moment: its item goes back into the queue. Machines that join are used within a second or
so. Nothing of Ray is left behind: actors end with the run, and so does a cluster that was started for it.

Not covered: sending files to the machines (the folder in which this was started must be there under the same name),
and going on after the machine is lost that this runs on; type the command again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from miniplm.engine.base import Advance, Item, Result
from miniplm.errors import EngineError, MissingExtraError, RecipeError
from miniplm.recipe import RaySettings

_LOOK_SECONDS = 1.0  # between two looks at how much room the cluster has
_CONNECT_SECONDS = 10.0
_LOSSES = 5  # workers that an item may lose, or that may end before they had one, until it is no accident
_NO_SUCH_MACHINE_SECONDS = 60.0  # no machine is large enough for a worker; one may be on its way
_NO_ROOM_SECONDS = 600.0  # others have all of the cluster


class RayEngine:
    """Workers on the machines of a Ray cluster.

    Args:
        settings: where it is and what a worker takes.
        model: whether workers run a model: only then does `gpus_per_worker: None` stand for a GPU.

    """

    def __init__(self, settings: RaySettings, model: bool = True) -> None:
        self.settings = settings
        self.model = model

    def run(
        self, make_worker: Callable[[Advance], Callable[[Item], Result]], items: Iterable[Item], advance: Advance
    ) -> Iterator[Result]:
        """See `Engine.run`; `advance` is told when an item is done.

        Raises:
            MissingExtraError: Ray is not installed.
            RecipeError: Ray refuses the settings.
            EngineError: the cluster cannot be reached or has no room, or an item lost one worker after the other.

        """
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("ray", "ray") from error
        tasks = [_Task(item) for item in items]
        if not tasks:
            return
        with _connection(ray, self.settings.address) as ours:
            crew: _Crew[Item, Result] = _Crew(ray, self.settings, self._takes(ray), make_worker, tasks, ours)
            try:
                yield from crew.results(advance)
            finally:
                crew.dismiss()

    def _takes(self, ray: Any) -> dict[str, float]:
        """What a worker takes, as Ray counts it."""
        gpus = self.settings.gpus_per_worker
        if gpus is None:
            gpus = 1 if self.model and ray.cluster_resources().get("GPU", 0) > 0 else 0
        return {"CPU": self.settings.cpus_per_worker, "GPU": gpus}


@dataclass
class _Task(Generic[Item]):
    item: Item
    losses: int = 0


@dataclass(frozen=True)
class _Call(Generic[Item]):
    """What an actor has been asked; without a task: whether it is there."""

    actor: Any
    task: _Task[Item] | None


class _Crew(Generic[Item, Result]):
    """The actors of one run and what is left to do."""

    def __init__(
        self,
        ray: Any,
        settings: RaySettings,
        takes: dict[str, float],
        make_worker: Callable[[Advance], Callable[[Item], Result]],
        tasks: list[_Task[Item]],
        closed: bool,
    ) -> None:
        self.ray = ray
        self.most = settings.workers
        self.takes = takes
        self.closed = closed  # no machine can join
        self.waiting = deque(tasks)
        self.calls: dict[Any, _Call[Item]] = {}
        self.stillborn = 0
        self.worked = self.looked = time.monotonic()
        self.actor_class = ray.remote(_Actor).options(
            num_cpus=takes["CPU"], num_gpus=takes["GPU"], max_restarts=0, max_task_retries=0
        )
        self.make_worker = ray.put(make_worker)

    def results(self, advance: Advance) -> Iterator[Result]:
        """Results as they come."""
        self._hire(self._wanted())
        while self.calls:
            done, _ = self.ray.wait(list(self.calls), timeout=_LOOK_SECONDS)
            for reference in done:
                call = self.calls[reference]
                try:
                    answer = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError as error:  # a worker or result that does not pickle, say
                    raise _noted(error.cause, str(error)) from None
                except self.ray.exceptions.RayError as error:
                    del self.calls[reference]
                    self._lost(call, error)
                    continue
                if isinstance(answer, _Raised):
                    raise answer.error()
                del self.calls[reference]
                self._next(call.actor)
                if call.task is not None:
                    advance(answer.amount)
                    yield answer.result
            if time.monotonic() - self.looked >= _LOOK_SECONDS:
                self._hire(self._wanted())
                self._refuse_to_wait_forever()

    def dismiss(self) -> None:
        """End all actors, at work or not."""
        for call in self.calls.values():
            self._end(call.actor)
        self.calls.clear()

    def _end(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is gone, or the cluster is
            self.ray.kill(actor)

    def _next(self, actor: Any) -> None:
        """Give an actor that is there its next item, or leave."""
        self.stillborn = 0
        if not self.waiting:
            self._end(actor)
            return
        task = self.waiting.popleft()
        self.calls[actor.work.remote(task.item)] = _Call(actor, task)

    def _at_work(self) -> int:
        return sum(call.task is not None for call in self.calls.values())

    def _wanted(self) -> int:
        """How many actors there should be, at work or on their way; never more than items are left."""
        self.looked = time.monotonic()
        at_work = self._at_work()
        if self.most is not None:
            wanted = self.most
        else:
            free = self.ray.available_resources()
            room = min(int(free.get(name, 0) / amount + 1e-6) for name, amount in self.takes.items() if amount)
            wanted = max(at_work + room, len(self.calls), 1)
        return min(wanted, at_work + len(self.waiting))

    def _hire(self, wanted: int) -> None:
        """Start actors, or let go of some that were not needed before they came."""
        for _ in range(len(self.calls), wanted):
            try:
                actor = self.actor_class.remote([self.make_worker], str(Path.cwd()), sys.path, self.takes["CPU"])
            except ValueError as error:
                because = " ".join("".join(error.args).split())
                raise RecipeError("Ray refuses what `compute.ray` asks for.", facts={"because": because}) from error
            self.calls[actor.there.remote()] = _Call(actor, None)
        waiting = [reference for reference, call in self.calls.items() if call.task is None]
        for reference in waiting[: max(0, len(self.calls) - wanted)]:
            self._end(self.calls.pop(reference).actor)

    def _lost(self, call: _Call[Item], error: Exception) -> None:
        """Put the item of a lost actor back, behind the others, and start another actor."""
        self._end(call.actor)  # if it is merely out of reach
        because = {"because": _because(error)}
        if call.task is None:
            self.stillborn += 1
            if self.stillborn >= _LOSSES:
                raise EngineError(
                    f"{self.stillborn} Ray workers in a row have ended before they had begun.",
                    facts=because,
                    remedy="The same miniplm must be installed on all machines, and this folder must be there too: "
                    + str(Path.cwd()),
                )
        else:
            call.task.losses += 1
            if call.task.losses >= _LOSSES:
                raise EngineError(
                    f"{call.task.losses} Ray workers have been lost at the same work, so it is given up.",
                    facts={"work": call.task.item, **because},
                    remedy="If they ran out of memory, lower compute.score_tokens, or raise cpus_per_worker so that "
                    "fewer share a machine.",
                )
            self.waiting.append(call.task)
        self._hire(min(len(self.calls) + 1, self._at_work() + len(self.waiting)))

    def _refuse_to_wait_forever(self) -> None:
        """Raise EngineError if for a while there has been no actor and no prospect of one."""
        if self._at_work():
            self.worked = time.monotonic()
            return
        waited = time.monotonic() - self.worked
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fits = any(all(found.get(name, 0) >= amount for name, amount in self.takes.items()) for found in machines)
        if waited < (_NO_ROOM_SECONDS if fits else 0 if self.closed else _NO_SUCH_MACHINE_SECONDS):
            return
        found = [_resources({name: machine.get(name, 0) for name in self.takes}) for machine in machines]
        free = self.ray.available_resources()
        raise EngineError(
            "the Ray cluster has no room for a worker."
            if fits
            else "no machine of the Ray cluster is large enough for a worker.",
            facts={
                "found": "; ".join(found[:8]) + ("; ..." if len(found) > 8 else ""),
                "free": _resources({name: free.get(name, 0) for name in self.takes}),
                "expected": f"{_resources(self.takes)} for a worker",
                "waited": f"{waited:.0f} s",
            },
            remedy="Lower compute.ray.cpus_per_worker or gpus_per_worker, or add machines.",
        )


class _Actor:
    """What runs in a process of its own on some machine: makes a worker when it has its first item."""

    def __init__(self, make_worker: list[Any], folder: str, modules: list[str], cpus: float) -> None:
        # Before anything with threads is imported; Ray itself sets OMP_NUM_THREADS to the whole CPUs of an actor.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, and for its reason
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, int(cpus))))  # the tokenizer's
        os.chdir(folder)  # paths may be relative
        sys.path.extend(path for path in modules if path not in sys.path)  # a scorer of the user's own, say
        self.make_worker = make_worker  # in a list, or Ray would unpickle it (and import torch) before this
        self.worker: Callable[[Any], Any] | None = None
        self.amount = 0

    def there(self) -> None:
        """Answered when the actor has been placed."""

    def work(self, item: Any) -> _Done | _Raised:
        """One item."""
        self.amount = 0
        try:
            if self.worker is None:
                import ray

                self.worker = ray.get(self.make_worker[0])(self._advance)
            return _Done(self.worker(item), self.amount)
        except Exception as error:
            return _Raised.of(error)

    def _advance(self, amount: int) -> None:
        self.amount += amount


@dataclass(frozen=True)
class _Done:
    """An item's result, and how much the worker said it advanced."""

    result: Any
    amount: int


@dataclass(frozen=True)
class _Raised:
    """An exception of a worker, pickled by itself: Ray would wrap it in one of its own."""

    pickled: bytes

    @classmethod
    def of(cls, error: Exception) -> _Raised:
        where = "in a Ray worker:\n" + "".join(traceback.format_exception(error))
        try:
            pickled = pickle.dumps(_noted(error, where))
            pickle.loads(pickled)  # noqa: S301 (our own; some exceptions pickle and do not come back)
        except Exception:
            told = EngineError(
                "a Ray worker raised an exception that cannot be sent.",
                facts={"type": type(error).__qualname__, "message": error},
            )
            pickled = pickle.dumps(_noted(told, where))
        return cls(pickled)

    def error(self) -> Exception:
        """The exception."""
        error: Exception = pickle.loads(self.pickled)  # noqa: S301 (from an actor of ours)
        return error


@contextlib.contextmanager
def _connection(ray: Any, address: str | None) -> Iterator[bool]:
    """Be connected; say whether the cluster is our own, which ends with this. A connection that is there is used."""
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        with warnings.catch_warnings(), _no_usage_statistics():
            warnings.simplefilter("ignore")  # Ray's announcements of what its next versions do
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"the Ray cluster {address!r} cannot be reached.",
            facts={"because": _because(error)},
            remedy="`ray status` says what is there; compute.ray.address or RAY_ADDRESS says where it is.",
        ) from error
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at an address with a port: Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


@contextlib.contextmanager
def _no_usage_statistics() -> Iterator[None]:
    """A cluster started in here reports nothing to anybody, unless the user has said otherwise."""
    name = "RAY_USAGE_STATS_ENABLED"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _noted(error: Exception, note: str) -> Exception:
    """The same exception; the note is shown below its traceback, not in its message."""
    error.add_note(note)
    return error


def _because(error: Exception) -> str:
    """What Ray says, without the paragraphs around it: of a traceback the last line, of an explanation the whole."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if any(line.startswith("File ") for line in lines) else " ".join(lines)[:400]


def _resources(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
