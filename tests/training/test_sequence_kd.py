"""SeqKD: prompts as they were, the rest as the teacher writes it without a cache, the same bytes whatever happened."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import miniplm
from conftest import write_jsonl
from miniplm import artifact
from miniplm.engine.base import Advance, Engine
from miniplm.engine.local import LocalEngine
from miniplm.errors import ModelError, RecipeError, TokenizerError
from miniplm.models.load import load_model, new_model
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import Packed
from miniplm.packing.prepare import Corpus
from miniplm.recipe import Compute, GenerateSettings, GivenModel, RaySettings
from miniplm.training import sequence_kd

T = 32
P = 24  # three quarters
SEED = 3
EMBEDDINGS = 384  # 301 tokens, padded
CONFIG = {
    "model_type": "qwen2", "vocab_size": EMBEDDINGS, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_kd, "_SHARD_TOKENS", (T + 1) * 10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Instances of 17 to 33 tokens, under a tokenizer that has a special token beside the separator: the last id."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = write_jsonl(folder / "text.jsonl", 80, words=24)
    trained = tokenizers.train([documents.read_text()], 300)
    trained.backend.add_special_tokens(["<|special|>"])
    trained.save(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made = miniplm.prepare(
            documents,
            tokenizer=str(folder / "tokenizer"),
            sequence_length=T,
            cut="sentence",
            split={"reference": 0.1, "held_out": 0.1},
            block_bytes=2000,
            out=folder / "corpus",
        )
    assert made.pool.vocab_size == 301
    return made


@pytest.fixture(scope="module")
def teacher(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> GivenModel:
    """A model to whom padding and the special token are often the likeliest, beside the tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    model = new_model(CONFIG, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight *= 4
        model.get_output_embeddings().weight[300:] *= 20
    model.save_pretrained(folder)
    corpus.tokenizer.save(folder)
    return GivenModel(model=str(folder))


@pytest.fixture(scope="module")
def rows(corpus: Corpus) -> NDArray[np.int64]:
    """Some of the pool, three shards and a half of them."""
    drawn = np.random.default_rng(0).choice(len(corpus.pool), 35, replace=False)
    return np.sort(drawn)


def settings(**given: Any) -> GenerateSettings:
    return GenerateSettings(**{"dtype": "float32", "seed": SEED, **given})


def generate(
    packed: Packed,
    rows: NDArray[np.int64] | None,
    teacher: GivenModel,
    out: Path,
    how: GenerateSettings | None = None,
    engine: Engine | None = None,
    **compute: Any,
) -> Packed:
    how = how or settings()
    what = sequence_kd.identity(how, {"data": packed.fingerprint, "teacher": "t"})
    batches = {"device": "cpu", "generate_batch": 4, **compute}
    return sequence_kd.generate(packed, rows, teacher, how, out, what, Compute(**batches), engine or LocalEngine())


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Corpus, rows: NDArray[np.int64], teacher: GivenModel, tmp_path_factory: pytest.TempPathFactory
) -> Packed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence_kd, "_SHARD_TOKENS", (T + 1) * 10)
        return generate(corpus.pool, rows, teacher, tmp_path_factory.mktemp("undisturbed") / "out")


def slowly(
    model: PreTrainedModel, prompt: list[int], place: int, count: int, *, temperature: float = 1, top_p: float = 1
) -> list[int]:
    """What the teacher writes, a token at a time: no cache, no batch."""
    philox = np.random.Philox(key=[SEED, place], counter=[0, 0, 0, int.from_bytes(b"continue", "big")])
    ids = list(prompt)
    for number in np.random.Generator(philox).random(count, dtype=np.float32):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :300].double()  # nothing above
        if temperature == 0:
            ids.append(int(logits.argmax()))
            continue
        shares = torch.softmax(logits / temperature, 0).tolist()
        kept, total = set(), 0.0
        for token in sorted(range(300), key=lambda token: -shares[token]):
            if total < top_p:
                kept.add(token)
                total += shares[token]
        wanted, passed = number * total, 0.0
        for token in sorted(kept):
            passed += shares[token]
            if passed > wanted:
                ids.append(token)
                break
    return ids[len(prompt) :]


# What is written


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5, "top_p": 0.8}, {"temperature": 0.0, "prompt_tokens": T}])
def test_prompts_stay_and_the_rest_is_what_the_teacher_writes_without_a_cache(
    corpus: Corpus, rows: NDArray[np.int64], teacher: GivenModel, tmp_path: Path, how: dict[str, Any]
) -> None:
    found = generate(corpus.pool, rows, teacher, tmp_path / "out", settings(**how)).dataset[:]
    model, prompt = load_model(teacher), how.pop("prompt_tokens", P)
    assert len(found["input_ids"]) == len(rows)
    for place, row in enumerate(rows.tolist()):
        before = corpus.pool.dataset[row]
        expected = before["input_ids"]
        if before["length"] > prompt:
            expected = expected[:prompt] + slowly(model, expected[:prompt], place, T + 1 - prompt, **how)
            assert found["length"][place] == T + 1
        else:
            assert found["length"][place] == before["length"]
        assert found["input_ids"][place] == expected


