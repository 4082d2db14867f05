"""What a finished run says of its trainings: what each model was, took and reached, and students against controls.

In: the stages, all done. Out: plain JSON types. Figures come from manifests, provenance, loss curves and evaluations;
one thing is derived: the difference of two models in bits per byte.

Nats per token of different tokenizers are of different things. Where a model's tokenizer is not the corpus's, `loss` is
None and it is compared in bits per byte. A training loss is comparable only where it is a cross entropy on text: of
another objective, `cross_entropy` is the one that it reports, or None.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from miniplm import artifact
from miniplm.evaluation.evaluate import Evaluation
from miniplm.evaluation.loss import ALL, Difference, compare
from miniplm.pipeline.chain import Chain
from miniplm.recipe import NextTokenSettings, Recipe, StudentSettings, TrainSettings, VanillaKDSettings
from miniplm.scoring.base import Scores
from miniplm.training.checkpoint import Point, read_curve

_POINT = ("step", "tokens", "flops", "train_loss", "cross_entropy", "held_out_loss", "learning_rate")
_TABLE = (
    "name", "objective", "data", "made_of", "model_type", "parameters", "tokens", "steps", "match", "matched_share",
    "epochs", "flops", "train_seconds", "tokens_per_s", "share_of_matmul_rate", "device", "processes",
    "final_train_loss", "final_cross_entropy", "own_tokenizer", "loss", "loss_se", "bits_per_byte", "bits_per_byte_se",
    "control",
)  # fmt: skip
_TABLE_COMPARED = ("unit", "difference", "se", "bits_difference", "verdict")
_COUNTS = {
    "model_type": "model_type",
    "parameters": "parameters",
    "tokens": "train_tokens",
    "steps": "steps",
    "batch_tokens": "batch_tokens",
    "learning_rate": "learning_rate",
    "instances": "instances",
    "epochs": "epochs",
    "matched_share": "matched_share",
    "flops": "train_flops",
    "final_train_loss": "final_train_loss",
}
"""What a row calls it -> what the manifest counts."""
_PROVENANCE = (
    "seconds", "resumed", "train_seconds", "tokens_per_s", "flops_per_s", "share_of_matmul_rate", "device", "processes",
)  # fmt: skip


def student(stages: Chain, name: str, evaluation: Evaluation | None, corpus_tokenizer: str) -> dict[str, Any]:
    """All that is known of a student; `corpus_tokenizer` is a fingerprint."""
    settings = stages.recipe.students[name]
    tokenizer = corpus_tokenizer
    if (retokenized := stages.get(f"retokenize/{settings.data}")) is not None:
        tokenizer = artifact.read(retokenized.path).counts["tokenizer"]
    return {
        "name": name,
        "data": settings.data,
        "made_of": origins(stages.recipe, settings.data),
        "tokenizer": tokenizer,
        "own_tokenizer": tokenizer != corpus_tokenizer,
        "control": control_of(stages.recipe, name),
        **_trained(stages, f"students/{name}", settings),
        **losses(evaluation, corpus_tokenizer),
    }


def scoring_model(stages: Chain, role: str, evaluation: Evaluation | None, corpus_tokenizer: str) -> dict[str, Any]:
    """All that is known of teacher or reference; of a model that was given, that is how well it predicts."""
    settings = getattr(stages.recipe, role)
    found: dict[str, Any] = dict.fromkeys(
        ("objective", "match", *_COUNTS, *_PROVENANCE, "final_cross_entropy", "curve", "path")
    )
    if isinstance(settings, TrainSettings):
        found |= _trained(stages, f"train/{role}", settings)
    return {"role": role, **found, **losses(evaluation, corpus_tokenizer)}


def origins(recipe: Recipe, data: str) -> list[dict[str, str]]:
    """What a student reads and what that was made of, back to the pool or a selection: `name` and `kind` of each."""
    made: list[dict[str, str]] = []
    while True:
        if data in recipe.retokenize:
            made.append({"name": data, "kind": "retokenised"})
            data = recipe.retokenize[data].data
        elif data in recipe.generate:
            made.append({"name": data, "kind": "generated"})
            data = recipe.generate[data].data
        else:
            return [*made, {"name": data, "kind": "pool" if data == "pool" else "selection"}]


def control_of(recipe: Recipe, name: str) -> str | None:
    """The student that this one is compared with; None if there is none, or if it is that student itself.

    The first that was plainly pre-trained on what chance chose or on the whole pool, of the same model settings, length
    (`tokens`; or both in `epochs`, whose numbers differ where their data does) and tokenizer. One that reads what the
    teacher wrote is a control only of others that do, and only where none of real text is there.
    """
    own = recipe.students[name]
    alike = {
        other: origins(recipe, settings.data)
        for other, settings in recipe.students.items()
        if isinstance(settings.objective, NextTokenSettings) and _terms(recipe, settings) == _terms(recipe, own)
    }
    by_chance = {other: made for other, made in alike.items() if _chosen_by_chance(recipe, made[-1])}
    real = [other for other, made in by_chance.items() if not _written(made)]
    found = real or (list(by_chance) if _written(origins(recipe, own.data)) else [])
    return found[0] if found and found[0] != name else None


def controls(students: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the students with which others are compared, in their order."""
    named = {one["control"] for one in students}
    return [one["name"] for one in students if one["name"] in named]


