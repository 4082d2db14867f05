"""Documents from wherever they are: JSON lines, Parquet, Arrow, CSV, text, a `save_to_disk` folder, the Hub, a Dataset.

In: `CorpusSettings`, or a `datasets.Dataset`. Out: `Documents`: groups of files, each group a stream of
`Document`s with a stable id, so that groups can be read in any order by any worker. A group is streamed; nothing
larger than a record (JSON lines) or a batch of records (the rest) is in memory.

Everything but JSON lines is read by `datasets`. JSON lines are read line by line here, because only then can a
malformed line be named by file and number, or skipped without losing its neighbours.

Promised: every record of every file is yielded exactly once, as a `Document` or as a `Rejected` with the reason.
"""

from __future__ import annotations

import contextlib
import glob  # pathlib's glob takes no absolute patterns
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import fsspec.compression
import fsspec.utils
import pyarrow.parquet as pq

from miniplm.artifact import remembered_sha256
from miniplm.errors import CorpusError
from miniplm.recipe import Columns, CorpusSettings

if TYPE_CHECKING:
    import datasets

_SOURCE_COLUMNS = (
    "source", "domain", "subset", "meta.pile_set_name", "meta.source", "metadata.source", "meta.domain",
    "metadata.domain",
)  # fmt: skip
_FORMATS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv",
    ".txt": "text", ".md": "text", ".rst": "text",
}  # fmt: skip
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_LOADERS = {"parquet": {}, "arrow": {}, "csv": {}, "text": {"sample_by": "document"}}
NO_SOURCE = "unknown"


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `id` is unique where the corpus's ids are; `source` is its domain."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that gave no document."""

    reason: Literal["empty", "malformed", "undecodable"]


Advance = Callable[[int], None]


