"""The text of instances under another tokenizer: the same bytes, whatever they are."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from miniplm.errors import TokenizerError
from miniplm.packing import tokenizer as our_tokenizers
from miniplm.packing.retokenize import Retokenizer
from miniplm.packing.tokenizer import Tokenizer

WORDS = [
    "the cat sat on the mat, the cat sat",
    "naïve café, “quoted” text…",
    "日本語のテキスト 🙂🙂",
    "def f(x):\n    return x\n",
]


def trained(vocab_size: int, texts: list[str]) -> Tokenizer:
    return our_tokenizers.train(texts * 20, vocab_size)


OURS = trained(300, WORDS)
THEIRS = trained(280, WORDS[::-1])


def lossy() -> Tokenizer:
    """A tokenizer that lowers the case of what it reads."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, 2)


def spelt(tokenizer: Tokenizer, ids: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
    """The bytes of each document of an instance."""
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.separator))
    return [b"".join(tokenizer.spelling[i] for i in piece.tolist()) for piece in pieces]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(max_size=30) | st.sampled_from(WORDS), min_size=1, max_size=4), cut=st.data())
def test_documents_keep_their_bytes_also_where_a_character_is_cut(texts: list[str], cut: st.DataObject) -> None:
    whole = np.concatenate([np.append(ids, np.uint32(OURS.separator)) for ids in OURS.encode(texts)])
    begin = cut.draw(st.integers(0, len(whole) - 1))
    end = cut.draw(st.integers(begin + 1, len(whole)))
    ids = whole[begin:end]
    (found,) = Retokenizer(OURS, THEIRS)([ids])
    assert spelt(THEIRS, found) == spelt(OURS, ids)
    assert THEIRS.token_bytes[found].sum() == OURS.token_bytes[ids].sum()


def test_text_that_spells_a_special_token_is_text() -> None:
    (ids,) = OURS.encode(["a <|endoftext|> b"])
    (found,) = Retokenizer(OURS, THEIRS)([ids])
    assert THEIRS.separator not in found
    assert spelt(THEIRS, found) == [b"a <|endoftext|> b"]


def test_a_byte_level_tokenizer_reads_what_is_there_not_what_its_normaliser_makes_of_it() -> None:
    normalising = Tokenizer(tokenizers.Tokenizer.from_str(THEIRS.backend.to_str()), THEIRS.separator)
    normalising.backend.normalizer = tokenizers.normalizers.NFC()
    decomposed = "cafe\u0301"
    (ids,) = OURS.encode([decomposed])
    (found,) = Retokenizer(OURS, normalising)([ids])
    assert spelt(THEIRS, found) == [decomposed.encode()]


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match="changes the text"):
        Retokenizer(OURS, lossy())(OURS.encode(["A b"]))


def test_a_packed_tokenizer_that_does_not_say_its_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="not byte-level"):
        Retokenizer(lossy(), OURS)


def test_a_tokenizer_with_more_special_tokens_reads_the_same_ids() -> None:
    more = Tokenizer(tokenizers.Tokenizer.from_str(OURS.backend.to_str()), OURS.separator)
    more.backend.add_special_tokens(["<|im_start|>"])
    assert OURS.differing_token(more) is None
    assert more.differing_token(OURS) is None
    assert OURS.differing_token(THEIRS) is not None
