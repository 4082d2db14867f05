"""The report's figures: plain findings in, one `<svg>` element out, ready to stand inside an HTML page.

Promised: the same findings give the same bytes; every colour is a CSS variable with a fallback, so that a page can
recolour a figure for dark mode; text stays text (`svg.fonttype: none`), is escaped, and is never read as mathematics.
Each function returns "" when there is nothing to draw. Not covered: control characters in names, which the page makes
visible before it calls; the look of the page around a figure.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH = 760  # of every figure, in SVG user units; heights and font sizes are in the same unit
SOURCES_SHOWN = 20  # at most, the largest ones; the page's tables have them all
SELECTIONS_SHOWN = 6  # at most, in `share_kept`
CROP_BEFORE = 0.2  # of training: loss curves may leave the frame before this, or their ends cannot be told apart

INK, MUTED, RULE = "#1b1f24", "#5b6470", "#d5d9df"
# Okabe and Ito's colours without yellow, which no light page shows; *from* https://jfly.uni-koeln.de/color/
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dashed", "dotted", "dashdot")
CSS_COLOURS = {INK: "currentColor", MUTED: f"var(--muted, {MUTED})", RULE: f"var(--rule, {RULE})"} | {
    colour: f"var(--series-{number}, {colour})" for number, colour in enumerate(SERIES, 1)
}
KEPT, DROPPED = SERIES[0], RULE
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same everywhere
    "font.size": 11.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
}
ABSENT = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LINE_HEIGHT = 17.0  # from one label to the next


@contextmanager
def _style() -> Iterator[None]:
    """The defaults of matplotlib with `STYLE`, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@_style()
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
    styles = _line_styles([student["name"] for student in students], controls)
    points = {student["name"]: _points(student["curve"], against, key) for student in students}
    points = {name: values for name, values in points.items() if values and (only is None or name in only)}
    if not points:
        return ""
    height = 330 + LINE_HEIGHT * max(0, len(points) - 14)
    figure, axes = _figure(height)
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
    label_heights = _spread([loss for _, loss in last.values()], (top - bottom) * LINE_HEIGHT / (height - 60))
    for (name, end), label_height in zip(last.items(), label_heights, strict=True):
        axes.annotate(
            f"{_label(name)}  {end[1]:.3f}",
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
    return _svg(
        figure,
        f"loss-curves {key} {against} {' '.join(points)}",
        f"Lines: {what} in nats per token against training {unit}. At the end: {ends}.",
    )


@_style()
def tokens_to_same_loss(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The training tokens after which a student and its control had the same held-out loss, a pair for each student."""
    bars: list[tuple[str, float, str]] = []
    for one in comparisons:
        if one["same_loss"]:
            bars.append((one["student"], one["same_loss"]["student_tokens"], SERIES[0]))
            bars.append((one["control"], one["same_loss"]["control_tokens"], MUTED))
    if not bars:
        return ""
    figure, axes = _figure(height=60 + 22 * len(bars))
    heights = [row + row // 2 * 0.4 for row in range(len(bars))]  # pairs stand together
    names, tokens, colours = zip(*bars, strict=True)
    axes.barh(heights, tokens, color=colours, height=0.8)
    for height, value in zip(heights, tokens, strict=True):
        axes.annotate(compact(value), (value, height), (6, 0), textcoords="offset points", verticalalignment="center")
    axes.set_yticks(heights, [_label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(tokens) or 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel("training tokens")
    described = ", ".join(f"{name} {compact(value)}" for name, value, _ in bars)
    return _svg(figure, "same-loss", f"Bars, in pairs: training tokens until the same held-out loss. {described}.")


@_style()
def score_histogram(scores: Mapping[str, Any] | None, threshold: float | None) -> str:
    """How many instances have which difference score; those from `threshold` upwards in colour."""
    if not scores or not scores["counts"]:
        return ""
    edges, counts = scores["edges"], scores["counts"]
    figure, axes = _figure(height=290)
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
    _mark(axes, 0.0, "0", "solid", to_the_right=(threshold or 0.0) < 0)
    if threshold is not None:
        _mark(axes, threshold, f"threshold {threshold:.2f}", "dashed", to_the_right=threshold >= 0)
    return _svg(
        figure,
        "scores",
        f"Histogram of the difference score of {scores['instances']:,} instances, mean {scores['mean']:.2f}, "
        f"{scores['negative_share']:.1%} below 0"
        + ("." if threshold is None else f", kept from {threshold:.2f} upwards."),
    )


@_style()
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
        axes.set_title(f"{_label(one['name'])}: {one['selected'] / max(1, one['of']):.0%} of all")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    panels[0].set_xlim(0, min(1.0, 1.1 * max(value for share in shares for value in share.values())) or 1.0)
    for axes in panels[len(selections) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_yticks(range(len(sources)), [_label(source) for source in sources])
        axes.set_ylim(len(sources) - 0.4, -0.6)
    described = " ".join(
        f"{one['name']}: " + ", ".join(f"{source} {share.get(source, 0.0):.0%}" for source in sources) + "."
        for one, share in zip(selections, shares, strict=True)
    )
    return _svg(figure, "share-kept", f"Bars: share of each source's instances that is kept. {described}")


@_style()
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
    panels[0].set_yticks(places, [_label(way["way"]) for way in ways])
    panels[0].invert_yaxis()
    described = ", ".join(f"{way['way']} {1 - way['jaccard']:.2%} and {way['mean_nats']:.1e}" for way in ways)
    return _svg(figure, "drift", f"Bars: share of the picks changed, and mean movement of log p. {described}.")


def compact(value: float | None) -> str:
    """A count in three digits: 950, 100k, 1.33M, 2.5B; a dash where there is none."""
    if value is None:
        return ABSENT
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def power(value: float | None) -> str:
    """`1.6 × 10¹³`; a dash where there is none."""
    if value is None:
        return ABSENT
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{superscript(int(exponent or 0))}"


def superscript(value: int) -> str:
    """`⁻¹²`."""
    return str(value).translate(SUPERSCRIPTS)


def _figure(height: float) -> tuple[Figure, Axes]:
    """A transparent figure with one pair of axes."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _mark(axes: Axes, value: float, text: str, dash: str, *, to_the_right: bool) -> None:
    """A vertical line at `value` with its text beside the top."""
    axes.axvline(value, color=INK, linewidth=1.2, linestyle=dash)
    axes.annotate(
        text,
        (value, 0.98),
        (5 if to_the_right else -5, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        horizontalalignment="left" if to_the_right else "right",
        verticalalignment="top",
    )


def _line_styles(names: Sequence[str], controls: Collection[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each name's line."""
    free = iter((colour, dash) for dash in DASHES for colour in SERIES)
    inks = iter([(INK, dash) for dash in DASHES])
    return {name: next(inks if name in controls else free, (MUTED, "solid")) for name in names}


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


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """The same heights in the same order, pushed upwards until no two are closer than `gap`."""
    spread = list(heights)
    ascending = sorted(range(len(heights)), key=heights.__getitem__)
    for below, above in pairwise(ascending):
        spread[above] = max(spread[above], spread[below] + gap)
    return spread


def _label(name: str, limit: int = 26) -> str:
    """The name in one line of at most `limit` characters."""
    line = " ".join(name.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _svg(figure: Figure, salt: str, description: str) -> str:
    """The figure as an `<svg>` that scales with its container and carries its description for screen readers."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": salt}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has it
        figure.savefig(buffer, format="svg", metadata=nothing)
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for the whole page; page.css has it
    body = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", body)  # of no use, and not unique among figures
    body = re.sub(r"<[^>]+>", lambda tag: _with_css_colours(tag[0]), body)
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">{body}'
    )


def _with_css_colours(tag: str) -> str:
    """A tag whose colours are CSS variables; what stands between tags is text, and is not touched."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: CSS_COLOURS.get(colour[0], colour[0]), tag)
