"""From a recipe to stages: the whole method from top to bottom, in `chain`.

In: a recipe and a run directory. Out: the stages in the order in which they can be made; each knows what it makes (its
identity), where, and what has to be there first. Nothing is made here; `run.py` does that.

A stage's folder has the first twelve digits of its fingerprint in its name, so that other settings make another folder
beside it: nothing is overwritten, and going back to earlier settings finds what was made then. (The built-in corpus has
a hash of its settings there: what was drawn once holds, whatever has been installed since.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from miniplm import artifact
from miniplm.artifact import Identity
from miniplm.corpus import builtin
from miniplm.corpus.sources import Documents, open_documents
from miniplm.evaluation import evaluate as evaluating
from miniplm.evaluation import tasks as asking
from miniplm.models.load import model_fingerprint, tokenizer_fingerprint
from miniplm.packing import prepare as preparing
from miniplm.packing import repack as retokenizing
from miniplm.packing import sample as sampling
from miniplm.packing.documents import identity as documents_identity
from miniplm.packing.instances import Packed, open_packed, packed_identity
from miniplm.packing.tokenizer import load as load_tokenizer
from miniplm.pipeline.engines import engine_of
from miniplm.pipeline.given import own_fingerprint
from miniplm.pipeline.stages import (
    Material,
    OpenRows,
    evaluate_model,
    generate_rows,
    make_proxy,
    open_made,
    open_selected,
    open_whole,
    pack_set,
    retokenize_rows,
    run_tasks,
    sample_pool,
    score_part,
    score_with_proxy,
    select_rows,
    train_model,
)
from miniplm.recipe import (
    CorpusSettings,
    GivenModel,
    OwnObjective,
    Recipe,
    SamplerSettings,
    ScoredModel,
    TaskSettings,
    TrainSettings,
    VllmModel,
)
from miniplm.sampling.named import identity as selection_identity
from miniplm.sampling.named import needs_with_proxy, sampler_from
from miniplm.scoring import proxy as proxies
from miniplm.scoring import score as scoring
from miniplm.training import sequence_kd as generating
from miniplm.training import trainer as training
from miniplm.training.named import own_objective
from miniplm.training.objectives import Objective
from miniplm.training.presets import preset

Make = Callable[[Path, Identity], object]


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
        self,
        name: str,
        folder: str,
        what: Identity,
        needs: tuple[str, ...],
        make: Make,
    ) -> Stage:
        """Append a stage whose artifact is `<folder>-<fingerprint>`; `make` is called with its path and identity."""
        path = self.root / f"{folder}-{what.fingerprint[:12]}"
        self[name] = Stage(name, what, path, needs, partial(make, path, what))
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

    make: Make

    def make_corpus(out: Path, _: Identity) -> object:
        return preparing.prepare(open_corpus_documents(), recipe.prepare, out, engine_of(compute, model=False))

    what = preparing.identity(documents_fingerprint, recipe.prepare)
    corpus = stages.add("prepare", "corpus", what, after_documents, make_corpus)

    def part(name: str) -> tuple[str, Callable[[], Packed]]:
        fingerprint = packed_identity(corpus.identity.fingerprint, name).fingerprint
        return fingerprint, lambda: preparing.open_corpus(corpus.path).part(name)

    pool, open_pool = part("pool")
    held_out, open_held_out = part("held_out")

    models: dict[str, _Model] = {}
    for role, model in (("teacher", recipe.teacher), ("reference", recipe.reference)):
        if not isinstance(model, TrainSettings):
            own = tokenizer_fingerprint(model) if rule.tokenizer == "own" else ""
            models[role] = _Model(model_fingerprint(model), model, (), own)
            continue
        its_part, open_data = part(role)
        objective, inputs = _learning(model, its_part)
        what = training.identity(model, rule.counted, inputs)
        about = {"corpus": recipe.name, "data": f"the part `{role}`"}
        material = Material(partial(open_whole, open_data), None, rule.counted, about)
        make = partial(train_model, model, material, None, objective, compute)
        models[role] = _Model.made_by(stages.add(f"train/{role}", f"models/{role}", what, ("prepare",), make))

    if recipe.proxy is not None:  # teacher and reference score a share of the pool, see appendix E
        what = sampling.identity(pool, recipe.proxy.share, recipe.proxy.seed)
        sampled = stages.add("proxy/sample", "proxy/sample", what, ("prepare",), partial(sample_pool, open_pool))
        scored_part, after_scored = sampled.identity.fingerprint, ("proxy/sample",)
        open_scored: Callable[[], Packed] = partial(open_packed, sampled.path)
    else:
        scored_part, after_scored, open_scored = pool, ("prepare",), open_pool

    scores: dict[str, Stage] = {}
    for role, scored in models.items():
        how = rule if role == "teacher" else rule.model_copy(update={"quantize": "none"})
        what = scoring.identity(scored_part, scored.fingerprint, how, scored.tokenizer)
        needs = (*after_scored, *scored.stage)
        make = partial(score_part, open_scored, scored.given, compute)
        scores[role] = stages.add(f"score/{role}", f"scores/{role}", what, needs, make)
    if recipe.proxy is not None:
        scores["difference"] = _predicted(stages, models, scores, pool, open_pool)

    fingerprints = {"pool": pool, **{role: stage.identity.fingerprint for role, stage in scores.items()}}
    data = {"pool": _Data(pool, ("prepare",), partial(open_whole, open_pool), about={"data": "the pool"})}
    for name, settings in recipe.select.items():
        sampler = sampler_from(settings)
        wanted = sampler.needs if recipe.proxy is None else needs_with_proxy(settings.sampler, sampler)
        read = {role: stage for role, stage in scores.items() if role in wanted}
        what = selection_identity(settings.sampler, sampler, fingerprints, wanted)
        needs = ("prepare", *(stage.name for stage in read.values()))
        make = partial(select_rows, sampler, open_pool, {role: stage.path for role, stage in read.items()})
        made = stages.add(f"select/{name}", f"selections/{name}", what, needs, make)
        data[name] = _Data(
            what.fingerprint, ("prepare", made.name), partial(open_selected, open_pool, made.path),
            about=_about_selection(recipe, settings, wanted),
        )  # fmt: skip

    for name, writing in recipe.generate.items():
        prompts, teacher = data[writing.data], models["teacher"]
        assert isinstance(teacher.given, GivenModel)  # the recipe has made sure
        what = generating.identity(writing, {"data": prompts.fingerprint, "teacher": teacher.fingerprint})
        needs = (*prompts.needs, *teacher.stage)
        make = partial(generate_rows, prompts.open, teacher.given, writing, compute)
        made = stages.add(f"generate/{name}", f"generated/{name}", what, needs, make)
        data[name] = _Data.made_by(made, {**prompts.about, "continued by": _name(recipe.teacher)})

    for name, reading in recipe.retokenize.items():
        before, named = data[reading.data], reading.tokenizer
        assert named.name is not None  # the recipe has made sure
        tokenizer = load_tokenizer(named.name, named.revision, named.separator)
        what = retokenizing.identity(reading, tokenizer.fingerprint, {"data": before.fingerprint})
        make = partial(retokenize_rows, before.open, tokenizer, reading, compute)
        made = stages.add(f"retokenize/{name}", f"retokenized/{name}", what, before.needs, make)
        data[name] = _Data.made_by(made, before.about, tokenizer.fingerprint)

    for name, student in recipe.students.items():
        read_from = data[student.data]
        objective, inputs = _learning(student, read_from.fingerprint)
        needs = read_from.needs
        open_measured = None
        if recipe.evaluate.held_out and not read_from.tokenizer:
            inputs["held_out"], open_measured = held_out, open_held_out
        asked = None
        if student.needs_teacher:
            teacher = models["teacher"]
            assert isinstance(teacher.given, GivenModel)  # the recipe has made sure
            inputs["teacher"], asked = teacher.fingerprint, teacher.given
            needs = (*needs, *teacher.stage)
        what = training.identity(student, rule.counted, inputs)
        material = Material(read_from.open, open_measured, rule.counted, {"corpus": recipe.name, **read_from.about})
        make = partial(train_model, student, material, asked, objective, compute)
        made = stages.add(f"students/{name}", f"students/{name}", what, needs, make)
        models[name] = _Model.made_by(made, read_from.tokenizer)

    for name, given in recipe.evaluate.models.items():
        models[name] = _Model(model_fingerprint(given), given, (), tokenizer_fingerprint(given), True)
    _measure(stages, models, part)
    return stages


def _measure(
    stages: Chain, models: Mapping[str, _Model], part: Callable[[str], tuple[str, Callable[[], Packed]]]
) -> None:
    """Every model on the held-out part, on each set of documents, and on the tasks."""
    recipe, corpus = stages.recipe, stages["prepare"]
    measured: list[tuple[str, str | None, str, tuple[str, ...], Callable[[], Packed]]] = []
    if recipe.evaluate.held_out:
        fingerprint, open_held_out = part("held_out")
        measured.append(("evaluate", None, fingerprint, ("prepare",), open_held_out))
    for name, settings in recipe.evaluate.documents.items():
        documents, length = open_documents(settings, recipe.prepare.block_bytes), recipe.prepare.sequence_length
        what = documents_identity(documents.fingerprint, corpus.identity.fingerprint, length, settings)
        make: Make = partial(
            pack_set, documents, lambda: preparing.open_corpus(corpus.path).tokenizer, length, settings
        )
        made = stages.add(f"documents/{name}", f"documents/{name}", what, ("prepare",), make)
        measured.append((f"loss/{name}", name, what.fingerprint, (made.name,), partial(open_packed, made.path)))
    for stage, documents_named, fingerprint, needs, opened in measured:
        folder = "evaluations" if documents_named is None else f"evaluations/{documents_named}"
        for name, model in models.items():
            how = recipe.score.model_copy(update={"tokenizer": "own"}) if model.reads_other_tokens else recipe.score
            what = evaluating.identity(fingerprint, model.fingerprint, how, model.tokenizer, documents_named)
            make = partial(evaluate_model, opened, model.given, recipe.compute)
            stages.add(f"{stage}/{name}", f"{folder}/{name}", what, (*needs, *model.stage), make)
    if not recipe.evaluate.tasks:
        return
    tasks = TaskSettings.model_validate(recipe.evaluate.model_dump(include=set(TaskSettings.model_fields)))
    for name, model in models.items():
        if isinstance(model.given, GivenModel):  # a model behind a server or in vLLM answers no questions here
            what = asking.identity(model.fingerprint, tasks)
            make = partial(run_tasks, model.given, tasks, recipe.compute)
            stages.add(f"tasks/{name}", f"tasks/{name}", what, model.stage, make)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that is scored with or measured: what it is, where it lies, and the stage that makes it, if one does."""

    fingerprint: str
    given: ScoredModel
    stage: tuple[str, ...]
    tokenizer: str = ""
    reads_other_tokens: bool = False

    @classmethod
    def made_by(cls, stage: Stage, other_tokenizer: str = "") -> _Model:
        given = GivenModel(model=str(stage.path))
        return cls(stage.identity.fingerprint, given, (stage.name,), reads_other_tokens=bool(other_tokenizer))


