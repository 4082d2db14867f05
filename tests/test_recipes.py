"""Every recipe in `recipes/` parses, survives being written out, and plans."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import yaml

from miniplm import recipe
from miniplm.artifact import Identity
from miniplm.corpus import builtin
from miniplm.pipeline import chain as chains
from miniplm.pipeline.run import plan
from miniplm.report.training import control_of
from miniplm.training.presets import preset

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
STUDIES = [path for path in FILES if {"grid", "seeds"} & yaml.safe_load(path.read_text()).keys()]
RECIPES = [
    pytest.param(found, id=f"{path.relative_to(FOLDER).with_suffix('')}{number or ''}")
    for path in FILES
    for number, found in enumerate(recipe.recipes_of(path)[1])
]  # a study stands for several


def test_there_are_recipes_and_studies() -> None:
    assert FOLDER / "quickstart.yaml" in set(FILES) - set(STUDIES)
    assert FOLDER / "studies" / "sampling.yaml" in STUDIES


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_study_parses_and_is_the_study_that_its_text_says(path: Path) -> None:
    study = recipe.load_study(path)
    assert recipe.parse_study(study.text) == study
    raw = yaml.safe_load(path.read_text())
    seeds = raw.get("seeds", 1)
    points = [len(values) for values in raw.get("grid", {}).values()]
    assert len(study.variants) == (seeds if isinstance(seeds, int) else len(seeds)) * prod(points)
    assert len({one.recipe.resolved() for one in study.variants}) == len(study.variants)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_student_of_a_study_but_the_control_has_one(path: Path) -> None:
    for variant in recipe.load_study(path).variants:
        compared = {name: control_of(variant.recipe, name) for name in variant.recipe.students}
        (control,) = {name for name in compared.values() if name}
        assert {name for name, found in compared.items() if found is None} == {control}


@pytest.mark.parametrize("loaded", RECIPES)
def test_a_recipe_parses_and_its_resolved_form_is_the_same_recipe(loaded: recipe.Recipe) -> None:
    assert recipe.parse(loaded.resolved()) == loaded
    for settings in (loaded.teacher, loaded.reference, *loaded.students.values()):
        if isinstance(settings, recipe.TrainSettings) and settings.preset:
            preset(settings.preset)


@pytest.mark.parametrize("loaded", RECIPES)
def test_a_recipe_plans(loaded: recipe.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies outside the repository (the corpus, the Hub) is stood in for by fingerprints."""
    sample = builtin.Sample((), 0, "0" * 64)
    monkeypatch.setattr(builtin, "draw", lambda *_: sample)
    monkeypatch.setattr(chains, "open_documents", lambda *_: type("D", (), {"fingerprint": "1" * 64})())
    monkeypatch.setattr(chains, "model_fingerprint", lambda given: "2" * 64)
    monkeypatch.setattr(chains, "load_tokenizer", lambda *_: type("T", (), {"fingerprint": "3" * 64})())
    monkeypatch.setattr(
        chains.preparing,
        "identity",
        lambda fp, settings: Identity("corpus", 1, settings.model_dump(), {"documents": fp}),
    )
    statuses = plan(chains.chain(loaded, tmp_path))
    names = [status.stage.name for status in statuses]
    assert statuses[0].state == "ready"
    assert {f"students/{name}" for name in loaded.students} <= set(names)
    assert {f"select/{name}" for name in loaded.select} <= set(names)
    assert {f"documents/{name}" for name in loaded.evaluate.documents} <= set(names)
    assert len({status.stage.path for status in statuses}) == len(names)


def test_mamba_has_the_papers_schedule() -> None:
    """Its peak 2e-3 falls to 1e-5, after 10K of 100K steps of warm-up, with β₂ = 0.95."""
    students = recipe.load(FOLDER / "paper" / "families.yaml").students
    for name in ("mamba-pretrain", "mamba-miniplm"):
        assert preset(students[name].preset or "").learning_rate * students[name].min_lr_ratio == pytest.approx(1e-5)
        assert (students[name].warmup_ratio, students[name].beta2) == (0.1, 0.95)
    assert students["llama-miniplm"].beta2 == 0.98
