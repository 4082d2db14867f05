"""What a finished run found, gathered from its artifacts into plain JSON types: `report.json`, and what the page shows.

Nothing is measured here: figures come from manifests, scores, evaluations and loss curves. The one derived thing is how
many tokens the control would need, read off the measured curves by linear interpolation in log tokens.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.evaluation.evaluate import Evaluation, open_evaluation
from miniplm.evaluation.loss import ALL, compare
from miniplm.packing.instances import Packed
from miniplm.packing.prepare import open_corpus
from miniplm.pipeline.chain import Chain, Stage
from miniplm.sampling.base import open_selection
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Scores, open_scores
from miniplm.training.trainer import read_curve

HISTOGRAM_BINS = 80
EXAMPLES = 3
EXAMPLE_CHARACTERS = 700
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_EASY_NATS = (
    1.5  # per token: an example of "easy and common" is one that the reference finds easier than this, if any is
)


def gather(stages: Chain) -> dict[str, Any]:
    """The findings of a run whose stages are all done. Raises ArtifactError if one is not."""
    recipe = stages.recipe
    corpus = open_corpus(stages["prepare"].path)
    evaluations = {name: open_evaluation(stage.path) for name, stage in stages.within("evaluate")}
    control = _control(stages)
    students = [_student(stages, name, evaluations.get(name)) for name in recipe.students]
    scores = {name: open_scores(stage.path) for name, stage in stages.within("score")}
    return {
        "schema": 1,
        "name": recipe.name,
        "control": control,
        "students": students,
        "models": [
            {"role": role, "parameters": _parameters(stages, role), **_losses(evaluations.get(role))}
            for role in ("teacher", "reference")
        ],
        "comparisons": _comparisons(students, evaluations, control),
        "scores": _score_histogram(scores["teacher"], scores["reference"]),
        "selections": [_selection(stages, name, stage) for name, stage in stages.within("select")],
        "effects": _effects(corpus.pool, scores["teacher"], scores["reference"], _kept(stages, len(corpus.pool))),
        "corpus": dict(corpus.manifest.counts),
        "stages": [_stage(stage, stages) for stage in stages.values()],
        "recipe": recipe.resolved(),
        "versions": artifact.provenance(stages["prepare"].path).get("versions", {}),
        "platform": platform.platform(),
    }


def tokens_to_reach(curve: Sequence[Mapping[str, Any]], loss: float) -> float | None:
    """Tokens at which a curve's held-out loss first was as low as `loss`; None if it never was.

    Between two points the loss is taken to be linear in the logarithm of the tokens.
    """
    points = [(p["tokens"], p["held_out_loss"]) for p in curve if p.get("held_out_loss") is not None]
    for number, (tokens, reached) in enumerate(points):
        if reached <= loss:
            if number == 0:
                return float(tokens)
            before_tokens, before = points[number - 1]
            share = (before - loss) / (before - reached)
            return exp(log(before_tokens) + share * (log(tokens) - log(before_tokens)))
    return None


def _control(stages: Chain) -> str | None:
    """The first student trained on a random selection; else one trained on the whole pool."""
    recipe = stages.recipe
    for name, student in recipe.students.items():
        if student.data != "pool" and recipe.select[student.data].sampler == "random":
            return name
    return next((name for name, student in recipe.students.items() if student.data == "pool"), None)


def _student(stages: Chain, name: str, evaluation: Evaluation | None) -> dict[str, Any]:
    stage = stages[f"students/{name}"]
    counts = artifact.read(stage.path).counts
    curve = [
        {key: point.get(key) for key in ("tokens", "train_loss", "held_out_loss", "learning_rate")}
        for point in read_curve(stage.path)
    ]
    return {
        "name": name,
        "data": stages.recipe.students[name].data,
        "parameters": counts["parameters"],
        "tokens": counts["train_tokens"],
        "epochs": counts["epochs"],
        "flops": counts["train_flops"],
        "seconds": artifact.provenance(stage.path).get("seconds"),
        **_losses(evaluation),
        "curve": curve,
        "path": stage.path.relative_to(stages.root).as_posix(),
    }


def _losses(evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {"loss": None, "loss_se": None, "bits_per_byte": None, "bits_per_byte_se": None, "by_source": []}
    loss, bits = evaluation.value("nats_per_token"), evaluation.value("bits_per_byte")
    bits_of = {row.source: row.value for row in evaluation.rows if row.metric == "bits_per_byte"}
    by_source = []
    for row in evaluation.rows:
        if row.metric == "nats_per_token" and row.source != ALL:
            by_source.append(
                {
                    "source": row.source,
                    "loss": row.value,
                    "loss_se": row.standard_error,
                    "bits_per_byte": bits_of.get(row.source),
                    "instances": row.n,
                }
            )
    return {
        "loss": loss.value,
        "loss_se": loss.standard_error,
        "bits_per_byte": bits.value,
        "bits_per_byte_se": bits.standard_error,
        "by_source": by_source,
    }


def _parameters(stages: Chain, role: str) -> int | None:
    stage = stages.get(f"train/{role}")
    return None if stage is None else artifact.read(stage.path).counts["parameters"]


def _comparisons(
    students: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Evaluation], control: str | None
) -> list[dict[str, Any]]:
    if control is None or control not in evaluations:
        return []
    baseline = next(s for s in students if s["name"] == control)
    found = []
    for student in students:
        if student["name"] == control:
            continue
        gap = compare(evaluations[student["name"]].scores, evaluations[control].scores)
        found.append(
            {
                "student": student["name"],
                "control": control,
                "difference": gap.value,
                "se": gap.standard_error,
                "instances": gap.n,
                "verdict": gap.verdict,
                "same_loss": _same_loss(student, baseline, gap.verdict),
            }
        )
    return found


def _same_loss(student: Mapping[str, Any], control: Mapping[str, Any], verdict: str) -> dict[str, Any] | None:
    """Who needs how many tokens for the same held-out loss: the better one's curve is read at the other's last loss.

    The curves are measured on fewer instances than the verdict; None where they do not agree with it.
    """
    finals = [c["held_out_loss"] for c in (student["curve"][-1], control["curve"][-1])]
    if None in finals or student["tokens"] != control["tokens"]:
        return None
    if verdict != ("better" if finals[0] <= finals[1] else "worse"):
        return None
    total = float(control["tokens"])
    if finals[0] <= finals[1]:
        reached = tokens_to_reach(student["curve"], finals[1])
        assert reached is not None
        note = (
            f"{student['name']} reached the control's final loss after {reached:,.0f} of {total:,.0f} tokens; "
            f"to reach {student['name']}'s final loss the control needs more than it was given"
        )
        return {"control_tokens": total, "student_tokens": reached, "ratio": total / reached, "note": note}
    reached = tokens_to_reach(control["curve"], finals[0])
    assert reached is not None
    note = f"the control reached {student['name']}'s final loss after {reached:,.0f} of {total:,.0f} tokens"
    return {"control_tokens": reached, "student_tokens": total, "ratio": reached / total, "note": note}


def _score_histogram(teacher: Scores, reference: Scores) -> dict[str, Any]:
    scores = differences(teacher, reference)
    low, high = np.quantile(scores, [0.001, 0.999])
    counts, edges = np.histogram(np.clip(scores, low, high), bins=HISTOGRAM_BINS)
    return {
        "normalize": "token",
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "quantiles": {str(q): float(np.quantile(scores, q)) for q in _QUANTILES},
        "mean": float(scores.mean()),
        "negative_share": float((scores < 0).mean()),
        "instances": len(scores),
    }


def _selection(stages: Chain, name: str, stage: Stage) -> dict[str, Any]:
    counts = artifact.read(stage.path).counts
    settings = stage.identity.recipe
    return {
        "name": name,
        "sampler": settings["sampler"],
        "ratio": settings.get("ratio"),
        "normalize": settings.get("normalize"),
        "within": settings.get("within"),
        "selected": counts["selected"],
        "of": counts["of"],
        "threshold": counts["threshold"],
        "by_source": [
            {"source": source, "pool": pool, "selected": kept} for source, (kept, pool) in counts["by_source"].items()
        ],
        "path": stage.path.relative_to(stages.root).as_posix(),
    }


def _kept(stages: Chain, instances: int) -> NDArray[np.bool_] | None:
    """Which instances the recipe's plain Difference Sampling kept, `[N]`; None if the recipe has none."""
    for name, settings in stages.recipe.select.items():
        if settings.sampler == "difference" and settings.within is None:
            kept = np.zeros(instances, np.bool_)
            kept[open_selection(stages[f"select/{name}"].path).rows] = True
            return kept
    return None


