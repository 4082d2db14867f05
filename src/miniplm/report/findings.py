"""What a finished run found, gathered from its artifacts into plain JSON types: `report.json`, and what the page shows.

No model is asked here: figures come from manifests, scores, evaluations and loss curves. What is said of models and
students is gathered in `training.py`, of the data made for them in `made_data.py`, on documents and tasks in
`benchmarks.py`, by the analyses in `analysis.py`.
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
from miniplm.analysis.agreement import agreement, by_chance
from miniplm.analysis.effects import Effects, effects
from miniplm.analysis.examples import examples, neighbours
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.packing.instances import Packed, open_packed
from miniplm.packing.prepare import open_corpus
from miniplm.packing.sample import pool_rows
from miniplm.pipeline.chain import Chain, Stage
from miniplm.report import analysis, benchmarks
from miniplm.report.made_data import generated, retokenized
from miniplm.report.training import comparisons, losses, scoring_model, student
from miniplm.sampling.base import open_selection
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Normalize, open_scores
from miniplm.scoring.proxy import FIGURES, HELD_OUT

SCHEMA = 4  # of the findings; a report of another schema is made anew
HISTOGRAM_BINS = 80
PAPER_PROXY = {
    "full_path": 2e20,  # 1.8B teacher, 104M reference, 100B tokens, by non-embedding parameters
    "proxy_path": 9e18,
    "saved": 0.95,
    "scores": {"without": 41.3, "with": 40.9},  # average of nine tasks, 200M student
}
"""What the paper printed (appendix E)."""
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


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
    selection = analysis.plain_difference(recipe)
    kept = _kept(stages, selection, len(corpus.pool))
    found = effects(scores["teacher"], scores["reference"], None if kept is None else kept[rows], normalize=unit)
    scaling = analysis.scaling(students)
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "students": students,
        "models": [scoring_model(stages, role, evaluations.get(role), tokenizer) for role in ("teacher", "reference")],
        "others": [{"name": name, **losses(evaluations.get(name), tokenizer)} for name in recipe.evaluate.models],
        "comparisons": comparisons(students, evaluations),
        "documents": benchmarks.documents(stages, tokenizer),
        "tasks": benchmarks.tasks(stages),
        "scaling": scaling,
        "scores": _score_histogram(difference, normalize),
        "proxy": proxy,
        "selections": [_selection(stages, name, stage) for name, stage in stages.within("select")],
        "generated": generated(stages),
        "retokenized": retokenized(stages),
        "effects": _effects(found, instances, rows, selection),
        "agreement": analysis.agreements(recipe, students, evaluations),
        "diversity": analysis.diversity(stages, corpus.pool),
        "cost": analysis.cost(stages, scaling),
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
                "by_chance": by_chance(settings.ratio),
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


def _kept(stages: Chain, selection: str | None, instances: int) -> NDArray[np.bool_] | None:
    """Which instances of the pool a selection kept, `[N]`."""
    if selection is None:
        return None
    kept = np.zeros(instances, np.bool_)
    kept[open_selection(stages[f"select/{selection}"].path).rows] = True
    return kept


def _effects(found: Effects, instances: Packed, rows: NDArray[np.int64], selection: str | None) -> dict[str, Any]:
    """The paper's three effects, of instances whose rows in the pool are `rows`, with examples; see `Effects`."""
    return {
        "kept_by": selection,
        **found.as_dict(),
        **examples(instances, found, rows=rows),
        "borderline": neighbours(instances, found, rows=rows),
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
