"""MiniPLM: pre-training distillation by data selection (ICLR 2025, arXiv 2410.17215), as software.

    corpus = miniplm.prepare("pile/*.jsonl.zst", tokenizer="Qwen/Qwen1.5-1.8B", out="pile")
    reference = miniplm.train("qwen-104m", corpus.reference, tokens=5e9, out="reference")
    teacher_scores = miniplm.score(corpus.pool, "Qwen/Qwen1.5-1.8B", out="scores/teacher")
    reference_scores = miniplm.score(corpus.pool, reference, out="scores/reference")
    chosen = miniplm.DifferenceSampling(ratio=0.5).select(teacher_scores, reference_scores)
    student = miniplm.train("qwen-200m", corpus.pool.select(chosen.rows), tokens=50e9, out="student")

Names are imported when they are first used: `import miniplm` loads neither torch nor datasets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniplm.errors import MiniplmError as MiniplmError
    from miniplm.evaluation.evaluate import Evaluation as Evaluation
    from miniplm.packing.instances import Packed as Packed
    from miniplm.packing.instances import open_packed as open_packed
    from miniplm.packing.prepare import Corpus as Corpus
    from miniplm.packing.prepare import open_corpus as open_corpus
    from miniplm.pipeline.learning import generate as generate
    from miniplm.pipeline.learning import retokenize as retokenize
    from miniplm.pipeline.learning import train as train
    from miniplm.pipeline.learning import train_proxy as train_proxy
    from miniplm.pipeline.library import drift as drift
    from miniplm.pipeline.library import prepare as prepare
    from miniplm.pipeline.library import sample as sample
    from miniplm.pipeline.library import score as score
    from miniplm.pipeline.library import select as select
    from miniplm.pipeline.measuring import evaluate as evaluate
    from miniplm.pipeline.measuring import evaluate_documents as evaluate_documents
    from miniplm.pipeline.measuring import evaluate_tasks as evaluate_tasks
    from miniplm.pipeline.measuring import pack_documents as pack_documents
    from miniplm.recipe import Compute as Compute
    from miniplm.recipe import GivenModel as GivenModel
    from miniplm.recipe import ServerModel as ServerModel
    from miniplm.recipe import VllmModel as VllmModel
    from miniplm.sampling.base import Selection as Selection
    from miniplm.sampling.baselines import RandomSampling as RandomSampling
    from miniplm.sampling.baselines import ReferenceDifficulty as ReferenceDifficulty
    from miniplm.sampling.baselines import TeacherPreference as TeacherPreference
    from miniplm.sampling.difference import DifferenceSampling as DifferenceSampling
    from miniplm.sampling.difference import RelativeSampling as RelativeSampling
    from miniplm.scoring.base import Scores as Scores
    from miniplm.scoring.base import open_scores as open_scores
    from miniplm.scoring.proxy import Proxy as Proxy
    from miniplm.training.checkpoint import Checkpoint as Checkpoint

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "training.checkpoint",
    "Compute": "recipe",
    "Corpus": "packing.prepare",
    "DifferenceSampling": "sampling.difference",
    "Evaluation": "evaluation.evaluate",
    "GivenModel": "recipe",
    "MiniplmError": "errors",
    "Packed": "packing.instances",
    "Proxy": "scoring.proxy",
    "RandomSampling": "sampling.baselines",
    "ReferenceDifficulty": "sampling.baselines",
    "RelativeSampling": "sampling.difference",
    "Scores": "scoring.base",
    "Selection": "sampling.base",
    "ServerModel": "recipe",
    "TeacherPreference": "sampling.baselines",
    "VllmModel": "recipe",
    "drift": "pipeline.library",
    "evaluate": "pipeline.measuring",
    "evaluate_documents": "pipeline.measuring",
    "evaluate_tasks": "pipeline.measuring",
    "generate": "pipeline.learning",
    "open_corpus": "packing.prepare",
    "open_packed": "packing.instances",
    "open_scores": "scoring.base",
    "pack_documents": "pipeline.measuring",
    "prepare": "pipeline.library",
    "retokenize": "pipeline.learning",
    "sample": "pipeline.library",
    "score": "pipeline.library",
    "select": "pipeline.library",
    "train": "pipeline.learning",
    "train_proxy": "pipeline.learning",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'miniplm' has no attribute {name!r}")
    from miniplm.errors import MissingExtraError

    try:
        return getattr(importlib.import_module(f"miniplm.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name in {"torch", "transformers", "accelerate"}:
            raise MissingExtraError("train", error.name) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
