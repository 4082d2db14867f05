"""The settings of each stage, and `Recipe`, which has one field a stage.

Promised: frozen, strict about names and types; what cannot be together is refused with the path of the setting.
Not covered: whether files, models and tokenizers exist; the stages find that out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator

from miniplm.recipe.base import At, Counted, Documents, Name, Precision, Ratio, Settings, Share, did_you_mean
from miniplm.recipe.dialect import Dumper
from miniplm.recipe.training import (
    AnyModel,
    GenerateSettings,
    GivenModel,
    RetokenizeSettings,
    ServerModel,
    StudentSettings,
    TokenizerSettings,
    TrainSettings,
    VllmModel,
)


class Columns(Settings):
    """Where a record keeps its text, id and source. Dots reach into nested records: `meta.pile_set_name`."""

    text: str = "text"
    id: str | None = Field(None, description="None: `id` if there is one, else made from file and row")
    source: str | None = Field(None, description="None: the first of the well-known names that is there")


class CorpusSettings(Settings):
    """Which documents. Exactly one of `source`, `files`, `hub` is given.

    `source: builtin` is the Python source and documentation installed on the machine, `budget_bytes` of it drawn with
    `seed`.
    """

    source: Literal["builtin"] | None = None
    files: str | list[str] | None = Field(None, description="path, glob or list of them; also a `save_to_disk` folder")
    hub: str | None = Field(None, description="id of a data set on the Hugging Face Hub")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["auto", "jsonl", "parquet", "arrow", "csv", "text", "saved"] = "auto"
    columns: Columns = Columns()
    on_error: Literal["raise", "skip"] = "raise"
    budget_bytes: int = Field(48_000_000, gt=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("source", "files", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of source, files, hub is needed; found {', '.join(given) or 'none'}")
        return self


class Split(Settings):
    """Shares of the documents, by a hash of their id and `seed`; what is left is the pool."""

    reference: Share = 0.05
    teacher: Share = Field(0.0, description="only where the teacher is trained here too")
    held_out: Share = 0.001
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _leaves_a_pool(self) -> Self:
        if (total := self.reference + self.teacher + self.held_out) >= 1:
            raise ValueError(f"reference + teacher + held_out is {total:g}; nothing is left for the pool")
        return self


class PrepareSettings(Settings):
    """Split, tokenise and pack."""

    tokenizer: TokenizerSettings
    sequence_length: int = Field(1024, ge=2, description="predicted positions; an instance stores one token more")
    cut: Literal["exact", "sentence"] = "exact"
    split: Split = Split()
    block_bytes: int = Field(32_000_000, gt=0, description="text per shard; the unit of work, retry and commit")

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _bare_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class ScoreSettings(Settings):
    """How log-probabilities are counted. `counted` is the one rule for scoring, training and evaluation."""

    dtype: Precision = "bfloat16"
    counted: Counted = "all"
    documents: Documents = Field(
        "attend", description="attend: over the whole instance, as the paper; isolate: each alone"
    )
    tokenizer: Literal["packed", "own"] = Field("packed", description="own: the text, under each model's own tokenizer")
    quantize: Literal["none", "int8", "fp8"] = Field("none", description="linear layers of the teacher, by torchao")


class ProxySettings(Settings):
    """A small model that predicts log p(x) − log p_ref(x) for the pool (paper, appendix E).

    Teacher and reference score a random share of the pool; the reference model, given a scalar head on its mean-pooled
    states, learns the difference from it and predicts it for the whole pool.
    """

    share: Ratio = Field(0.02, description="of the pool, scored with teacher and reference")
    normalize: Literal["token", "byte"] = Field(
        "token", description="the difference that is predicted: per token or byte"
    )
    held_out: Share = Field(0.2, gt=0, description="of the scored share: what the proxy is measured on, not trained on")
    validation: Share = Field(0.1, gt=0, description="of the scored share: decides which epoch is kept")
    epochs: int = Field(5, ge=0, description="0: the head alone, by ridge regression on the reference's states")
    learning_rate: float = Field(5e-4, gt=0)
    batch: int = Field(16, gt=0, description="instances")
    precision: Precision = Field("bfloat16", description="of the products in training; the weights are float32")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the sample, its division and the order of training")

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if (total := self.held_out + self.validation) >= 1:
            raise ValueError(f"held_out + validation is {total:g}; nothing is left to train on")
        return self


class SamplerSettings(Settings):
    """A sampler by name, or `package.module:Class`, which is called with the other settings."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    sampler: str
    ratio: Ratio = 0.5
    normalize: Literal["token", "sum", "byte"] = "token"
    within: Literal["source"] | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _extra_only_for_own_classes(self) -> Self:
        if self.model_extra and ":" not in self.sampler:
            unknown = next(iter(self.model_extra))
            raise At((unknown,), f"no such setting; {did_you_mean(unknown, type(self).model_fields)}")
        return self


