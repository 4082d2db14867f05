"""The command line: verbs only. Each parses, calls one function and prints; nothing here knows how anything is done.

Results go to standard output, progress and errors to standard error. Exit status: 0; 1 for an error of the user's (our
own exceptions); 2 for a wrong call; 130 when interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miniplm.errors import MiniplmError, MissingExtraError, RecipeError
from miniplm.progress import printable

if TYPE_CHECKING:
    from miniplm.pipeline.chain import Chain
    from miniplm.recipe import Compute, ServerModel

# Threads that wait for each other in sleep instead of in a loop: on two cores that other processes use too, training
# is 5 to 9 times as fast (measured, NOTES.md). It has to be said before torch is imported.
_OPENMP_WAIT = "passive"

_LEADER_FIRST_SECONDS = 10.0  # that others of several processes wait before they print an error of their own

# settings whose options differ, and settings of a training that have options
_OPTIONS = {"score_tokens": "batch-tokens", "train_micro_batch": "micro-batch", "generate_batch": "batch"}
_TRAIN_OPTIONS = {"model", "data", "tokens", "epochs", "out", "held_out", "counted", "objective", "teacher", "match"}
_NO_SETTINGS = {"about", "compute", "tokenizer"}  # arguments of `train` that are none of a training

app = typer.Typer(
    help="MiniPLM: refine a pre-training corpus with a large model's knowledge, once; train any student on the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a verb, print what a user can mend as `error: ...`."""
    os.environ.setdefault("OMP_WAIT_POLICY", _OPENMP_WAIT)
    try:
        app(list(arguments) if arguments is not None else None)
    except MiniplmError as error:
        _complain(error)
    except OSError as error:  # an output folder that may not be written, a file that vanished
        _complain(error)
    except ModuleNotFoundError as error:
        extra = {
            "torch": "train",
            "transformers": "train",
            "accelerate": "train",
            "tensorboard": "train",
            "jinja2": "report",
            "matplotlib": "report",
            "ray": "ray",
            "httpx": "server",
            "torchao": "quantize",
            "vllm": "vllm",
        }
        if error.name not in extra:
            raise
        _complain(MissingExtraError(extra[error.name], error.name))
    except SystemExit as ended:
        if ended.code == 130:  # typer's answer to Control-C
            print("interrupted; the same command goes on where it stopped.", file=sys.stderr)  # noqa: T201
        raise


def _complain(error: Exception) -> None:
    if os.environ.get("RANK", "0") != "0":  # what stops all processes is said by the first, and the others are ended
        time.sleep(_LEADER_FIRST_SECONDS)
    lines = (printable(line, 400) for line in f"error: {error}".splitlines())
    print(*lines, sep="\n", file=sys.stderr)  # noqa: T201
    sys.exit(1)


@app.command()
def plan(recipe: RecipeArgument, out: RunOption = None, set_: SetOption = None) -> None:
    """Show each stage of a recipe: done, begun, ready, or waiting on another."""
    from miniplm.pipeline.run import plan as plan_chain

    stages = _chain(recipe, out, set_)
    statuses = plan_chain(stages)
    width = max(len(status.stage.name) for status in statuses)
    for status in statuses:
        typer.echo(f"{status.stage.name:<{width}}  {status!s:<44}  {status.stage.path}")
    typer.echo(f"{sum(s.state == 'done' for s in statuses)} of {len(statuses)} stages are done.")


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

    stages = _chain(recipe, out, [*(set_ or []), *([f"compute.engine={engine}"] if engine else [])])
    run_chain(stages, only, typer.echo)
    if only is None and processes.leads():
        page = write_report(stages)
        typer.echo(summary(stages))
        typer.echo(f"report: {page}")


@app.command()
def report(recipe: RecipeArgument, out: RunOption = None, set_: SetOption = None) -> None:
    """Write the report of a run whose stages are all done."""
    from miniplm.report.write import summary, write_report

    stages = _chain(recipe, out, set_)
    page = write_report(stages)
    typer.echo(summary(stages))
    typer.echo(f"report: {page}")


