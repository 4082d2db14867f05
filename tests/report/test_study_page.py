"""What a study finds, from figures that are made up, so that every mean and difference is known; and its page."""

from __future__ import annotations

import copy
import csv
import io
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
from scipy import stats
from test_page import HOSTILE, SVG_TAGS, Document, headline_of, parse
from test_page import full_findings as findings_of_a_run

from miniplm import artifact
from miniplm.artifact import Identity
from miniplm.evaluation.loss import Row
from miniplm.pipeline.chain import Chain, Stage
from miniplm.pipeline.study import Branch
from miniplm.recipe import Study, parse_study
from miniplm.report import study as studies
from miniplm.report import study_page as page
from miniplm.report import summary

RECIPE = """
schema: 1
name: made-up
corpus: {files: x}
prepare: {tokenizer: t, split: {reference: 0.1, held_out: 0.1}}
teacher: {model: t}
reference: {model: r}
select:
  random: {sampler: random}
  difference: {sampler: difference}
students:
  control: {preset: qwen-1m, data: random, tokens: 1e6}
  miniplm: {like: control, data: difference}
evaluate: {documents: {web: {files: x}}, tasks: [piqa, arc_easy]}
"""
NATS, BITS = "nats_per_token", "bits_per_byte"
SOURCES = ("code", "prose")
Figure = Callable[[int | None, Mapping[str, str], str, str], float]  # seed, point, student, yardstick


