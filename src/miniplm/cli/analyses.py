"""Verbs of analyses: what scores, selections and loss curves say. With --out they leave JSON and CSV too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from miniplm.cli.app import app
from miniplm.errors import RecipeError
from miniplm.progress import printable

ResultOption = Annotated[Path | None, typer.Option("--out", help="Folder for the figures as JSON and CSV.")]
NormalizeOption = Annotated[str, typer.Option(help="token, byte or sum")]
TeacherScores = Annotated[Path, typer.Option(help="Scores, or an evaluation, of the teacher.")]
ReferenceScores = Annotated[Path, typer.Option(help="Scores, or an evaluation, of the reference.")]


@app.command()
def agreement(
    teacher: TeacherScores,
    reference: ReferenceScores,
    student: Annotated[Path, typer.Option(help="Scores, or an evaluation, of a student: the paper's q.")],
    ratio: Annotated[float, typer.Option(help="Share that is kept.")] = 0.5,
    normalize: NormalizeOption = "token",
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    out: ResultOption = None,
) -> None:
    """Compare log p/p_ref with log p/q of the same instances: whether the reference stands for the student."""
    from miniplm.analysis.agreement import student_agreement
    from miniplm.report.tables import agreement_lines

    scores = [_scores(path) for path in (teacher, reference, student)]
    found = student_agreement(*scores, ratio=ratio, normalize=_unit(normalize), seed=seed).as_dict()
    _say(agreement_lines(found), out, "agreement", found, [found])


@app.command()
def effects(
    teacher: TeacherScores,
    reference: ReferenceScores,
    rows: Annotated[Path | None, typer.Option(help="A selection: what share of each effect was kept.")] = None,
    packed: Annotated[Path | None, typer.Option(help="The instances: show examples, and those at the border.")] = None,
    instance: Annotated[int | None, typer.Option(help="With --packed: the neighbours in score of this one.")] = None,
    normalize: NormalizeOption = "token",
    out: ResultOption = None,
) -> None:
    """Show how much of a pool is easy and common, hard and diverse, or noise, in all and by source."""
    import numpy as np

    from miniplm.analysis.effects import effects as effects_of
    from miniplm.analysis.examples import examples, neighbours
    from miniplm.packing.instances import open_packed
    from miniplm.report.tables import effects_lines, example_lines
    from miniplm.sampling.base import open_selection

    ours, theirs = _scores(teacher), _scores(reference)
    kept = None
    if rows is not None:
        kept = np.zeros(len(ours), np.bool_)
        kept[open_selection(rows).rows] = True
    found = effects_of(ours, theirs, kept, normalize=_unit(normalize))
    told, lines = found.as_dict(), effects_lines(found.as_dict())
    if packed is not None:
        instances = open_packed(packed)
        told |= examples(instances, found) | {"neighbours": neighbours(instances, found, instance)}
        for key in ("easy_dropped", "hard_kept", "noisy_dropped", "neighbours"):
            lines += ["", key.replace("_", ", "), *example_lines(told[key])]
    table = [{"part": "effect", "name": row.pop("effect"), **row} for row in map(dict, told["effects"])]
    table += [{"part": "source", "name": row.pop("source"), **row} for row in map(dict, told["by_source"])]
    _say(lines, out, "effects", told, table)


@app.command()
def diversity(
    packed: Annotated[Path, typer.Argument(help="The pool: a part of a prepared corpus.")],
    rows: Annotated[list[Path] | None, typer.Option(help="A selection of it; several times for several.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="A sentence encoder: folder or Hub id. [default: TF-IDF and LSA]")
    ] = None,
    sample: Annotated[int, typer.Option(help="Instances of each.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    device: Annotated[str, typer.Option(help="Of the encoder: auto, cpu, cuda")] = "auto",
    out: ResultOption = None,
) -> None:
    """Measure how diverse a selection's text is beside its pool's: distinct-n, Self-BLEU, compression, meaning."""
    from miniplm.analysis.diversity import packed_diversity
    from miniplm.packing.instances import open_packed
    from miniplm.report.tables import diversity_lines
    from miniplm.sampling.base import open_selection

    how: dict[str, Any] = {}
    if encoder is not None:
        from miniplm.models.encoder import load_encoder

        how["encoder"] = load_encoder(encoder, device=device)
    pool = open_packed(packed)
    chosen = {path.name: open_selection(path) for path in rows or ()}
    for selection in chosen.values():
        selection.check_of(pool)
    numbers = {name: selection.rows for name, selection in chosen.items()}
    found = packed_diversity(pool, numbers, sample=sample, seed=seed, **how).as_dict()
    _say(diversity_lines(found), out, "diversity", found, found["collections"])


@app.command()
def scaling(
    curves: Annotated[
        list[Path] | None, typer.Argument(help="Trained models, or files of points: JSON lines or CSV.")
    ] = None,
    control: Annotated[Path | None, typer.Option(help="A curve to compare with: the compute that is saved.")] = None,
    along: Annotated[str, typer.Option(help="Field of the compute: flops, or tokens.")] = "flops",
    value: Annotated[str, typer.Option(help="Field of the loss.")] = "held_out_loss",
    at: Annotated[list[float] | None, typer.Option(help="Extrapolate to this compute. [default: 10 times]")] = None,
    warm_up: Annotated[float, typer.Option(help="Share of the compute at the beginning that is left out.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    published: Annotated[bool, typer.Option("--published", help="Show the paper's own laws and losses.")] = False,
    out: ResultOption = None,
) -> None:
    """Fit L(C) = A/C^α + L∞ to loss curves, extrapolate, and count the compute that a control would need."""
    from miniplm.analysis.published import published_table
    from miniplm.pipeline.curves import compare, extrapolate, read_points
    from miniplm.report.tables import published_lines, scaling_lines

    if published:
        rows = [row.as_dict() for row in published_table()]
        _say(published_lines(rows), out, "published", {"table": rows}, rows)
        return
    if not curves:
        raise RecipeError("no curve is given.", remedy="Name trained models, or files of points.")
    fitted = [
        extrapolate(path.name, read_points(path), along=along, value=value, at=at or (), warm_up=warm_up, seed=seed)
        for path in curves
    ]
    found: dict[str, Any] = {"along": along, "value": value, "curves": fitted, "reductions": []}
    if control is not None:
        theirs = read_points(control)
        found["control"] = control.name
        found["reductions"] = [
            {"name": path.name, **compare(read_points(path), theirs, along=along, value=value, seed=seed)}
            for path in curves
        ]
    _say(scaling_lines(found), out, "scaling", found, [*fitted, *found["reductions"]])


def _scores(path: Path) -> Any:
    """Scores, or those in an evaluation."""
    from miniplm import artifact
    from miniplm.scoring.base import open_scores

    kind = artifact.read(path).identity.kind
    return open_scores(path, kind="evaluation" if kind == "evaluation" else "scores")


def _unit(normalize: str) -> Any:
    if normalize not in (units := ("token", "byte", "sum")):
        raise RecipeError(f"--normalize {normalize!r} is none of {', '.join(units)}.")
    return normalize


def _say(
    lines: Sequence[str],
    out: Path | None,
    name: str,
    found: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    svg: str = "",
) -> None:
    """Print lines, and leave what they say in a folder."""
    for line in lines:
        typer.echo(printable(line, 400))
    if out is not None:
        from miniplm.report.write import write_analysis

        typer.echo(write_analysis(out, name, found, table, svg))
