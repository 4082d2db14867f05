"""What is asked of a completions server for one row, and what its answer says: requests, answers, and text.

In: the ids of a row and which targets count; the JSON of an answer. Out: the JSON of a request, in vLLM's dialect or in
that of `echo`; log p of each token of the row but the first, in nats, float64.

Promised: an answer is used only if it has a log-probability for each of our tokens, and these are our tokens, as
strictly as the answer lets one see it: by id where ids come back, else by spelling. What does not fit is an error that
names the row. A text is made of a row only if its tokenizer makes the same ids of it again.

Not covered: asking, which `line` does. A token that is a part of a character has no spelling to compare; such tokens
are counted. Whether a server is one token late can be seen only where it tells the likeliest tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import ScoreError, TokenizerError
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import printable
from miniplm.recipe import ServerModel

Dialect = Literal["vllm", "echo"]
Prompt = list[int] | str

_WHOSE = "the server's answer"
_NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity, which JSON does not have
_ROUNDING = 1e-3  # nats above 0 that a sum of rounded numbers may come to


def needed(tokens: NDArray[Any], counted: NDArray[np.bool_]) -> list[int]:
    """The ids of a row up to its last counted target; what follows cannot move the sum."""
    last = np.flatnonzero(counted)[-1:]
    return [int(i) for i in tokens[: int(last[0]) + 2]] if len(last) else []


def checked(values: Sequence[object], ids: Sequence[int], whose: str) -> NDArray[np.float64]:
    """Log-probabilities of the tokens of a row but the first, `[t]`.

    Raises:
        ScoreError: one of them is no number, infinite, or above 0.

    """
    for place, value in enumerate(values, start=1):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not _NO_PROBABILITY < value <= _ROUNDING:  # type: ignore[operator]  # NaN is refused here too
            raise unusable(whose, ids, f"log p of token {place} is {value!r}, not a finite number below 0")
    return np.array(values, np.float64)


def unusable(whose: str, ids: Sequence[int], problem: str, **facts: object) -> ScoreError:
    """The error for an answer that does not fit the row that was asked for."""
    row = f"row of {len(ids):,} tokens beginning {' '.join(map(str, ids[:8]))}"
    return ScoreError(f"{whose} cannot be used: {problem}.", facts={"for": row, **facts})


# --- requests and answers


def request(model: ServerModel, dialect: Dialect, prompt: Prompt) -> dict[str, Any]:
    """What asks for the log-probabilities of a prompt."""
    body: dict[str, Any] = {"model": model.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    if dialect == "echo":
        return body | {"echo": True, "logprobs": 1}  # servers differ on what 0 means
    return body | {"prompt_logprobs": 0, "return_token_ids": True, "add_special_tokens": False}


def choice_of(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one completion of an answer. Raises ScoreError if it has none, or several."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ScoreError(
            "the server's answer is no completion.",
            facts={"found": printable(json.dumps(answer), 160), "expected": "one entry in `choices`"},
        )
    return choices[0]


def read_prompt_logprobs(
    answer: Mapping[str, Any], ids: list[int], as_text: bool, spelling: Spelling | None
) -> NDArray[np.float64]:
    """Log p of the tokens but the first from vLLM's `prompt_logprobs`, whose entries are filed under token ids."""
    choice = choice_of(answer)
    entries, theirs = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
    if not isinstance(entries, list):
        raise unusable(_WHOSE, ids, "it has no `prompt_logprobs`", remedy="another `dialect` may fit this server")
    begin = 1 if as_text and len(entries) == len(ids) + 1 else 0  # a BOS that the server has put in front
    if len(entries) != len(ids) + begin:
        raise _wrong_count(ids, len(entries))
    if isinstance(theirs, list) and theirs[begin:] != ids:
        raise _other_tokens(ids, theirs[begin:])
    values: list[object] = []
    said: list[object] = []
    for place, token in enumerate(ids[1:], start=1):
        entry = entries[begin + place]
        found = entry.get(str(token)) if isinstance(entry, dict) else None
        if not isinstance(found, dict):
            there = ", ".join(entry) if isinstance(entry, dict) else entry
            raise unusable(_WHOSE, ids, f"at token {place} it tells of another token", found=there, expected=token)
        values.append(found.get("logprob"))
        said.append(found.get("decoded_token"))
    if spelling is not None and (other := spelling.foreign(said, ids[1:])) is not None:
        raise unusable(_WHOSE, ids, "the model has another vocabulary", found=other[0], expected=other[1])
    return checked(values, ids, _WHOSE)


