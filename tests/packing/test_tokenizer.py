"""Tokenizers: text that spells a special token stays text, bytes are counted exactly, training is reproducible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from miniplm.errors import TokenizerError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.tokenizer import END_OF_TEXT

TEXTS = ["Hello, world!\n", "naïve café — 北京 🙂", "def f(x):\n    return x ** 2\n", "tabs\tand  spaces   "]
REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
CORPUS = [f"{text} {n} {n * n} {word}" for n in range(80) for text in TEXTS for word in ("alpha", "beta", "gamma")]


def test_text_that_spells_the_separator_stays_text() -> None:
    tokenizer = tokenizers.train(CORPUS, 400)
    text = f"a document that says {END_OF_TEXT} in its text"
    ids = tokenizer.encode([text])[0]
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == text


def test_bytes_of_tokens_sum_to_bytes_of_text() -> None:
    tokenizer = tokenizers.train(CORPUS, 400)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.separator] == 0


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    tokenizer = tokenizers.train(CORPUS, 400)
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.separator, again.vocab_size) == (tokenizer.separator, 400)
    assert [ids.tolist() for ids in again.encode(TEXTS)] == [ids.tolist() for ids in tokenizer.encode(TEXTS)]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_training_gives_the_same_tokenizer_whatever_the_threads(threads: str) -> None:
    script = f"from miniplm.packing import tokenizer as t;print(t.train({CORPUS!r}, 400).fingerprint)"
    environment = {**os.environ, "RAYON_NUM_THREADS": threads}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == tokenizers.train(CORPUS, 400).fingerprint


def test_too_little_text_for_the_vocabulary_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="too small") as caught:
        tokenizers.train(["aaaa"], 5000)
    assert "5,000" in str(caught.value)


def test_a_folder_without_tokenizer_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        tokenizers.load(tmp_path)


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        tokenizers.load(tmp_path)


def test_a_name_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="neither a folder here"):
        tokenizers.load("nobody/has-this-tokenizer")


def test_the_separator_can_be_named_and_must_exist(tmp_path: Path) -> None:
    tokenizers.train(CORPUS, 400).save(tmp_path)
    assert tokenizers.load(tmp_path, separator="a").token(tokenizers.load(tmp_path, separator="a").separator) == "a"
    with pytest.raises(TokenizerError, match="<nope>"):
        tokenizers.load(tmp_path, separator="<nope>")


def test_a_tokenizer_without_an_end_of_text_asks_for_one(tmp_path: Path) -> None:
    tokenizers.train(CORPUS, 400).save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="which token ends a text"):
        tokenizers.load(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizers are not part of the repository")
@pytest.mark.parametrize(
    ("name", "vocabulary", "separator"),
    [("gpt2", 50_257, 50_256), ("gpt-neox-20b", 50_277, 0), ("qwen2", 151_646, 151_643)],
)
def test_real_tokenizers_keep_text_and_count_its_bytes(name: str, vocabulary: int, separator: int) -> None:
    tokenizer = tokenizers.load(REAL / name)
    assert (tokenizer.vocab_size, tokenizer.separator) == (vocabulary, separator)
    hostile = [*TEXTS, "<|endoftext|> and <|im_start|> are text"]
    for text, ids in zip(hostile, tokenizer.encode(hostile), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.separator not in ids
        assert tokenizer.token_bytes[ids].sum() == len(unicodedata.normalize("NFC", text).encode())


def test_a_separator_that_is_not_marked_special_is_not_made_from_text_either(tmp_path: Path) -> None:
    tokenizers.train(CORPUS, 400).save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.separator not in tokenizer.encode([f"a {END_OF_TEXT} b"])[0]