def _effects(pool: Packed, teacher: Scores, reference: Scores, kept: NDArray[np.bool_] | None) -> dict[str, Any]:
    """Examples of the paper's three effects (section 2.2), from different sources where there are several."""
    score = differences(teacher, reference)
    if kept is None:
        kept = score > np.median(score)
    nats = -reference.per("token")
    easy = np.lexsort((np.abs(score), nats > _EASY_NATS))  # both models fit it: score about 0, and easy if any is
    hard = np.argsort(-score, kind="stable")
    noisy = np.argsort(score, kind="stable")
    noisy = noisy[(score[noisy] < 0) & ~kept[noisy]]

    def examples(order: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [_example(pool, teacher, reference, int(row)) for row in _spread(order, teacher)]

    notes = {}
    if not (nats[~kept] <= _EASY_NATS).any():
        notes["easy_dropped"] = (
            f"The reference finds no dropped instance easy (below {_EASY_NATS} nats per token): it is too small or was "
            "trained too briefly. These are the ones on which the two models agree most."
        )
    if not len(noisy):
        notes["noisy_dropped"] = "No instance that was dropped scored below 0."
    return {
        "easy_dropped": examples(easy[~kept[easy] & (score[easy] >= 0)]),
        "hard_kept": examples(hard[kept[hard]]),
        "noisy_dropped": examples(noisy),
        "notes": notes,
    }


def _spread(order: NDArray[np.int64], scores: Scores) -> list[int]:
    """The first rows of an order that are of different sources, then of any, up to `EXAMPLES`."""
    chosen: dict[int, int] = {}
    for row in order[:2000]:
        chosen.setdefault(int(scores.source[row]), int(row))
        if len(chosen) == EXAMPLES:
            break
    first = list(chosen.values())
    return (first + [int(row) for row in order[:EXAMPLES] if int(row) not in first])[:EXAMPLES]


def _example(pool: Packed, teacher: Scores, reference: Scores, row: int) -> dict[str, Any]:
    t, r = float(-teacher.per("token")[row]), float(-reference.per("token")[row])
    text = pool.text(row)
    return {
        "row": row,
        "source": pool.dataset[row]["source"],
        "documents": pool.dataset[row]["documents"],
        "text": text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + " …",
        "teacher": t,
        "reference": r,
        "score": r - t,
    }


def _stage(stage: Stage, stages: Chain) -> dict[str, Any]:
    how = artifact.provenance(stage.path)
    rate: dict[str, Any] = {key: how[key] for key in ("tokens_per_s", "flops_per_s", "device") if key in how}
    return {
        "name": stage.name,
        "seconds": how.get("seconds"),
        "resumed": how.get("resumed", False),
        **rate,
        "path": stage.path.relative_to(stages.root).as_posix(),
        "fingerprint": stage.identity.fingerprint,
    }
