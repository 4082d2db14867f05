"""What a recipe costs: each stage before it is made and after, the offline part against the students, the break-even.

In: a chain. Out: `Costs`: operations, tokens, hours and bytes of each stage, measured of what is done and estimated of
what is not (`speeds.py`, `estimates.py`). None is not known, and never 0. `cost_table.py` prints it.

Break-even is counted twice, as the paper claims two things:
    against plain pre-training  a control needs `compute_reduction` times a student's operations for the same loss; the
                                paper's 2.2 is against Vanilla KD, so put your own measurement there
    against Vanilla KD          whose teacher reads all that a student reads, for each student anew (appendix C)
What students repay is the scoring, and the training of reference and proxy. A teacher that is trained here too is part
of the offline cost, but not of what they repay: in the paper it is there already, and Vanilla KD needs it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from miniplm.analysis.cost import PAPER_COMPUTE_REDUCTION, break_even, saved_to_same_loss, token_level_bytes
from miniplm.artifact import Manifest
from miniplm.packing.instances import packed_identity
from miniplm.pipeline.chain import Chain, Stage
from miniplm.pipeline.estimates import Estimate, Estimates
from miniplm.pipeline.sizes import assumption, done
from miniplm.pipeline.speeds import WITHOUT_MODEL, Speeds, measured, work_of
from miniplm.recipe import NextTokenSettings

_GROUPS = {
    "train": "offline", "prepare": "offline", "proxy": "offline", "score": "offline", "select": "offline",
    "generate": "data", "retokenize": "data", "students": "students",
}  # fmt: skip
_TEACHER_TRAINING = "train/teacher"


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage took, or will take; None is not known.

    Attributes:
        stage: its name.
        fingerprint: of what it makes; chains of a study share stages.
        group: `offline`, `data` (that is made for students), `students` or `evaluation`.
        work: what is computed: `score`, `generate`, an objective's name, ... (`speeds.work_of`).
        flops: operations; None also where no model is involved.
        tokens: predicted ones that are packed, kept, read, learned from or written.
        seconds: of the wall.
        disk_bytes: of what is made.
        scratch_bytes: on disk only while it is made.
        measured: whether it is done.
        guessed: whether it hangs on a guess of how large the corpus is.
        pace: where the seconds of a stage that is not done are from.
        runs: of a study, which have it: `seed 3, ratio 0.5`, what these have in common; "" is all of them.

    """

    stage: str
    fingerprint: str
    group: str
    work: str
    flops: float | None
    tokens: int | None
    seconds: float | None
    disk_bytes: float | None
    scratch_bytes: float | None
    measured: bool
    guessed: bool
    pace: str
    runs: str = ""

    @property
    def basis(self) -> str:
        """`measured`, `estimated`, or `guessed`."""
        return "measured" if self.measured else "guessed" if self.guessed else "estimated"


@dataclass(frozen=True, slots=True)
class Total:
    """Of some stages: the sums of what is known; None if nothing is.

    Attributes:
        flops: operations.
        seconds: of the wall, one stage after the other.
        disk_bytes: of what is made.
        unknown_flops: stages with a model whose operations are missing in the sum.
        unknown_seconds: stages whose time is missing in the sum.

    """

    flops: float | None
    seconds: float | None
    disk_bytes: float | None
    unknown_flops: tuple[str, ...]
    unknown_seconds: tuple[str, ...]

    @classmethod
    def of(cls, stages: Iterable[StageCost]) -> Total:
        """The sums over these stages."""
        stages = list(stages)
        return cls(
            flops=_sum(cost.flops for cost in stages),
            seconds=_sum(cost.seconds for cost in stages),
            disk_bytes=_sum(cost.disk_bytes for cost in stages),
            unknown_flops=tuple(c.stage for c in stages if c.flops is None and c.work not in WITHOUT_MODEL),
            unknown_seconds=tuple(c.stage for c in stages if c.seconds is None),
        )


