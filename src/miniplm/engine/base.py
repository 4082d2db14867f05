"""What an engine is: something that calls a function once for every item, in any order, anywhere.

The function commits its own result to disk and must be safe to call again: the committed shard is the only state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs a function over many shards."""

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Call `function` for each item and yield the results as they come; its exceptions are raised here."""
