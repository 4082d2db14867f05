"""The report's figures: plain findings in, one `<svg>` element out, ready to stand inside an HTML page.

Promised: what `drawing.py` promises. Each function returns "" when there is nothing to draw. Not covered: the look of
the page around a figure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from miniplm.report.drawing import (
    INK,
    LINE_HEIGHT,
    RULE,
    SERIES,
    WIDTH,
    blank,
    compact,
    label,
    line_styles,
    mark,
    power,
    spread,
    styled,
    superscript,
    svg,
)

SOURCES_SHOWN = 20  # at most, the largest ones; the page's tables have them all
SELECTIONS_SHOWN = 6  # at most, in `share_kept`
CROP_BEFORE = 0.2  # of training: loss curves may leave the frame before this, or their ends cannot be told apart
KEPT, DROPPED = SERIES[0], RULE


@styled()
def loss_curves(
    students: Sequence[Mapping[str, Any]],
    controls: Collection[str],
    key: str = "held_out_loss",
    against: str = "tokens",
    only: Collection[str] | None = None,
) -> str:
    """Loss against what it took, a line for each student, controls in the colour of the text.

    Args:
        students: all of them: a student looks the same in every figure.
        controls: their names.
        key: "held_out_loss" or "cross_entropy", that of the training text; who has no finite value of it is left out.
        against: "tokens", or "flops": training operations.
        only: names of those to draw; None draws all.

    """
    styles = line_styles([student["name"] for student in students], controls)
    points = {student["name"]: _points(student["curve"], against, key) for student in students}
    points = {name: values for name, values in points.items() if values and (only is None or name in only)}
    if not points:
        return ""
    height = 330 + LINE_HEIGHT * max(0, len(points) - 14)
    figure, axes = blank(height)
    last = {name: values[-1] for name, values in points.items()}
    furthest = max(taken for taken, _ in last.values()) or 1
    for name, values in points.items():
        colour, dash = styles[name]
        axes.plot(*zip(*values, strict=True), color=colour, linestyle=dash, linewidth=1.8)
        if len(values) == 1 or values[-1][0] < furthest:  # or its end is not told from the line to its name
            axes.plot(*values[-1], color=colour, marker="o", markersize=4.5)
    axes.set_xlim(0, furthest)
    axes.set_ylim(*_loss_limits(list(points.values())))
    axes.grid(axis="y")
    if against == "tokens":
        unit = "tokens"
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.set_xlabel("training tokens")
    else:
        unit, exponent = "operations", math.floor(math.log10(furthest))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:.3g}"))
        axes.set_xlabel(f"training operations, 10{superscript(exponent)} FLOP, a teacher's included")
    what = "held-out loss" if key == "held_out_loss" else "cross entropy on the training text"
    axes.set_title(what, pad=10)
    axes.set_ylabel("nats per token")
    bottom, top = axes.get_ylim()
    label_heights = spread([loss for _, loss in last.values()], (top - bottom) * LINE_HEIGHT / (height - 60))
    for (name, end), label_height in zip(last.items(), label_heights, strict=True):
        axes.annotate(
            f"{label(name)}  {end[1]:.3f}",
            xy=end,
            xytext=(1.03, label_height),
            textcoords=axes.get_yaxis_transform(),
            verticalalignment="center",
            fontweight="bold" if name in controls else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": styles[name][0],
                "linewidth": 0.8,
                "linestyle": "dotted",
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )
    taken = compact if against == "tokens" else power
    ends = ", ".join(f"{name} {loss:.3f} after {taken(amount)} {unit}" for name, (amount, loss) in last.items())
    return svg(
        figure,
        f"loss-curves {key} {against} {' '.join(points)}",
        f"Lines: {what} in nats per token against training {unit}. At the end: {ends}.",
    )


@styled()
def score_histogram(scores: Mapping[str, Any] | None, threshold: float | None) -> str:
    """How many instances have which difference score; those from `threshold` upwards in colour."""
    if not scores or not scores["counts"]:
        return ""
    edges, counts = scores["edges"], scores["counts"]
    figure, axes = blank(height=290)
    axes.stairs(counts, edges, fill=True, color=DROPPED)
    if threshold is not None and threshold < edges[-1]:
        kept = [
            (low, high, count) for (low, high), count in zip(pairwise(edges), counts, strict=True) if high > threshold
        ]
        lows = [max(threshold, low) for low, _, _ in kept]
        axes.stairs([count for *_, count in kept], [*lows, edges[-1]], fill=True, color=KEPT)
    axes.set_ylim(0, max(counts) * 1.2 or 1)
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title("instances", pad=10)
    axes.set_xlabel(f"log p(x) − log p_ref(x), nats per {scores['normalize'].replace('sum', 'instance')}")
    mark(axes, 0.0, "0", "solid", to_the_right=(threshold or 0.0) < 0)
    if threshold is not None:
        mark(axes, threshold, f"threshold {threshold:.2f}", "dashed", to_the_right=threshold >= 0)
    return svg(
        figure,
        "scores",
        f"Histogram of the difference score of {scores['instances']:,} instances, mean {scores['mean']:.2f}, "
        f"{scores['negative_share']:.1%} below 0"
        + ("." if threshold is None else f", kept from {threshold:.2f} upwards."),
    )


@styled()
def share_kept(selections: Sequence[Mapping[str, Any]]) -> str:
    """The share of each source's instances that each selection keeps, beside the share it keeps of all."""
    selections = [one for one in selections if one["by_source"]][:SELECTIONS_SHOWN]
    if not selections:
        return ""
    pool = {row["source"]: row["pool"] for one in reversed(selections) for row in one["by_source"]}
    shares = [{row["source"]: row["selected"] / max(1, row["pool"]) for row in one["by_source"]} for one in selections]
    largest = sorted(pool, key=lambda source: (-pool[source], source))[:SOURCES_SHOWN]
    sources = sorted(largest, key=lambda source: (-shares[0].get(source, 0.0), source))
    columns = min(3, len(selections))
    rows = math.ceil(len(selections) / columns)
    size = (WIDTH / 72, rows * (70 + LINE_HEIGHT * len(sources)) / 72)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.14))
    figure.patch.set_visible(False)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, one, share in zip(panels, selections, shares, strict=False):
        axes.patch.set_visible(False)
        axes.barh(range(len(sources)), [share.get(source, 0.0) for source in sources], color=KEPT, height=0.68)
        axes.axvline(one["selected"] / max(1, one["of"]), color=INK, linewidth=1.2, linestyle="dashed")
        axes.set_title(f"{label(one['name'])}: {one['selected'] / max(1, one['of']):.0%} of all")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    panels[0].set_xlim(0, min(1.0, 1.1 * max(value for share in shares for value in share.values())) or 1.0)
    for axes in panels[len(selections) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_yticks(range(len(sources)), [label(source) for source in sources])
        axes.set_ylim(len(sources) - 0.4, -0.6)
    described = " ".join(
        f"{one['name']}: " + ", ".join(f"{source} {share.get(source, 0.0):.0%}" for source in sources) + "."
        for one, share in zip(selections, shares, strict=True)
    )
    return svg(figure, "share-kept", f"Bars: share of each source's instances that is kept. {described}")


@styled()
def drift_bars(ways: Sequence[Mapping[str, Any]]) -> str:
    """Share of the sample's picks that each way of scoring changes, and how far it moves log p."""
    if not ways:
        return ""
    figure = Figure(figsize=(WIDTH / 72, (80 + 24 * len(ways)) / 72), layout="constrained")
    figure.patch.set_visible(False)
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(ways))
    for axes, key, title, colour in (
        (panels[0], "jaccard", "picks changed (1 − Jaccard)", SERIES[0]),
        (panels[1], "mean_nats", "log p moved, nats per token", SERIES[1]),
    ):
        values = [1 - way[key] if key == "jaccard" else way[key] for way in ways]
        axes.patch.set_visible(False)
        axes.barh(places, values, color=colour, height=0.68)
        for place, value in zip(places, values, strict=True):
            text = f"{value:.2%}" if key == "jaccard" else f"{value:.1e}" if value else "0"
            axes.annotate(text, (value, place), (5, 0), textcoords="offset points", verticalalignment="center")
        axes.set_title(title)
        axes.set_xlim(0, 1.35 * max(values) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    panels[0].set_yticks(places, [label(way["way"]) for way in ways])
    panels[0].invert_yaxis()
    described = ", ".join(f"{way['way']} {1 - way['jaccard']:.2%} and {way['mean_nats']:.1e}" for way in ways)
    return svg(figure, "drift", f"Bars: share of the picks changed, and mean movement of log p. {described}.")


def _points(curve: Sequence[Mapping[str, Any]], against: str, key: str) -> list[tuple[float, float]]:
    """(tokens or operations, loss) where the loss was measured and is finite."""
    pairs = [(point.get(against), point.get(key)) for point in curve]
    return [(taken, loss) for taken, loss in pairs if taken is not None and loss is not None and math.isfinite(loss)]


def _loss_limits(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """The frame from the lowest loss to the highest one after `CROP_BEFORE` of training."""
    low = min(loss for points in curves for _, loss in points)
    high = max(loss for points in curves for taken, loss in points if taken >= CROP_BEFORE * points[-1][0])
    margin = 0.04 * (high - low) or 0.05
    return low - margin, high + margin
