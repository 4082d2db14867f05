"""The figures of the analyses: a part of the findings in, one `<svg>` element out, "" where there is nothing to draw.

Promised: what `drawing.py` promises. `drawn` makes all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from miniplm.report.analysis import measured_reductions
from miniplm.report.drawing import (
    INK,
    LINE_HEIGHT,
    MUTED,
    RULE,
    SERIES,
    WIDTH,
    blank,
    label,
    line_styles,
    power,
    spread,
    styled,
    superscript,
    svg,
)

SOURCES_SHOWN = 20  # at most, the largest ones; the page's table has them all
PANELS = 4  # of tasks side by side
EFFECT_COLOURS = {"easy": MUTED, "between": RULE, "hard": SERIES[0], "noisy": SERIES[1]}  # as they are stacked
_DARKEST = 0.85  # of the fullest cell


def drawn(findings: Mapping[str, Any], controls: Collection[str]) -> dict[str, str]:
    """Every figure by the name that the page knows it by."""
    return {
        "task_dots": task_dots(findings["tasks"], controls),
        "effect_shares": effect_shares(findings["effects"]),
        "decisions": decisions(findings["agreement"]),
        "laws": laws(findings["scaling"], findings["students"], controls),
        "same_loss": compute_to_same_loss(findings["scaling"]),
    }


@styled()
def task_dots(tasks: Mapping[str, Any] | None, controls: Collection[str]) -> str:
    """The accuracies of every model ± a standard error, a panel for the average and for each task."""
    if not tasks or not tasks["tasks"]:
        return ""
    models, metrics = tasks["models"], {one["name"]: one["metric"] for one in tasks["tasks"]}
    columns = [(one["name"], [model["accuracies"][n] for model in models]) for n, one in enumerate(tasks["tasks"])]
    if all(model["average"] for model in models):
        columns.insert(0, ("average", [model["average"] for model in models]))
    across = min(PANELS, len(columns))
    down = math.ceil(len(columns) / across)
    size = (WIDTH / 72, down * (52 + LINE_HEIGHT * len(models)) / 72)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    figure.patch.set_visible(False)
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for axes, (name, values) in zip(panels, columns, strict=False):
        axes.patch.set_visible(False)
        for place, (model, one) in enumerate(zip(models, values, strict=True)):
            colour = INK if model["model"] in controls else SERIES[0] if model["role"] == "student" else MUTED
            error = one["se"] or 0.0
            axes.plot([one["value"] - error, one["value"] + error], [place] * 2, color=colour, linewidth=1.8)
            axes.plot(one["value"], place, "o", color=colour, markersize=5, clip_on=False)
        axes.set_title(label(name, 20), fontweight="bold" if name == "average" else "normal")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        if name == "average" or metrics[name].startswith("acc"):
            axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.grid(axis="x")
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    for axes in panels[::across]:
        axes.set_yticks(range(len(models)), [label(model["model"], 20) for model in models])
        axes.set_ylim(len(models) - 0.4, -0.6)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{m['model']} {v['value']:.3f}" for m, v in zip(models, values, strict=True))
        for name, values in columns
    )
    return svg(figure, "task-dots", f"Dots with standard errors: accuracy of each model. {told}.")


@styled()
def effect_shares(effects: Mapping[str, Any]) -> str:
    """How much of the pool, of what was kept, and of each source is easy, hard, noisy or none of these."""
    parts = effects.get("effects")
    if not parts:
        return ""
    rows = [("all of the pool", {one["effect"]: one["share"] for one in parts})]
    if (kept := sum(one["kept"] or 0 for one in parts)) > 0:
        rows.append(("what was kept", {one["effect"]: one["kept"] / kept for one in parts}))
    whole = len(rows)
    rows += [(one["source"], one) for one in effects["by_source"][:SOURCES_SHOWN]]
    places = [row + (0.7 if row >= whole else 0) for row in range(len(rows))]
    figure, axes = blank(height=64 + LINE_HEIGHT * 1.15 * len(rows))
    left = [0.0] * len(rows)
    for effect, colour in EFFECT_COLOURS.items():
        widths = [share[effect] or 0.0 for _, share in rows]
        axes.barh(places, widths, left=left, color=colour, height=0.74, label=effect)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [label(name) for name, _ in rows])
    for text in axes.get_yticklabels()[:whole]:
        text.set_fontweight("bold")
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(EFFECT_COLOURS), frameon=False, borderpad=0.2)
    told = " ".join(
        f"{name}: " + ", ".join(f"{effect} {share[effect] or 0:.0%}" for effect in EFFECT_COLOURS) + "."
        for name, share in rows
    )
    return svg(figure, "effect-shares", f"Stacked bars: shares of instances by effect. {told}")


@styled()
def decisions(agreement: Mapping[str, Any] | None) -> str:
    """A histogram of held-out instances by both differences, and from where each of the two would keep."""
    if agreement is None:
        return ""
    cells, shown = agreement["cells"], agreement["students"][0]
    (columns, rows), (x_threshold, y_threshold) = cells["edges"], cells["thresholds"]
    most = max(count for *_, count in cells["cells"])
    squares = [
        [(columns[c + i], rows[r + j]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))] for c, r, _ in cells["cells"]
    ]
    figure, axes = blank(height=430)
    # by the root, or single instances could not be seen beside the fullest cell
    strength = [0.12 + (_DARKEST - 0.12) * math.sqrt(count / most) for *_, count in cells["cells"]]
    axes.add_collection(PolyCollection(squares, facecolors=SERIES[0], alpha=strength, linewidths=0))
    axes.set_xlim(columns[0], columns[-1])
    strip = 0.07 * (rows[-1] - rows[0])  # for the words in the corners
    axes.set_ylim(rows[0] - strip, rows[-1] + strip)
    axes.axvline(x_threshold, color=INK, linewidth=1.1, linestyle="dashed")
    axes.axhline(y_threshold, color=INK, linewidth=1.1, linestyle="dashed")
    for right, top, text in (
        (1, 1, "both keep"),
        (0, 0, "both drop"),
        (0, 1, "student only"),
        (1, 0, "reference only"),
    ):
        _corner(axes, right, top, text)
    unit = shown["normalize"].replace("sum", "instance")
    axes.set_xlabel(f"log p(x) − log p_ref(x), nats per {unit}: what the selection goes by")
    axes.set_ylabel(f"log p(x) − log q(x), nats per {unit}")
    axes.set_title(f"q: {label(cells['student'])}", pad=10)
    return svg(
        figure,
        "decisions",
        f"Histogram in two dimensions: the difference with the reference against that with {cells['student']}, "
        f"{shown['instances']:,} held-out instances; Pearson {shown['pearson']['value']:.3f}, the same decision on "
        f"{shown['agreement']['value']:.1%}.",
    )


@styled()
def laws(scaling: Mapping[str, Any] | None, students: Sequence[Mapping[str, Any]], controls: Collection[str]) -> str:
    """Held-out loss against operations on a logarithmic axis: what was measured, and the laws beyond it."""
    if scaling is None or not scaling["fits"]:
        return ""
    styles = line_styles([one["name"] for one in students], controls)
    curves = {one["name"]: one["curve"] for one in students}
    height = 360 + LINE_HEIGHT * max(0, len(scaling["fits"]) - 16)
    figure, axes = blank(height)
    ends, lowest, highest = {}, math.inf, 0.0
    for fit in scaling["fits"]:
        used = [
            (point["flops"], point["held_out_loss"])
            for point in curves[fit["student"]]
            if point["held_out_loss"] and (point["flops"] or 0) >= scaling["steep"] * fit["trained"]
        ]
        ends[fit["student"]] = _law(axes, fit, used, *styles[fit["student"]])
        lowest = min(lowest, ends[fit["student"]][1])
        highest = max(highest, *(loss for _, loss in used))
    margin = 0.05 * (highest - lowest) or 0.05
    bottom, top = lowest - margin, highest + margin
    furthest = max(flops for flops, _ in ends.values())
    for fit in scaling["fits"]:
        flops, beyond = fit["extrapolated"]["flops"], fit["extrapolated"]
        colour = styles[fit["student"]][0]
        axes.plot([flops] * 2, [max(beyond["low"], bottom), min(beyond["high"], top)], color=colour, linewidth=2.4)
    axes.set_xscale("log")
    axes.set_xlim(right=furthest * 1.04)
    axes.set_ylim(bottom, top)
    axes.grid(axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"10{superscript(round(math.log10(value)))}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlabel("training operations (FLOP), a teacher's included")
    axes.set_ylabel("nats per token")
    axes.set_title("held-out loss, and laws fitted to it", pad=10)
    heights = spread([loss for _, loss in ends.values()], (top - bottom) * LINE_HEIGHT / (height - 70))
    for (name, end), at in zip(ends.items(), heights, strict=True):
        axes.annotate(
            f"{label(name)}  {end[1]:.3f}",
            xy=end,
            xytext=(1.03, at),
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
    told = ", ".join(f"{name} {loss:.3f} at {power(flops)}" for name, (flops, loss) in ends.items())
    return svg(figure, "laws " + " ".join(ends), f"Points and lines: held-out loss against operations. Laws: {told}.")


def _law(
    axes: Axes, fit: Mapping[str, Any], used: Sequence[tuple[float, float]], colour: str, dash: str
) -> tuple[float, float]:
    """The points that a law was fitted to, its line, and the dotted part beyond them; the end of that."""
    line = [(one["flops"], one["value"]) for one in fit["line"]]
    inside = [(flops, loss) for flops, loss in line if flops <= fit["trained"]]
    beyond = line[max(0, len(inside) - 1) :]
    axes.plot(*zip(*used, strict=True), "o", color=colour, markersize=3.6, alpha=0.75)
    axes.plot(*zip(*beyond, strict=True), color=colour, linestyle="dotted", linewidth=1.6)
    axes.plot(*zip(*inside, strict=True), color=colour, linestyle=dash, linewidth=1.4)
    return line[-1]


def _corner(axes: Axes, right: int, top: int, text: str) -> None:
    """A word in a corner of the frame."""
    axes.annotate(
        text,
        (right, top),
        (-6 if right else 6, -6 if top else 6),
        xycoords="axes fraction",
        textcoords="offset points",
        horizontalalignment="right" if right else "left",
        verticalalignment="top" if top else "bottom",
    )


@styled()
def compute_to_same_loss(scaling: Mapping[str, Any] | None) -> str:
    """The operations after which a student and its control had the same held-out loss, a pair for each student."""
    bars: list[tuple[str, float, str]] = []
    for student, one in measured_reductions(scaling).items():
        bars.append((student, one["flops"]["student"]["value"], SERIES[0]))
        bars.append((one["control"], one["flops"]["control"]["value"], MUTED))
    if not bars:
        return ""
    figure, axes = blank(height=60 + 22 * len(bars))
    heights = [row + row // 2 * 0.4 for row in range(len(bars))]  # pairs stand together
    names, taken, colours = zip(*bars, strict=True)
    axes.barh(heights, taken, color=colours, height=0.8)
    for height, value in zip(heights, taken, strict=True):
        axes.annotate(power(value), (value, height), (6, 0), textcoords="offset points", verticalalignment="center")
    axes.set_yticks(heights, [label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(taken))
    exponent = math.floor(math.log10(max(taken)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:.3g}"))
    axes.set_xlabel(f"training operations, 10{superscript(exponent)} FLOP")
    told = ", ".join(f"{name} {power(value)}" for name, value, _ in bars)
    return svg(figure, "same-loss", f"Bars, in pairs: training operations until the same held-out loss. {told}.")
