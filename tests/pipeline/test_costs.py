"""Costs before a run against costs after it, on a tiny run of everything; and what is not known stays unknown."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from miniplm import artifact, cli
from miniplm.artifact import Identity
from miniplm.errors import ModelError
from miniplm.models.flops import forward_flops, without_weights
from miniplm.pipeline import chain as chains
from miniplm.pipeline import estimates as estimating
from miniplm.pipeline import sizes
from miniplm.pipeline import speeds as measuring
from miniplm.pipeline.chain import Chain, chain
from miniplm.pipeline.cost_table import as_csv, brief, duration, lines, operations, published, published_lines, size
from miniplm.pipeline.costs import Costs, StageCost, costs, together
from miniplm.pipeline.run import run
from miniplm.recipe import GivenModel, parse, parse_study

T = 31
MODEL = (
    "config: {model_type: qwen2, hidden_size: WIDTH, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2}, batch_tokens: 248, learning_rate: 1e-3"
)
RECIPE = f"""
schema: 1
name: costs
corpus: {{files: FILES}}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: {T}
  split: {{reference: 0.2, teacher: 0.2, held_out: 0.2}}
teacher:   {{{MODEL.replace("WIDTH", "48")}, tokens: 2000}}
reference: {{{MODEL.replace("WIDTH", "16")}, epochs: 1}}
score: {{dtype: float32}}
select:
  difference: {{sampler: difference, ratio: 0.4}}
  random: {{sampler: random, ratio: 0.4}}
"""
STUDENTS = f"""
generate:
  rewritten: {{data: random, dtype: float32}}
students:
  miniplm: {{{MODEL.replace("WIDTH", "32")}, data: difference, tokens: 3000, keep: 1}}
  control: {{like: miniplm, data: random, keep: 0}}
  vanilla_kd: {{like: control, objective: vanilla_kd, match: flops}}
  minillm: {{like: control, objective: minillm, match: operations}}
  seqkd: {{like: control, data: rewritten, epochs: 0.5}}
