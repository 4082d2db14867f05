"""Recipes: every complaint names the key, the line and what was found; what is read back is what was meant."""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miniplm.errors import RecipeError
from miniplm.recipe import GivenModel, Recipe, TrainSettings, VanillaKDSettings, load, parse
from miniplm.sampling.named import sampler_from

TEXT = """\
schema: 1
name: example
corpus: {files: "data/*.jsonl"}
prepare:
  tokenizer: {train: {vocab_size: 4096}}
  sequence_length: 256
  split: {reference: 0.1, teacher: 0.4, held_out: 0.02}
teacher: {preset: qwen-5m, tokens: 4e6}
reference:
  preset: qwen-0.5m
  tokens: 1e6
select:
  difference:
    sampler: difference
    ratio: 0.5
  random: {sampler: random, ratio: 0.5, seed: 0}
students:
  miniplm:
    preset: qwen-1m
    data: difference
    tokens: 2e6
    learning_rate: 1e-4
  control: {like: miniplm, data: random}
"""


def line_of(text: str, needle: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if needle in line)


def refused(text: str, *overrides: str) -> str:
    """The message with which a recipe is refused."""
    with pytest.raises(RecipeError) as error:
        parse(text, name="r.yaml", overrides=overrides)
    return str(error.value)


def edited(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


def test_the_example_is_a_recipe_with_its_values() -> None:
    recipe = parse(TEXT)
    assert recipe.students["miniplm"].learning_rate == 1e-4
    assert recipe.students["miniplm"].tokens == 2_000_000
    assert isinstance(recipe.teacher, TrainSettings)
    assert recipe.select["difference"].ratio == 0.5


@pytest.mark.parametrize(
    ("old", "new", "nearest", "also"),
    [
        ("name: example", "name: example\nstudent: {}", "students", ["corpus", "prepare", "teacher", "schema"]),
        ("  sequence_length: 256", "  sequence_lenght: 256", "sequence_length", ["tokenizer", "split", "cut"]),
        ("vocab_size: 4096}", "vocab_size: 4096, sample_byte: 5}", "sample_bytes", ["vocab_size"]),
        ("held_out: 0.02}", "heldout: 0.02}", "held_out", ["reference", "teacher", "seed"]),
        ("    ratio: 0.5", "    ration: 0.5", "ratio", ["sampler", "normalize", "within"]),
        ("    learning_rate: 1e-4", "    learning_rte: 1e-4", "learning_rate", ["data", "like", "tokens"]),
        ("  tokens: 1e6", "  tokens: 1e6\n  batch_token: 8192", "batch_tokens", ["preset", "config", "seed"]),
    ],
)
def test_an_unknown_key_is_named_with_its_line_the_nearest_name_and_the_valid_ones(
    old: str, new: str, nearest: str, also: list[str]
) -> None:
    text = edited(old, new)
    (unknown,) = set(re.findall(r"(\w+):", new)) - set(re.findall(r"(\w+):", TEXT))
    message = refused(text)
    assert f"r.yaml, line {line_of(text, unknown)}" in message
    assert f"{unknown}`" in message
    assert f"Did you mean `{nearest}`?" in message
    for name in also:
        assert name in message


def test_an_unknown_key_of_a_given_model_lists_the_keys_of_a_given_model() -> None:
    message = refused(edited("teacher: {preset: qwen-5m, tokens: 4e6}", "teacher: {model: Qwen/x, revison: main}"))
    assert "`revison` in teacher" in message
    assert "trust_remote_code" in message
    assert "Did you mean `revision`?" in message


@pytest.mark.parametrize(
    ("objective", "nearest", "valid"),
    [
        ("{name: vanilla_kd, shar: 0.3}", "share", ["dtype", "name", "share", "temperature"]),
        ("{name: minillm, next_tokn: 0}", "next_token", ["baseline", "length_normalised", "teacher_mix"]),
        ("{name: next_token, share: 0.3}", "", ["name"]),
    ],
)
def test_an_unknown_key_of_an_objective_lists_the_keys_of_that_objective(
    objective: str, nearest: str, valid: list[str]
) -> None:
    for place in ("    learning_rate: 1e-4", "  control: {like: miniplm, data: random"):
        comma = place.startswith("  control")
        message = refused(edited(place, f"{place}{', ' if comma else chr(10) + '    '}objective: {objective}"))
        (expected,) = [line for line in message.splitlines() if line.split()[0] == "expected"]
        assert set(valid) <= {name.strip(",") for name in expected.split()}
        assert f"Did you mean `{nearest}`?" in message if nearest else "Did you mean" not in message
    inherited = edited("    learning_rate: 1e-4", f"    objective: {objective}").replace(
        "students:\n", "students:\n  first: {like: miniplm, seed: 1}\n"
    )
    assert valid[0] in refused(inherited)


@pytest.mark.parametrize(
    ("old", "new", "key", "found"),
    [
        ("  sequence_length: 256", "  sequence_length: long", "prepare.sequence_length", "'long'"),
        ("  sequence_length: 256", "  sequence_length: 1", "prepare.sequence_length", "1"),
        ("  sequence_length: 256", "  sequence_length: 2.5", "prepare.sequence_length", "2.5"),
        ("  tokens: 1e6", "  tokens: many", "reference.tokens", "'many'"),
        ("  tokens: 1e6", "  tokens: 0", "reference.tokens", "0"),
        ("    ratio: 0.5", "    ratio: 0", "select.difference.ratio", "0"),
        ("    ratio: 0.5", "    ratio: 1.5", "select.difference.ratio", "1.5"),
        ("    ratio: 0.5", "    ratio: -0.5", "select.difference.ratio", "-0.5"),
        ("    ratio: 0.5", "    ratio: .nan", "select.difference.ratio", "nan"),
        ("    ratio: 0.5", "    ratio: .inf", "select.difference.ratio", "inf"),
        ("    ratio: 0.5", "    ratio: half", "select.difference.ratio", "'half'"),
        ("    learning_rate: 1e-4", "    learning_rate: 0", "students.miniplm.learning_rate", "0"),
        ("    learning_rate: 1e-4", "    learning_rate: .inf", "students.miniplm.learning_rate", "inf"),
        ("    learning_rate: 1e-4", "    learning_rate: .nan", "students.miniplm.learning_rate", "nan"),
        ("name: example", "name: ../elsewhere", "name", "'../elsewhere'"),
        ("name: example", "name: [a]", "name", "['a']"),
        ("schema: 1", "schema: 2", "schema", "2"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_key_line_and_value(old: str, new: str, key: str, found: str) -> None:
    text = edited(old, new)
    message = refused(text)
    assert f"r.yaml, line {line_of(text, new)}: `{key}`" in message
    assert any(line.split() == ["found", found] for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("written", "meant"), [("1e-4", 1e-4), ("1.5e-3", 1.5e-3), ("1E-4", 1e-4), ("0.001", 1e-3), ("6.0e-4", 6e-4)]
)
def test_a_number_with_an_exponent_is_a_number(written: str, meant: float) -> None:
    recipe = parse(edited("learning_rate: 1e-4", f"learning_rate: {written}"))
    assert recipe.students["miniplm"].learning_rate == meant


def test_an_exponent_is_a_number_inside_free_settings_too() -> None:
    recipe = parse(edited("    learning_rate: 1e-4", "    trainer: {adam: 1e-4, name: e5, version: 1e}"))
    assert recipe.students["miniplm"].trainer == {"adam": 1e-4, "name": "e5", "version": "1e"}


@pytest.mark.parametrize("where", ["name: twice", "  sequence_length: 128", "    ratio: 0.4"])
def test_a_key_that_stands_twice_is_refused_with_its_line(where: str) -> None:
    key = where.strip().split(":")[0]
    first = next(line for line in TEXT.splitlines() if line.startswith(where.split(":")[0] + ":"))
    text = edited(first + "\n", f"{first}\n{where}\n")
    message = refused(text)
    assert f"`{key}` stands twice" in message
    assert f"line {line_of(text, where)}" in message


def test_a_recipe_without_schema_is_refused_with_the_remedy() -> None:
    assert "schema: 1" in refused(edited("schema: 1\n", ""))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "42", "null"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    assert "r.yaml is not a recipe" in refused(text)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\ta: 1", "a: &x 1\nb: *y", "!!python/object:os.system {}", "a: \x00"]
)
def test_what_is_no_yaml_is_named(text: str) -> None:
    assert "r.yaml is not YAML" in refused(text)


def test_a_key_that_is_a_list_is_refused() -> None:
    assert "r.yaml" in refused(TEXT + "? [a, b]\n: c\n")


def test_a_missing_key_is_named() -> None:
    assert "`corpus` is missing" in refused(edited('corpus: {files: "data/*.jsonl"}\n', ""))
    message = refused(edited("  tokens: 1e6\n", ""))
    assert "`reference.tokens` cannot be used" in message
    assert "exactly one of tokens, epochs is needed" in message


def test_a_recipe_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_a_recipe_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(TEXT.replace("example", "\xe9").encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml"):
        load(tmp_path / "latin.yaml")


def test_like_takes_the_settings_of_the_other_under_its_own() -> None:
    recipe = parse(edited("control: {like: miniplm, data: random}", "control: {like: miniplm, data: random, seed: 3}"))
    ours, theirs = recipe.students["control"], recipe.students["miniplm"]
    assert (ours.data, ours.seed) == ("random", 3)
    assert ours.model_copy(update={"data": theirs.data, "seed": theirs.seed}) == theirs


def test_like_may_be_chained_and_may_name_a_later_student() -> None:
    text = TEXT + "  third: {like: fourth, data: pool}\n  fourth: {like: control, seed: 5}\n"
    third = parse(text).students["third"]
    assert (third.preset, third.data, third.seed) == ("qwen-1m", "pool", 5)


def test_like_somebody_unknown_is_refused_with_the_nearest_name() -> None:
    text = edited("like: miniplm", "like: minplm")
    message = refused(text)
    assert f"line {line_of(text, 'minplm')}" in message
    assert "`students.control.like`" in message
    assert "Did you mean `miniplm`?" in message


@pytest.mark.parametrize(
    ("extra", "circle"),
    [("  a: {like: a}\n", "a -> a"), ("  a: {like: b}\n  b: {like: c}\n  c: {like: a}\n", "a -> b -> c -> a")],
)
def test_like_in_a_circle_is_refused_with_the_circle(extra: str, circle: str) -> None:
    message = refused(TEXT + extra)
    assert circle in message
    assert "`students." in message


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("select.difference.ratio=0.4", ("select", "difference", "ratio"), 0.4),
        ("students.miniplm.learning_rate=1e-3", ("students", "miniplm", "learning_rate"), 1e-3),
        ("compute.device=cpu", ("compute", "device"), "cpu"),
        ("evaluate.held_out=false", ("evaluate", "held_out"), False),
        ("name=a=b", (), None),
    ],
)
def test_an_override_sets_its_key(override: str, path: tuple[str, ...], value: object) -> None:
    if not path:  # everything after the first = is the value, and this one is no name
        assert "`name`" in refused(TEXT, override)
        return
    found: Any = parse(TEXT, overrides=[override]).model_dump(by_alias=True)
    for step in path:
        found = found[step]
    assert found == value


def test_an_override_reaches_those_that_are_like_it() -> None:
    recipe = parse(TEXT, overrides=["students.miniplm.seed=9"])
    assert recipe.students["control"].seed == 9


def test_an_override_reaches_into_an_objective_that_is_given_by_its_name_alone() -> None:
    text = edited("    learning_rate: 1e-4", "    objective: vanilla_kd")
    recipe = parse(text, overrides=["students.miniplm.objective.share=0.3"])
    assert recipe.students["miniplm"].objective == VanillaKDSettings(share=0.3)
    assert recipe.students["control"].objective == VanillaKDSettings(share=0.3)
    started = edited("    preset: qwen-1m", "    from: some/model")
    revised = parse(started, overrides=["students.miniplm.from.revision=main"]).students["miniplm"]
    assert revised.start == GivenModel(model="some/model", revision="main")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("control: {like: miniplm, data: random}", "control: {like: miniplm, from: miniplm}", "students.control.from"),
        ("  preset: qwen-0.5m", "  from: control", "reference.from"),
    ],
)
def test_a_student_of_the_same_recipe_cannot_be_gone_on_from(old: str, new: str, key: str) -> None:
    text = edited(old, new)
    message = refused(text)
    assert f"r.yaml, line {line_of(text, new)}: `{key}`" in message
    assert "is a student of this recipe" in message
    assert parse(edited(old, new.replace("from: ", "from: ./")))


