"""A recipe from a YAML file, or from text, and `--set a.b=value` overrides; a study is a recipe with a grid and seeds.

    seeds: 5                                   # or a list: of every student and every random selection
    grid:
      select.*.ratio: [0.25, 0.5]              # `*` is every entry
      reference: {half: {preset: qwen-0.5m, tokens: 1e6}, same: {preset: qwen-1m, tokens: 1e6}}   # values with names

A study stands for one recipe for each seed and each combination of values.

Promised: an unknown key, a wrong type or an impossible combination is a `RecipeError` that names the key, the line of
the file, what was found and the nearest valid name.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from miniplm.errors import RecipeError
from miniplm.recipe.base import At, nearest
from miniplm.recipe.dialect import Dumper, Loader
from miniplm.recipe.settings import Recipe
from miniplm.recipe.training import StudentSettings

_SHORT_FORMS = {"objective": "name", "from": "model"}  # settings that a bare name stands for: the key it is short for
_STUDY = ("grid", "seeds")
_BY_SEEDS = "`seeds:`"
_Changed = dict[tuple[str, ...], str]  # keys whose values are not those of the text -> what set them, for messages


@dataclass(frozen=True, slots=True)
class Variant:
    """One recipe of a study: the `seed`, and which value each key of the grid has, by the value's name."""

    seed: int | None
    point: Mapping[str, str]
    recipe: Recipe

    @property
    def place(self) -> dict[str, str]:
        """What tells it from the others: `{"seed": "3", "select.*.ratio": "0.5"}`."""
        return {**({} if self.seed is None else {"seed": str(self.seed)}), **self.point}


@dataclass(frozen=True, slots=True)
class Study:
    """Recipes that differ in seeds and in the keys of a grid.

    Attributes:
        name: of the study.
        variants: one seed after the other, each with every combination of the grid's values.
        text: the study as YAML, overrides applied.

    """

    name: str
    variants: tuple[Variant, ...]
    text: str


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides of the form `select.difference.ratio=0.4` (values are YAML).

    Raises:
        RecipeError: the file cannot be read or does not describe a recipe.

    """
    return parse(_read(path), name=str(path), overrides=overrides)


def parse(text: str, *, name: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Make a recipe of YAML text; `name` is what errors call it. Raises `RecipeError` as `load` does."""
    source = _Source(text, name, overrides)
    if found := [key for key in _STUDY if key in source.raw]:
        raise RecipeError(
            f"{name} is a study: it has `{found[0]}:`, and stands for several recipes.",
            remedy="Run it with `miniplm study`; `miniplm cost` tells what it takes, and what of it is left to make.",
        )
    return source.recipe(source.raw)


def load_study(path: Path | str, overrides: Iterable[str] = ()) -> Study:
    """Read a study. Raises `RecipeError` as `load` does, and if the file has neither `grid:` nor `seeds:`."""
    return parse_study(_read(path), name=str(path), overrides=overrides)


