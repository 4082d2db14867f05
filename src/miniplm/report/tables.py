"""Analyses as lines for a terminal, rows of CSV, and a figure. In: what the analyses give as JSON types."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ABSENT = "–"


def agreement_lines(found: Mapping[str, Any]) -> list[str]:
    """How far a reference stands for a student."""
    return [
        f"{found['instances']:,} instances, log p − log p_ref against log p − log q, per {found['normalize']}",
        f"Pearson            {_measured(found['pearson'])}",
        f"Spearman           {_measured(found['spearman'])}",
        f"the same decision  {_measured(found['agreement'])}  at ratio {found['ratio']:g}; "
        f"by chance {found['by_chance']:.3f}",
        "[ ]: 95 % interval over instances. The paper (Table 11, 104M reference, 500M student): 0.826, 0.840, 0.874.",
    ]


def effects_lines(found: Mapping[str, Any]) -> list[str]:
    """What share of the pool is easy, hard or noisy, in all and by source."""
    bounds = found["bounds"]
    lines = [
        f"noisy: score below 0; easy: up to {bounds['easy_score']:.3f} nats per {found['unit']}, where the reference's "
        f"loss is at most {bounds['easy_loss']:.3f}; hard: above {bounds['hard_score']:.3f}",
        f"{'effect':<10}{'instances':>12}{'share':>9}{'kept':>9}{'teacher':>10}{'reference':>11}{'score':>9}",
    ]
    for row in found["effects"]:
        lines.append(
            f"{row['effect']:<10}{row['pool']:>12,}{row['share']:>9.1%}{_share(row['kept_share']):>9}"
            f"{_nats(row['teacher']):>10}{_nats(row['reference']):>11}{_nats(row['score']):>9}"
        )
    width = max(6, *(len(row["source"]) for row in found["by_source"]))
    lines.append(f"{'source':<{width}}{'instances':>12}{'kept':>9}{'easy':>9}{'hard':>9}{'noisy':>9}{'score':>9}")
    for row in found["by_source"]:
        shares = "".join(f"{_share(row[key]):>9}" for key in ("kept_share", "easy", "hard", "noisy"))
        lines.append(f"{row['source']:<{width}}{row['pool']:>12,}{shares}{_nats(row['score']):>9}")
    return lines


def diversity_lines(found: Mapping[str, Any]) -> list[str]:
    """How diverse collections of text are, the pool first."""
    measures = list(found["more_diverse"])
    width = max(11, *(len(one["name"]) for one in found["collections"]))
    sample = found["sample"]
    lines = [
        f"{sample['instances']:,} instances of each, seed {sample['seed']}; vectors: {found['encoder']}",
        f"{'collection':<{width}}" + "".join(f"{measure.replace('_', '-'):>22}" for measure in measures),
    ]
    for one in found["collections"]:
        lines.append(f"{one['name']:<{width}}" + "".join(f"{_half(one[measure]):>22}" for measure in measures))
        beside = [one[measure]["minus_pool"] for measure in measures]
        if None not in beside:
            lines.append(f"{'  less pool':<{width}}" + "".join(f"{_half(less, '+'):>22}" for less in beside))
    better = ", ".join(f"{measure.replace('_', '-')} {side}" for measure, side in found["more_diverse"].items())
    return [*lines, f"More diverse is: {better}. ± is half of a 95 % interval."]


def scaling_lines(found: Mapping[str, Any]) -> list[str]:
    """The laws of loss curves, what they say of more compute, and what a control would need."""
    lines = []
    value = "loss" if found["ceiling"] is None else found["value"]
    for one in found["curves"]:
        law = "" if found["ceiling"] is None else f", the law that of {found['ceiling']:g} − {value}"
        lines.append(f"{one['name']}: {one['points']} points along {found['along']}{law}")
        lines += _law_lines(one)
        for loss in one["extrapolated"]:
            size = f"{loss['parameters']:.3g} parameters and " if "parameters" in loss else ""
            lines.append(f"  {value} at {size}{loss['compute']:.3g}: {_number(loss)}")
    for one in found["reductions"]:
        for end in ("student", "control"):
            reduction = one[f"at_end_of_{end}"]
            lines.append(
                f"{one['name']} against {found['control']}, at the {value} {reduction['target']:.4f} of the {end}'s "
                f"end: {_number(reduction['ratio'])} times the compute, read from the {reduction['read_from']}"
            )
    return [
        *lines,
        "[ ]: 95 % interval by bootstrap over points. Points of one run with a cosine schedule are not converged runs: "
        "the slope is flattered.",
    ]


def scaling_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same as rows of CSV, `what` each is of: a constant, `floor_told`, a loss or a reduction."""
    rows = [row for one in found["curves"] for row in _law_rows(one["name"], one)]
    for one in found["curves"]:
        rows += [{"name": one["name"], "what": found["value"], **loss} for loss in one["extrapolated"]]
    for one in found["reductions"]:
        for end in ("student", "control"):
            reduction = one[f"at_end_of_{end}"]
            given = {"control": found["control"], "target": reduction["target"], "read_from": reduction["read_from"]}
            rows.append({"name": one["name"], "what": f"reduction at end of {end}", **reduction["ratio"], **given})
    return rows


