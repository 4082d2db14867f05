"""Drift: how far scores move when only the how changes, and, what matters, how many picks change with them.

Batch sizes, dtypes, compilation, quantisation and back ends are no part of what scores are, or a small one; yet sums of
rounded numbers depend on all of them. A sample is scored again in each way. Reported against the first way: the
movement of log p in nats per token, and the Jaccard overlap of the instances that Difference Sampling keeps.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import RecipeError, ScoreError
from miniplm.packing.instances import Instances, Packed
from miniplm.recipe import Compute, ScoredModel, ScoreSettings
from miniplm.sampling.base import keep_count, top_k
from miniplm.scoring.base import Normalize, Scorer
from miniplm.scoring.instances import row_rule, score_instances
from miniplm.scoring.load import load_scorer


@dataclass(frozen=True)
class Way:
    """One way to score: a name, and what differs from the first way.

    Attributes:
        name: as the table shows it.
        compute: changes to `Compute`, for teacher and reference.
        settings: changes to `ScoreSettings`, for both; `quantize` for the teacher only.
        teacher: another back end for the teacher; None: the same.

    """

    name: str
    compute: Mapping[str, object] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    teacher: ScoredModel | None = None


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a way is from the first one.

    Attributes:
        way: its name.
        mean_nats: mean over instances of |change of the teacher's log p per token|.
        largest_nats: the largest of them.
        bias_nats: mean change, with its sign.
        jaccard: of the instances kept, |both| / |either|.
        changed: instances of the sample that are kept in one way and not in the other.

    """

    way: str
    mean_nats: float
    largest_nats: float
    bias_nats: float
    jaccard: float
    changed: int

    def __str__(self) -> str:
        return (
            f"{self.way:<24}{self.mean_nats:>12.2e}{self.largest_nats:>12.2e}{self.bias_nats:>+12.1e}"
            f"{self.jaccard:>10.4f}{self.changed:>10,}"
        )


HEADER = f"{'':<24}{'mean |Δ|':>12}{'largest':>12}{'mean Δ':>12}{'Jaccard':>10}{'changed':>10}"


def usual_ways(sequence_length: int, settings: ScoreSettings) -> list[Way]:
    """The first way again; one instance at a time; large batches; compiled and not; the other dtype."""
    other = "float32" if settings.dtype != "float32" else "bfloat16"
    return [
        Way("as asked"),
        Way("as asked, again"),
        Way("one instance at a time", compute={"score_tokens": sequence_length}),
        Way("32 instances at a time", compute={"score_tokens": 32 * sequence_length}),
        Way("not compiled", compute={"compile": False}),
        Way("compiled", compute={"compile": True}),
        Way(other, settings={"dtype": other}),
    ]


def drift(
    packed: Packed,
    teacher: ScoredModel,
    reference: ScoredModel,
    settings: ScoreSettings,
    ways: Sequence[Way],
    *,
    sample: int = 512,
    ratio: float = 0.5,
    normalize: Normalize = "token",
    seed: int = 0,
    compute: Compute | None = None,
    say: Callable[[Drift], None] = lambda _: None,
) -> list[Drift]:
    """Score a random sample of `packed` in each of the ways; the first is what the others are compared with.

    Args:
        packed: the instances.
        teacher: the large model.
        reference: the small one.
        settings: of the first way.
        ways: the first, and the others.
        sample: instances that are scored.
        ratio: share of the sample that Difference Sampling keeps.
        normalize: what the difference is taken of.
        seed: of the sample.
        compute: of the first way.
        say: is told of each way as it is done.

    Raises:
        RecipeError: per token, of two tokenizers.
        ModelError, TokenizerError, ScoreError: as scoring does.

    """
    if not ways:
        raise ScoreError("there is no way to score in.")
    if settings.tokenizer == "own" and normalize == "token":
        raise RecipeError(
            "a difference per token between two tokenizers means nothing.", remedy="Compare per byte: normalize byte."
        )
    instances = _sampled(packed, sample, seed)
    compute = compute or Compute()
    first: tuple[NDArray[np.float64], set[int]] | None = None
    found = []
    for way in ways:
        how = Compute.model_validate({**compute.model_dump(), **way.compute})
        changed = ScoreSettings.model_validate({**settings.model_dump(), **way.settings})
        plain = changed.model_copy(update={"quantize": "none"})
        logp = _per(instances, packed, load_scorer(way.teacher or teacher, changed, how), changed, how, normalize)
        easy = _per(instances, packed, load_scorer(reference, plain, how), plain, how, normalize)
        picks = set(top_k(logp - easy, keep_count(ratio, len(instances))).tolist())
        first = first or (logp, picks)
        moved = logp - first[0]
        both, either = len(picks & first[1]), len(picks | first[1])
        found.append(
            Drift(
                way.name,
                float(np.abs(moved).mean()),
                float(np.abs(moved).max()),
                float(moved.mean()),
                both / either,
                either - both,
            )
        )
        say(found[-1])
    return found


def as_csv(rows: Sequence[Drift]) -> str:
    """The table as CSV, one way a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Drift)])
    writer.writerows(dataclasses.astuple(row) for row in rows)
    return text.getvalue()


def _sampled(packed: Packed, sample: int, seed: int) -> Instances:
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows = np.sort(generator.permutation(len(packed))[:sample])
    found = packed.select(rows).with_format("numpy")[:]
    return Instances(
        input_ids=np.stack(list(found["input_ids"])),
        length=np.asarray(found["length"]),
        n_bytes=np.asarray(found["n_bytes"]),
        source=[str(name) for name in found["source"]],
        documents=[[] for _ in rows],
    )


def _per(
    instances: Instances,
    packed: Packed,
    scorer: Scorer,
    settings: ScoreSettings,
    compute: Compute,
    normalize: Normalize,
) -> NDArray[np.float64]:
    """Log p of each instance, normalised: `[N]`."""
    rule, _ = row_rule(packed, scorer, settings)
    budget = compute.score_tokens or int(getattr(scorer, "token_budget", packed.sequence_length))
    table = score_instances(instances, scorer, rule, budget).table
    logp = table["logp"].to_numpy()
    counted = {"token": "n_tokens", "byte": "n_bytes"}.get(normalize)
    found: NDArray[np.float64] = logp if counted is None else logp / table[counted].to_numpy()
    return found
