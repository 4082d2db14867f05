"""From a model's settings to its scorer: transformers, a server, or vLLM."""

from __future__ import annotations

from miniplm.errors import RecipeError
from miniplm.recipe import Compute, GivenModel, ScoredModel, ScoreSettings, ServerModel
from miniplm.scoring.base import Scorer


def load_scorer(model: ScoredModel, settings: ScoreSettings, compute: Compute) -> Scorer:
    """Load a model and make a scorer of it.

    Raises:
        ModelError: it cannot be loaded, reached or used.
        RecipeError: the settings are not for such a model.

    """
    if isinstance(model, GivenModel):
        from miniplm.scoring.huggingface import load

        return load(model, settings, compute)
    if isinstance(model, ServerModel):
        if settings.quantize != "none":
            raise RecipeError(
                "a server runs its model as it is: `quantize` cannot be asked of it.",
                remedy="Leave `quantize` out, or give the served model another `revision`.",
            )
        from miniplm.scoring.server import connect

        return connect(model, compute)
    from miniplm.scoring.vllm import load as load_vllm

    return load_vllm(model, settings, compute)
