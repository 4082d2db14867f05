"""A scorer behind an OpenAI-compatible server."""

from __future__ import annotations

from miniplm.recipe import Compute, ServerModel
from miniplm.scoring.base import Scorer


def connect(model: ServerModel, compute: Compute) -> Scorer:
    """Make a scorer of a served model."""
    raise NotImplementedError