@app.command()
def prepare(
    files: Annotated[list[str], typer.Argument(help="Paths or globs; `builtin` for the Python text installed here.")],
    tokenizer: Annotated[str, typer.Option(help="Hub id or folder; `train:4096` trains one of that size.")],
    out: OutOption,
    sequence_length: Annotated[int, typer.Option(help="Predicted positions of an instance.")] = 1024,
    split: Annotated[
        str, typer.Option(help="Shares of the documents; the rest is the pool.")
    ] = "reference=0.05,held_out=0.001",
    cut: Annotated[str, typer.Option(help="exact, or sentence")] = "exact",
    text: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    id_: Annotated[str | None, typer.Option("--id", help="Column of the id. [default: id, else file and row]")] = None,
    source: Annotated[str | None, typer.Option(help="Column of the source. [default: the usual names]")] = None,
    on_error: Annotated[str, typer.Option(help="raise, or skip to count malformed records and go on")] = "raise",
    engine: EngineOption = "local",
) -> None:
    """Split documents into parts, tokenise and pack them."""
    from miniplm.packing.prepare import counts_table
    from miniplm.pipeline.library import prepare as prepare_corpus

    shares = _pairs(split, "--split")
    if bad := [share for share in shares.values() if not _is_number(share)]:
        raise RecipeError(f"--split {split!r}: {bad[0]!r} is no number.")
    size = tokenizer.removeprefix("train:")
    corpus = prepare_corpus(
        "builtin" if files == ["builtin"] else files,
        tokenizer={"train": {"vocab_size": size}} if tokenizer.startswith("train:") else tokenizer,
        out=out,
        sequence_length=sequence_length,
        split=shares,
        columns={k: v for k, v in {"text": text, "id": id_, "source": source}.items() if v},
        on_error=on_error,
        cut=cut,
        compute=_compute(engine=engine),
    )
    typer.echo("\n".join(counts_table(corpus.manifest.counts)))


@app.command()
def score(
    packed: Annotated[Path, typer.Argument(help="A part of a prepared corpus: corpus/pool")],
    model: Annotated[str, typer.Option(help="Hub id or folder; with --server, as the server calls it.")],
    out: OutOption,
    dtype: DtypeOption = "bfloat16",
    counted: CountedOption = "all",
    documents: DocumentsOption = "attend",
    tokenizer: TokenizerOption = "packed",
    quantize: Annotated[str, typer.Option(help="none, int8 or fp8: the linear layers, by torchao")] = "none",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server: http://localhost:8000/v1")
    ] = None,
    server_tokenizer: Annotated[
        str | None, typer.Option(help="The served model's tokenizer: Hub id or folder.")
    ] = None,
    send: Annotated[str, typer.Option(help="To a server: ids, or text where it takes none")] = "ids",
    vllm: Annotated[bool, typer.Option("--vllm", help="With vLLM's offline engine.")] = False,
    device: DeviceOption = "auto",
    batch: BatchOption = None,
    engine: EngineOption = "local",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
) -> None:
    """Score every instance of a packed part under a model."""
    from miniplm.artifact import provenance
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline.library import score as score_part
    from miniplm.recipe import GivenModel, ScoredModel, VllmModel
    from miniplm.scoring.base import throughput

    given: ScoredModel
    if server is not None:
        given = _server(server=server, model=model, revision=revision or "", tokenizer=server_tokenizer, send=send)
    elif vllm:
        given = VllmModel(vllm=model, revision=revision, trust_remote_code=trust_remote_code)
    else:
        given = GivenModel(model=model, revision=revision, trust_remote_code=trust_remote_code)
    how: Any = {
        "dtype": dtype, "counted": counted, "documents": documents, "tokenizer": tokenizer, "quantize": quantize,
    }  # fmt: skip
    compute = _compute(device=device, score_tokens=batch, engine=engine)
    scores = score_part(open_packed(packed), given, out=out, compute=compute, **how)
    loss = -scores.logp.sum() / scores.n_tokens.sum()
    typer.echo(f"{len(scores):,} instances, {loss:.4f} nats per token{throughput(provenance(out))}: {out}")


@app.command()
def drift(
    packed: Annotated[Path, typer.Argument(help="A part of a prepared corpus: corpus/pool")],
    teacher: Annotated[str, typer.Option(help="Hub id or folder.")],
    reference: Annotated[str, typer.Option(help="Hub id or folder.")],
    sample: Annotated[int, typer.Option(help="Instances that are scored again and again.")] = 512,
    ratio: Annotated[float, typer.Option(help="Share of the sample to keep.")] = 0.5,
    normalize: Annotated[str, typer.Option(help="token, byte or sum")] = "token",
    dtype: DtypeOption = "bfloat16",
    counted: CountedOption = "all",
    documents: DocumentsOption = "attend",
    tokenizer: TokenizerOption = "packed",
    quantize: Annotated[list[str] | None, typer.Option(help="Also the teacher in int8 or fp8.")] = None,
    server: Annotated[str | None, typer.Option(help="Also the teacher behind this URL.")] = None,
    server_model: Annotated[str | None, typer.Option(help="As the server calls it. [default: --teacher]")] = None,
    server_tokenizer: Annotated[
        str | None, typer.Option(help="The served model's tokenizer: Hub id or folder.")
    ] = None,
    send: Annotated[str, typer.Option(help="To a server: ids, or text where it takes none")] = "ids",
    vllm: Annotated[bool, typer.Option("--vllm", help="Also the teacher in vLLM.")] = False,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for drift.json, drift.csv and drift.svg.")] = None,
) -> None:
    """Score a sample in other ways (batches, dtypes, back ends) and show how far log p and the picks move."""
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline.library import drift as measure
    from miniplm.recipe import VllmModel
    from miniplm.report.write import write_drift
    from miniplm.scoring.drift import HEADER, Way

    also = [Way(how, settings={"quantize": how}) for how in quantize or ()]
    if server is not None:
        served = _server(server=server, model=server_model or teacher, tokenizer=server_tokenizer, send=send)
        also.append(Way("server", teacher=served))
    if vllm:
        also.append(Way("vllm", teacher=VllmModel(vllm=teacher)))
    typer.echo(HEADER)
    compute = _compute(device=device)
    found = measure(
        open_packed(packed), teacher, reference, also=also, sample=sample, ratio=ratio, normalize=normalize,
        dtype=dtype, counted=counted, documents=documents, tokenizer=tokenizer, compute=compute, say=typer.echo,
    )  # fmt: skip
    if out is not None:
        typer.echo(write_drift(out, found))


