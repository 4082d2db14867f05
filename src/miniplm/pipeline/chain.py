"""From a recipe to stages: the whole method from top to bottom, in `chain`.

In: a recipe and a run directory. Out: the stages in the order in which they can be made; each knows what it makes (its
identity), where, and what has to be there first. Nothing is made here; `run.py` does that.

A stage's folder has the first twelve digits of its fingerprint in its name, so that other settings make another folder
beside it: nothing is overwritten, and going back to earlier settings finds what was made then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from miniplm import artifact
from miniplm.artifact import Identity
from miniplm.corpus import builtin
from miniplm.corpus.sources import Documents, open_documents
from miniplm.evaluation import evaluate as evaluating
from miniplm.models.load import model_fingerprint
from miniplm.packing import prepare as preparing
from miniplm.packing.instances import Packed, packed_identity
from miniplm.pipeline.stages import evaluate_model, score_part, select_rows, train_model
from miniplm.recipe import CorpusSettings, GivenModel, Recipe, TrainSettings
from miniplm.sampling import base as selecting
from miniplm.sampling.named import identity as selection_identity
from miniplm.sampling.named import sampler_from
from miniplm.scoring import score as scoring
from miniplm.training import trainer as training
from miniplm.training.presets import preset


@dataclass(frozen=True)
class Stage:
    """Something to make.

    Attributes:
        name: as `run --only` takes it: `prepare`, `score/teacher`, `students/miniplm`, ...
        identity: of the artifact.
        path: of the artifact.
        needs: names of the stages whose artifacts `make` opens.
        make: makes the artifact, or goes on with it.

    """

    name: str
    identity: Identity
    path: Path
    needs: tuple[str, ...]
    make: Callable[[], object]


class Chain(dict[str, Stage]):
    """The stages by name, in the order in which they can be made."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.root = root

    def add(
        self, name: str, folder: str, what: Identity, needs: tuple[str, ...], make: Callable[[Path], object]
    ) -> Stage:
        """Append a stage whose artifact is `<folder>-<fingerprint>`."""
        path = self.root / f"{folder}-{what.fingerprint[:12]}"
        self[name] = Stage(name, what, path, needs, lambda: make(path))
        return self[name]

    def within(self, prefix: str) -> Iterator[tuple[str, Stage]]:
        """The stages below a name, as (last part of the name, stage): `students` gives every student."""
        for name, stage in self.items():
            if name.startswith(prefix + "/"):
                yield name.removeprefix(prefix + "/"), stage


