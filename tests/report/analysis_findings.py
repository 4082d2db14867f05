"""The part of the findings that the analyses make, for three students: miniplm, ranked, and control."""

from __future__ import annotations

from typing import Any

from miniplm.analysis.agreement import PAPER_REFERENCES
from miniplm.analysis.diversity import MEASURES, PAPER_SEMANTIC

MODELS = (
    ("teacher", "teacher"), ("reference", "reference"), ("miniplm", "student"), ("ranked", "student"),
    ("control", "student"), ("theirs", "other"),
)  # fmt: skip


def measured(value: float, half: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def documents(name: str = "dclm", windows: str = "first") -> dict[str, Any]:
    def figures(number: int, own: bool) -> dict[str, Any]:
        metrics = {"nats_per_token_by_document": 4.25, "nats_per_token": 4.125, "bits_per_byte": 1.5}
        absent = {"nats_per_token_by_document", "nats_per_token"} if own else set()
        absent |= {"nats_per_token_by_document"} if windows == "all" else set()
        found: dict[str, Any] = {"own_tokenizer": own}
        for metric, value in metrics.items():
            found[metric] = None if metric in absent else value + number / 1000
            found[f"{metric}_se"] = None if metric in absent else 0.0125
        return found

    gap = {"unit": "nats per token, by document", "value": -0.0625, "se": 0.0125, "verdict": "better"}
    rows = [{"model": n, "role": r, **figures(i, r == "other")} for i, (n, r) in enumerate(MODELS)]
    for row in rows:
        compared = row["model"] in ("miniplm", "ranked")
        row |= {"control": "control" if compared else None, "difference": gap if compared else None}
    return {"name": name, "windows": windows, "instances": 1234, "models": rows}


def tasks() -> dict[str, Any]:
    return {
        "tasks": [
            {"name": "hellaswag", "metric": "acc_norm", "examples": 10042},
            {"name": "lambada_openai", "metric": "acc", "examples": 5153},
        ],
        "missing": ["storycloze_2018", "piqa"],
        "notes": {"hellaswag": "7 requests were too long"},
        "shots": 0,
        "limit": None,
        "models": [
            {
                "model": name,
                "role": role,
                "average": {"value": 0.3125 + number / 100, "se": 0.0031},
                "accuracies": [
                    {"value": 0.2875 + number / 100, "se": 0.0045},
                    {"value": 0.3375 + number / 100, "se": None},
                ],
            }
            for number, (name, role) in enumerate(MODELS)
        ],
    }


def scaling() -> dict[str, Any]:
    def end(end_of: str, read_from: str, ratio: float, student: float | None = 1.6e13) -> dict[str, Any]:
        flops = {"student": dict.fromkeys(("value", "low", "high"), student), "control": measured(1.888e13, 1e12)}
        return {
            "target": 5.493, "end_of": end_of, "read_from": read_from, "flops": flops,
            "ratio": {"value": ratio, "low": ratio - 0.1, "high": None},
        }  # fmt: skip

    def fit(name: str) -> dict[str, Any]:
        return {
            "student": name,
            "constants": {"a": measured(2.5e3), "alpha": measured(0.231), "floor": measured(3.115)},
            "residual_scale": 0.003, "n": 7, "left_out": 1, "trained": 1.6e13,
            "line": [
                {"flops": 1.6e13 * scale, **measured(5.5 - number / 10)}
                for number, scale in enumerate((0.25, 0.5, 1, 3, 10))
            ],
            "extrapolated": {"flops": 1.6e14, **measured(5.1)},
        }  # fmt: skip

    return {
        "steep": 0.2, "times": 10.0, "fits": [fit("miniplm"), fit("control")], "not_fitted": ["ranked"],
        "reductions": [
            {
                "student": "miniplm",
                "control": "control",
                "ends": [end("control", "curve", 1.18), end("student", "law", 1.31)],
            },
            {
                "student": "ranked",
                "control": "control",
                "ends": [end("control", "law", 0.0, None), end("student", "law", 0.5)],
            },
        ],
        "paper": {"alpha": [0.41, 0.59], "compute_reduction": 2.2},
    }  # fmt: skip


def effect_shares() -> dict[str, Any]:
    shares = {"easy": 0.125, "hard": 0.25, "noisy": 0.0625, "between": 0.5625}
    means = {"teacher": 2.25, "reference": 3.5, "score": 1.25}
    return {
        "kept_by": "difference",
        "unit": "token",
        "bounds": {"easy_score": 0.45, "easy_loss": 3.21, "hard_score": 1.35},
        "effects": [
            {"effect": name, "pool": int(3000 * share), "share": share, "kept": int(1500 * share), "kept_share": 0.5}
            | means
            for name, share in shares.items()
        ],
        "by_source": [
            {"source": source, "pool": 2000, "share": 0.5, "kept": 1000, "kept_share": 0.5} | means | shares
            for source in ("torch", "numpy")
        ],
    }


def agreement() -> dict[str, Any]:
    def row(name: str, control: bool, value: float) -> dict[str, Any]:
        return {
            "student": name, "control": control, "instances": 549, "ratio": 0.5, "normalize": "token",
            "pearson": measured(value), "spearman": measured(value - 0.05), "agreement": measured(value + 0.05),
            "by_chance": 0.5,
        }  # fmt: skip

    edges = [[number / 2 for number in range(5)], [number / 4 for number in range(5)]]
    return {
        "students": [row("control", True, 0.671), row("miniplm", False, 0.052), row("ranked", False, 0.311)],
        "cells": {
            "student": "control", "edges": edges, "thresholds": [1.1, 0.4],
            "cells": [[0, 0, 5], [2, 2, 100], [3, 1, 1]],
        },
        "paper": list(PAPER_REFERENCES),
    }  # fmt: skip


def diversity() -> dict[str, Any]:
    def row(name: str, shift: float | None) -> dict[str, Any]:
        return {"name": name} | {
            measure: measured(0.5) | {"minus_pool": None if shift is None else measured(shift, 0.01)}
            for measure in MEASURES
        }

    return {
        "sample": {"instances": 1000, "groups": 10, "group_words": 8520, "group_bytes": 76820, "seed": 0},
        "encoder": "tf-idf + lsa (no sentence encoder was given)",
        "more_diverse": dict(MEASURES),
        "collections": [row("pool", None), row("difference", 0.0625), row("random", -0.0025)],
        "paper": PAPER_SEMANTIC,
    }


def cost() -> dict[str, Any]:
    total = {"flops": 1.5e13, "seconds": 105.2, "disk_bytes": 42e6, "unknown_flops": [], "unknown_seconds": []}
    here = {
        "compute_reduction": {"value": 1.18, "low": 0.9, "high": None},
        "against_pretraining": {"value": 13.0, "low": None, "high": 0.0},
    }
    repaid = {
        "student": "miniplm", "offline_flops": 3.75e13, "student_flops": 1.6e13, "teacher_flops": 1.5e13,
        "compute_reduction": 2.2, "against_pretraining": 1.953, "against_vanilla_kd": 2.5,
    }  # fmt: skip
    return {
        "stages": [{"stage": "prepare", "flops": None, "disk_bytes": 12e6}],
        "totals": {"offline": total, "students": total | {"unknown_flops": ["students/own"]}, "all": total},
        "break_even": [
            repaid | {"here": here}, repaid | {"student": "ranked", "against_vanilla_kd": None, "here": None},
        ],
        "storage": {
            "pool_tokens": 2624256, "vocab_size": 4096, "scores_bytes": 279331, "token_level_bytes": 42995810304,
        },
        "assumption": "",
    }  # fmt: skip


def analyses() -> dict[str, Any]:
    """All of them."""
    return {
        "documents": [documents(), documents("whole", "all")],
        "tasks": tasks(),
        "scaling": scaling(),
        "agreement": agreement(),
        "diversity": diversity(),
        "cost": cost(),
    }


NOTHING: dict[str, Any] = {
    "documents": [], "tasks": None, "scaling": None, "agreement": None, "diversity": None,
    "cost": {"stages": [], "totals": {}, "break_even": [], "storage": None, "assumption": ""},
}  # fmt: skip
"""What the analyses say of a run of which there is nothing to say."""
