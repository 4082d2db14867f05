"""Verbs of artifacts: show, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miniplm.cli.app import app


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="An artifact.")],
    packed: Annotated[Path | None, typer.Option(help="For scores: where the instances lie.")] = None,
) -> None:
    """Show an artifact: its manifest; of scores a histogram and the best, median and worst instances as text."""
    from miniplm.report.show import show as lines

    for line in lines(path, packed):
        typer.echo(line)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="An artifact, or a run directory.")]) -> None:
    """Check every byte of an artifact, or of all below a folder, against its manifest."""
    from miniplm import artifact
    from miniplm.errors import ArtifactDamagedError

    if not (folders := artifact.find(path)):
        artifact.read(path)  # says what is not there
    damaged = 0
    for folder in folders:
        problems = list(artifact.verify(folder))
        damaged += bool(problems)
        typer.echo(f"{'damaged' if problems else 'ok':<8} {folder}")
        for problem in problems:
            typer.echo(f"  {problem}")
    if damaged:
        raise ArtifactDamagedError(f"{damaged} of {len(folders)} artifacts are not as they were written.")
    typer.echo(f"{len(folders)} artifacts, every byte as written.")