@pytest.mark.parametrize("override", ["select.difference.ratio", "=1", "select..ratio=1", "a.=1", "name.inner=1"])
def test_an_override_that_is_none_is_refused_as_it_was_typed(override: str) -> None:
    message = refused(TEXT, override)
    assert "--set" in message
    assert override in message


@pytest.mark.parametrize(
    ("overrides", "key", "found"),
    [
        (["select.difference.ratio=1.5"], "select.difference.ratio", "1.5"),
        (["compute.score_tokens=0"], "compute.score_tokens", "0"),
        (["compute.device=gpu"], "compute.device", "'gpu'"),
        (["evaluate.held_out=maybe"], "evaluate.held_out", "'maybe'"),
        (["select.other.sampler=random", "select.other.ratio=2"], "select.other.ratio", "2"),
    ],
)
def test_a_bad_value_that_was_set_is_named_by_its_whole_key_and_as_set(
    overrides: list[str], key: str, found: str
) -> None:
    message = refused(TEXT, *overrides)
    assert f"--set {key}" in message
    assert any(line.split() == ["found", found] for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("override", "nearest"), [("compute.devise=cpu", "device"), ("select.difference.rati=0.4", "ratio")]
)
def test_an_unknown_key_that_was_set_is_named_with_the_nearest(override: str, nearest: str) -> None:
    message = refused(TEXT, override)
    assert f"--set {override.split('=')[0]}" in message
    assert f"Did you mean `{nearest}`?" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("held_out: 0.02}", "held_out: 0.5}", ["prepare.split", "1", "pool"]),
        ("teacher: 0.4, ", "", ["prepare.split", "teacher"]),
        ("reference: 0.1, ", "reference: 0.0, ", ["prepare.split", "reference"]),
        ("held_out: 0.02}", "held_out: 0.0}", ["prepare.split", "held_out"]),
        ('{files: "data/*.jsonl"}', "{files: a, hub: b}", ["corpus", "files, hub"]),
        ('{files: "data/*.jsonl"}', "{}", ["corpus", "source, files, hub"]),
        (
            "{train: {vocab_size: 4096}}",
            "{train: {vocab_size: 4096}, name: gpt2}",
            ["prepare.tokenizer", "name, train"],
        ),
        ("  preset: qwen-0.5m", "  preset: qwen-0.5m\n  config: {}", ["reference", "preset, config"]),
        ("data: difference", "data: diference", ["students.miniplm.data", "diference", "Did you mean `difference`?"]),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_key(old: str, new: str, words: list[str]) -> None:
    message = refused(edited(old, new))
    for word in words:
        assert word in message


