"""The stage `prepare`: each document in exactly one part, nothing lost, the same bytes for any order of work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miniplm.corpus.sources import open_documents
from miniplm.errors import ArtifactMissingError, CorpusError, CorpusTooSmallError
from miniplm.packing.instances import Packed
from miniplm.packing.prepare import Corpus, prepare
from miniplm.packing.split import part_of, parts_in
from miniplm.recipe import CorpusSettings, PrepareSettings, Split

SPLIT = {"reference": 0.2, "held_out": 0.1, "seed": 3}


def settings_of(**changes: Any) -> PrepareSettings:
    base = {"tokenizer": {"train": {"vocab_size": 280}}, "sequence_length": 31, "split": SPLIT, "block_bytes": 5_000}
    return PrepareSettings.model_validate({**base, **changes})


def make(path: Path, out: Path, *, engine: Any = None, **changes: Any) -> Corpus:
    chosen = settings_of(**changes)
    return prepare(open_documents(CorpusSettings(files=str(path)), 2_000), chosen, out, engine)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but how it came to be."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "provenance.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def texts_of(packed: Packed) -> dict[str, str]:
    """The text of each source's stream of instances, separators shown."""
    streams: dict[str, list[int]] = {}
    for row in packed.dataset:
        streams.setdefault(row["source"], []).extend(row["input_ids"][: row["length"]])
    return {source: packed.tokenizer.decode(ids) for source, ids in streams.items()}


def documents_of(packed: Packed) -> dict[str, str]:
    """The text of each document, from its pieces in the order of rows: the end of one may be far from its beginning."""
    pieces: dict[str, list[int]] = {}
    for row in packed.dataset:
        ids = np.asarray(row["input_ids"][: row["length"]])
        ends = np.flatnonzero(ids == packed.separator)
        parts = [part[part != packed.separator] for part in np.split(ids, ends + 1)]
        for document, part in zip(row["documents"], parts, strict=False):
            pieces.setdefault(document, []).extend(part.tolist())
        assert len(parts) - len(row["documents"]) in (0, 1), "each piece is of a document"
        assert len(parts) == len(row["documents"]) or not len(parts[-1])
    return {document: packed.tokenizer.decode(ids) for document, ids in pieces.items()}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 60), min_size=80, max_size=160), block_bytes=st.integers(300, 6_000))
def test_each_document_comes_out_once_or_is_left_over(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block_bytes: int
) -> None:
    """Each document's text is put together from what came out, not from what the manifest says."""
    folder = tmp_path_factory.mktemp("marks")
    with (folder / "c.jsonl").open("w") as file:
        for n, size in enumerate(sizes):
            record = {"id": f"d{n}", "text": f"<{n}>" + " a" * size, "source": f"s{n % 2}"}
            file.write(json.dumps(record) + "\n")
    split = {"reference": 0.3, "held_out": 0.3}
    corpus = make(
        folder / "c.jsonl", folder / "corpus", sequence_length=7, split=split, block_bytes=block_bytes,
        tokenizer={"train": {"vocab_size": 258}},
    )  # fmt: skip
    found: dict[str, str] = {}
    left = 0
    for part, counts in corpus.manifest.counts["parts"].items():
        for document, text in documents_of(corpus.part(part)).items():
            assert document not in found, "a document is in one part"
            found[document] = text
        left += counts["leftover_tokens"]
    incomplete = [n for n, size in enumerate(sizes) if found.get(f"d{n}") != f"<{n}>" + " a" * size]
    for n in incomplete:  # what is left over is the end of a stream: whole documents, or the end of one
        assert (f"<{n}>" + " a" * sizes[n]).startswith(found.get(f"d{n}", ""))
    assert sum(len(found.get(f"d{n}", "")) for n in range(len(sizes))) + 4 * left >= sum(
        len(f"<{n}>" + " a" * size) for n, size in enumerate(sizes)
    )
    assert left < 8 * 6
    assert len(incomplete) <= left


