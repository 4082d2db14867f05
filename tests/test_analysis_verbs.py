"""Verbs of analyses: each says what its analysis found in numbers that are known beforehand, and refuses the rest."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import miniplm
from conftest import write_jsonl
from miniplm import cli
from miniplm.analysis.data_constrained import effective_tokens
from miniplm.artifact import Identity
from miniplm.cli import analyses
from miniplm.packing.instances import Packed
from miniplm.pipeline.curves import STEEP, Reading, curve_of, data_needed, extrapolate, read_points, scaling
from miniplm.report.tables import examples_lines, scaling_rows
from miniplm.sampling.base import Pool, Selection, save
from miniplm.scoring.base import Scores, encode_sources

Run = Callable[..., str]


@pytest.fixture
def succeed(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb that must succeed; gives its standard output."""
    return lambda *arguments: _run(capsys, 0, arguments)


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb that must end with an error of the user's; gives the message."""
    return lambda *arguments: _run(capsys, 1, arguments)


def _run(capsys: pytest.CaptureFixture[str], expected: int, arguments: tuple[object, ...]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert int(ended.value.code or 0) == expected, err
    assert "Traceback" not in err
    return err if expected else out


def losses(path: Path, *, a: float = 3e4, alpha: float = 0.3, floor: float = 2.0, times: float = 1.0) -> Path:
    """A curve that follows its law exactly, but for a steep beginning that does not; it needs `times` the compute."""
    with path.open("w") as file:
        for compute in np.linspace(5e13, 1e15, 20):
            loss = a / compute**alpha + floor + (1.0 if compute < 0.15e15 else 0.0)
            point = {"flops": compute * times, "tokens": compute * times / 1e6, "held_out_loss": loss, "note": "text"}
            file.write(json.dumps(point) + "\n")
    return path


def accuracies(path: Path, *, times: float = 1.0, full: float = 1.0) -> Path:
    """An accuracy whose distance from `full` follows a law with the floor 0.2."""
    rows = [f"{c * times},{full * (0.8 - 3.0 / c**0.3)}" for c in np.geomspace(1e3, 1e6, 12)]
    path.write_text("\n".join(["tokens,accuracy", *rows]) + "\n")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_warm_up_is_the_reports_and_is_left_out_of_the_controls_law_too(
    tmp_path: Path, succeed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miniplm.report import analysis

    assert analysis.STEEP is STEEP
    assert f"[default: {STEEP:g}]" in " ".join(succeed("scaling", "--help").split())
    student, control = losses(tmp_path / "s.jsonl"), losses(tmp_path / "c.jsonl", times=2)
    curves = {"s": read_points(student), "c": read_points(control)}
    told = scaling(curves, "c")
    assert [one["left_out"] for one in told["curves"]] == [3, 3]
    assert told["curves"][0]["constants"]["alpha"]["value"] == pytest.approx(0.3, rel=1e-3)
    further = losses(tmp_path / "f.jsonl", a=2.9e4)  # lower in the end than the control, so that its law is asked
    (one,) = scaling({"f": read_points(further), "c": curves["c"]}, "c")["reductions"]
    found = one["at_end_of_student"]
    assert found["read_from"] == "law"
    assert found["ratio"]["value"] == pytest.approx(2 * (3 / 2.9) ** (1 / 0.3), rel=1e-3)
    (wrong,) = scaling({"f": read_points(further), "c": curves["c"]}, "c", how=Reading(warm_up=0))["reductions"]
    assert wrong["at_end_of_student"]["ratio"]["value"] != pytest.approx(found["ratio"]["value"], rel=1e-2)


def test_a_floor_at_the_bound_of_the_fit_is_no_finding(tmp_path: Path, succeed: Run) -> None:
    falling = losses(tmp_path / "falling.jsonl", floor=0.0)
    said = succeed("scaling", falling, losses(tmp_path / "flat.jsonl"), "--out", tmp_path / "out")
    assert said.count("no floor can be told from these points") == 1
    told = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [one["floor_told"] for one in told["curves"]] == [False, True]


@pytest.mark.parametrize("full", [1, 100])
def test_the_law_of_an_accuracy_is_that_of_its_distance_from_the_ceiling(tmp_path: Path, full: int) -> None:
    how = Reading("tokens", "accuracy", ceiling=full, warm_up=0)
    curves = {
        "student": read_points(accuracies(tmp_path / "s.csv", full=full)),
        "control": read_points(accuracies(tmp_path / "c.csv", full=full, times=3)),
    }
    found = scaling(curves, "control", at=[1e7], how=how)
    one = found["curves"][0]
    assert one["constants"]["floor"]["value"] == pytest.approx(0.2 * full, rel=1e-3)
    last, beyond = one["extrapolated"]
    assert last["value"] == pytest.approx(full * (0.8 - 3 / 1e6**0.3), rel=1e-3)
    assert beyond["value"] == pytest.approx(full * (0.8 - 3 / 1e7**0.3), rel=1e-3)
    assert beyond["low"] <= beyond["value"] <= beyond["high"] < full
    for reduction in (found["reductions"][0][f"at_end_of_{end}"] for end in ("student", "control")):
        assert reduction["ratio"]["value"] == pytest.approx(3, rel=1e-3)
        assert reduction["target"] == pytest.approx(last["value"], rel=1e-3)


def test_a_curve_that_goes_the_wrong_way_is_refused(tmp_path: Path, fail: Run, succeed: Run) -> None:
    rising = accuracies(tmp_path / "a.csv")
    given = ("scaling", rising, "--along", "tokens", "--value", "accuracy")
    assert "--ceiling 1" in fail(*given)
    assert "the law that of 1 − accuracy" in succeed(*given, "--ceiling", 1, "--warm-up", 0)
    assert "below 0.5" in fail(*given, "--ceiling", 0.5)
    assert "falls" in fail("scaling", losses(tmp_path / "l.jsonl"), "--ceiling", 10)


def test_data_reduction_is_that_of_a_known_law(tmp_path: Path, succeed: Run, fail: Run) -> None:
    unique = 1e9
    seen = np.geomspace(1e8, 8e9, 14)
    worth = effective_tokens(unique, seen)
    control = tmp_path / "control.csv"
    control.write_text(
        "tokens,held_out_loss\n" + "".join(f"{d},{4e3 / w**0.4 + 2}\n" for d, w in zip(seen, worth, strict=True))
    )
    needed = 1.5e10
    loss = float(4e3 / needed**0.4 + 2)
    student = tmp_path / "student.csv"
    student.write_text(f"tokens,held_out_loss\n1e9,{loss}\n5e8,{loss + 1}\n")
    for given in (("--loss", loss), ("--student", student)):
        said = succeed("data-reduction", control, "--unique", unique, "--out", tmp_path / "out", *given)
        assert "data reduction          15 [" in said
        told = json.loads((tmp_path / "out" / "data-reduction.json").read_text())
        assert told["ratio"]["value"] == pytest.approx(needed / unique, rel=1e-3)
        assert told["extra"]["value"] == pytest.approx(needed - unique, rel=1e-3)
    rows = {row["what"]: row for row in rows_of(tmp_path / "out" / "data-reduction.csv")}
    assert float(rows["ratio"]["value"]) == told["ratio"]["value"]
    assert float(rows["floor"]["value"]) == pytest.approx(2, rel=1e-3)
    assert data_needed(read_points(control), 1, unique)["needed"]["value"] is None, "the law never comes down to 1"
    assert "–" in succeed("data-reduction", control, "--unique", unique, "--loss", 1)
    assert "--student" in fail("data-reduction", control, "--unique", unique)
    assert "--loss" in fail("data-reduction", control, "--unique", unique, "--loss", 2, "--student", student)
    assert "above 0" in fail("data-reduction", control, "--unique", unique, "--loss", -2)
    assert "above 0" in fail("data-reduction", control, "--unique", 0, "--loss", loss)


def test_runs_of_several_sizes_give_the_law_of_parameters_and_tokens(tmp_path: Path, succeed: Run, fail: Run) -> None:
    lines = ["n,tokens,loss"]
    for n in (1e7, 3e7, 1e8, 3e8):
        for d in (1e9, 4e9, 16e9):
            lines.append(f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}")
    runs = tmp_path / "runs.csv"
    runs.write_text("\n".join(lines))
    given = ("scaling", runs, "--parameters", "n", "--value", "loss")
    said = succeed(*given, "--at", 1e12, "--out", tmp_path / "out")
    assert "loss at 3e+08 parameters and 1e+12: " in said
    told = json.loads((tmp_path / "out" / "scaling.json").read_text())["curves"][0]
    expected = {"a": 400, "alpha": 0.34, "b": 410, "beta": 0.28, "floor": 1.7}
    assert {name: one["value"] for name, one in told["constants"].items()} == pytest.approx(expected, rel=0.02)
    beyond = told["extrapolated"][-1]
    assert beyond["value"] == pytest.approx(1.7 + 400 / 3e8**0.34 + 410 / 1e12**0.28, rel=1e-3)
    assert "--control" in fail(*given, "--control", runs)


def test_files_that_are_no_curve_are_refused_by_name(tmp_path: Path, fail: Run) -> None:
    def error(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        said = fail("scaling", tmp_path / name)
        assert name in said or "point of the curve" in said
        return said

    assert "row 2 has more cells" in error("long.csv", "flops,held_out_loss\n1,2\n2,3,4\n")
    assert "line 2 is no JSON object" in error("list.jsonl", '{"flops": 1}\n[1, 2]\n')
    assert "because" in error("broken.jsonl", "{")
    assert "'flops', 'held_out_loss'" in error("other.csv", "a,b\n1,2\n")
    assert "'many'" in error("text.csv", "flops,held_out_loss\n1,many\n")
    assert "[1]" in error("nested.jsonl", '{"flops": [1], "held_out_loss": 2}\n')
    assert "no-such" in fail("scaling", tmp_path / "no-such")
    assert "--at -5" in fail("scaling", losses(tmp_path / "l.jsonl"), "--at", -5)


def test_only_the_fields_that_are_asked_for_have_to_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("\ufeffnote,flops,held_out_loss\nfirst,1,4\n,2,\nlast,3,2\n")
    curve = curve_of(read_points(path))
    assert (curve.compute.tolist(), curve.value.tolist()) == ([1, 3], [4, 2])
    assert extrapolate("l", read_points(losses(tmp_path / "l.jsonl")))["points"] == 20, "with a field of text"


def test_tables_have_a_figure_in_a_row_and_the_laws_are_drawn(tmp_path: Path, succeed: Run) -> None:
    (tmp_path / "other").mkdir()
    student, control = losses(tmp_path / "x.jsonl"), losses(tmp_path / "other" / "x.jsonl", times=2)
    out = tmp_path / "out"
    said = succeed("scaling", student, "--control", control, "--at", 1e16, "--at", 1e17, "--out", out)
    assert "x.jsonl against x.jsonl-2" in said
    rows = rows_of(out / "scaling.csv")
    assert not any(mark in cell for row in rows for cell in row.values() for mark in "[{")
    told = json.loads((out / "scaling.json").read_text())
    assert [(r["name"], r["what"]) for r in rows] == [(r["name"], r["what"]) for r in scaling_rows(told)]
    beyond = [r["compute"] for r in rows if (r["name"], r["what"]) == ("x.jsonl", "held_out_loss")]
    assert [float(c) for c in beyond] == [1e15, 1e16, 1e17]
    (reduction,) = [r for r in rows if r["what"] == "reduction at end of control"]
    assert float(reduction["value"]) == pytest.approx(2, rel=1e-3)
    svg = (out / "scaling.svg").read_text()
    assert svg.startswith("<svg")
    assert "x.jsonl-2" in svg
    succeed("scaling", student, "--along", "tokens", "--out", out)
    assert not (out / "scaling.svg").exists(), "the figure's axis is of operations"


def test_curves_are_fitted_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "accelerate"]))  # importing them fails
from miniplm.cli import main
main(["scaling", {str(losses(tmp_path / "l.jsonl"))!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "l.jsonl: 20 points along flops" in done.stdout


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("verbs")
    source = write_jsonl(folder / "c.jsonl", 120)
    return miniplm.prepare(source, tokenizer={"train": {"vocab_size": 300}}, sequence_length=32, out=folder / "c").pool


@pytest.fixture
def scored(pool: Packed, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The arguments for two models' scores of the pool, which are random and on no disk."""
    draw = np.random.default_rng(0)
    n = len(pool)
    names, codes = encode_sources(pool.dataset["source"][:])
    reference = draw.gamma(9, 0.4, n)
    told = {"teacher": reference - draw.gamma(2, 0.5, n) - 0.1, "reference": reference}
    tokens, n_bytes = np.full(n, 10, np.int32), np.full(n, 40, np.int32)
    made = {
        who: Scores(-10 * np.maximum(0.01, loss), tokens, n_bytes, codes, names, pool.fingerprint, "t")
        for who, loss in told.items()
    }
    monkeypatch.setattr(analyses, "_scores", lambda path: made[path.name])
    return ("effects", "--teacher", "teacher", "--reference", "reference")


def chosen(pool: Packed, out: Path, share: int) -> Path:
    """A selection of every `share`-th instance, on disk."""
    rows = np.arange(0, len(pool), share)
    save(
        out,
        Identity("selection", 1, {"share": share}, {"pool": pool.fingerprint}),
        Selection.of_rows(rows, Pool.of(pool)),
    )
    return out


def test_effects_say_what_they_had_to_make_do_with(
    pool: Packed, scored: tuple[str, ...], succeed: Run, tmp_path: Path
) -> None:
    said = succeed(*scored, "--packed", pool.path)
    assert "No --rows was given: the upper half by score stands for what is kept." in said
    heading = said.splitlines().index("noisy, dropped")
    assert said.splitlines()[heading + 1] == "No instance that was dropped scored below 0."
    every = chosen(pool, tmp_path / "every", 2)
    assert "No --rows" not in succeed(*scored, "--packed", pool.path, "--rows", every, "--instance", 3)
    told = {"effects": [{"kept": 1}], "notes": {"hard_kept": "None."}, "neighbours": []}
    told |= {name: [] for name in ("easy_dropped", "hard_kept", "noisy_dropped")}
    assert examples_lines(told) == [
        "",
        "easy, dropped",
        "",
        "hard, kept",
        "None.",
        "",
        "noisy, dropped",
        "",
        "neighbours",
    ]


def test_effects_of_another_pools_selection_are_refused(
    pool: Packed, scored: tuple[str, ...], fail: Run, tmp_path: Path
) -> None:
    other = Pool("other", np.zeros(1000, np.int32), ("s",))
    save(tmp_path / "rows", Identity("selection", 1, {}, {}), Selection.of_rows(np.arange(900, 1000), other))
    said = fail(*scored, "--rows", tmp_path / "rows")
    assert "packed other  1,000 instances" in said
    assert f"{len(pool):,} instances" in said


def test_neighbours_need_the_text(scored: tuple[str, ...], fail: Run) -> None:
    assert "--packed" in fail(*scored, "--instance", 3)


def test_effects_are_drawn(pool: Packed, scored: tuple[str, ...], succeed: Run, tmp_path: Path) -> None:
    succeed(*scored, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "effects.svg").read_text().startswith("<svg")


def test_selections_of_one_name_are_both_measured_and_set_beside_the_pool(
    pool: Packed, succeed: Run, tmp_path: Path
) -> None:
    for folder, share in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        chosen(pool, tmp_path / folder / "chosen", share)
    given = [part for folder in "aba" for part in ("--rows", tmp_path / folder / "chosen")]  # one of them twice
    said = succeed("diversity", pool.path, *given, "--sample", 40, "--out", tmp_path / "out").splitlines()
    assert [line.split()[0] for line in said[2:7]] == ["pool", "chosen", "less", "chosen-2", "less"]
    told = json.loads((tmp_path / "out" / "diversity.json").read_text())["collections"][1]["distinct_1"]["minus_pool"]
    assert f"{told['value']:+.3f} ± {(told['high'] - told['low']) / 2:.3f}" in said[4]