def test_the_share_of_a_teacher_that_is_given_is_not_needed() -> None:
    text = edited("teacher: 0.4, ", "").replace("{preset: qwen-5m, tokens: 4e6}", "{model: Qwen/Qwen1.5-1.8B}")
    assert parse(text).teacher == GivenModel(model="Qwen/Qwen1.5-1.8B")


def test_a_student_may_not_take_the_name_of_a_model_that_is_evaluated_too() -> None:
    """Its evaluation would take the place of the teacher's, in silence."""
    assert "students.teacher" in refused(TEXT + "  teacher: {like: miniplm}\n")


def test_a_selection_may_not_be_called_pool() -> None:
    """`data: pool` means all of the pool; a selection of that name would never be used, in silence."""
    text = edited("  random: {sampler: random,", "  pool: {sampler: random,").replace("data: random", "data: pool")
    assert "select.pool" in refused(text)


class OwnSampler:
    """A sampler of a user."""

    needs = frozenset({"teacher"})

    def __init__(self, **given: object) -> None:
        self.given = given


def test_settings_of_ones_own_pass_through_to_ones_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    text = edited(
        "    sampler: difference\n", '    sampler: "own_module:OwnSampler"\n    temperature: 0.7\n    deep: {a: [1]}\n'
    )
    monkeypatch.setitem(sys.modules, "own_module", types.SimpleNamespace(OwnSampler=OwnSampler))
    sampler: Any = sampler_from(parse(text).select["difference"])
    assert sampler.given == {"ratio": 0.5, "temperature": 0.7, "deep": {"a": [1]}}