@dataclass(frozen=True, slots=True)
class _Data:
    """What a student can be trained on.

    Attributes:
        fingerprint: of it.
        needs: names of the stages that have to be done.
        open: opens the rows.
        about: for the model card.
        tokenizer: fingerprint of the tokenizer, if it is not the corpus's.

    """

    fingerprint: str
    needs: tuple[str, ...]
    open: OpenRows
    about: Mapping[str, str]
    tokenizer: str = ""

    @classmethod
    def made_by(cls, stage: Stage, about: Mapping[str, str], tokenizer: str = "") -> _Data:
        return cls(stage.identity.fingerprint, (stage.name,), partial(open_made, stage.path), about, tokenizer)


def _learning(settings: TrainSettings, data: str) -> tuple[Objective | None, dict[str, str]]:
    """The objective if it is the user's own, and fingerprints of what a training is made of: data, it, and `from`."""
    inputs = {"data": data}
    objective = None
    if isinstance(settings.objective, OwnObjective):
        objective = own_objective(settings.objective)
        inputs["objective"] = own_fingerprint(objective, "objective")
    if settings.start is not None:
        inputs["from"] = model_fingerprint(settings.start)
    return objective, inputs


def _about_selection(recipe: Recipe, settings: SamplerSettings, scores: Iterable[str]) -> dict[str, str]:
    """What a model card says of a selection."""
    said = {"data": f"{settings.ratio:.0%} of the pool, by {settings.sampler} sampling"}
    roles = ("teacher", "reference") if set(scores) & {"teacher", "reference", "difference"} else ()
    return said | {role: _name(getattr(recipe, role)) for role in roles}


