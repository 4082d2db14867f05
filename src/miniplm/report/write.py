"""Writing the report of a run: `report.html`, `report.json`, `evaluations.csv` and `students.csv` in its directory.

They are views of the artifacts, made anew whenever they are out of date; a run that did nothing leaves them alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from miniplm import artifact
from miniplm.evaluation.evaluate import as_csv, open_evaluation
from miniplm.pipeline.chain import Chain
from miniplm.report.findings import SCHEMA, gather
from miniplm.report.training import students_csv
from miniplm.scoring.drift import Drift
from miniplm.scoring.drift import as_csv as drift_csv

PAGE, DATA, TABLE, STUDENTS = "report.html", "report.json", "evaluations.csv", "students.csv"


def write_report(stages: Chain) -> Path:
    """Write the four files if they are missing or of other artifacts; return the path of the page."""
    page = stages.root / PAGE
    if _up_to_date(stages):
        return page
    from miniplm.report.page import render  # matplotlib takes a second to import

    findings = gather(stages)
    evaluations = {name: open_evaluation(stage.path) for name, stage in stages.within("evaluate")}
    with artifact.storage(stages.root):
        _replace(stages.root / TABLE, as_csv(evaluations).encode())
        _replace(stages.root / STUDENTS, students_csv(findings).encode())
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
    """The students as tables for the terminal, from `report.json`: how well they do, then what they took."""
    from miniplm.report.summary import lines

    return "\n".join(lines(json.loads((stages.root / DATA).read_bytes())))


def _up_to_date(stages: Chain) -> bool:
    if not all((stages.root / name).is_file() for name in (PAGE, DATA, TABLE, STUDENTS)):
        return False
    shown = json.loads((stages.root / DATA).read_bytes())
    if shown.get("schema") != SCHEMA:
        return False
    now = [stage.identity.fingerprint for stage in stages.values()]
    return shown.get("recipe") == stages.recipe.resolved() and [s["fingerprint"] for s in shown["stages"]] == now


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.rename(path)
