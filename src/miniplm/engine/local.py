"""The local engine: plain in-process work; the libraries underneath have threads of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from miniplm.engine.base import Advance, Item, Result


class LocalEngine:
    """One worker, in this process, for one item after the other."""

    def run(
        self, make_worker: Callable[[Advance], Callable[[Item], Result]], items: Iterable[Item], advance: Advance
    ) -> Iterator[Result]:
        """See `Engine.run`."""
        return map(make_worker(advance), items)
