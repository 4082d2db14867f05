"""The settings of each stage, and `Recipe`, which has one field a stage.

Promised: frozen, strict about names and types; what cannot be together is refused with the path of the setting.
Not covered: whether files, models and tokenizers exist; the stages find that out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from miniplm.recipe.dialect import Dumper

Ratio = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Counted = Literal["all", "skip_after_separator"]
Documents = Literal["attend", "isolate"]
Precision = Literal["float32", "bfloat16", "float16"]


class At(ValueError):  # noqa: N818 (it never leaves this folder)
    """A complaint about the setting at `path`, relative to the model whose validator raises it."""

    def __init__(self, path: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


class Settings(BaseModel):
    """The base of all settings: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


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


class TokenizerTraining(Settings):
    """A byte-level BPE trained on the corpus's own documents (the held-out ones excepted)."""

    vocab_size: int = Field(gt=257, description="256 bytes, the separator, and merges")
    sample_bytes: int = Field(20_000_000, gt=0, description="text it is trained on, drawn evenly from all files")


class TokenizerSettings(Settings):
    """A fast tokenizer by name or folder, or one trained here."""

    name: str | None = Field(None, description="Hub id or folder")
    revision: str | None = None
    separator: str | None = Field(None, description="the token between documents; None: the tokenizer's end of text")
    train: TokenizerTraining | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.train is None):
            raise ValueError("exactly one of name, train is needed")
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


class GivenModel(Settings):
    """A trained model: a Hub id or a folder."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False


class ServerModel(Settings):
    """A trained model behind an OpenAI-compatible server that tells the log-probabilities of a prompt.

    What it is, is its name and `revision`: nobody can hash weights that are elsewhere. The URL is not part of it.
    """

    server: str = Field(pattern=r"^https?://", description="base URL, with /v1: http://localhost:8000/v1")
    model: str = Field(description="as the server calls it")
    revision: str = Field("", description="whatever tells one state of the served weights from another")
    dialect: Literal["auto", "vllm", "echo"] = Field("auto", description="`prompt_logprobs`, or `echo` with `logprobs`")
    send: Literal["ids", "text"] = Field(
        "ids", description="the prompt as token ids; `text`, which needs `tokenizer`, where a server takes no ids"
    )
    tokenizer: str | None = Field(None, description="its tokenizer: folder or Hub id; needed for `tokenizer: own`")
    key_env: str = Field(
        "MINIPLM_SERVER_KEY", description="the environment variable that holds the key, if one is needed"
    )


class VllmModel(Settings):
    """A trained model, scored by vLLM's offline engine instead of transformers."""

    vllm: str = Field(description="Hub id or folder")
    revision: str | None = None
    trust_remote_code: bool = False


ScoredModel = GivenModel | ServerModel | VllmModel


class TrainSettings(Settings):
    """A model trained from scratch. What is None comes from the preset.

    Optimiser and schedule are the paper's (section 3): AdamW(0.9, 0.98), weight decay 0.1, linear warm-up (2K of 100K
    steps), cosine to a tenth, clip 1.0.
    """

    preset: str | None = None
    config: dict[str, Any] | None = Field(None, description="any `transformers` config, `model_type` included")
    tokens: int = Field(gt=0, description="predicted tokens seen in training, rounded down to whole batches")
    batch_tokens: int | None = Field(None, gt=0)
    learning_rate: float | None = Field(None, gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.02, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    epsilon: float = Field(1e-6, gt=0)
    clip: float = Field(1.0, gt=0)
    precision: Precision = "bfloat16"
    seed: int = Field(0, ge=0, le=2**32 - 1)
    trainer: dict[str, Any] = Field({}, description="passed to transformers.TrainingArguments as it is")

    @model_validator(mode="after")
    def _one_architecture(self) -> Self:
        if (self.preset is None) == (self.config is None):
            raise ValueError("exactly one of preset, config is needed")
        return self


class StudentSettings(TrainSettings):
    """A student: a model and the selection that it is trained on (`pool`: all of the pool)."""

    data: str


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


class EvaluateSettings(Settings):
    """What the students are measured on."""

    held_out: bool = True


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
    server_concurrency: int = Field(16, gt=0, description="requests to a server at a time")
    train_micro_batch: int = Field(16, gt=0, description="instances per forward and backward pass, per device")
    compile: bool | Literal["auto"] = "auto"
    checkpoints: int = Field(10, gt=0, description="times a training run saves its state, for resuming")
    trainer: dict[str, Any] = Field({}, description="passed to transformers.TrainingArguments as it is")


_BY_KEY: Mapping[str, type[Settings]] = {"server": ServerModel, "vllm": VllmModel, "model": GivenModel}


def model_kind(value: object) -> str:
    """The class that a model's settings are of, told by their keys; class names are no keys of a recipe."""
    if isinstance(value, Settings):
        return type(value).__name__
    keys = value if isinstance(value, Mapping) else ()
    return next((kind.__name__ for key, kind in _BY_KEY.items() if key in keys), TrainSettings.__name__)


AnyModel = Annotated[
    Annotated[GivenModel, Tag("GivenModel")]
    | Annotated[ServerModel, Tag("ServerModel")]
    | Annotated[VllmModel, Tag("VllmModel")]
    | Annotated[TrainSettings, Tag("TrainSettings")],
    Discriminator(model_kind),
]


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
    students: dict[Name, StudentSettings] = {}
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
        if "pool" in self.select:
            raise At(("select", "pool"), "`pool` stands for all of the pool; call the selection something else")
        for name, student in self.students.items():
            if student.data not in (valid := ["pool", *self.select]):
                raise At(("students", name, "data"), did_you_mean(student.data, valid))
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
    return {**inherited, **{k: v for k, v in own.items() if k != "like"}} if isinstance(inherited, dict) else own


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """What was expected in place of a word, and the nearest of it."""
    names = sorted(valid)
    return " ".join(filter(None, [f"expected one of: {', '.join(names)}.", nearest(word, names)]))


def nearest(word: str, valid: Iterable[str]) -> str:
    """The valid name that a word was probably meant to be, as a question; "" if none is near."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else ""
