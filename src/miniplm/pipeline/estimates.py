"""What the stages of a chain take, told without running them: operations, tokens and bytes.

In: a chain. Out: an `Estimate` for each stage, from the recipe, the manifests of what is done, and models without
weights. Nothing is made, and nothing raises: what cannot be told is None (a model behind a server, a Hub out of reach).

    train       operations of a token by `training.matching.passes` (the teacher's included) × tokens, as the trainer
                counts them; the same number that the manifest will have
    score       a forward pass of each predicted token; evaluate alike
    generate    a forward pass of every token of the instance, prompts included
    proxy       `scoring/proxy_training.py`: what it reads, and three passes for each instance it learns from

A forward pass is that of `models/flops.py`: linear layers, the head, attention. Of bytes only the order is promised: a
factor of two. Scratch is what a training keeps to resume from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from miniplm import artifact
from miniplm.analysis.cost import score_bytes
from miniplm.artifact import Manifest
from miniplm.errors import MiniplmError
from miniplm.models.flops import TRAINING_PASSES, forward_flops, without_weights
from miniplm.models.load import model_fingerprint, new_model
from miniplm.packing.instances import packed_identity
from miniplm.packing.split import parts_in
from miniplm.pipeline.chain import Chain, Stage
from miniplm.pipeline.sizes import Rows, done, rows_of, text_bytes
from miniplm.recipe import GivenModel, ProxySettings, ScoredModel, TrainSettings
from miniplm.training.matching import matched_share, passes
from miniplm.training.plan import Plan
from miniplm.training.presets import preset, resolve
from miniplm.training.sequence_kd import prompt_tokens

_TEXT_ON_DISK = 3.0  # text against the built-in corpus's Parquet; measured 3.9 on 16 MB
_TOKENIZER_BYTES = 64  # of a vocabulary's entry in tokenizer.json; measured
_ROW_BYTES = 3  # of a selected row number, zstd; measured
_FIGURES_BYTES = 30_000  # of an evaluation beside its scores: figures by source, Parquet's own headers; measured
_WEIGHT_BYTES = 4  # saved in float32
_STATE_BYTES = 2 * 12  # of a parameter: two states to resume from, each of weights and two moments in float32


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a stage takes.

    Attributes:
        flops: operations; None where no model is involved, or it is not known.
        tokens: predicted ones that are packed, read, learned from or written.
        disk_bytes: of what is made.
        scratch_bytes: on disk only while it is made.
        guessed: whether it hangs on a guess of how large the corpus is, or on how a text is cut.

    """

    flops: float | None = None
    tokens: int | None = None
    disk_bytes: float | None = None
    scratch_bytes: float | None = None
    guessed: bool = False


