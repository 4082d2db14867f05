"""The built-in corpus: the Python source and documentation installed on this machine, so that no network is needed.

In: a budget of text bytes and a seed. Out: an artifact of kind `documents`: one Parquet file with `id`, `text`,
`source` (the package), in an order that the seed decides.

Files are drawn in the order of a hash of their name and the seed until the budget is filled; no package gives more than
`MAX_SHARE` of it, exact copies are taken once, and generated tables and tiny stubs are left out by size.
The identity has the hash of what was drawn: another installation is another corpus.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.errors import CorpusTooSmallError

VERSION = 1
MAX_SHARE = 0.15  # of the budget for one package; assumed, so that torch and transformers do not fill half of it
FILE_BYTES = (400, 200_000)  # smallest and largest file; assumed: below are stubs, above are generated tables
_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
_ROWS_PER_GROUP = 500


@dataclass(frozen=True, slots=True)
class _File:
    id: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What was drawn: `content` is the sha256 of all of it."""

    files: tuple[_File, ...]
    text_bytes: int
    content: str

    def identity(self, budget_bytes: int, seed: int) -> Identity:
        """The identity of the artifact that holds this sample."""
        return Identity("documents", VERSION, {"budget_bytes": budget_bytes, "seed": seed, "content": self.content})


def draw(budget_bytes: int, seed: int) -> Sample:
    """Draw about `budget_bytes` of UTF-8 text from what is installed.

    Raises:
        CorpusTooSmallError: the installation has less than half of the budget.

    """
    candidates = sorted(_candidates(), key=lambda c: hashlib.sha256(f"{seed}\0{c[0]}".encode()).digest())
    chosen: list[_File] = []
    seen: set[bytes] = set()
    filled = 0
    per_source: Counter[str] = Counter()
    content = hashlib.sha256()
    for name, source, path in candidates:
        if filled >= budget_bytes:
            break
        size = path.stat().st_size
        if per_source[source] + size > MAX_SHARE * budget_bytes:
            continue
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).digest()
        text = _decode(raw)
        if text is None or digest in seen:
            continue
        seen.add(digest)
        chosen.append(_File(name, source, text))
        per_source[source] += size
        filled += size
        content.update(name.encode() + b"\0" + digest)
    if filled < budget_bytes / 2:
        raise CorpusTooSmallError(
            "too little Python source and documentation is installed here.",
            facts={"found": f"{filled / 1e6:.1f} MB", "asked for": f"{budget_bytes / 1e6:.1f} MB"},
            remedy="Lower corpus.budget_bytes, or bring text of your own with corpus.files.",
        )
    return Sample(tuple(chosen), filled, content.hexdigest())


def snapshot(out: Path, budget_bytes: int, seed: int, sample: Sample | None = None) -> artifact.Manifest:
    """Write the built-in corpus to `out`; `documents.parquet` in it is a corpus like any other. Errors: see `draw`."""
    sample = sample or draw(budget_bytes, seed)
    return artifact.make(out, sample.identity(budget_bytes, seed), lambda workspace: _write(workspace, sample))


def _write(workspace: Workspace, sample: Sample) -> Mapping[str, Any]:
    table = pa.table(
        {
            "id": [f.id for f in sample.files],
            "text": [f.text for f in sample.files],
            "source": [f.source for f in sample.files],
        }
    )
    with workspace.part("documents.parquet") as path:
        pq.write_table(table, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    sources = Counter(f.source for f in sample.files)
    return {"documents": len(sample.files), "text_bytes": sample.text_bytes, "sources": dict(sorted(sources.items()))}


def _candidates() -> Iterator[tuple[str, str, Path]]:
    """(name, package, path) of every file that may be drawn: the standard library counts as the package `python`."""
    paths = sysconfig.get_paths()
    packages = {Path(paths["purelib"]), Path(paths["platlib"])}
    smallest, largest = FILE_BYTES
    for root in sorted({Path(paths["stdlib"]), *packages}):
        for path in root.rglob("*"):
            relative = path.relative_to(root)
            top = relative.parts[0]
            if path.suffix not in _SUFFIXES or top.startswith(("miniplm", "__editable__")):
                continue
            if root not in packages and top in {"site-packages", "dist-packages"}:
                continue
            if path.is_file() and smallest <= path.stat().st_size <= largest:
                source = "python" if root not in packages else top.removesuffix(".py").split("-")[0]
                yield f"{'lib' if root not in packages else 'site'}/{relative.as_posix()}", source, path


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:  # the few files in other encodings are tests of encodings
        return None
