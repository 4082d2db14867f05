"""The stages as a Python user writes them: keyword arguments in, opened artifacts out. Exported by `miniplm` itself.

Each function makes the artifact at `out` if it is not there, goes on with it if it is unfinished, and opens it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from miniplm.artifact import MANIFEST
from miniplm.artifact import read as read_artifact
from miniplm.corpus import builtin as builtin_corpus
from miniplm.corpus.sources import open_documents
from miniplm.errors import RecipeError
from miniplm.models.load import model_fingerprint, tokenizer_fingerprint
from miniplm.packing import prepare as preparing
from miniplm.packing import sample as sampling
from miniplm.packing.instances import Packed, open_packed
from miniplm.packing.prepare import Corpus
from miniplm.pipeline.engines import engine_of
from miniplm.pipeline.given import AnyGivenModel, given_model, own_fingerprint, refused
from miniplm.recipe import (
    Columns,
    Compute,
    CorpusSettings,
    Counted,
    GivenModel,
    Precision,
    PrepareSettings,
    ProxySettings,
    SamplerSettings,
    ScoredModel,
    ScoreSettings,
    Split,
)
from miniplm.recipe import Documents as DocumentsRule
from miniplm.sampling import base as selecting
from miniplm.sampling.base import Pool, Selection
from miniplm.sampling.named import identity as selection_identity
from miniplm.sampling.named import sampler_from
from miniplm.scoring import score as scoring
from miniplm.scoring.base import Normalize, Scorer, Scores, open_scores

if TYPE_CHECKING:
    import datasets

    from miniplm.scoring.drift import Drift, Way

AnyModel = str | os.PathLike[str] | ScoredModel | Scorer


def prepare(
    source: str | os.PathLike[str] | list[str] | CorpusSettings | datasets.Dataset,
    *,
    tokenizer: str | Mapping[str, Any],
    out: str | os.PathLike[str],
    sequence_length: int = 1024,
    split: Mapping[str, Any] | Split | None = None,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
    cut: str = "exact",
    block_bytes: int = 32_000_000,
    compute: Compute | None = None,
) -> Corpus:
    """Split documents into parts, tokenise and pack them.

    Args:
        source: path, glob, list of them, `"builtin"`, `CorpusSettings` (for the Hub), or a `datasets.Dataset`.
        tokenizer: Hub id or folder, or `{"train": {"vocab_size": 4096}}`.
        out: folder of the corpus; `out/pool` and the other parts open with `datasets.load_from_disk`.
        sequence_length: T, predicted positions; an instance has T+1 tokens.
        split: shares of the documents, e.g. `{"reference": 0.05, "held_out": 0.001}`; the rest is the pool.
        columns: where records keep `text`, `id` and `source`; dots reach into nested records.
        on_error: `raise`, or `skip` to count malformed records and go on.
        cut: `exact`, or `sentence` as the paper's code does.
        block_bytes: text per shard.
        compute: how: the engine.

    Raises:
        RecipeError: an argument cannot be used.
        CorpusError, CorpusTooSmallError, TokenizerError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    out = Path(out)
    try:
        settings = PrepareSettings.model_validate(
            {
                "tokenizer": tokenizer, "sequence_length": sequence_length, "split": split or Split(), "cut": cut,
                "block_bytes": block_bytes,
            }
        )  # fmt: skip
        if source == "builtin":
            drawn = CorpusSettings(source="builtin")
            folder = out.with_name(out.name + "-documents")
            if not folder.exists():  # what was drawn before holds, whatever has been installed since
                builtin_corpus.snapshot(folder, drawn.budget_bytes, drawn.seed)
            source = CorpusSettings(files=str(folder / "documents.parquet"))
        elif isinstance(source, (str, os.PathLike, list)):
            files = source if isinstance(source, list) else os.fspath(source)
            source = CorpusSettings.model_validate(
                {"files": files, "columns": columns or Columns(), "on_error": on_error}
            )
        which = Columns.model_validate(columns or {})
        skipping = CorpusSettings.model_validate({"files": "", "on_error": on_error}).on_error
    except ValidationError as error:
        raise refused(error) from error
    documents = open_documents(source, block_bytes, which, skipping)
    return preparing.prepare(documents, settings, out, engine_of(compute or Compute(), model=False))


