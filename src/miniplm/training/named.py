"""Objectives by the names that recipes use, and the teacher that some of them ask."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import PreTrainedModel

from miniplm.errors import RecipeError
from miniplm.models.head import check_head
from miniplm.models.load import check_length, check_reads, choose_device, load_model
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import (
    Compute,
    GivenModel,
    MiniLLMSettings,
    NextTokenSettings,
    OwnObjective,
    TrainSettings,
    VanillaKDSettings,
)
from miniplm.training.minillm import MiniLLM
from miniplm.training.objectives import NextToken, Objective, VanillaKD


def objective_from(
    settings: TrainSettings,
    teacher: PreTrainedModel | None,
    *,
    vocabulary: int,
    sequence_length: int,
) -> Objective:
    """Make the objective that the settings name.

    Args:
        settings: of the student.
        teacher: from `load_teacher`; None where the objective asks none.
        vocabulary: tokens of the tokenizer.
        sequence_length: T.

    Raises:
        RecipeError: the user's class cannot be found or made, or is no objective.

    """
    objective = settings.objective
    if isinstance(objective, NextTokenSettings):
        return NextToken()
    if isinstance(objective, OwnObjective):
        return own_objective(objective)
    assert teacher is not None
    if isinstance(objective, VanillaKDSettings):
        return VanillaKD(teacher, objective, vocabulary)
    return MiniLLM(teacher, objective, vocabulary=vocabulary, sequence_length=sequence_length, seed=settings.seed)


def load_teacher(
    settings: TrainSettings, given: GivenModel | None, tokenizer: Tokenizer, sequence_length: int, compute: Compute
) -> PreTrainedModel | None:
    """Load the teacher that the settings' objective asks; None if it asks none.

    Raises:
        RecipeError: no teacher was given.
        ModelError: it cannot be loaded, has fewer tokens than the tokenizer, or no linear head.
        TokenizerError: it was trained with another tokenizer.

    """
    if not isinstance(settings.objective, VanillaKDSettings | MiniLLMSettings):
        return None
    if given is None:
        raise RecipeError(
            f"the objective {settings.objective.name!r} asks a teacher, and none was given.",
            remedy="Say which: train(..., teacher=...), or --teacher.",
        )
    device = choose_device(compute.device)
    teacher = load_model(given, settings.objective.dtype, str(device))
    check_reads(given, teacher.config.get_text_config().vocab_size, tokenizer)
    check_length(teacher.config.to_dict(), sequence_length)
    check_head(teacher)
    return teacher.requires_grad_(False)


def own_objective(settings: OwnObjective) -> Objective:
    """Make the objective of the user's that the settings name.

    Raises:
        RecipeError: the class cannot be found or made, or is no objective.

    """
    module, _, name = settings.name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), name)(**(settings.model_extra or {}))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"the objective {settings.name!r} cannot be made.",
            facts={"because": str(error).splitlines()[0]},
            remedy="It must be `package.module:Class`, importable here, and take the other settings as arguments.",
        ) from error
    if not callable(getattr(made, "loss", None)):
        raise RecipeError(f"{settings.name!r} is no objective: it has no `loss(model, batch)`.")
    objective: Objective = made
    return objective
