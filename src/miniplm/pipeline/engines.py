"""Engines by the names that recipes use."""

from __future__ import annotations

from miniplm.engine.base import Engine
from miniplm.engine.local import LocalEngine
from miniplm.recipe import Compute


def engine_of(compute: Compute, *, model: bool = True) -> Engine:
    """The engine that `compute.engine` names; `model` says whether workers run one, and so want a GPU."""
    if compute.engine == "ray":
        from miniplm.engine.ray import RayEngine

        return RayEngine(compute.ray, model)
    return LocalEngine()
