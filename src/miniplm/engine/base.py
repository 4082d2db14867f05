"""What an engine is: something that calls a function once for every item, in any order, anywhere.

The function commits its own result to disk and must be safe to call again: the committed shard is the only state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Advance = Callable[[int], None]
"""Told how many units (bytes, tokens) have been done since it was last told."""


class Engine(Protocol):
    """Runs a function over many shards."""

    def run(
        self, make_worker: Callable[[Advance], Callable[[Item], Result]], items: Iterable[Item], advance: Advance
    ) -> Iterator[Result]:
        """Call a worker for each item and yield the results as they come; its exceptions are raised here.

        Args:
            make_worker: makes a worker: loads what it needs once, then is called with one item after the other. An
                engine may make several workers, on other machines; it and what it makes must then be picklable.
            items: what is worked on.
            advance: is told of progress: by the worker as it goes on, or when an item is done.

        """
