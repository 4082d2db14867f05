"""Engines by the names that recipes use."""

from __future__ import annotations

from miniplm.engine.base import Engine
from miniplm.engine.local import LocalEngine
from miniplm.recipe import Compute


def engine_of(compute: Compute) -> Engine:
    """The engine that `compute.engine` names."""
    if compute.engine == "ray":
        from miniplm.engine.ray import RayEngine

        return RayEngine(compute.ray)
    return LocalEngine()
