"""Writing the report of a run: `report.html`, `report.json` and `evaluations.csv` in its directory.

They are views of the artifacts, made anew whenever they are out of date; a run that did nothing leaves them alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.evaluation.evaluate import as_csv, open_evaluation
from miniplm.pipeline.chain import Chain
from miniplm.report.findings import gather, proxy_lines
from miniplm.scoring.drift import Drift
from miniplm.scoring.drift import as_csv as drift_csv

PAGE, DATA, TABLE = "report.html", "report.json", "evaluations.csv"


def write_report(stages: Chain) -> Path:
    """Write the three files if they are missing or of other artifacts; return the path of the page."""
    page = stages.root / PAGE
    if _up_to_date(stages):
        return page
    from miniplm.report.page import render  # matplotlib takes a second to import

    findings = gather(stages)
    evaluations = {name: open_evaluation(stage.path) for name, stage in stages.within("evaluate")}
    with artifact.storage(stages.root):
        _replace(stages.root / TABLE, as_csv(evaluations).encode())
        _replace(page, render(findings).encode())
        _replace(stages.root / DATA, artifact.pretty_json(findings))  # last: it says what the others show
    return page


def write_drift(folder: Path, ways: Sequence[Drift]) -> Path:
    """Write `drift.json`, `drift.csv` and `drift.svg` into a folder; return it."""
    from miniplm.report.figures import drift_bars

    rows = [asdict(way) for way in ways]
    with artifact.storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "drift.csv", drift_csv(ways).encode())
        _replace(folder / "drift.svg", drift_bars(rows).encode())
        _replace(folder / "drift.json", artifact.pretty_json(rows))
    return folder


def summary(stages: Chain) -> str:
    """The students as a table for the terminal, from `report.json`."""
    findings = json.loads((stages.root / DATA).read_bytes())
    gaps = {c["student"]: c for c in findings["comparisons"]}
    width = max([len(s["name"]) for s in findings["students"]] + [len("student")])
    heading = f"{'student':<{width}}  {'trained on':<16} {'tokens':>12}  {'nats per token':>16}  {'bits per byte':>13}"
    lines = [f"{heading}  against control"]
    lines += [_line(s, gaps.get(s["name"]), findings["control"], width) for s in findings["students"]]
    note = "± is one standard error over held-out instances; one seed per student."
    return "\n".join(["", *lines, note, *proxy_lines(findings)])


def _line(student: Mapping[str, Any], gap: Mapping[str, Any] | None, control: str | None, width: int) -> str:
    name = f"{student['name']:<{width}}  {student['data']:<16} {student['tokens']:>12,}"
    if student["loss"] is None:
        return f"{name}  not measured"
    error = "–" if student["loss_se"] is None else f"{student['loss_se']:.4f}"
    figures = f"{student['loss']:>7.4f} ± {error:<6}  {student['bits_per_byte']:>13.4f}"
    against = "(the control)" if student["name"] == control else ""
    if gap is not None:
        against = f"{gap['difference']:+.4f} ± {gap['se']:.4f}  {gap['verdict']}"
    return f"{name}  {figures}  {against}"


def _up_to_date(stages: Chain) -> bool:
    if not all((stages.root / name).is_file() for name in (PAGE, DATA, TABLE)):
        return False
    shown = json.loads((stages.root / DATA).read_bytes())
    now = [stage.identity.fingerprint for stage in stages.values()]
    return shown.get("recipe") == stages.recipe.resolved() and [s["fingerprint"] for s in shown["stages"]] == now


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.rename(path)