class Estimates(dict[str, Estimate]):
    """What each stage of a chain takes, by its name.

    Attributes:
        rows: fingerprint -> packed instances.
        models: fingerprint -> a model without weights; of a proxy its backbone.

    """

    def __init__(self, stages: Chain) -> None:
        super().__init__()
        self.stages = stages
        self.rows = rows_of(stages)
        self.models: dict[str, PreTrainedModel] = {}
        recipe = stages.recipe
        for given in (recipe.teacher, recipe.reference, *recipe.evaluate.models.values()):
            if not isinstance(given, TrainSettings):
                self._add_given(given)
        ways: dict[str, Callable[[Stage, Manifest | None], Estimate]] = {
            "documents": self._documents, "corpus": self._corpus, "packed": self._packed, "model": self._trained,
            "scores": self._scored, "evaluation": self._scored, "selection": self._selected, "proxy": self._proxy,
        }  # fmt: skip
        for name, stage in stages.items():
            way = ways.get(stage.identity.kind)
            self[name] = Estimate() if way is None else way(stage, done(stage))

    def forward(self, model: str, length: int) -> float | None:
        """Operations of a model's forward pass for each predicted token, at T = `length`; None if not known."""
        return forward_flops(self.models[model], length) if model in self.models else None

    def teacher_passes(self, student: str) -> float | None:
        """Operations of the teacher's reading what a student reads; None where it cannot, or they are not known."""
        settings = self.stages.recipe.students[student]
        stage = self.stages[f"students/{student}"]
        tokens = self[stage.name].tokens
        if settings.data in self.stages.recipe.retokenize or tokens is None:
            return None
        teacher = self.stages["score/teacher"].identity.inputs["model"]
        forward = self.forward(teacher, self.rows[stage.identity.inputs["data"]].length)
        return None if forward is None else forward * tokens

    def _add_given(self, given: ScoredModel) -> None:
        try:
            shape, fingerprint = without_weights(given), model_fingerprint(given)
        except Exception:  # transformers and the Hub raise what they like; it is then not known
            return
        if shape is not None:
            self.models[fingerprint] = shape

    def _documents(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        there = text_bytes(self.stages.recipe.corpus, self.stages.recipe.prepare.block_bytes)
        return Estimate(disk_bytes=None if there is None else there / _TEXT_ON_DISK, guessed=manifest is None)

    def _corpus(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        names = parts_in(self.stages.recipe.prepare.split)
        parts = [self.rows[packed_identity(stage.identity.fingerprint, name).fingerprint] for name in names]
        return Estimate(
            tokens=_sum(rows.tokens for rows in parts),
            disk_bytes=_sum([*(rows.disk_bytes for rows in parts), _tokenizer_bytes(parts[0])]),
            guessed=parts[0].guessed,
        )

    def _packed(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        rows = self.rows[stage.identity.fingerprint]
        disk_bytes = _sum([rows.disk_bytes, _tokenizer_bytes(rows)])
        teacher = stage.identity.inputs.get("teacher")
        if teacher is None or rows.instances is None:
            return Estimate(None, rows.tokens, disk_bytes, guessed=rows.guessed)
        settings = self.stages.recipe.generate[stage.name.split("/")[1]]
        try:
            written = rows.length + 1 - prompt_tokens(settings, rows.length)
        except MiniplmError:
            return Estimate(guessed=rows.guessed)
        forward = self.forward(teacher, rows.length)
        flops = None if forward is None else forward * rows.length * rows.instances
        return Estimate(flops, written * rows.instances, disk_bytes, guessed=rows.guessed)

    def _selected(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        rows = self.rows[stage.identity.fingerprint]
        kept = None if rows.instances is None else rows.instances * _ROW_BYTES
        return Estimate(tokens=rows.tokens, disk_bytes=kept, guessed=rows.guessed)

    def _scored(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        inputs, rule = stage.identity.inputs, stage.identity.recipe
        rows = self.rows.get(inputs["packed"])
        if rows is None or rows.tokens is None or rows.instances is None:
            return Estimate(guessed=True)
        forward = self.forward(inputs["model"], rows.length)
        beside = _FIGURES_BYTES if stage.identity.kind == "evaluation" else 0
        return Estimate(
            flops=None if forward is None else forward * rows.tokens,
            tokens=rows.tokens,
            disk_bytes=score_bytes(rows.instances, models=1) + beside,
            guessed=rows.guessed or rule["tokenizer"] == "own" or rule.get("documents") == "isolate",
        )

    def _trained(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        group, name = stage.name.split("/")
        recipe = self.stages.recipe
        settings = recipe.students[name] if group == "students" else getattr(recipe, name)
        rows = self.rows[stage.identity.inputs["data"]]
        try:
            model = (
                _to_train(settings, rows) if manifest is None else without_weights(GivenModel(model=str(stage.path)))
            )
            assert model is not None
            self.models[stage.identity.fingerprint] = model
            return self._training(stage, settings, rows, model)
        except Exception:  # transformers raises what it likes; the trainer will say what is wrong
            return Estimate(guessed=rows.guessed)

    def _training(self, stage: Stage, settings: TrainSettings, rows: Rows, model: PreTrainedModel) -> Estimate:
        forward, parameters = forward_flops(model, rows.length), model.num_parameters()
        asked = self.models.get(stage.identity.inputs.get("teacher", ""))
        guessed = settings.tokens is None and rows.guessed
        disk_bytes = parameters * _WEIGHT_BYTES * (1 + settings.keep) + (_tokenizer_bytes(rows) or 0)
        scratch = parameters * _STATE_BYTES
        if (settings.needs_teacher and asked is None) or (settings.tokens is None and rows.instances is None):
            return Estimate(None, None, disk_bytes, scratch, guessed)
        teacher, share = (0.0 if asked is None else forward_flops(asked, rows.length)), 1.0
        if settings.match == "operations":
            share = matched_share(settings.objective, forward, teacher)
        elif settings.match == "flops":
            assert asked is not None
            share = matched_share(settings.objective, parameters, asked.num_parameters())
        settled = settings.model_copy(update={"batch_tokens": _batch_tokens(settings)})
        plan = Plan.of(settled, rows.instances or 0, rows.length, self.stages.recipe.compute, share)
        tokens = plan.steps * plan.batch_tokens
        per_token = passes(settings.objective).cost(forward, teacher)
        return Estimate(per_token * tokens, tokens, disk_bytes, scratch, guessed)

    def _proxy(self, stage: Stage, manifest: Manifest | None) -> Estimate:
        settings, inputs = self.stages.recipe.proxy, stage.identity.inputs
        assert settings is not None
        rows, model = self.rows[inputs["sample"]], self.models.get(inputs["model"])
        if model is None:
            return Estimate(guessed=rows.guessed)
        self.models[stage.identity.fingerprint] = backbone = model.base_model
        size = backbone.num_parameters() * _WEIGHT_BYTES + (_tokenizer_bytes(rows) or 0)
        if rows.instances is None:
            return Estimate(disk_bytes=size, guessed=rows.guessed)
        tokens = _proxy_passes(settings, rows.instances) * rows.length
        return Estimate(tokens * forward_flops(backbone, rows.length), tokens, size, guessed=rows.guessed)


def _to_train(settings: TrainSettings, rows: Rows) -> PreTrainedModel | None:
    """A model without weights, as the trainer will make it; of a tokenizer out of reach, with the preset's vocabulary.

    Raises whatever transformers raises, and MiniplmError.
    """
    if settings.start is not None:
        return without_weights(settings.start)
    vocab_size = rows.vocab_size
    if vocab_size is None and settings.preset is not None:
        vocab_size = preset(settings.preset).vocab_size
    if vocab_size is None:
        vocab_size = (settings.config or {})["vocab_size"]
    config = resolve(settings, vocab_size, separator=0).config
    assert config is not None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return new_model(config, settings.seed)


def _batch_tokens(settings: TrainSettings) -> int:
    """Of a step: as the recipe says, the preset, or how the model that it goes on from was trained."""
    if settings.batch_tokens is not None:
        return settings.batch_tokens
    if settings.preset is not None:
        return preset(settings.preset).batch_tokens
    assert settings.start is not None
    return int(artifact.read(Path(settings.start.model).expanduser()).counts["batch_tokens"])


def _proxy_passes(settings: ProxySettings, sampled: int) -> int:
    """Forward passes of an instance that fine-tuning takes, as `proxy_training.py` counts them."""
    held_out, validation = (max(2, round(share * sampled)) for share in (settings.held_out, settings.validation))
    training = sampled - held_out - validation
    batch = min(settings.batch, training)
    steps = max(1, settings.epochs * training // batch) if settings.epochs and training > 0 else 0
    return training + (1 + settings.epochs) * validation + TRAINING_PASSES * steps * batch + held_out


def _tokenizer_bytes(rows: Rows) -> int | None:
    return None if rows.vocab_size is None else rows.vocab_size * _TOKENIZER_BYTES


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None if a part of it is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