compute: {{device: cpu, report_to: none, train_micro_batch: 8}}
"""
PROXY = """
proxy: {share: 0.5, epochs: 2, batch: 8, precision: float32}
evaluate: {held_out: false}
compute: {device: cpu, report_to: none, train_micro_batch: 8}
"""


def laid_out(folder: Path, root: str, text: str) -> Chain:
    files = folder / "text.jsonl"
    if not files.exists():
        write_jsonl(files, 400)
    return chain(parse(text.replace("FILES", str(files))), folder / root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("costs")


@pytest.fixture(scope="module")
def before(folder: Path) -> Costs:
    return costs(laid_out(folder, "nothing", RECIPE + STUDENTS), measure=False)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Costs:
    """Of a run whose corpus is done, and nothing else."""
    stages = laid_out(folder, "run", RECIPE + STUDENTS)
    run(stages, "prepare")
    return costs(stages, measure=False)


@pytest.fixture(scope="module")
def made(folder: Path, packed: Costs) -> Chain:
    stages = laid_out(folder, "run", RECIPE + STUDENTS)
    run(stages)
    return stages


@pytest.fixture(scope="module")
def after(made: Chain) -> Costs:
    return costs(made)


def by_name(found: Costs) -> dict[str, StageCost]:
    return {cost.stage: cost for cost in found.stages}


@pytest.mark.slow
def test_trainings_by_tokens_are_exact_before_anything_is_there(before: Costs, after: Costs) -> None:
    exact = ["train/teacher", *(f"students/{name}" for name in ("miniplm", "control", "vanilla_kd", "minillm"))]
    for name in exact:
        expected, found = by_name(before)[name], by_name(after)[name]
        assert (expected.flops, expected.tokens) == (found.flops, found.tokens), name
        assert (expected.basis, found.basis) == ("estimated", "measured")
    for name in ("train/reference", "students/seqkd", "score/teacher"):
        assert by_name(before)[name].basis == "guessed"


@pytest.mark.slow
def test_once_the_corpus_is_packed_all_operations_are_exact(packed: Costs, made: Chain, after: Costs) -> None:
    for name, stage in made.items():
        expected, found = by_name(packed)[name], by_name(after)[name]
        manifest, how = artifact.read(stage.path), artifact.provenance(stage.path)
        told = {
            "model": manifest.counts.get("train_flops"), "scores": how.get("flops"), "evaluation": how.get("flops"),
            "packed": manifest.counts.get("teacher_flops"),
        }  # fmt: skip
        assert expected.flops == found.flops == told.get(manifest.identity.kind), name
        assert expected.tokens == found.tokens, name
        assert not expected.guessed


@pytest.mark.slow
@pytest.mark.parametrize(("which", "factor"), [("packed", 2), ("before", 3)])
def test_bytes_are_right_within_a_factor(
    which: str, factor: float, after: Costs, request: pytest.FixtureRequest
) -> None:
    expected: Costs = request.getfixturevalue(which)
    for cost in after.stages:
        if cost.stage.startswith(("train", "students", "generate")) or cost.stage == "prepare":
            there, told = cost.disk_bytes, by_name(expected)[cost.stage].disk_bytes
            assert there is not None
            assert told is not None
            assert there / factor < told < there * factor + 5000, cost.stage


@pytest.mark.slow
def test_what_is_done_is_measured(made: Chain, after: Costs) -> None:
    for cost in after.stages:
        path = made[cost.stage].path
        assert cost.measured
        assert cost.seconds == artifact.provenance(path)["seconds"]
        assert cost.disk_bytes == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        assert (cost.flops is None) == (cost.work in measuring.WITHOUT_MODEL)
    assert after.totals["all"].flops == pytest.approx(sum(cost.flops or 0 for cost in after.stages))
    assert after.totals["left"].flops is None
    assert not after.assumption


@pytest.mark.slow
def test_break_even_is_counted_from_the_stages(made: Chain, after: Costs) -> None:
    """Of students that learn plainly from what scores chose; the teacher's own training is not repaid."""
    cost = by_name(after)
    (found,) = after.break_even
    paid = sum(cost[name].flops or 0 for name in ("train/reference", "score/teacher", "score/reference"))
    student = cost["students/miniplm"]
    teacher = without_weights(GivenModel(model=str(made["train/teacher"].path)))
    assert teacher is not None
    assert student.flops is not None
    assert student.tokens is not None
    reading = forward_flops(teacher, T) * student.tokens
    assert (found.student, found.offline_flops) == ("miniplm", paid)
    assert found.against_vanilla_kd == paid / reading
    assert found.against_pretraining == pytest.approx(paid / (1.2 * student.flops))
    assert costs(made, compute_reduction=1).as_dict()["break_even"][0]["against_pretraining"] is None


@pytest.mark.slow
def test_storage_is_that_of_this_corpus(made: Chain, after: Costs) -> None:
    counts = artifact.read(made["prepare"].path).counts
    pool = counts["parts"]["pool"]["instances"]
    assert after.storage is not None
    assert after.storage.token_level_bytes == pool * T * counts["vocab_size"] * 4
    cost = by_name(after)
    scores = sum(cost[name].disk_bytes or 0 for name in ("score/teacher", "score/reference"))
    assert after.storage.scores_bytes == scores


@pytest.mark.slow
def test_the_most_similar_work_that_is_done_says_how_fast_it_goes(made: Chain, after: Costs) -> None:
    """Another seed of the control is expected to take as long as the control did."""
    again = chain(parse(made.recipe.resolved(), overrides=["students.control.seed=7"]), made.root)
    found, control = by_name(costs(again, measure=False)), by_name(after)["students/control"]
    assert found["students/control"].seconds == pytest.approx(control.seconds, rel=1e-6)
    assert found["students/control"].pace == "as fast as students/control"
    assert found["evaluate/control"].pace.startswith("as fast as evaluations/")
    assert found["students/miniplm"].measured
    both = together([after, costs(again, measure=False)])
    assert len(both.stages) == len(after.stages) + 2  # the control and its evaluation
    assert both.totals["left"].flops == sum(c.flops or 0 for c in both.stages if not c.measured)


