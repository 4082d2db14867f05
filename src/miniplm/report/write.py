"""Writing the report of a run: `report.html`, `report.json`, `evaluations.csv` and `students.csv` in its directory.

They are views of the artifacts, made anew whenever they are out of date; a run that did nothing leaves them alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miniplm import artifact
from miniplm.evaluation.loss import as_csv
from miniplm.pipeline.chain import Chain
from miniplm.pipeline.study import Branch
from miniplm.recipe import Study
from miniplm.report.benchmarks import table_rows
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
    with artifact.storage(stages.root):
        _replace(stages.root / TABLE, as_csv(table_rows(stages)).encode())
        _replace(stages.root / STUDENTS, students_csv(findings).encode())
        _replace(page, render(findings).encode())
        _replace(stages.root / DATA, artifact.pretty_json(findings))  # last: it says what the others show
    return page


def write_study(study: Study, branches: Sequence[Branch], root: Path) -> tuple[Path, list[str]]:
    """Write `study.html`, `study.json` and `study.csv`; return the path of the page, and lines for the terminal."""
    from miniplm.report import study as studies
    from miniplm.report.study_page import render as render_study

    findings = studies.gather(study, branches)
    page = root / "study.html"
    with artifact.storage(root):
        _replace(root / "study.csv", studies.as_csv(findings).encode())
        _replace(page, render_study(findings).encode())
        _replace(root / "study.json", artifact.pretty_json(findings))
    return page, studies.lines(findings)


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


def write_analysis(
    folder: Path, name: str, found: Mapping[str, Any], table: Sequence[Mapping[str, Any]], svg: str = ""
) -> Path:
    """Write `<name>.json`, `<name>.csv` and, if there is a figure, `<name>.svg` into a folder; return it."""
    from miniplm.report.tables import as_csv as table_csv

    with artifact.storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / f"{name}.csv", table_csv(table).encode())
        if svg:
            _replace(folder / f"{name}.svg", svg.encode())
        else:  # one of an earlier call is of other numbers
            (folder / f"{name}.svg").unlink(missing_ok=True)
        _replace(folder / f"{name}.json", artifact.pretty_json(found))
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