def scaling_figure(found: Mapping[str, Any]) -> str:
    """The curves and their laws as `<svg>`; "" unless they are held-out losses along operations."""
    if (found["along"], found["value"], found["ceiling"]) != ("flops", "held_out_loss", None):
        return ""
    from miniplm.report.analysis_figures import laws  # matplotlib, and torch with the rest of the report

    fits, students = [], []
    for one in found["curves"]:
        line = [{"flops": point["compute"], **point} for point in one["line"]]
        fits.append({"student": one["name"], "trained": one["trained"], "line": line, "extrapolated": line[-1]})
        curve = [{"flops": flops, "held_out_loss": loss} for flops, loss in one["measured"]]
        students.append({"name": one["name"], "curve": curve})
    return laws({"steep": found["warm_up"], "fits": fits}, students, {found["control"]} - {None})


def data_reduction_lines(found: Mapping[str, Any]) -> list[str]:
    """The data that a control would need for a student's loss."""
    law, seen = found["law"], "" if found["epochs"] == 1 else f", each seen {found['epochs']:g} times"
    return [
        f"control: {law['points']} points along effective tokens, {found['used']:.3g} unique ones",
        *_law_lines(law),
        f"for the loss {found['loss']:.4f} it would need {_number(found['needed'])} unique tokens{seen}",
        f"beside those that it had {_number(found['extra'])}",
        f"data reduction          {_number(found['ratio'])}",
        f"[ ]: 95 % interval by bootstrap over points; {ABSENT}: more than any, for the law stays above that loss.",
    ]


def data_reduction_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same as rows of CSV."""
    figures = [{"name": "control", "what": what, **found[what]} for what in ("needed", "extra", "ratio")]
    return [*_law_rows("control", found["law"]), *figures]


def published_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paper's extrapolated losses, from its constants and as printed."""
    lines = [f"{'student':<8}{'method':<20}{'tokens':>7}{'computed':>10}{'printed':>9}"]
    for row in rows:
        miss = "" if row["agrees"] else "  differs in the last digit"
        lines.append(
            f"{row['size']:<8}{row['method']:<20}{row['tokens']:>7}{row['computed']:>10.3f}{row['printed']:>9.2f}{miss}"
        )
    agree = sum(row["agrees"] for row in rows)
    return [*lines, f"{agree} of {len(rows)} to the printed digit (paper, table 2, from the constants of its laws)."]


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV; what is nested in a row gets columns of its own: `pearson.low`."""
    flat = [_flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def examples_lines(told: Mapping[str, Any]) -> list[str]:
    """Instances of each effect, and neighbours, under headings, with what they had to make do with."""
    lines = []
    if all(part["kept"] is None for part in told["effects"]):
        lines += ["", "No --rows was given: the upper half by score stands for what is kept."]
    for key in ("easy_dropped", "hard_kept", "noisy_dropped", "neighbours"):
        note = told["notes"].get(key)
        lines += ["", key.replace("_", ", "), *([note] if note else []), *example_lines(told[key])]
    return lines


def example_lines(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Instances as text, with what the models think of them."""
    lines = []
    for one in examples:
        place = f", place {one['place']:,}, {'kept' if one['kept'] else 'dropped'}" if "place" in one else ""
        lines.append(
            f"--- row {one['row']:,} ({one['source']}){place}: teacher {one['teacher']:.3f}, reference "
            f"{one['reference']:.3f}, score {one['score']:+.3f}"
        )
        lines += one["text"].splitlines()
    return lines


def _law_lines(one: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, constant in one["constants"].items():
        told = name != "floor" or one["floor_told"]
        lines.append(f"  {name:<6} {_number(constant) if told else 'no floor can be told from these points'}")
    return lines


def _law_rows(name: str, one: Mapping[str, Any]) -> list[dict[str, Any]]:
    constants = [{"name": name, "what": what, **constant} for what, constant in one["constants"].items()]
    return [*constants, {"name": name, "what": "floor_told", "value": one["floor_told"]}]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _measured(one: Mapping[str, float]) -> str:
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _half(one: Mapping[str, float], sign: str = "-") -> str:
    return f"{one['value']:{sign}.3f} ± {(one['high'] - one['low']) / 2:.3f}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _number(one: Mapping[str, float | None]) -> str:
    """A figure of any size and its interval."""
    value, low, high = ("–" if one[key] is None else f"{one[key]:.4g}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
