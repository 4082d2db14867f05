"""Retokenising: each document's text comes through byte for byte, once, however it was cut, chosen and worked on."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers as rust
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import miniplm
from conftest import WORDS, write_jsonl
from miniplm import artifact
from miniplm.artifact import Identity
from miniplm.corpus.sources import Document, open_documents
from miniplm.errors import ArtifactMismatchError, CorpusTooSmallError, RecipeError, TokenizerError
from miniplm.packing import repack
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import TOKENIZER, Instances, Packed, dataset_files, open_packed, read_shard, write_shard
from miniplm.packing.pack import SentenceEnds, Stream, concatenate, pack, token_dtype
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import CorpusSettings, RetokenizeSettings

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = ("qwen2", "gpt-neox-20b", "gpt2")

TEXTS = ["the cat sat on the mat. ", "naïve café, “quoted” text…", "日本語のテキスト 🙂🙂", "def f(x):\n    return x\n"]
OURS = tokenizers.train([*TEXTS, " ".join(WORDS)] * 20, 300)
THEIRS = tokenizers.train([" ".join(WORDS), *TEXTS[::-1]] * 20, 330)
LETTERS = tokenizers.train(["zz zz zz"], 258)  # a token for each byte, and one for zz

Written = Sequence[tuple[str, str, str]]  # (id, source, text)


def packed_of(
    folder: Path,
    shards: Sequence[Written],
    *,
    length: int = 8,
    tokenizer: Tokenizer = OURS,
    sentences: bool = False,
    what: Identity | None = None,
) -> Packed:
    """Documents packed as `prepare` does it: a shard for each list, and one for what they leave over."""
    ends = SentenceEnds(tokenizer) if sentences else None
    left: defaultdict[str, Stream] = defaultdict(Stream)
    whole: list[list[Instances]] = []
    for documents in [*shards, None]:
        streams: defaultdict[str, Stream] = defaultdict(Stream)
        for name, source, text in documents or ():
            streams[source].add(name, np.append(tokenizer.encode([text])[0], np.uint32(tokenizer.separator)))
        whole.append([])
        for source, stream in (left if documents is None else streams).items():
            instances, rest = pack(stream, source, length + 1, tokenizer, ends)
            whole[-1].append(instances)
            for name, tokens in zip(rest.documents, rest.tokens, strict=True) if documents else ():
                left[source].add(name, tokens)
    made = [concatenate(parts) for parts in whole if sum(map(len, parts))]

    def work(workspace: artifact.Workspace) -> dict[str, Any]:
        tokenizer.save(workspace.path / TOKENIZER)
        names = [f"part-{number}.arrow" for number in range(len(made))]
        for name, instances in zip(names, made, strict=True):
            write_shard(workspace.path / name, instances)
        files = dataset_files(names, length + 1, token_dtype(tokenizer.vocab_size), str(folder))
        for name, content in files.items():
            workspace.write_json(name, content)
        return {
            "tokens_out": sum(int(instances.length.sum()) for instances in made), "sequence_length": length,
            "vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator,
        }  # fmt: skip

    artifact.make(folder, what or Identity("packed", 1, {"part": "pool"}, {"corpus": "c"}), work)
    return open_packed(folder)


def some_documents(number: int, *, seed: int, sources: int = 2) -> Written:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices([*WORDS, *TEXTS], k=draw.randint(1, 12))) for _ in range(number)]
    return [(f"{seed}-{n}", f"s{draw.randrange(sources)}", text) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Five shards of two sources."""
    return packed_of(tmp_path_factory.mktemp("repack") / "pool", [some_documents(12, seed=seed) for seed in range(4)])


