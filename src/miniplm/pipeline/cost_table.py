"""Costs as text: a table for a terminal with what follows from it in a few lines, and CSV; and those of the paper.

The paper's are computed from its sizes below, by the functions that compute a recipe's; a pass through a model is taken
as two operations for each parameter and token, as the paper counts, without attention.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from math import isfinite
from typing import Any

from miniplm.analysis.cost import (
    PAPER_COMPUTE_REDUCTION,
    PAPER_SCORE_BYTES,
    break_even,
    saved_to_same_loss,
    score_bytes,
    token_level_bytes,
)
from miniplm.models.flops import TRAINING_PASSES
from miniplm.pipeline.costs import BreakEven, Costs, StageCost, Storage, Total

_UNKNOWN = "–"
_PACE = "TFLOP/s are those of a large matrix product, timed just now on one device of this machine."
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
# The paper's sizes (sections 3.1 and 3.4, footnote 2, appendices C and E).
_TEACHER_PARAMETERS = 1.8e9  # Qwen1.5-1.8B
_TEACHER_BODY_PARAMETERS = 1.2e9  # without embeddings
_REFERENCE_PARAMETERS = 104e6
_STUDENT_PARAMETERS = {"200M": 200e6, "500M": 500e6, "1.2B": 1.2e9}
_POOL_TOKENS = 100e9
_REFERENCE_TOKENS = 5e9
_STUDENT_TOKENS = 50e9
_SEQUENCE_LENGTH = 1024
_VOCABULARY = 150e3
_UNITS = {"operations": "operations", "students": "students", "bytes": ""}
_WEIGHT_OPERATIONS = 2  # of a parameter, for each token of a forward pass


def lines(costs: Costs) -> list[str]:
    """The table of stages, the totals under it, and what they say."""
    header = ("stage", "operations", "time", "disk", "")
    names = dict.fromkeys(cost.stage for cost in costs.stages)
    body = [_row(name, [cost for cost in costs.stages if cost.stage == name]) for name in names]
    totals = [(name, *_total(total), "") for name, total in costs.totals.items() if name != "left"]
    width = max(len(row[0]) for row in [*body, *totals])
    table = [f"{a:<{width}}  {b:>11}  {c:>9}  {d:>9}  {e}".rstrip() for a, b, c, d, e in [header, *body, *totals]]
    rule = "-" * len(table[0])
    table.insert(1, rule)
    table.insert(2 + len(body), rule)
    said = [_PACE] if any("TFLOP" in cost.pace for cost in costs.stages) else []
    said += [] if costs.totals["left"].disk_bytes is None else [_left(costs)]
    if costs.runs > 1:
        said.append(f"The table is of all {costs.runs} runs, what they share counted once; what follows, of the first.")
    said += list(dict.fromkeys(_repaid(found, _alike(found, costs.break_even)) for found in costs.break_even))
    if any(cost.stage == "train/teacher" for cost in costs.stages) and costs.break_even:
        said.append("The teacher's own training is not among what is repaid.")
    return [*table, *said, *([] if costs.storage is None else [_kept(costs.storage)])]


def brief(cost: StageCost) -> str:
    """Operations, time and disk of a stage in one breath; what is not measured begins with `~`."""
    told = [operations(cost.flops), duration(cost.seconds), size(cost.disk_bytes)]
    if not cost.measured:
        told = [text if text[0] in (_UNKNOWN, "<") else f"~{text}" for text in told]
    return "".join(f"{text:>9}" for text in told)


def as_csv(costs: Costs) -> str:
    """A row for each stage; an empty cell is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(StageCost)), "basis"])
    for cost in costs.stages:
        values = [*asdict(cost).values(), cost.basis]
        writer.writerow("" if value is None else value for value in values)
    return text.getvalue()


def operations(flops: float | None) -> str:
    """`3.2e14`."""
    return _UNKNOWN if flops is None else f"{flops:.1e}".replace("e+", "e").replace("e0", "e")


def duration(seconds: float | None) -> str:
    """`41 s`, `12 min`, `9.6 h`, `1,300 h`."""
    if seconds is None:
        return _UNKNOWN
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    if seconds < 5970:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 99.5 * 3600 else f"{seconds / 3600:,.0f} h"


def size(n_bytes: float | None) -> str:
    """`12 MB`, `1.4 GB`."""
    if n_bytes is None:
        return _UNKNOWN
    scaled, power = float(n_bytes), 0
    while scaled >= 999.5 and power < len(_PREFIXES) - 1:
        scaled, power = scaled / 1000, power + 1
    return f"{scaled:.1f} {_PREFIXES[power]}B" if scaled < 9.95 and power else f"{scaled:.0f} {_PREFIXES[power]}B"


