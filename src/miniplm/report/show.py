"""What `miniplm show` prints: an artifact's manifest, and for scores a histogram and instances as text.

Everything that comes from a corpus is made safe for a terminal: control characters are shown, not sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Manifest
from miniplm.errors import ArtifactMismatchError
from miniplm.packing.instances import Packed, open_packed
from miniplm.progress import printable
from miniplm.scoring.base import Scores, open_scores

_BAR_WIDTH = 50
_BINS = 20
_EXAMPLES = 3
_LONGEST_LIST = 12


def show(path: Path, packed: Path | None = None) -> Iterator[str]:
    """The lines that describe the artifact at `path`.

    Args:
        path: the artifact.
        packed: for scores, where the instances lie; None looks where they lay when they were scored.

    Raises:
        ArtifactError: it is not there, not finished or damaged, or `packed` is something else.

    """
    manifest = artifact.read(path)
    yield f"{manifest.identity.kind}  {path}"
    yield f"  fingerprint  {manifest.fingerprint}"
    for role, fingerprint in manifest.identity.inputs.items():
        yield f"  made of      {role} {fingerprint[:12]}"
    yield "settings"
    yield from _tree(manifest.identity.recipe)
    yield "counts"
    yield from _tree(manifest.counts)
    total = sum(size for size, _ in manifest.files.values())
    yield f"files          {len(manifest.files)}, {total / 1e6:,.1f} MB"
    how = artifact.provenance(path)
    if "seconds" in how:
        rate = f", {how['tokens_per_s']:,} tokens/s" if "tokens_per_s" in how else ""
        yield f"made in        {how['seconds']:,.1f} s{rate}{', resumed' if how.get('resumed') else ''}"
    if manifest.identity.kind == "scores":
        yield from _scores(open_scores(path), _instances(manifest, how, packed))
    if manifest.identity.kind == "packed":
        instances = open_packed(path)
        yield "the first instances"
        for row in range(min(_EXAMPLES, len(instances))):
            yield f"  {row:>8,}  {printable(instances.text(row))}"


def _scores(scores: Scores, packed: Packed | None) -> Iterator[str]:
    values = scores.per("token")
    yield "log p per token, nats"
    yield from _histogram(values)
    order = np.argsort(values, kind="stable")
    middle = len(order) // 2
    for title, rows in (
        ("the best (highest log p per token)", order[::-1][:_EXAMPLES]),
        ("around the median", order[middle : middle + _EXAMPLES]),
        ("the worst", order[:_EXAMPLES]),
    ):
        yield title
        for row in rows:
            text = f"  {printable(packed.text(int(row)))}" if packed is not None else ""
            yield f"  {row:>8,}  {values[row]:8.3f}  {printable(str(scores.source_names[row]), 24):<24}{text}"
    if packed is None:
        yield "(give --packed FOLDER to see their text)"


def _histogram(values: NDArray[np.float64]) -> Iterator[str]:
    counts, edges = np.histogram(values, bins=_BINS)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(_BAR_WIDTH * count / counts.max())
        yield f"  {low:9.3f} to {high:8.3f}  {count:>10,}  {bar}"


def _instances(manifest: Manifest, how: Mapping[str, Any], asked: Path | None) -> Packed | None:
    """The packed part that was scored, if it can be found."""
    where = asked or (Path(how["packed"]) if "packed" in how else None)
    if where is None or (asked is None and not (where / artifact.MANIFEST).is_file()):
        return None
    packed = open_packed(where)
    if packed.fingerprint != manifest.identity.inputs["packed"]:
        if asked is None:
            return None
        raise ArtifactMismatchError(
            "the scores are of other instances.",
            facts={
                "scores": f"{manifest.path}  packed {manifest.identity.inputs['packed'][:12]}",
                "instances": f"{where}  packed {packed.fingerprint[:12]}",
            },
        )
    return packed


def _tree(value: Mapping[str, Any], indent: int = 2) -> Iterator[str]:
    for key, inner in value.items():
        name = " " * indent + printable(str(key), 40)
        if isinstance(inner, Mapping) and len(inner) > _LONGEST_LIST:
            yield f"{name}: {len(inner)} entries"
        elif isinstance(inner, Mapping) and inner:
            yield f"{name}:"
            yield from _tree(inner, indent + 2)
        elif isinstance(inner, int) and not isinstance(inner, bool):
            yield f"{name}: {inner:,}"
        else:
            yield f"{name}: {printable(json.dumps(inner, ensure_ascii=False), 100)}"