@dataclass
class MadeUp:
    """A study whose artifacts say what `figure` says."""

    text: str
    figure: Figure
    done: Callable[[int | None, Mapping[str, str]], bool] = lambda *_: True
    documents: tuple[str, ...] = ("web",)
    tasks: tuple[str, ...] = ("piqa", "arc_easy")
    error: float | None = None  # of each task, over its questions
    by_document: float | None = None  # what the mean over documents has on top of the loss on them
    missing: tuple[str, ...] = ()
    notes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of students
    rows: dict[Path, tuple[Row, ...]] = field(default_factory=dict)
    unfinished: set[Path] = field(default_factory=set)

    def branches(self, study: Study) -> list[Branch]:
        return [self._branch(number, variant) for number, variant in enumerate(study.variants)]

    def _branch(self, number: int, variant: Any) -> Branch:
        stages = Chain(variant.recipe, Path(str(number)))
        names = ["prepare", *(f"select/{name}" for name in variant.recipe.select)]
        for student in ("teacher", "reference", *variant.recipe.students):
            figure = partial(self.figure, variant.seed, variant.point, student)
            names += [f"evaluate/{student}", *(f"loss/{of}/{student}" for of in self.documents)]
            self.rows[self._path(number, f"evaluate/{student}")] = (
                *_losses("held_out", "all", figure("held-out mixture")),
                *(row for of in SOURCES for row in _losses("held_out", of, figure(f"held_out/{of}"))),
            )
            for of in self.documents:
                measured = _losses(of, "all", figure(of))
                if self.by_document is not None:
                    measured.append(Row(of, "all", f"{NATS}_by_document", figure(of) + self.by_document, 0.1, 9))
                self.rows[self._path(number, f"loss/{of}/{student}")] = tuple(measured)
            if self.tasks:
                names.append(f"tasks/{student}")
                tasks = [Row(of, "all", "acc", figure(of), self.error, 100) for of in self.tasks]
                value = sum(row.value for row in tasks) / len(tasks)
                mean = Row("average", "all", "accuracy", value, self.error, len(tasks))
                self.rows[self._path(number, f"tasks/{student}")] = (*tasks, mean)
        for name in names:
            inputs = {"model": "m" * 64} if name.startswith("evaluate/") else {}
            path = self._path(number, name)
            stages[name] = Stage(name, Identity("x", 1, {"name": name}, inputs), path, (), lambda: None)
            if not self.done(variant.seed, variant.point):
                self.unfinished.add(path)
        return Branch(variant, stages)

    @staticmethod
    def _path(number: int, name: str) -> Path:
        return Path(str(number)) / name

    def gather(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        study = parse_study(self.text)
        branches = self.branches(study)
        counts = {"selected": 50, "of": 100, "by_source": {"code": [30, 40], "prose": [20, 60]}}
        with monkeypatch.context() as patch:
            patch.setattr(studies, "open_evaluation", lambda path: _Evaluation(self.rows[path]))
            patch.setattr(
                studies,
                "open_tasks",
                lambda path: SimpleNamespace(
                    rows=self.rows[path], missing=self.missing, notes=self.notes.get(path.name, {})
                ),
            )
            patch.setattr(artifact, "read", lambda _: SimpleNamespace(counts=counts))
            patch.setattr(artifact, "provenance", lambda _: {"versions": {"torch": "2"}, "platform": "here"})
            patch.setattr(artifact, "finished", lambda path, _: None if path in self.unfinished else path)
            return studies.gather(study, branches)


class _Evaluation:
    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows

    def value(self, metric: str) -> Row:
        return next(row for row in self.rows if row.metric == metric)


def _losses(dataset: str, source: str, nats: float) -> list[Row]:
    return [Row(dataset, source, NATS, nats, 0.1, 9), Row(dataset, source, BITS, 0.5 * nats, 0.1, 9)]


def wobble(seed: int | None, point: Mapping[str, str], student: str, yardstick: str) -> float:
    """A number that is another one for everything that it is of, and depends on nothing else."""
    return 4 + random.Random(f"{seed} {sorted(point.items())} {student} {yardstick}").random()


def by_key(findings: Mapping[str, Any]) -> dict[tuple[str, str, str], Any]:
    return {(row["point"], row["student"], row["yardstick"]): row for row in findings["rows"]}


def test_every_row_equals_the_slow_and_obvious_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, ratios = (4, 7, 9), ("0.25", "0.5")
    text = RECIPE + "seeds: [4, 7, 9]\ngrid: {select.*.ratio: [0.25, 0.5]}\n"
    rows = by_key(MadeUp(text, wobble).gather(monkeypatch))
    for ratio in ratios:
        point, names = {"select.*.ratio": ratio}, ("held_out/code", "held_out/prose")
        for student in ("control", "miniplm"):
            figures = {
                name: {of: [wobble(seed, point, of, name) for seed in seeds] for of in ("control", student)}
                for name in ("held-out mixture", *names, "web", "piqa", "arc_easy")
            }
            for mean, of in (("mean of sources", names), ("average", ("piqa", "arc_easy"))):
                figures[mean] = {
                    who: [sum(each) / 2 for each in zip(*(figures[one][who] for one in of), strict=True)]
                    for who in ("control", student)
                }
            for name, values in figures.items():
                row = rows.pop((f"ratio {ratio}", student, name))
                assert [row["values"][str(seed)] for seed in seeds] == pytest.approx(values[student])
                assert_interval(values[student], row["mean"], row["low"], row["high"])
                if student == "control":
                    assert (row["control"], row["difference"], row["verdict"]) == (None, None, None)
                    continue
                gaps = [ours - theirs for ours, theirs in zip(values[student], values["control"], strict=True)]
                assert [row["differences"][str(seed)] for seed in seeds] == pytest.approx(gaps)
                assert_interval(gaps, row["difference"], row["difference_low"], row["difference_high"])
                assert row["control"] == "control"
    assert not rows, "and no others"


def assert_interval(values: list[float], mean: float, low: float, high: float) -> None:
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((sum(values) / len(values), expected.low, expected.high))


def shifted(by: Mapping[str, float], noise: float = 0.01) -> Callable[[int | None, Mapping[str, str], str, str], float]:
    """Students that are off the control by so much on every yardstick; seeds differ by whole nats, pairs by little."""

    def figure(seed: int | None, _: Mapping[str, str], student: str, yardstick: str) -> float:
        return 5.0 + (seed or 0) + by.get(student, 0.0) + (noise * ((seed or 0) % 3 - 1) if student in by else 0.0)

    return figure


@pytest.mark.parametrize(
    ("by", "loss", "accuracy"),
    [
        (-0.3, "better", "worse"), (0.3, "worse", "better"), (0.001, "within noise", "within noise"),
        (-0.001, "within noise", "within noise"),
    ],
)  # fmt: skip
def test_verdicts_are_of_the_paired_difference_and_know_which_side_is_better(
    by: float, loss: str, accuracy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = by_key(MadeUp(RECIPE + "seeds: 3\n", shifted({"miniplm": by})).gather(monkeypatch))
    for name in ("held-out mixture", "mean of sources", "held_out/code", "web"):
        assert rows["", "miniplm", name]["verdict"] == loss
        assert rows["", "miniplm", name]["difference"] == pytest.approx(by)
    for name in ("piqa", "arc_easy", "average"):
        assert rows["", "miniplm", name]["verdict"] == accuracy


def test_of_a_perplexity_less_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp(RECIPE + "seeds: 3\n", shifted({"miniplm": -0.3}), tasks=("wikitext",))
    real = made._branch

    def with_perplexity(number: int, variant: Any) -> Branch:
        branch = real(number, variant)
        for student in variant.recipe.students:
            path = branch.stages[f"tasks/{student}"].path
            made.rows[path] = tuple(replace(row, metric="word_perplexity") for row in made.rows[path][:1])
        return branch

    made._branch = with_perplexity  # type: ignore[method-assign]
    assert by_key(made.gather(monkeypatch))["", "miniplm", "wikitext"]["verdict"] == "better"


def test_at_each_point_the_control_is_the_student_of_the_same_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE.replace("  miniplm:", "  long: {like: control, tokens: 2e6}\n  miniplm:")
    text += "seeds: 2\ngrid: {students.miniplm.tokens: {brief: 1e6, twice: 2e6, odd: 3e6}}\n"
    rows = by_key(MadeUp(text, wobble).gather(monkeypatch))
    for label, control in (("brief", "control"), ("twice", "long"), ("odd", None)):
        row = rows[f"tokens {label}", "miniplm", "web"]
        assert row["control"] == control
        if control is None:
            assert (row["difference"], row["verdict"], row["differences"]) == (None, None, {})
            continue
        point = {"students.miniplm.tokens": label}
        gaps = [wobble(seed, point, "miniplm", "web") - wobble(seed, point, control, "web") for seed in (0, 1)]
        assert row["difference"] == pytest.approx(sum(gaps) / 2)


WITHOUT_CONTROL = RECIPE.replace("data: random, tokens", "data: difference, tokens")


def test_a_study_without_a_control_compares_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MadeUp(WITHOUT_CONTROL + "seeds: 2\n", wobble).gather(monkeypatch)
    assert {(row["control"], row["difference"], row["verdict"]) for row in found["rows"]} == {(None, None, None)}
    html = page.render(found)
    assert headline_of(html) == "No student of this study has a control, so it compares nothing."
    assert "Nothing was compared with a control." in parse(html).words()
    assert "Where it helps" not in html
    assert not {"better", "worse"} & set(" ".join(line for line in studies.lines(found) if "±" in line[:80]).split())


def test_one_seed_has_differences_without_intervals_or_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MadeUp(RECIPE + "seeds: 1\n", shifted({"miniplm": -0.3})).gather(monkeypatch)
    row = by_key(found)["", "miniplm", "web"]
    assert (row["seeds"], row["difference"], row["verdict"]) == (1, pytest.approx(-0.31), "one seed")
    assert row["low"] is row["high"] is row["deviation"] is row["difference_low"] is None
    assert said(found) == (
        "On the held-out mixture, miniplm differs from control by −0.310 nats per token. "
        "One seed says nothing of others."
    )
    assert "  miniplm  4.6900  1 seed  -0.3100 against control  one seed" in studies.lines(found)


def test_a_grid_without_seeds_has_one_run_at_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MadeUp(RECIPE + "grid: {select.*.ratio: [0.25, 0.5]}\n", wobble).gather(monkeypatch)
    rows = by_key(found)
    for ratio in ("0.25", "0.5"):
        point = {"select.*.ratio": ratio}
        expected = wobble(None, point, "miniplm", "web") - wobble(None, point, "control", "web")
        row = rows[f"ratio {ratio}", "miniplm", "web"]
        assert (row["difference"], row["verdict"]) == (pytest.approx(expected), "one seed")
    assert found["seeds"] == []
    assert "seeds none" in parse(page.render(found)).words()


def test_only_runs_that_are_done_count_and_how_many_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE + "seeds: 3\ngrid: {select.*.ratio: [0.25, 0.5]}\n"
    done = lambda seed, point: (seed, point["select.*.ratio"]) in {(0, "0.25"), (0, "0.5"), (1, "0.25")}  # noqa: E731
    found = MadeUp(text, wobble, done).gather(monkeypatch)
    assert (found["runs_done"], found["runs"]) == (3, 6)
    rows = by_key(found)
    assert {key[0]: set(row["values"]) for key, row in rows.items()} == {"ratio 0.25": {"0", "1"}, "ratio 0.5": {"0"}}
    assert studies.lines(found)[1] == "3 of 6 runs are done; this is of those."
    assert "3 of 6 runs are done; this is of those." in parse(page.render(found)).words()
    whole = MadeUp(text, wobble).gather(monkeypatch)
    assert not any("runs are done" in line for line in studies.lines(whole))
    assert "this is of those" not in page.render(whole)


def test_where_students_read_different_tokens_losses_are_in_bits_per_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE.replace("students:", "retokenize: {theirs: {data: random, tokenizer: u}}\nstudents:")
    found = MadeUp(text + "seeds: 2\n", wobble).gather(monkeypatch)
    for (_, student, name), row in by_key(found).items():
        if name in {"web", "held-out mixture", "mean of sources"}:
            assert row["unit"] == "bits per byte"
        if name == "web":
            assert row["values"]["1"] == pytest.approx(0.5 * wobble(1, {}, student, "web"))
    html = page.render(found)
    assert "of each source, in bits per byte; below 0" in parse(html).words()
    assert "nats per token" not in said(found)


def test_models_of_some_points_only_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp(RECIPE + "grid: {reference.model: [r, s], select.*.ratio: [0.25, 0.5]}\n", wobble)
    study = parse_study(made.text)
    branches = made.branches(study)
    for branch in branches:
        stage = branch.stages["evaluate/reference"]
        stage.identity.inputs["model"] = branch.variant.point["reference.model"]  # type: ignore[index]
    with monkeypatch.context() as patch:
        patch.setattr(studies, "open_evaluation", lambda path: _Evaluation(made.rows[path]))
        found = studies._models(branches)
    assert [(one["role"], one["point"]) for one in found] == [
        ("teacher", ""),
        ("reference", "model r, ratio 0.25; model r, ratio 0.5"),
        ("reference", "model s, ratio 0.25; model s, ratio 0.5"),
    ]


def test_the_table_has_every_number_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MadeUp(RECIPE + "seeds: 3\ngrid: {select.*.ratio: [0.25, 0.5]}\n", wobble).gather(monkeypatch)
    table = list(csv.DictReader(io.StringIO(studies.as_csv(found))))
    rows = [*found["rows"], *found["points"]]
    assert len(table) == len(rows)
    for row, one in zip(table, rows, strict=True):
        assert row == {key: "" if one[key] is None else str(one[key]) for key in row}
    cells: set[str] = set()
    for row in table:
        for value, low, sign in (("mean", "low", ""), ("difference", "difference_low", "+")):
            if row[value]:
                number = float(row[value])
                cells |= {f"{number:{sign}.4f}", f"{number - float(row[low]):.4f}"}
    shown = [n for line in studies.lines(found) if "±" in line for n in re.findall(r"[-+]?\d+\.\d{4}", line)]
    assert len(shown) == 6 * ((2 + 4) * 2 + 2 * 2)  # at each of two points, and the second minus the first
    assert set(shown) <= cells


def test_the_terminal_is_steered_by_no_name() -> None:
    found = full_findings()
    for row in [*found["rows"], *found["points"]]:
        row["point"] += "\x1b[31m\u202e"
    found["tasks"]["notes"][0]["note"] += "\x1b[31m\u202e"
    assert all(line.isprintable() for line in studies.lines(found))


def test_a_study_without_students_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE[: RECIPE.index("students:")] + "seeds: 1\n"
    found = MadeUp(text, wobble, documents=(), tasks=()).gather(monkeypatch)
    assert found["rows"] == []
    assert studies.lines(found)
    assert headline_of(page.render(found)).startswith("No student")


def test_of_tasks_the_error_over_questions_counts_and_of_losses_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that all find the same difference: of tasks it is no more certain than their questions are many."""
    text = RECIPE + "seeds: 2\n"
    for error, expected in ((0.2, "within noise"), (0.01, "better"), (None, "within noise")):
        rows = by_key(MadeUp(text, shifted({"miniplm": 0.25}, noise=0.0), error=error).gather(monkeypatch))
        for name in ("piqa", "average"):
            row = rows["", "miniplm", name]
            assert row["verdict"] == expected
            half = 1.959964 * 2**0.5 * (error or 0.0)
            assert (row["difference"], row["difference_high"]) == pytest.approx((0.25, 0.25 + half))
        assert rows["", "miniplm", "web"]["verdict"] == "within noise", "no width is no verdict"
        assert rows["", "miniplm", "web"]["difference_low"] == pytest.approx(0.25)


def test_each_student_is_compared_with_itself_at_the_first_value_of_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE + "seeds: [4, 7, 9]\ngrid: {select.*.ratio: [0.25, 0.5], reference.model: [r, s, t]}\n"
    found = MadeUp(text, wobble).gather(monkeypatch)
    points = {(one["point"], one["against"], one["student"], one["yardstick"]): one for one in found["points"]}
    assert len(points) == len(found["points"])
    pairs = [(("0.5", model), ("0.25", model)) for model in "rst"]
    pairs += [((ratio, model), (ratio, "r")) for ratio in ("0.25", "0.5") for model in "st"]
    label = "ratio {}, model {}".format
    assert {key[:2] for key in points} == {(label(*point), label(*against)) for point, against in pairs}
    for point, against in pairs:
        ours, theirs = ({"select.*.ratio": one[0], "reference.model": one[1]} for one in (point, against))
        for student in ("control", "miniplm"):
            gaps = [wobble(s, ours, student, "web") - wobble(s, theirs, student, "web") for s in (4, 7, 9)]
            one = points[label(*point), label(*against), student, "web"]
            assert_interval(gaps, one["difference"], one["difference_low"], one["difference_high"])
            noise = one["difference_low"] <= 0 <= one["difference_high"]
            assert one["verdict"] == ("within noise" if noise else "better" if one["difference"] < 0 else "worse")
            assert one["control"] is None
            row = by_key(found)[label(*point), student, "web"]
            assert (one["mean"], one["values"], row["against"]) == (row["mean"], row["values"], None)
    shown = studies.lines(found)
    heading = shown.index("  ratio 0.5, model r minus ratio 0.25, model r")
    assert re.fullmatch(r"    control  [+-]\d\.\d{4} ± \d\.\d{4}  (within noise|better|worse)", shown[heading + 1])
    assert "  ratio 0.5, model t" in shown
    assert "  ratio 0.25, model t minus ratio 0.25, model r" in parse_lines(page.render(found))


def parse_lines(html: str) -> str:
    """The words of the page's table of points, with the terminal's word between point and other point."""
    return re.sub(r"(ratio \S+ model \S+) (?=ratio)", r"  \1 minus ", parse(html).words())


def test_without_a_grid_or_a_first_point_nothing_is_compared_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MadeUp(RECIPE + "seeds: 2\n", wobble).gather(monkeypatch)["points"] == []
    text = RECIPE + "seeds: 2\ngrid: {select.*.ratio: [0.25, 0.5, 0.75]}\n"
    without_first = MadeUp(text, wobble, done=lambda _, point: point["select.*.ratio"] != "0.25")
    found = without_first.gather(monkeypatch)
    assert found["points"] == []
    assert "Between points" not in page.render(found)


def test_a_study_of_points_without_a_control_compares_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MadeUp(WITHOUT_CONTROL + "seeds: 2\ngrid: {select.*.ratio: [0.25, 0.5]}\n", wobble).gather(monkeypatch)
    html = page.render(found)
    assert headline_of(html) == "No student of this study has a control; it compares points of its grid."
    assert "Between points of the grid" in html


def test_documents_whose_beginnings_are_read_count_as_the_paper_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp(RECIPE + "seeds: 2\n", wobble, by_document=0.5)
    row = by_key(made.gather(monkeypatch))["", "miniplm", "web"]
    assert row["unit"] == "nats per token by document"
    assert row["values"]["1"] == pytest.approx(0.5 + wobble(1, {}, "miniplm", "web"))
    text = RECIPE.replace("students:", "retokenize: {theirs: {data: random, tokenizer: u}}\nstudents:")
    made = MadeUp(text + "seeds: 2\n", wobble, by_document=0.5)
    assert by_key(made.gather(monkeypatch))["", "miniplm", "web"]["unit"] == "bits per byte"


def test_what_a_reader_of_tasks_has_to_know_is_said_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = {"control": {"piqa": "few"}, "miniplm": {"piqa": "few", "arc_easy": "cut"}}
    found = MadeUp(RECIPE + "seeds: 2\n", wobble, missing=("storycloze_2018",), notes=notes).gather(monkeypatch)
    assert found["tasks"] == {
        "missing": ["storycloze_2018"],
        "notes": [
            {"task": "piqa", "note": "few", "students": ["control", "miniplm"]},
            {"task": "arc_easy", "note": "cut", "students": ["miniplm"]},
        ],
    }
    shown = studies.lines(found)
    assert "tasks without storycloze_2018: no examples here; `average` is of the others." in shown
    assert "piqa: few (control, miniplm)" in shown
    assert "arc_easy : cut ( miniplm )" in parse(page.render(found)).words()


def said(findings: Mapping[str, Any]) -> str:
    """The headline, without the page around it."""
    return Document(str(page.headline(findings))).words()


def row(
    student: str, yardstick: str, unit: str, gap: float | None, half: float, verdict: str | None, point: str = ""
) -> dict[str, Any]:
    return {
        "point": point, "student": student, "yardstick": yardstick, "unit": unit, "seeds": 3, "mean": 5.0 + (gap or 0),
        "low": 4.9 + (gap or 0), "high": 5.1 + (gap or 0), "deviation": 0.04,
        "values": {"0": 5.0, "1": 5.1, "2": 4.9}, "control": None if gap is None else "control", "against": None,
        "difference": gap,
        "difference_low": None if gap is None else gap - half, "difference_high": None if gap is None else gap + half,
        "differences": {} if gap is None else {"0": gap, "1": gap + 0.01, "2": gap - 0.01}, "verdict": verdict,
    }  # fmt: skip


YARDSTICKS = [
    {"name": "held-out mixture", "kind": "mixture", "unit": "nats per token", "lower_is_better": True},
    {"name": "mean of sources", "kind": "sources", "unit": "nats per token", "lower_is_better": True},
    {"name": "held_out/code", "kind": "source", "unit": "nats per token", "lower_is_better": True},
    {"name": "held_out/prose", "kind": "source", "unit": "nats per token", "lower_is_better": True},
    {"name": "web", "kind": "documents", "unit": "nats per token", "lower_is_better": True},
    {"name": "piqa", "kind": "task", "unit": "acc", "lower_is_better": False},
    {"name": "average", "kind": "task", "unit": "accuracy", "lower_is_better": False},
]


def full_findings(
    verdicts: Mapping[str, tuple[float | None, str | None]] | None = None,
) -> dict[str, Any]:
    verdicts = verdicts or {"control": (None, None), "miniplm": (-0.074, "better"), "worst": (0.02, "within noise")}
    return {
        "schema": 1, "name": "sampling", "runs": 6, "runs_done": 6, "seeds": [0, 1, 2],
        "grid": {"select.*.ratio": ["0.25", "0.5"]}, "yardsticks": copy.deepcopy(YARDSTICKS),
        "rows": [
            row(student, str(y["name"]), str(y["unit"]), gap, 0.012, verdict, point)
            for point in ("ratio 0.25", "ratio 0.5") for student, (gap, verdict) in verdicts.items()
            for y in YARDSTICKS
        ],
        "points": [
            row(student, str(y["name"]), str(y["unit"]), -0.031, 0.012, "better", "ratio 0.5")
            | {"against": "ratio 0.25", "control": None}
            for student in verdicts for y in YARDSTICKS
        ],
        "tasks": {
            "missing": ["storycloze_2018"],
            "notes": [{"task": "piqa", "note": "3 requests lost their beginning", "students": ["miniplm"]}],
        },
        "models": [
            {"role": "teacher", "point": "", "loss": 2.3}, {"role": "reference", "point": "ratio 0.5", "loss": 4.5},
        ],
        "selections": [
            {
                "name": "difference, ratio 0.25", "selected": 50, "of": 100,
                "by_source": [
                    {"source": "code", "pool": 40, "selected": 30}, {"source": "prose", "pool": 60, "selected": 20},
                ],
            }
        ],
        "stages": ["ab" * 32], "study": "schema: 1\nname: sampling\n", "versions": {"torch": "2.13.0"},
        "platform": "Linux",
    }  # fmt: skip


FIXED = ("verdict", "kind", "role")


def with_text(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """The same findings with every free text changed, so that rows still fit their yardsticks."""
    if isinstance(value, str):
        return value if key in FIXED else change(value)
    if isinstance(value, list):
        return [with_text(one, change, key) for one in value]
    if isinstance(value, dict):
        return {change(k) if key in ("versions", "grid") else k: with_text(v, change, k) for k, v in value.items()}
    return value


def test_every_part_of_the_page_is_there() -> None:
    document = parse(page.render(full_findings()))
    assert Counter(document.tags)["svg"] == 3
    assert set(document.svg_tags) <= SVG_TAGS
    assert document.inside("title") == ["sampling – MiniPLM study"]
    words = document.words()
    for expected in (
        "6 of 6 runs; seeds 0, 1, 2.", "select.*.ratio : 0.25, 0.5", "miniplm · ratio 0.25",
        "4.926 ± 0.100 −0.074 ± 0.012 better", "accuracy, higher is better", "all 2.300", "ratio 0.5 4.500",
        "difference, ratio 0.25: 50% of all", "nats per token; better to the left", "accuracy; better to the right",
        "torch 2.13.0", "name: sampling", "Between points of the grid",
        "miniplm ratio 0.5 ratio 0.25 −0.031 ± 0.012 better",
        "Tasks without storycloze_2018 :", "piqa : 3 requests lost their beginning ( miniplm )",
    ):  # fmt: skip
        assert expected in words, expected
    assert not {"None", "nan"} & set(words.split())


def test_the_page_shows_every_figure_of_every_row() -> None:
    found = full_findings()
    for number, one in enumerate(found["rows"]):
        one |= {"mean": 3 + number / 100, "low": 3 + number / 100 - 0.05}
    words = parse(page.render(found)).words()
    for one in found["rows"]:
        assert f"{one['mean']:.3f} ± 0.050" in words


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (
            {"miniplm": (-0.074, "better"), "other": (-0.2, "within noise")},
            "On the held-out mixture, miniplm · ratio 0.25 differs from control by −0.074 ± 0.012 nats per token, over "
            "3 seeds: better. Of 4 ways compared: 2 better, 2 within noise.",
        ),
        (
            {"miniplm": (-0.004, "within noise"), "other": (0.2, "worse")},
            "On the held-out mixture, nothing is better than control by more than noise; miniplm · ratio 0.25 comes "
            "nearest: −0.004 ± 0.012 nats per token over 3 seeds. Of 4 ways compared: 2 within noise, 2 worse.",
        ),
        (
            {"one": (0.3, "worse"), "other": (0.2, "worse")},
            "On the held-out mixture, nothing is better than control by more than noise; other · ratio 0.25 comes "
            "nearest: +0.200 ± 0.012 nats per token over 3 seeds. Of 4 ways compared: 4 worse.",
        ),
    ],
)
def test_the_headline_follows_the_verdicts(verdicts: Any, expected: str) -> None:
    assert said(full_findings(verdicts)) == expected


def test_where_the_mixture_was_not_measured_the_first_yardstick_leads() -> None:
    found = full_findings({"miniplm": (0.03, "better"), "other": (0.01, "better")})
    found["yardsticks"] = [y for y in found["yardsticks"] if y["kind"] == "task"]
    found["rows"] = [one for one in found["rows"] if one["yardstick"] in {"piqa", "average"}]
    assert headline_of(page.render(found)).startswith(
        "On the piqa, miniplm · ratio 0.25 differs from control by +0.030"
    )


@pytest.fixture(scope="module")
def harmless() -> Document:
    return parse(page.render(with_text(full_findings(), lambda text: f"{text} x")))


@pytest.mark.parametrize("text", [" ".join(HOSTILE[number::3]) for number in range(3)], ids=range(3))
def test_hostile_text_is_shown_and_does_nothing(text: str, harmless: Document) -> None:
    html = page.render(with_text(full_findings(), lambda name: f"{name} {text}"))
    document = parse(html)
    assert Counter(document.tags) == Counter(harmless.tags), "no markup of its own"
    assert set(document.svg_tags) <= SVG_TAGS
    assert [name for _, name, _ in document.attributes if name.startswith("on")] == []
    assert html.isprintable() or not set(html) & {"\x1b", "\x00", "\x7f", "\x85", "\u202e", "\u2066"}
    html.encode()
    assert "49" not in document.inside("title")[0]


def test_the_page_needs_no_network_and_runs_no_script() -> None:
    html = page.render(full_findings())
    document = parse(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(document.tags)
    named = {"xmlns", "xmlns:xlink"}
    reaching = [
        value for _, name, value in document.attributes if name not in named and re.search(r"https?:|//", value)
    ]
    assert reaching == []
    assert [v for _, name, v in document.attributes if name in ("href", "xlink:href", "src") and v[:1] != "#"] == []
    assert "@import" not in html
    (policy,) = [
        value for tag, name, value in document.attributes if (tag, name) == ("meta", "content") and "src" in value
    ]
    assert policy.startswith("default-src 'none'")


def test_the_same_findings_give_the_same_bytes_whatever_the_users_matplotlib() -> None:
    first = page.render(full_findings())
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page.render(full_findings()) == first


def test_figures_are_described_and_show_what_was_found() -> None:
    document = parse(page.render(full_findings()))
    labels = [value for tag, name, value in document.attributes if (tag, name) == ("svg", "aria-label")]
    assert "miniplm · ratio 0.25 on held-out mixture -0.074 better" in labels[0]
    assert "miniplm · ratio 0.5 on held_out/code -0.074" in labels[1]
    drawn = {text for path, text in document.text if "svg" in path and text.strip()}
    assert {"miniplm · ratio 0.25", "held-out mixture", "web", "code", "prose"} <= drawn


def test_a_run_says_how_well_the_other_models_do_a_line_each() -> None:
    found = copy.deepcopy(findings_of_a_run())
    asked = {one["model"]: one["average"] for one in found["tasks"]["models"]}
    others = {**{one["role"]: one for one in found["models"]}, **{one["name"]: one for one in found["others"]}}
    assert {"teacher", "reference"} <= others.keys()
    assert set(others) & set(asked)
    shown = summary.lines(found)
    for name, one in others.items():
        (line,) = (line for line in shown if line.startswith(f"{name}: "))
        if one["loss"] is not None:
            assert f"{one['loss']:.4f}" in line
        if asked.get(name) is not None:
            assert f"average accuracy {asked[name]['value']:.1%}" in line
    found |= {"tasks": None, "models": [{"role": "teacher", "objective": None, "loss": None, "bits_per_byte": None}]}
    assert "teacher: not measured" in summary.lines(found)
