"""Models whose tokenizer is not that of the instances: the same text, under their own tokens, compared per byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

import miniplm
from conftest import write_jsonl
from miniplm.errors import ArtifactMismatchError, RecipeError, ScoreError, TokenizerError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.instances import Instances, read_shard
from miniplm.packing.prepare import Corpus
from miniplm.pipeline.chain import chain
from miniplm.pipeline.run import run
from miniplm.recipe import Compute, parse
from miniplm.report.write import write_report
from miniplm.scoring import score

T = 24
CPU = Compute(device="cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    text = write_jsonl(folder / "text.jsonl", 40)
    with text.open("a") as file:
        file.write(json.dumps({"id": "ü", "text": "naïve café 🙂 日本語 " * 30, "source": "s0"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return miniplm.prepare(
            str(text), tokenizer={"train": {"vocab_size": 300}}, sequence_length=T,
            split={"reference": 0.2, "held_out": 0}, out=folder / "corpus",
        )  # fmt: skip


def model_with(folder: Path, tokenizer: tokenizers.Tokenizer, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def same(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the corpus's tokenizer."""
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    return model_with(tmp_path_factory.mktemp("same"), corpus.tokenizer, config)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another tokenizer, with fewer positions than its tokens of an instance."""
    tokenizer = tokenizers.train(["completely different words, shorter merges"] * 50, 270)
    config = GPT2Config(
        vocab_size=270, n_embd=32, n_layer=1, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return model_with(tmp_path_factory.mktemp("other"), tokenizer, config)


@pytest.fixture(scope="module")
def scores(corpus: Corpus, same: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scores")
    return {
        name: miniplm.score(
            corpus.pool, str(model), out=folder / name, dtype="float32", tokenizer="own", compute=CPU
        )
        for name, model in (("same", same), ("other", other))
    }  # fmt: skip


def by_hand(text: bytes, folder: Path) -> tuple[float, int]:
    """Log p and tokens of a text by transformers alone, in windows of the model's positions."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
    total, window = 0.0, model.config.n_positions
    for begin in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[begin : begin + window + 1]])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=piece[:, :-1]).logits[0], dim=-1)
        total += float(logp.gather(1, piece[0, 1:, None]).sum())
    return total, len(ids) - 1


def test_the_text_is_scored_under_the_models_own_tokens(corpus: Corpus, other: Path, scores: dict[str, Any]) -> None:
    ours = corpus.tokenizer
    compared = 0
    for number, row in enumerate(corpus.pool.dataset):
        ids = row["input_ids"][: row["length"]]
        text = b"".join(ours.spelling[i] for i in ids)
        if ours.separator in ids or "\ufffd" in text.decode(errors="replace"):
            continue  # another test has these
        logp, n_tokens = by_hand(text, other)
        assert scores["other"].n_tokens[number] == n_tokens
        assert n_tokens > 20  # more than the model has positions for
        np.testing.assert_allclose(scores["other"].logp[number], logp, rtol=1e-5)
        compared += 1
    assert compared > 10


def test_every_instance_has_its_bytes_under_both(corpus: Corpus, scores: dict[str, Any]) -> None:
    first = np.array(corpus.pool.dataset["input_ids"])[:, 0]
    whole = np.array(corpus.pool.dataset["n_bytes"])
    assert (scores["same"].n_bytes == whole - corpus.tokenizer.token_bytes[first]).all()
    longest = 16  # bytes of a first token, which has no score
    assert ((scores["other"].n_bytes <= whole) & (scores["other"].n_bytes >= whole - longest)).all()
    assert scores["same"].tokenizer == corpus.tokenizer.fingerprint != scores["other"].tokenizer


def test_a_model_of_the_same_tokenizer_is_given_the_ids_as_they_are(
    corpus: Corpus, same: Path, scores: dict[str, Any], tmp_path: Path
) -> None:
    packed = miniplm.score(corpus.pool, str(same), out=tmp_path / "packed", dtype="float32", compute=CPU)
    assert (packed.logp == scores["same"].logp).all()


