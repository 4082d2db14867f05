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
    assert len({status.stage.path for status in statuses}) == len(names)


def test_mamba_has_the_papers_schedule() -> None:
    """Its peak 2e-3 falls to 1e-5, after 10K of 100K steps of warm-up, with β₂ = 0.95."""
    students = recipe.load(next(path for path in RECIPES if path.match("paper/families.yaml"))).students
    for name in ("mamba-pretrain", "mamba-miniplm"):
        assert preset(students[name].preset or "").learning_rate * students[name].min_lr_ratio == pytest.approx(1e-5)
        assert (students[name].warmup_ratio, students[name].beta2) == (0.1, 0.95)
    assert students["llama-miniplm"].beta2 == 0.98