def score(
    packed: Packed,
    model: AnyModel,
    *,
    out: str | os.PathLike[str],
    dtype: Precision = "bfloat16",
    counted: Counted = "all",
    documents: DocumentsRule = "attend",
    tokenizer: Literal["packed", "own"] = "packed",
    quantize: Literal["none", "int8", "fp8"] = "none",
    compute: Compute | None = None,
) -> Scores:
    """Score every instance of a packed part: log p in nats, summed over counted targets.

    Args:
        packed: the instances.
        model: Hub id, folder, `Checkpoint`, `GivenModel`, `ServerModel`, `VllmModel`, a `Proxy` (or its folder), or a
            `Scorer` of your own with a `fingerprint`.
        out: folder of the scores.
        dtype: of the weights; log-probabilities are float32 and sums float64 in any case.
        counted: which targets count.
        documents: `attend` over the whole instance, as the paper does; `isolate` scores each document alone.
        tokenizer: `own` scores the text of an instance under the model's own tokenizer, where it is another one.
        quantize: the linear layers of the backbone, by torchao.
        compute: how: device, batch size, engine.

    Raises:
        ModelError, TokenizerError, ScoreError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    compute = compute or Compute()
    settings = score_settings(dtype=dtype, counted=counted, documents=documents, tokenizer=tokenizer, quantize=quantize)
    fingerprint, make_scorer = scorer_of(model, settings, compute)
    what = scoring.identity(packed.fingerprint, fingerprint, settings, own_tokenizer_fingerprint(model, settings))
    return scoring.score(packed, make_scorer, Path(out), what, compute, engine_of(compute))


def drift(
    packed: Packed,
    teacher: AnyGivenModel,
    reference: AnyGivenModel,
    *,
    also: Sequence[Way] = (),
    sample: int = 512,
    ratio: float = 0.5,
    normalize: str = "token",
    dtype: str = "bfloat16",
    counted: str = "all",
    documents: str = "attend",
    tokenizer: str = "packed",
    seed: int = 0,
    compute: Compute | None = None,
    say: Callable[[Drift], None] = lambda _: None,
) -> list[Drift]:
    """Score a sample in other ways and tell how far log p moves, and how many picks change.

    Args:
        packed: the instances.
        teacher: the large model.
        reference: the small one.
        also: ways beside the usual ones (batch sizes, compilation, the other dtype).
        sample: instances that are scored.
        ratio: share of the sample that Difference Sampling keeps.
        normalize: `token`, `byte` or `sum`.
        dtype: of the first way, with which the others are compared.
        counted: which targets count, in all of them.
        documents: as in `score`.
        tokenizer: as in `score`; `own` needs `normalize="byte"`.
        seed: of the sample.
        compute: of the first way.
        say: is told of each way as it is done.

    Raises:
        RecipeError, ModelError, TokenizerError, ScoreError: see `miniplm.errors`.

    """
    from miniplm.scoring.drift import drift as measure
    from miniplm.scoring.drift import usual_ways

    settings = score_settings(dtype=dtype, counted=counted, documents=documents, tokenizer=tokenizer)
    chosen = _choice(normalize)
    ways = [*usual_ways(packed.sequence_length, settings), *also]
    return measure(
        packed, given_model(teacher), given_model(reference), settings, ways, sample=sample, ratio=ratio,
        normalize=chosen, seed=seed, compute=compute, say=say,
    )  # fmt: skip


def sample(packed: Packed, *, share: float, out: str | os.PathLike[str], seed: int = 0) -> Packed:
    """Draw a random share of a packed part; what comes out is a packed part itself.

    Args:
        packed: the instances, e.g. `corpus.pool`.
        share: of the instances, in (0, 1].
        out: folder of the sample.
        seed: the same seed draws the same instances.

    Raises:
        RecipeError, ArtifactError, StorageError: see `miniplm.errors`.

    """
    try:
        drawn = ProxySettings(share=share, seed=seed)
    except ValidationError as error:
        raise refused(error) from error
    return sampling.sample(packed, Path(out), sampling.identity(packed.fingerprint, drawn.share, drawn.seed))


def select(
    settings: Mapping[str, Any],
    *,
    out: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    pool: str | os.PathLike[str] | None = None,
) -> Selection:
    """Run a sampler by name on scores on disk, and keep what it chose as an artifact.

    In Python, `DifferenceSampling(ratio=0.5).select(teacher_scores, reference_scores)` does the same in memory.

    Args:
        settings: `sampler`, `ratio`, `normalize`, `within`, `seed`, as in a recipe.
        out: folder of the selection.
        teacher: scores.
        reference: scores.
        pool: the packed part, for samplers that need no scores.

    Raises:
        RecipeError: there is no such sampler or setting, or scores that it needs were not given.
        ArtifactMismatchError: the two were scored on different instances.

    """
    try:
        named = SamplerSettings.model_validate(dict(settings))
    except ValidationError as error:
        raise refused(error) from error
    sampler = sampler_from(named)
    scores = {
        role: open_scores(Path(path))
        for role, path in (("teacher", teacher), ("reference", reference))
        if path is not None
    }
    if missing := sampler.needs - {"pool"} - set(scores):
        raise RecipeError(f"the sampler {named.sampler!r} needs the scores of the {' and the '.join(sorted(missing))}.")
    given = [Pool.of(open_packed(Path(pool)))] if pool is not None else [Pool.of(s) for s in scores.values()]
    if not given:
        raise RecipeError(f"the sampler {named.sampler!r} needs the pool, or some scores of it.")
    selection = sampler.select(scores.get("teacher"), scores.get("reference"), pool=given[0])
    inputs = {"pool": given[0].fingerprint, **{role: found.fingerprint for role, found in scores.items()}}
    selecting.save(Path(out), selection_identity(named.sampler, sampler, inputs), selection)
    return selection


def score_settings(**settings: str) -> ScoreSettings:
    """The settings of scoring, from arguments. Raises RecipeError that names the one that cannot be used."""
    try:
        return ScoreSettings.model_validate(settings)
    except ValidationError as error:
        raise refused(error) from error


def own_tokenizer_fingerprint(model: AnyModel, settings: ScoreSettings) -> str:
    """The fingerprint of a model's own tokenizer, if it is to be used and is not part of the model's."""
    if settings.tokenizer == "packed" or not isinstance(model, str | os.PathLike | ScoredModel):
        return ""
    return tokenizer_fingerprint(given_model(model))


def _choice(normalize: str) -> Normalize:
    try:
        return SamplerSettings.model_validate({"sampler": "difference", "normalize": normalize}).normalize
    except ValidationError as error:
        raise refused(error) from error


def scorer_of(model: AnyModel, settings: ScoreSettings, compute: Compute) -> tuple[str, scoring.ScorerFactory]:
    """What a model is, and what makes its scorer."""
    from miniplm.scoring.load import load_scorer  # imports torch when it is called

    if isinstance(model, (str, os.PathLike)):
        model = given_model(model)
    if isinstance(model, GivenModel) and _is_proxy(folder := Path(model.model).expanduser()):
        from miniplm.scoring.proxy import load_proxy, pool_settings

        if settings != pool_settings(settings):
            raise RecipeError(
                "a proxy reads whole instances as they are packed.",
                facts={"found": settings.model_dump(include={"documents", "tokenizer", "quantize"})},
                remedy="Leave documents, tokenizer and quantize as they are by default.",
            )
        return read_artifact(folder).fingerprint, partial(load_proxy, folder, settings.dtype, compute)
    if isinstance(model, ScoredModel):
        return model_fingerprint(model), partial(load_scorer, model, settings, compute)
    own = model
    return own_fingerprint(own, "scorer"), lambda: own


def _is_proxy(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and read_artifact(folder).identity.kind == "proxy"