def parse_study(text: str, *, name: str = "study", overrides: Iterable[str] = ()) -> Study:
    """Make a study of YAML text, as `load_study` does."""
    source = _Source(text, name, overrides)
    base = {key: value for key, value in source.raw.items() if key not in _STUDY}
    if len(base) == len(source.raw):
        raise RecipeError(
            f"{name} is no study: it has neither `grid:` nor `seeds:`.", remedy="Run it with `miniplm run`."
        )
    variants = []
    for seed in _seeds(source.raw.get("seeds")):
        for point in _points(source.raw.get("grid", {})):
            raw, changed = copy.deepcopy(base), dict(source.changed)
            for key, (_, value) in point.items():
                whose, steps = f"{source.place('grid', key)}, grid key `{key}`", tuple(key.split("."))
                _check_entry(raw, steps, whose)
                _change(raw, steps, value, whose, changed)
            for path in _seeded(raw) if seed is not None else ():
                _change(raw, path, seed, f"{source.place('seeds')}, {_BY_SEEDS}", changed)
            named = {key: label for key, (label, _) in point.items()}
            variants.append(Variant(seed, named, source.recipe(raw, changed)))
    written = yaml.dump(source.raw, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return Study(variants[0].recipe.name, tuple(variants), written)


def recipes_of(path: Path | str, overrides: Iterable[str] = ()) -> tuple[str, list[Recipe]]:
    """The name of a recipe or study, and the recipes that it stands for. Raises `RecipeError` as `load` does."""
    name, variants = variants_of(path, overrides)
    return name, [variant.recipe for variant in variants]


def variants_of(path: Path | str, overrides: Iterable[str] = ()) -> tuple[str, list[Variant]]:
    """As `recipes_of`, each with its seed and its point of the grid; a recipe that is no study is its only variant."""
    text, overrides = _read(path), list(overrides)
    if _Source(text, str(path), overrides).raw.keys() & set(_STUDY):
        study = parse_study(text, name=str(path), overrides=overrides)
        return study.name, list(study.variants)
    recipe = parse(text, name=str(path), overrides=overrides)
    return recipe.name, [Variant(None, {}, recipe)]


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error


class _Source:
    """YAML text with overrides applied (`raw`), and what is needed to say where in it an error is."""

    def __init__(self, text: str, name: str, overrides: Iterable[str]) -> None:
        try:
            self.tree = yaml.compose(text, Loader=Loader)
            raw = yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{name} is not YAML: {error}") from error
        if not isinstance(raw, dict):
            raise RecipeError(f"{name} is not a recipe.", facts={"expected": "a mapping that begins with `schema: 1`"})
        if "schema" not in raw:
            raise RecipeError(
                f"{name} does not say which schema it is written in.", remedy="Begin it with `schema: 1`."
            )
        self.name, self.raw = name, raw
        self.changed: _Changed = {}
        for override in overrides:
            path, value = _parsed(override)
            for there in _put(raw, path, value, f"--set {override!r}"):
                self.changed[there] = f"{name} with --set {'.'.join(path)}"

    def place(self, *path: str) -> str:
        """Where a key of the text is, for messages."""
        assert self.tree is not None
        if any(changed[0] == path[0] for changed in self.changed):
            return f"{self.name} with --set {path[0]}"
        return f"{self.name}, line {_locate(path, self.tree)[1].start_mark.line + 1}"

    def recipe(self, raw: dict[str, Any], changed: _Changed | None = None) -> Recipe:
        """The recipe; `changed` are the keys whose values are not those of the text."""
        try:
            return Recipe.model_validate(raw)
        except ValidationError as error:
            assert self.tree is not None
            raise _explain(error, raw, self.tree, self.name, self.changed if changed is None else changed) from error


def _seeds(given: object) -> list[int | None]:
    if given is None:
        return [None]
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return list(range(given))
    if isinstance(given, list) and given and all(type(seed) is int for seed in given) and len(set(given)) == len(given):
        return list(given)
    raise RecipeError(
        "`seeds:` is no number of seeds and no list of different ones.", facts={"found": _short(given, "seeds")}
    )


def _points(grid: object) -> Iterator[dict[str, tuple[str, Any]]]:
    """Every combination of the grid's values: key -> (the value's name, the value)."""
    if not isinstance(grid, dict) or not all(isinstance(v, list | dict) and v for v in grid.values()):
        raise RecipeError(
            "`grid:` is no mapping of keys to values.",
            facts={"expected": "grid: {select.*.ratio: [0.25, 0.5]}, or names: {reference: {small: {...}, ...}}"},
        )
    named = []
    for key, values in grid.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise RecipeError(f"grid key `{key}` is not of the form key.key.")
        pairs = values.items() if isinstance(values, dict) else ((value, value) for value in values)
        named.append([(str(label), value) for label, value in pairs])
        labels = [label for label, _ in named[-1]]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise RecipeError(f"grid key `{key}` has the value {twice} twice.")
    for point in itertools.product(*named):
        yield dict(zip(grid, point, strict=True))


def _seeded(raw: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The seed of every student and of every random selection."""
    for section in ("students", "select"):
        entries = raw.get(section)
        for name, entry in list(entries.items()) if isinstance(entries, dict) else ():
            if isinstance(entry, dict) and (section == "students" or entry.get("sampler") == "random"):
                yield section, name, "seed"


def _parsed(override: str) -> tuple[tuple[str, ...], object]:
    """`key.key=value`, with the value as YAML."""
    key, equals, value = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {override!r} is not of the form key.key=value.")
    try:
        return path, yaml.load(value, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error


def _check_entry(raw: Mapping[str, Any], path: tuple[str, ...], whose: str) -> None:
    """Refuse a key below an entry with a name of its own (`select.<name>.ratio`) that the recipe does not have."""
    for depth in range(1, len(path) - 1):
        entries, name = _dig(raw, path[:depth]), path[depth]
        if name == "*" or not _has_named_entries(path[:depth]) or not isinstance(entries, dict) or name in entries:
            continue
        section = ".".join(path[:depth])
        raise RecipeError(
            f"{whose}: `{section}` has no `{name}`.",
            facts={"found": name, "expected": f"one of: {', '.join(map(str, entries))}"},
            remedy=nearest(name, map(str, entries)) or f"Write `{section}.{name}` in the recipe, for the grid to vary.",
        )


def _has_named_entries(path: tuple[str, ...]) -> bool:
    """Whether the keys of this section are names that a recipe chooses: `select`, `evaluate.documents`."""
    kind: Any = Recipe
    for step in path:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or step not in kind.model_fields:
            return False
        kind = kind.model_fields[step].annotation
    return get_origin(kind) is dict


def _change(raw: dict[str, Any], path: tuple[str, ...], value: object, by: str, changed: _Changed) -> None:
    """Set a key, or with `*` the key of every entry, and note it; what was set before may not be lost."""
    for there in list(_put(raw, path, value, by)):
        if (lost := next((old for old in changed if old[: len(there)] == there), None)) is not None:
            raise RecipeError(
                f"`{'.'.join(lost)}` is set twice.",
                facts={"by": changed[lost], "and by": by},
                remedy="Leave one of them out.",
            )
        changed[there] = by


def _put(raw: dict[str, Any], path: tuple[str, ...], value: object, whose: str) -> Iterator[tuple[str, ...]]:
    """Set a key, or with `*` the key of every entry; yields what was set."""
    step, rest = path[0], path[1:]
    if step == "*":
        if not raw:
            raise RecipeError(f"{whose}: `*` stands for every entry, and there is none.")
        for name in list(raw):
            yield from _put(raw, (name, *rest), value, whose)
        return
    if not rest:
        raw[step] = copy.deepcopy(value)
        yield path
        return
    inner = raw.get(step, {})
    if isinstance(inner, str) and step in _SHORT_FORMS:
        inner = {_SHORT_FORMS[step]: inner}
    if not isinstance(inner, dict):
        raise RecipeError(f"{whose}: `{step}` is {inner!r}, which has no keys of its own.")
    raw[step] = dict(inner)  # a copy: with YAML aliases it may stand elsewhere too
    for below in _put(raw[step], rest, value, whose):
        yield (step, *below)


def _explain(
    error: ValidationError, raw: Mapping[str, Any], tree: yaml.Node, name: str, changed: _Changed
) -> RecipeError:
    """The first of pydantic's complaints as an error of ours, with the place in the file."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    cause = first.get("ctx", {}).get("error")
    inner = cause.path if isinstance(cause, At) else ()
    path, node = _locate((*first["loc"], *inner), tree, changed)
    dotted = ".".join(path)
    setters = [
        by
        for there, by in changed.items()
        if path[: len(there)] == there or (there[: len(path)] == path and not by.endswith(_BY_SEEDS))
    ]  # a seed is no reason to complain of the student that it is given to
    where = setters[-1] if setters else f"{name}, line {node.start_mark.line + 1}"
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
    loc: tuple[int | str, ...], tree: yaml.Node, changed: Collection[tuple[str, ...]] = ()
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
        elif step == loc[-1] or any(o[: len(path) + 1] == (*path, step) for o in changed):
            node = yaml.ScalarNode("", "")  # a key that is not in the file; what is below it is not in the file either
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
