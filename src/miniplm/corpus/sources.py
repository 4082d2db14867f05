"""Documents from wherever they are: JSON lines, Parquet, Arrow, CSV, text, a `save_to_disk` folder, the Hub, a Dataset.

In: `CorpusSettings`, or a `datasets.Dataset`. Out: `Documents`: groups of files, each group a stream of
`Document`s with a stable id, so that groups can be read in any order by any worker. A group is streamed; nothing
larger than a record (JSON lines) or a batch of records (the rest) is in memory.

Parquet is read by `pyarrow`, JSON lines line by line here, because only then can a malformed line be named by file
and number, or skipped without losing its neighbours; everything else is read by `datasets`.

Promised: every record of every file is yielded exactly once, as a `Document` or as a `Rejected` with the reason. A
blank line of JSON lines is no record, but it has a number.
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
_LOADERS = {"arrow": {}, "csv": {}, "text": {"sample_by": "document"}}
_MISSING = object()
NO_SOURCE = "unknown"

Reason = Literal["empty", "malformed", "undecodable"]
_Problem = tuple[Reason, str]  # and what exactly
_Record = Mapping[str, Any] | _Problem | None  # None: a blank line


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `id` is unique where the corpus's ids are; `source` is its domain."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that gave no document."""

    reason: Reason


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
            CorpusError: a record is malformed or undecodable and `on_error` is `raise`; the first record has no such
                column; the file cannot be read (to its end).

        """
        read = _Reading(self.disk_bytes(name), advance)
        columns, checked = self.settings.columns, False
        for row, record in enumerate(self._records(name, read), start=1):
            read.row(row)
            if record is None:
                continue
            if not checked and not isinstance(record, tuple):
                _check_columns(record, columns, name)
                checked = True
            made = record if isinstance(record, tuple) else _document(record, columns, f"{name}:{row}")
            yield made if isinstance(made, Document) else self._rejected(name, row, *made)
        read.to_end()

    def _rejected(self, name: str, row: int, reason: Reason, why: str) -> Rejected:
        if reason == "empty" or self.settings.on_error == "skip":
            return Rejected(reason)
        raise CorpusError(
            f"{name}, {'line' if self._kind(name) == 'jsonl' else 'row'} {row}: {reason} record.",
            facts={"because": why},
            remedy="Mend the file, or set `on_error: skip` to count such records and go on.",
        )

    def _kind(self, name: str) -> str:
        return "a data set" if self.base is None else _format(self.base / name, self.settings.format)

    def _records(self, name: str, read: _Reading) -> Iterator[_Record]:
        kind = self._kind(name)
        with _corpus_errors(f"{self.settings.hub or name} cannot be read as {kind}."):
            if self.base is None:
                yield from self.dataset if self.dataset is not None else _load_hub(self.settings)
            elif kind == "jsonl":
                yield from _json_lines(self.base / name, read)
            elif kind == "parquet":
                yield from _parquet(self.base / name, read)
            else:
                yield from _load(self.base / name, kind, self.settings.split)


def open_documents(
    source: CorpusSettings | datasets.Dataset,
    group_bytes: int = 32_000_000,
    columns: Columns | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Documents:
    """Open a corpus: find its files, hash their contents, and group them for reading.

    Consecutive files are put into one group until it has `group_bytes` on disk. `columns` and `on_error` are those of
    a `Dataset`; settings have their own.

    Raises:
        CorpusError: no file matches, a format is not known, the data set cannot be found or is not a `Dataset`.

    """
    if not isinstance(source, CorpusSettings):
        given = CorpusSettings(files="(a Dataset)", columns=columns or Columns(), on_error=on_error)
        what = given.model_dump(mode="json", include={"columns", "on_error"})
        return Documents(given, _digest(["dataset", _identity(source), what]), (("dataset",),), dataset=source)
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


def _identity(source: Any) -> str:
    import datasets

    if isinstance(source, datasets.Dataset):
        return str(source._fingerprint)
    raise CorpusError(
        f"documents cannot be read from a value of type {type(source).__name__}.",
        facts={"expected": "a datasets.Dataset, or files, or a data set on the Hub"},
        remedy='Pass one split of a DatasetDict (`data["train"]`); write an IterableDataset to files first.',
    )


def _find_files(patterns: Sequence[str]) -> list[Path]:
    """Every file (or `save_to_disk` folder) that the patterns name, in order of path, each once."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        named = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
        matches = [m for m in named if m.exists()]
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


