"""Settings of models: given, behind a server, or trained here; of what they minimise, and of data made for students.

Promised: as in `settings.py`. Not covered: whether a preset or a class of the user's exists; the stages find that out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from miniplm.recipe.base import At, Precision, Ratio, Settings


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


class NextTokenSettings(Settings):
    """Plain next-token cross entropy (paper, Eq. 5)."""

    name: Literal["next_token"] = "next_token"


class VanillaKDSettings(Settings):
    """Token-level distillation, online (paper, section 3, baselines): (1 − λ)·CE + λ·H(p, q), full vocabulary."""

    name: Literal["vanilla_kd"] = "vanilla_kd"
    share: float = Field(0.5, ge=0, le=1, description="λ: of the teacher's term in the loss")
    temperature: float = Field(1.0, gt=0)
    dtype: Precision = Field("bfloat16", description="of the teacher's weights")


class MiniLLMSettings(Settings):
    """On-policy reverse KL (MiniLLM, arXiv 2306.08543): the student continues a prompt, the teacher judges."""

    name: Literal["minillm"] = "minillm"
    prompt_tokens: int | None = Field(None, gt=0, description="None: three quarters of an instance, the paper's 768")
    teacher_mix: float = Field(0.2, ge=0, lt=1, description="share of the teacher in what is sampled from")
    next_token: float = Field(1.0, ge=0, description="weight of the cross entropy on the prompt, which is real text")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    reward_clip: float = Field(10.0, gt=0, description="nats: bound on a token's log-ratio")
    length_normalised: bool = Field(True, description="rewards that follow a token are averaged, not summed")
    baseline: bool = Field(True, description="take off what the tokens before let expect: less noise, no bias")
    dtype: Precision = Field("bfloat16", description="of the teacher's weights")


class OwnObjective(Settings):
    """An objective of the user's: `package.module:Class`, which is called with the other settings."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[\w.]+:\w+$")


ObjectiveSettings = NextTokenSettings | VanillaKDSettings | MiniLLMSettings | OwnObjective

_OBJECTIVES: Mapping[str, type[Settings]] = {
    "next_token": NextTokenSettings,
    "vanilla_kd": VanillaKDSettings,
    "minillm": MiniLLMSettings,
}


def objective_kind(value: object) -> str | None:
    """The class that an objective's settings are of, told by its name."""
    if isinstance(value, Settings):
        return type(value).__name__
    name = value.get("name") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        return None
    return OwnObjective.__name__ if ":" in name else _OBJECTIVES[name].__name__ if name in _OBJECTIVES else None


AnyObjective = Annotated[
    Annotated[NextTokenSettings, Tag("NextTokenSettings")]
    | Annotated[VanillaKDSettings, Tag("VanillaKDSettings")]
    | Annotated[MiniLLMSettings, Tag("MiniLLMSettings")]
    | Annotated[OwnObjective, Tag("OwnObjective")],
    Discriminator(
        objective_kind,
        custom_error_type="unknown_objective",
        custom_error_message=f"one of {', '.join(_OBJECTIVES)}, or package.module:Class",
    ),
]


class TrainSettings(Settings):
    """A model trained from scratch, or further from given weights. What is None comes from the preset.

    Optimiser and schedule are the paper's (section 3): AdamW(0.9, 0.98), weight decay 0.1, linear warm-up (2K of 100K
    steps), cosine to a tenth, clip 1.0.
    """

    preset: str | None = None
    config: dict[str, Any] | None = Field(None, description="any `transformers` config, `model_type` included")
    start: GivenModel | None = Field(None, alias="from", description="weights to go on from: a Hub id or a folder")
    tokens: int | None = Field(None, gt=0, description="predicted tokens seen, rounded down to whole batches")
    epochs: float | None = Field(None, gt=0, description="instead of `tokens`: passes over the model's own data")
    match: Literal["flops", "operations"] | None = Field(
        None,
        description="shorten to what plain pre-training of the same length costs: flops counts parameters, as the "
        "paper does; operations counts what is computed",
    )
    objective: AnyObjective = NextTokenSettings()
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
    keep: int = Field(0, ge=0, description="models kept along the way, evenly spaced, in `checkpoints/`")
    license: str | None = Field(None, description="for the model card, as the Hub spells it: apache-2.0")
    trainer: dict[str, Any] = Field({}, description="passed to transformers.TrainingArguments as it is")

    @field_validator("start", mode="before")
    @classmethod
    def _bare_model(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("objective", mode="before")
    @classmethod
    def _bare_objective(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if sum(given is not None for given in (self.preset, self.config, self.start)) != 1:
            raise At(("preset",), "exactly one of preset, config, from is needed")
        if (self.tokens is None) == (self.epochs is None):
            raise At(("tokens",), "exactly one of tokens, epochs is needed")
        if self.match is not None and not self.needs_teacher:
            raise At(("match",), "the objective has no teacher that costs anything: there is nothing to match")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective asks a teacher while the student learns."""
        return isinstance(self.objective, VanillaKDSettings | MiniLLMSettings)


class StudentSettings(TrainSettings):
    """A student: a model and what it is trained on (`pool`, a selection, or what was made of one of these)."""

    data: str


class GenerateSettings(Settings):
    """SeqKD (Kim and Rush 2016; paper, section 3, baselines): the teacher rewrites the end of each instance."""

    data: str = Field("pool", description="`pool` or a selection: the instances whose beginnings are the prompts")
    prompt_tokens: int | None = Field(None, gt=0, description="None: three quarters of an instance, the paper's 768")
    temperature: float = Field(1.0, ge=0, description="0: the likeliest token each time")
    top_p: Ratio = Field(1.0, description="sample from the likeliest tokens that together have this share")
    dtype: Precision = Field("bfloat16", description="of the teacher's weights")
    seed: int = Field(0, ge=0, le=2**32 - 1)


class RetokenizeSettings(Settings):
    """The text of chosen instances, packed again under another tokenizer (paper, section 3.2: other families)."""

    data: str = Field("pool", description="`pool`, a selection, or what was generated")
    tokenizer: TokenizerSettings
    sequence_length: int | None = Field(None, ge=2, description="None: as long as the instances are now")

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _bare_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("tokenizer")
    @classmethod
    def _is_there(cls, value: TokenizerSettings) -> TokenizerSettings:
        if value.train is not None:
            raise ValueError("a tokenizer by name or folder is needed here")
        return value


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