def _name(model: TrainSettings | ScoredModel) -> str:
    """What a model card calls a model; of a folder its last part, since where it lies is nobody's business."""
    if isinstance(model, TrainSettings):
        kind = model.preset or (model.config or {}).get("model_type", "a model")
        return f"{kind}, trained on a part of the same corpus"
    name = model.vllm if isinstance(model, VllmModel) else model.model
    return Path(name).name if Path(name).expanduser().is_dir() else name


def _predicted(
    stages: Chain,
    models: Mapping[str, _Model],
    scores: Mapping[str, Stage],
    pool: str,
    open_pool: Callable[[], Packed],
) -> Stage:
    """The stages that train a proxy on the sample's scores and predict the difference for the pool; the last one."""
    recipe, sampled = stages.recipe, stages["proxy/sample"]
    assert recipe.proxy is not None
    inputs = {
        "sample": sampled.identity.fingerprint,
        **{role: stage.identity.fingerprint for role, stage in scores.items()},
        "model": models["reference"].fingerprint,
        "teacher_model": models["teacher"].fingerprint,
    }
    what = proxies.identity(recipe.proxy, recipe.score.counted, inputs)
    needs = (sampled.name, *(stage.name for stage in scores.values()), *models["reference"].stage)
    paths = {role: stage.path for role, stage in scores.items()}
    given = {role: model.given for role, model in models.items()}
    make: Make = partial(make_proxy, recipe.proxy, sampled.path, paths, given, recipe.score.counted, recipe.compute)
    proxy = stages.add("proxy/model", "proxy/model", what, needs, make)
    what = scoring.identity(pool, proxy.identity.fingerprint, proxies.pool_settings(recipe.score))
    make = partial(score_with_proxy, open_pool, proxy.path, recipe.compute)
    return stages.add("score/difference", "scores/difference", what, ("prepare", proxy.name), make)


def _documents(stages: Chain) -> tuple[str, Callable[[], Documents]]:
    """The fingerprint of the documents, and how they are opened; the built-in corpus is a stage of its own first."""
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
