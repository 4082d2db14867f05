"""Verbs of the stages, each by itself: from prepare to eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from miniplm.cli.app import app
from miniplm.cli.options import (
    BatchOption,
    CountedOption,
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    EngineOption,
    OutOption,
    RowsOption,
    TokenizerOption,
    compute_settings,
    is_number,
    objective_settings,
    pairs,
    served_model,
)
from miniplm.errors import RecipeError

# settings of a training that have options
_TRAIN_OPTIONS = {"model", "data", "tokens", "epochs", "out", "held_out", "counted", "objective", "teacher", "match"}
_NO_SETTINGS = {"about", "compute", "tokenizer"}  # arguments of `train` that are none of a training
# options of `eval`, by that which they say more of
_BEAR_ON = {
    "held_out": ("counted", "tokenizer"), "documents": ("sample", "windows", "sequence_length"),
    "tasks": ("tasks_data", "shots", "limit"),
}  # fmt: skip


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

    shares = pairs(split, "--split")
    if bad := [share for share in shares.values() if not is_number(share)]:
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
        compute=compute_settings(engine=engine),
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
        given = served_model(server=server, model=model, revision=revision or "", tokenizer=server_tokenizer, send=send)
    elif vllm:
        given = VllmModel(vllm=model, revision=revision, trust_remote_code=trust_remote_code)
    else:
        given = GivenModel(model=model, revision=revision, trust_remote_code=trust_remote_code)
    how: Any = {
        "dtype": dtype, "counted": counted, "documents": documents, "tokenizer": tokenizer, "quantize": quantize,
    }  # fmt: skip
    compute = compute_settings(device=device, score_tokens=batch, engine=engine)
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
        served = served_model(server=server, model=server_model or teacher, tokenizer=server_tokenizer, send=send)
        also.append(Way("server", teacher=served))
    if vllm:
        also.append(Way("vllm", teacher=VllmModel(vllm=teacher)))
    typer.echo(HEADER)
    compute = compute_settings(device=device)
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
        str, typer.Option(help="difference, relative, random, teacher, reference, or package.module:Class")
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
        compute=compute_settings(device=device, engine=engine, generate_batch=batch), **how,
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
        sequence_length=sequence_length, compute=compute_settings(engine=engine),
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

    settings: dict[str, Any] = dict(pair for text in set_ or [] for pair in pairs(text, "--set").items())
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
        objective=objective_settings(objective),
        teacher=teacher,
        match=match,
        held_out=None if held_out is None else open_packed(held_out),
        counted=counted,  # type: ignore[arg-type]  # a str here; the function checks it
        about=about,
        compute=compute_settings(device=device, train_micro_batch=micro_batch, report_to=report_to),
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
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Hub ids or folders: a column of the table each.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; the table is of all that is measured there.")],
    held_out: Annotated[Path | None, typer.Option(help="The held-out part of a prepared corpus.")] = None,
    documents: Annotated[
        list[str] | None, typer.Option(help='Documents, path or "glob": each model reads them by its own tokenizer.')
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="That many documents, drawn by hash. [default: all]")
    ] = None,
    windows: Annotated[str, typer.Option(help="Of a document: first, as in the paper, or all of it.")] = "first",
    sequence_length: Annotated[int, typer.Option(help="Predicted positions of a document's window.")] = 1024,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-evaluation-harness, by comma; `paper`: the paper's nine.")
    ] = None,
    tasks_data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' files, a folder a task; nothing is downloaded.")
    ] = None,
    shots: Annotated[int, typer.Option(help="Examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Questions of each task. [default: all]")] = None,
    dtype: DtypeOption = "bfloat16",
    counted: CountedOption = "all",
    tokenizer: TokenizerOption = "packed",
    device: DeviceOption = "auto",
    batch: BatchOption = None,
    engine: EngineOption = "local",
) -> None:
    """Measure models: loss on held-out instances or on documents, accuracy on benchmarks; one table."""
    from miniplm.packing.instances import open_packed
    from miniplm.pipeline import measured_models, measuring

    if held_out is None and documents is None and tasks is None:
        raise RecipeError("nothing to measure on.", remedy="Give --held-out, --documents or --tasks, or several.")
    _refuse_idle(context)
    asked_tasks = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if asked_tasks == []:
        raise RecipeError(f"--tasks {tasks!r} names no task.", remedy="--tasks paper, for example.")
    compute = compute_settings(device=device, score_tokens=batch, engine=engine)
    measured_models.check_models(models)
    named = measured_models.folder_names(models)
    part = None if held_out is None else open_packed(held_out)
    for name, model in named.items():
        folder = out / name
        how: Any = {"dtype": dtype, "compute": compute}
        if part is not None:
            rule: Any = {"counted": counted, "tokenizer": tokenizer}
            measuring.evaluate(model, held_out=part, out=folder / "held_out", **rule, **how)
        if documents is not None:
            cut: Any = {"sequence_length": sequence_length, "windows": windows}
            drawn = {"files": documents, "documents": sample}
            measuring.evaluate_documents(model, drawn, out=folder / "documents", **cut, **how)
        if asked_tasks is not None:
            asked: Any = {"tasks_data": tasks_data, "shots": shots, "limit": limit}
            measuring.evaluate_tasks(model, asked_tasks, out=folder / "tasks", **asked, **how)
    found = measured_models.measured(out, list(named))
    measured_models.write_table(out, found)
    typer.echo("\n".join(measured_models.table(found)))
    typer.echo(f"table: {out / 'evaluations.csv'}")


def _refuse_idle(context: typer.Context) -> None:
    """Refuse an option of `eval` that says more of something that is not measured."""
    options = {option.name: option for option in context.command.params}
    for measured_on, more in _BEAR_ON.items():
        idle = [name for name in more if context.params[name] != options[name].default]
        if idle and not context.params[measured_on]:
            option, needed = (f"--{name.replace('_', '-')}" for name in (idle[0], measured_on))
            raise RecipeError(
                f"{option} bears only on {needed}, which is not given.", remedy=f"Give {needed}, or leave {option} out."
            )
