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

from miniplm.analysis.cost import PAPER_COMPUTE_REDUCTION
from miniplm.pipeline.cost_table import size
from miniplm.recipe import MiniLLMSettings, NextTokenSettings
from miniplm.report import analysis_figures, figures
from miniplm.report.drawing import ABSENT, compact, power
from miniplm.report.training import controls, objective_label, origin_label

VERDICTS = ("better", "within noise", "worse")  # the best first
EQUAL = 0.01  # budgets no further apart than this share are called equal: whole batches rarely divide a budget
PLAIN, ON_POLICY = NextTokenSettings().name, MiniLLMSettings().name
JOINERS = "\u200c\u200d"  # format characters that spelling and emoji need


def render(findings: Mapping[str, Any]) -> str:
    """The report as one HTML document, from the findings that are also written as `report.json`."""
    shown = visible(findings)
    students, selections = shown["students"], shown["selections"]
    threshold, threshold_of = _threshold(shown)
    compared_with = controls(students)
    return (
        environment()
        .get_template("page.html")
        .render(
            shown,
            proxy=shown.get("proxy"),
            css=style_sheet(),
            headline=headline(shown),
            controls=compared_with,
            compared={one["student"]: one for one in shown["comparisons"]},
            foreign=[one["name"] for one in students if one["own_tokenizer"]],
            trained=[one for one in shown["models"] if one["objective"]],
            **_held_out_figures(students, compared_with),
            **_training_figures(students, compared_with),
            **{name: safe(svg) for name, svg in analysis_figures.drawn(shown, compared_with).items()},
            histogram=safe(figures.score_histogram(shown["scores"], threshold)),
            threshold_of=threshold_of,
            shares=safe(figures.share_kept(selections)),
            share_rows=_by_source(selections),
            loss_rows=_by_source([*students, *shown["models"], *shown["others"]]),
            cost_of={one["stage"]: one for one in (shown["cost"] or {}).get("stages", ())},
            paper_compute_reduction=PAPER_COMPUTE_REDUCTION,
            figure_limits={"sources": figures.SOURCES_SHOWN, "selections": figures.SELECTIONS_SHOWN},
        )
    )


def environment() -> Environment:
    """Where templates are found, and the filters that they use; everything that they show is escaped."""
    found = Environment(
        loader=PackageLoader("miniplm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "amount": amount,
        "compact": compact,
        "count": "{:,}".format,
        "duration": duration,
        "interval": interval,
        "percent": "{:.1%}".format,
        "percent_whole": "{:.0%}".format,
        "plus_minus": plus_minus,
        "objective": objective_label,
        "origin": origin_label,
        "power": power,
        "size": size,
        "students": students_needed,
    }
    return found


def style_sheet() -> Markup:
    """The style sheet of every page."""
    return safe((resources.files("miniplm") / "report" / "page.css").read_text(encoding="utf-8"))


def headline(findings: Mapping[str, Any]) -> Markup:
    """What the comparisons say, in one to three sentences; their verdicts decide."""
    comparisons, students = findings["comparisons"], findings["students"]
    if not students:
        return Markup("No student was trained in this run.")
    compared_with = controls(students)
    if not compared_with:
        return Markup(
            "No student has a control, plainly pre-trained on random text, of the same model settings, length and "
            "tokenizer: this run cannot say whether the selection helps."
        )
    if not comparisons:
        return Markup("Nothing was compared with a control, so this run cannot say whether the selection helps.")
    best = min(comparisons, key=lambda one: (VERDICTS.index(one["verdict"]), one["bits_difference"]))
    several = len(compared_with) > 1
    control = Markup("{}").format(_control(findings, best["control"]))
    if several:
        control += Markup(", <em>{}</em>").format(best["control"])
    terms = {
        "student": best["student"],
        "control": control,
        "none": Markup("No student beat {}.").format("its control" if several else control),
        "to": Markup(" to {},").format(control) if several else "",
        "than": control if several else "it",
        "budget": _budget(findings, best),
        "size": plus_minus(abs(best["difference"]), best["se"]),
        "difference": plus_minus(best["difference"], best["se"], sign=True),
        "unit": best["unit"],
    }
    sentence = {
        "better": Markup("{budget}, <em>{student}</em> is {size} {unit} better than {control}."),
        "within noise": Markup(
            "{none} {budget}, the difference of <em>{student}</em>{to} is within noise: {difference} {unit}."
        ),
        "worse": Markup("{none} {budget}, <em>{student}</em> is {size} {unit} worse than {than}."),
    }[best["verdict"]].format(**terms)
    if len(comparisons) > 1:
        verdicts = Counter(one["verdict"] for one in comparisons)
        tally = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict])
        sentence += Markup(" Of {} students compared: {}.").format(len(comparisons), tally)
    if alone := [one["name"] for one in students if one["control"] is None and one["name"] not in compared_with]:
        names = Markup(", ").join(Markup("<em>{}</em>").format(name) for name in alone)
        sentence += Markup(" Without a control, and so without a verdict: {}.").format(names)
    return sentence


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