def read_echo(
    answer: Mapping[str, Any], ids: list[int], as_text: bool, spelling: Spelling | None
) -> NDArray[np.float64]:
    """Log p of the tokens but the first from an echoed prompt; what was generated after it is left out."""
    choice = choice_of(answer)
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(logprobs, dict) or not isinstance(values, list):
        raise unusable(_WHOSE, ids, "it has no `logprobs.token_logprobs`")
    prompt_tokens, generated = _usage(answer)
    if prompt_tokens not in ((None, len(ids), len(ids) + 1) if as_text else (None, len(ids))):
        raise _wrong_count(ids, prompt_tokens)
    if len(values) < len(ids):
        raise _wrong_count(ids, len(values))
    said = _spelt(choice, logprobs, len(values))
    if as_text and (said is None or spelling is None):
        raise unusable(_WHOSE, ids, "it spells no tokens, so whose log-probabilities these are cannot be seen")
    # A BOS in front is echoed or not; if it is, its own entry is the one without a number.
    begins = [0, 1] if as_text and prompt_tokens != len(ids) and len(values) > len(ids) else [0]
    if said is not None and spelling is not None:
        there = {begin: spelling.difference(said[begin : begin + len(ids)], ids) for begin in begins}
        begins = [begin for begin in begins if there[begin] is None]
        if not begins:
            place, found = next(iter(there.values())) or (0, "")
            expected = printable(repr(spelling.of(ids[place])), 60)
            raise unusable(
                _WHOSE, ids, f"token {place} is another one", found=printable(repr(found), 60), expected=expected
            )
    if len(begins) > 1:
        raise unusable(_WHOSE, ids, "whether the server has put a token in front cannot be seen")
    begin = begins[0]
    if len(values) > begin + len(ids) + generated:
        raise _wrong_count(ids, len(values) - generated)
    if said is not None and spelling is not None:
        spelling.count(ids)
    return checked(values[begin + 1 : begin + len(ids)], ids, _WHOSE)


def _usage(answer: Mapping[str, Any]) -> tuple[int | None, int]:
    """Tokens of the prompt, None if the answer does not say, and tokens generated; 1 was asked for."""
    usage = answer.get("usage")
    found = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, generated = (value if isinstance(value, int) else None for value in found)
    return prompt, 1 if generated is None else generated


def _spelt(choice: Mapping[str, Any], logprobs: Mapping[str, Any], entries: int) -> list[str] | None:
    """How the answer spells its tokens: as it says, or as its offsets cut its text; None if it says neither."""
    tokens, offsets, text = logprobs.get("tokens"), logprobs.get("text_offset"), choice.get("text")
    if isinstance(tokens, list) and len(tokens) == entries:
        return [str(token) for token in tokens]
    if isinstance(offsets, list) and len(offsets) == entries and all(isinstance(offset, int) for offset in offsets):
        text = text if isinstance(text, str) else ""
        return [text[begin:end] for begin, end in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    return None


def _wrong_count(ids: list[int], found: object) -> ScoreError:
    error = "it does not have a log-probability for each token"
    hint = "the server tokenises otherwise, cuts long prompts, or drops special tokens"
    return unusable(_WHOSE, ids, error, found=f"{found} tokens", expected=f"{len(ids):,} tokens", perhaps=hint)


def _other_tokens(ids: list[int], theirs: list[Any]) -> ScoreError:
    place = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
    found, expected = theirs[place : place + 1], ids[place : place + 1]
    return unusable(_WHOSE, ids, f"token {place} is another one", found=found, expected=expected)


def trials(ids: list[int]) -> list[Prompt]:
    """Prompts that differ in their second and last token only."""
    lasts = list(dict.fromkeys([*ids[1:], 0, 1, 2]))[:3]
    return [[ids[0], last] for last in lasts]


def check_alignment(answers: list[Mapping[str, Any]], place: int | None, url: str) -> None:
    """Raise ScoreError if the entry of a token is computed after the token was read, not before.

    What a model expects at a place does not depend on the token that is there: where the prompts differ for the first
    time, at `place` if it is known, the likeliest token and its log p are the same, but for the noise of batches.
    Where the answers do not say which token is the likeliest, there is nothing to see.
    """
    seen = [found for answer in answers if (found := _tokens_and_tops(answer)) is not None]
    if place is None:
        columns = zip(*(tokens for tokens, _ in seen), strict=False)
        place = next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)
    likeliest = []
    for tokens, tops in seen:
        own, top = (tokens[place], tops[place]) if min(len(tokens), len(tops)) > place > 0 else ("", None)
        if own and "\ufffd" not in own and isinstance(top, dict):  # else another token may have its name
            numbers = [(value, token) for token, value in top.items() if isinstance(value, float)]
            likeliest += [max(numbers)] if numbers else []
    if len(likeliest) < 2:
        return
    spread = max(likeliest)[0] - min(likeliest)[0]
    same_token = len({token for _, token in likeliest}) == 1
    if spread > (0.2 if same_token else 0.05):  # nats; assumed: bfloat16 in other batches moves log p by less
        raise ScoreError(
            "the server gives the log-probability of a token after that token, not before it.",
            facts={
                "server": url,
                "seen": "what it expects at a place changes with the token that is there: "
                + ", ".join(f"{printable(repr(token), 20)} {value:.2f}" for value, token in likeliest),
            },
            remedy="llama-cpp-python does so for models whose tokenizer puts no BOS in front; use another server.",
        )