@pytest.mark.slow
def test_a_stage_that_was_interrupted_is_not_taken_for_a_short_one(made: Chain, after: Costs) -> None:
    """Its clock began anew; what it computed before is not in its provenance."""
    path = made["score/teacher"].path / artifact.PROVENANCE
    was = json.loads(path.read_bytes())
    path.write_text(json.dumps({**was, "resumed": True, "seconds": 0.01, "flops": 1.0, "tokens_per_s": 100}))
    found, whole = by_name(costs(made))["score/teacher"], by_name(after)["score/teacher"]
    path.write_text(json.dumps(was))
    assert found.seconds == (whole.tokens or 0) / 100
    assert found.flops == whole.flops


@pytest.mark.slow
def test_a_proxy_is_expected_to_take_what_it_takes(folder: Path) -> None:
    stages = laid_out(folder, "proxied", RECIPE.replace("  random: {sampler: random, ratio: 0.4}\n", "") + PROXY)
    run(stages, "prepare")
    expected = by_name(costs(stages, measure=False))
    run(stages)
    found = by_name(costs(stages))
    for name in stages:
        assert expected[name].flops == found[name].flops, name
        assert expected[name].tokens in (found[name].tokens, None), name
    assert found["proxy/model"].flops == artifact.read(stages["proxy/model"].path).counts["flops"]["fine_tuning"]


def test_a_set_of_documents_is_at_most_so_many_whole_instances(folder: Path) -> None:
    more = f"evaluate: {{documents: {{others: {{files: {folder / 'text.jsonl'}, documents: 7}}}}}}\n"
    cost = by_name(costs(laid_out(folder, "nothing", RECIPE + more), measure=False))
    assert cost["documents/others"].tokens == cost["loss/others/teacher"].tokens == 7 * T
    assert {cost[name].group for name in ("documents/others", "loss/others/teacher")} == {"evaluation"}
    teacher, twice = cost["loss/others/teacher"], cost["evaluate/teacher"]
    assert teacher.flops is not None
    assert teacher.flops / (7 * T) == (twice.flops or 0) / (twice.tokens or 1)
    assert teacher.guessed


def test_documents_that_are_read_whole_are_guessed_by_their_bytes_until_they_are_packed(folder: Path) -> None:
    text = folder / "whole.jsonl"
    write_jsonl(text, 40, seed=7)
    more = f"evaluate: {{documents: {{others: {{files: {text}, windows: all}}}}}}\n"
    stages = laid_out(folder, "whole", RECIPE + more)
    guessed = by_name(costs(stages, measure=False))
    for name in ("documents/others", "loss/others/teacher"):
        assert guessed[name].tokens == text.stat().st_size // 4
        assert guessed[name].basis == "guessed"
    assert guessed["loss/others/teacher"].flops is not None
    assert guessed["documents/others"].disk_bytes is not None
    run(stages, "prepare")
    run(stages, "documents")
    counts = artifact.read(stages["documents/others"].path).counts
    counted = by_name(costs(stages, measure=False))["loss/others/teacher"]
    assert counted.tokens == counts["tokens_out"] - counts["instances"]
    assert counted.basis == "estimated"


def test_a_study_tells_equal_names_in_one_line_and_its_stages_apart_in_the_table(folder: Path) -> None:
    text = RECIPE + STUDENTS + "seeds: [3, 5]\ngrid: {select.difference.ratio: {few: 0.25, half: 0.5}}\n"
    found = parse_study(text.replace("FILES", str(folder / "text.jsonl"))).variants
    each = [costs(chain(one.recipe, folder / "nothing"), measure=False) for one in found]
    both = together(each, [one.place for one in found])
    shown = lines(both)
    assert both.runs == both.as_dict()["runs"] == 4
    names = [line.split("  ")[0] for line in shown[2 : shown.index(shown[1], 2)]]
    assert len(set(names)) == len(names)
    assert {"prepare", "select/difference ×2", "students/control ×2", "students/miniplm ×4"} <= set(names)
    (line,) = (line for line in shown if line.startswith("students/miniplm ×4"))
    assert line.split()[2] == operations(4 * (by_name(each[0])["students/miniplm"].flops or 0))
    assert any("The table is of all 4 runs" in line and "of the first" in line for line in shown)
    assert not any("runs" in line for line in lines(each[0]))
    rows = list(csv.DictReader(io.StringIO(as_csv(both))))
    runs = {name: [row["runs"] for row in rows if row["stage"] == name] for name in {row["stage"] for row in rows}}
    assert runs["prepare"] == runs["train/teacher"] == [""]
    assert runs["select/difference"] == ["ratio few", "ratio half"]
    assert runs["students/control"] == ["seed 3", "seed 5"]
    assert runs["students/miniplm"] == [f"seed {seed}, ratio {ratio}" for seed in (3, 5) for ratio in ("few", "half")]


