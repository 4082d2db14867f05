"""Documents from everywhere: each record exactly once, or an error that says which file, which line, and why."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from miniplm.corpus.sources import Document, Documents, Rejected, open_documents
from miniplm.errors import CorpusError
from miniplm.recipe import Columns, CorpusSettings

RECORDS = [{"id": f"d{n}", "text": f"text {n} é 中 🙂", "source": f"s{n % 2}"} for n in range(7)]
DOCUMENTS = [Document(r["id"], r["text"], r["source"]) for r in RECORDS]


def lines(records: Iterable[object]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def opened(files: Path | str | Sequence[str], **settings: Any) -> Documents:
    given = [str(f) for f in files] if isinstance(files, list) else str(files)
    return open_documents(CorpusSettings.model_validate({"files": given, **settings}))


def everything(documents: Documents) -> list[Document | Rejected]:
    return [record for group in range(len(documents.groups)) for record in documents.read(group)]


def read(files: Path | str | list[Any], **settings: Any) -> list[Document | Rejected]:
    return everything(opened(files, **settings))


def write_plain(path: Path) -> None:
    path.write_bytes(lines(RECORDS))


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(lines(RECORDS)))


def write_gz_members(path: Path) -> None:
    path.write_bytes(gzip.compress(lines(RECORDS[:3])) + gzip.compress(lines(RECORDS[3:])))


def write_zst(path: Path) -> None:
    path.write_bytes(zstd.compress(lines(RECORDS)))


def write_zst_frames(path: Path) -> None:
    half = lines(RECORDS)[:100]  # a frame ends in the middle of a line
    path.write_bytes(zstd.compress(half) + zstd.compress(lines(RECORDS)[100:]))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=3)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text", "source"])
        writer.writeheader()
        writer.writerows(RECORDS)


def write_saved(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))


def write_saved_dict(path: Path) -> None:
    part = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"test": part.select([0]), "train": part}).save_to_disk(str(path))


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "jsonl": ("a.jsonl", write_plain),
    "json": ("a.json", write_plain),
    "ndjson": ("a.ndjson", write_plain),
    "gz": ("a.jsonl.gz", write_gz),
    "gz of two members": ("a.jsonl.gz", write_gz_members),
    "zst": ("a.jsonl.zst", write_zst),
    "zst of two frames": ("a.jsonl.zst", write_zst_frames),
    "parquet": ("a.parquet", write_parquet),
    "arrow stream": ("a.arrow", write_arrow_stream),
    "arrow file": ("a.arrow", write_arrow_file),
    "csv": ("a.csv", write_csv),
    "save_to_disk": ("a", write_saved),
    "save_to_disk of a dict": ("a", write_saved_dict),
}


@pytest.fixture(autouse=True)
def _quiet_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_record_of_every_format_is_read_once_and_in_order(kind: str, tmp_path: Path) -> None:
    name, write = FORMATS[kind]
    write(tmp_path / name)
    assert read(tmp_path / name) == DOCUMENTS


def test_a_dataset_is_read_as_it_is() -> None:
    documents = open_documents(datasets.Dataset.from_list(RECORDS))
    assert everything(documents) == DOCUMENTS
    assert documents.fingerprint == open_documents(datasets.Dataset.from_list(RECORDS)).fingerprint
    assert documents.fingerprint != open_documents(datasets.Dataset.from_list(RECORDS[:6])).fingerprint


def test_columns_and_on_error_of_a_dataset_are_used_and_in_its_fingerprint() -> None:
    data = datasets.Dataset.from_list([{"body": "x", "key": "a", "from": "web"}])
    columns = Columns(text="body", id="key", source="from")
    assert everything(open_documents(data, 1_000, columns)) == [Document("a", "x", "web")]
    numbers = datasets.Dataset.from_list([{"body": 17}])
    assert everything(open_documents(numbers, 1_000, Columns(text="body"), "skip")) == [Rejected("malformed")]
    with pytest.raises(CorpusError, match="row 1: malformed"):
        everything(open_documents(numbers, 1_000, Columns(text="body")))
    opened_so = [open_documents(data), open_documents(data, 1, columns), open_documents(data, 1, columns, "skip")]
    assert len({documents.fingerprint for documents in opened_so}) == 3


def test_what_is_no_dataset_is_refused_with_what_can_be_passed() -> None:
    part = datasets.Dataset.from_list(RECORDS)
    for other in (part.to_iterable_dataset(), datasets.DatasetDict({"train": part}), [*RECORDS]):
        with pytest.raises(CorpusError, match=rf"(?s){type(other).__name__}.*datasets\.Dataset"):
            open_documents(other)


def _hub(monkeypatch: pytest.MonkeyPatch, stream: Callable[..., Any]) -> Documents:
    info = type("Info", (), {"sha": "c0ffee"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    return open_documents(CorpusSettings(hub="who/what", config="c"))


def test_a_data_set_on_the_hub_is_read_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    documents = _hub(monkeypatch, lambda *given, **options: asked.append((given, options["revision"])) or RECORDS)
    assert everything(documents) == DOCUMENTS
    assert asked == [(("who/what", "c"), "c0ffee")]


def test_a_hub_that_fails_is_an_error_with_the_first_line_of_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_config(*_: Any, **__: Any) -> Any:
        raise ValueError("BuilderConfig 'c' not found.\nAvailable: a, b")

    def dropped(*_: Any, **__: Any) -> Any:
        yield from RECORDS[:2]
        raise ConnectionError

    for stream, because in ((no_such_config, "BuilderConfig 'c' not found."), (dropped, "ConnectionError()")):
        with pytest.raises(CorpusError) as error:
            everything(_hub(monkeypatch, stream))
        assert "who/what" in str(error.value)
        assert str(error.value).endswith(f"because  {because}")


def test_a_data_set_that_is_not_on_the_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> Any:
        raise OSError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", nothing)
    with pytest.raises(CorpusError, match=r"(?s)'who/what'.*Hub.*OSError"):
        open_documents(CorpusSettings(hub="who/what"))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("first line\n\nsecond paragraph\n")
    (document,) = read(tmp_path / "novel.txt")
    assert isinstance(document, Document)
    assert document.text.split() == ["first", "line", "second", "paragraph"]
    assert document.id == "novel.txt:1"


def test_a_format_can_be_said_where_the_name_does_not_say_it(tmp_path: Path) -> None:
    write_plain(tmp_path / "dump.0001")
    with pytest.raises(CorpusError, match=r"dump\.0001.*not known"):
        opened(tmp_path / "dump.0001")
    assert read(tmp_path / "dump.0001", format="jsonl") == DOCUMENTS


def test_a_split_that_a_saved_dict_does_not_have_is_named_with_those_it_has(tmp_path: Path) -> None:
    write_saved_dict(tmp_path / "saved")
    with pytest.raises(CorpusError, match=r"(?s)'validation'.*test, train"):
        read(tmp_path / "saved", split="validation")


@pytest.mark.parametrize(
    ("name", "write"), [
        ("a.jsonl.gz", write_gz), ("a.jsonl.zst", write_zst), ("a.jsonl.zst", write_zst_frames),
        ("a.parquet", write_parquet),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_truncated_file_is_an_error_and_never_just_shorter(
    name: str, write: Callable[[Path], None], on_error: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 12)
    with pytest.raises(CorpusError, match=name):
        read(tmp_path / name, on_error=on_error)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_what_its_name_says_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"this is something else entirely, and long enough to be read as a header")
    with pytest.raises(CorpusError, match=name):
        read(tmp_path / name)


SOURCES = {
    "source": {"source": "web"},
    "domain": {"domain": "web"},
    "subset": {"subset": "web"},
    "the Pile": {"meta": {"pile_set_name": "web"}},
    "meta.source": {"meta": {"source": "web"}},
    "metadata.source": {"metadata": {"source": "web", "url": "x"}},
    "metadata.domain": {"metadata": {"domain": "web"}},
    "meta as JSON text": {"meta": '{"pile_set_name": "web"}'},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_usual_places_of_the_source_are_recognised(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x", **SOURCES[kind]}]))
    assert read(tmp_path / "a.jsonl") == [Document("a.jsonl:1", "x", "web")]


def test_a_nested_source_is_recognised_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "x", "meta": {"pile_set_name": "web"}}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Document("a.parquet:1", "x", "web")]


def test_without_a_source_it_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x"}, {"text": "y", "meta": "no JSON {"}]))
    assert [d.source for d in read(tmp_path / "a.jsonl") if isinstance(d, Document)] == ["unknown", "unknown"]


def test_configured_columns_may_be_nested(tmp_path: Path) -> None:
    record = {"body": {"content": "x"}, "meta": {"key": 7, "from": "web"}, "text": "no", "source": "no", "id": "no"}
    (tmp_path / "a.jsonl").write_bytes(lines([record]))
    columns = {"text": "body.content", "id": "meta.key", "source": "meta.from"}
    assert read(tmp_path / "a.jsonl", columns=columns) == [Document("7", "x", "web")]


def test_a_flat_column_may_have_a_dot_in_its_name_and_a_nested_one_may_be_null(tmp_path: Path) -> None:
    records = [{"body.text": "x"}, {"body": {"text": None}}, {"body": None}, {"body": {"text": "y"}}]
    for rows in (records, records[1:], records[2:]):
        (tmp_path / "a.jsonl").write_bytes(lines(rows))
        found = read(tmp_path / "a.jsonl", columns={"text": "body.text"})
        assert [r.text if isinstance(r, Document) else r.reason for r in found] == ["x", "empty", "empty", "y"][
            -len(rows) :
        ]


@pytest.mark.parametrize("wanted", [{}, {"text": "body"}, {"text": "meta.body"}, {"text": "content.body"}])
def test_a_text_column_that_is_not_there_is_named_with_those_that_are(wanted: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"content": "x", "meta": {"lang": "en"}}]))
    with pytest.raises(CorpusError) as error:
        read(tmp_path / "a.jsonl", columns=wanted)
    for words in ("a.jsonl", wanted.get("text", "text"), "content", "meta.lang"):
        assert words in str(error.value)


@pytest.mark.parametrize("column", ["key", "meta.key"])
@pytest.mark.parametrize("role", ["id", "source"])
def test_another_column_that_was_asked_for_and_is_not_there_is_named(role: str, column: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x"}]))
    with pytest.raises(CorpusError, match=f"'{column}'"):
        read(tmp_path / "a.jsonl", columns={role: column})


def test_a_missing_id_is_made_from_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(lines([{"text": "x"}, {"text": ""}, {"text": "y"}]))
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "z", "id": 0}, {"text": "w", "id": None}]))
    ids = [d.id for d in read(f"{tmp_path}/**/*.jsonl") if isinstance(d, Document)]
    assert ids == ["0", "b.jsonl:2", "sub/a.jsonl:1", "sub/a.jsonl:3"]


BAD_LINES = {
    "no JSON": (b"{oops}", "malformed"),
    "cut off": (b'{"text": "abc', "malformed"),
    "a list": (b'["text"]', "malformed"),
    "a number": (b"17", "malformed"),
    "text that is a number": (b'{"text": 17}', "malformed"),
    "text that is a list": (b'{"text": ["a"]}', "malformed"),
    "nested without end": (b"[" * 100_000, "malformed"),
    "a number of 10,000 digits": (b'{"text": "x", "id": ' + b"1" * 10_000 + b"}", "malformed"),
    "bad UTF-8": (b'{"text": "\xff\xfe"}', "undecodable"),
    "half of a surrogate pair": (rb'{"text": "a\ud800b"}', "undecodable"),
    "half of a pair in the id": (rb'{"text": "a", "id": "\ud800"}', "undecodable"),
    "half of a pair in the source": (rb'{"text": "a", "source": "\ud800"}', "undecodable"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_bad_line_is_an_error_with_file_and_number(kind: str, place: int, tmp_path: Path) -> None:
    bad, reason = BAD_LINES[kind]
    good = lines(RECORDS).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*good[:place], bad + b"\n", *good[place:]]))
    with pytest.raises(CorpusError, match=rf"(?s)a\.jsonl, line {place + 1}: {reason}.*on_error: skip"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_bad_line_that_is_skipped_is_counted_and_costs_no_neighbour(kind: str, place: int, tmp_path: Path) -> None:
    bad, reason = BAD_LINES[kind]
    good = lines(RECORDS).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*good[:place], bad + b"\n", *good[place:]]))
    found = read(tmp_path / "a.jsonl", on_error="skip")
    assert found == [*DOCUMENTS[:place], Rejected(reason), *DOCUMENTS[place:]]  # type: ignore[arg-type]


def test_a_first_record_without_id_and_source_takes_none_from_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x"}, *RECORDS]))
    assert read(tmp_path / "a.jsonl") == [Document("a.jsonl:1", "x", "unknown"), *DOCUMENTS]


def test_a_source_that_is_null_or_elsewhere_in_the_first_record_is_found_in_the_others(tmp_path: Path) -> None:
    meta = {"text": "x", "source": None, "meta": {"pile_set_name": "web"}}
    records = [{"text": "x", "source": None}, {"text": "x", "source": "books"}, meta, {"text": "x", "domain": "law"}]
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    pq.write_table(pa.Table.from_pylist([{"domain": None, "meta": None} | r for r in records]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = [d.source for d in read(tmp_path / name) if isinstance(d, Document)]
        assert found == ["unknown", "books", "web", "law"]


def test_empty_text_is_counted_and_no_text_column_is_malformed(tmp_path: Path) -> None:
    records = [{"text": "x"}, {"text": ""}, {"text": None}, {"id": "only"}, {"text": "y"}]
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    found = read(tmp_path / "a.jsonl", on_error="skip")
    reasons = [record.reason for record in found if isinstance(record, Rejected)]
    assert (len(found), reasons) == (5, ["empty", "empty", "malformed"])
    with pytest.raises(CorpusError, match=r"(?s)a\.jsonl, line 4: malformed.*no such column: `text`"):
        read(tmp_path / "a.jsonl")


def test_blank_lines_are_no_records_but_have_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "x"}\n \r\n{"text": "y"}\n\n')
    assert [d.id for d in read(tmp_path / "a.jsonl") if isinstance(d, Document)] == ["a.jsonl:2", "a.jsonl:4"]
    assert len(read(tmp_path / "a.jsonl")) == 2


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_is_an_error_that_asks_for_json_lines(indent: int | None, on_error: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=indent))
    with pytest.raises(CorpusError, match=r"(?s)a\.json is one JSON array.*JSON lines"):
        read(tmp_path / "a.json", on_error=on_error)


def test_the_last_line_needs_no_end_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\r\n{"text": "y\\u2028z"}')
    assert [d.text for d in read(tmp_path / "a.jsonl") if isinstance(d, Document)] == ["x", "y\u2028z"]


NAMES = [
    "two words", "'single' \"double\"", "new\nline", "ünï 中 🙂", "100%", "a#b?c=d", "a[1]", "a*b", "{x,y}", "~me",
    "-rf", "a::b", "file:", "semi;colon & $(touch x)", "tab\there", "\\back",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_read_from_its_folder(name: str, suffix: str, tmp_path: Path) -> None:
    write = {".jsonl": write_plain, ".jsonl.gz": write_gz, ".parquet": write_parquet}[suffix]
    write(tmp_path / (name + suffix))
    assert read(tmp_path) == DOCUMENTS


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_read_when_it_is_named(name: str, tmp_path: Path) -> None:
    write_plain(tmp_path / f"{name}.jsonl")
    assert read(tmp_path / f"{name}.jsonl") == DOCUMENTS


def test_a_link_that_leads_elsewhere_is_read_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere.txt").write_bytes(lines([{"text": "x"}]))
    (tmp_path / "corpus" / "a.jsonl").symlink_to("../elsewhere.txt")
    documents = opened(tmp_path / "corpus")
    assert documents.files == ["a.jsonl"]
    assert everything(documents) == [Document("a.jsonl:1", "x", "unknown")]


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(CorpusError, match=r"a\.jsonl"):
        opened(tmp_path / "a.jsonl")


@pytest.mark.parametrize("pattern", ["nothing.jsonl", "*.jsonl", "sub/**/*.parquet"])
def test_a_pattern_without_a_file_is_an_error_with_the_pattern(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as error:
        opened(tmp_path / pattern)
    assert pattern in str(error.value)


def test_one_pattern_without_a_file_is_an_error_though_others_have_some(tmp_path: Path) -> None:
    write_plain(tmp_path / "a.jsonl")
    with pytest.raises(CorpusError, match=r"b\.jsonl"):
        opened([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_a_folder_without_a_file_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "image.png").write_bytes(b"x")
    with pytest.raises(CorpusError, match="corpus"):
        opened(tmp_path / "corpus")


@pytest.mark.parametrize("group_bytes", [1, 200, 500, 10**9])
def test_groups_have_each_file_exactly_once_and_in_order(group_bytes: int, tmp_path: Path) -> None:
    sizes = [1, 300, 20, 20, 700, 1, 1]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jsonl").write_bytes(b" " * size)
    settings = CorpusSettings(files=[f"{tmp_path}/*.jsonl", str(tmp_path / "3.jsonl")])
    groups = open_documents(settings, group_bytes).groups
    assert [name for group in groups for name in group] == [f"{n}.jsonl" for n in range(7)]
    for group in groups[:-1]:
        assert sum(sizes[int(name[0])] for name in group) >= group_bytes
        assert sum(sizes[int(name[0])] for name in group[:-1]) < group_bytes


def test_the_fingerprint_is_of_contents_and_names_and_not_of_the_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, names: Sequence[str], extra: bytes = b"") -> str:
        (tmp_path / folder).mkdir(parents=True)
        for number, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(lines([RECORDS[number]]) + extra)
        return opened(tmp_path / folder).fingerprint

    first = fingerprint("a", ["1.jsonl", "2.jsonl"])
    assert fingerprint("b/c d", ["1.jsonl", "2.jsonl"]) == first
    others = {
        fingerprint("e", ["1.jsonl", "3.jsonl"]),
        fingerprint("f", ["2.jsonl", "1.jsonl"]),
        fingerprint("g", ["1.jsonl"]),
        fingerprint("h", ["1.jsonl", "2.jsonl"], extra=b"\n"),
    }
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    "settings", [{"columns": {"text": "source"}}, {"on_error": "skip"}, {"format": "jsonl"}, {"split": "test"}]
)
def test_what_decides_which_text_comes_out_is_in_the_fingerprint(settings: dict[str, Any], tmp_path: Path) -> None:
    write_plain(tmp_path / "a.jsonl")
    assert opened(tmp_path, **settings).fingerprint != opened(tmp_path).fingerprint


def test_a_file_that_was_rewritten_has_another_fingerprint_though_hashes_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n')
    before = opened(path).fingerprint
    assert opened(path).fingerprint == before
    stat = path.stat()
    path.write_bytes(b'{"text": "y"}\n')  # as long as it was
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert opened(path).fingerprint != before


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plain(tmp_path / "a.jsonl")
    before = opened(tmp_path).fingerprint
    (tmp_path / "occupied").write_text("a file where the cache would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert opened(tmp_path / "a.jsonl").fingerprint == before


def test_the_builtin_corpus_has_to_be_written_out_first() -> None:
    with pytest.raises(CorpusError, match="snapshot"):
        open_documents(CorpusSettings(source="builtin"))