def again(
    packed: Packed,
    out: Path,
    rows: Sequence[int] | None = None,
    *,
    tokenizer: Tokenizer = THEIRS,
    length: int | None = None,
    engine: Any = None,
) -> Packed:
    """The stage, and what is promised whatever it works on."""
    how = RetokenizeSettings.model_validate({"tokenizer": "given", "sequence_length": length})
    chosen = None if rows is None else np.array(rows, np.int64)
    what = repack.identity(how, tokenizer.fingerprint, {"data": f"{packed.fingerprint}{rows}"})
    made = repack.retokenize(packed, chosen, tokenizer, how, out, what, engine)
    counts = made.manifest.counts
    assert counts["tokens_in"] == counts["tokens_out"] + counts["leftover_tokens"]
    assert counts["tokens_out"] == sum(made.dataset["length"])
    assert set(made.dataset["length"]) == {made.sequence_length + 1}, "never padded"
    assert counts["instances"] == len(made)
    assert counts["sources"] == dict(Counter(made.dataset["source"]))
    assert counts["bytes_in"] == counts["bytes_out"] >= sum(made.dataset["n_bytes"])
    assert made.dataset["n_bytes"][:] == [len(b"".join(pieces_of(row, tokenizer))) for row in made.dataset]
    assert made.tokenizer.fingerprint == counts["tokenizer"] == tokenizer.fingerprint
    assert list(artifact.verify(out)) == []
    return made


def pieces_of(row: dict[str, Any], tokenizer: Tokenizer) -> list[bytes]:
    ids = np.array(row["input_ids"][: row["length"]])
    return [
        b"".join(tokenizer.spelling[i] for i in piece.tolist())
        for piece in np.split(ids, np.flatnonzero(ids == tokenizer.separator))
    ]


