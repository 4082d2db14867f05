"""Packing loses nothing: tokens in = tokens out + tokens left, in order, each document where it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import counted
from miniplm.packing.pack import SentenceEnds, Stream, pack, token_dtype
from miniplm.packing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = "one two three. four! five (six. seven) eight? nine\nten; 3.14 e.g. "
    return tokenizers.train([words * 20], 270)


def stream_of(sizes: list[int], separator: int, vocab: int = 270) -> Stream:
    """Documents of so many tokens (the last is the separator) whose tokens count upwards through the vocabulary."""
    stream, value = Stream(), 0
    for number, size in enumerate(sizes):
        tokens = np.array([1 + (value + i) % (vocab - 1) for i in range(size - 1)] + [separator], np.uint32)
        value += size
        stream.add(f"d{number}", tokens)
    return stream


def slow_pack(stream: Stream, length: int) -> tuple[list[list[int]], list[list[str]], list[int]]:
    """The obvious way: one token at a time."""
    flat = [(int(t), d) for d, ts in zip(stream.documents, stream.tokens, strict=True) for t in ts]
    rows, documents = [], []
    while len(flat) >= length:
        taken, flat = flat[:length], flat[length:]
        rows.append([t for t, _ in taken])
        documents.append(list(dict.fromkeys(d for _, d in taken)))
    return rows, documents, [t for t, _ in flat]


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), max_size=20), length=st.integers(2, 17))
def test_exact_packing_equals_the_slow_way(tokenizer: Tokenizer, sizes: list[int], length: int) -> None:
    stream = stream_of(sizes, tokenizer.separator)
    rows, documents, left = slow_pack(stream, length)
    instances, rest = pack(stream, "s", length, tokenizer)
    assert instances.input_ids.tolist() == rows
    assert [list(d) for d in instances.documents] == documents
    assert [int(t) for ts in rest.tokens for t in ts] == left
    assert instances.length.tolist() == [length] * len(rows)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=20),
    length=st.integers(2, 17),
    cut=st.sampled_from(["exact", "sentence"]),
)
def test_tokens_in_are_tokens_out_and_tokens_left_in_order(
    tokenizer: Tokenizer, sizes: list[int], length: int, cut: str
) -> None:
    stream = stream_of(sizes, tokenizer.separator)
    before = [int(t) for tokens in stream.tokens for t in tokens]
    ends = SentenceEnds(tokenizer) if cut == "sentence" else None
    instances, rest = pack(stream, "s", length, tokenizer, ends)
    out = [int(t) for row, n in zip(instances.input_ids, instances.length, strict=True) for t in row[:n]]
    left = [int(t) for tokens in rest.tokens for t in tokens]
    assert out + left == before
    assert len(left) < length
    assert all(n <= length for n in instances.length)
    assert all(n >= (length + 1) // 2 for n in instances.length), "an instance is at least half full"
    assert instances.n_bytes.sum() + tokenizer.token_bytes[left].sum() == tokenizer.token_bytes[before].sum()


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), splits=st.integers(1, 5), length=st.integers(2, 9))
def test_packing_in_portions_equals_packing_at_once(
    tokenizer: Tokenizer, sizes: list[int], splits: int, length: int
) -> None:
    whole, _ = pack(stream_of(sizes, tokenizer.separator), "s", length, tokenizer)
    source = stream_of(sizes, tokenizer.separator)
    waiting, rows = Stream(), []
    for number, (document, tokens) in enumerate(zip(source.documents, source.tokens, strict=True)):
        waiting.add(document, tokens)
        if number % splits == 0:
            instances, waiting = pack(waiting, "s", length, tokenizer)
            rows += instances.input_ids.tolist()
    instances, _ = pack(waiting, "s", length, tokenizer)
    assert rows + instances.input_ids.tolist() == whole.input_ids.tolist()


def test_a_document_that_spans_instances_is_named_in_each(tokenizer: Tokenizer) -> None:
    instances, rest = pack(stream_of([3, 8, 2], tokenizer.separator), "s", 4, tokenizer)
    assert [list(d) for d in instances.documents] == [["d0", "d1"], ["d1"], ["d1", "d2"]]
    assert rest.documents == ["d2"]


def test_sentences_are_cut_where_they_end_and_not_in_numbers(tokenizer: Tokenizer) -> None:
    text = "one two three four five 3.14 six seven. eight nine ten eleven twelve"
    ids = tokenizer.encode([text])[0]
    ends = SentenceEnds(tokenizer)
    assert tokenizer.decode(ids[: ends.last_cut(ids)]).endswith("seven.")
    unbroken = tokenizer.encode(["abcdefghij" * 5])[0]
    assert ends.last_cut(unbroken) == len(unbroken)


def test_the_smallest_type_that_holds_every_id() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_which_targets_count() -> None:
    ids = np.array([[5, 0, 6, 7, 0], [5, 6, 0, 0, 0]])
    length = [5, 3]
    everything = counted(ids, length, 0, "all")
    assert everything.tolist() == [[True, True, True, True], [True, True, False, False]]
    skipping = counted(ids, length, 0, "skip_after_separator")  # the token after a separator does not count
    assert skipping.tolist() == [[True, False, True, True], [True, True, False, False]]
