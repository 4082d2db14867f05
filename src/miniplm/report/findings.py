"""What a finished run found, gathered from its artifacts into plain JSON types: `report.json`, and what the page shows.

Nothing is measured here: figures come from manifests, scores, evaluations and loss curves. What is said of models and
students is gathered in `training.py`, of the data made for them in `made_data.py`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.analysis.agreement import agreement
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.packing.instances import Packed, open_packed
from miniplm.packing.prepare import open_corpus
from miniplm.packing.sample import pool_rows
from miniplm.pipeline.chain import Chain, Stage
from miniplm.report.made_data import generated, retokenized
from miniplm.report.training import comparisons, scoring_model, student
from miniplm.sampling.base import open_selection
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Normalize, Scores, open_scores
from miniplm.scoring.proxy import FIGURES, HELD_OUT

SCHEMA = 3  # of the findings; a report of another schema is made anew
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
    tokenizer = corpus.manifest.counts["tokenizer"]
    students = [student(stages, name, evaluations.get(name), tokenizer) for name in recipe.students]
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
        "schema": SCHEMA,
        "name": recipe.name,
        "students": students,
        "models": [scoring_model(stages, role, evaluations.get(role), tokenizer) for role in ("teacher", "reference")],
        "comparisons": comparisons(students, evaluations),
        "scores": _score_histogram(difference, normalize),
        "proxy": proxy,
        "selections": [_selection(stages, name, stage) for name, stage in stages.within("select")],
        "generated": generated(stages),
        "retokenized": retokenized(stages),
        "effects": _effects(
            instances, rows, scores["teacher"], scores["reference"], unit, None if kept is None else kept[rows]
        ),
        "corpus": dict(corpus.manifest.counts),
        "stages": [_stage(stage, stages) for stage in stages.values()],
        "recipe": recipe.resolved(),
        "versions": artifact.provenance(stages["prepare"].path).get("versions", {}),
        "platform": platform.platform(),
    }


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
    rates = ("tokens_per_s", "flops_per_s", "share_of_matmul_rate", "device")
    return {
        "name": stage.name,
        "seconds": how.get("seconds"),
        "resumed": how.get("resumed", False),
        **{key: how.get(key) for key in rates},
        "path": stage.path.relative_to(stages.root).as_posix(),
        "fingerprint": stage.identity.fingerprint,
    }