def test_the_papers_sizes_give_the_papers_figures() -> None:
    """Sections 2.4 and 3.4, footnote 2, appendices C and E, as printed."""
    found = {row["name"]: row["value"] for row in published()}

    def of(*words: str) -> float:
        (value,) = (value for name, value in found.items() if all(word in name for word in words))
        assert value is not None
        return float(value)

    assert of("teacher scores", "all parameters") == pytest.approx(3.6e20)
    assert of("teacher scores", "without embeddings") == pytest.approx(2.4e20)
    assert of("reference is trained on 5B") == pytest.approx(3.1e18, rel=0.01)
    assert of("200M student is trained on 50B") == pytest.approx(6e19)
    assert of("scores of 50B") == pytest.approx(195e6, rel=0.01)
    assert of("distributions over 150K") == 30e15
    offline = 3.6e20 + 2 * 104e6 * 100e9 + 6 * 104e6 * 5e9
    assert of("offline") == pytest.approx(offline)
    assert of("against Vanilla KD") == pytest.approx(offline / (2 * 1.8e9 * 50e9))
    assert of("2.2 times", "500M") == pytest.approx(offline / (1.2 * 6 * 500e6 * 50e9))
    shown = "\n".join(published_lines(published(1.0)))
    assert "195 MB" in shown
    assert " 30 PB" in shown
    assert shown.count("never") == 3


def test_the_papers_sizes_need_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, data = tmp_path / "t.csv", tmp_path / "t.json"
    for arguments, code, words in (
        (["--published", "--csv", str(table), "--json", str(data)], 0, "3.6e20"), ([], 1, "miniplm cost --published"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main(["cost", *arguments])
        assert (ended.value.code or 0) == code
        captured = capsys.readouterr()
        assert words in captured.out + captured.err
    assert json.loads(data.read_bytes())["published"] == published()
    rows = csv.DictReader(table.read_text().splitlines())
    assert [row["name"] for row in rows] == [row["name"] for row in published()]


def test_less_than_a_second_and_never_are_put_in_words_that_can_be_read(before: Costs) -> None:
    (cost,) = (replace(one, seconds=0.2) for one in before.stages if one.stage == "train/teacher")
    unknown = replace(cost, stage="score/teacher", fingerprint="0" * 64, seconds=None)
    one = replace(before.break_even[0], against_vanilla_kd=float("inf"), against_pretraining=4.44)
    shown = lines(Costs.of([cost, unknown], [one], None, ""))
    assert any("> 0 s" in line for line in shown)
    assert not any("> <" in line for line in shown)
    assert "~<" not in brief(cost)
    assert " < 1 s" in brief(cost)
    assert any("against Vanilla KD never, against plain pre-training by 4.4 (if" in line for line in shown)


def test_the_terminal_and_the_tables_say_the_same(before: Costs) -> None:
    shown = lines(before)
    assert shown[0].split() == ["stage", "operations", "time", "disk"]
    (row,) = (line for line in shown if line.startswith("train/teacher"))
    cost = by_name(before)["train/teacher"]
    assert row.split()[1:3] == [operations(cost.flops), "–"]
    assert any("a token for every 4 bytes of text" in line for line in shown)
    assert json.loads(json.dumps(before.as_dict(), allow_nan=False))["stages"][1]["flops"] == cost.flops
    table = as_csv(before).splitlines()
    assert len(table) == 1 + len(before.stages)
    assert table[0].startswith("stage,fingerprint,group,work,flops,tokens,seconds")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (operations(3.24e14), "3.2e14"), (operations(5e9), "5.0e9"), (operations(None), "–"),
        (duration(0.2), "< 1 s"), (duration(41.2), "41 s"), (duration(720), "12 min"), (duration(9.6 * 3600), "9.6 h"),
        (duration(5e6), "1,389 h"), (duration(None), "–"),
        (size(12e6), "12 MB"), (size(1.44e9), "1.4 GB"), (size(30e15), "30 PB"), (size(0), "0 B"), (size(None), "–"),
    ],
)  # fmt: skip
def test_small_and_large_numbers_can_be_read(shown: str, expected: str) -> None:
    assert shown == expected


