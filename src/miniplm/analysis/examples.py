"""Instances as text beside their scores: of each of the three effects, and those next to one in the order of scores.

In: `Effects`, and the packed instances that they are of. Out: plain JSON types; the text is that of the instance, cut,
and nothing in it is interpreted.

An example is `{row, source, documents, text, teacher, reference, score}`: losses and score in nats per unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm.analysis.effects import Effects
from miniplm.errors import RecipeError
from miniplm.packing.instances import Packed

EXAMPLES = 3
EXAMPLE_CHARACTERS = 700
_LOOKED_AT = 2000  # for one of each source


def examples(
    packed: Packed, found: Effects, *, rows: NDArray[np.int64] | None = None, count: int = EXAMPLES
) -> dict[str, Any]:
    """Examples of each effect, of different sources where there are several.

    Without a selection, the upper half by score stands for what is kept.

    Args:
        packed: the instances: the pool, or a sample of it.
        found: their effects.
        rows: the row of the pool that each instance is, `[N]`; None if they are the pool.
        count: how many of each.

    Returns:
        `easy_dropped`, `hard_kept`, `noisy_dropped`: lists of examples, the clearest first; `notes`: the same names,
        for those that had to make do with something else, or with nothing.

    Raises:
        ArtifactMismatchError: the instances are not those of the effects.

    """
    found.check_of(packed)
    kept = _decided(found)
    score = found.score
    orders = {
        "easy_dropped": _order(np.abs(score), found.of("easy") & ~kept),
        "hard_kept": _order(-score, found.of("hard") & kept),
        "noisy_dropped": _order(score, found.of("noisy") & ~kept),
    }
    notes = {}
    if not len(orders["easy_dropped"]):
        orders["easy_dropped"] = _order(np.abs(score), ~kept & (score >= 0))
        notes["easy_dropped"] = (
            f"No dropped instance is easy: none scores up to {found.bounds.easy_score:.3g} where the reference's loss "
            f"is up to {found.bounds.easy_loss:.3g}. The reference may be too small or trained too briefly. "
            "These are the dropped ones on which the two models agree most."
        )
    if not len(orders["hard_kept"]):
        orders["hard_kept"] = _order(-score, kept & (score >= 0))
        notes["hard_kept"] = (
            f"No instance that was kept scores more than {found.bounds.hard_score:.3g}. These score highest."
        )
    if not len(orders["noisy_dropped"]):
        notes["noisy_dropped"] = "No instance that was dropped scored below 0."
    shown = {
        name: [_example(packed, found, rows, instance) for instance in _spread(order, found.source, count)]
        for name, order in orders.items()
    }
    return {**shown, "notes": notes}


def neighbours(
    packed: Packed,
    found: Effects,
    instance: int | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
    count: int = EXAMPLES,
) -> list[dict[str, Any]]:
    """The instances just above and below one in score, highest first, it among them.

    Args:
        packed: the instances.
        found: their effects.
        instance: whose neighbours; None for those at the border: as many scores are above it as instances were kept.
        rows: the row of the pool that each instance is, `[N]`; None if they are the pool.
        count: how many on each side, where there are as many.

    Returns:
        Examples, each with `place` (1 has the highest score; of equal scores the lower row comes first, as in
        top-K) and `kept`.

    Raises:
        ArtifactMismatchError: the instances are not those of the effects.
        RecipeError: there is no such instance.

    """
    found.check_of(packed)
    if instance is not None and not 0 <= instance < len(found):
        raise RecipeError(f"there is no instance {instance:,}.", facts={"expected": f"0 to {len(found) - 1:,}"})
    kept = _decided(found)
    order = np.argsort(-found.score, kind="stable")
    if instance is None:
        first = int(kept.sum())
        last = first
    else:
        first = int(np.flatnonzero(order == instance)[0])
        last = first + 1
    places = range(max(0, first - count), min(len(order), last + count))
    return [
        {"place": place + 1, "kept": bool(kept[order[place]]), **_example(packed, found, rows, int(order[place]))}
        for place in places
    ]


def _decided(found: Effects) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = found.score > np.median(found.score) if found.kept is None else found.kept
    return kept


def _order(key: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The instances in question by rising key."""
    instances = np.flatnonzero(which)
    return instances[np.argsort(key[instances], kind="stable")]


def _spread(order: NDArray[np.int64], source: NDArray[np.int32], count: int) -> list[int]:
    """The first instances of an order that are of different sources, then of any."""
    chosen: dict[int, int] = {}
    for instance in order[:_LOOKED_AT]:
        chosen.setdefault(int(source[instance]), int(instance))
        if len(chosen) >= count:
            break
    first = list(chosen.values())
    return (first + [int(instance) for instance in order[:count] if int(instance) not in first])[:count]


def _example(packed: Packed, found: Effects, rows: NDArray[np.int64] | None, instance: int) -> dict[str, Any]:
    lineage, text = packed.dataset[instance], packed.text(instance)
    return {
        "row": instance if rows is None else int(rows[instance]),
        "source": lineage["source"],
        "documents": lineage["documents"],
        "text": text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + " …",
        "teacher": float(found.teacher_loss[instance]),
        "reference": float(found.reference_loss[instance]),
        "score": float(found.score[instance]),
    }
