"""Options that several verbs have, and what is made of their text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miniplm.errors import RecipeError

if TYPE_CHECKING:
    from miniplm.pipeline.chain import Chain
    from miniplm.recipe import Compute, ServerModel

# settings whose options differ, and settings of a training that have options
_OPTIONS = {"score_tokens": "batch-tokens", "train_micro_batch": "micro-batch", "generate_batch": "batch"}
RecipeArgument = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
RunOption = Annotated[
    Path | None, typer.Option("--out", help="The run directory. [default: runs/<name of the recipe>]")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key: select.difference.ratio=0.4")]
OutOption = Annotated[Path, typer.Option(help="Folder to make; must not be there yet.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
CountedOption = Annotated[str, typer.Option(help="Which targets count: all, skip_after_separator")]
DtypeOption = Annotated[str, typer.Option(help="Weights in float32, bfloat16 or float16.")]
BatchOption = Annotated[
    int | None, typer.Option("--batch-tokens", help="Tokens per forward pass. [default: what suits the device]")
]
DocumentsOption = Annotated[str, typer.Option(help="attend over the whole instance, or isolate each document")]
RowsOption = Annotated[Path | None, typer.Option(help="A selection of its instances.")]
ServerTokenizerOption = Annotated[str | None, typer.Option(help="The served model's tokenizer: Hub id or folder.")]
EngineOption = Annotated[str, typer.Option(help="local, or ray: on all the machines of a Ray cluster.")]
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", help="packed, or own: the text under the model's own tokenizer.")
]


def chain_of(recipe: Path, out: Path | None, overrides: list[str] | None) -> Chain:
    """The stages of a recipe, in its run directory."""
    from miniplm.recipe import load

    settings = load(recipe, overrides or ())
    from miniplm.pipeline.chain import chain

    return chain(settings, out or Path("runs") / settings.name)


def served_model(**settings: Any) -> ServerModel:
    """A model behind a server, from options."""
    from pydantic import ValidationError

    from miniplm.recipe import ServerModel

    try:
        return ServerModel(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--{first['loc'][0]} cannot be used: {first['msg']}") from error


def compute_settings(**settings: Any) -> Compute:
    """How, from options. Raises RecipeError that names the option."""
    from pydantic import ValidationError

    from miniplm.recipe import Compute

    try:
        return Compute(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        setting = str(first["loc"][0])
        option = _OPTIONS.get(setting, setting)
        raise RecipeError(f"--{option} {first['input']!r} cannot be used: {first['msg']}") from error


def objective_settings(text: str) -> str | dict[str, Any]:
    """A name, or where it begins with a brace a mapping in YAML, as in a recipe."""
    import yaml

    from miniplm.recipe.dialect import Loader

    if not text.startswith("{"):
        return text
    try:
        return dict(yaml.load(text, Loader=Loader))  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--objective {text!r} is not YAML: {error}") from error


def is_number(text: str) -> bool:
    """Whether the text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def pairs(text: str, option: str) -> dict[str, str]:
    """`a=1,b=2` as a dict. Raises RecipeError if it is of another form."""
    found = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    if len(found) != len(text.split(",")):
        raise RecipeError(f"{option} {text!r} is not of the form name=value,name=value.")
    return {name.strip(): value.strip() for name, value in found.items()}
