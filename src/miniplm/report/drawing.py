"""What all figures have in common: colours, type, frames, labels, and the `<svg>` that comes out.

Promised: the same findings give the same bytes; every colour is a CSS variable with a fallback, so that a page can
recolour a figure for dark mode; text stays text (`svg.fonttype: none`), is escaped, and is never read as mathematics.
Not covered: control characters in names, which the pages make visible before they call.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 760  # of every figure, in SVG user units; heights and font sizes are in the same unit

INK, MUTED, RULE = "#1b1f24", "#5b6470", "#d5d9df"
# Okabe and Ito's colours without yellow, which no light page shows; *from* https://jfly.uni-koeln.de/color/
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dashed", "dotted", "dashdot")
CSS_COLOURS = {INK: "currentColor", MUTED: f"var(--muted, {MUTED})", RULE: f"var(--rule, {RULE})"} | {
    colour: f"var(--series-{number}, {colour})" for number, colour in enumerate(SERIES, 1)
}
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
def styled() -> Iterator[None]:
    """The defaults of matplotlib with `STYLE`, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


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


def blank(height: float) -> tuple[Figure, Axes]:
    """A transparent figure with one pair of axes."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def mark(axes: Axes, value: float, text: str, dash: str, *, to_the_right: bool) -> None:
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


def line_styles(names: Sequence[str], controls: Collection[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each name's line."""
    free = iter((colour, dash) for dash in DASHES for colour in SERIES)
    inks = iter([(INK, dash) for dash in DASHES])
    return {name: next(inks if name in controls else free, (MUTED, "solid")) for name in names}


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The same heights in the same order, pushed upwards until no two are closer than `gap`."""
    spaced = list(heights)
    ascending = sorted(range(len(heights)), key=heights.__getitem__)
    for below, above in pairwise(ascending):
        spaced[above] = max(spaced[above], spaced[below] + gap)
    return spaced


def label(name: str, limit: int = 26) -> str:
    """The name in one line of at most `limit` characters."""
    line = " ".join(name.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def svg(figure: Figure, salt: str, description: str) -> str:
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
