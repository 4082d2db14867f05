"""Documents packed each by itself: every token where it has to be, the same ones drawn however the files are cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers as huggingface

from conftest import write_jsonl
from miniplm import artifact
from miniplm.corpus.sources import open_documents
from miniplm.errors import CorpusError
from miniplm.packing import documents as packing
from miniplm.packing.instances import Packed, counted
from miniplm.packing.tokenizer import Tokenizer, train
from miniplm.recipe import DocumentSetSettings

T = 8
LENGTHS = (2, 3, T - 1, T, T + 1, T + 2, 2 * T, 2 * T + 1, 2 * T + 2, 5 * T + 3)  # tokens, the separator among them


@pytest.fixture(scope="module")
def byte_by_byte() -> Tokenizer:
    """A tokenizer whose tokens are single bytes, so that lengths can be read off the text."""
    return train(["a"], 257)


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    return train(["the teacher reads the corpus and the student reads the corpus"] * 20, 280)


def write(path: Path, texts: Iterable[str]) -> Path:
    lines = (json.dumps({"id": f"d{n}", "text": text, "source": f"s{n % 2}"}) for n, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n")
    return path


def pack(files: Path | str, tokenizer: Tokenizer, out: Path, **settings: Any) -> Packed:
    chosen = DocumentSetSettings.model_validate({"files": str(files), **settings})
    documents = open_documents(chosen, 500)
    what = packing.identity(documents.fingerprint, tokenizer.fingerprint, T, chosen)
    return packing.pack_documents(documents, tokenizer, T, chosen, out, what)


def tokens_of(text: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode([text])[0].tolist(), tokenizer.separator]


def rows_of(packed: Packed) -> dict[str, list[list[int]]]:
    """The tokens of each document's instances, without padding, in the order of rows."""
    found: dict[str, list[list[int]]] = {}
    for row in packed.dataset:
        (document,) = row["documents"]
        found.setdefault(document, []).append(row["input_ids"][: row["length"]])
    return found


