"""What a finished run found, gathered from its artifacts into plain JSON types: `report.json`, and what the page shows.

Nothing is measured here: figures come from manifests, scores, evaluations and loss curves. The one derived thing is how
many tokens the control would need, read off the measured curves by linear interpolation in log tokens.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.analysis.agreement import agreement
from miniplm.evaluation.evaluate import Evaluation, open_evaluation
from miniplm.evaluation.loss import ALL, compare
from miniplm.packing.instances import Packed, open_packed
from miniplm.packing.prepare import open_corpus
from miniplm.packing.sample import pool_rows
from miniplm.pipeline.chain import Chain, Stage
from miniplm.sampling.base import open_selection
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Normalize, Scores, open_scores
from miniplm.scoring.proxy import FIGURES, HELD_OUT
from miniplm.training.checkpoint import read_curve

HISTOGRAM_BINS = 80
EXAMPLES = 3
EXAMPLE_CHARACTERS = 700
PAPER_PROXY = {
    "full_path": 2e20,  # 1.8B teacher, 104M reference, 100B tokens, by non-embedding parameters
    "proxy_path": 9e18,
    "saved": 0.95,
    "scores": {"without": 41.3, "with": 40.9},  # average of nine tasks, 200M student
    "references": [
        {"reference": "45M", "pearson": 0.743, "spearman": 0.774, "agreement": 0.806},
        {"reference": "104M", "pearson": 0.826, "spearman": 0.840, "agreement": 0.874},
        {"reference": "200M", "pearson": 0.856, "spearman": 0.879, "agreement": 0.895},
    ],
}
"""What the paper printed: appendix E, and of Table 11 (appendix D.4) the reference's size, which is another quantity:
how log p − log p_ref follows log p − log q of a 500M student, at ratio 0.5."""
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
    unit: Normalize = "token" if scores["teacher"].tokenizer == scores["reference"].tokenizer else "byte"
    proxy = _proxy(stages)
    if proxy is None:
        instances, rows, normalize = corpus.pool, np.arange(len(corpus.pool)), unit
        difference = differences(scores["teacher"], scores["reference"], unit)
    else:  # teacher and reference have seen a sample of the pool only
        instances, normalize = open_packed(stages["proxy/sample"].path), proxy["normalize"]
        rows, difference = pool_rows(instances), scores["difference"].per("token")
    kept = _kept(stages, len(corpus.pool))
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
        "scores": _score_histogram(difference, normalize),
        "proxy": proxy,
        "selections": [_selection(stages, name, stage) for name, stage in stages.within("select")],
        "effects": _effects(
            instances, rows, scores["teacher"], scores["reference"], unit, None if kept is None else kept[rows]
        ),
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


def _proxy(stages: Chain) -> dict[str, Any] | None:
    """What the proxy was measured to be, with its agreement at the ratios in use; None if the recipe has none."""
    if (stage := stages.get("proxy/model")) is None:
        return None
    held_out = pq.read_table(stage.path / HELD_OUT)
    true, predicted = held_out["difference"].to_numpy(), held_out["predicted"].to_numpy()
    return {
        **json.loads((stage.path / FIGURES).read_bytes()),
        "agreement": [
            {
                "selection": name,
                "ratio": settings.ratio,
                "agreement": agreement(true, predicted, settings.ratio),
                "by_chance": settings.ratio**2
                + (1 - settings.ratio) ** 2,  # of rankings that know nothing of each other
            }
            for name, settings in stages.recipe.select.items()
            if settings.sampler == "difference"
        ],
        "paper": PAPER_PROXY,
    }


def proxy_lines(findings: Mapping[str, Any]) -> list[str]:
    """The proxy as lines for the terminal, from `report.json`; none if there was none."""
    if (proxy := findings.get("proxy")) is None:
        return []
    held_out, flops = proxy["held_out"], proxy["flops"]
    lines = [
        f"proxy: Spearman {held_out['spearman']:.3f}, Pearson {held_out['pearson']:.3f} with the true difference on "
        f"{held_out['instances']:,} held-out instances"
    ]
    lines += [
        f"  {one['selection']}: the same decision on {one['agreement']:.1%} of them at ratio {one['ratio']:g} "
        f"(by chance {one['by_chance']:.1%})"
        for one in proxy["agreement"]
    ]
    if flops["saved"] is not None:
        paper = f"the paper, at its size: {PAPER_PROXY['proxy_path']:.0e} instead of {PAPER_PROXY['full_path']:.0e}"
        lines.append(
            f"  offline FLOPs: {flops['proxy_path']:.2e} instead of {flops['full_path']:.2e}, "
            f"{flops['saved']:.1%} saved ({paper}, {PAPER_PROXY['saved']:.0%})"
        )
    return lines


def _score_histogram(scores: NDArray[np.float64], normalize: str) -> dict[str, Any]:
    low, high = np.quantile(scores, [0.001, 0.999])
    counts, edges = np.histogram(np.clip(scores, low, high), bins=HISTOGRAM_BINS)
    return {
        "normalize": normalize,
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


def _effects(
    instances: Packed,
    rows: NDArray[np.int64],
    teacher: Scores,
    reference: Scores,
    unit: Normalize,
    kept: NDArray[np.bool_] | None,
) -> dict[str, Any]:
    """Examples of the paper's three effects (section 2.2), from different sources where there are several.

    Args:
        instances: those that both models scored: the pool, or a sample of it.
        rows: the row of the pool that each of them is.
        teacher: scores of the instances.
        reference: likewise.
        unit: what log p is given per: bytes where the two have different tokenizers.
        kept: which of them were selected.

    """
    score = differences(teacher, reference, unit)
    if kept is None:
        kept = score > np.median(score)
    nats = -reference.per("token")
    easy = np.lexsort((np.abs(score), nats > _EASY_NATS))  # both models fit it: score about 0, and easy if any is
    hard = np.argsort(-score, kind="stable")
    noisy = np.argsort(score, kind="stable")
    noisy = noisy[(score[noisy] < 0) & ~kept[noisy]]

    def examples(order: NDArray[np.int64]) -> list[dict[str, Any]]:
        found = [_example(instances, teacher, reference, unit, int(row)) for row in _spread(order, teacher)]
        return [{**example, "row": int(rows[example["row"]])} for example in found]

    notes = {}
    if not (nats[~kept] <= _EASY_NATS).any():
        notes["easy_dropped"] = (
            f"The reference finds no dropped instance easy (below {_EASY_NATS} nats per token): it is too small or was "
            "trained too briefly. These are the ones on which the two models agree most."
        )
    if not len(noisy):
        notes["noisy_dropped"] = "No instance that was dropped scored below 0."
    return {
        "unit": unit,
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


def _example(pool: Packed, teacher: Scores, reference: Scores, unit: Normalize, row: int) -> dict[str, Any]:
    t, r = float(-teacher.per(unit)[row]), float(-reference.per(unit)[row])
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