@contextlib.contextmanager
def _corpus_errors(summary: str) -> Iterator[None]:
    """Turn what readers raise (ArrowInvalid, OSError, zlib.error, ...: they raise what they like) into CorpusError."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        because = (str(error).strip() or repr(error)).splitlines()[0]
        raise CorpusError(summary, facts={"because": because}) from error


def _json_lines(path: Path, read: _Reading) -> Iterator[_Record]:
    with path.open("rb") as raw, _decompressed(raw, path) as file:
        read.position = raw.tell
        may_be_array = _suffix(path) == ".json"
        for line in file:
            if not line.strip():
                yield None
                continue
            if may_be_array and line.lstrip().startswith(b"["):
                raise CorpusError(
                    f"{path.name} is one JSON array.",
                    facts={"expected": "JSON lines: one object to a line"},
                    remedy=f"Convert it, for example with: jq -c '.[]' {path.name}",
                )
            may_be_array = False
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                yield "undecodable", str(error)
            except (ValueError, RecursionError) as error:
                yield "malformed", str(error)
            else:
                yield (
                    record if isinstance(record, dict) else ("malformed", f"a JSON {type(record).__name__}, no object")
                )


def _decompressed(raw: BinaryIO, path: Path) -> Any:
    kind = fsspec.utils.infer_compression(path.name)
    return contextlib.nullcontext(raw) if kind is None else fsspec.compression.compr[kind](raw, mode="rb")


def _parquet(path: Path, read: _Reading) -> Iterator[_Record]:
    with pq.ParquetFile(path) as file:
        read.of_rows = file.metadata.num_rows
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _load(path: Path, kind: str, split: str) -> Iterator[_Record]:
    import datasets

    if kind == "saved":
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise CorpusError(f"{path} has no split {split!r}.", facts={"splits": ", ".join(loaded)})
            loaded = loaded[split]
    else:
        files = [glob.escape(str(path))]
        loaded = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **_LOADERS[kind])
    yield from loaded


def _load_hub(settings: CorpusSettings) -> Iterator[_Record]:
    import datasets

    yield from datasets.load_dataset(
        settings.hub, settings.config, split=settings.split, revision=settings.revision, streaming=True
    )


def _hub_commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    with _corpus_errors(f"the data set {name!r} cannot be found on the Hub."):
        return str(HfApi().dataset_info(name, revision=revision).sha)


def _check_columns(record: Mapping[str, Any], wanted: Columns, name: str) -> None:
    """Refuse a file whose first record lacks a column that is asked for."""
    for column in (wanted.text, wanted.id, wanted.source):
        if column is not None and _reach(record, column, _MISSING) is _MISSING:
            raise CorpusError(
                f"{name} has no column {column!r}.",
                facts={"columns": ", ".join(_names_in(record))},
                remedy="Name it under `columns: {text: ..., id: ..., source: ...}`.",
            )


def _document(record: Mapping[str, Any], columns: Columns, place: str) -> Document | _Problem:
    """The document of a record, `place` its id if it has none, or why there is none."""
    text = _reach(record, columns.text, _MISSING)
    if text is _MISSING:
        return "malformed", f"no such column: `{columns.text}`"
    if text is None or text == "":
        return "empty", "no text"
    if not isinstance(text, str):
        return "malformed", f"`{columns.text}` is {type(text).__name__}, not text"
    given = _reach(record, columns.id or "id")
    sources = (_reach(record, column) for column in ([columns.source] if columns.source else _SOURCE_COLUMNS))
    source = next((str(value) for value in sources if value not in (None, "")), NO_SOURCE)
    document = Document(place if given is None else str(given), text, source)
    for field, value in (("text", text), ("id", document.id), ("source", source)):
        if not _encodable(value):
            return "undecodable", f"the {field} has half of a surrogate pair"
    return document


def _names_in(record: Mapping[str, Any]) -> list[str]:
    return [n for k, v in record.items() for n in ([k] if not isinstance(v, dict) else [f"{k}.{i}" for i in v])]


def _reach(record: Mapping[str, Any], column: str, missing: Any = None) -> Any:
    """The value at a column, or at the end of a dotted one's steps; `missing` if a step is; None at the first null."""
    if column in record:
        return record[column]
    value: Any = record
    for step in column.split("."):
        if isinstance(value, str) and value.startswith("{"):  # some copies of the Pile keep `meta` as JSON text
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return missing
        if value is None:
            return None
        if not isinstance(value, Mapping) or step not in value:
            return missing
        value = value[step]
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
