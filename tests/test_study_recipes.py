"""Studies: which recipes they stand for, what seeds and grids set and what they leave alone, and what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from miniplm.errors import RecipeError
from miniplm.recipe import Recipe, Study, load, load_study, parse, parse_study, recipes_of
from miniplm.recipe.reading import variants_of

RECIPE = """\
schema: 1
name: example
corpus: {files: "data/*.jsonl"}
prepare:
  tokenizer: {train: {vocab_size: 4096}}
  sequence_length: 256
  split: {reference: 0.1, teacher: 0.4, held_out: 0.02, seed: 7}
teacher: {preset: qwen-5m, tokens: 4e6, seed: 8}
reference: {preset: qwen-0.5m, tokens: 1e6, seed: 9}
select:
  difference: {sampler: difference, ratio: 0.5}
  random: {sampler: random, ratio: 0.5, seed: 4}
  chance: {sampler: random, within: source}
generate:
  written: {data: random, seed: 6}
students:
  miniplm: {preset: qwen-1m, data: difference, tokens: 2e6, learning_rate: 1e-4}
  control: {like: miniplm, data: random}
  other: {like: miniplm, data: chance, seed: 5}
"""
GRID = """\
grid:
  select.*.ratio: [0.25, 0.5]
  reference:
    small: {preset: qwen-0.5m, tokens: 1e6}
    same: {preset: qwen-1m, tokens: 1e6}
