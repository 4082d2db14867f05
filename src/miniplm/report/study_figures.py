"""The figures of a study: findings in, one `<svg>` element out. Promised: what `drawing.py` promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from miniplm.report.drawing import INK, LINE_HEIGHT, MUTED, SERIES, WIDTH, label, styled, svg

PANELS = 3  # side by side
COLOURS = {"better": SERIES[0], "worse": SERIES[1], "within noise": MUTED, "one seed": MUTED}


@styled()
def differences(rows: Sequence[Mapping[str, Any]], yardsticks: Sequence[Mapping[str, Any]]) -> str:
    """Each student minus its control, a panel for each yardstick: a dot a seed, the mean and its interval."""
    rows = [row for row in rows if row["difference"] is not None]
    yardsticks = [y for y in yardsticks if any(row["yardstick"] == y["name"] for row in rows)]
    if not yardsticks:
        return ""
    names = list(dict.fromkeys(row_name(row) for row in rows))
    columns = 2 if len(yardsticks) == 4 else min(PANELS, len(yardsticks))
    lines = -(-len(yardsticks) // columns)
    figure = Figure(
        figsize=(WIDTH / 72, lines * (76 + 1.5 * LINE_HEIGHT * len(names)) / 72),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    figure.patch.set_visible(False)
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, yardstick in zip(panels, yardsticks, strict=False):
        axes.patch.set_visible(False)
        axes.axvline(0, color=INK, linewidth=1)
        for row in rows:
            if row["yardstick"] != yardstick["name"]:
                continue
            place, colour = names.index(row_name(row)), COLOURS[row["verdict"]]
            seeds = list(row["differences"].values())
            axes.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            if row["difference_low"] is not None:
                axes.plot([row["difference_low"], row["difference_high"]], [place] * 2, color=colour, linewidth=2)
            axes.plot(row["difference"], place, "D", color=colour, markersize=6)
        axes.set_title(label(yardstick["name"], 30))
        side = "left" if yardstick["lower_is_better"] else "right"
        axes.set_xlabel(f"{label(yardstick['unit'], 26)}; better to the {side}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
    for axes in panels[len(yardsticks) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_yticks(range(len(names)), [label(name, 34) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
    said = "; ".join(
        f"{row_name(row)} on {row['yardstick']} {row['difference']:+.3f} {row['verdict']}"
        for row in rows
        if any(row["yardstick"] == y["name"] for y in yardsticks)
    )
    return svg(
        figure, "differences " + " ".join(names), f"Differences from the control, by seed and in the mean. {said}."
    )


@styled()
def by_source(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean difference from the control on each source, a panel for each student."""
    rows = [row for row in rows if row["difference"] is not None]
    if not rows:
        return ""
    names = list(dict.fromkeys(row_name(row) for row in rows))
    sources = sorted({row["yardstick"] for row in rows})
    columns = min(PANELS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(
        figsize=(WIDTH / 72, lines * (62 + LINE_HEIGHT * len(sources)) / 72),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    figure.patch.set_visible(False)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        axes.patch.set_visible(False)
        for row in rows:
            if row_name(row) != name:
                continue
            place, colour = sources.index(row["yardstick"]), COLOURS[row["verdict"]]
            axes.barh(place, row["difference"], color=colour, height=0.62)
            if row["difference_low"] is not None:
                axes.plot([row["difference_low"], row["difference_high"]], [place] * 2, color=INK, linewidth=1)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_title(label(name, 30))
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_yticks(range(len(sources)), [label(source.split("/", 1)[-1]) for source in sources])
        axes.set_ylim(len(sources) - 0.4, -0.6)
    said = "; ".join(f"{row_name(row)} on {row['yardstick']} {row['difference']:+.3f}" for row in rows)
    return svg(
        figure, "study by source " + " ".join(names), f"Bars: difference from the control on each source. {said}."
    )


def row_name(row: Mapping[str, Any]) -> str:
    """The student, and its point of the grid where there is one."""
    return f"{row['student']} · {row['point']}" if row["point"] else str(row["student"])