def interval(measured: Mapping[str, float | None], places: int = 3, endless: str = ABSENT) -> str:
    """`0.609 to 0.725`: the ends of an interval, one that is infinite as `endless`."""
    ends = (measured["low"], measured["high"])
    return " to ".join(endless if end is None else amount(end, places) for end in ends)


def students_needed(count: float | None, otherwise: str = "never") -> str:
    """`2.5`, `2,818`; `otherwise` where there is no such number."""
    if count is None:
        return otherwise
    return f"{count:,.1f}" if count < 100 else f"{count:,.0f}"


def duration(seconds: float | None) -> str:
    """`8.7 s`, `1 min 45 s`, `2 h 05 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _control(findings: Mapping[str, Any], name: str) -> str:
    """The words for a control, which depend on what it was trained on."""
    made_of = next(student["made_of"] for student in findings["students"] if student["name"] == name)
    samplers = {selection["name"]: selection["sampler"] for selection in findings["selections"]}
    if any(one["kind"] == "generated" for one in made_of):
        return "the control"
    if made_of[-1]["kind"] == "pool":
        return "the control on the whole pool"
    return "the random control" if samplers.get(made_of[-1]["name"]) == "random" else "the control"


def _budget(findings: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """What the two were given: the words "At equal tokens" or "At equal training operations", or what differs."""
    rows = {student["name"]: student for student in findings["students"]}
    ours, theirs = rows[comparison["student"]], rows[comparison["control"]]
    equal = {
        key: None not in (ours[key], theirs[key]) and math.isclose(ours[key], theirs[key], rel_tol=EQUAL)
        for key in ("tokens", "flops")
    }
    if not equal["tokens"]:
        tokens = f"{compact(ours['tokens'])} training tokens against {compact(theirs['tokens'])}"
        return f"At equal training operations, {tokens}" if equal["flops"] else f"With {tokens}"
    own = ", each of its own tokenizer" if ours["tokenizer"] != theirs["tokenizer"] else ""
    if equal["flops"] or not (ours["flops"] and theirs["flops"]):
        return f"At equal tokens{own}"
    return f"At equal tokens{own} and {ours['flops'] / theirs['flops']:.3g} times the training operations"


def _threshold(findings: Mapping[str, Any]) -> tuple[float | None, str]:
    """The threshold, on the histogram's own scale, of the first selection that has one, and that selection's name."""
    for selection in findings["selections"] if findings["scores"] else ():
        same_scale = selection["sampler"] == "difference" and selection["normalize"] == findings["scores"]["normalize"]
        if same_scale and selection["threshold"] is not None:
            return selection["threshold"], selection["name"]
    return None, ""


def _held_out_figures(students: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> dict[str, Any]:
    """Held-out loss against tokens, and against operations where these are not the same picture."""
    costs = [one["flops"] / one["tokens"] for one in students if one["flops"] and one["tokens"]]
    one_cost = not costs or math.isclose(min(costs), max(costs), rel_tol=1e-9)
    return {
        "curves": safe(figures.loss_curves(students, controls)),
        "curves_by_flops": safe("" if one_cost else figures.loss_curves(students, controls, against="flops")),
        "flops_per_token": costs[0] if costs and one_cost else None,
    }


def _training_figures(students: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> dict[str, Any]:
    """Cross entropy of the training text, a figure for each tokenizer: the corpus's first."""
    drawn = [one for one in students if any(point.get("cross_entropy") is not None for point in one["curve"])]
    found = []
    for own, tokenizer in sorted({(one["own_tokenizer"], one["tokenizer"]) for one in drawn}):
        names = [one["name"] for one in drawn if one["tokenizer"] == tokenizer]
        svg = figures.loss_curves(students, controls, "cross_entropy", only=names)
        found.append({"own": own, "names": names, "svg": safe(svg)})
    kinds = {one["name"]: (one["objective"] or {}).get("name") for one in drawn}
    return {
        "training_curves": [one for one in found if one["svg"]],
        "mixtures": [name for name, kind in kinds.items() if kind not in (PLAIN, ON_POLICY)],
        "on_prompts": [name for name, kind in kinds.items() if kind == ON_POLICY],
        "not_drawn": [one["name"] for one in students if one["name"] not in kinds],
    }


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


def visible(value: Any) -> Any:
    """The same value with every text in it, keys included, made safe to show."""
    if isinstance(value, str):
        return "".join(_sign(character) for character in value.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {visible(key): visible(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [visible(one) for one in value]
    return value


def _sign(character: str) -> str:
    """The character, or a sign in its place where it would act instead of being seen."""
    if character in "\n\t" or character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    if character < " ":
        return chr(0x2400 + ord(character))  # ␀ ... ␟
    return f"⟨U+{ord(character):04X}⟩"


def safe(safe: str) -> Markup:
    """Text of our own making that is HTML already: the style sheet and the figures."""
    return Markup(safe)  # noqa: S704
