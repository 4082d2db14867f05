"""Every recipe in `recipes/` parses, survives being written out, and plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniplm import recipe
from miniplm.artifact import Identity
from miniplm.corpus import builtin
from miniplm.pipeline import chain as chains
from miniplm.pipeline.run import plan
from miniplm.training.presets import preset

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert any(path.name == "quickstart.yaml" for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_parses_and_its_resolved_form_is_the_same_recipe(path: Path) -> None:
    loaded = recipe.load(path)
    assert recipe.parse(loaded.resolved()) == loaded
    for settings in (loaded.teacher, loaded.reference, *loaded.students.values()):
        if isinstance(settings, recipe.TrainSettings) and settings.preset:
            preset(settings.preset)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_plans(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies outside the repository (the corpus, the Hub) is stood in for by fingerprints."""
    loaded = recipe.load(path)
    sample = builtin.Sample((), 0, "0" * 64)
    monkeypatch.setattr(builtin, "draw", lambda *_: sample)
    monkeypatch.setattr(chains, "open_documents", lambda *_: type("D", (), {"fingerprint": "1" * 64})())
    monkeypatch.setattr(chains, "model_fingerprint", lambda given: "2" * 64)
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
    assert len({status.stage.path for status in statuses}) == len(names)
