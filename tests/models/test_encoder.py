"""Sentence encoders: the mean over tokens by a loop, in any batch, and nothing loaded that could run code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from miniplm.errors import ModelError
from miniplm.models.encoder import SentenceEncoder, load_encoder

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "dog", "[", "]", "cls", "sep"]
TEXTS = [
    "the cat",
    "a dog sat on the mat",
    "",
    "the the the",
    "the cat",
    "mat " * 100,
    "\x00 </script>",
    "[SEP] a [CLS]",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniLM-shaped encoder with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    write_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(TOKENS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return load_encoder(str(folder), device="cpu", batch=3)


def slow_encode(folder: Path, encoder: SentenceEncoder, text: str) -> np.ndarray:
    model = AutoModel.from_pretrained(folder).eval()
    ids = encoder.tokenizer(text)["input_ids"]
    ids = [*ids[:23], 3] if len(ids) > 24 else ids  # [SEP] stays last
    with torch.inference_mode():
        states = model(torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
    mean = sum(states) / len(states)
    return mean / sum(mean**2) ** 0.5


def test_a_vector_is_the_mean_of_a_texts_states_at_unit_length(folder: Path, encoder: SentenceEncoder) -> None:
    found = encoder.encode(TEXTS)
    assert found.shape == (len(TEXTS), 32)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    for vector, text in zip(found, TEXTS, strict=True):
        assert vector == pytest.approx(slow_encode(folder, encoder, text), abs=1e-5)
    assert encoder.name == str(folder)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_batch_and_the_order_change_nothing(folder: Path, encoder: SentenceEncoder, batch: int) -> None:
    other = load_encoder(str(folder), device="cpu", batch=batch).encode(TEXTS[::-1])[::-1]
    assert np.abs(other - encoder.encode(TEXTS)).max() < 1e-5


def test_long_texts_are_cut_to_the_models_positions(encoder: SentenceEncoder) -> None:
    assert encoder.max_tokens == 24
    assert encoder.encode(["mat " * 100, "mat " * 22]) == pytest.approx(encoder.encode(["mat " * 22] * 2), abs=1e-6)


def test_what_spells_a_special_token_is_text(encoder: SentenceEncoder) -> None:
    ids = encoder.tokenizer("[SEP] a")["input_ids"]
    spelt = [TOKENS.index(token) for token in ("[CLS]", "[", "sep", "]", "a", "[SEP]")]
    assert ids == spelt


def test_no_texts_are_no_vectors(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 32)


def test_pickles_and_empty_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(AutoModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors"):
        load_encoder(str(tmp_path), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "empty"), device="cpu")


def test_a_name_that_is_nowhere_is_an_error_without_the_network() -> None:
    with pytest.raises(ModelError, match="nobody/no-such-encoder"):
        load_encoder("nobody/no-such-encoder", device="cpu")
