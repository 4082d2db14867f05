"""Recipes: what is to be made, as typed settings. `Compute` is apart: how it is made, never part of an identity.

In: a YAML file (or a dict) and `--set a.b=value` overrides. Out: a frozen `Recipe`.
Promised: an unknown key, a wrong type or an impossible combination is a `RecipeError` that names the key, the line of
the file, what was found and the nearest valid name. Every default is written out in the resolved recipe.
Not covered: whether files, models and tokenizers exist; the stages find that out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from miniplm.errors import RecipeError

Ratio = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Counted = Literal["all", "skip_after_separator"]
Documents = Literal["attend", "isolate"]
Precision = Literal["float32", "bfloat16", "float16"]


class _At(ValueError):  # noqa: N818 (it never leaves this file)
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
            raise _At((unknown,), f"no such setting; {_did_you_mean(unknown, type(self).model_fields)}")
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


def _model_kind(value: object) -> str:
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
    Discriminator(_model_kind),
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
            raise _At(("students", role), "a student cannot have the name of a role; call it something else")
        if "pool" in self.select:
            raise _At(("select", "pool"), "`pool` stands for all of the pool; call the selection something else")
        for name, student in self.students.items():
            if student.data not in (valid := ["pool", *self.select]):
                raise _At(("students", name, "data"), _did_you_mean(student.data, valid))
        if isinstance(self.teacher, TrainSettings) and not self.prepare.split.teacher:
            raise _At(("prepare", "split"), "the teacher is trained here, but `teacher` leaves it no documents")
        if isinstance(self.reference, TrainSettings) and not self.prepare.split.reference:
            raise _At(("prepare", "split"), "the reference is trained here, but `reference` leaves it no documents")
        for name, selection in self.select.items():
            if self.score.tokenizer == "own" and selection.sampler == "difference" and selection.normalize == "token":
                raise _At(
                    ("select", name, "normalize"),
                    "with score.tokenizer: own, a difference per token compares tokens of different tokenizers; "
                    "use `normalize: byte`",
                )
        if self.score.quantize != "none" and isinstance(self.teacher, ServerModel | VllmModel):
            raise _At(("score", "quantize"), "the teacher is not run by transformers, so it cannot be quantised here")
        if self.evaluate.held_out and not self.prepare.split.held_out:
            raise _At(("prepare", "split"), "evaluate.held_out is on, but `held_out` leaves no documents")
        return self

    @model_validator(mode="after")
    def _proxy_can_stand_in(self) -> Self:
        if self.proxy is None:
            return self
        if not isinstance(self.reference, TrainSettings | GivenModel):
            raise _At(("reference",), "a proxy is made of the reference's weights; give a `model:` or train one here")
        for name, selection in self.select.items():
            if selection.sampler in {"teacher", "reference"}:
                raise _At(
                    ("select", name, "sampler"),
                    "with a proxy, teacher and reference score a share of the pool only; `difference` and `random` "
                    "can choose from all of it",
                )
            if selection.sampler == "difference" and selection.normalize != self.proxy.normalize:
                raise _At(
                    ("select", name, "normalize"),
                    f"the proxy predicts the difference per {self.proxy.normalize}; set `proxy.normalize` to the same",
                )
        return self

    def resolved(self) -> str:
        """The recipe as YAML with the defaults written out; `load` reads it back to an equal recipe."""
        values = self.model_dump(by_alias=True, mode="json")
        # a sampler has only some of the settings: one that was not given may not be given now
        values["select"] = {n: s.model_dump(mode="json", exclude_unset=True) for n, s in self.select.items()}
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides of the form `select.difference.ratio=0.4` (values are YAML).

    Raises:
        RecipeError: the file cannot be read or does not describe a recipe.

    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    return parse(text, name=str(path), overrides=overrides)


def parse(text: str, *, name: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Make a recipe of YAML text; `name` is what errors call it. Raises `RecipeError` as `load` does."""
    try:
        tree = yaml.compose(text, Loader=_Loader)
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{name} is not a recipe.", facts={"expected": "a mapping that begins with `schema: 1`"})
    if "schema" not in raw:
        raise RecipeError(f"{name} does not say which schema it is written in.", remedy="Begin it with `schema: 1`.")
    overridden: set[tuple[str, ...]] = set()
    for override in overrides:
        overridden.add(_apply(raw, override))
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        assert tree is not None
        raise _explain(error, raw, tree, name, overridden) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would take for a number, such as the commit 12e4567."""


for _way in (_Loader, _Dumper):
    _way.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _with_like(students: Mapping[str, Any], name: str, seen: tuple[str, ...]) -> Any:
    own = students[name]
    if not isinstance(own, dict) or "like" not in own:
        return own
    other = own["like"]
    if other not in students:
        raise _At(("students", name, "like"), _did_you_mean(str(other), students))
    if other in seen or other == name:
        raise _At(("students", name, "like"), f"it goes round in a circle: {' -> '.join((*seen, name, other))}")
    inherited = _with_like(students, other, (*seen, name))
    return {**inherited, **{k: v for k, v in own.items() if k != "like"}} if isinstance(inherited, dict) else own


def _apply(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    key, equals, value = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {override!r} is not of the form key.key=value.")
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
    target = raw
    for step in path[:-1]:
        inner = target.setdefault(step, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r}: `{step}` is {inner!r}, which has no keys of its own.")
        target[step] = target = dict(inner)  # a copy: with YAML aliases it may stand elsewhere too
    target[path[-1]] = parsed
    return path


def _explain(
    error: ValidationError, raw: Mapping[str, Any], tree: yaml.Node, name: str, overridden: set[tuple[str, ...]]
) -> RecipeError:
    """The first of pydantic's complaints as an error of ours, with the place in the file."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    cause = first.get("ctx", {}).get("error")
    inner = cause.path if isinstance(cause, _At) else ()
    path, node = _locate((*first["loc"], *inner), tree, overridden)
    dotted = ".".join(path)
    where = f"{name}, line {node.start_mark.line + 1}"
    if any(path[: len(o)] == o or o[: len(path)] == path for o in overridden):
        where = f"{name} with --set {dotted}"
    if first["type"] == "extra_forbidden":
        valid = sorted(_valid_names(path[:-1], raw))
        return RecipeError(
            f"{where}: unknown key `{path[-1]}`{' in ' + '.'.join(path[:-1]) if len(path) > 1 else ''}.",
            facts={"found": _short(first["input"], path[-1]), "expected": f"one of: {', '.join(valid)}"},
            remedy=_nearest(path[-1], valid),
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
    loc: tuple[int | str, ...], tree: yaml.Node, overridden: Iterable[tuple[str, ...]] = ()
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
        elif step == loc[-1] or any(o[: len(path) + 1] == (*path, step) for o in overridden):
            node = yaml.ScalarNode("", "")  # a key that came with --set; what is below it is not in the file either
            path.append(str(step))
    return tuple(path), mark


def _valid_names(path: tuple[str, ...], raw: Mapping[str, Any]) -> list[str]:
    """The keys that are valid in the mapping at `path` of a recipe."""
    model: type[BaseModel] = Recipe
    open_mapping = False
    for step in path:
        if open_mapping:
            open_mapping = False
            continue
        field = next((f for n, f in model.model_fields.items() if step in (n, f.alias)), None)
        if field is None:
            return []
        models = _models_in(field.annotation)
        if not models:
            return []
        kind = _model_kind(raw.get(step))
        model = next((m for m in models if m.__name__ == kind), models[-1])
        open_mapping = getattr(field.annotation, "__origin__", None) is dict
    return [f.alias or n for n, f in model.model_fields.items()] + (["like"] if model is StudentSettings else [])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models_in(inner)]


def _did_you_mean(word: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    return " ".join(filter(None, [f"expected one of: {', '.join(names)}.", _nearest(word, names)]))


def _nearest(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else ""


def _short(value: object, key: str) -> str:
    text = f"{key}: {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."