def losses(evaluation: Evaluation | None, corpus_tokenizer: str) -> dict[str, Any]:
    """Held-out figures, in all and by source; `loss`, in nats per token, only where the tokens are the corpus's."""
    if evaluation is None:
        return {"loss": None, "loss_se": None, "bits_per_byte": None, "bits_per_byte_se": None, "by_source": []}
    comparable = evaluation.scores.tokenizer == corpus_tokenizer
    loss, bits = evaluation.value("nats_per_token"), evaluation.value("bits_per_byte")
    bits_of = {row.source: row.value for row in evaluation.rows if row.metric == "bits_per_byte"}
    return {
        "loss": loss.value if comparable else None,
        "loss_se": loss.standard_error if comparable else None,
        "bits_per_byte": bits.value,
        "bits_per_byte_se": bits.standard_error,
        "by_source": [
            {
                "source": row.source,
                "loss": row.value if comparable else None,
                "loss_se": row.standard_error if comparable else None,
                "bits_per_byte": bits_of.get(row.source),
                "instances": row.n,
            }
            for row in evaluation.rows
            if row.metric == "nats_per_token" and row.source != ALL
        ],
    }


def comparisons(students: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Each student against its control; `bits_difference`, in bits per byte, orders them whatever the unit is."""
    rows = {one["name"]: one for one in students}
    found = []
    for one in students:
        control = one["control"]
        if control is None or not {one["name"], control} <= evaluations.keys():
            continue
        baseline, ours, theirs = rows[control], evaluations[one["name"]].scores, evaluations[control].scores
        same_tokens = ours.tokenizer == theirs.tokenizer and np.array_equal(ours.n_tokens, theirs.n_tokens)
        in_nats = same_tokens and not one["own_tokenizer"]  # nats beside those of other students
        gap = compare(ours, theirs) if in_nats else compare_bits(ours, theirs)
        found.append(
            {
                "student": one["name"],
                "control": control,
                "unit": "nats per token" if in_nats else "bits per byte",
                "difference": gap.value,
                "se": gap.standard_error,
                "bits_difference": one["bits_per_byte"] - baseline["bits_per_byte"],
                "instances": gap.n,
                "verdict": gap.verdict,
            }
        )
    return found


def compare_bits(student: Scores, control: Scores) -> Difference:
    """Student minus control in bits per byte, paired by instance, whatever their tokens are.

    Each is a ratio of its own sums: an instance's first token is not counted, and is as long as a tokenizer makes it.
    The standard error is that of a difference of two ratios of means over the same instances, linearised as in
    `miniplm.evaluation.loss`. Raises ValueError if the instances are not the same.
    """
    if student.packed != control.packed:
        raise ValueError("the two models were measured on different instances")
    value, residual = 0.0, np.zeros(len(student))
    for sign, scores in ((1, student), (-1, control)):
        bits, amount = -scores.logp / np.log(2), scores.n_bytes.astype(np.float64)
        ratio = float(bits.sum() / amount.sum())
        value += sign * ratio
        residual += sign * (bits - ratio * amount) / amount.mean()
    error = float(np.std(residual, ddof=1)) / len(student) ** 0.5 if len(student) > 1 else 0.0
    return Difference(value, error, len(student))


def students_csv(findings: Mapping[str, Any]) -> str:
    """A table of the students, a row each; empty where something was not measured."""
    compared = {one["student"]: one for one in findings["comparisons"]}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_TABLE, *_TABLE_COMPARED])
    for one in findings["students"]:
        said = {"objective": objective_label(one["objective"]), "made_of": origin_label(one["made_of"])}
        gap = compared.get(one["name"], {})
        writer.writerow([*((one | said)[key] for key in _TABLE), *(gap.get(key) for key in _TABLE_COMPARED)])
    return text.getvalue()


def _terms(recipe: Recipe, settings: StudentSettings) -> tuple[object, ...]:
    """What a student and its control have in common: the model, how long it is trained, the tokenizer."""
    retokenized = recipe.retokenize.get(settings.data)
    tokenizer = recipe.prepare.tokenizer if retokenized is None else retokenized.tokenizer
    return settings.preset, settings.config, settings.start, settings.tokens, tokenizer  # in epochs, `tokens` is None


def _chosen_by_chance(recipe: Recipe, origin: Mapping[str, str]) -> bool:
    return origin["kind"] == "pool" or recipe.select[origin["name"]].sampler == "random"


def _written(made_of: Sequence[Mapping[str, str]]) -> bool:
    return any(one["kind"] == "generated" for one in made_of)


def _trained(stages: Chain, stage_name: str, settings: TrainSettings) -> dict[str, Any]:
    """What a model that was trained here is, took and reached on the way."""
    stage = stages[stage_name]
    counts, how = artifact.read(stage.path).counts, artifact.provenance(stage.path)
    curve = curve_of(stage.path, settings)
    return {
        "objective": settings.objective.model_dump(mode="json"),
        "match": settings.match,
        **{name: counts[counted] for name, counted in _COUNTS.items()},
        **{name: how.get(name) for name in _PROVENANCE},
        "final_cross_entropy": curve[-1]["cross_entropy"],
        "curve": curve,
        "path": stage.path.relative_to(stages.root).as_posix(),
    }


def curve_of(model: Path, settings: TrainSettings) -> list[Point]:
    """A model's loss curve; at each point all of `_POINT`, then the objective's metrics. What is no number is None."""
    plain = isinstance(settings.objective, NextTokenSettings)
    found = []
    for point in read_curve(model):
        if plain:
            point["cross_entropy"] = point.get("train_loss")
        whole = {**dict.fromkeys(_POINT), **point}
        found.append({name: value if value is None or isfinite(value) else None for name, value in whole.items()})
    return found


def objective_label(objective: Mapping[str, Any] | None) -> str:
    """An objective in a few words: `vanilla_kd λ=0.5`."""
    if objective is None:
        return "–"
    if objective["name"] != VanillaKDSettings().name:
        return str(objective["name"])
    heat = "" if objective["temperature"] == 1 else f", temperature {objective['temperature']:g}"
    return f"{objective['name']} λ={objective['share']:g}{heat}"


def origin_label(made_of: Sequence[Mapping[str, str]]) -> str:
    """How data was made: `retokenised from written, generated from random`; nothing of the pool or a selection."""
    return ", ".join(f"{one['kind']} from {before['name']}" for one, before in pairwise(made_of))
