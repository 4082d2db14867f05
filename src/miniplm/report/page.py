"""The report: the findings of a run in, one HTML document out.

Promised: the document needs nothing but itself (no script, no network, opens from `file://`); the same findings give
the same bytes; text of the corpus and of the recipe is escaped, and its control characters, lone surrogates and
bidirectional overrides are shown as signs, never passed on. The headline follows the verdicts of the comparisons and
computes none of its own. Not covered: making the findings, and writing the file.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from miniplm.report import figures
from miniplm.report.figures import ABSENT

VERDICTS = ("better", "within noise", "worse")  # the best first
EQUAL_TOKENS = 0.01  # budgets no further apart than this share are called equal: whole batches rarely divide a budget
JOINERS = "\u200c\u200d"  # format characters that spelling and emoji need
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(findings: Mapping[str, Any]) -> str:
    """The report as one HTML document, from the findings that are also written as `report.json`."""
    shown = _visible(findings)
    students, selections = shown["students"], shown["selections"]
    threshold, threshold_of = _threshold(shown)
    curve_key = "held_out_loss" if _has(students, "held_out_loss") else "train_loss"
    environment = Environment(
        loader=PackageLoader("miniplm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "amount": amount,
        "compact": figures.compact,
        "count": "{:,}".format,
        "duration": duration,
        "percent": "{:.1%}".format,
        "plus_minus": plus_minus,
        "power": power,
    }
    return environment.get_template("page.html").render(
        shown,
        proxy=shown.get("proxy"),
        css=_markup((resources.files("miniplm") / "report" / "page.css").read_text(encoding="utf-8")),
        headline=headline(shown),
        compared={one["student"]: one for one in shown["comparisons"]},
        curve_key=curve_key,
        curves=_markup(figures.loss_curves(students, shown["control"], curve_key)),
        same_loss=_markup(figures.tokens_to_same_loss(shown["comparisons"])),
        histogram=_markup(figures.score_histogram(shown["scores"], threshold)),
        threshold_of=threshold_of,
        shares=_markup(figures.share_kept(selections)),
        share_rows=_by_source(selections),
        loss_rows=_by_source([*students, *shown["models"]]),
        figure_limits={"sources": figures.SOURCES_SHOWN, "selections": figures.SELECTIONS_SHOWN},
    )


def headline(findings: Mapping[str, Any]) -> Markup:
    """What the comparisons say, in one or two sentences; their verdicts decide."""
    comparisons = findings["comparisons"]
    if not findings["students"]:
        return Markup("No student was trained in this run.")
    if findings["control"] is None:
        return Markup("No control student was trained, so this run cannot say whether the selection helps.")
    if not comparisons:
        return Markup("Nothing was compared with the control, so this run cannot say whether the selection helps.")
    best = min(comparisons, key=lambda one: (VERDICTS.index(one["verdict"]), one["difference"]))
    terms = {
        "student": best["student"],
        "control": _control(findings, best["control"]),
        "budget": _budget(findings, best),
        "size": plus_minus(abs(best["difference"]), best["se"]),
        "difference": plus_minus(best["difference"], best["se"], sign=True),
    }
    sentence = {
        "better": Markup("{budget}, <em>{student}</em> is {size} nats per token better than {control}."),
        "within noise": Markup(
            "No student beat {control}. {budget}, the difference of <em>{student}</em> is within noise: "
            "{difference} nats per token."
        ),
        "worse": Markup(
            "No student beat {control}. {budget}, <em>{student}</em> is {size} nats per token worse than it."
        ),
    }[best["verdict"]].format(**terms)
    if len(comparisons) == 1:
        return sentence
    verdicts = Counter(one["verdict"] for one in comparisons)
    tally = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict])
    return sentence + Markup(" Of {} students compared: {}.").format(len(comparisons), tally)


def amount(value: float | None, places: int = 3, *, sign: bool = False) -> str:
    """A number with a true minus sign, or a dash where there is none; with `sign`, a plus sign too."""
    if value is None or not math.isfinite(value):
        return ABSENT
    rounded = round(value, places) or 0.0  # no negative zero
    return f"{rounded:{'+' if sign and rounded else ''}.{places}f}".replace("-", "−")


def plus_minus(value: float | None, error: float | None, *, sign: bool = False) -> str:
    """`5.120 ± 0.030`: three decimals, or as many as the error needs for one digit."""
    if value is None or error is None or not 0 < error < math.inf:
        return amount(value, sign=sign)
    places = min(6, max(3, -math.floor(math.log10(error))))
    return f"{amount(value, places, sign=sign)} ± {amount(error, places)}"


def power(value: float | None) -> str:
    """`1.6 × 10¹³`."""
    if value is None:
        return ABSENT
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent or 0)).translate(SUPERSCRIPTS)}"


def duration(seconds: float | None) -> str:
    """`8.7 s`, `1 min 45 s`, `2 h 05 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _control(findings: Mapping[str, Any], name: str) -> str:
    """The words for the control, which depend on what it was trained on."""
    data = {student["name"]: student["data"] for student in findings["students"]}.get(name)
    samplers = {selection["name"]: selection["sampler"] for selection in findings["selections"]}
    if data == "pool":
        return "the control on the whole pool"
    return "the random control" if samplers.get(data) == "random" else "the control"


def _budget(findings: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """The words "At equal tokens", or the two budgets where they differ."""
    tokens = {student["name"]: student["tokens"] for student in findings["students"]}
    ours, theirs = tokens[comparison["student"]], tokens[comparison["control"]]
    if math.isclose(ours, theirs, rel_tol=EQUAL_TOKENS):
        return "At equal tokens"
    return f"With {figures.compact(ours)} training tokens against {figures.compact(theirs)}"


def _threshold(findings: Mapping[str, Any]) -> tuple[float | None, str]:
    """The threshold, on the histogram's own scale, of the first selection that has one, and that selection's name."""
    for selection in findings["selections"] if findings["scores"] else ():
        same_scale = selection["sampler"] == "difference" and selection["normalize"] == findings["scores"]["normalize"]
        if same_scale and selection["threshold"] is not None:
            return selection["threshold"], selection["name"]
    return None, ""


def _has(students: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether any point of any curve has a value under `key`."""
    return any(point[key] is not None for student in students for point in student["curve"])


def _by_source(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any] | None]]:
    """Source -> its row in each column's `by_source`; the largest sources first."""
    rows: dict[str, list[Mapping[str, Any] | None]] = {}
    for number, column in enumerate(columns):
        for row in column["by_source"]:
            rows.setdefault(row["source"], [None] * len(columns))[number] = row

    sizes = {
        source: max(row.get("pool", row.get("instances", 0)) for row in found if row) for source, found in rows.items()
    }
    return {source: rows[source] for source in sorted(rows, key=lambda source: (-sizes[source], source))}


def _visible(value: Any) -> Any:
    """The same value with every text in it, keys included, made safe to show."""
    if isinstance(value, str):
        return "".join(_sign(character) for character in value.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {_visible(key): _visible(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(one) for one in value]
    return value


def _sign(character: str) -> str:
    """The character, or a sign in its place where it would act instead of being seen."""
    if character in "\n\t" or character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    if character < " ":
        return chr(0x2400 + ord(character))  # ␀ ... ␟
    return f"⟨U+{ord(character):04X}⟩"


def _markup(safe: str) -> Markup:
    """Text of our own making that is HTML already: the style sheet and the figures."""
    return Markup(safe)  # noqa: S704