@app.command()
def select(
    out: OutOption,
    teacher: Annotated[Path | None, typer.Option(help="Scores of the teacher.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Scores of the reference.")] = None,
    pool: Annotated[Path | None, typer.Option(help="The pool, for random sampling without scores.")] = None,
    sampler: Annotated[
        str, typer.Option(help="difference, random, teacher, reference, or package.module:Class")
    ] = "difference",
    ratio: Annotated[float, typer.Option(help="Share of the pool to keep.")] = 0.5,
    normalize: Annotated[str | None, typer.Option(help="token, byte or sum. [default: token]")] = None,
    within: Annotated[str | None, typer.Option(help="source: keep the top share inside each source")] = None,
    seed: Annotated[int | None, typer.Option(help="For random sampling.")] = None,
) -> None:
    """Choose instances by their scores."""
    from miniplm.pipeline.library import select as select_rows

    settings = {"sampler": sampler, "ratio": ratio, "normalize": normalize, "within": within, "seed": seed}
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = select_rows(given, teacher=teacher, reference=reference, pool=pool, out=out)
    threshold = "" if chosen.threshold is None else f", threshold {chosen.threshold:.4f} nats"
    typer.echo(f"kept {len(chosen):,} of {chosen.of:,} instances{threshold}: {out}")