def test_they_are_compared_per_byte_and_never_per_token(scores: dict[str, Any]) -> None:
    chosen = miniplm.DifferenceSampling(ratio=0.5, normalize="byte").select(scores["other"], scores["same"])
    difference = scores["other"].logp / scores["other"].n_bytes - scores["same"].logp / scores["same"].n_bytes
    assert chosen.rows.tolist() == sorted(np.argsort(-difference, kind="stable")[: len(difference) // 2].tolist())
    with pytest.raises(ArtifactMismatchError, match="different tokenizers") as refused:
        miniplm.DifferenceSampling(ratio=0.5, normalize="token").select(scores["other"], scores["same"])
    assert "normalize: byte" in str(refused.value)


def test_another_tokenizer_is_an_error_unless_it_was_asked_for(corpus: Corpus, other: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="tokenizer: own"):
        miniplm.score(corpus.pool, str(other), out=tmp_path / "scores", compute=CPU)


def test_its_own_tokenizer_must_be_there(corpus: Corpus, same: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(same).save_pretrained(bare)
    with pytest.raises(TokenizerError, match="not known"):
        miniplm.score(corpus.pool, str(bare), out=tmp_path / "scores", tokenizer="own", compute=CPU)


def test_a_recipe_says_so_before_anything_is_scored() -> None:
    recipe = """
schema: 1
name: x
corpus: {source: builtin}
prepare: {tokenizer: {train: {vocab_size: 300}}}
teacher: {model: Qwen/x}
reference: {preset: qwen-0.5m, tokens: 1e6}
score: {tokenizer: own}
select:
  difference: {sampler: difference, ratio: 0.5}
"""
    with pytest.raises(RecipeError, match=r"select\.difference\.normalize") as refused:
        parse(recipe)
    assert "normalize: byte" in str(refused.value)
    parse(recipe.replace("ratio: 0.5", "ratio: 0.5, normalize: byte"))


def test_another_tokenizer_beside_the_same_weights_makes_other_scores(
    corpus: Corpus, other: Path, scores: dict[str, Any], tmp_path: Path
) -> None:
    changed = tmp_path / "model"
    shutil.copytree(other, changed)
    tokenizers.train(["yet another text, yet other merges"] * 50, 270).save(changed)
    how: dict[str, Any] = {"dtype": "float32", "compute": CPU}
    found = miniplm.score(corpus.pool, str(changed), out=tmp_path / "scores", tokenizer="own", **how)
    assert found.fingerprint != scores["other"].fingerprint
    with pytest.raises(ArtifactMismatchError):  # never taken for those of the tokenizer before
        miniplm.score(corpus.pool, str(other), out=tmp_path / "scores", tokenizer="own", **how)


def test_an_instance_of_nothing_but_separators_is_named_before_anything_is_finished(
    corpus: Corpus, same: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_separators(path: Path) -> Instances:
        read = read_shard(path)
        ids = read.input_ids.copy()
        ids[1] = corpus.tokenizer.separator
        return dataclasses.replace(read, input_ids=ids)

    monkeypatch.setattr(score, "read_shard", all_separators)
    with pytest.raises(ScoreError, match="instance 1 has no token that counts"):
        miniplm.score(corpus.pool, str(same), out=tmp_path / "scores", counted="skip_after_separator", compute=CPU)
    assert not (tmp_path / "scores").exists()


RECIPE = """
schema: 1
name: x
corpus: {{files: {files}}}
prepare: {{tokenizer: {tokenizer}, sequence_length: 24, split: {{reference: 0.2, held_out: 0.2}}}}
teacher: {{model: {teacher}}}
reference: {{model: {reference}}}
score: {{tokenizer: own, dtype: float32}}
select:
  difference: {{sampler: difference, ratio: 0.5, normalize: byte}}
compute: {{device: cpu}}
"""


def test_a_run_across_tokenizers_ends_with_its_report(corpus: Corpus, same: Path, other: Path, tmp_path: Path) -> None:
    recipe = parse(
        RECIPE.format(
            files=write_jsonl(tmp_path / "text.jsonl", 60), tokenizer=corpus.path / "tokenizer", teacher=other,
            reference=same,
        )
    )  # fmt: skip
    stages = chain(recipe, tmp_path / "run")
    run(stages)
    write_report(stages)
    found = json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert found["effects"]["unit"] == found["scores"]["normalize"] == "byte"
    assert "nats per byte" in (tmp_path / "run" / "report.html").read_text()
