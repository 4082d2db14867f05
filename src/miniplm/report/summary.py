"""What is printed at the end of a run: students, other models, what training took, the data made, the analyses.

In: the findings, as in `report.json`. Out: lines for a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miniplm.report.analysis import measured_reductions
from miniplm.report.findings import proxy_lines
from miniplm.report.training import controls, objective_label

ABSENT = "–"


def lines(findings: Mapping[str, Any]) -> list[str]:
    """The lines."""
    students = findings["students"]
    found = ["", *_results(findings), "± is one standard error over held-out instances; one seed per student."]
    if any(one["own_tokenizer"] for one in students):
        found.append(
            "Nats per token of different tokenizers cannot be compared; there the difference is in bits per byte."
        )
    found += _others(findings)
    found += ["", *_costs([*students, *(one for one in findings["models"] if one["objective"])])]
    found.append(
        "operations (FLOP) with those of a teacher that is asked on the way; peak is this machine's in matrix products."
    )
    return [*found, *_made(findings), *proxy_lines(findings), *_analyses(findings)]


def _results(findings: Mapping[str, Any]) -> list[str]:
    gaps = {one["student"]: one for one in findings["comparisons"]}
    width, of_data = (
        max([least, *(len(one[key]) for one in findings["students"])]) for key, least in (("name", 7), ("data", 16))
    )
    heading = (
        f"{'student':<{width}}  {'trained on':<{of_data}} {'tokens':>12}  {'nats per token':>16}  {'bits per byte':>13}"
    )
    found = [f"{heading}  against control"]
    compared_with = controls(findings["students"])
    several = len(compared_with) > 1
    for one in findings["students"]:
        line = f"{one['name']:<{width}}  {one['data']:<{of_data}} {one['tokens']:>12,}"
        if one["bits_per_byte"] is None:
            found.append(f"{line}  not measured")
            continue
        against = "(no control)" if one["control"] is None else ""
        if one["name"] in compared_with:
            against = "(a control)" if several else "(the control)"
        if (gap := gaps.get(one["name"])) is not None:
            unit = " bits/byte" if gap["unit"] == "bits per byte" else ""
            against = f"{gap['difference']:+.4f} ± {gap['se']:.4f}{unit}  {gap['verdict']}"
            against += f"  ({gap['control']})" if several else ""
        found.append(f"{line}  {_loss(one):>16}  {one['bits_per_byte']:>13.4f}  {against}".rstrip())
    return found


def _loss(one: Mapping[str, Any]) -> str:
    if one["loss"] is None:
        return ABSENT
    error = ABSENT if one["loss_se"] is None else f"{one['loss_se']:.4f}"
    return f"{one['loss']:>7.4f} ± {error:<6}"


def _others(findings: Mapping[str, Any]) -> list[str]:
    """Teacher, reference and other people's models, a line each: held-out loss, and average accuracy where asked."""
    accuracy = _on_tasks(findings["tasks"])
    found = []
    for one in [*findings["models"], *findings["others"]]:
        name = one.get("name") or one["role"]
        told = [] if one["loss"] is None else [f"{_loss(one).strip()} nats per token"]
        told += [] if one["bits_per_byte"] is None else [f"{one['bits_per_byte']:.4f} bits per byte"]
        told += [f"average accuracy {accuracy[name]}"] if name in accuracy else []
        found.append(f"{name}: {', '.join(told) or 'not measured'}")
    return ["", *found] if found else []