def plain_ids(text: bytes, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text, by a tokenizer without normaliser; what is no character, byte by byte."""
    try:
        return tokenizer.encode([text.decode()])[0].tolist()
    except UnicodeDecodeError as error:
        before = tokenizer.encode([text[: error.start].decode()])[0].tolist()
        stray = tokenizer.byte_ids[text[error.start]]
        assert stray is not None
        return [*before, stray, *plain_ids(text[error.start + 1 :], tokenizer)]


def expected(packed: Packed, rows: Iterable[int], theirs: Tokenizer, length: int) -> tuple[dict[str, Any], int]:
    """The slow and obvious way: the rows of each source as lists of ids, and the tokens that are left over."""
    rows, first, theirs = set(rows), 0, theirs.verbatim()
    ours = packed.tokenizer
    made: defaultdict[str, list[list[int]]] = defaultdict(list)
    left: defaultdict[str, list[int]] = defaultdict(list)
    for shard in packed.shards:
        instances = read_shard(shard)
        for source in sorted(set(instances.source)):
            texts, goes_on = [], False
            for row in (n for n, its in enumerate(instances.source) if its == source):
                if first + row not in rows:
                    goes_on = False
                    continue
                ids = instances.input_ids[row][: instances.length[row]]
                pieces = pieces_of({"input_ids": ids.tolist(), "length": len(ids)}, ours)
                if goes_on:
                    texts[-1] += pieces.pop(0)
                texts += pieces
                goes_on = True  # the last piece is empty where a separator is last: what comes next begins it
            ids = [i for text in texts if text for i in (*plain_ids(text, theirs), theirs.separator)]
            whole = len(ids) // (length + 1) * (length + 1)
            made[source] += [ids[n : n + length + 1] for n in range(0, whole, length + 1)]
            left[source] += ids[whole:]
        first += len(instances)
    for source, ids in left.items():
        whole = len(ids) // (length + 1) * (length + 1)
        made[source] += [ids[n : n + length + 1] for n in range(0, whole, length + 1)]
        left[source] = ids[whole:]
    return {source: found for source, found in made.items() if found}, sum(map(len, left.values()))


def found(packed: Packed) -> dict[str, list[list[int]]]:
    """The rows of each source as lists of ids."""
    rows: defaultdict[str, list[list[int]]] = defaultdict(list)
    for row in packed.dataset:
        rows[row["source"]].append(row["input_ids"])
    return dict(rows)


def check_against_the_obvious(packed: Packed, out: Path, rows: Sequence[int] | None, **how: Any) -> Packed:
    made = again(packed, out, rows, **how)
    theirs = how.get("tokenizer", THEIRS)
    which = range(len(packed)) if rows is None else rows
    instances, left = expected(packed, which, theirs, how.get("length") or packed.sequence_length)
    assert found(made) == instances
    assert made.manifest.counts["leftover_tokens"] == left
    return made


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != artifact.PROVENANCE]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# The text


def test_pieces_that_follow_each_other_are_one_and_others_are_apart(tmp_path: Path) -> None:
    documents = [("d", "s", "abcdefghijkl"), ("e", "s", "mno"), ("f", "s", "pq")]
    packed = packed_of(tmp_path / "in", [documents], length=3, tokenizer=LETTERS)
    there = [b"/".join(pieces_of(row, LETTERS)).decode() for row in packed.dataset]
    assert there == ["abcd", "efgh", "ijkl", "/mno", "/pq/"]

    def made(name: str, rows: list[int]) -> tuple[str, dict[str, Any]]:
        packed_again = again(packed, tmp_path / name, rows, tokenizer=LETTERS, length=2)
        text = b"".join(b"/".join(pieces_of(row, LETTERS)) for row in packed_again.dataset)
        return text.decode(), dict(packed_again.manifest.counts)

    text, counts = made("all", [0, 1, 2, 3, 4])
    assert text == "abcdefghijkl/mno/p"
    assert (counts["pieces"], counts["joined_instances"], counts["cut_pieces"]) == (3, 4, 0)
    assert (counts["tokens_in"], counts["leftover_tokens"], counts["bytes_in"]) == (20, 2, 17)
    text, counts = made("gap", [0, 2])
    assert text == "abcd/ijkl"
    assert (counts["pieces"], counts["joined_instances"], counts["cut_pieces"]) == (2, 0, 2)
    assert (counts["tokens_in"], counts["leftover_tokens"], counts["bytes_in"]) == (10, 1, 8)
    assert (counts["instances_in"], counts["of"]) == (2, 5)
    text, counts = made("an end alone", [1, 3])
    assert text == "efgh/mno/"
    assert counts["tokens_in"] == 9


def test_documents_of_an_instance_are_named_piece_by_piece(tmp_path: Path) -> None:
    documents = [("d", "s", "abcdefghijklmno"), ("e", "s", "pqrst")]
    packed = packed_of(tmp_path / "in", [documents], length=3, tokenizer=LETTERS)
    made = again(packed, tmp_path / "out", [0, 2, 4], tokenizer=LETTERS, length=13)
    assert made.dataset["documents"][:] == [["d", "d", "e"]]
    assert pieces_of(made.dataset[0], LETTERS) == [b"abcd", b"ijkl", b"pqrs"]


@pytest.mark.parametrize("length", [2, 5, None, 100])
@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.7, None])
def test_the_instances_are_those_of_the_obvious_way(
    tmp_path: Path, length: int | None, sentences: bool, share: float | None
) -> None:
    shards = [some_documents(12, seed=seed) for seed in range(3)]
    packed = packed_of(tmp_path / "in", shards, length=12, sentences=sentences)
    if sentences:
        assert min(packed.dataset["length"]) < 13
    draw = random.Random(1)
    rows = None if share is None else sorted(draw.sample(range(len(packed)), int(share * len(packed))))
    made = check_against_the_obvious(packed, tmp_path / "out", rows, length=length)
    texts = {name: text.encode() for documents in shards for name, _, text in documents}
    for row in made.dataset:
        pieces = pieces_of(row, THEIRS)
        assert len(pieces) - len(row["documents"]) == (row["input_ids"][-1] == THEIRS.separator)
        for document, piece in zip(row["documents"], pieces, strict=False):
            assert piece in texts[document]


NASTY = ["\r\n\x00\u2028", "e\u0301\u0301", "🏳️‍🌈👩‍👩‍👧", "\ufeff\u202e", "<|endoftext|>", "ﷺ", "  \t", "İı", "𐍈" * 9]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(min_size=1, max_size=40) | st.sampled_from(NASTY) | st.sampled_from(TEXTS), min_size=2, max_size=8
    ),
    draw=st.data(),
)
def test_whatever_the_text_is_and_wherever_its_characters_are_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("nasty")
    documents = [(f"d{n}", f"s{n % 2}", text) for n, text in enumerate([*texts, "a text of some length " * 3])]
    length = draw.draw(st.integers(2, 6), "T")
    packed = packed_of(folder / "in", [documents[:3], documents[3:]], length=length, tokenizer=LETTERS)
    rows = sorted(draw.draw(st.sets(st.integers(0, len(packed) - 1), min_size=min(6, len(packed))), "rows"))
    check_against_the_obvious(packed, folder / "out", rows, length=2)


def test_characters_are_whole_again_where_the_cut_pieces_meet(tmp_path: Path) -> None:
    packed = packed_of(tmp_path / "in", [[("d", "s", "日本語🙂" * 5)]], length=3, tokenizer=LETTERS)
    made = again(packed, tmp_path / "out", length=2)
    (plain,) = THEIRS.encode(["日本語🙂" * 4])
    assert np.array(made.dataset["input_ids"][:]).flatten().tolist()[: len(plain)] == plain.tolist()


def test_what_was_retokenised_can_be_once_more(pool: Packed, tmp_path: Path) -> None:
    there = again(pool, tmp_path / "there", range(0, len(pool), 3), length=5)
    check_against_the_obvious(there, tmp_path / "back", None, tokenizer=OURS, length=4)


@pytest.mark.parametrize("recipe", [{"share": 0.5, "seed": 0}, {"temperature": 1.0}])
def test_rows_that_were_drawn_or_rewritten_are_not_joined_though_they_name_the_same_document(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    what = Identity("packed", 1, recipe, {"packed": "p"})
    packed = packed_of(tmp_path / "in", [[("d", "s", "abcdefghijkl")]], length=3, tokenizer=LETTERS, what=what)
    made = again(packed, tmp_path / "out", tokenizer=LETTERS, length=4)
    assert [b"/".join(pieces_of(row, LETTERS)) for row in made.dataset] == [b"abcd/", b"efgh/", b"ijkl/"]


def test_more_pieces_than_documents_are_of_the_last_one(tmp_path: Path) -> None:
    ids = LETTERS.encode(["ab"])[0].tolist()
    row = [*ids, LETTERS.separator, *ids, LETTERS.separator, *ids]
    packed = packed_of(
        tmp_path / "in", [[("d", "s", "abcdefghij")]], length=7, tokenizer=LETTERS, what=Identity("packed", 1, {}, {})
    )
    packed.shards[0].unlink()
    length, n_bytes = np.array([[8], [6]], np.int32)
    write_shard(packed.shards[0], Instances(np.array([row], np.uint16), length, n_bytes, ["s"], [["d"]]))
    made = again(packed, tmp_path / "out", tokenizer=LETTERS, length=8)
    assert made.dataset["documents"][:] == [["d", "d", "d"]]


# Real text and tokenizers


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """200 documents of many domains: their texts, and the corpus that each of the real tokenizers makes of them."""
    if not (SHARED / "minipile").is_dir():
        pytest.skip("needs the shared corpus")
    folder = tmp_path_factory.mktemp("real")
    files = CorpusSettings.model_validate(
        {"files": str(SHARED / "minipile" / "valid.jsonl.zst"), "columns": {"source": "meta.source"}}
    )
    documents = open_documents(files)
    every = itertools.islice(documents.read_file(documents.files[0]), 0, 1800, 9)
    texts = {f"d{n}": d for n, d in enumerate(every) if isinstance(d, Document)}
    with (folder / "c.jsonl").open("w") as file:
        for name, document in texts.items():
            file.write(json.dumps({"id": name, "text": document.text[:6_000], "source": document.source}) + "\n")
    corpora = {
        name: miniplm.prepare(
            folder / "c.jsonl",
            tokenizer=str(SHARED / "tokenizers" / name),
            sequence_length=127,
            split={"held_out": 0.0, "reference": 0.0},
            out=folder / name,
        )
        for name in REAL
    }
    return {"texts": {name: d.text[:6_000] for name, d in texts.items()}, "corpora": corpora}


def text_of_documents(packed: Packed) -> dict[str, bytes]:
    """The bytes of each document, of a part with one shard."""
    assert len(packed.shards) == 1
    texts: defaultdict[str, bytes] = defaultdict(bytes)
    for row in packed.dataset:
        for document, piece in zip(row["documents"], pieces_of(row, packed.tokenizer), strict=False):
            texts[document] += piece
    return texts


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(REAL, 2)))
def test_real_documents_come_through_byte_for_byte(
    real: dict[str, Any], tmp_path: Path, ours: str, theirs: str
) -> None:
    pool = real["corpora"][ours].pool
    tokenizer = real["corpora"][theirs].tokenizer
    made = again(pool, tmp_path / "all", tokenizer=tokenizer)
    before, after = text_of_documents(pool), text_of_documents(made)
    whole = [name for name, text in after.items() if text == real["texts"][name].encode()]
    sources = len(made.manifest.counts["sources"])
    assert len(after) - len(whole) <= 2 * sources, "all but those that the end of a source cuts, here or there"
    assert all(before[name].startswith(text) for name, text in after.items())
    assert sum(map(len, after.values())) == sum(made.dataset["n_bytes"])
    rows = sorted(random.Random(0).sample(range(len(pool)), len(pool) // 2))
    check_against_the_obvious(pool, tmp_path / "half", rows, tokenizer=tokenizer, length=63)


# How it is worked on


class Shuffled:
    """An engine whose items are done in another order, each by a worker of its own that was sent as bytes."""

    def run(
        self, make_worker: Callable[[Any], Any], items: Iterable[Any], advance: Callable[[int], None]
    ) -> Iterator[Any]:
        items = pickle.loads(pickle.dumps(list(items)))
        random.Random(2).shuffle(items)
        return (pickle.loads(pickle.dumps(make_worker))(advance)(item) for item in items)


def test_the_bytes_do_not_depend_on_the_order_of_work(pool: Packed, tmp_path: Path) -> None:
    rows = list(range(0, len(pool), 2))
    assert len(pool.shards) == 5
    once = again(pool, tmp_path / "a", rows, length=5)
    other = again(pool, tmp_path / "b", rows, length=5, engine=Shuffled())
    assert contents(once.path) == contents(other.path)
    assert {"part-00000.arrow", "part-00004.arrow", "remainders.arrow"} <= set(once.manifest.counts["shards"])


@pytest.mark.parametrize("moment", ["write_shard", "write_ledger", "read_ledgers", "dataset_files"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    pool: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = contents(again(pool, tmp_path / "whole", length=5).path)
    function = getattr(repack, moment)
    calls: list[bool] = []

    def dies(*given: Any, **named: Any) -> Any:
        calls.append(len(calls) % 2 == 0)
        result = function(*given, **named)
        if calls[-1]:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(repack, moment, dies)
    for _ in range(30):
        if (tmp_path / "killed").exists():
            break
        try:
            again(pool, tmp_path / "killed", length=5)
        except KeyboardInterrupt:
            continue
    assert contents(tmp_path / "killed") == whole
    assert sum(calls) == {"write_shard": 6, "write_ledger": 5}.get(moment, 1)


def test_a_shard_that_is_done_is_not_done_again(pool: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    call = repack._Worker.__call__

    def dies(self: Any, task: Any) -> None:
        if len(done) == 3:
            done.append("dead")
            raise KeyboardInterrupt
        call(self, task)
        done.append(task.name)

    monkeypatch.setattr(repack._Worker, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        again(pool, tmp_path / "out")
    again(pool, tmp_path / "out")
    assert done == ["00000", "00001", "00002", "dead", "00003", "00004"]


def test_progress_is_told_in_the_tokens_there_were(pool: Packed, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching:
        def run(self, make_worker: Callable[[Any], Any], items: Iterable[Any], advance: Any) -> Iterator[Any]:
            return map(make_worker(seen.append), items)

    again(pool, tmp_path / "out", [0, 3, 5], length=2, engine=Watching())
    assert seen == [9, 9, 9]


def test_what_it_is_depends_on_the_data_the_tokenizer_and_the_length(pool: Packed, tmp_path: Path) -> None:
    made = again(pool, tmp_path / "out")
    assert made.manifest.identity.kind == "packed"
    assert made.manifest.identity.inputs["tokenizer"] == THEIRS.fingerprint
    others = [again(pool, tmp_path / "l", length=5), again(pool, tmp_path / "t", tokenizer=OURS)]
    others.append(again(pool, tmp_path / "r", list(range(1, len(pool)))))
    assert len({p.fingerprint for p in [made, *others]}) == 4
    assert len({p.dataset._fingerprint for p in [made, *others]}) == 4, "`datasets` caches by it"
    with pytest.raises(ArtifactMismatchError):
        again(pool, tmp_path / "out", length=5)


# What it can be used for


def test_it_is_a_packed_part_like_any_other_also_beside_another_tokenizer(tmp_path: Path) -> None:
    corpus = miniplm.prepare(
        write_jsonl(tmp_path / "c.jsonl", 60, sources=2),
        tokenizer={"train": {"vocab_size": 300}},
        sequence_length=31,
        split={"reference": 0.1, "held_out": 0.1},
        out=tmp_path / "corpus",
    )
    made = again(corpus.pool, tmp_path / "corpus" / "other", list(range(0, len(corpus.pool), 2)), length=15)
    assert (tmp_path / "corpus" / "tokenizer").is_dir()
    assert open_packed(tmp_path / "corpus" / "other").tokenizer.fingerprint == THEIRS.fingerprint
    loaded = datasets.load_from_disk(str(made.path))
    assert loaded.column_names == corpus.pool.dataset.column_names
    assert loaded.features["input_ids"].length == 16
    assert set(corpus.pool.manifest.counts) - {"documents", "text_bytes"} <= set(made.manifest.counts)


@pytest.mark.slow
def test_a_student_of_the_other_tokenizer_is_trained_on_it(pool: Packed, tmp_path: Path) -> None:
    made = again(pool, tmp_path / "data", length=15)
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    how: dict[str, Any] = {"tokens": 60, "batch_tokens": 30, "learning_rate": 1e-3, "precision": "float32"}
    model = miniplm.train(config, made, out=tmp_path / "model", **how)
    assert THEIRS.differing_token(tokenizers.load(model.path)) is None


# Errors


@pytest.mark.parametrize("rows", [[], [3, 2], [1, 1], [-1, 2], [0, 10_000]])
def test_rows_that_are_none_of_the_instances_are_refused(pool: Packed, tmp_path: Path, rows: list[int]) -> None:
    with pytest.raises(RecipeError, match="strictly increasing"):
        again(pool, tmp_path / "out", rows)


def test_text_for_less_than_one_instance_is_refused(pool: Packed, tmp_path: Path) -> None:
    with pytest.raises(CorpusTooSmallError, match="501 of one source"):
        again(pool, tmp_path / "out", [0], length=500)


def test_a_tokenizer_that_changes_the_text_is_refused(pool: Packed, tmp_path: Path) -> None:
    backend = rust.Tokenizer(rust.models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="a"))
    backend.add_special_tokens(["<eos>"])
    with pytest.raises(TokenizerError, match="changes the text"):
        again(pool, tmp_path / "out", tokenizer=Tokenizer(backend, 2))


@pytest.mark.parametrize("strange", [258, 600])
def test_a_token_without_text_is_refused(tmp_path: Path, strange: int) -> None:
    more = Tokenizer(rust.Tokenizer.from_str(LETTERS.backend.to_str()), LETTERS.separator)
    more.backend.add_special_tokens(["<|im_start|>"])
    packed = packed_of(tmp_path / "in", [[("d", "s", "abcdefgh")]], length=3, tokenizer=more)
    there = read_shard(packed.shards[0])
    ids = there.input_ids.copy()
    ids[1, 2] = strange
    instances = Instances(ids, there.length, there.n_bytes, there.source, there.documents)
    packed.shards[0].unlink()
    write_shard(packed.shards[0], instances)
    with pytest.raises(TokenizerError, match=f"(?s)special token.*{strange}"):
        again(packed, tmp_path / "out")


def test_text_that_does_not_come_back_is_no_silent_loss(
    pool: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = repack.Retokenizer.encode
    monkeypatch.setattr(repack.Retokenizer, "encode", lambda self, texts: [ids[:-1] for ids in encode(self, texts)])
    with pytest.raises(TokenizerError, match="not what it was"):
        again(pool, tmp_path / "out")
