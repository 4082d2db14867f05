"""What is printed at the end of a run: the students, what their training took, and the data made for them.

In: the findings, as in `report.json`. Out: lines for a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    found += ["", *_costs([*students, *(one for one in findings["models"] if one["objective"])])]
    found.append(
        "operations (FLOP) with those of a teacher that is asked on the way; peak is this machine's in matrix products."
    )
    return [*found, *_made(findings), *proxy_lines(findings)]


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


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else f"{value:,{form}}"


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