@dataclass(frozen=True, slots=True)
class BreakEven:
    """How many students like one of the recipe's repay the offline part; infinite where it is never repaid.

    Attributes:
        student: learns from what the scores chose, by plain pre-training.
        offline_flops: what is repaid.
        student_flops: its training.
        teacher_flops: the teacher's reading what it reads; None where teacher and student have other tokens.
        compute_reduction: how many times its operations a control needs for the same loss.
        against_pretraining: students.
        against_vanilla_kd: students.

    """

    student: str
    offline_flops: float | None
    student_flops: float | None
    teacher_flops: float | None
    compute_reduction: float
    against_pretraining: float | None
    against_vanilla_kd: float | None


@dataclass(frozen=True, slots=True)
class Storage:
    """What is kept of the models' answers on the pool.

    Attributes:
        pool_tokens: predicted ones.
        vocab_size: of the tokenizer.
        scores_bytes: of all scores.
        token_level_bytes: of the teacher's distributions alone, a float32 for each token and entry of the vocabulary.

    """

    pool_tokens: int
    vocab_size: int
    scores_bytes: float
    token_level_bytes: float


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a recipe, or of a study's runs together.

    Attributes:
        stages: in the order of the chain.
        totals: by group; `all`, and `left` of what is not done.
        break_even: one for each student that plainly learns from what scores chose; of a study's first run.
        storage: None if the pool's size is not known; of a study's first run.
        assumption: what the sizes that are guessed rest on; "" if none is.
        runs: how many there are.

    """

    stages: tuple[StageCost, ...]
    totals: Mapping[str, Total]
    break_even: tuple[BreakEven, ...]
    storage: Storage | None
    assumption: str
    runs: int = 1

    @classmethod
    def of(
        cls,
        stages: Iterable[StageCost],
        break_even: Iterable[BreakEven],
        storage: Storage | None,
        assumption: str,
        runs: int = 1,
    ) -> Costs:
        """The costs of these stages, added up."""
        found = tuple(stages)
        groups = dict.fromkeys(cost.group for cost in found)
        totals = {group: Total.of(cost for cost in found if cost.group == group) for group in groups}
        totals |= {"all": Total.of(found), "left": Total.of(cost for cost in found if not cost.measured)}
        guessed = any(cost.guessed for cost in found)
        return cls(found, totals, tuple(break_even), storage, assumption if guessed else "", runs)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; a break-even that is never reached is None, with the operations that say why beside it."""
        return {
            "stages": [{**asdict(cost), "basis": cost.basis} for cost in self.stages],
            "totals": {name: asdict(total) for name, total in self.totals.items()},
            "break_even": [
                {name: value if not isinstance(value, float) or isfinite(value) else None for name, value in pairs}
                for pairs in (asdict(found).items() for found in self.break_even)
            ],
            "storage": None if self.storage is None else asdict(self.storage),
            "assumption": self.assumption,
            "runs": self.runs,
        }


def costs(stages: Chain, *, compute_reduction: float = PAPER_COMPUTE_REDUCTION, measure: bool = True) -> Costs:
    """The costs of a chain's stages, as they stand now. Reads manifests, makes nothing.

    Args:
        stages: of a recipe.
        compute_reduction: see the head of this file.
        measure: time a matrix product where nothing similar was done yet (0.1 s on a GPU, a second on a CPU); without
            it, hours stay unknown there.

    Raises:
        ArtifactError: an artifact of the chain is damaged.

    """
    estimates = Estimates(stages)
    speeds = Speeds(stages.root, stages.recipe.compute, measure=measure)
    found = tuple(_cost(stage, done(stage), estimates[name], speeds) for name, stage in stages.items())
    repaid = _repaid(stages, found, estimates, compute_reduction)
    return Costs.of(found, repaid, _storage(estimates, found), assumption(stages.recipe))