def texts(path: Path) -> dict[str, str]:
    return {record["id"]: record["text"] for record in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    """A document of each of `LENGTHS`, under `byte_by_byte`."""
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 3
    return write(tmp_path / "lengths.jsonl", (alphabet[n : n + length - 1] for n, length in enumerate(LENGTHS)))


def test_the_beginning_of_each_document_is_its_instance_and_what_is_cut_off_is_counted(
    lengths: Path, byte_by_byte: Tokenizer, tmp_path: Path
) -> None:
    packed = pack(lengths, byte_by_byte, tmp_path / "packed")
    expected = {name: [tokens_of(text, byte_by_byte)[: T + 1]] for name, text in texts(lengths).items()}
    assert rows_of(packed) == expected
    counts = packed.manifest.counts
    assert counts["tokens_in"] == sum(LENGTHS) == counts["tokens_out"] + counts["cut_tokens"]
    assert counts["cut_tokens"] == sum(max(0, length - T - 1) for length in LENGTHS)
    assert counts["documents"] == counts["instances"] == len(packed) == len(LENGTHS)
    assert counts["sources"] == {"s0": 5, "s1": 5}


def test_of_a_whole_document_every_token_but_the_first_is_predicted_once_after_the_one_before_it(
    lengths: Path, byte_by_byte: Tokenizer, tmp_path: Path
) -> None:
    """The obvious way: one prediction after the other, T to a window."""
    packed = pack(lengths, byte_by_byte, tmp_path / "packed", windows="all")
    found = rows_of(packed)
    for length, (name, text) in zip(LENGTHS, texts(lengths).items(), strict=True):
        tokens = tokens_of(text, byte_by_byte)
        expected: list[list[int]] = []
        for position in range(1, len(tokens)):
            if position % T == 1:
                expected.append([tokens[position - 1]])
            expected[-1].append(tokens[position])
        assert found[name] == expected, length
        assert [token for window in found[name] for token in window[1:]] == tokens[1:]
    counts = packed.manifest.counts
    assert counts["tokens_in"] == sum(LENGTHS)
    assert counts["tokens_out"] == sum(len(window) for windows in found.values() for window in windows)
    assert counts["tokens_out"] - len(packed) == sum(LENGTHS) - len(LENGTHS), "targets"
    assert counts["cut_tokens"] == 0


@pytest.mark.parametrize("windows", ["first", "all"])
def test_short_instances_are_padded_with_the_separator_and_the_padding_is_no_target(
    lengths: Path, byte_by_byte: Tokenizer, tmp_path: Path, windows: str
) -> None:
    packed = pack(lengths, byte_by_byte, tmp_path / "packed", windows=windows)
    for row in packed.dataset:
        assert len(row["input_ids"]) == T + 1
        assert set(row["input_ids"][row["length"] :]) <= {packed.separator}
        assert row["n_bytes"] == sum(token != packed.separator for token in row["input_ids"][: row["length"]])
        targets = counted(np.array([row["input_ids"]]), [row["length"]], packed.separator, "all")
        assert targets.sum() == row["length"] - 1
        assert row["length"] >= 2, "an instance has something to predict"


def test_the_first_instance_is_the_same_with_both_windows(merging: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 20, words=12)
    first = rows_of(pack(path, merging, tmp_path / "first"))
    whole = rows_of(pack(path, merging, tmp_path / "all", windows="all"))
    assert {name: windows[:1] for name, windows in whole.items()} == first


def test_datasets_opens_the_folder_and_the_text_comes_back(merging: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 12, words=10)
    packed = pack(path, merging, tmp_path / "packed", windows="all")
    loaded = datasets.load_from_disk(str(tmp_path / "packed"))
    assert loaded.column_names == ["input_ids", "length", "n_bytes", "source", "documents"]
    assert packed.tokenizer.fingerprint == merging.fingerprint
    for name, windows in rows_of(packed).items():
        ids = windows[0][:1] + [token for window in windows for token in window[1:]]
        assert merging.decode(ids) == texts(path)[name] + "<|endoftext|>"


def test_text_that_spells_the_separator_is_text(merging: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ["a<|endoftext|>b", "<|endoftext|>", "plain"])
    packed = pack(path, merging, tmp_path / "packed", windows="all")
    for name, windows in rows_of(packed).items():
        ids = windows[0][:1] + [token for window in windows for token in window[1:]]
        assert [n for n, token in enumerate(ids) if token == packed.separator] == [len(ids) - 1]
        assert merging.decode(ids[:-1]) == texts(path)[name]


def cut(path: Path, folder: Path, pieces: int) -> str:
    """The same lines in several files."""
    lines, folder = path.read_text().splitlines(keepends=True), folder / f"in-{pieces}"
    folder.mkdir()
    for number in range(pieces):
        share = lines[number * len(lines) // pieces : (number + 1) * len(lines) // pieces]
        (folder / f"{number:02}.jsonl").write_text("".join(share))
    return str(folder / "*.jsonl")


def test_the_same_documents_are_drawn_however_the_files_are_cut_and_in_the_order_of_the_corpus(
    byte_by_byte: Tokenizer, tmp_path: Path
) -> None:
    path, wanted = write_jsonl(tmp_path / "c.jsonl", 60, words=4), 7
    by_hash = sorted(texts(path), key=lambda name: hashlib.sha256(f"3\0{name}".encode()).digest())
    expected = [name for name in texts(path) if name in by_hash[:wanted]]
    found = [
        pack(cut(path, tmp_path, pieces), byte_by_byte, tmp_path / f"out-{pieces}", documents=wanted, seed=3)
        for pieces in (1, 3, 11)
    ]
    assert [list(rows_of(packed)) for packed in found] == [expected] * 3
    assert rows_of(found[0]) == rows_of(found[1]) == rows_of(found[2])
    assert found[0].manifest.counts == found[1].manifest.counts == found[2].manifest.counts
    other = pack(path, byte_by_byte, tmp_path / "other", documents=wanted, seed=4)
    assert list(rows_of(other)) != expected


def test_of_fewer_documents_than_are_wanted_all_are_taken(byte_by_byte: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 9, words=4)
    for number, wanted in enumerate((9, 10, None)):
        packed = pack(path, byte_by_byte, tmp_path / f"{number}", documents=wanted)
        assert list(rows_of(packed)) == list(texts(path))


def test_a_larger_draw_holds_the_smaller_one(byte_by_byte: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 40, words=4)
    drawn = [set(rows_of(pack(path, byte_by_byte, tmp_path / f"{n}", documents=n))) for n in (5, 6, 20)]
    assert drawn[0] < drawn[1] < drawn[2]


def test_documents_of_one_id_are_both_candidates(byte_by_byte: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": "same", "text": text}) + "\n" for text in ("one", "two", "three")))
    packed = pack(path, byte_by_byte, tmp_path / "packed", documents=2)
    assert [byte_by_byte.decode(ids[:-1]) for ids in rows_of(packed)["same"]] == ["one", "two"]


def test_what_decides_the_instances_is_in_the_identity_and_nothing_else() -> None:
    def fingerprint(of: str = "d", tokenizer: str = "t", length: int = T, **settings: Any) -> str:
        chosen = DocumentSetSettings.model_validate({"files": "x", **settings})
        return packing.identity(of, tokenizer, length, chosen).fingerprint

    different = [
        fingerprint(), fingerprint("other"), fingerprint(tokenizer="other"), fingerprint(length=T + 1),
        fingerprint(windows="all"), fingerprint(documents=5), fingerprint(documents=6),
        fingerprint(documents=5, seed=1),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert fingerprint(seed=5) == fingerprint(seed=6), "nothing is drawn"
    assert fingerprint(documents=5, files=["x", "y"]) == fingerprint(documents=5), "contents count, not paths"


def test_two_runs_have_the_same_bytes_in_any_number_of_shards(
    merging: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 23, words=12)
    one, again = (pack(path, merging, tmp_path / name, windows="all") for name in ("one", "again"))
    for name in artifact.read(tmp_path / "one").files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    monkeypatch.setattr(packing, "_SHARD_DOCUMENTS", 5)
    many = pack(path, merging, tmp_path / "many", windows="all")
    assert len(many.shards) == 5
    assert list(many.dataset) == list(one.dataset) == list(again.dataset)


def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(
    merging: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_SHARD_DOCUMENTS", 5)
    path = write_jsonl(tmp_path / "c.jsonl", 23, words=12)
    pack(path, merging, tmp_path / "undisturbed")
    written = []

    def stop(path: Path, instances: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        real(path, instances)

    real = packing.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(path, merging, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    pack(path, merging, tmp_path / "packed")
    files = artifact.read(tmp_path / "undisturbed").files
    assert artifact.read(tmp_path / "packed").files == files
    for name in files:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


BAD = b'{"text": ""}\n{"text": null}\nnot json\n{"text": "\xff"}\n'


def test_what_gives_no_document_is_counted_or_an_error(byte_by_byte: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 10, words=4)
    with path.open("ab") as file:
        file.write(BAD)
    counts = pack(path, byte_by_byte, tmp_path / "packed", on_error="skip").manifest.counts
    assert (counts["documents"], counts["empty"], counts["malformed"], counts["undecodable"]) == (10, 2, 1, 1)
    with pytest.raises(CorpusError, match=r"c\.jsonl"):
        pack(path, byte_by_byte, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_set_without_documents_is_an_error_that_says_what_was_left_out(
    byte_by_byte: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_bytes(BAD)
    for wanted in (None, 3):
        with pytest.raises(CorpusError, match="no documents to measure on") as error:
            pack(tmp_path / "c.jsonl", byte_by_byte, tmp_path / f"{wanted}", on_error="skip", documents=wanted)
        for reason in ("empty", "malformed", "undecodable"):
            assert reason in str(error.value)
        assert not (tmp_path / f"{wanted}").exists()


def test_a_document_of_which_the_normaliser_leaves_nothing_is_an_empty_one(
    byte_by_byte: Tokenizer, tmp_path: Path
) -> None:
    """It has nothing to predict, and an instance without targets is an error when it is scored."""
    backend = huggingface.Tokenizer.from_str(byte_by_byte.backend.to_str())
    backend.normalizer = huggingface.normalizers.Strip()
    strict = Tokenizer(backend, byte_by_byte.separator)
    path = write(tmp_path / "c.jsonl", ["   ", "word", "\n\n"])
    for windows in ("first", "all"):
        packed = pack(path, strict, tmp_path / windows, windows=windows)
        assert list(rows_of(packed)) == ["d1"]
        assert (packed.manifest.counts["empty"], packed.manifest.counts["documents"]) == (2, 1)
    with pytest.raises(CorpusError, match=r"(?s)no documents.*without tokens +1"):
        pack(write(tmp_path / "blank.jsonl", ["  "]), strict, tmp_path / "blank")
