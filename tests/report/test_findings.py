"""The findings of a small finished run agree with its artifacts, recomputed the obvious way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import write_jsonl
from miniplm import recipe
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.pipeline.chain import Chain, chain
from miniplm.pipeline.run import run
from miniplm.report.findings import gather, tokens_to_reach
from miniplm.report.write import summary, write_report
from miniplm.sampling.base import open_selection
from miniplm.scoring.base import open_scores

TINY = (
    "config: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,"
    " num_key_value_heads: 2}, learning_rate: 5e-3, batch_tokens: 512, precision: float32"
)
RECIPE = f"""
schema: 1
name: small
corpus: {{files: CORPUS}}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: 32
  split: {{reference: 0.2, teacher: 0.3, held_out: 0.1}}
teacher: {{{TINY}, tokens: 8192}}
reference: {{{TINY}, tokens: 2048}}
score: {{dtype: float32}}
select:
  random: {{sampler: random}}
  difference: {{sampler: difference, ratio: 0.4}}
students:
  control: {{{TINY}, tokens: 4096, data: random}}
  student: {{like: control, data: difference}}
compute: {{device: cpu}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("run")
    corpus = write_jsonl(folder / "corpus.jsonl", 400)
    stages = chain(recipe.parse(RECIPE.replace("CORPUS", str(corpus))), folder / "run")
    run(stages)
    return stages


def test_figures_of_students_are_those_of_their_evaluations(finished: Chain) -> None:
    findings = gather(finished)
    assert findings["control"] == "control"
    for student in findings["students"]:
        scores = open_evaluation(finished[f"evaluate/{student['name']}"].path).scores
        assert student["loss"] == pytest.approx(-scores.logp.sum() / scores.n_tokens.sum())
        assert student["bits_per_byte"] == pytest.approx(-scores.logp.sum() / np.log(2) / scores.n_bytes.sum())
        assert student["tokens"] == 4096
        assert student["curve"][-1]["tokens"] == 4096


def test_the_comparison_is_paired_by_instance(finished: Chain) -> None:
    (comparison,) = gather(finished)["comparisons"]
    student, control = (open_evaluation(finished[f"evaluate/{n}"].path).scores for n in ("student", "control"))
    gaps = (control.logp - student.logp) / student.n_tokens  # all instances have as many tokens here
    assert comparison["difference"] == pytest.approx(gaps.mean())
    assert comparison["se"] == pytest.approx(gaps.std(ddof=1) / len(gaps) ** 0.5)
    clear = abs(comparison["difference"]) >= 2 * comparison["se"]
    assert (comparison["verdict"] != "within noise") == clear


def test_examples_are_what_their_headings_say(finished: Chain) -> None:
    effects = gather(finished)["effects"]
    kept = set(open_selection(finished["select/difference"].path).rows.tolist())
    teacher, reference = (open_scores(finished[f"score/{n}"].path) for n in ("teacher", "reference"))
    score = teacher.logp / teacher.n_tokens - reference.logp / reference.n_tokens
    assert effects["hard_kept"]
    assert effects["easy_dropped"]
    assert effects["hard_kept"][0]["row"] == int(np.argmax(score))
    assert all(example["row"] in kept for example in effects["hard_kept"])
    assert not any(example["row"] in kept for example in effects["easy_dropped"] + effects["noisy_dropped"])
    assert all(example["score"] < 0 for example in effects["noisy_dropped"])
    assert all(example["score"] >= 0 for example in effects["easy_dropped"] + effects["hard_kept"])
    assert bool(effects["noisy_dropped"]) != ("noisy_dropped" in effects["notes"])
    for example in effects["hard_kept"] + effects["easy_dropped"]:
        assert example["score"] == pytest.approx(score[example["row"]])
        assert example["score"] == pytest.approx(example["reference"] - example["teacher"])


def test_the_histogram_counts_every_instance(finished: Chain) -> None:
    scores = gather(finished)["scores"]
    assert sum(scores["counts"]) == scores["instances"] == len(open_scores(finished["score/teacher"].path))
    assert len(scores["edges"]) == len(scores["counts"]) + 1


def test_the_report_is_written_once_and_again_when_settings_change(finished: Chain) -> None:
    page = write_report(finished)
    written = page.stat().st_mtime_ns
    assert json.loads((finished.root / "report.json").read_text()) == json.loads(json.dumps(gather(finished)))
    assert write_report(finished).stat().st_mtime_ns == written, "a report that is up to date is left alone"
    (finished.root / "report.json").write_text(
        (finished.root / "report.json").read_text().replace("ratio: 0.4", "ratio: 0.6")
    )
    assert write_report(finished).stat().st_mtime_ns > written
    table = summary(finished)
    assert "(the control)" in table
    assert "student" in table
    rows = (finished.root / "evaluations.csv").read_text().splitlines()
    assert rows[0] == "model,dataset,source,metric,value,standard_error,n"
    assert {row.split(",")[0] for row in rows[1:]} == {"teacher", "reference", "control", "student"}


def test_tokens_to_reach_a_loss_by_hand() -> None:
    curve = [{"tokens": 100, "held_out_loss": 5.0}, {"tokens": 10_000, "held_out_loss": 3.0}]
    assert tokens_to_reach(curve, 4.0) == pytest.approx(1_000), "half way in the logarithm"
    assert tokens_to_reach(curve, 6.0) == 100
    assert tokens_to_reach(curve, 3.0) == pytest.approx(10_000)
    assert tokens_to_reach(curve, 2.9) is None
    assert tokens_to_reach([{"tokens": 1, "held_out_loss": None}], 1.0) is None


def test_the_page_is_one_file_without_references(finished: Chain) -> None:
    page: Path = write_report(finished)
    text = page.read_text()
    assert "<script" not in text
    assert "src=" not in text.replace("src=''", "")
    assert finished.recipe.name in text
