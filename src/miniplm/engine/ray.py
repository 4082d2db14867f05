"""The Ray engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from miniplm.engine.base import Advance, Item, Result
from miniplm.recipe import RaySettings


class RayEngine:
    """Workers on the machines of a Ray cluster."""

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings

    def run(
        self, make_worker: Callable[[Advance], Callable[[Item], Result]], items: Iterable[Item], advance: Advance
    ) -> Iterator[Result]:
        """See `Engine.run`."""
        raise NotImplementedError