def together(branches: Iterable[Costs], places: Iterable[Mapping[str, str]] = ()) -> Costs:
    """The costs of a study: each stage once, however many branches share it; the rest is of the first branch.

    Args:
        branches: the costs of each.
        places: of each its seed and its point of the grid, as `Variant.place`; without them stages have no `runs`.

    """
    several = list(branches)
    distinct = {cost.fingerprint: cost for branch in several for cost in branch.stages}
    shared: dict[str, dict[str, str]] = {}  # fingerprint -> what the branches that have it have in common
    for branch, place in zip(several, places, strict=False):
        for cost in branch.stages:
            common = shared.setdefault(cost.fingerprint, dict(place))
            shared[cost.fingerprint] = {key: value for key, value in common.items() if place.get(key) == value}
    stages = [replace(cost, runs=_in_words(shared.get(key, {}))) for key, cost in distinct.items()]
    first = several[0]
    return Costs.of(stages, first.break_even, first.storage, first.assumption, len(several))


def _in_words(place: Mapping[str, str]) -> str:
    """`seed 3, ratio 0.5`: the last part of each key, with its value."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in place.items())


def _cost(stage: Stage, manifest: Manifest | None, estimate: Estimate, speeds: Speeds) -> StageCost:
    name, work = stage.name, work_of(stage.identity)
    group = "offline" if name == "documents" else _GROUPS.get(name.split("/")[0], "evaluation")
    if manifest is None:
        dtype = stage.identity.recipe.get("dtype", "bfloat16") if work == "score" else "bfloat16"
        seconds, pace = speeds.seconds(work, estimate.flops, estimate.tokens, dtype)
        return StageCost(
            name, stage.identity.fingerprint, group, work, estimate.flops, estimate.tokens, seconds,
            estimate.disk_bytes, estimate.scratch_bytes, measured=False, guessed=estimate.guessed, pace=pace,
        )  # fmt: skip
    took = measured(manifest)
    return StageCost(
        name, stage.identity.fingerprint, group, work,
        flops=took.flops if took.flops is not None else estimate.flops,
        tokens=took.tokens if took.tokens is not None else estimate.tokens,
        seconds=took.seconds, disk_bytes=took.disk_bytes, scratch_bytes=None, measured=True, guessed=False, pace="",
    )  # fmt: skip


def _repaid(
    stages: Chain, found: tuple[StageCost, ...], estimates: Estimates, compute_reduction: float
) -> Iterable[BreakEven]:
    cost = {one.stage: one for one in found}
    repaid = Total.of(one for one in found if one.group == "offline" and one.stage != _TEACHER_TRAINING)
    offline = None if repaid.unknown_flops else repaid.flops
    for name, settings in stages.recipe.students.items():
        stage = f"students/{name}"
        if not isinstance(settings.objective, NextTokenSettings) or not _learns_from_scores(stages, stage):
            continue
        flops, teacher = cost[stage].flops, estimates.teacher_passes(name)
        saved = None if flops is None else saved_to_same_loss(flops, compute_reduction)
        yield BreakEven(
            student=name,
            offline_flops=offline,
            student_flops=flops,
            teacher_flops=teacher,
            compute_reduction=compute_reduction,
            against_pretraining=break_even(offline, saved),
            against_vanilla_kd=break_even(offline, teacher),
        )


def _learns_from_scores(stages: Chain, stage: str) -> bool:
    return any(need.startswith("score/") or _learns_from_scores(stages, need) for need in stages[stage].needs)


def _storage(estimates: Estimates, found: Iterable[StageCost]) -> Storage | None:
    pool = estimates.rows[packed_identity(estimates.stages["prepare"].identity.fingerprint, "pool").fingerprint]
    scores = _sum(cost.disk_bytes for cost in found if cost.stage.startswith("score/"))
    if pool.tokens is None or pool.vocab_size is None or scores is None:
        return None
    return Storage(pool.tokens, pool.vocab_size, scores, token_level_bytes(pool.tokens, pool.vocab_size))


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
