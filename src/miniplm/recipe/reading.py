"""A recipe from a YAML file, or from text, and `--set a.b=value` overrides.

Promised: an unknown key, a wrong type or an impossible combination is a `RecipeError` that names the key, the line of
the file, what was found and the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from miniplm.errors import RecipeError
from miniplm.recipe.base import At, nearest
from miniplm.recipe.dialect import Loader
from miniplm.recipe.settings import Recipe
from miniplm.recipe.training import StudentSettings

_SHORT_FORMS = {"objective": "name", "from": "model"}  # settings that a bare name stands for: the key it is short for


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides of the form `select.difference.ratio=0.4` (values are YAML).

    Raises:
        RecipeError: the file cannot be read or does not describe a recipe.

    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    return parse(text, name=str(path), overrides=overrides)


def parse(text: str, *, name: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Make a recipe of YAML text; `name` is what errors call it. Raises `RecipeError` as `load` does."""
    try:
        tree = yaml.compose(text, Loader=Loader)
        raw = yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{name} is not a recipe.", facts={"expected": "a mapping that begins with `schema: 1`"})
    if "schema" not in raw:
        raise RecipeError(f"{name} does not say which schema it is written in.", remedy="Begin it with `schema: 1`.")
    overridden: set[tuple[str, ...]] = set()
    for override in overrides:
        overridden.add(_apply(raw, override))
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        assert tree is not None
        raise _explain(error, raw, tree, name, overridden) from error


def _apply(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    key, equals, value = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {override!r} is not of the form key.key=value.")
    try:
        parsed = yaml.load(value, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
    target = raw
    for step in path[:-1]:
        inner = target.setdefault(step, {})
        if isinstance(inner, str) and step in _SHORT_FORMS:
            inner = {_SHORT_FORMS[step]: inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r}: `{step}` is {inner!r}, which has no keys of its own.")
        target[step] = target = dict(inner)  # a copy: with YAML aliases it may stand elsewhere too
    target[path[-1]] = parsed
    return path


def _explain(
    error: ValidationError, raw: Mapping[str, Any], tree: yaml.Node, name: str, overridden: set[tuple[str, ...]]
) -> RecipeError:
    """The first of pydantic's complaints as an error of ours, with the place in the file."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    cause = first.get("ctx", {}).get("error")
    inner = cause.path if isinstance(cause, At) else ()
    path, node = _locate((*first["loc"], *inner), tree, overridden)
    dotted = ".".join(path)
    where = f"{name}, line {node.start_mark.line + 1}"
    if any(path[: len(o)] == o or o[: len(path)] == path for o in overridden):
        where = f"{name} with --set {dotted}"
    if first["type"] == "extra_forbidden":
        valid = sorted(_valid_names(first["loc"][:-1]))
        return RecipeError(
            f"{where}: unknown key `{path[-1]}`{' in ' + '.'.join(path[:-1]) if len(path) > 1 else ''}.",
            facts={"found": _short(first["input"], path[-1]), "expected": f"one of: {', '.join(valid)}"},
            remedy=nearest(path[-1], valid),
        )
    if first["type"] == "missing":
        return RecipeError(f"{where}: `{dotted}` is missing.", remedy="Add it; it has no default.")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    found = _dig(raw, path)
    facts = {"found": repr(found)} if path and not isinstance(found, Mapping) else {}
    what = f"`{dotted}`" if path else "the recipe"
    return RecipeError(f"{where}: {what} cannot be used.", facts={**facts, "because" if inner else "expected": message})


def _dig(raw: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        raw = raw.get(step) if isinstance(raw, Mapping) else None
    return raw


def _locate(
    loc: tuple[int | str, ...], tree: yaml.Node, overridden: Iterable[tuple[str, ...]] = ()
) -> tuple[tuple[str, ...], yaml.Node]:
    """Follow pydantic's location into the YAML tree; steps that are no keys of the file (tags) are left out."""
    path: list[str] = []
    node = tree
    mark = tree
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if found is not None:
                mark, node = found
                path.append(str(step))
                continue
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            mark = node = node.value[step]
        elif step == loc[-1] or any(o[: len(path) + 1] == (*path, step) for o in overridden):
            node = yaml.ScalarNode("", "")  # a key that came with --set; what is below it is not in the file either
            path.append(str(step))
    return tuple(path), mark


def _valid_names(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid in the mapping at pydantic's location; of several classes it names the one by its tag."""
    model: type[BaseModel] = Recipe
    models: list[type[BaseModel]] = []
    open_mapping = False
    for step in loc:
        if open_mapping:
            open_mapping = False
            continue
        if len(models) > 1 and (tagged := [m for m in models if m.__name__ == step]):
            models, model = tagged, tagged[0]
            continue
        field = next((f for n, f in model.model_fields.items() if step in (n, f.alias)), None)
        models = [] if field is None else _models_in(field.annotation)
        if field is None or not models:
            return []
        model = models[-1]
        open_mapping = getattr(field.annotation, "__origin__", None) is dict
    return [f.alias or n for n, f in model.model_fields.items()] + (["like"] if model is StudentSettings else [])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models_in(inner)]


def _short(value: object, key: str) -> str:
    text = f"{key}: {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."