class _Reading:
    """How far a file has been read, in bytes on disk: by its position, by rows, or only at its end."""

    def __init__(self, size: int, advance: Advance) -> None:
        self.size, self.advance, self.told = size, advance, 0
        self.position: Callable[[], int] | None = None
        self.of_rows = 0

    def row(self, number: int) -> None:
        """A record was read; tell of every hundredth."""
        if number % 100 == 0 and (self.position is not None or self.of_rows):
            self._tell(self.position() if self.position is not None else self.size * number // self.of_rows)

    def to_end(self) -> None:
        """The whole file was read."""
        self._tell(self.size)

    def _tell(self, done: int) -> None:
        self.advance(done - self.told)
        self.told = done


@dataclass(frozen=True, slots=True)
class Documents:
    """An opened corpus.

    Attributes:
        fingerprint: of the contents and of everything in the settings that decides which text, ids and sources come
            out.
        groups: each a list of file names to be read one after the other; the unit of parallel reading.

    """

    settings: CorpusSettings
    fingerprint: str
    groups: tuple[tuple[str, ...], ...]
    base: Path | None = None
    dataset: Any = None

    @property
    def files(self) -> list[str]:
        """The names of all files, relative to the folder they have in common."""
        return [name for group in self.groups for name in group]

    def disk_bytes(self, name: str) -> int:
        """Size of a file on disk; 0 where there is none (the Hub, a Dataset)."""
        return _disk_bytes(self.base / name) if self.base is not None else 0

    def read(self, group: int, advance: Advance = lambda _: None) -> Iterator[Document | Rejected]:
        """Stream the records of one group, in the order of its files and rows. Errors: see `read_file`."""
        for name in self.groups[group]:
            yield from self.read_file(name, advance)

    def read_file(self, name: str, advance: Advance = lambda _: None) -> Iterator[Document | Rejected]:
        """Stream the records of one file; `advance` is told of the bytes on disk that were read.

        Raises:
            CorpusError: a record is malformed or undecodable and `on_error` is `raise`; a column is missing.

        """
        read = _Reading(self.disk_bytes(name), advance)
        records = self._records(name, read)
        columns = None
        for row, (record, problem) in enumerate(records, start=1):
            if record is not None and columns is None:
                columns = _find_columns(record, self.settings.columns, name)
            read.row(row)
            if record is None or columns is None:
                yield self._reject(name, row, *problem)
                continue
            text = _reach(record, columns.text)
            if text is None or text == "":
                yield Rejected("empty")
            elif not isinstance(text, str):
                yield self._reject(name, row, "malformed", f"`{columns.text}` is {type(text).__name__}, not text")
            elif not _encodable(text):
                yield self._reject(name, row, "undecodable", "the text has half of a surrogate pair")
            else:
                given = _reach(record, columns.id) if columns.id else None
                source = _reach(record, columns.source) if columns.source else None
                yield Document(
                    id=f"{name}:{row}" if given is None else str(given),
                    text=text,
                    source=NO_SOURCE if source is None else str(source),
                )
        read.to_end()

    def _reject(self, name: str, row: int, reason: Literal["malformed", "undecodable"], why: str) -> Rejected:
        if self.settings.on_error == "skip":
            return Rejected(reason)
        line = "line" if self.base and _format(self.base / name, self.settings.format) == "jsonl" else "row"
        raise CorpusError(
            f"{name}, {line} {row}: {reason} record.",
            facts={"because": why},
            remedy="Mend the file, or set `on_error: skip` to count such records and go on.",
        )

    def _records(self, name: str, read: _Reading) -> Iterator[tuple[Mapping[str, Any] | None, Any]]:
        if self.dataset is not None:
            return ((record, None) for record in self.dataset)
        if self.settings.hub is not None:
            return ((record, None) for record in _load_hub(self.settings))
        assert self.base is not None
        path = self.base / name
        kind = _format(path, self.settings.format)
        if kind == "jsonl":
            return _json_lines(path, read)
        if kind == "parquet":
            read.of_rows = pq.ParquetFile(path).metadata.num_rows
        return ((record, None) for record in _load(path, kind, self.settings.split))


def open_documents(source: CorpusSettings | datasets.Dataset, group_bytes: int = 32_000_000) -> Documents:
    """Open a corpus: find its files, hash their contents, and group them for reading.

    Consecutive files are put into one group until it has `group_bytes` on disk.

    Raises:
        CorpusError: no file matches, a format is not known, the data set cannot be found.

    """
    if not isinstance(source, CorpusSettings):
        return Documents(
            settings=CorpusSettings(files="(a Dataset)"),
            fingerprint=_digest(["dataset", source._fingerprint]),
            groups=(("dataset",),),
            dataset=source,
        )
    what = source.model_dump(mode="json", include={"format", "columns", "on_error", "split", "config"})
    if source.hub is not None:
        commit = _hub_commit(source.hub, source.revision)
        settings = source.model_copy(update={"revision": commit})
        return Documents(settings, _digest(["hub", source.hub, commit, what]), ((source.hub.replace("/", "--"),),))
    if source.files is None:
        raise CorpusError(
            "`source: builtin` has to be written out first.", remedy="Use miniplm.corpus.builtin.snapshot."
        )
    paths = _find_files([source.files] if isinstance(source.files, str) else source.files)
    base = Path(os.path.commonpath([p.parent for p in paths]))
    names = [p.relative_to(base).as_posix() for p in paths]
    for path in paths:
        _format(path, source.format)  # an unknown one is an error now, not hours later
    hashes = [_content_hash(path) for path in paths]
    groups = _group(names, [_disk_bytes(path) for path in paths], group_bytes)
    return Documents(source, _digest(["files", list(zip(names, hashes, strict=True)), what]), groups, base)


def _find_files(patterns: Sequence[str]) -> list[Path]:
    """Every file (or `save_to_disk` folder) that the patterns name, in order of path, each once."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = [Path(m) for m in glob.glob(str(path), recursive=True)]  # noqa: PTH207 if glob.has_magic(str(path)) else [path]
        matches = [m for m in matches if m.exists()]
        if not matches:
            raise CorpusError(f"no file matches {pattern!r}.", facts={"looked in": Path.cwd()})
        for match in matches:
            if match.is_dir() and not _is_saved_dataset(match):
                inner = [p for p in sorted(match.rglob("*")) if p.is_file() and _suffix(p) in _FORMATS]
                if not inner:
                    raise CorpusError(
                        f"the folder {match} has no file that can be read.",
                        facts={"expected": ", ".join([*_FORMATS, "a save_to_disk folder"])},
                    )
                found.update(p.absolute() for p in inner)
            else:
                found.add(match.absolute())
    return sorted(found)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return name.suffix.lower()


def _format(path: Path, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if path.is_dir():
        return "saved"
    if (found := _FORMATS.get(_suffix(path))) is None:
        raise CorpusError(
            f"the format of {path.name} is not known.",
            facts={"found": path.suffix or "no suffix", "expected": f"one of {', '.join(_FORMATS)}"},
            remedy="Say it: `format: jsonl | parquet | arrow | csv | text | saved`.",
        )
    return found


def _group(names: Sequence[str], sizes: Sequence[int], group_bytes: int) -> tuple[tuple[str, ...], ...]:
    groups: list[list[str]] = []
    filled = group_bytes
    for name, size in zip(names, sizes, strict=True):
        if filled >= group_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return tuple(tuple(group) for group in groups)


def _json_lines(path: Path, read: _Reading) -> Iterator[tuple[Mapping[str, Any] | None, Any]]:
    with path.open("rb") as raw, _decompressed(raw, path) as file:
        read.position = raw.tell
        lines = iter(file)
        while True:
            try:
                line = next(lines, None)
            except Exception as error:  # each compression library has its own
                raise CorpusError(
                    f"{path.name} cannot be read to its end.", facts={"because": error}, remedy="Is it truncated?"
                ) from error
            if line is None:
                return
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                yield None, ("undecodable", str(error))
            except ValueError as error:
                yield None, ("malformed", str(error) if line.strip() else "the line is empty")
            else:
                if isinstance(record, dict):
                    yield record, None
                else:
                    yield None, ("malformed", f"a JSON {type(record).__name__}, not an object")


def _decompressed(raw: BinaryIO, path: Path) -> Any:
    kind = fsspec.utils.infer_compression(path.name)
    return contextlib.nullcontext(raw) if kind is None else fsspec.compression.compr[kind](raw, mode="rb")


def _load(path: Path, kind: str, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        if kind == "saved":
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise CorpusError(f"{path} has no split {split!r}.", facts={"splits": ", ".join(loaded)})
                loaded = loaded[split]
        else:
            options = _LOADERS[kind]
            loaded = datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, **options)
        yield from loaded
    except CorpusError:
        raise
    except Exception as error:
        # The readers under `datasets` raise what they like: ArrowInvalid, OSError, ValueError, ...
        raise CorpusError(
            f"{path.name} cannot be read as {kind}.",
            facts={"because": str(error).splitlines()[0] if str(error) else error},
        ) from error


def _load_hub(settings: CorpusSettings) -> Iterator[Mapping[str, Any]]:
    import datasets

    yield from datasets.load_dataset(
        settings.hub, settings.config, split=settings.split, revision=settings.revision, streaming=True
    )


def _hub_commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:
        raise CorpusError(
            f"the data set {name!r} cannot be found on the Hub.", facts={"because": str(error).splitlines()[0]}
        ) from error
    return str(commit)


def _find_columns(record: Mapping[str, Any], wanted: Columns, name: str) -> Columns:
    """Settle which columns are read, by the first record of a file."""
    there = _names_in(record)
    for column in (wanted.text, wanted.id, wanted.source):
        if column is not None and column not in there and "." not in column:
            raise CorpusError(
                f"{name} has no column {column!r}.",
                facts={"columns": ", ".join(there)},
                remedy="Name it under `columns: {text: ..., id: ..., source: ...}`.",
            )
    first = next((c for c in _SOURCE_COLUMNS if _reach(record, c) is not None), None)
    return Columns(
        text=wanted.text,
        id=wanted.id or ("id" if "id" in record else None),
        source=wanted.source or first,
    )


def _names_in(record: Mapping[str, Any]) -> list[str]:
    return [n for k, v in record.items() for n in ([k] if not isinstance(v, dict) else [f"{k}.{i}" for i in v])]


def _reach(record: Mapping[str, Any], column: str) -> Any:
    """The value at a dotted column; None if any step is missing."""
    value: Any = record
    for step in column.split("."):
        if isinstance(value, str) and value.startswith("{"):  # some copies of the Pile keep `meta` as JSON text
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _disk_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def _content_hash(path: Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of a folder's files."""
    if path.is_dir():
        inner = sorted(p for p in path.rglob("*") if p.is_file())
        return _digest([(p.relative_to(path).as_posix(), _content_hash(p)) for p in inner])
    return remembered_sha256(path)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