HUB = """
schema: 1
name: hub
corpus: {hub: someone/corpus}
prepare: {tokenizer: someone/model, split: {reference: 0.05, held_out: 0.01}}
teacher: TEACHER
reference: {preset: qwen-104m, tokens: 5e9}
select: {difference: {sampler: difference, ratio: 0.5}}
students:
  miniplm: {preset: qwen-200m, data: difference, tokens: 50e9}
"""


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain whose corpus and models lie on a Hub that is out of reach when costs are asked."""

    def fail(*_: Any) -> Any:
        raise ModelError("the Hub is out of reach.")

    def packed(fingerprint: str, settings: Any) -> Identity:
        return Identity("corpus", 1, settings.model_dump(), {"documents": fingerprint})

    monkeypatch.setattr(chains, "open_documents", lambda *_: type("D", (), {"fingerprint": "1" * 64})())
    monkeypatch.setattr(chains, "model_fingerprint", lambda _: "2" * 64)
    monkeypatch.setattr(chains.preparing, "identity", packed)
    monkeypatch.setattr(estimating, "without_weights", fail)
    monkeypatch.setattr(sizes.tokenizers, "from_settings", fail)


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("teacher", ["{model: someone/model}", "{server: http://localhost:1/v1, model: m}"])
def test_a_teacher_out_of_reach_is_unknown_and_the_rest_is_told(teacher: str, tmp_path: Path) -> None:
    found = costs(chain(parse(HUB.replace("TEACHER", teacher)), tmp_path), measure=False)
    cost = by_name(found)
    assert cost["score/teacher"].flops is None
    assert found.totals["offline"].unknown_flops == ("score/teacher",)
    assert found.break_even[0].against_vanilla_kd is None
    assert cost["score/teacher"].tokens == cost["score/reference"].tokens == pytest.approx(100e9, rel=1e-6)
    assert cost["train/reference"].flops == pytest.approx(3.1e18, rel=0.05)  # the paper's, attention added
    assert cost["students/miniplm"].flops == pytest.approx(6e19, rel=0.1)
    assert found.storage is not None
    assert found.storage.token_level_bytes == pytest.approx(2 * 30e15, rel=0.02)
    assert "see each instance once" in found.assumption
    shown = "\n".join(lines(found))
    assert "> " in shown
    assert "operations are missing" in shown


@pytest.mark.usefixtures("unreachable")
def test_a_device_that_is_not_here_leaves_hours_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = HUB.replace("TEACHER", "{model: someone/model}") + "compute: {device: cuda}\n"
    found = costs(chain(parse(text), tmp_path))
    assert {cost.seconds for cost in found.stages} == {None}
    assert found.totals["all"].seconds is None


@pytest.mark.usefixtures("unreachable")
def test_where_nothing_was_done_a_matrix_product_says_how_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "matmul_rate", lambda *_: 1e15)
    measuring._timed.cache_clear()
    text = HUB.replace("TEACHER", "{model: someone/model}") + "compute: {device: cpu}\n"
    cost = by_name(costs(chain(parse(text), tmp_path)))["students/miniplm"]
    measuring._timed.cache_clear()
    share = measuring._SHARES["next_token"]
    assert cost.flops is not None
    assert cost.seconds == pytest.approx(cost.flops / (share * 1e15))
    assert cost.pace == "at 20% of 1,000.00 TFLOP/s"