@pytest.mark.parametrize("cut", ["exact", "sentence"])
def test_every_document_is_in_exactly_one_part_and_no_token_is_lost(
    tmp_path: Path, jsonl: Callable[..., Path], cut: str
) -> None:
    path = jsonl(documents=300)
    corpus = make(path, tmp_path / "corpus", cut=cut)
    counts = corpus.manifest.counts
    records = {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
    seen: Counter[str] = Counter()
    for part, found in counts["parts"].items():
        packed = corpus.part(part)
        mine = {i for i in records if part_of(i, Split(**SPLIT)) == part}
        assert found["documents"] == len(mine)
        assert found["tokens_in"] == found["tokens_out"] + found["leftover_tokens"]
        assert found["tokens_out"] == sum(packed.dataset["length"])
        assert found["instances"] == len(packed) == sum(found["sources"].values())
        named = {d for documents in packed.dataset["documents"] for d in documents}
        assert named <= mine
        seen.update(mine)
        lengths = {
            i: len(ids) + 1
            for i, ids in zip(mine, packed.tokenizer.encode([records[i]["text"] for i in mine]), strict=True)
        }
        assert found["tokens_in"] == sum(lengths.values())
        assert sum(lengths[i] for i in mine - named) <= found["leftover_tokens"], "only leftovers are in no instance"
    assert seen == Counter(records.keys())
    assert counts["documents"] == len(records)


def test_the_text_comes_out_as_it_went_in(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(documents=60, sources=2)
    corpus = make(path, tmp_path / "corpus", block_bytes=10**9)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for source, text in texts_of(corpus.pool).items():
        whole = "".join(
            r["text"] + "<|endoftext|>"
            for r in records
            if r["source"] == source and part_of(r["id"], Split(**SPLIT)) == "pool"
        )
        assert whole.startswith(text)
        assert len(whole) - len(text) < 200, "less than an instance is left over"


def test_an_instance_never_mixes_sources(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(documents=200, sources=4)
    corpus = make(path, tmp_path / "corpus")
    source_of = {r["id"]: r["source"] for r in map(json.loads, path.read_text().splitlines())}
    for row in corpus.pool.dataset:
        assert {source_of[d] for d in row["documents"]} == {row["source"]}


class Backwards:
    """An engine whose workers finish in another order."""

    def run(
        self, make_worker: Callable[[Any], Any], items: Iterable[Any], advance: Callable[[int], None]
    ) -> Iterator[Any]:
        return map(make_worker(advance), reversed(list(items)))


def test_the_bytes_do_not_depend_on_the_order_of_work(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    for number in range(5):
        jsonl(f"in-{number}.jsonl", documents=40, seed=number)
    make(tmp_path / "in-*.jsonl", tmp_path / "forwards")
    make(tmp_path / "in-*.jsonl", tmp_path / "backwards", engine=Backwards())
    assert tree(tmp_path / "forwards") == tree(tmp_path / "backwards")
    assert len(tree(tmp_path / "forwards")) > 10


def test_the_parts_open_with_datasets_as_they_are(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    corpus = make(jsonl(), tmp_path / "corpus")
    loaded = datasets.load_from_disk(str(tmp_path / "corpus" / "pool"))
    assert loaded.column_names == ["input_ids", "length", "n_bytes", "source", "documents"]
    assert loaded.features["input_ids"].length == 32
    assert loaded.features["input_ids"].feature.dtype == "uint16"
    chosen = corpus.pool.select([3, 1, 2])
    assert isinstance(chosen, datasets.Dataset)
    assert chosen[0] == corpus.pool.dataset[3]


def test_another_share_for_the_reference_moves_no_held_out_document() -> None:
    small, large = Split(reference=0.1, held_out=0.1), Split(reference=0.5, held_out=0.1)
    ids = [f"d{n}" for n in range(2000)]
    assert [i for i in ids if part_of(i, small) == "held_out"] == [i for i in ids if part_of(i, large) == "held_out"]


@settings(max_examples=30, deadline=None)
@given(reference=st.floats(0, 0.4), teacher=st.floats(0, 0.3), held_out=st.floats(0, 0.2), seed=st.integers(0, 2**32))
def test_parts_get_about_their_shares(reference: float, teacher: float, held_out: float, seed: int) -> None:
    split = Split(reference=reference, teacher=teacher, held_out=held_out, seed=seed)
    found = Counter(part_of(f"doc {n}", split) for n in range(2000))
    for part, share in (("reference", reference), ("teacher", teacher), ("held_out", held_out)):
        assert abs(found[part] / 2000 - share) < 6 * (0.25 / 2000) ** 0.5
    assert set(found) <= set(parts_in(split))


def test_the_trained_tokenizer_never_sees_held_out_documents(tmp_path: Path) -> None:
    secret = "ʘ‿ʘ"
    with (tmp_path / "c.jsonl").open("w") as file:
        for n in range(400):
            text = f"{secret} " * 50 if part_of(f"d{n}", Split(**SPLIT)) == "held_out" else "plain words here. " * 10
            file.write(json.dumps({"id": f"d{n}", "text": text}) + "\n")
    corpus = make(tmp_path / "c.jsonl", tmp_path / "corpus", tokenizer={"train": {"vocab_size": 262}})
    assert not any(secret[0] in corpus.tokenizer.decode([i]) for i in range(262))


def test_empty_malformed_and_undecodable_documents_are_counted(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(documents=200)
    with path.open("ab") as file:
        file.write(b'{"text": ""}\n{"text": null}\nnot json\n{"text": "\xff"}\n{"text": "\\ud800"}\n[]\n')
    documents = open_documents(CorpusSettings(files=str(path), on_error="skip"))
    counts = prepare(documents, settings_of(), tmp_path / "corpus").manifest.counts
    assert (counts["documents"], counts["empty"], counts["malformed"], counts["undecodable"]) == (200, 2, 2, 2)


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    documents = open_documents(CorpusSettings(files=str(tmp_path / "c.jsonl")))
    with pytest.raises(CorpusError, match="no documents"):
        prepare(documents, settings_of(tokenizer={"train": {"vocab_size": 258}}), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_corpus_too_small_for_the_split_names_the_empty_parts(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(CorpusTooSmallError, match="held_out") as caught:
        make(jsonl(documents=40), tmp_path / "corpus", split={"reference": 0.5, "held_out": 0.001})
    assert "sequence_length" in str(caught.value)


def test_a_part_without_a_share_is_not_there(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    corpus = make(jsonl(), tmp_path / "corpus")
    with pytest.raises(ArtifactMissingError, match="teacher"):
        _ = corpus.teacher
