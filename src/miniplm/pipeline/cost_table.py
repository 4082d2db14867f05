"""Costs as text: a table for a terminal with what follows from it in a few lines, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from math import isfinite

from miniplm.pipeline.costs import BreakEven, Costs, StageCost, Storage, Total

_UNKNOWN = "–"
_PACE = "TFLOP/s are those of a large matrix product, timed just now on one device of this machine."
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def lines(costs: Costs) -> list[str]:
    """The table of stages, the totals under it, and what they say."""
    header = ("stage", "operations", "time", "disk", "")
    body = [(c.stage, operations(c.flops), duration(c.seconds), size(c.disk_bytes), _basis(c)) for c in costs.stages]
    totals = [(name, *_total(total), "") for name, total in costs.totals.items() if name != "left"]
    width = max(len(row[0]) for row in [*body, *totals])
    table = [f"{a:<{width}}  {b:>11}  {c:>9}  {d:>9}  {e}".rstrip() for a, b, c, d, e in [header, *body, *totals]]
    rule = "-" * len(table[0])
    table.insert(1, rule)
    table.insert(2 + len(body), rule)
    said = [_PACE] if any("TFLOP" in cost.pace for cost in costs.stages) else []
    said += [] if costs.totals["left"].disk_bytes is None else [_left(costs)]
    said += list(dict.fromkeys(_repaid(found, _alike(found, costs.break_even)) for found in costs.break_even))
    if any(cost.stage == "train/teacher" for cost in costs.stages) and costs.break_even:
        said.append("The teacher's own training is not among what is repaid.")
    return [*table, *said, *([] if costs.storage is None else [_kept(costs.storage)])]


def brief(cost: StageCost) -> str:
    """Operations, time and disk of a stage in one breath; what is not measured begins with `~`."""
    told = [operations(cost.flops), duration(cost.seconds), size(cost.disk_bytes)]
    if not cost.measured:
        told = [text if text == _UNKNOWN else f"~{text}" for text in told]
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


def _basis(cost: StageCost) -> str:
    return f"{cost.basis}, {cost.pace}" if cost.pace else cost.basis


def _total(total: Total) -> tuple[str, str, str]:
    """What is known; with a > where something is missing."""
    flops, seconds = operations(total.flops), duration(total.seconds)
    if total.unknown_flops and total.flops is not None:
        flops = f"> {flops}"
    if total.unknown_seconds and total.seconds is not None:
        seconds = f"> {seconds}"
    return flops, seconds, size(total.disk_bytes)


def _left(costs: Costs) -> str:
    flops, seconds, disk = _total(costs.totals["left"])
    left = [cost for cost in costs.stages if not cost.measured]
    largest = max((cost.scratch_bytes or 0 for cost in left), default=0)
    scratch = f", and up to {size(largest)} more while a model is trained" if largest else ""
    guessed = f" Guessed, as the corpus is not packed yet: {costs.assumption}." if costs.assumption else ""
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
        f"against Vanilla KD by {_students(found.against_vanilla_kd)}, against plain pre-training by {plain}."
    )


def _students(count: float | None) -> str:
    if count is None:
        return _UNKNOWN
    return "any number never" if not isfinite(count) else f"{count:,.1f}"


def _kept(storage: Storage) -> str:
    times = storage.token_level_bytes / storage.scores_bytes
    return (
        f"Scores of the pool: {size(storage.scores_bytes)}. The teacher's distributions over {storage.vocab_size:,} "
        f"entries at its {storage.pool_tokens:,} tokens: {size(storage.token_level_bytes)}, {times:,.0f} times as much."
    )
