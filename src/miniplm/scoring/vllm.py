"""A scorer of vLLM's offline engine."""

from __future__ import annotations

from miniplm.recipe import Compute, ScoreSettings, VllmModel
from miniplm.scoring.base import Scorer


def load(model: VllmModel, settings: ScoreSettings, compute: Compute) -> Scorer:
    """Load a model with vLLM."""
    raise NotImplementedError