def chain(recipe: Recipe, root: Path) -> Chain:
    """The stages of a recipe.

    Raises:
        MiniplmError: the corpus, the tokenizer or a given model cannot be found; a preset or sampler has no such name.

    """
    stages = Chain(recipe, root)
    compute, rule = recipe.compute, recipe.score
    _check_presets(recipe)

    documents_fingerprint, open_corpus_documents = _documents(stages)
    after_documents = tuple(stages)

    what = preparing.identity(documents_fingerprint, recipe.prepare)
    corpus = stages.add(
        "prepare", "corpus", what, after_documents,
        lambda path: preparing.prepare(open_corpus_documents(), recipe.prepare, path),
    )  # fmt: skip

    def part(name: str) -> tuple[str, Callable[[], Packed]]:
        fingerprint = packed_identity(corpus.identity.fingerprint, name).fingerprint
        return fingerprint, lambda: preparing.open_corpus(corpus.path).part(name)

    pool, open_pool = part("pool")
    held_out, open_held_out = part("held_out")

    models: dict[
        str, tuple[str, GivenModel, tuple[str, ...]]
    ] = {}  # role -> fingerprint, where, the stage that makes it
    for role, model in (("teacher", recipe.teacher), ("reference", recipe.reference)):
        if isinstance(model, GivenModel):
            models[role] = (model_fingerprint(model), model, ())
            continue
        data, open_data = part(role)
        what = training.identity(model, rule.counted, {"data": data})
        trained = stages.add(
            f"train/{role}", f"models/{role}", what, ("prepare",),
            lambda path, m=model, d=open_data, w=what: train_model(m, d(), None, None, rule.counted, path, w, compute),
        )  # fmt: skip
        models[role] = (what.fingerprint, GivenModel(model=str(trained.path)), (trained.name,))

    scores: dict[str, Stage] = {}
    for role, (fingerprint, model, made_by) in models.items():
        what = scoring.identity(pool, fingerprint, rule)
        scores[role] = stages.add(
            f"score/{role}", f"scores/{role}", what, ("prepare", *made_by),
            lambda path, m=model, w=what: score_part(open_pool(), m, path, w, compute),
        )  # fmt: skip

    fingerprints = {"pool": pool, **{role: stage.identity.fingerprint for role, stage in scores.items()}}
    for name, settings in recipe.select.items():
        sampler = sampler_from(settings)
        what = selection_identity(settings.sampler, sampler, fingerprints)
        needs = ("prepare", *(f"score/{role}" for role in scores if role in sampler.needs))
        paths = {role: stage.path for role, stage in scores.items() if role in sampler.needs}
        stages.add(
            f"select/{name}", f"selections/{name}", what, needs,
            lambda path, s=sampler, p=paths, w=what: select_rows(s, open_pool(), p, path, w),
        )  # fmt: skip

    for name, student in recipe.students.items():
        selection = None if student.data == "pool" else stages[f"select/{student.data}"]
        inputs = {"data": pool if selection is None else selection.identity.fingerprint}
        if recipe.evaluate.held_out:
            inputs["held_out"] = held_out
        what = training.identity(student, rule.counted, inputs)
        needs = ("prepare",) if selection is None else ("prepare", selection.name)
        trained = stages.add(
            f"students/{name}", f"students/{name}", what, needs,
            lambda path, m=student, s=selection, w=what: train_model(
                m, open_pool(), None if s is None else selecting.open_selection(s.path),
                open_held_out() if recipe.evaluate.held_out else None, rule.counted, path, w, compute,
            ),
        )  # fmt: skip
        models[name] = (what.fingerprint, GivenModel(model=str(trained.path)), (trained.name,))

    if recipe.evaluate.held_out:
        for name, (fingerprint, model, made_by) in models.items():
            what = evaluating.identity(held_out, fingerprint, rule)
            stages.add(
                f"evaluate/{name}", f"evaluations/{name}", what, ("prepare", *made_by),
                lambda path, m=model, w=what: evaluate_model(open_held_out(), m, path, w, compute),
            )  # fmt: skip
    return stages


def _documents(stages: Chain) -> tuple[str, Callable[[], Documents]]:
    """The fingerprint of the documents, and how they are opened. The built-in corpus is written out first, as a stage."""
    settings = stages.recipe.corpus
    group_bytes = stages.recipe.prepare.block_bytes
    if settings.source is None:
        documents = open_documents(settings, group_bytes)
        return documents.fingerprint, lambda: documents
    drawn = json.dumps([builtin.VERSION, settings.budget_bytes, settings.seed]).encode()
    path = stages.root / f"documents-{hashlib.sha256(drawn).hexdigest()[:12]}"
    sample = None
    if path.exists():  # what was drawn before holds, whatever has been installed since
        what = artifact.read(path, kind="documents").identity
    else:
        sample = builtin.draw(settings.budget_bytes, settings.seed)
        what = sample.identity(settings.budget_bytes, settings.seed)

    def make() -> object:
        return builtin.snapshot(path, settings.budget_bytes, settings.seed, sample)

    stages["documents"] = Stage("documents", what, path, (), make)
    written = CorpusSettings(files=str(path / "documents.parquet"))
    return what.fingerprint, lambda: dataclasses.replace(
        open_documents(written, group_bytes), fingerprint=what.fingerprint
    )


def _check_presets(recipe: Recipe) -> None:
    for settings in (recipe.teacher, recipe.reference, *recipe.students.values()):
        if isinstance(settings, TrainSettings) and settings.preset is not None:
            preset(settings.preset)
