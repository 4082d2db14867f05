"""A study from end to end: what is shared is made once, an interrupted one goes on, its figures are those by hand."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from conftest import write_jsonl
from miniplm import artifact, cli
from miniplm.errors import ArtifactMissingError
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.pipeline.study import Branch, branches, different_stages, run_study
from miniplm.recipe import Study, load_study
from miniplm.report.study import gather
from miniplm.report.write import write_study
from miniplm.training.objectives import NextToken

RECIPE = """
schema: 1
name: small
corpus: {{files: "{folder}/corpus.jsonl"}}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: 16
  split: {{reference: 0.2, held_out: 0.2, teacher: 0.2}}
teacher: &trained
  config: {{model_type: qwen2, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
    num_key_value_heads: 1}}
  tokens: 256
  batch_tokens: 128
  learning_rate: 1e-2
  precision: float32
reference: {{<<: *trained, seed: 1}}
score: {{dtype: float32}}
select:
  difference: {{sampler: difference}}
  random: {{sampler: random}}
students:
  control: {{<<: *trained, data: random}}
  miniplm: {{like: control, data: difference}}
evaluate: {{documents: {{web: {{files: "{folder}/web.jsonl"}}}}, groups: {{two: [s0, s2]}}}}
compute: {{device: cpu, checkpoints: 1, train_micro_batch: 8, report_to: none}}
"""
STUDY = RECIPE + "seeds: [3, 5]\ngrid: {{select.difference.ratio: {{few: 0.25, half: 0.5}}}}\n"
POINTS, SEEDS, STUDENTS = ("few", "half"), (3, 5), ("control", "miniplm")
KEY = "select.difference.ratio"


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    untimed(monkeypatch)


def untimed(patch: pytest.MonkeyPatch) -> None:
    """Without the matrix products that tell how fast this machine is: they take longer than these models."""
    for module in ("scoring.huggingface", "training.trainer"):
        patch.setattr(f"miniplm.{module}.matmul_rate", lambda *_: 1e12)


class Made:
    """A study that was run, and what it said."""

    def __init__(self, folder: Path) -> None:
        write_jsonl(folder / "corpus.jsonl", 60)
        write_jsonl(folder / "web.jsonl", 6, words=16, seed=4)
        self.path, self.recipe, self.root = folder / "study.yaml", folder / "recipe.yaml", folder / "run"
        self.path.write_text(STUDY.format(folder=folder))
        self.recipe.write_text(RECIPE.format(folder=folder))
        self.said: list[str] = []
        self.study: Study = load_study(self.path)
        self.branches: list[Branch] = branches(self.study, self.root)
        run_study(self.study, self.branches, self.root, self.said.append)
        _, self.lines = write_study(self.study, self.branches, self.root)

    def evaluation(self, seed: int, point: str, stage: str) -> Any:
        (branch,) = [b for b in self.branches if (b.variant.seed, b.variant.point[KEY]) == (seed, point)]
        return open_evaluation(branch.stages[stage].path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        untimed(patch)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield Made(folder)


@pytest.fixture
def findings(made: Made) -> dict[str, Any]:
    return dict(json.loads((made.root / "study.json").read_bytes()))


def contents(root: Path) -> dict[str, bytes]:
    """Every file but how it came to be."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "provenance.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def times(root: Path) -> dict[str, int]:
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_what_variants_share_is_made_once_and_the_rest_once_for_each(made: Made) -> None:
    begun = Counter(line.split()[1] for line in made.said if line.endswith(" ..."))
    per_point = {"select/difference"}  # no seed changes it
    per_seed = {"select/random"} | {f"{kind}/control" for kind in ("students", "evaluate", "loss/web")}
    per_run = {f"{kind}/miniplm" for kind in ("students", "evaluate", "loss/web")}
    expected = dict.fromkeys(made.branches[0].stages, 1)
    expected |= dict.fromkeys(per_point | per_seed, 2) | dict.fromkeys(per_run, 4)
    assert begun == expected
    assert different_stages(made.branches) == sum(expected.values())
    folders = [path.parent for path in made.root.glob("*/**/manifest.json") if "corpus-" not in str(path)]
    assert len(folders) + 1 == different_stages(made.branches), "the corpus counts for one"


def test_the_seeds_come_one_after_the_other_with_the_points_in_each(made: Made) -> None:
    told = [line for line in made.said if line.startswith("(")]
    labels = [f"seed {seed}, {KEY} {point}" for seed in SEEDS for point in POINTS]
    assert [branch.label for branch in made.branches] == labels
    assert told == [
        f"({n} of 4) {label}: {undone} of 18 stages to make"
        for n, (label, undone) in enumerate(zip(labels, (18, 4, 7, 3), strict=True), start=1)
    ]
    assert all(branch.done for branch in made.branches)


