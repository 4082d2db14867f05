"""The page of a study: its findings in, one HTML document out. Promised: what `page.py` promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from miniplm.report import figures, study_figures
from miniplm.report.page import amount, environment, safe, style_sheet, visible
from miniplm.report.study import MIXTURE
from miniplm.report.study_figures import row_name

VERDICTS = ("better", "within noise", "worse", "one seed")


def render(findings: Mapping[str, Any]) -> str:
    """The page as one HTML document, from the findings that are also written as `study.json`."""
    shown = visible(findings)
    rows = shown["rows"]
    whole = [y for y in shown["yardsticks"] if y["kind"] not in {"source", "task"} or y["name"] == "average"]
    main = whole[: 2 * study_figures.PANELS]
    of_sources = [
        row for row in rows if row["yardstick"] in {y["name"] for y in shown["yardsticks"] if y["kind"] == "source"}
    ]
    names = list(dict.fromkeys(row_name(row) for row in rows))
    by_name = {(row_name(row), row["yardstick"]): row for row in rows}
    pairs = {(row["student"], row["point"], row["against"]): None for row in shown["points"]}
    by_pair = {(row["student"], row["point"], row["against"], row["yardstick"]): row for row in shown["points"]}
    tasks = [y for y in shown["yardsticks"] if y["kind"] == "task"]
    pages = environment()
    pages.filters |= {"interval": interval}
    return pages.get_template("study.html").render(
        {**shown, "said_of_tasks": shown["tasks"]},
        css=style_sheet(),
        headline=headline(shown),
        names=names,
        by_name=by_name,
        pairs=list(pairs),
        by_pair=by_pair,
        point_tables=[("The whole, between points", whole), ("Tasks, between points", tasks)],
        tables=[("The whole", whole), ("Tasks", tasks),
                ("Sources", [y for y in shown["yardsticks"] if y["kind"] == "source"])],
        differences=safe(study_figures.differences(rows, main)),
        by_source=safe(study_figures.by_source(of_sources)),
        source_unit=next((row["unit"] for row in of_sources), ""),
        shares=safe(figures.share_kept(shown["selections"])),
    )  # fmt: skip


def headline(findings: Mapping[str, Any]) -> Markup:
    """What the study says of the mixture, the yardstick that every study has; the intervals decide."""
    rows = [row for row in findings["rows"] if row["difference"] is not None]
    first = next((y["name"] for y in findings["yardsticks"] if y["name"] == MIXTURE), None)
    if first is None and findings["yardsticks"]:
        first = findings["yardsticks"][0]["name"]
    rows = [row for row in rows if row["yardstick"] == first]
    if not rows:
        rest = "; it compares points of its grid." if findings["points"] else ", so it compares nothing."
        return Markup("No student of this study has a control{}").format(rest)
    lower = next(y["lower_is_better"] for y in findings["yardsticks"] if y["name"] == first)
    best = min(
        rows, key=lambda row: (VERDICTS.index(row["verdict"]), row["difference"] if lower else -row["difference"])
    )
    terms = {
        "student": row_name(best),
        "control": best["control"],
        "gap": interval(best["difference"], best["difference_low"], sign=True),
        "unit": best["unit"],
        "seeds": best["seeds"],
        "yardstick": first,
    }
    differs = "On the {yardstick}, <em>{student}</em> differs from {control} by {gap} {unit}"
    nothing = (
        "On the {yardstick}, nothing is better than {control} by more than noise; <em>{student}</em> comes nearest"
    )
    text = {
        "better": differs + ", over {seeds} seeds: better.",
        "one seed": differs + ". One seed says nothing of others.",
    }.get(best["verdict"], nothing + ": {gap} {unit} over {seeds} seeds.")
    found = Markup(text).format(**terms)  # noqa: S704 (the texts above; the terms are escaped)
    if len(rows) == 1:
        return found
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    tally = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return found + Markup(" Of {} ways compared: {}.").format(len(rows), tally)


def interval(value: float | None, low: float | None, *, sign: bool = False) -> str:
    """`−0.074 ± 0.012`: a mean and half of its interval."""
    if value is None or low is None:
        return amount(value, sign=sign)
    return f"{amount(value, sign=sign)} ± {amount(value - low)}"
