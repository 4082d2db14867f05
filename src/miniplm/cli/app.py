"""The application that the verbs belong to."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="MiniPLM: refine a pre-training corpus with a large model's knowledge, once; train any student on the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