def test_a_second_time_nothing_is_made_and_the_page_has_the_same_bytes(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = {name: when for name, when in times(made.root).items() if "/" in name}
    before = contents(made.root)
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", str(made.path), "--out", str(made.root)])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"4 runs, {different_stages(made.branches)} different stages, in {made.root}\n")
    assert " ...\n" not in out
    assert {name: when for name, when in times(made.root).items() if "/" in name} == artifacts
    assert contents(made.root) == before
    assert "\n".join(made.lines) in out
    assert out.splitlines()[-1] == f"report: {made.root / 'study.html'}"


def test_the_study_in_the_run_directory_is_the_study_of_that_run(made: Made) -> None:
    again = branches(load_study(made.root / "study.yaml"), made.root)
    assert all(branch.done for branch in again)
    assert [branch.label for branch in again] == [branch.label for branch in made.branches]


@pytest.mark.slow
def test_interrupted_in_the_middle_it_reports_what_is_done_goes_on_and_ends_with_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(made.root, root)
    before, told = contents(root), ["study", str(made.path), "--out", str(root)]
    first = {stage.path.name for branch in made.branches[:2] for stage in branch.stages.values()}
    for branch in made.branches[2:]:
        for stage in branch.stages.values():
            if stage.path.name not in first:
                shutil.rmtree(root / stage.path.relative_to(made.root), ignore_errors=True)
    for view in root.glob("study.*"):
        view.unlink()
    control = root / made.branches[2].stages["students/control"].path.relative_to(made.root)
    real, calls = NextToken.loss, []

    def stop(*arguments: Any, **options: Any) -> Any:
        """Interrupt the training after that of the control, as Control-C does, in the middle of it."""
        calls.append(control.exists())
        if sum(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "loss", stop)
        with pytest.raises(SystemExit) as ended:
            cli.main(told)
        assert ended.value.code == 130
    assert list(root.glob("students/miniplm-*.partial"))
    capsys.readouterr()

    with pytest.raises(SystemExit) as ended:
        cli.main([*told, "--report"])
    assert not ended.value.code
    assert "2 of 4 runs are done; this is of those." in capsys.readouterr().out
    findings = json.loads((root / "study.json").read_bytes())
    assert (findings["runs_done"], findings["runs"]) == (2, 4)
    assert {(row["seeds"], row["verdict"]) for row in findings["rows"]} == {(1, None), (1, "one seed")}
    assert "2 of 4 runs are done" in (root / "study.html").read_text()
    assert list(root.glob("students/miniplm-*.partial")), "a report makes nothing"

    with pytest.raises(SystemExit) as ended:
        cli.main(told)
    assert not ended.value.code
    after = contents(root)
    assert sorted(after) == sorted(before)
    assert [name for name in after if after[name] != before[name]] == []


def test_of_a_study_of_which_nothing_is_done_there_is_no_report(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactMissingError, match=r"(?s)no run of the study is finished.*miniplm study"):
        gather(made.study, branches(made.study, tmp_path / "nothing"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", str(made.path), "--out", str(tmp_path / "nothing"), "--report"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: no run of the study is finished")
    assert not (tmp_path / "nothing").exists()


def test_run_takes_no_study_and_study_no_recipe(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, path, words in (
        ("run", made.path, "Run it with `miniplm study`;"),
        ("plan", made.path, "`miniplm cost` tells what it takes"),
        ("plan", made.path, "Run it with `miniplm study`;"),
        ("study", made.recipe, "Run it with `miniplm run`."),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, str(path), "--out", str(tmp_path / "run")])
        assert ended.value.code == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def by_hand(made: Made, point: str, student: str, yardstick: str) -> dict[int, float]:
    """A student's figure for each seed, from its evaluations, in the obvious way."""
    found = {}
    for seed in SEEDS:
        stage = f"loss/web/{student}" if yardstick == "web" else f"evaluate/{student}"
        scores = made.evaluation(seed, point, stage).scores
        of = {
            source: -scores.logp[scores.source_names == source].sum()
            / scores.n_tokens[scores.source_names == source].sum()
            for source in scores.sources
        }
        if yardstick == "mean of sources":
            found[seed] = sum(of.values()) / len(of)
        elif yardstick == "two":
            inside = [row for row, source in enumerate(scores.source_names) if source in ("s0", "s2")]
            found[seed] = -sum(scores.logp[inside]) / sum(scores.n_tokens[inside])
        elif yardstick.startswith("held_out/"):
            found[seed] = of[yardstick.removeprefix("held_out/")]
        elif yardstick == "web":  # the paper's: every document counts the same
            found[seed] = np.mean([-logp / tokens for logp, tokens in zip(scores.logp, scores.n_tokens, strict=True)])
        else:
            found[seed] = -scores.logp.sum() / scores.n_tokens.sum()
    return found


def test_every_figure_is_that_worked_out_from_the_evaluations(made: Made, findings: dict[str, Any]) -> None:
    yardsticks = ("held-out mixture", "two", "mean of sources", "held_out/s0", "held_out/s1", "held_out/s2", "web")
    assert {yardstick["name"] for yardstick in findings["yardsticks"]} == set(yardsticks)
    rows = {(row["point"], row["student"], row["yardstick"]): row for row in findings["rows"]}
    assert set(rows) == set(itertools.product(("ratio few", "ratio half"), STUDENTS, yardsticks))
    assert len(rows) == len(findings["rows"])
    for (point, student, yardstick), row in rows.items():
        label = point.removeprefix("ratio ")
        ours = by_hand(made, label, student, yardstick)
        theirs = by_hand(made, label, "control", yardstick)
        assert row["values"] == {str(seed): pytest.approx(value) for seed, value in ours.items()}
        assert (row["seeds"], row["unit"]) == (2, "nats per token" + (" by document" if yardstick == "web" else ""))
        assert_mean([*ours.values()], row["mean"], row["low"], row["high"])
        assert row["deviation"] == pytest.approx(np.std([*ours.values()], ddof=1))
        if student == "control":
            assert row["control"] is row["difference"] is row["difference_low"] is row["verdict"] is None
            continue
        gaps = [ours[seed] - theirs[seed] for seed in SEEDS]
        assert row["control"] == "control"
        assert row["differences"] == {str(s): pytest.approx(g) for s, g in zip(SEEDS, gaps, strict=True)}
        assert_mean(gaps, row["difference"], row["difference_low"], row["difference_high"])
        noise = row["difference_low"] <= 0 <= row["difference_high"]
        assert row["verdict"] == ("within noise" if noise else "better" if row["difference"] < 0 else "worse")


def test_points_are_compared_by_hand_and_what_no_point_changes_is_within_noise(
    made: Made, findings: dict[str, Any]
) -> None:
    rows = {(row["student"], row["yardstick"]): row for row in findings["points"]}
    assert len(rows) == len(findings["points"]) == 7 * len(STUDENTS)
    for (student, yardstick), row in rows.items():
        assert (row["point"], row["against"]) == ("ratio half", "ratio few")
        half, few = (by_hand(made, point, student, yardstick) for point in ("half", "few"))
        assert row["differences"] == {str(seed): pytest.approx(half[seed] - few[seed]) for seed in SEEDS}
        assert_mean([half[s] - few[s] for s in SEEDS], row["difference"], row["difference_low"], row["difference_high"])
        if student == "control":
            assert (row["difference"], row["verdict"]) == (0.0, "within noise")


def assert_mean(values: list[float], mean: float, low: float, high: float) -> None:
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), np.mean(values) - half, np.mean(values) + half))