def _costs(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """What training took, a line for each model that was trained here."""
    names = [one.get("name") or one["role"] for one in models]
    objectives = [objective_label(one["objective"]) for one in models]
    width, wide = max([7, *map(len, names)]), max([9, *map(len, objectives)])
    heading = (
        f"{'trained':<{width}}  {'objective':<{wide}}  {'parameters':>13}  {'steps':>8}  {'share':>6}  {'epochs':>7}"
    )
    found = [f"{heading}  {'operations':>10}  {'seconds':>9}  {'tokens/s':>9}  {'of peak':>7}  {'training loss':>13}"]
    for one, name, objective in zip(models, names, objectives, strict=True):
        share = f"{one['matched_share']:.1%}" if one["match"] else ABSENT
        peak = ABSENT if one["share_of_matmul_rate"] is None else f"{one['share_of_matmul_rate']:.1%}"
        comparable = None if one.get("own_tokenizer") else one["final_cross_entropy"]
        loss = ABSENT if comparable is None else f"{comparable:.4f}"
        line = f"{name:<{width}}  {objective:<{wide}}  {one['parameters']:>13,}  {one['steps']:>8,}  {share:>6}"
        rates = (
            f"{_number(one['train_seconds'], '.1f'):>9}  {_number(one['tokens_per_s'], ''):>9}  {peak:>7}  {loss:>13}"
        )
        found.append(f"{line}  {one['epochs']:>7.2f}  {one['flops']:>10.2e}  {rates}")
    return found


def _number(value: float | None, form: str, absent: str = ABSENT) -> str:
    return absent if value is None else f"{value:,{form}}"


def _made(findings: Mapping[str, Any]) -> list[str]:
    """The data made for students, a line each."""
    found = [
        f"{one['name']}: {one['instances']:,} instances of {one['data']}, {one['generated_tokens']:,} tokens written "
        f"by the teacher in {one['teacher_flops']:.3g} operations, {one['kept_unchanged']:,} instances kept unchanged"
        for one in findings["generated"]
    ]
    return found + [
        f"{one['name']}: {one['instances_in']:,} instances of {one['data']} are {one['instances']:,} under another "
        f"tokenizer; {one['bytes_in']:,} bytes in, {one['bytes_out']:,} out"
        for one in findings["retokenized"]
    ]


def _analyses(findings: Mapping[str, Any]) -> list[str]:
    """What the analyses say of each student: a column for each that has something to say, then what they are."""
    columns = {
        **{one["name"]: _on_documents(one) for one in findings["documents"]},
        "tasks": _on_tasks(findings["tasks"]),
        "same decision": _agreements(findings["agreement"]),
        "compute reduction": _reductions(findings["scaling"]),
        "break-even": _break_even(findings["cost"]),
    }
    columns = {title: cells for title, cells in columns.items() if cells}
    names = [one["name"] for one in findings["students"] if any(one["name"] in cells for cells in columns.values())]
    if not names:
        return []
    table = [
        ["student", *columns],
        *([name, *(cells.get(name, ABSENT) for cells in columns.values())] for name in names),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    notes = {
        "tasks": "tasks: the average accuracy; another than the paper's where tasks are missing.",
        "same decision": "same decision: of the reference and of this student, each in its turn, in what to keep.",
        "compute reduction": "compute reduction: the control's operations over the student's to the same loss.",
        "break-even": "break-even: students that repay the offline part, against Vanilla KD / against pre-training.",
    }
    return ["", *lines, *(note for title, note in notes.items() if title in columns)]


def _on_documents(documents: Mapping[str, Any]) -> dict[str, str]:
    """The loss of each model, as the paper counts it where each instance is a document."""
    found = {}
    for one in documents["models"]:
        metric = "nats_per_token_by_document" if documents["windows"] == "first" else "nats_per_token"
        unit = "nats/token"
        if one["own_tokenizer"]:
            metric, unit = "bits_per_byte", "bits/byte"
        found[one["model"]] = f"{_number(one[metric], '.4f')} {unit}"
    return found


def _on_tasks(tasks: Mapping[str, Any] | None) -> dict[str, str]:
    averages = {one["model"]: one["average"] for one in tasks["models"]} if tasks else {}
    return {
        model: f"{one['value']:.1%}" + ("" if one["se"] is None else f" ± {one['se']:.1%}")
        for model, one in averages.items()
        if one is not None
    }


def _agreements(agreement: Mapping[str, Any] | None) -> dict[str, str]:
    rows = agreement["students"] if agreement else ()
    return {one["student"]: f"{one['agreement']['value']:.1%} (by chance {one['by_chance']:.1%})" for one in rows}


def _reductions(scaling: Mapping[str, Any] | None) -> dict[str, str]:
    return {
        student: "{} ({} to {})".format(*(_number(one["ratio"][end], ".2f", "∞") for end in ("value", "low", "high")))
        for student, one in measured_reductions(scaling).items()
    }


def _break_even(cost: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for one in cost["break_even"]:
        here = "not measured"
        if one["here"] is not None:
            value, fewest, most = (
                _number(one["here"]["against_pretraining"][end], ".1f", "never") for end in ("value", "high", "low")
            )
            here = f"{value} ({fewest} to {most})" if fewest != most else value
        found[one["student"]] = f"{_number(one['against_vanilla_kd'], '.1f')} / {here}"
    return found