"""
STUDY = RECIPE + "seeds: 3\n" + GRID


def study(more: str, *overrides: str) -> Study:
    return parse_study(RECIPE + more, name="s.yaml", overrides=overrides)


def refused(more: str, *overrides: str) -> str:
    """The message with which a study is refused."""
    with pytest.raises(RecipeError) as error:
        study(more, *overrides)
    return str(error.value)


def line_of(text: str, needle: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if needle in line)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every setting of a recipe by its dotted key."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {key: inner for name, below in value.items() for key, inner in flat(below, f"{path}.{name}").items()}


def settings_of(recipe: Recipe) -> dict[str, Any]:
    return flat(yaml.safe_load(recipe.resolved()))


def changed(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """The settings of a recipe that another has not, or has otherwise."""
    ours, theirs = settings_of(recipe), settings_of(other)
    return {key: value for key, value in ours.items() if theirs.get(key) != value}


def test_each_seed_and_combination_is_there_once_and_seeds_come_outermost() -> None:
    found = parse_study(STUDY).variants
    expected = list(itertools.product([0, 1, 2], ["0.25", "0.5"], ["small", "same"]))
    assert [(one.seed, *one.point.values()) for one in found] == expected
    assert all(list(one.point) == ["select.*.ratio", "reference"] for one in found)
    assert len({one.recipe.resolved() for one in found}) == len(expected)


def test_a_variant_is_the_recipe_that_one_would_have_written_by_hand() -> None:
    for one in parse_study(STUDY).variants:
        preset = {"small": "qwen-0.5m", "same": "qwen-1m"}[one.point["reference"]]
        by_hand = re.sub(r"reference: \{preset.*\}", f"reference: {{preset: {preset}, tokens: 1e6}}", RECIPE)
        overrides = [
            f"select.{name}.ratio={one.point['select.*.ratio']}" for name in ("difference", "random", "chance")
        ]
        overrides += [f"students.{name}.seed={one.seed}" for name in ("miniplm", "control", "other")]
        overrides += [f"select.{name}.seed={one.seed}" for name in ("random", "chance")]
        assert one.recipe == parse(by_hand, overrides=overrides)


def test_a_seed_is_given_to_every_student_and_every_random_selection_and_to_nothing_else() -> None:
    base = parse(RECIPE)
    for one in study("seeds: [11, 12]\n").variants:
        assert changed(one.recipe, base) == {
            **{f".students.{name}.seed": one.seed for name in ("miniplm", "control", "other")},
            **{f".select.{name}.seed": one.seed for name in ("random", "chance")},
        }
        seeds = {key: value for key, value in settings_of(one.recipe).items() if key.endswith("seed")}
        assert {seeds[key] for key in (".prepare.split.seed", ".teacher.seed", ".reference.seed")} == {7, 8, 9}
        assert seeds[".generate.written.seed"] == 6
        assert ".select.difference.seed" not in seeds


@pytest.mark.parametrize(("seeds", "expected"), [("3", [0, 1, 2]), ("1", [0]), ("[5, 0, 17]", [5, 0, 17])])
def test_seeds_are_a_number_or_a_list(seeds: str, expected: list[int]) -> None:
    found = study(f"seeds: {seeds}\n")
    assert [one.seed for one in found.variants] == expected
    assert [one.point for one in found.variants] == [{}] * len(expected)


def test_without_seeds_those_of_the_recipe_stay() -> None:
    base = parse(RECIPE)
    for one in study(GRID).variants:
        assert one.seed is None
        assert not [key for key in changed(one.recipe, base) if "seed" in key and key != ".reference.seed"]


def test_a_star_reaches_every_entry_and_nothing_beside_them() -> None:
    base = parse(RECIPE)
    (one,) = study("grid:\n  select.*.ratio: [0.25]\n  students.*.learning_rate: [1e-3]\n").variants
    expected = {f".select.{name}.ratio": 0.25 for name in base.select}
    assert changed(one.recipe, base) == expected | {f".students.{name}.learning_rate": 1e-3 for name in base.students}


def test_a_star_of_an_override_reaches_every_entry_too() -> None:
    recipe = parse(RECIPE, overrides=["select.*.ratio=0.1"])
    assert {one.ratio for one in recipe.select.values()} == {0.1}
    with pytest.raises(RecipeError, match=r"with --set select\.\*\.ratio: `select\.difference\.ratio`"):
        parse(RECIPE, overrides=["select.*.ratio=1.5"])


def test_a_value_that_stands_twice_by_an_alias_is_set_once_for_each_variant() -> None:
    """With aliases two keys are one object to YAML; setting one must not set the other."""
    text = RECIPE.replace("teacher: {", "teacher: &one {").replace(
        "reference: {preset: qwen-0.5m, tokens: 1e6, seed: 9}", "reference: *one"
    )
    found = parse_study(text + "grid: {teacher.tokens: [1, 2]}\n").variants
    assert [(one.recipe.teacher.tokens, one.recipe.reference.tokens) for one in found] == [(1, 4e6), (2, 4e6)]  # type: ignore[union-attr]


def test_a_later_key_may_reach_into_an_earlier_one() -> None:
    found = study("grid:\n  reference: {a: {preset: qwen-1m, tokens: 5}}\n  reference.tokens: [6, 7]\n").variants
    assert [one.recipe.reference.tokens for one in found] == [6, 7]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ("[0.25, 0.5]", ["0.25", "0.5"]),
        ("{low: 0.25, high: 0.5}", ["low", "high"]),
        ("{1: 0.25, 2: 0.5}", ["1", "2"]),
    ],
)
def test_a_value_is_called_by_its_name_if_it_has_one(values: str, labels: list[str]) -> None:
    found = study(f"grid: {{select.difference.ratio: {values}}}\n").variants
    assert [one.point for one in found] == [{"select.difference.ratio": label} for label in labels]
    assert [one.recipe.select["difference"].ratio for one in found] == [0.25, 0.5]


def test_an_override_reaches_the_recipe_and_the_study_itself() -> None:
    found = parse_study(STUDY, overrides=["seeds=2", "teacher.tokens=77", "grid.reference={a: {preset: x, tokens: 1}}"])
    assert [one.seed for one in found.variants] == [0, 0, 1, 1]
    assert {one.recipe.teacher.tokens for one in found.variants} == {77}  # type: ignore[union-attr]
    assert {one.point["reference"] for one in found.variants} == {"a"}


def test_the_text_of_a_study_is_that_study() -> None:
    text = STUDY.replace("name: example", 'name: "12e4567"')
    found = parse_study(text, overrides=["seeds=[3, 1]", "teacher.tokens=77"])
    assert found.name == "12e4567"
    assert parse_study(found.text) == found


def test_a_recipe_and_a_study_are_told_apart_with_the_verb_that_takes_them(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(RECIPE)
    (tmp_path / "study.yaml").write_text(STUDY)
    with pytest.raises(RecipeError, match=r"(?s)study\.yaml is a study: it has `grid:`.*`miniplm study`"):
        load(tmp_path / "study.yaml")
    with pytest.raises(RecipeError, match=r"(?s)it has `seeds:`.*`miniplm study`.*`miniplm cost`"):
        parse(RECIPE + "seeds: 2\n")
    with pytest.raises(RecipeError, match=r"(?s)plain\.yaml is no study.*`grid:`.*`seeds:`.*`miniplm run`"):
        load_study(tmp_path / "plain.yaml")
    assert len(load_study(tmp_path / "study.yaml").variants) == 12
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load_study(tmp_path / "nowhere.yaml")
    assert recipes_of(tmp_path / "plain.yaml") == ("example", [parse(RECIPE)])
    assert recipes_of(tmp_path / "study.yaml") == ("example", [one.recipe for one in parse_study(STUDY).variants])


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("select.*.rati", "[0.25]", ["`select.difference.rati`", "no such setting", "Did you mean `ratio`?"]),
        ("refrence", "[{preset: x}]", ["unknown key `refrence`", "Did you mean `reference`?"]),
        ("students.miniplm.learning_rte", "[1]", ["unknown key `learning_rte`", "Did you mean `learning_rate`?"]),
        ("select.*.ratio", "[0.25, 1.5]", ["`select.difference.ratio` cannot be used", "1.5"]),
        ("select.diference.ratio", "[0.25]", ["`select` has no `diference`", "Did you mean `difference`?"]),
        ("select.nothing.ratio", "[0.25]", ["`select` has no `nothing`", "difference, random, chance"]),
        ("students.minipl.tokens", "[5]", ["`students` has no `minipl`", "Did you mean `miniplm`?"]),
        ("reference.tokens", "[many]", ["`reference.tokens` cannot be used", "'many'"]),
        ("students.control.data", "[nobody]", ["`students.control.data`", "nobody"]),
        ("name.inner", "[1]", ["`name` is 'example'", "no keys"]),
        ("generate.written.*.x", "[1]", ["`data` is 'random'", "no keys"]),
        ("retokenize.*.data", "[pool]", ["`*` stands for every entry, and there is none"]),
    ],
)
def test_a_key_of_the_grid_that_cannot_be_is_named_as_one_with_its_line(
    key: str, values: str, words: list[str]
) -> None:
    more = f"grid:\n  {key}: {values}\n"
    message = refused(more)
    assert f"s.yaml, line {line_of(RECIPE + more, key)}, grid key `{key}`: " in message
    assert "--set" not in message
    for word in words:
        assert word in message


def test_what_is_wrong_in_the_recipe_itself_is_not_blamed_on_the_grid_or_the_seeds() -> None:
    for old, new in (("1e-4", "0"), (", tokens: 2e6", ""), ("sequence_length: 256", "sequence_length: 1")):
        text = STUDY.replace(old, new)
        with pytest.raises(RecipeError) as error:
            parse_study(text, name="s.yaml")
        assert re.match(r"s\.yaml, line \d+: ", str(error.value))


def test_what_was_set_with_an_override_is_named_as_set_in_a_study_too() -> None:
    assert refused("seeds: 2\n", "teacher.tokens=0").startswith("s.yaml with --set teacher.tokens: ")
    message = refused("grid: {reference.tokens: [1]}\n", "grid={reference.tokn: [1]}")
    assert message.startswith("s.yaml with --set grid, grid key `reference.tokn`: unknown key `tokn` in reference")


@pytest.mark.parametrize("seeds", ["0", "-1", "2.5", "true", "many", "[]", "[1, 1]", "[1, x]", "[1.5]", "[true]", "{}"])
def test_seeds_that_are_none_are_refused_with_what_was_found(seeds: str) -> None:
    message = refused(f"seeds: {seeds}\n")
    assert "`seeds:`" in message
    assert f"seeds: {yaml.safe_load(seeds)!r}" in message


def test_a_negative_seed_is_refused_as_one_of_the_seeds() -> None:
    assert re.match(r"s\.yaml, line \d+, `seeds:`: `\w+\.\w+\.seed` cannot be used", refused("seeds: [-1]\n"))


@pytest.mark.parametrize("grid", ["[]", "3", "null", "{select.*.ratio: 0.5}", "{a: []}", "{a: {}}", "{a: null}"])
def test_a_grid_that_is_none_is_refused_with_what_was_expected(grid: str) -> None:
    message = refused(f"grid: {grid}\n")
    assert "`grid:` is no mapping" in message
    assert "select.*.ratio: [0.25, 0.5]" in message


@pytest.mark.parametrize("key", ["1", "select..ratio", ".ratio", "select."])
def test_a_grid_key_that_is_no_key_is_refused(key: str) -> None:
    assert f"grid key `{key}` is not of the form" in refused(f"grid: {{{key}: [1]}}\n")


@pytest.mark.parametrize("values", ["[0.5, 0.25, 0.50]", '[0.5, "0.5"]'])
def test_a_value_twice_is_refused_for_it_would_be_taken_for_two_runs(values: str) -> None:
    assert "`select.*.ratio` has the value 0.5 twice" in refused(f"grid: {{select.*.ratio: {values}}}\n")


@pytest.mark.parametrize(
    ("more", "overrides", "lost", "by"),
    [
        (
            "grid: {select.random.ratio: [0.1], select.*.ratio: [0.2]}\n", [], "select.random.ratio",
            ["`select.random.ratio`", "`select.*.ratio`"],
        ),
        ("grid: {reference.tokens: [1], reference: [{preset: x}]}\n", [], "reference.tokens", ["`reference`"]),
        ("seeds: 2\ngrid: {students.*.seed: [1]}\n", [], "students.miniplm.seed", ["`students.*.seed`", "`seeds:`"]),
        ("seeds: 2\n", ["students.control.seed=3"], "students.control.seed", ["--set", "`seeds:`"]),
        ("grid: {reference.tokens: [1]}\n", ["reference.tokens=3"], "reference.tokens", ["--set", "grid key"]),
    ],
)  # fmt: skip
def test_what_is_set_twice_is_refused_for_one_of_the_two_would_be_lost(
    more: str, overrides: list[str], lost: str, by: list[str]
) -> None:
    message = refused(more, *overrides)
    assert f"`{lost}` is set twice" in message
    for word in by:
        assert word in message


@pytest.mark.parametrize(
    ("evaluate", "key"),
    [
        ("{models: {teacher: some/model}}", "evaluate.models.teacher"),
        ("{models: {control: some/model}}", "evaluate.models.control"),
        ("{documents: {held_out: {files: x}}}", "evaluate.documents.held_out"),
        ("{tasks: [piqa], documents: {piqa: {files: x}}}", "evaluate.documents.piqa"),
        ("{documents: {web: {source: builtin}}}", "evaluate.documents.web.source"),
    ],
)
def test_names_of_what_is_measured_that_collide_are_refused_with_the_key(evaluate: str, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"`{re.escape(key)}`") as error:
        parse(RECIPE + f"evaluate: {evaluate}\n", name="s.yaml")
    assert str(error.value).startswith(f"s.yaml, line {line_of(RECIPE + 'evaluate:', 'evaluate')}: ")


def test_models_of_other_people_may_be_given_by_their_names_alone() -> None:
    recipe = parse(RECIPE + "evaluate: {models: {theirs: some/model, ours: {model: ./x, revision: main}}}\n")
    assert [(one.model, one.revision) for one in recipe.evaluate.models.values()] == [
        ("some/model", None), ("./x", "main"),
    ]  # fmt: skip


def test_below_an_entry_that_an_earlier_key_made_there_may_be_another_and_a_new_one_may_be_a_value() -> None:
    found = study("grid:\n  select.new: {a: {sampler: random}}\n  select.new.ratio: [0.1, 0.2]\n").variants
    assert [one.recipe.select["new"].ratio for one in found] == [0.1, 0.2]
    message = refused("grid: {evaluate.documents.wb.documents: [1]}\nevaluate: {documents: {web: {files: x}}}\n")
    assert "`evaluate.documents` has no `wb`" in message
    assert "Did you mean `web`?" in message


def test_a_variant_says_what_tells_it_from_the_others(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    name, found = variants_of(path)
    assert (name, found) == ("example", list(parse_study(STUDY).variants))
    assert found[5].place == {"seed": "1", "select.*.ratio": "0.25", "reference": "same"}
    path.write_text(RECIPE)
    ((only,),) = (variants_of(path)[1],)
    assert (only.place, only.recipe) == ({}, parse(RECIPE))
