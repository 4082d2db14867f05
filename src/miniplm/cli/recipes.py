"""Verbs of a recipe: plan, run, report; and of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from miniplm.cli.app import app
from miniplm.cli.options import RecipeArgument, RunOption, SetOption, chain_of
from miniplm.errors import RecipeError


@app.command()
def plan(recipe: RecipeArgument, out: RunOption = None, set_: SetOption = None) -> None:
    """Show each stage of a recipe: done, begun, ready, or waiting on another; and its operations, time and disk."""
    from miniplm.pipeline.cost_table import brief
    from miniplm.pipeline.costs import costs
    from miniplm.pipeline.run import plan as plan_chain

    stages = chain_of(recipe, out, set_)
    statuses, found = plan_chain(stages), costs(stages)
    cost_of = {cost.stage: cost for cost in found.stages}
    width = max(len(status.stage.name) for status in statuses)
    for status in statuses:
        cells = brief(cost_of[status.stage.name])
        typer.echo(f"{status.stage.name:<{width}}  {status!s:<44}  {cells}  {status.stage.path}")
    typer.echo(f"{sum(s.state == 'done' for s in statuses)} of {len(statuses)} stages are done.")
    if found.assumption:
        typer.echo(found.assumption)


@app.command()
def cost(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe or a study (YAML).", show_default=False)] = None,
    out: RunOption = None,
    set_: SetOption = None,
    published: Annotated[bool, typer.Option("--published", help="The paper's sizes too; needs no recipe.")] = False,
    compute_reduction: Annotated[
        float, typer.Option(help="Times the operations that a control needs for a student's loss; 2.2 is the paper's.")
    ] = 2.2,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Show what a recipe or a study costs, before and after: operations, time, disk, and when it is repaid."""
    from miniplm.artifact import pretty_json
    from miniplm.pipeline import cost_table
    from miniplm.pipeline.chain import chain
    from miniplm.pipeline.costs import costs, together
    from miniplm.recipe.reading import variants_of

    if recipe is None and not published:
        raise RecipeError(
            "there is no recipe to tell the costs of.",
            facts={"expected": "a recipe or a study, or --published"},
            remedy="`miniplm cost recipe.yaml`; of the paper's sizes, `miniplm cost --published`.",
        )
    shown: dict[str, Any] = {}
    table, lines = "", []
    if recipe is not None:
        name, asked = variants_of(recipe, set_ or ())
        root = out or Path("runs") / name
        each = [costs(chain(one.recipe, root), compute_reduction=compute_reduction) for one in asked]
        found = together(each, [one.place for one in asked])
        shown, table, lines = found.as_dict(), cost_table.as_csv(found), cost_table.lines(found)
    if published:
        rows = cost_table.published(compute_reduction)
        shown["published"] = rows
        table = table or cost_table.published_csv(rows)
        lines += [*([""] if lines else []), *cost_table.published_lines(rows)]
    if json_ is not None:
        json_.write_bytes(pretty_json(shown))
    if csv is not None:
        csv.write_text(table, encoding="utf-8")
    typer.echo("\n".join(lines))


@app.command()
def run(
    recipe: RecipeArgument,
    out: RunOption = None,
    set_: SetOption = None,
    only: Annotated[str | None, typer.Option(help="One stage (score/teacher) or group of stages (score).")] = None,
    engine: Annotated[str | None, typer.Option(help="local or ray, instead of the recipe's compute.engine")] = None,
) -> None:
    """Make what is missing of a recipe, then the report. Interrupt and repeat at will."""
    from miniplm.pipeline.run import run as run_chain
    from miniplm.report.write import summary, write_report
    from miniplm.training import processes

    stages = chain_of(recipe, out, [*(set_ or []), *([f"compute.engine={engine}"] if engine else [])])
    run_chain(stages, only, typer.echo)
    if only is None and processes.leads():
        page = write_report(stages)
        typer.echo(summary(stages))
        typer.echo(f"report: {page}")


@app.command()
def report(recipe: RecipeArgument, out: RunOption = None, set_: SetOption = None) -> None:
    """Write the report of a run whose stages are all done."""
    from miniplm.report.write import summary, write_report

    stages = chain_of(recipe, out, set_)
    page = write_report(stages)
    typer.echo(summary(stages))
    typer.echo(f"report: {page}")


@app.command()
def study(
    recipe: RecipeArgument,
    out: RunOption = None,
    set_: SetOption = None,
    report: Annotated[bool, typer.Option("--report", help="Make nothing: report on the runs that are done.")] = False,
) -> None:
    """Run a recipe with a `grid:` and `seeds:`, make what is shared once, and compare over seeds."""
    from miniplm.pipeline.study import branches, different_stages, run_study
    from miniplm.recipe import load_study
    from miniplm.report.write import write_study
    from miniplm.training import processes

    asked = load_study(recipe, set_ or ())
    root = out or Path("runs") / asked.name
    found = branches(asked, root)
    if not report:
        typer.echo(f"{len(found)} runs, {different_stages(found):,} different stages, in {root}")
        run_study(asked, found, root, typer.echo)
    if processes.leads():
        page, lines = write_study(asked, found, root)
        typer.echo("\n".join(lines))
        typer.echo(f"report: {page}")