@app.command()
def generate(
    data: Annotated[Path, typer.Argument(help="A part of a prepared corpus: corpus/pool")],
    teacher: Annotated[str, typer.Option(help="Hub id or folder.")],
    out: OutOption,
    rows: RowsOption = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens that stay. [default: three quarters]")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DtypeOption = "bfloat16",
    batch: Annotated[int, typer.Option("--batch", help="Instances at a time.")] = 16,
    device: DeviceOption = "auto",
    engine: EngineOption = "local",
) -> None:
    """Have the teacher rewrite the end of each instance (SeqKD)."""
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline.learning import generate as generate_part
    from miniplm.sampling.base import open_selection

    how: Any = {
        "prompt_tokens": prompt_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    made = generate_part(
        open_packed(data), teacher, out=out, rows=None if rows is None else open_selection(rows),
        compute=_compute(device=device, engine=engine, generate_batch=batch), **how,
    )  # fmt: skip
    typer.echo(f"{len(made):,} instances, {made.manifest.counts['generated_tokens']:,} tokens written: {out}")


@app.command()
def retokenize(
    data: Annotated[Path, typer.Argument(help="A part of a prepared corpus: corpus/pool")],
    tokenizer: Annotated[str, typer.Option(help="The other tokenizer: Hub id or folder.")],
    out: OutOption,
    rows: RowsOption = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Predicted positions of a new instance. [default: as now]")
    ] = None,
    engine: EngineOption = "local",
) -> None:
    """Pack the text of instances again under another tokenizer, for students of another family."""
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline.learning import retokenize as retokenize_part
    from miniplm.sampling.base import open_selection

    made = retokenize_part(
        open_packed(data), tokenizer, out=out, rows=None if rows is None else open_selection(rows),
        sequence_length=sequence_length, compute=_compute(engine=engine),
    )  # fmt: skip
    typer.echo(f"{len(made):,} instances, {made.manifest.counts['tokens_out']:,} tokens: {out}")


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="A part of a prepared corpus.")],
    out: OutOption,
    model: Annotated[str | None, typer.Argument(help="A preset: qwen-200m, llama-212m, mamba-130m, ...")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Instead: a trained model to go on from.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on: 50e9")] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead: passes over the data.")] = None,
    rows: RowsOption = None,
    held_out: Annotated[Path | None, typer.Option(help="A part for the loss curve.")] = None,
    objective: Annotated[
        str,
        typer.Option(help="next_token, vanilla_kd, minillm, package.module:Class, or '{name: vanilla_kd, share: 0.3}'"),
    ] = "next_token",
    teacher: Annotated[str | None, typer.Option(help="That the objective asks: Hub id or folder.")] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="As many steps as plain pre-training pays for: flops, by parameters, as the paper counts; operations, "
            "by what is computed"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="learning_rate=1e-3, batch_tokens=8192, seed=1, ...")
    ] = None,
    counted: CountedOption = "all",
    device: DeviceOption = "auto",
    micro_batch: Annotated[int, typer.Option(help="Instances per forward and backward pass.")] = 16,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, trackio, none")] = "tensorboard",
) -> None:
    """Train a model on packed instances: from scratch, or --from a trained one. Under torchrun: in all processes."""
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline.given import selected_rows
    from miniplm.pipeline.learning import train as train_model
    from miniplm.training import processes

    settings: dict[str, Any] = dict(pair for text in set_ or [] for pair in _pairs(text, "--set").items())
    if strange := sorted(settings.keys() & _NO_SETTINGS):
        raise RecipeError(f"--set {strange[0]}=... is no setting of a training.")
    if reserved := sorted(settings.keys() & _TRAIN_OPTIONS):
        raise RecipeError(f"--set {reserved[0]}=... has an option of its own: --{reserved[0].replace('_', '-')}")
    if (model is None) == (start is None):
        raise RecipeError("one of a preset and --from is needed.", remedy="`miniplm train qwen-1m ...`, for example.")
    packed = open_packed(data)
    chosen, about = (packed, None) if rows is None else selected_rows(packed, rows)
    checkpoint = train_model(
        start if model is None else model,  # type: ignore[arg-type]  # one of them is there
        chosen,
        tokens=tokens,
        epochs=epochs,
        out=out,
        objective=_objective(objective),
        teacher=teacher,
        match=match,
        held_out=None if held_out is None else open_packed(held_out),
        counted=counted,  # type: ignore[arg-type]  # a str here; the function checks it
        about=about,
        compute=_compute(device=device, train_micro_batch=micro_batch, report_to=report_to),
        **settings,
    )
    if not processes.leads():
        return
    counts = checkpoint.manifest.counts
    typer.echo(
        f"{counts['parameters']:,} parameters, {counts['train_tokens']:,} tokens, {counts['train_flops']:.3g} "
        f"operations, final training loss {counts['final_train_loss']:.4f}: {out}"
    )


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    held_out: Annotated[Path, typer.Option(help="The held-out part of a prepared corpus.")],
    out: OutOption,
    dtype: DtypeOption = "bfloat16",
    counted: CountedOption = "all",
    tokenizer: TokenizerOption = "packed",
    device: DeviceOption = "auto",
    batch: BatchOption = None,
    engine: EngineOption = "local",
) -> None:
    """Measure a model on held-out instances."""
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline.library import evaluate as evaluate_model

    how: Any = {"dtype": dtype, "counted": counted, "tokenizer": tokenizer}
    compute = _compute(device=device, score_tokens=batch, engine=engine)
    typer.echo(evaluate_model(model, held_out=open_packed(held_out), out=out, compute=compute, **how))


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


def _chain(recipe: Path, out: Path | None, overrides: list[str] | None) -> Chain:
    from miniplm.recipe import load

    settings = load(recipe, overrides or ())
    from miniplm.pipeline.chain import chain

    return chain(settings, out or Path("runs") / settings.name)


def _server(**settings: Any) -> ServerModel:
    from pydantic import ValidationError

    from miniplm.recipe import ServerModel

    try:
        return ServerModel(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--{first['loc'][0]} cannot be used: {first['msg']}") from error


def _compute(**settings: Any) -> Compute:
    from pydantic import ValidationError

    from miniplm.recipe import Compute

    try:
        return Compute(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        setting = str(first["loc"][0])
        option = _OPTIONS.get(setting, setting)
        raise RecipeError(f"--{option} {first['input']!r} cannot be used: {first['msg']}") from error


def _objective(text: str) -> str | dict[str, Any]:
    """A name, or where it begins with a brace a mapping in YAML, as in a recipe."""
    import yaml

    from miniplm.recipe.dialect import Loader

    if not text.startswith("{"):
        return text
    try:
        return dict(yaml.load(text, Loader=Loader))  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--objective {text!r} is not YAML: {error}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pairs(text: str, option: str) -> dict[str, str]:
    pairs = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    if len(pairs) != len(text.split(",")):
        raise RecipeError(f"{option} {text!r} is not of the form name=value,name=value.")
    return {name.strip(): value.strip() for name, value in pairs.items()}
