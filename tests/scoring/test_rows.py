"""Rows: each target of each instance once, documents apart where asked, batches within their budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, Qwen2Config

from miniplm.errors import ArtifactDamagedError
from miniplm.packing.instances import Instances, counted
from miniplm.recipe import Compute, Counted, GivenModel, ScoreSettings
from miniplm.recipe import Documents as DocumentsRule
from miniplm.scoring.huggingface import load
from miniplm.scoring.instances import score_instances
from miniplm.scoring.journal import Journal
from miniplm.scoring.rows import RowRule, batches

SEPARATOR = 0
VOCAB = 50
T = 40


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def instances(ids: NDArray[Any], length: list[int] | None = None) -> Instances:
    lengths = np.array(length or [ids.shape[1]] * len(ids), np.int32)
    return Instances(ids, lengths, lengths, ["s"] * len(ids), [[]] * len(ids))


def rule(documents: DocumentsRule, which: Counted = "all", longest: int | None = None) -> RowRule:
    return RowRule(SEPARATOR, np.arange(VOCAB, dtype=np.int32), which, documents, None, longest)


tokens_of = st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=2, max_size=12), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    texts=tokens_of,
    documents=st.sampled_from(["attend", "isolate"]),
    which=st.sampled_from(["all", "skip_after_separator"]),
    longest=st.sampled_from([None, 1, 3]),
)
def test_each_counted_target_is_in_one_row_after_the_token_it_follows(
    texts: list[list[int]], documents: DocumentsRule, which: Counted, longest: int | None
) -> None:
    width = max(map(len, texts))
    ids = np.full((len(texts), width), SEPARATOR, np.uint16)
    for number, text in enumerate(texts):
        ids[number, : len(text)] = text
    given_instances = instances(ids, list(map(len, texts)))
    chosen = rule(documents, which, longest)
    rows, n_tokens, n_bytes = chosen.rows(given_instances)
    found: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(texts))}
    for row in rows:
        assert len(row.counted) == len(row.tokens) - 1
        assert longest is None or len(row.counted) <= longest
        if documents == "isolate":
            assert SEPARATOR not in row.tokens[1:-1]  # no token of a row lies behind a document's end
        pairs = zip(row.tokens[:-1].tolist(), row.tokens[1:].tolist(), row.counted.tolist(), strict=True)
        found[row.instance] += [(before, target) for before, target, counts in pairs if counts]
    mask = counted(ids, given_instances.length, SEPARATOR, which)
    for number, text in enumerate(texts):
        expected = [(text[t], text[t + 1]) for t in range(len(text) - 1) if mask[number, t]]
        assert found[number] == expected
        assert n_tokens[number] == len(expected)
        assert n_bytes[number] == sum(target for _, target in expected)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), budget=st.integers(1, 100))
def test_batches_hold_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    ids = np.arange(sum(lengths) + len(lengths), dtype=np.uint32).reshape(1, -1) + 1
    rows, begin = [], 0
    for number, length in enumerate(lengths):
        row = rule("attend").rows(instances(ids[:, begin : begin + length + 1] % (VOCAB - 1) + 1))[0][0]
        rows.append(row.__class__(number, row.tokens, row.counted))
        begin += length
    seen: list[int] = []
    for batch in batches(rows, budget, padding=SEPARATOR):
        assert batch.tokens.shape == (len(batch.rows), batch.counted.shape[1] + 1)
        assert len(batch.rows) == 1 or batch.counted.size <= budget
        for line, number in enumerate(batch.rows):
            length = lengths[number]
            assert batch.tokens[line, : length + 1].tolist() == rows[number].tokens.tolist()
            assert not batch.counted[line, length:].any()
            assert batch.counted[line, :length].all()
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))


CONFIGS = {
    "qwen2": Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, initializer_range=0.5,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    ),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3),
}  # fmt: skip


def folder_of(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
    return folder


class Recorder:
    """Hands rows on to a scorer and keeps the log p of each, by its tokens."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer
        self.seen: dict[tuple[int, ...], float] = {}

    def score(self, tokens: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.scorer.score(tokens, mask)
        for row, counts, logp in zip(tokens, mask, found, strict=True):
            self.seen[tuple(row[: counts.sum() + 1].tolist())] = float(logp)
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_isolated_documents_know_nothing_of_each_other_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    scorer = load(
        GivenModel(model=str(folder_of(name, tmp_path))), ScoreSettings.model_validate({"dtype": dtype}),
        Compute(device="cpu"),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    before = draw.integers(1, VOCAB, (1, T + 1)).astype(np.uint16)
    before[0, 17] = SEPARATOR
    after = before.copy()
    after[0, :17] = draw.integers(1, VOCAB, 17)
    document = (SEPARATOR, *before[0, 18:].tolist())
    isolated, attending = [], []
    for ids in (before, after):
        recorder = Recorder(scorer)
        score_instances(instances(ids), recorder, rule("isolate"), 1000)
        isolated.append(recorder.seen[document])
        # the same targets, with the first document before them
        mask = counted(ids, [T + 1], SEPARATOR, "all")
        mask[:, :17] = False
        attending.append(float(scorer.score(ids, mask)[0]))
    assert isolated[0] == isolated[1]
    assert attending[0] != attending[1]


def test_isolated_documents_are_scored_as_each_alone(tmp_path: Path) -> None:
    scorer = load(
        GivenModel(model=str(folder_of("qwen2", tmp_path))), ScoreSettings(dtype="float32"), Compute(device="cpu")
    )
    ids = np.random.default_rng(1).integers(1, VOCAB, (3, T + 1)).astype(np.uint16)
    ids[0, [5, 20]] = ids[1, [0, T]] = SEPARATOR
    found = score_instances(instances(ids), scorer, rule("isolate"), 64).table["logp"].to_numpy()
    for number, row in enumerate(ids):
        expected, begin = 0.0, 0
        ends = [*np.flatnonzero(row == SEPARATOR).tolist(), T]
        for end in ends:
            if end > begin:
                alone = row[None, begin : end + 1]
                expected += float(scorer.score(alone, np.ones((1, end - begin), np.bool_))[0])
            begin = end
        np.testing.assert_allclose(found[number], expected, rtol=0, atol=1e-4)
    attended = score_instances(instances(ids), scorer, rule("attend"), 64).table["logp"].to_numpy()
    assert abs(attended[0] - found[0]) > 1e-3
    np.testing.assert_allclose(attended[2], found[2], rtol=0, atol=1e-4)  # a single document


class Counting:
    """Finds each token as likely as its number is small; counts what it is asked."""

    costly = True

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def score(self, tokens: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        self.asked += [tuple(row.tolist()) for row in tokens]
        return -np.where(mask, tokens[:, 1:].astype(np.float64), 0.0).sum(axis=1) / 3


class Late(Counting):
    """Answers all but the first row at once, and the first when all others have been taken."""

    in_flight = 3
    most_rows = 1

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.left = rows - 1

    def submit(self, tokens: NDArray[Any], mask: NDArray[np.bool_]) -> Any:
        first = not self.asked
        answer = self.score(tokens, mask)
        scorer = self

        class Answer:
            def done(self) -> bool:
                return not first or scorer.left == 0

            def result(self) -> NDArray[np.float64]:
                assert self.done()
                scorer.left -= not first
                return answer

        return Answer()


def test_an_answer_that_is_late_holds_up_no_others(tmp_path: Path) -> None:
    ids = np.random.default_rng(2).integers(1, VOCAB, (10, 7)).astype(np.uint16)
    with Journal(tmp_path / "part.journal") as journal:
        found = score_instances(instances(ids), Late(10), rule("attend"), 6, journal=journal).table
    assert found.equals(score_instances(instances(ids), Counting(), rule("attend"), 6).table)
    kept = [json.loads(line)[0] for line in (tmp_path / "part.journal").read_text().splitlines()]
    assert kept == [*range(1, 10), 0]


def test_operations_are_those_of_the_rows_that_were_computed() -> None:
    ids = np.ones((2, T + 1), np.uint16)
    ids[0, 10] = SEPARATOR
    assert score_instances(instances(ids), Counting(), rule("attend"), 64).lengths == {T: 2}
    assert score_instances(instances(ids), Counting(), rule("isolate"), 64).lengths == {T: 1, 10: 1, T - 10: 1}


def test_an_answer_that_is_no_number_is_asked_for_again(tmp_path: Path) -> None:
    ids = np.random.default_rng(2).integers(1, VOCAB, (4, 7)).astype(np.uint16)

    class Broken(Counting):
        def score(self, tokens: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
            found = super().score(tokens, mask)
            found[1] = np.nan
            return found

    path, mended = tmp_path / "part.journal", Counting()
    with Journal(path) as journal:
        broken = score_instances(instances(ids), Broken(), rule("attend"), 1000, journal=journal).table
    assert np.isnan(broken["logp"].to_numpy()).tolist() == [False, True, False, False]
    with Journal(path) as journal:
        found = score_instances(instances(ids), mended, rule("attend"), 1000, journal=journal).table
    assert mended.asked == [tuple(ids[1].tolist())]
    assert found.equals(score_instances(instances(ids), Counting(), rule("attend"), 1000).table)


@pytest.mark.parametrize("line", [b"\x00\x00\x00\n", b"[1]\n", b'{"a": 1}\n', b"[1, null]\n", b"[1, 2, 3]\n"])
def test_a_line_of_the_journal_that_is_none_of_ours_is_an_error(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part.journal"
    path.write_bytes(b"[0, -1.5]\n" + line + b"[2, -2.5]\n")
    with pytest.raises(ArtifactDamagedError, match=r"part\.journal"):
        Journal(path)


def test_what_is_in_the_journal_is_not_asked_again(tmp_path: Path) -> None:
    ids = np.random.default_rng(2).integers(1, VOCAB, (10, 7)).astype(np.uint16)
    path = tmp_path / "part.journal"

    class Interrupted(Counting):
        def score(self, tokens: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
            if len(self.asked) >= 6:
                raise KeyboardInterrupt
            return super().score(tokens, mask)

    first, second, undisturbed = Interrupted(), Counting(), Counting()
    with Journal(path) as journal, pytest.raises(KeyboardInterrupt):
        score_instances(instances(ids), first, rule("attend"), 12, journal=journal)
    with path.open("ab") as file:
        file.write(b"[9, -1")  # the power went while this line was written
    with Journal(path) as journal:
        found = score_instances(instances(ids), second, rule("attend"), 12, journal=journal).table
    assert sorted(first.asked + second.asked) == sorted(tuple(row.tolist()) for row in ids)
    assert found.equals(score_instances(instances(ids), undisturbed, rule("attend"), 12).table)
