"""Verbs of analyses: what scores, selections and loss curves say. With --out they leave JSON, CSV and figures too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from miniplm.cli.app import app
from miniplm.errors import RecipeError
from miniplm.progress import printable

ResultOption = Annotated[
    Path | None, typer.Option("--out", help="Folder for the same as JSON and CSV, some drawn as SVG.")
]
NormalizeOption = Annotated[str, typer.Option(help="token, byte or sum")]
TeacherScores = Annotated[Path, typer.Option(help="Scores, or an evaluation, of the teacher.")]
ReferenceScores = Annotated[Path, typer.Option(help="Scores, or an evaluation, of the reference.")]
ValueOption = Annotated[str, typer.Option(help="Field of the loss.")]
WarmUpOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of the compute at the beginning that is left out. [default: 0.2]"),
]


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
    from miniplm.analysis.effects import effects as effects_of
    from miniplm.analysis.examples import examples, neighbours
    from miniplm.packing.instances import open_packed
    from miniplm.report.tables import effects_lines, examples_lines
    from miniplm.sampling.base import open_selection

    if instance is not None and packed is None:
        raise RecipeError("--instance shows text, and without --packed there is none.", remedy="Add --packed.")
    kept = None if rows is None else open_selection(rows)
    found = effects_of(_scores(teacher), _scores(reference), kept, normalize=_unit(normalize))
    told, lines = found.as_dict(), effects_lines(found.as_dict())
    if packed is not None:
        instances = open_packed(packed)
        told |= examples(instances, found) | {"neighbours": neighbours(instances, found, instance)}
        lines += examples_lines(told)
    table = [{"part": "effect", "name": row.pop("effect"), **row} for row in map(dict, told["effects"])]
    table += [{"part": "source", "name": row.pop("source"), **row} for row in map(dict, told["by_source"])]
    svg = ""
    if out is not None:
        from miniplm.report.analysis_figures import effect_shares

        svg = effect_shares(told)
    _say(lines, out, "effects", told, table, svg)


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
    from miniplm.pipeline.measured_models import folder_names
    from miniplm.report.tables import diversity_lines
    from miniplm.sampling.base import open_selection

    how: dict[str, Any] = {}
    if encoder is not None:
        from miniplm.models.encoder import load_encoder

        how["encoder"] = load_encoder(encoder, device=device)
    pool = open_packed(packed)
    chosen = {name: open_selection(path) for name, path in folder_names(_once(rows or ())).items()}
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
    along: Annotated[
        str | None, typer.Option(help="Field of the compute. [default: flops; with --parameters: tokens]")
    ] = None,
    value: ValueOption = "held_out_loss",
    ceiling: Annotated[
        float | None, typer.Option(help="Of a value that rises, the highest it could be: 1, or 100 in per cent.")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Field of the model's size: fit L(N, D) to the ends of several runs.")
    ] = None,
    at: Annotated[list[float] | None, typer.Option(help="Extrapolate to this compute. [default: 10 times]")] = None,
    warm_up: WarmUpOption = None,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    published: Annotated[bool, typer.Option("--published", help="Show the paper's own laws and losses.")] = False,
    out: ResultOption = None,
) -> None:
    """Fit L(C) = A/C^α + L∞ to loss curves, extrapolate, and count the compute that a control would need."""
    from miniplm.analysis.published import published_table
    from miniplm.pipeline import curves as laws
    from miniplm.pipeline.measured_models import folder_names
    from miniplm.report.tables import published_lines, scaling_figure, scaling_lines, scaling_rows

    if published:
        rows = [row.as_dict() for row in published_table()]
        _say(published_lines(rows), out, "published", {"table": rows}, rows)
        return
    if not curves:
        raise RecipeError("no curve is given.", remedy="Name trained models, or files of points.")
    if parameters is not None and (control, ceiling, warm_up) != (None, None, None):
        raise RecipeError("--parameters is of runs, and takes no --control, --ceiling or --warm-up.")
    named = folder_names(_once([*curves, *([control] if control else [])]))
    points = {name: laws.read_points(Path(path)) for name, path in named.items()}
    steep = laws.STEEP if warm_up is None else warm_up
    how = laws.Reading(along or ("tokens" if parameters else "flops"), value, ceiling, steep, seed)
    if parameters is None:
        beside = next((name for name, path in named.items() if path == str(control)), None)
        found = laws.scaling(points, beside, at=at or (), how=how)
    else:
        found = laws.scaling_of_sizes(points, parameters, at=at or (), how=how)
    svg = scaling_figure(found) if out is not None and parameters is None else ""
    _say(scaling_lines(found), out, "scaling", found, scaling_rows(found), svg)


@app.command("data-reduction")
def data_reduction(
    control: Annotated[Path, typer.Argument(help="The control: a trained model, or a file of points with tokens.")],
    unique: Annotated[float, typer.Option(help="Unique tokens that it had, and the student too.")],
    student: Annotated[Path | None, typer.Option(help="The student's curve, for its final loss.")] = None,
    loss: Annotated[float | None, typer.Option(help="The student's final loss, instead of its curve.")] = None,
    epochs: Annotated[float, typer.Option(help="How often the control would see its data.")] = 1.0,
    value: ValueOption = "held_out_loss",
    warm_up: WarmUpOption = None,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    out: ResultOption = None,
) -> None:
    """Count the unique tokens that a control would need for the student's loss, repeated ones being worth less."""
    from miniplm.pipeline.curves import STEEP, Reading, data_needed, read_points
    from miniplm.report.tables import data_reduction_lines, data_reduction_rows

    if (student is None) == (loss is None):
        raise RecipeError("the student's final loss is either in its curve, --student, or said, --loss.")
    theirs = loss if student is None else read_points(student)
    assert theirs is not None
    how = Reading("tokens", value, None, STEEP if warm_up is None else warm_up, seed)
    found = data_needed(read_points(control), theirs, unique, epochs=epochs, how=how)
    _say(data_reduction_lines(found), out, "data-reduction", found, data_reduction_rows(found))


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


def _once(paths: Sequence[Path]) -> list[str]:
    """Paths in their order, each once."""
    return list(dict.fromkeys(map(str, paths)))


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