def test_settings_of_ones_own_are_refused_for_a_sampler_of_ours() -> None:
    text = edited("    ratio: 0.5", "    temperature: 0.7")
    message = refused(text)
    assert "select.difference.temperature" in message
    assert f"line {line_of(text, 'temperature')}" in message


def test_a_sampler_that_does_not_exist_is_refused_with_the_nearest() -> None:
    recipe = parse(edited("    sampler: difference", "    sampler: diference"))
    with pytest.raises(RecipeError, match="'difference'"):
        sampler_from(recipe.select["difference"])


def test_a_sampler_that_cannot_be_imported_is_refused_by_name() -> None:
    recipe = parse(edited("    sampler: difference", '    sampler: "no_such_package.module:Class"'))
    with pytest.raises(RecipeError, match="no_such_package"):
        sampler_from(recipe.select["difference"])


def test_a_setting_that_the_sampler_does_not_have_is_refused() -> None:
    recipe = parse(edited("{sampler: random, ratio: 0.5, seed: 0}", "{sampler: random, normalize: byte}"))
    with pytest.raises(RecipeError, match="normalize"):
        sampler_from(recipe.select["random"])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@example(ratio=0.5, seed=0, tokens=1, learning_rate=1e-4, name="a", text="12e4567", trainer={})
@given(
    ratio=st.floats(min_value=0, max_value=1, exclude_min=True, allow_subnormal=False),
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 10**12),
    learning_rate=st.floats(1e-8, 1.0),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    text=st.text(max_size=20),
    trainer=st.dictionaries(
        st.text(max_size=5), st.one_of(st.booleans(), st.integers(), st.text(max_size=5)), max_size=3
    ),
)
def test_the_resolved_recipe_is_read_back_as_it_was(
    ratio: float, seed: int, tokens: int, learning_rate: float, name: str, text: str, trainer: dict[str, Any]
) -> None:
    raw = copy.deepcopy(yaml.safe_load(TEXT))
    raw["name"] = name
    raw["corpus"] = {"files": text}
    raw["teacher"] = {"preset": "qwen-5m", "tokens": tokens, "trainer": trainer}
    raw["reference"] = {"preset": "qwen-5m", "tokens": tokens}
    raw["select"] = {name: {"sampler": "difference", "ratio": ratio, "seed": seed}}
    raw["students"] = {name: {"preset": "qwen-1m", "tokens": 1, "data": name, "learning_rate": learning_rate}}
    recipe = Recipe.model_validate(raw)
    assert parse(recipe.resolved()) == recipe
