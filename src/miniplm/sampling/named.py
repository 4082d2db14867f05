"""Samplers by the names that recipes and the command line use, or as `package.module:Class`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from miniplm.artifact import Identity
from miniplm.errors import RecipeError
from miniplm.recipe import SamplerSettings
from miniplm.sampling.base import VERSION, Sampler
from miniplm.sampling.baselines import RandomSampling, ReferenceDifficulty, TeacherPreference
from miniplm.sampling.difference import DifferenceSampling, RelativeSampling

SAMPLERS: Mapping[str, type[Any]] = {
    "difference": DifferenceSampling,
    "relative": RelativeSampling,
    "random": RandomSampling,
    "teacher": TeacherPreference,
    "reference": ReferenceDifficulty,
}


def sampler_from(settings: SamplerSettings) -> Sampler:
    """The sampler that the settings describe.

    Raises:
        RecipeError: there is no such sampler, or a setting was given that it does not have.

    """
    made: Sampler
    given = {name: getattr(settings, name) for name in settings.model_fields_set - {"sampler"}}
    if ":" in settings.sampler:
        try:
            made = _import(settings.sampler)(**given)
        except TypeError as error:
            raise RecipeError(
                f"the sampler {settings.sampler!r} refuses its settings.", facts={"because": error}
            ) from error
        if not getattr(made, "needs", {""}) <= {"teacher", "reference", "pool"}:
            raise RecipeError(f"{settings.sampler!r} does not say what it `needs`: of teacher, reference and pool.")
        return made
    if (kind := SAMPLERS.get(settings.sampler)) is None:
        close = difflib.get_close_matches(settings.sampler, list(SAMPLERS), n=1)
        raise RecipeError(
            f"there is no sampler {settings.sampler!r}.",
            facts={"samplers": ", ".join(SAMPLERS)},
            remedy=f"Did you mean {close[0]!r}?" if close else 'Or name a class of yours: "package.module:Class".',
        )
    known = {field.name for field in fields(kind)}
    for name in given:
        if name not in known:
            raise RecipeError(
                f"the sampler {settings.sampler!r} has no setting {name!r}.", facts={"has": ", ".join(sorted(known))}
            )
    made = kind(**given)
    return made


def needs_with_proxy(name: str, sampler: Sampler) -> frozenset[str]:
    """What a sampler reads where a proxy predicts the difference: `pool`, or the predicted `difference`.

    Raises:
        RecipeError: it needs scores of the whole pool, and there are none.

    """
    if hasattr(sampler, "select_predicted"):
        return frozenset({"difference"})
    if sampler.needs <= {"pool"}:
        return sampler.needs
    raise RecipeError(
        f"the sampler {name!r} cannot be used with a proxy.",
        facts={
            "it needs": f"the scores of the {' and the '.join(sorted(sampler.needs - {'pool'}))} on the whole pool",
            "there are": "theirs on a share of the pool, and a predicted difference for all of it",
        },
        remedy="Leave `proxy` out, or give the sampler a method `select_predicted(difference) -> Selection`.",
    )


def identity(name: str, sampler: Sampler, inputs: Mapping[str, str], needs: frozenset[str] | None = None) -> Identity:
    """What a selection is: the sampler, its settings, and the fingerprints of what it reads (None: its `needs`)."""
    settings = asdict(sampler) if is_dataclass(sampler) and not isinstance(sampler, type) else vars(sampler)
    read = {role: inputs[role] for role in sorted(sampler.needs if needs is None else needs)}
    return Identity("selection", VERSION, {"sampler": name, **settings}, read)


def _import(name: str) -> type[Any]:
    module, _, attribute = name.partition(":")
    try:
        found: type[Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"the sampler {name!r} cannot be imported.", facts={"because": error}) from error
    return found