def published(compute_reduction: float = PAPER_COMPUTE_REDUCTION) -> list[dict[str, Any]]:
    """The costs at the paper's sizes: `name`, `value`, `unit` (operations, students or bytes), as they are printed."""
    teacher, body = (_reading(n, _POOL_TOKENS) for n in (_TEACHER_PARAMETERS, _TEACHER_BODY_PARAMETERS))
    reference = TRAINING_PASSES * _reading(_REFERENCE_PARAMETERS, _REFERENCE_TOKENS)
    offline = teacher + _reading(_REFERENCE_PARAMETERS, _POOL_TOKENS) + reference
    students = {
        name: TRAINING_PASSES * _reading(parameters, _STUDENT_TOKENS)
        for name, parameters in _STUDENT_PARAMETERS.items()
    }
    asked = _reading(_TEACHER_PARAMETERS, _STUDENT_TOKENS)  # by Vanilla KD, for each student anew
    chosen = _STUDENT_TOKENS / _SEQUENCE_LENGTH
    rows = [
        (f"teacher scores {_POOL_TOKENS / 1e9:g}B tokens, all parameters", teacher, "operations"),
        (f"teacher scores {_POOL_TOKENS / 1e9:g}B tokens, without embeddings", body, "operations"),
        (f"reference is trained on {_REFERENCE_TOKENS / 1e9:g}B tokens", reference, "operations"),
        ("offline: teacher and reference score, reference is trained", offline, "operations"),
        *(
            (f"{name} student is trained on {_STUDENT_TOKENS / 1e9:g}B tokens", flops, "operations")
            for name, flops in students.items()
        ),
        ("repaid against Vanilla KD, of any size, by", break_even(offline, asked), "students"),
        *(
            (
                f"repaid against pre-training that takes {compute_reduction:g} times as much, {name}, by",
                break_even(offline, saved_to_same_loss(flops, compute_reduction)),
                "students",
            )
            for name, flops in students.items()
        ),
        (
            f"scores of {_STUDENT_TOKENS / 1e9:g}B tokens, a float32 an instance",
            score_bytes(chosen, models=1, bytes_each=PAPER_SCORE_BYTES),
            "bytes",
        ),
        (
            f"distributions over {_VOCABULARY / 1e3:g}K entries at these tokens",
            token_level_bytes(_STUDENT_TOKENS, int(_VOCABULARY)),
            "bytes",
        ),
    ]
    return [
        {"name": name, "value": value if value is not None and isfinite(value) else None, "unit": unit}
        for name, value, unit in rows
    ]


def published_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The costs at the paper's sizes as a table."""
    shown = {"operations": operations, "students": lambda n: "never" if n is None else f"{n:,.1f}", "bytes": size}
    width = max(len(row["name"]) for row in rows)
    return [
        "At the paper's sizes, computed: two operations a parameter and token, attention left out.",
        *(
            f"{one['name']:<{width}}  {shown[one['unit']](one['value']):>7} {_UNITS[one['unit']]}".rstrip()
            for one in rows
        ),
    ]


def published_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The costs at the paper's sizes as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("name", "value", "unit"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _reading(parameters: float, tokens: float) -> float:
    """Operations of a forward pass over tokens."""
    return _WEIGHT_OPERATIONS * parameters * tokens


def _row(name: str, of: Sequence[StageCost]) -> tuple[str, str, str, str, str]:
    """A line of the table: a stage, or the sums of all of this name in the runs of a study."""
    bases = list(dict.fromkeys(map(_basis, of)))
    basis = bases[0]
    if len(bases) > 1:
        kinds = [cost.basis for cost in of]
        basis = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    shown = _total(Total.of(of))
    return f"{name} ×{len(of)}" if len(of) > 1 else name, *shown, basis


def _basis(cost: StageCost) -> str:
    return f"{cost.basis}, {cost.pace}" if cost.pace else cost.basis


def _total(total: Total) -> tuple[str, str, str]:
    """What is known; with a > where something is missing."""
    flops, seconds = operations(total.flops), duration(total.seconds)
    if total.unknown_flops and total.flops is not None:
        flops = f"> {flops}"
    if total.unknown_seconds and total.seconds is not None:
        seconds = "> 0 s" if total.seconds < 1 else f"> {seconds}"
    return flops, seconds, size(total.disk_bytes)


def _left(costs: Costs) -> str:
    flops, seconds, disk = _total(costs.totals["left"])
    left = [cost for cost in costs.stages if not cost.measured]
    largest = max((cost.scratch_bytes or 0 for cost in left), default=0)
    scratch = f", and up to {size(largest)} more while a model is trained" if largest else ""
    guessed = f" Guessed, of what is not packed yet: {costs.assumption}." if costs.assumption else ""
    return f"To make: {len(left)} stages, {flops} operations, {seconds}, {disk} of disk{scratch}.{guessed}"


def _alike(found: BreakEven, all_of: Sequence[BreakEven]) -> str:
    """The names of the students to whom the same numbers apply."""
    same = [one.student for one in all_of if replace(one, student="") == replace(found, student="")]
    return ", ".join(dict.fromkeys(same))


def _repaid(found: BreakEven, students: str) -> str:
    if found.offline_flops is None or found.student_flops is None:
        return f"How many students like {students} repay scoring is not known: operations are missing above."
    plain = f"{_students(found.against_pretraining)} (if a control needs {found.compute_reduction:g} times as much)"
    return (
        f"Scoring and the reference ({operations(found.offline_flops)}) are repaid by students like {students}: "
        f"against Vanilla KD {_students(found.against_vanilla_kd)}, against plain pre-training {plain}."
    )


def _students(count: float | None) -> str:
    if count is None:
        return "by –"
    return f"by {count:,.1f}" if isfinite(count) else "never"


def _kept(storage: Storage) -> str:
    times = storage.token_level_bytes / storage.scores_bytes
    return (
        f"Scores of the pool: {size(storage.scores_bytes)}. The teacher's distributions over {storage.vocab_size:,} "
        f"entries at its {storage.pool_tokens:,} tokens: {size(storage.token_level_bytes)}, {times:,.0f} times as much."
    )