def _tokens_and_tops(answer: Mapping[str, Any]) -> tuple[list[str], list[Any]] | None:
    logprobs = choice_of(answer).get("logprobs")
    found = [logprobs.get(name) if isinstance(logprobs, dict) else None for name in ("tokens", "top_logprobs")]
    if not all(isinstance(values, list) for values in found):
        return None
    return [str(token) for token in found[0] or []], found[1] or []


# --- text


def text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text that a server will make these very ids of, special tokens as they are spelt.

    Raises:
        ScoreError: there is none; before anything is asked, and paid, for it.

    """
    text = tokenizer.decode(ids)
    separator = tokenizer.token(tokenizer.separator)
    special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    pieces = text.split(separator)
    again: list[int] = []
    for number, encoded in enumerate(tokenizer.encode(pieces)):
        again += [tokenizer.separator] * bool(number) + encoded.tolist()
    if again != ids or any(token in piece for token in special for piece in pieces):
        place = next((i for i, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), min(len(ids), len(again)))
        raise unusable(
            "the text of a row",
            ids,
            f"its tokenizer makes other tokens of it, from token {place} on",
            text=printable(tokenizer.decode(ids[max(place - 4, 0) : place + 4]), 60),
            perhaps="the row begins or ends inside a character, or the text spells a special token; `send: ids` "
            "has no such limits",
        )
    return text


class Spelling:
    """Compares the strings that a server shows for tokens with the tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.unreadable = 0
        self._known: dict[int, tuple[frozenset[str], bool]] = {}

    def of(self, token: int) -> str:
        """How the vocabulary spells it."""
        return self.tokenizer.token(token)

    def difference(self, said: list[str], ids: list[int]) -> tuple[int, str] | None:
        """The first place where a string cannot be our token's, and the string."""
        for place, (string, token) in enumerate(zip(said, ids, strict=True)):
            spellings, is_part = self._spellings(token)
            if not is_part and string not in spellings and string != f"token_id:{token}":
                return place, string
        return None

    def foreign(self, said: Sequence[object], ids: Sequence[int]) -> tuple[str, str] | None:
        """What was said and what was expected, if most tokens are spelt otherwise; servers differ on single ones."""
        others = []
        compared = 0
        for string, token in zip(said, ids, strict=True):
            spellings, is_part = self._spellings(token)
            if isinstance(string, str) and string and not is_part and "\ufffd" not in string:
                compared += 1
                if not {string, string.strip()} & {*spellings, *(spelt.strip() for spelt in spellings)}:
                    others.append((printable(repr(string), 40), printable(repr(self.of(token)), 40)))
        return others[0] if len(others) > compared / 2 else None

    def count(self, ids: list[int]) -> None:
        """Count the tokens of a row that no string can tell."""
        self.unreadable += sum(self._spellings(token)[1] for token in ids)

    def _spellings(self, token: int) -> tuple[frozenset[str], bool]:
        """The strings that servers may show for a token; True if it is a part of a character, which has none."""
        if token not in self._known:
            self._known[token] = self._look(token)
        return self._known[token]

    def _look(self, token: int) -> tuple[frozenset[str], bool]:
        raw = self.of(token)
        added = self.tokenizer.backend.get_added_tokens_decoder().get(token)
        if added is not None:
            return frozenset({raw, ""} if added.special else {raw}), False
        try:
            text = self.tokenizer.spelling[token].decode()
        except UnicodeDecodeError:
            return frozenset({raw}), True
        except TokenizerError:  # not byte-level
            plain = raw.replace("▁", " ")
            return frozenset({raw, plain, plain.lstrip(" ")}), raw.startswith("<0x")
        return frozenset({raw, text}), False