class DocumentSetSettings(CorpusSettings):
    """Documents that models are measured on (paper, section 3.1: 10K documents of DCLM), under the corpus's tokenizer.

    Each document is by itself, not packed with others.
    """

    documents: int | None = Field(None, gt=0, description="how many, drawn by a hash of their ids; None: all")
    windows: Literal["first", "all"] = Field(
        "first", description="first: the beginning of a document, as in the paper; all: the whole of it, cut in windows"
    )

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if self.source is not None:
            raise At(("source",), "models are measured on documents of your own: files or hub")
        return self


class TaskSettings(Settings):
    """Benchmarks of lm-evaluation-harness. `paper` stands for the nine tasks of the paper (section 3.1)."""

    tasks: list[str] = Field([], description="names of the harness, or `paper`")
    tasks_data: str | None = Field(
        None, description="folder with the tasks' files, a folder a task: nothing is read from the network"
    )
    shots: int = Field(0, ge=0, description="examples before each question; the paper's are zero-shot")
    limit: int | None = Field(None, gt=0, description="examples of each task; None: all")
    dtype: Precision = Field("bfloat16", description="of the model's weights")

    @field_validator("tasks", mode="before")
    @classmethod
    def _bare_name(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class EvaluateSettings(TaskSettings):
    """What teacher, reference, students, and `models` beside them, are measured on."""

    held_out: bool = True
    documents: dict[Name, DocumentSetSettings] = Field({})
    groups: dict[Name, list[str]] = Field(
        {}, description="sources of the held-out part whose text counts together: a yardstick of studies"
    )
    models: dict[Name, GivenModel] = Field({}, description="models of other people, for more rows of the tables")

    @field_validator("models", mode="before")
    @classmethod
    def _bare_models(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: {"model": model} if isinstance(model, str) else model for name, model in value.items()}


class RaySettings(Settings):
    """Where Ray is and what a worker takes of it. A worker loads the model once."""

    address: str | None = Field(None, description="None: RAY_ADDRESS, else a cluster of its own on this machine")
    workers: int | None = Field(None, gt=0, description="None: as many as the cluster has room for, while it grows too")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float | None = Field(
        None, ge=0, description="None: 1 where the cluster has GPUs and the stage a model"
    )


class Compute(Settings):
    """How, never what: nothing of this enters a fingerprint."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    engine: Literal["local", "ray"] = "local"
    ray: RaySettings = Field(default_factory=lambda: RaySettings())
    score_tokens: int | None = Field(
        None, gt=0, description="tokens per forward pass, padding included; None: what suits the device"
    )
    generate_batch: int = Field(16, gt=0, description="instances that a teacher continues at a time")
    server_concurrency: int = Field(16, gt=0, description="requests to a server at a time")
    train_micro_batch: int = Field(16, gt=0, description="instances per forward and backward pass, per device")
    compile: bool | Literal["auto"] = "auto"
    checkpoints: int = Field(10, gt=0, description="times a training run saves its state, for resuming")
    activation_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    report_to: str | list[str] = Field("tensorboard", description="tensorboard, wandb, trackio, ...; none: nobody")
    stop_at_spike: float | None = Field(
        3.0, gt=0, description="nats above the median of the last 100 steps at which a training stops; None: never"
    )
    trainer: dict[str, Any] = Field({}, description="passed to transformers.TrainingArguments as it is")


class Recipe(Settings):
    """The whole method: corpus to report. One field a stage."""

    version: Literal[1] = Field(1, alias="schema")
    name: Name
    corpus: CorpusSettings
    prepare: PrepareSettings
    teacher: AnyModel
    reference: AnyModel
    score: ScoreSettings = ScoreSettings()
    proxy: ProxySettings | None = Field(None, description="None: teacher and reference score the whole pool")
    select: dict[Name, SamplerSettings]
    generate: dict[Name, GenerateSettings] = Field({})
    retokenize: dict[Name, RetokenizeSettings] = Field({})
    students: dict[Name, StudentSettings] = Field({})
    evaluate: EvaluateSettings = EvaluateSettings()
    compute: Compute = Compute()

    @model_validator(mode="before")
    @classmethod
    def _resolve_like(cls, raw: object) -> object:
        """Give each student with `like: other` the settings of the other, under its own."""
        if not isinstance(raw, dict) or not isinstance(raw.get("students"), dict):
            return raw
        students = raw["students"]
        return {**raw, "students": {name: _with_like(students, name, ()) for name in students}}

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for role in {"teacher", "reference"} & self.students.keys():
            raise At(("students", role), "a student cannot have the name of a role; call it something else")
        for taken in {"teacher", "reference", *self.students} & self.evaluate.models.keys():
            raise At(("evaluate", "models", taken), "there is a model of this name; call it something else")
        for taken in {"held_out", "average", *self.evaluate.documents} & self.evaluate.groups.keys():
            raise At(("evaluate", "groups", taken), "tables have something else of this name; call it otherwise")
        for taken in {"held_out", "average", *self.evaluate.tasks} & self.evaluate.documents.keys():
            raise At(("evaluate", "documents", taken), "tables have something else of this name; call it otherwise")
        valid = ["pool"]
        for section, entries in (
            ("select", self.select),
            ("generate", self.generate),
            ("retokenize", self.retokenize),
            ("students", self.students),
        ):
            for name, entry in entries.items():
                data = getattr(entry, "data", "pool")
                if data not in valid:
                    raise At((section, name, "data"), did_you_mean(data, valid))
                if section != "students" and name in valid:
                    taken = "`pool` stands for all of the pool" if name == "pool" else "there is data of this name"
                    raise At((section, name), f"{taken}; call it something else")
            if section != "students":
                valid += entries
        if isinstance(self.teacher, TrainSettings) and not self.prepare.split.teacher:
            raise At(("prepare", "split"), "the teacher is trained here, but `teacher` leaves it no documents")
        if isinstance(self.reference, TrainSettings) and not self.prepare.split.reference:
            raise At(("prepare", "split"), "the reference is trained here, but `reference` leaves it no documents")
        for name, selection in self.select.items():
            if self.score.tokenizer == "own" and selection.sampler == "difference" and selection.normalize == "token":
                raise At(
                    ("select", name, "normalize"),
                    "with score.tokenizer: own, a difference per token compares tokens of different tokenizers; "
                    "use `normalize: byte`",
                )
        if self.score.quantize != "none" and isinstance(self.teacher, ServerModel | VllmModel):
            raise At(("score", "quantize"), "the teacher is not run by transformers, so it cannot be quantised here")
        if self.evaluate.held_out and not self.prepare.split.held_out:
            raise At(("prepare", "split"), "evaluate.held_out is on, but `held_out` leaves no documents")
        return self

    @model_validator(mode="after")
    def _from_is_a_model_that_is_there(self) -> Self:
        trained = [(("students", name), student) for name, student in self.students.items()]
        for path, model in [*trained, (("teacher",), self.teacher), (("reference",), self.reference)]:
            if isinstance(model, TrainSettings) and model.start is not None and model.start.model in self.students:
                raise At(
                    (*path, "from"),
                    f"it is a folder or a Hub id, and {model.start.model!r} is a student of this recipe; go on from "
                    "its folder (runs/.../students/...) in a second recipe, or with `miniplm train --from`",
                )
        return self

    @model_validator(mode="after")
    def _teacher_can_be_asked(self) -> Self:
        askers: list[tuple[str, ...]] = [("generate", name) for name in self.generate]
        askers += [("students", name, "objective") for name, s in self.students.items() if s.needs_teacher]
        for path in askers:
            if isinstance(self.teacher, ServerModel | VllmModel):
                raise At(path, "the teacher has to be at hand as a model that transformers runs, not behind a server")
        for name, student in self.students.items():
            if student.needs_teacher and student.data in self.retokenize:
                raise At(
                    ("students", name, "objective"),
                    "teacher and student would read different tokens; across tokenizers only data can be distilled "
                    "(select, generate)",
                )
        for role in ("teacher", "reference"):
            model = getattr(self, role)
            if isinstance(model, TrainSettings) and model.needs_teacher:
                raise At((role, "objective"), "it is trained before there is a teacher; only students have one")
        return self

    @model_validator(mode="after")
    def _proxy_can_stand_in(self) -> Self:
        if self.proxy is None:
            return self
        if not isinstance(self.reference, TrainSettings | GivenModel):
            raise At(("reference",), "a proxy is made of the reference's weights; give a `model:` or train one here")
        for name, selection in self.select.items():
            if selection.sampler in {"teacher", "reference"}:
                raise At(
                    ("select", name, "sampler"),
                    "with a proxy, teacher and reference score a share of the pool only; `difference` and `random` "
                    "can choose from all of it",
                )
            if selection.sampler == "difference" and selection.normalize != self.proxy.normalize:
                raise At(
                    ("select", name, "normalize"),
                    f"the proxy predicts the difference per {self.proxy.normalize}; set `proxy.normalize` to the same",
                )
        return self

    def resolved(self) -> str:
        """The recipe as YAML with the defaults written out; `load` reads it back to an equal recipe."""
        values = self.model_dump(by_alias=True, mode="json")
        # a sampler has only some of the settings: one that was not given may not be given now
        values["select"] = {n: s.model_dump(mode="json", exclude_unset=True) for n, s in self.select.items()}
        return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


_ONE_OF = ({"preset", "config", "from"}, {"tokens", "epochs"})  # of each group a student says one


def _with_like(students: Mapping[str, Any], name: str, seen: tuple[str, ...]) -> Any:
    own = students[name]
    if not isinstance(own, dict) or "like" not in own:
        return own
    other = own["like"]
    if other not in students:
        raise At(("students", name, "like"), did_you_mean(str(other), students))
    if other in seen or other == name:
        raise At(("students", name, "like"), f"it goes round in a circle: {' -> '.join((*seen, name, other))}")
    inherited = _with_like(students, other, (*seen, name))
    if not isinstance(inherited, dict):
        return own
    replaced = {key for group in _ONE_OF for key in group if own.keys() & group}
    kept = {key: value for key, value in inherited.items() if key not in replaced}
    return {**kept, **{key: value for key, value in own.items() if key != "like"}}