def test_without_the_mask_the_teacher_would_write_what_is_no_text(
    corpus: Corpus, rows: NDArray[np.int64], teacher: GivenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tokenizers.Tokenizer, "unspeakable", property(lambda tokenizer: np.zeros(tokenizer.vocab_size, np.bool_))
    )
    found = generate(corpus.pool, rows, teacher, tmp_path / "out")
    assert 300 in np.array(found.dataset["input_ids"])[:, P:]


def test_special_tokens_and_gaps_are_no_text_but_the_separator_is(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer
    assert np.flatnonzero(tokenizer.unspeakable).tolist() == [300]
    assert tokenizer.token(tokenizer.separator) == "<|endoftext|>"
    sparse = tokenizers.Tokenizer(tokenizer.backend, tokenizer.separator)
    vars(sparse)["vocabulary"] = {**tokenizer.vocabulary, "far": 303}
    assert np.flatnonzero(sparse.unspeakable).tolist() == [300, 301, 302]


@pytest.mark.parametrize(("prompt", "shortened"), [(P, False), (8, True)])
def test_all_columns_are_there_and_are_those_of_the_tokens(
    corpus: Corpus, rows: NDArray[np.int64], teacher: GivenModel, tmp_path: Path, prompt: int, shortened: bool
) -> None:
    found = generate(corpus.pool, rows, teacher, tmp_path / "out", settings(prompt_tokens=prompt)).dataset[:]
    before = corpus.pool.dataset[rows.tolist()]
    spelling, separator = corpus.tokenizer.spelling, corpus.pool.separator
    for place, ids in enumerate(found["input_ids"]):
        assert found["n_bytes"][place] == len(b"".join(spelling[token] for token in ids))
        assert found["source"][place] == before["source"][place]
        documents = before["documents"][place]
        if before["length"][place] > prompt:
            documents = documents[:1]
            for token in before["input_ids"][place][: prompt - 1]:
                if token == separator:
                    documents = before["documents"][place][: len(documents) + 1]
        assert found["documents"][place] == documents
    # where sentences end instances, no document begins late in one
    assert (found["documents"] != before["documents"]) is shortened


def test_the_counts_are_those_of_the_rows(corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed) -> None:
    counts, before = undisturbed.manifest.counts, corpus.pool.dataset[rows.tolist()]
    kept = sum(length <= P for length in before["length"])
    assert 2 < kept < 20
    assert counts["instances"] == len(undisturbed) == 35
    assert counts["kept_unchanged"] == kept
    assert counts["prompt_tokens"] == P
    assert counts["generated_tokens"] == (35 - kept) * (T + 1 - P)
    assert counts["tokens_out"] == sum(undisturbed.dataset["length"])
    assert counts["sources"] == {name: before["source"].count(name) for name in sorted(set(before["source"]))}
    assert counts["shards"] == [f"part-{number:05d}.arrow" for number in range(4)]
    assert undisturbed.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert (undisturbed.sequence_length, undisturbed.separator, undisturbed.vocab_size) == (T, 0, 301)
    assert list(artifact.verify(undisturbed.path)) == []
    how = artifact.provenance(undisturbed.path)
    assert how["tokens_per_s"] > 0
    assert how["generate_batch"] == 4


def test_all_of_a_pool_is_continued_where_no_rows_are_given(
    corpus: Corpus, teacher: GivenModel, tmp_path: Path
) -> None:
    found = generate(corpus.pool, None, teacher, tmp_path / "out")
    beginnings = np.array(corpus.pool.dataset["input_ids"])[:, : T // 2]
    assert np.array_equal(np.array(found.dataset["input_ids"])[:, : T // 2], beginnings)
    assert found.manifest.counts["sources"] == corpus.pool.manifest.counts["sources"]


def test_it_opens_as_any_other_data_set_and_a_student_is_trained_on_it(undisturbed: Packed, tmp_path: Path) -> None:
    opened = datasets.load_from_disk(str(undisturbed.path))
    assert opened[:] == undisturbed.dataset[:]
    config = {name: value for name, value in CONFIG.items() if name != "vocab_size"}
    how: dict[str, Any] = {"batch_tokens": 8 * T, "learning_rate": 1e-3, "precision": "float32"}
    compute = Compute(device="cpu", train_micro_batch=8)
    student = miniplm.train(config, undisturbed, tokens=2 * 8 * T, out=tmp_path / "m", compute=compute, **how)
    assert student.manifest.counts["steps"] == 2
    assert student.manifest.identity.inputs["data"] == undisturbed.fingerprint


def test_what_it_is_depends_on_the_settings_and_the_inputs_but_not_on_the_name_of_the_data() -> None:
    inputs = {"data": "d", "teacher": "t"}
    same = sequence_kd.identity(settings(), inputs)
    assert same.kind == "packed"
    assert sequence_kd.identity(settings(data="difference"), inputs).fingerprint == same.fingerprint
    others = [
        sequence_kd.identity(settings(seed=4), inputs),
        sequence_kd.identity(settings(top_p=0.9), inputs),
        sequence_kd.identity(settings(), {**inputs, "teacher": "u"}),
        sequence_kd.identity(settings(), {**inputs, "data": "e"}),
    ]
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_seed_has_its_own_continuations_and_an_instance_too(
    corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed, teacher: GivenModel, tmp_path: Path
) -> None:
    open_ends = np.array(undisturbed.dataset["length"]) > P
    ends = np.array(undisturbed.dataset["input_ids"])[open_ends, P:]
    other = generate(corpus.pool, rows, teacher, tmp_path / "seed", settings(seed=SEED + 1))
    assert (np.array(other.dataset["input_ids"])[open_ends, P:] != ends).any(axis=1).all()
    twice = generate(corpus.pool, np.repeat(rows[open_ends][:1], 12), teacher, tmp_path / "twice")
    assert len(np.unique(twice.dataset["input_ids"], axis=0)) == 12


# Whatever happens, the same bytes


def contents(folder: Path) -> dict[str, bytes]:
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != artifact.PROVENANCE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


class TwoWorkers:
    """An engine that gives shards to two workers, the last one first, as if they were elsewhere."""

    def run(self, make_worker: Callable[[Advance], Any], items: Iterable[Any], advance: Advance) -> Iterator[Any]:
        sent = pickle.dumps(make_worker)
        workers = [pickle.loads(sent)(advance) for _ in range(2)]
        for number, item in enumerate(reversed(list(items))):
            yield workers[number % 2](pickle.loads(pickle.dumps(item)))


class Interrupted:
    """An engine that is interrupted after some shards; it keeps the names of those it was given."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.given: list[str] = []

    def run(self, make_worker: Callable[[Advance], Any], items: Iterable[Any], advance: Advance) -> Iterator[Any]:
        items = list(items)
        self.given = [item.name for item in items]
        worker = make_worker(advance)
        for number, item in enumerate(items):
            if number == self.after:
                raise KeyboardInterrupt
            yield worker(item)


def test_two_workers_in_another_order_give_the_same_bytes(
    corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed, teacher: GivenModel, tmp_path: Path
) -> None:
    generate(corpus.pool, rows, teacher, tmp_path / "out", engine=TwoWorkers())
    assert contents(tmp_path / "out") == contents(undisturbed.path)


@pytest.mark.parametrize("batch", [1, 64])
def test_batches_of_another_size_give_the_same_bytes_in_float32(
    corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed, teacher: GivenModel, tmp_path: Path, batch: int
) -> None:
    generate(corpus.pool, rows, teacher, tmp_path / "out", generate_batch=batch)
    assert contents(tmp_path / "out") == contents(undisturbed.path)


def test_shards_of_another_size_hold_the_same_instances(
    corpus: Corpus,
    rows: NDArray[np.int64],
    undisturbed: Packed,
    teacher: GivenModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequence_kd, "_SHARD_TOKENS", 1 << 20)
    whole = generate(corpus.pool, rows, teacher, tmp_path / "out")
    assert len(whole.shards) == 1
    assert whole.dataset[:] == undisturbed.dataset[:]


def test_interrupted_it_goes_on_with_the_shards_that_are_not_there(
    corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed, teacher: GivenModel, tmp_path: Path
) -> None:
    given = []
    for after in (1, 2, 9):
        engine = Interrupted(after)
        try:
            generate(corpus.pool, rows, teacher, tmp_path / "out", engine=engine)
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
        given.append(len(engine.given))
    assert given == [4, 3, 1]
    assert contents(tmp_path / "out") == contents(undisturbed.path)
    engine = Interrupted(0)
    generate(corpus.pool, rows, teacher, tmp_path / "out", engine=engine)
    assert engine.given == []


KILLED = """
import os, pickle, signal, sys
from miniplm.training import sequence_kd

number, arguments = int(sys.argv[1]), pickle.load(sys.stdin.buffer)
sequence_kd._SHARD_TOKENS = arguments.pop("shard_tokens")
write, written = sequence_kd.write_shard, []

def killed_in_the_middle(path, instances):
    write(path, instances)
    written.append(path)
    if len(written) == number:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

sequence_kd.write_shard = killed_in_the_middle
sequence_kd.generate(**arguments)
"""


@pytest.mark.slow
def test_killed_while_it_writes_a_shard_it_goes_on_to_the_same_bytes(
    corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed, teacher: GivenModel, tmp_path: Path
) -> None:
    arguments = {
        "packed": corpus.pool,
        "rows": rows,
        "teacher": teacher,
        "settings": settings(),
        "out": tmp_path / "out",
        "what": sequence_kd.identity(settings(), {"data": corpus.pool.fingerprint, "teacher": "t"}),
        "compute": Compute(device="cpu", generate_batch=4),
        "engine": LocalEngine(),
        "shard_tokens": (T + 1) * 10,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, "2"]
        process = subprocess.run(command, input=pickle.dumps(arguments), env=environment, check=False)
        assert process.returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert sorted(path.name for path in partial.glob("part-*.arrow")) == ["part-00000.arrow", "part-00001.arrow"]
    assert list(partial.glob("part-00002*.tmp"))
    generate(corpus.pool, rows, teacher, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(undisturbed.path)


@pytest.mark.slow
def test_workers_of_ray_give_the_same_bytes(
    corpus: Corpus, rows: NDArray[np.int64], undisturbed: Packed, teacher: GivenModel, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "miniplm[ray]"')
    from miniplm.engine.ray import RayEngine

    engine = RayEngine(RaySettings(workers=2, cpus_per_worker=0.5))
    generate(corpus.pool, rows, teacher, tmp_path / "out", engine=engine)
    assert contents(tmp_path / "out") == contents(undisturbed.path)


# Errors


@pytest.mark.parametrize("prompt", [T + 1, 1000])
def test_a_prompt_that_leaves_nothing_to_write_is_an_error_with_the_values(
    corpus: Corpus, teacher: GivenModel, tmp_path: Path, prompt: int
) -> None:
    with pytest.raises(RecipeError, match=rf"prompt_tokens\s+{prompt:,}\n\s+tokens of an instance\s+33\n") as caught:
        generate(corpus.pool, None, teacher, tmp_path / "out", settings(prompt_tokens=prompt))
    assert "from 1 to 32" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sequence_length", "prompt"), [(1024, 768), (2, 1), (3, 2)])
def test_a_prompt_is_three_quarters_of_the_predicted_positions(sequence_length: int, prompt: int) -> None:
    assert sequence_kd.prompt_tokens(settings(), sequence_length) == prompt


def test_no_instance_at_all_is_an_error(corpus: Corpus, teacher: GivenModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no instance"):
        generate(corpus.pool, np.empty(0, np.int64), teacher, tmp_path / "out")


def saved(folder: Path, **config: Any) -> GivenModel:
    new_model({**CONFIG, **config}, seed=0).save_pretrained(folder)
    return GivenModel(model=str(folder))


def test_a_teacher_with_another_tokenizer_is_an_error(corpus: Corpus, tmp_path: Path) -> None:
    other = saved(tmp_path / "other")
    tokenizers.train([" ".join(str(number) for number in range(2000))], 300).save(tmp_path / "other")
    with pytest.raises(TokenizerError, match="another tokenizer"):
        generate(corpus.pool, None, other, tmp_path / "out")


def test_a_teacher_without_a_tokenizer_is_believed_but_its_vocabulary_has_to_suffice(
    corpus: Corpus, rows: NDArray[np.int64], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="300 embeddings"):
        generate(corpus.pool, rows, saved(tmp_path / "small", vocab_size=300), tmp_path / "out")
    generate(corpus.pool, rows[:3], saved(tmp_path / "enough", vocab_size=301), tmp_path / "enough-out")


def test_a_teacher_with_too_few_positions_is_an_error(corpus: Corpus, tmp_path: Path) -> None:
    short = saved(tmp_path / "short", max_position_embeddings=T - 1)
    with pytest.raises(ModelError, match=r"positions\s+31"):
        generate(corpus.pool, None, short, tmp_path / "out")


def test_a_teacher_whose_weights_are_no_numbers_is_an_error(corpus: Corpus, tmp_path: Path) -> None:
    model = new_model(CONFIG, seed=0)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match="no numbers"):
        generate(corpus.pool, None, GivenModel(model=str(tmp_path / "nan")), tmp_path / "out")
