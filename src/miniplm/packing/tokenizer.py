"""Tokenizers: any fast Hugging Face tokenizer, by name, by folder, or trained here.

In: `TokenizerSettings`. Out: a `Tokenizer`: text to ids and back, the separator token, bytes per token, a fingerprint
of the vocabulary and rules. Text that spells a special token is text: `<|endoftext|>` in a document becomes
the tokens of its characters, never the control token.
Not covered: slow (Python) tokenizers and SentencePiece models without a `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from miniplm.errors import TokenizerError
from miniplm.recipe import TokenizerSettings

END_OF_TEXT = "<|endoftext|>"
_FILES = ("tokenizer.json", "tokenizer_config.json")
_USUAL_SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the token that stands between documents.

    Attributes:
        backend: the Rust tokenizer.
        separator: id of the token after every document (the end of text).

    """

    backend: Any
    separator: int

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that can come out."""
        return max(self.vocabulary.values()) + 1

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token, as the vocabulary spells it -> id."""
        return dict(self.backend.get_vocab(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides which ids a text gets, and of the separator."""
        rules = json.loads(self.backend.to_str())
        for how in ("truncation", "padding"):
            rules.pop(how, None)
        canonical = json.dumps([rules, self.separator], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def byte_level(self) -> bool:
        """Whether every token spells its bytes, so that `spelling` is to be had."""
        return _has(self.backend.decoder, "ByteLevel")

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """UTF-8 bytes of text that each id stands for, `[vocab_size]`; 0 for special tokens.

        Summed over a document's ids this is the length of the text as the tokenizer's normaliser left it.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        added = set(self.backend.get_added_tokens_decoder())
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if self.byte_level and i not in added:
                sizes[i] = len(token)  # one character of the byte-level alphabet is one byte
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[i] = 1  # a SentencePiece byte token
            else:
                sizes[i] = len(token.replace("▁", " ").encode())
        return sizes

    @cached_property
    def spelling(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for, `[vocab_size]`; empty for special tokens.

        Raises:
            TokenizerError: the tokenizer is not byte-level; its tokens do not say exactly which text they were.

        """
        if not self.byte_level:
            raise TokenizerError(
                "the text of these tokens cannot be told exactly: the tokenizer is not byte-level.",
                remedy="Prepare the corpus with a byte-level tokenizer (GPT-2's, Qwen's, Llama 3's, one trained here).",
            )
        byte_of = {character: bytes([byte]) for byte, character in enumerate(_byte_level_alphabet())}
        spelt = [b""] * self.vocab_size
        added = self.backend.get_added_tokens_decoder()
        for token, i in self.vocabulary.items():
            if i in added:
                spelt[i] = b"" if added[i].special else added[i].content.encode()
            else:
                spelt[i] = b"".join(byte_of[character] for character in token)
        return tuple(spelt)

    @cached_property
    def byte_ids(self) -> tuple[int | None, ...]:
        """The id of each single byte, `[256]`; None where the vocabulary has none."""
        alphabet = _byte_level_alphabet()
        spelt = (f"<0x{byte:02X}>" if "<0x00>" in self.vocabulary else alphabet[byte] for byte in range(256))
        return tuple(self.vocabulary.get(token) for token in spelt)

    @cached_property
    def unspeakable(self) -> NDArray[np.bool_]:
        """Which ids are no text, `[vocab_size]`: special tokens but the separator, and gaps in the vocabulary."""
        found = np.ones(self.vocab_size, np.bool_)
        found[list(self.vocabulary.values())] = False
        found[[i for i, token in self.backend.get_added_tokens_decoder().items() if token.special]] = True
        found[self.separator] = False
        return found

    def verbatim(self) -> Tokenizer:
        """The same tokenizer without its normaliser, if it is byte-level: what it encodes, it then encodes exactly."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if _has(backend.decoder, "ByteLevel"):
            backend.normalizer = None
        return _finish(backend, self.separator)

    def differing_token(self, theirs: Tokenizer) -> str | None:
        """A token that means something else to `theirs`; None if it can read our ids.

        Special tokens that only one of the two has do not matter, but the separator does.
        """
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        special.discard(self.token(self.separator))
        ids = theirs.vocabulary
        for token, i in self.vocabulary.items():
            if ids.get(token) != i and token not in special:
                return token
        return None

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without separators; the Rust tokenizer's threads share the batch."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; separators and other special tokens are shown as they are spelt."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def token(self, token_id: int) -> str:
        """How the vocabulary spells an id."""
        return str(self.backend.id_to_token(token_id))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers.PreTrainedTokenizerFast` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.encode_special_tokens = False
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        self.backend.encode_special_tokens = True
        separator = self.token(self.separator)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": separator, "pad_token": separator,
            "clean_up_tokenization_spaces": False, "model_max_length": int(1e30),
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(name: Path | str, revision: str | None = None, separator: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder, a `tokenizer.json`, or the Hub.

    Args:
        name: folder, file or Hub id.
        revision: branch, tag or commit on the Hub.
        separator: the token between documents; None takes the tokenizer's own end of text.

    Raises:
        TokenizerError: it cannot be found, or has no end of text that could be told from its files.

    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = {n: path / n for n in _FILES if (path / n).is_file()}
    elif path.is_file():
        files = {"tokenizer.json": path}
    else:
        files = _download(str(name), revision)
    if "tokenizer.json" not in files:
        raise TokenizerError(
            f"{name} has no tokenizer.json.",
            facts={"found": ", ".join(sorted(p.name for p in path.iterdir())[:8])} if path.is_dir() else {},
            remedy="Only fast tokenizers can be used; transformers writes the file: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...).",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(files["tokenizer.json"]))
    except Exception as error:  # the Rust side raises bare Exception
        raise TokenizerError(f"{files['tokenizer.json']} is no tokenizer.", facts={"because": error}) from error
    try:
        config = json.loads(files["tokenizer_config.json"].read_bytes()) if "tokenizer_config.json" in files else {}
    except ValueError as error:
        raise TokenizerError(f"{files['tokenizer_config.json']} is not JSON.", facts={"because": error}) from error
    loaded = _finish(backend, _separator_id(backend, separator, config, str(name)))
    if loaded.separator in loaded.encode([f"x{loaded.token(loaded.separator)}x"])[0]:
        # an added token that is not marked special: make it one, or text that spells it would become it
        backend.add_special_tokens([loaded.token(loaded.separator)])
        loaded = _finish(backend, loaded.separator)
    return loaded


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens, the separator `<|endoftext|>` included as id 0.

    The same texts give the same tokenizer, whatever the number of threads.

    Raises:
        TokenizerError: the texts have too few different pairs for so many merges.

    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((texts,) if isinstance(texts, str) else texts, trainer)
    tokenizer = _finish(backend, _separator_id(backend, END_OF_TEXT, {}, "the new tokenizer"))
    if tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            "the corpus is too small to train the tokenizer.",
            facts={"vocabulary asked for": f"{vocab_size:,}", "reached": f"{tokenizer.vocab_size:,}"},
            remedy="Lower prepare.tokenizer.train.vocab_size, or bring more text.",
        )
    return tokenizer


def from_settings(settings: TokenizerSettings) -> Tokenizer:
    """Load the tokenizer that the settings name (not one that is to be trained)."""
    assert settings.name is not None
    return load(settings.name, settings.revision, settings.separator)


def _byte_level_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's), `[256]`."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _finish(backend: Any, separator: int) -> Tokenizer:
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # special tokens spelt in a text are text
    return Tokenizer(backend, separator)


def _separator_id(backend: Any, wanted: str | None, config: dict[str, Any], name: str) -> int:
    if wanted is None:
        eos = config.get("eos_token")
        wanted = eos.get("content") if isinstance(eos, dict) else eos
    if wanted is not None:
        if (found := backend.token_to_id(wanted)) is None:
            raise TokenizerError(f"{name} has no token {wanted!r}.", remedy="Name another one as `separator`.")
        return int(found)
    special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    for usual in _USUAL_SEPARATORS:
        if usual in special:
            return int(special[usual])
    raise TokenizerError(
        f"{name} does not say which token ends a text.",
        facts={"special tokens": ", ".join(special) or "none"},
        remedy="Name one: `tokenizer: {name: ..., separator: ...}`.",
    )


def _download(name: str, revision: str | None) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    files = {}
    for file in _FILES:
        try:
            files[file] = Path(hf_hub_download(name, file, revision=revision))
        except Exception as error:  # offline, no such repository, no access, a name that is no name
            there_is_none = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if there_is_none or file != _FILES[0]:
                continue
            raise TokenizerError(
                f"the tokenizer {name!r} is neither a folder here nor to be had from the Hub.",
                facts={"because": str(error).strip().splitlines()[0]},
            ) from error
    return files


def _has(part: Any, kind: str) -> bool:
    """Whether a component of a tokenizer is, or contains, one of this kind."""
    return part is not None and f'"type":"{kind}"' in json.dumps(json.loads(part.__getstate__()), separators=(",", ":"))