def test_the_models_and_selections_behind_it_are_told_once(made: Made, findings: dict[str, Any]) -> None:
    losses = {m["role"]: (m["point"], m["loss"]) for m in findings["models"]}
    assert losses == {
        role: ("", pytest.approx(made.evaluation(3, "few", f"evaluate/{role}").value("nats_per_token").value))
        for role in ("teacher", "reference")
    }
    assert len(findings["models"]) == 2, "one teacher for all points"
    selections = {one["name"]: one["selected"] / one["of"] for one in findings["selections"]}
    assert selections == {
        "difference, ratio few": pytest.approx(0.25, abs=0.01), "random, ratio few": pytest.approx(0.5, abs=0.01),
        "difference, ratio half": pytest.approx(0.5, abs=0.01), "random, ratio half": pytest.approx(0.5, abs=0.01),
    }  # fmt: skip
    everything = {stage.identity.fingerprint for branch in made.branches for stage in branch.stages.values()}
    assert findings["stages"] == sorted(everything)
    assert (findings["seeds"], findings["grid"]) == ([3, 5], {KEY: ["few", "half"]})
    assert findings["versions"]["python"]


def test_the_table_on_disk_has_every_number_of_the_terminal_and_all_rows(made: Made, findings: dict[str, Any]) -> None:
    with (made.root / "study.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(findings["rows"]) + len(findings["points"])
    for row, found in zip(table, [*findings["rows"], *findings["points"]], strict=True):
        assert row == {key: "" if found[key] is None else str(found[key]) for key in row}
    cells = set()
    for row in table:
        numbers = [("mean", "low", ""), *([("difference", "difference_low", "+")] if row["difference"] else [])]
        for value, low, sign in numbers:
            half = float(row[value]) - float(row[low])
            cells |= {f"{float(row[value]):{sign}.4f}", f"{half:.4f}"}
    shown = [number for line in made.lines if "±" in line for number in re.findall(r"[-+]?\d+\.\d{4}", line)]
    at_points, between = (2 + 4) * len(POINTS), 2 * 2
    assert len(shown) == (at_points + between) * 4  # control and student on mixture, group, sources, web
    assert set(shown) <= cells
    assert made.branches[0].variant.point[KEY] in " ".join(made.lines)
    assert artifact.find(made.root)
