"""The stage `evaluate`: what is on disk agrees with what is returned, and with the scores behind it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import miniplm
from conftest import write_jsonl
from miniplm import artifact
from miniplm.errors import ArtifactError, ArtifactMismatchError, ModelError, ScoreError
from miniplm.evaluation.evaluate import Evaluation, open_evaluation
from miniplm.evaluation.loss import ALL, Row, as_csv, losses
from miniplm.models.load import model_fingerprint, new_model
from miniplm.packing.prepare import Corpus
from miniplm.recipe import Compute, GivenModel

T = 16
CPU = Compute(device="cpu", score_tokens=7 * T)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return miniplm.prepare(
            write_jsonl(folder / "text.jsonl", 60),
            tokenizer={"train": {"vocab_size": 300}},
            sequence_length=T,
            split={"reference": 0.1, "held_out": 0.3},
            out=folder / "corpus",
        )


class ByHand:
    """A scorer that finds every token as likely as its number is small."""

    def __init__(self, slope: float = 0.01) -> None:
        self.slope = slope
        self.fingerprint = f"by hand {slope}"

    def score(self, tokens: np.ndarray[Any, Any], counted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found = np.zeros(len(tokens))
        for row in range(len(tokens)):
            for position in range(tokens.shape[1] - 1):
                if counted[row, position]:
                    found[row] -= self.slope * float(tokens[row, position + 1])
        return found


@pytest.fixture
def evaluation(corpus: Corpus, tmp_path: Path) -> Evaluation:
    found: Evaluation = miniplm.evaluate(ByHand(), held_out=corpus.held_out, out=tmp_path / "evaluation", compute=CPU)
    return found


def test_the_figures_are_those_of_every_held_out_instance(evaluation: Evaluation, corpus: Corpus) -> None:
    rows = corpus.held_out.dataset.with_format("numpy")
    nats, tokens, count = 0.0, 0, 0
    for ids in rows["input_ids"]:
        nats += sum(0.01 * float(i) for i in ids[1:])
        tokens += T
        count += 1
    found = evaluation.value("nats_per_token")
    assert found.value == pytest.approx(nats / tokens)
    assert found.n == count == len(corpus.held_out)
    text_bytes = sum(len(corpus.tokenizer.decode(i for i in ids[1:] if i).encode()) for ids in rows["input_ids"])
    assert evaluation.value("bits_per_byte").value == pytest.approx(nats / math.log(2) / text_bytes)


def test_every_source_has_its_rows(evaluation: Evaluation, corpus: Corpus) -> None:
    rows = corpus.held_out.dataset.with_format("numpy")
    for name in ("s0", "s1", "s2"):
        own = [ids for ids, source in zip(rows["input_ids"], rows["source"], strict=True) if source == name]
        found = evaluation.value("nats_per_token", name)
        assert found.value == pytest.approx(0.01 * float(np.mean([ids[1:] for ids in own])))
        assert found.n == len(own)


def test_evaluation_json_is_the_rows(evaluation: Evaluation, tmp_path: Path) -> None:
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert [Row(**entry) for entry in written] == list(evaluation.rows)
    assert len(written) == 8


def test_evaluation_csv_is_the_rows_under_the_fingerprint_of_the_model(evaluation: Evaluation, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    model = artifact.read(folder).identity.inputs["model"]
    lines = list(csv.DictReader(io.StringIO((folder / "evaluation.csv").read_text())))
    found = [
        Row(
            e["dataset"], e["source"], e["metric"], float(e["value"]),
            float(e["standard_error"]) if e["standard_error"] else None, int(e["n"]),
        )
        for e in lines
    ]  # fmt: skip
    assert found == list(evaluation.rows)
    assert {e["model"] for e in lines} == {model[:12]}


def test_the_rows_follow_from_the_scores_that_are_kept_with_them(evaluation: Evaluation, tmp_path: Path) -> None:
    parts = [pq.read_table(path) for path in sorted((tmp_path / "evaluation").glob("part-*.parquet"))]
    logp = np.concatenate([part["logp"].to_numpy() for part in parts])
    np.testing.assert_array_equal(logp, evaluation.scores.logp)
    assert tuple(losses(evaluation.scores)) == evaluation.rows


def test_an_opened_evaluation_is_the_one_that_was_returned(evaluation: Evaluation, tmp_path: Path) -> None:
    opened = open_evaluation(tmp_path / "evaluation")
    assert opened.rows == evaluation.rows
    np.testing.assert_array_equal(opened.scores.logp, evaluation.scores.logp)


def test_the_counts_of_the_manifest_agree_with_the_rows(evaluation: Evaluation, tmp_path: Path) -> None:
    counts = artifact.read(tmp_path / "evaluation", kind="evaluation").counts
    assert counts["nats_per_token"] == pytest.approx(evaluation.value("nats_per_token").value)
    assert counts["instances"] == evaluation.value("nats_per_token").n
    assert list(artifact.verify(tmp_path / "evaluation")) == []


def test_printing_an_evaluation_shows_every_figure(evaluation: Evaluation) -> None:
    lines = str(evaluation).splitlines()
    assert len(lines) == len(evaluation.rows)
    for line, row in zip(lines, evaluation.rows, strict=True):
        assert row.source in line
        assert row.metric in line
        assert f"{row.value:.4f}" in line


def test_a_figure_that_was_not_measured_is_a_key_error(evaluation: Evaluation) -> None:
    with pytest.raises(KeyError, match="accuracy"):
        evaluation.value("accuracy")


def test_a_table_of_several_models_has_the_rows_of_each_whatever_their_names(evaluation: Evaluation) -> None:
    other = Evaluation((Row("held_out", 'a "b", c\nd', "nats_per_token", 1.5, None, 1),), evaluation.scores)
    lines = list(csv.reader(io.StringIO(as_csv({"one, two": evaluation.rows, "three": other.rows}))))
    assert lines[0] == ["model", "dataset", "source", "metric", "value", "standard_error", "n"]
    assert [line[0] for line in lines[1:]] == ["one, two"] * len(evaluation.rows) + ["three"]
    assert lines[-1] == ["three", "held_out", 'a "b", c\nd', "nats_per_token", "1.5", "", "1"]


def test_evaluating_again_with_other_batches_gives_the_same_bytes(
    evaluation: Evaluation, corpus: Corpus, tmp_path: Path
) -> None:
    miniplm.evaluate(
        ByHand(), held_out=corpus.held_out, out=tmp_path / "again", compute=Compute(device="cpu", score_tokens=9000)
    )
    for name in artifact.read(tmp_path / "again").files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "evaluation" / name).read_bytes(), name


def test_another_model_is_never_written_over_an_evaluation(
    evaluation: Evaluation, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactMismatchError):
        miniplm.evaluate(ByHand(0.02), held_out=corpus.held_out, out=tmp_path / "evaluation", compute=CPU)
    assert open_evaluation(tmp_path / "evaluation").rows == evaluation.rows


def test_a_score_that_is_no_number_names_the_instance_and_leaves_no_evaluation(corpus: Corpus, tmp_path: Path) -> None:
    class Broken(ByHand):
        calls = 0

        def score(self, tokens: np.ndarray[Any, Any], counted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            found = super().score(tokens, counted)
            if self.calls == 1:
                found[2] = np.nan
            self.calls += 1
            return found

    with pytest.raises(ScoreError, match="instance 9"):
        miniplm.evaluate(Broken(), held_out=corpus.held_out, out=tmp_path / "evaluation", compute=CPU)
    with pytest.raises(ArtifactError, match="not finished"):
        open_evaluation(tmp_path / "evaluation")


CONFIG = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def test_a_model_in_a_folder_is_measured_as_its_own_dense_logits_say(corpus: Corpus, tmp_path: Path) -> None:
    model = new_model({**CONFIG, "vocab_size": 320}, 0).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(tmp_path / "model")
    found = miniplm.evaluate(
        tmp_path / "model", held_out=corpus.held_out, out=tmp_path / "evaluation", dtype="float32", compute=CPU
    )
    nats = 0.0
    for ids in corpus.held_out.dataset.with_format("numpy")["input_ids"]:
        row = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=row[None, :-1]).logits[0].double(), dim=-1)
        nats -= sum(float(logp[t, row[t + 1]]) for t in range(T))
    assert found.value("nats_per_token").value == pytest.approx(nats / (T * len(corpus.held_out)), abs=1e-5)
    assert abs(nats / (T * len(corpus.held_out)) - math.log(320)) > 0.1, "this would compare uniform guesses"
    inputs = artifact.read(tmp_path / "evaluation").identity.inputs
    assert inputs["model"] == model_fingerprint(GivenModel(model=str(tmp_path / "model")))
    assert inputs["packed"] == corpus.held_out.fingerprint


def test_a_model_with_fewer_embeddings_than_tokens_is_refused_with_both_sizes(corpus: Corpus, tmp_path: Path) -> None:
    new_model({**CONFIG, "vocab_size": 299}, 0).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"(?s)300 tokens.*299 embeddings"):
        miniplm.evaluate(tmp_path / "model", held_out=corpus.held_out, out=tmp_path / "evaluation", compute=CPU)


def test_the_name_of_all_instances_together_is_no_source_of_this_corpus(evaluation: Evaluation) -> None:
    assert ALL not in evaluation.scores.sources


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("texts") / "web.jsonl", 9, words=12, seed=5)


def peaked(folder: Path) -> Path:
    """A model that has opinions, so that its loss is not that of a uniform guess."""
    model = new_model({**CONFIG, "vocab_size": 300}, 0).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("windows", ["first", "all"])
def test_the_loss_of_documents_is_that_of_a_plain_loop_over_each_by_itself(
    corpus: Corpus, texts: Path, tmp_path: Path, windows: Any
) -> None:
    folder = peaked(tmp_path / "model")
    packed = miniplm.pack_documents(
        texts, tokenizer=corpus.tokenizer, out=tmp_path / "packed", sequence_length=T, windows=windows
    )
    found = miniplm.evaluate(
        folder, held_out=packed, out=tmp_path / "evaluation", dtype="float32", documents="web", compute=CPU
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    per_document: list[tuple[float, int, int]] = []  # nats, tokens, bytes
    for record in map(json.loads, texts.read_text().splitlines()):
        (ids,) = corpus.tokenizer.encode([record["text"]])
        tokens = [*ids.tolist(), corpus.tokenizer.separator]
        nats, count = 0.0, 0
        for begin in range(0, len(tokens) - 1, T) if windows == "all" else (0,):
            window = torch.tensor([tokens[begin : begin + T + 1]])
            with torch.no_grad():
                logp = torch.log_softmax(model(input_ids=window[:, :-1]).logits[0], dim=-1)
            nats -= sum(float(logp[t, window[0, t + 1]]) for t in range(len(window[0]) - 1))
            count += len(window[0]) - 1
        read = tokens[1 : count + 1]
        per_document.append((nats, count, len(corpus.tokenizer.decode(i for i in read if i).encode())))
    total = [sum(column) for column in zip(*per_document, strict=True)]
    assert found.value("nats_per_token").value == pytest.approx(total[0] / total[1], abs=1e-5)
    assert found.value("bits_per_byte").value == pytest.approx(total[0] / math.log(2) / total[2], abs=1e-5)
    assert abs(total[0] / total[1] - math.log(300)) > 0.1, "this would compare uniform guesses"
    assert {row.dataset for row in found.rows} == {"web"}
    if windows == "all":
        assert found.value("nats_per_token").n == len(packed) > len(per_document)
        assert "nats_per_token_by_document" not in {row.metric for row in found.rows}
        return
    each = [nats / count for nats, count, _ in per_document]
    by_document = found.value("nats_per_token_by_document")
    assert by_document.value == pytest.approx(np.mean(each), abs=1e-5)
    assert by_document.standard_error == pytest.approx(np.std(each, ddof=1) / math.sqrt(len(each)), abs=1e-5)
    assert by_document.n == len(per_document)


def test_an_evaluation_on_documents_is_opened_as_it_was_returned(corpus: Corpus, texts: Path, tmp_path: Path) -> None:
    packed = miniplm.pack_documents(texts, tokenizer=corpus.tokenizer, out=tmp_path / "packed", sequence_length=T)
    found = miniplm.evaluate(ByHand(), held_out=packed, out=tmp_path / "web", documents="web", compute=CPU)
    opened = open_evaluation(tmp_path / "web")
    assert opened.rows == found.rows
    assert len(found.rows) == 3 * 4  # three metrics of all and of three sources
    written = json.loads((tmp_path / "web" / "evaluation.json").read_text())
    assert [Row(**entry) for entry in written] == list(found.rows)
    named = artifact.read(tmp_path / "web").identity
    miniplm.evaluate(ByHand(), held_out=packed, out=tmp_path / "dclm", documents="dclm", compute=CPU)
    assert artifact.read(tmp_path / "dclm").fingerprint != named.fingerprint


def test_an_evaluation_that_does_not_name_its_set_is_one_of_held_out_instances(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote them."""
    manifest = artifact.read(tmp_path / "evaluation")
    counts = {key: value for key, value in manifest.counts.items() if key not in {"dataset", "by_document"}}
    monkeypatch.setattr(artifact, "read", lambda *_, **__: dataclasses.replace(manifest, counts=counts))
    assert open_evaluation(tmp_path / "evaluation").rows == evaluation.rows
