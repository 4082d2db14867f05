"""The local engine: plain in-process work; the libraries underneath have threads of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from miniplm.engine.base import Item, Result


class LocalEngine:
    """Calls the function for one item after the other, in this process."""

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See `Engine.run`."""
        return map(function, items)
