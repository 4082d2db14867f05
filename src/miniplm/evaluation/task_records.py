"""Records of benchmarks in files: read one by one, checked, and brought into the shape that they have on the Hub.

In: JSON lines, CSV, or WikiText's plain text. Out: records, each with the line that it begins at. A function for each
benchmark takes a record of a file to the Hub's; it raises ValueError, KeyError or TypeError if the record is none, and
the reader of the message knows file and line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from miniplm.errors import CorpusError
from miniplm.progress import printable

Record = dict[str, Any]


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of a file with the line each begins at. Raises CorpusError."""
    if path.suffix == ".txt":
        yield from _pages(path)
    elif path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                yield from ((reader.line_num, record) for record in reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise no_example(path, reader.line_num + 1, "any kind", str(error)) from error
    else:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    record = json.loads(raw)
                    raw.decode()  # json.loads guesses other encodings
                except ValueError as error:
                    raise no_example(path, line, "any kind", str(error)) from error
                if not isinstance(record, dict):
                    raise no_example(path, line, "any kind", "it is no JSON object")
                yield line, record


def _pages(path: Path) -> Iterator[tuple[int, Record]]:
    """Articles of WikiText: each begins with a line ` = Title = `."""
    page: list[str] = []
    begun = 1
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        mark = line.strip()
        if mark.startswith("= ") and not mark.startswith("= = ") and mark.endswith(" ="):
            if "".join(page).strip():
                yield begun, {"page": "\n".join(page)}
            page, begun = [], number
        page.append(line)
    if "".join(page).strip():
        yield begun, {"page": "\n".join(page)}


def no_example(path: Path, line: int, task: str, because: str) -> CorpusError:
    """The error that names file and line."""
    return CorpusError(f"line {line} of {path} is no example of {task}.", facts={"because": printable(because)})


def _pick(record: Record, **fields: Callable[[Any], Any]) -> Record:
    """These fields of a record, each checked."""
    picked = {}
    for name, check in fields.items():
        try:
            picked[name] = check(record[name])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
    return picked


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {value!r}")
    value.encode()  # half a surrogate pair is no text
    return value


def _answer(value: Any) -> str:
    """Text that can be asked for the probability of."""
    if not _text(value):
        raise ValueError("it is empty")
    return str(value)


def _number(value: Any, among: range) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) not in among:
        raise ValueError(f"expected {among[0]} to {among[-1]}, found {value!r}")
    return int(value)


def _digit(value: Any, among: range) -> str:
    return str(_number(value, among))


def _answers(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"expected two answers or more, found {value!r}")
    return [_answer(answer) for answer in value]


def _labelled(record: Record, question: str) -> Record:
    """ARC and OpenBookQA: answers with labels, one of which is the key."""
    choices = _pick(record["choices"], text=_answers, label=_answers)
    key = _text(record["answerKey"])
    if len(choices["text"]) != len(choices["label"]) or key not in choices["label"]:
        raise ValueError(f"the key {key!r} is not among the labels {choices['label']!r}")
    return {"id": str(record.get("id", "")), question: _text(record[question]), "choices": choices, "answerKey": key}


def hellaswag(record: Record) -> Record:
    """The Hub's fields, which are those of the authors' file."""
    label = partial(_digit, among=range(len(_answers(record["endings"]))))
    return _pick(record, activity_label=_text, ctx_a=_text, ctx_b=_text, endings=_answers, label=label)


def hellaswag_prepared(record: Record) -> Record:
    """What the harness's own `process_docs` would have made."""
    gold = partial(_number, among=range(len(_answers(record["choices"]))))
    found = _pick(record, query=_text, choices=_answers, gold=gold)
    return {**found, "label": str(found["gold"])}


def winogrande(record: Record) -> Record:
    """A sentence with a gap (`_`) and two options, of which one is the answer."""
    if "_" not in _text(record["sentence"]):
        raise ValueError("sentence: it has no gap (_)")
    return _pick(record, sentence=_text, option1=_text, option2=_text, answer=partial(_digit, among=range(1, 3)))


def story(record: Record) -> Record:
    """The columns of the files that the authors of StoryCloze send."""
    right = _number(record["AnswerRightEnding"], range(1, 3))
    told = {f"input_sentence_{n}": _text(record[f"InputSentence{n}"]) for n in range(1, 5)}
    ends = {f"sentence_quiz{n}": _answer(record[f"RandomFifthSentenceQuiz{n}"]) for n in (1, 2)}
    return {"story_id": str(record.get("InputStoryid", "")), **told, **ends, "answer_right_ending": right}


LAMBADA = partial(_pick, text=_answer)
SOCIAL_IQA = partial(
    _pick, context=_text, question=_text, answerA=_answer, answerB=_answer, answerC=_answer,
    label=partial(_digit, among=range(1, 4)),
)  # fmt: skip
SCIQ = partial(
    _pick, question=_text, support=_text, distractor1=_answer, distractor2=_answer, distractor3=_answer,
    correct_answer=_answer,
)  # fmt: skip
PIQA = partial(_pick, goal=_text, sol1=_answer, sol2=_answer, label=partial(_number, among=range(2)))
ARC = partial(_labelled, question="question")
OPENBOOKQA = partial(_labelled, question="question_stem")
WIKITEXT = partial(_pick, page=_text)
BLIMP_PAIR = partial(_pick, sentence_good=_answer, sentence_bad=_answer)
