"""The command line as its users meet it: verbs, what is made and what is not, and errors without a traceback."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import write_jsonl
from miniplm import artifact, cli
from miniplm.evaluation.evaluate import open_evaluation
from miniplm.pipeline.given import own_fingerprint
from miniplm.recipe import load

HOSTILE = "\x1b[31mred\x1b[0m <script>alert(1)</script> \u202e\x07"
VERBS = (
    "plan", "cost", "run", "report", "study", "prepare", "score", "drift", "select", "generate", "retokenize", "train",
    "eval", "agreement", "effects", "diversity", "scaling", "data-reduction", "show", "verify",
)  # fmt: skip

RECIPE = """
schema: 1
name: tiny
corpus: {{files: "{corpus}/*.jsonl"}}
prepare:
  tokenizer: {{train: {{vocab_size: 300}}}}
  sequence_length: 32
  block_bytes: 8000
  split: {{reference: 0.2, held_out: 0.2, teacher: 0.2}}
teacher: &trained
  config: {{model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2}}
  tokens: 2048
  batch_tokens: 256
  learning_rate: 1e-3
  precision: float32
reference: {{<<: *trained, seed: 1}}
score: {{dtype: float32}}
select:
  difference: {{sampler: difference, ratio: 0.5}}
  random: {{sampler: random, ratio: 0.5}}
students:
  miniplm: {{<<: *trained, data: difference}}
  control: {{like: miniplm, data: random}}
compute: {{device: cpu, checkpoints: 4, train_micro_batch: 8, report_to: none}}
"""
STAGES = [
    "prepare", "train/teacher", "train/reference", "score/teacher", "score/reference", "select/difference",
    "select/random", "students/miniplm", "students/control", "evaluate/teacher", "evaluate/reference",
    "evaluate/miniplm", "evaluate/control",
]  # fmt: skip

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a verb in this process: `call("plan", recipe)` gives (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def succeed(call: Call) -> Callable[..., str]:
    """Run a verb that must succeed; gives its standard output."""

    def run(*arguments: object) -> str:
        status, out, err = call(*arguments)
        assert status == 0, err
        return out

    return run


@pytest.fixture
def fail(call: Call) -> Callable[..., str]:
    """Run a verb that must end with an error of the user's; gives the message."""

    def run(*arguments: object) -> str:
        status, _, err = call(*arguments)
        assert status == 1
        assert err.startswith("error: ")
        assert "Traceback" not in err
        return err

    return run


class Finished:
    """A finished run: its recipe and its directory, which tests leave as it is."""

    def __init__(self, folder: Path) -> None:
        (folder / "corpus").mkdir()
        for number in range(2):
            path = write_jsonl(folder / "corpus" / f"{number}.jsonl", 50, sources=2, seed=number)
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for record in records:
                record["text"] = record["text"].replace(" the ", f" {HOSTILE} ")
                record["source"] += HOSTILE[:5]
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(corpus=folder / "corpus"))
        self.root = folder / "run"
        from miniplm.pipeline.chain import chain
        from miniplm.pipeline.run import run

        run(chain(load(self.recipe), self.root))

    def path(self, stage: str) -> Path:
        """The folder of an artifact: `scores/teacher`."""
        (found,) = self.root.glob(stage + "-*")
        return found

    @property
    def pool(self) -> Path:
        return self.path("corpus") / "pool"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield Finished(folder)


@pytest.fixture(scope="module")
def reported(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run directory, with its report."""
    root = tmp_path_factory.mktemp("cli") / "reported"
    shutil.copytree(finished.root, root)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(finished.recipe), "--out", str(root)])
    assert not ended.value.code
    return root


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run directory, to be altered."""
    return Path(shutil.copytree(finished.root, tmp_path / "copy"))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pandas", "matplotlib", "numpy")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert python(f"import sys, miniplm; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from miniplm.cli import main
try:
    main({arguments})
except SystemExit as ended:
    assert not ended.code
print([m for m in {HEAVY} if m in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, succeed: Callable[..., str]) -> None:
    assert f"{verb} [OPTIONS]" in succeed(verb, "--help")


def test_help_lists_every_verb(succeed: Callable[..., str]) -> None:
    out = succeed("--help")
    assert [line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.strip()] == list(VERBS)


def test_a_wrong_call_ends_with_2(call: Call) -> None:
    assert call("run")[0] == 2
    assert call("no-such-verb")[0] == 2
    assert call("prepare", "x", "--out")[0] == 2


WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "accelerate"]))  # importing them fails
from miniplm.cli import main
main({arguments})
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.format(arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_torch_training_says_what_to_install(finished: Finished, tmp_path: Path) -> None:
    done = without_torch("train", "qwen-1m", "--data", finished.pool, "--tokens", "1e6", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert 'pip install "miniplm[train]"' in done.stderr


def test_without_torch_a_corpus_is_prepared(finished: Finished, tmp_path: Path) -> None:
    done = without_torch(
        "prepare", f"{finished.root.parent}/corpus/0.jsonl", "--tokenizer", "train:300", "--out", tmp_path / "out",
        "--sequence-length", "16", "--split", "held_out=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_without_torch_instances_are_selected(finished: Finished, tmp_path: Path) -> None:
    done = without_torch(
        "select", "--teacher", finished.path("scores/teacher"), "--reference", finished.path("scores/reference"),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_of_a_finished_run_every_stage_is_done(finished: Finished, succeed: Callable[..., str]) -> None:
    out = succeed("plan", finished.recipe, "--out", finished.root)
    assert [line.split()[:2] for line in out.splitlines()[:-1]] == [[name, "done"] for name in STAGES]
    assert out.splitlines()[-1].startswith("13 of 13")


@pytest.mark.slow
def test_a_run_ends_with_a_report_that_sends_no_markup_of_the_corpus(reported: Path) -> None:
    for name in ("report.html", "report.json", "evaluations.csv"):
        assert (reported / name).stat().st_size
    page = (reported / "report.html").read_text()
    assert "script&gt;alert(1)" in page
    assert "<script>alert" not in page
    assert "\x1b" not in page


def times(root: Path) -> dict[str, int]:
    """When each file of each artifact, and each of the report, was last written."""
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*") if p.name != "recipe.yaml"}


@pytest.mark.slow
def test_a_second_run_makes_nothing(reported: Path, finished: Finished, succeed: Callable[..., str]) -> None:
    before = times(reported)
    out = succeed("run", finished.recipe, "--out", reported)
    assert [line.split()[1:3] for line in out.splitlines() if line.startswith("[")] == [
        [f"{s}:", "done,"] for s in STAGES
    ]
    assert times(reported) == before


@pytest.mark.slow
def test_another_ratio_makes_that_selection_its_student_and_its_evaluation_and_no_more(
    copy: Path, finished: Finished, succeed: Callable[..., str]
) -> None:
    before = times(copy)
    out = succeed("run", finished.recipe, "--out", copy, "--set", "select.difference.ratio=0.4")
    begun = [line.split()[1] for line in out.splitlines() if line.endswith(" ...")]
    assert begun == ["select/difference", "students/miniplm", "evaluate/miniplm"]
    after = times(copy)
    assert {name for name in before if after[name] != before[name]} == {"selections", "students", "evaluations"}
    assert len(list((copy / "students").iterdir())) == 3


def test_the_recipe_in_the_run_directory_is_a_recipe_of_that_run(
    copy: Path, finished: Finished, succeed: Callable[..., str]
) -> None:
    out = succeed("plan", copy / "recipe.yaml", "--out", copy)
    assert out.splitlines()[-1].startswith("13 of 13")


def test_only_makes_one_stage_and_says_what_is_missing_before_it(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str], fail: Callable[..., str]
) -> None:
    root = tmp_path / "run"
    assert "--only prepare" in fail("run", finished.recipe, "--out", root, "--only", "select/random")
    succeed("run", finished.recipe, "--out", root, "--only", "prepare")
    succeed("run", finished.recipe, "--out", root, "--only", "select/random")
    assert sorted(p.name.split("-")[0] for p in root.iterdir()) == ["corpus", "recipe.yaml", "selections"]
    assert "'scores'" in fail("run", finished.recipe, "--out", root, "--only", "scores")


def states(plan: str) -> dict[str, str]:
    """`plan`'s lines as name -> state, without costs and path."""
    lines = plan[: plan.index(" stages are done.")].splitlines()[:-1]
    begin = max(len(line.split()[0]) for line in lines) + 2
    return {line.split()[0]: line[begin : begin + 44].strip() for line in lines}


def test_plan_tells_what_is_ready_and_what_waits_for_what(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str]
) -> None:
    before = states(succeed("plan", finished.recipe, "--out", tmp_path / "run"))
    assert list(before) == STAGES
    assert before["prepare"] == "ready"
    assert before["score/teacher"] == "waiting on prepare, train/teacher"
    assert not (tmp_path / "run").exists(), "a plan makes nothing"
    succeed("run", finished.recipe, "--out", tmp_path / "run", "--only", "prepare")
    after = states(succeed("plan", finished.recipe, "--out", tmp_path / "run"))
    assert after["prepare"] == "done"
    assert after["train/teacher"] == after["select/random"] == "ready"
    assert after["score/teacher"] == "waiting on train/teacher"


class Stop:
    """Stands in for a function and interrupts, as Control-C does, after so many calls."""

    def __init__(self, function: Callable[..., Any], calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.function(*arguments, **options)


@pytest.mark.parametrize(
    ("stage", "folder", "target", "calls", "state"),
    [
        ("prepare", "corpus", "miniplm.packing.prepare.pack_remainders", 0, "begun {blocks} blocks"),
        ("score/teacher", "scores/teacher", "miniplm.scoring.score._refuse_unusable", 2, "begun 2 of {pool} shards"),
        (
            "evaluate/control",
            "evaluations/control",
            "miniplm.scoring.score._refuse_unusable",
            1,
            "begun 1 of {held_out} shards",
        ),
        (
            "students/control",
            "students/control",
            "miniplm.training.objectives.NextToken.loss",
            30,
            "begun 2 of 8 steps",
        ),
    ],
)
def test_plan_tells_how_far_an_interrupted_stage_is(
    stage: str, folder: str, target: str, calls: int, state: str, copy: Path, finished: Finished, call: Call,
    succeed: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shards = {part: [p.name for p in (finished.path("corpus") / part).glob("*.arrow")] for part in ("pool", "held_out")}
    blocks = {p.name for p in finished.path("corpus").glob("*/part-*.arrow")}
    expected = state.format(blocks=len(blocks), **{part: len(names) for part, names in shards.items()})
    shutil.rmtree(copy / finished.path(folder).relative_to(finished.root))
    module, _, name = target.rpartition(".")
    with monkeypatch.context() as patch:
        stop = Stop(getattr(sys.modules.get(module) or _class(module), name), calls)
        patch.setattr(target, lambda *a, **k: stop(*a, **k))
        status, _, err = call("run", finished.recipe, "--out", copy, "--only", stage)
    assert status == 130
    assert "goes on where it stopped" in err
    assert states(succeed("plan", finished.recipe, "--out", copy))[stage] == expected
    succeed("run", finished.recipe, "--out", copy, "--only", stage)
    assert states(succeed("plan", finished.recipe, "--out", copy))[stage] == "done"


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)


SHOWN = [
    "corpus",
    "models/teacher",
    "scores/teacher",
    "selections/difference",
    "students/miniplm",
    "evaluations/control",
]


@pytest.mark.parametrize("stage", SHOWN)
def test_show_tells_kind_fingerprint_and_settings_and_steers_no_terminal(
    stage: str, finished: Finished, succeed: Callable[..., str]
) -> None:
    path = finished.path(stage)
    manifest = json.loads((path / "manifest.json").read_bytes())
    out = succeed("show", path)
    assert out.startswith(manifest["kind"])
    assert manifest["fingerprint"] in out
    for name in manifest["recipe"]:
        assert f"  {name}:" in out
    assert_harmless(out)


def assert_harmless(out: str) -> None:
    assert [c for c in out if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}] == []


def test_show_of_instances_shows_their_text_and_writes_control_characters_out(
    finished: Finished, succeed: Callable[..., str]
) -> None:
    out = succeed("show", finished.pool)
    assert "<script" in out
    assert "\\u001b[31mred" in out
    assert_harmless(out)


def test_show_of_scores_shows_the_best_and_the_worst_as_text(finished: Finished, succeed: Callable[..., str]) -> None:
    out = succeed("show", finished.path("scores/teacher"))
    for words in ("the best", "around the median", "the worst", "\\u001b[31m", "█"):
        assert words in out


def test_show_of_scores_with_other_instances_is_refused(finished: Finished, fail: Callable[..., str]) -> None:
    message = fail("show", finished.path("scores/teacher"), "--packed", finished.path("corpus") / "held_out")
    assert "other instances" in message


def test_verify_of_a_run_directory_reads_every_artifact(finished: Finished, succeed: Callable[..., str]) -> None:
    out = succeed("verify", finished.root)
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["ok"] * 17  # 13 stages and the 4 parts of the corpus
    assert "every byte" in out


def test_verify_names_the_file_that_was_altered(copy: Path, call: Call) -> None:
    file = next(copy.glob("scores/teacher-*/part-00000.parquet"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    status, out, err = call("verify", copy)
    assert status == 1
    assert str(file) in out
    assert err.startswith("error: 1 of 17 artifacts")


def test_verify_of_nothing_is_an_error(tmp_path: Path, fail: Callable[..., str]) -> None:
    assert "nowhere" in fail("verify", tmp_path / "nowhere")


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_recipe_that_is_not_there_is_an_error(verb: str, tmp_path: Path, fail: Callable[..., str]) -> None:
    assert "nowhere.yaml" in fail(verb, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: tiny", "nmae: tiny", ["unknown key `nmae`", "Did you mean `name`?", "line 3"]),
        ("ratio: 0.5}", "ratio: 1.5}", ["select.difference.ratio", "1.5"]),
        ("reference: {<<: *trained, seed: 1}", "reference: {preset: qwen-1n, tokens: 5}", ["'qwen-1n'", "'qwen-1m'"]),
        ("sampler: random", "sampler: randon", ["'randon'", "'random'"]),
    ],
)
def test_a_recipe_that_cannot_be_is_an_error_before_anything_is_made(
    old: str, new: str, words: list[str], finished: Finished, tmp_path: Path, fail: Callable[..., str]
) -> None:
    text = finished.recipe.read_text()
    assert old in text
    (tmp_path / "recipe.yaml").write_text(text.replace(old, new, 1))
    message = fail("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def prepare(files: object, out: Path, **options: object) -> list[object]:
    given = {"tokenizer": "train:300", "sequence_length": 32, "split": "reference=0.2,held_out=0.2", **options}
    return ["prepare", files, "--out", out, *(x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", v))]


def test_an_empty_corpus_is_an_error(tmp_path: Path, fail: Callable[..., str], finished: Finished) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 3)
    tokenizer = finished.path("corpus") / "tokenizer"
    assert "no documents" in fail(*prepare(tmp_path / "empty.jsonl", tmp_path / "a", tokenizer=tokenizer))
    message = fail(*prepare(tmp_path / "blank.jsonl", tmp_path / "b", tokenizer=tokenizer))
    assert "no documents" in message
    assert ["empty", "3"] in [line.split() for line in message.splitlines()]


def test_a_corpus_too_small_for_the_split_is_an_error_that_names_the_empty_part(
    tmp_path: Path, fail: Callable[..., str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", 30)
    message = fail(*prepare(tmp_path / "a.jsonl", tmp_path / "out", split="reference=0.001,held_out=0.3"))
    assert "too small" in message
    assert "reference would be empty" in message


def test_scores_of_other_instances_are_refused_with_both_sides(
    finished: Finished, tmp_path: Path, fail: Callable[..., str], succeed: Callable[..., str]
) -> None:
    part, other = finished.path("corpus") / "held_out", tmp_path / "other"
    succeed("score", part, "--model", finished.path("models/reference"), "--dtype", "float32", "--out", other)
    teacher = finished.path("scores/teacher")
    message = fail("select", "--teacher", teacher, "--reference", other, "--out", tmp_path / "chosen")
    for role, scores, packed in (("teacher", teacher, finished.pool), ("reference", other, part)):
        (line,) = [line for line in message.splitlines() if line.split()[0] == role and line.startswith("  ")]
        manifest = json.loads((packed / "manifest.json").read_bytes())
        for fact in (str(scores), manifest["fingerprint"][:12], f"{manifest['counts']['instances']:,}"):
            assert fact in line
    assert not (tmp_path / "chosen").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_both_numbers(
    finished: Finished, tmp_path: Path, fail: Callable[..., str]
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=200, num_key_value_heads=2, **shape))
    model.save_pretrained(tmp_path / "small")
    message = fail("score", finished.pool, "--model", tmp_path / "small", "--out", tmp_path / "scores")
    assert "300" in message
    assert "200" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["select", "--ratio", "1.5"], ["ratio", "1.5"]),
        (["select", "--ratio", "nan"], ["ratio", "nan"]),
        (["select", "--sampler", "diference"], ["diference", "difference"]),
        (["select", "--normalize", "word"], ["normalize", "word"]),
        (["score", "{pool}", "--model", "{model}", "--dtype", "float64"], ["dtype", "float64"]),
        (["score", "{pool}", "--model", "{model}", "--counted", "some"], ["counted", "some"]),
        (["score", "{pool}", "--model", "{model}", "--device", "gpu"], ["device", "gpu"]),
        (["score", "{pool}", "--model", "{model}", "--batch-tokens", "0"], ["batch", "0"]),
        (["score", "{pool}", "--model", "no/such/model"], ["no/such/model"]),
        (["score", "{corpus}", "--model", "{model}"], ["corpus", "packed"]),
        (["eval", "{model}", "--held-out", "{pool}", "--dtype", "float64"], ["dtype", "float64"]),
        (["eval", "{model}", "--held-out", "{pool}", "--counted", "some"], ["counted", "some"]),
        (["eval", "{model}"], ["--held-out", "--documents", "--tasks"]),
        (["eval", "{model}", "{model}", "--held-out", "{pool}"], ["{model}", "is there twice"]),
        (["eval", "no/such/model", "--held-out", "{pool}"], ["no/such/model"]),
        (["eval", "{model}", "--documents", "no/such/file.jsonl"], ["no/such/file.jsonl"]),
        (["eval", "{model}", "--documents", "{files}", "--windows", "last"], ["windows", "last"]),
        (["eval", "{model}", "--documents", "{files}", "--sequence-length", "1"], ["sequence_length", "1"]),
        (["train", "qwen-1n", "--data", "{pool}", "--tokens", "1e5"], ["qwen-1n", "qwen-1m"]),
        (
            ["train", "qwen-1m", "--data", "{pool}", "--tokens", "64", "--set", "batch_tokens=32", "--counted", "some"],
            ["counted", "some"],
        ),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "2.5"], ["tokens", "2.5"]),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--set", "seed=x"], ["seed", "x"]),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--set", "tokens=7"], ["tokens"]),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--set", "seed"], ["--set", "seed"]),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--set", "match=flops"], ["option", "--match"]),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--set", "about=x"], ["about", "no setting"]),
        (["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--teacher", "{model}"], ["next_token asks no"]),
        (
            ["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--objective", "{{name: vanilla_kd, shar: 1}}"],
            ["shar"],
        ),
        (
            ["train", "qwen-1m", "--data", "{pool}", "--tokens", "1e5", "--objective", "{{name: [vanilla_kd"],
            ["--objective", "YAML"],
        ),
        (["prepare", "{files}", "--tokenizer", "train:300", "--split", "reference=half"], ["reference", "half"]),
        (["prepare", "{files}", "--tokenizer", "train:300", "--split", "refrence=0.5"], ["refrence"]),
        (["prepare", "{files}", "--tokenizer", "train:300", "--split", "reference=0.6,held_out=0.5"], ["pool"]),
        (["prepare", "{files}", "--tokenizer", "train:few"], ["vocab_size", "few"]),
        (["prepare", "{files}", "--tokenizer", "no/such/tokenizer"], ["no/such/tokenizer"]),
        (["prepare", "{files}", "--tokenizer", "train:300", "--on-error", "ignore"], ["on_error", "ignore"]),
        (["prepare", "{files}", "--tokenizer", "train:300", "--cut", "word"], ["cut", "word"]),
    ],
)
def test_an_option_that_cannot_be_is_an_error_that_names_it(
    arguments: list[str], words: list[str], finished: Finished, tmp_path: Path, fail: Callable[..., str]
) -> None:
    places = {
        "pool": finished.pool,
        "corpus": finished.path("corpus"),
        "model": finished.path("models/teacher"),
        "files": finished.root.parent / "corpus" / "0.jsonl",
    }
    given = [argument.format(**places) for argument in arguments]
    if given[0] == "select":
        given += [x for r in ("teacher", "reference") for x in (f"--{r}", str(finished.path(f"scores/{r}")))]
    message = fail(*given, "--out", tmp_path / "out")
    for word in words:
        assert word.format(**places) in message
    assert not (tmp_path / "out").exists()


def test_an_objective_may_be_given_with_its_settings_and_the_card_says_which_selection(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str]
) -> None:
    chosen = finished.path("selections/difference")
    out = succeed(
        "train", "qwen-0.5m", "--data", finished.pool, "--rows", chosen, "--tokens", "512", "--device", "cpu",
        "--set", "batch_tokens=256,precision=float32", "--objective", "{name: vanilla_kd, share: 3e-1}",
        "--teacher", finished.path("models/teacher"), "--out", tmp_path / "student",
    )  # fmt: skip
    assert "512 tokens" in out
    recipe = artifact.read(tmp_path / "student").identity.recipe
    assert recipe["objective"] == {"name": "vanilla_kd", "share": 0.3, "temperature": 1.0, "dtype": "bfloat16"}
    card = (tmp_path / "student" / "README.md").read_text()
    instances = artifact.read(finished.pool).counts["instances"]
    assert f"| data | {instances // 2 / instances:.0%} of pool, by difference sampling |" in card
    assert f"| selection | {artifact.read(chosen).fingerprint[:12]} |" in card


OWN_OBJECTIVE = """
from miniplm.training.objectives import NextToken

class Plain(NextToken):
    def __init__(self, is_called=None):
        if is_called:
            self.fingerprint = is_called
"""


def test_in_a_recipe_an_objective_of_ones_own_is_what_its_fingerprint_says(
    copy: Path, finished: Finished, tmp_path: Path, succeed: Callable[..., str], fail: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "objectives_of_a_user.py").write_text(OWN_OBJECTIVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "students.miniplm.objective={{name: 'objectives_of_a_user:Plain', is_called: {}}}"
    run = (finished.recipe, "--out", copy, "--set")
    succeed("run", *run, own.format("one"), "--only", "students/miniplm")
    made = [artifact.read(path).identity.inputs for path in (copy / "students").glob("miniplm-*")]
    (named,) = {inputs["objective"] for inputs in made if "objective" in inputs}
    assert named == own_fingerprint(SimpleNamespace(fingerprint="one"), "objective")
    assert states(succeed("plan", *run, own.format("one")))["students/miniplm"] == "done"
    assert states(succeed("plan", *run, own.format("two")))["students/miniplm"] == "ready"
    (tmp_path / "objectives_of_a_user.py").write_text(OWN_OBJECTIVE.replace("= is_called", "= is_called + ' anew'"))
    monkeypatch.delitem(sys.modules, "objectives_of_a_user")
    importlib.invalidate_caches()
    assert states(succeed("plan", *run, own.format("one")))["students/miniplm"] == "ready"
    assert "Plain does not say what it is" in fail("plan", *run, own.format("null"))


@pytest.mark.slow
def test_the_verbs_lead_from_documents_to_an_evaluation(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str]
) -> None:
    corpus, device = tmp_path / "corpus", ("--device", "cpu")
    out = succeed(*prepare(finished.root.parent / "corpus" / "*.jsonl", corpus))
    assert [line.split()[0] for line in out.splitlines()] == ["part", "reference", "held_out", "pool", "left"]
    settings = ("--set", "batch_tokens=512,precision=float32", "--tokens", "1024", *device)
    out = succeed("train", "qwen-0.5m", "--data", corpus / "reference", "--out", tmp_path / "reference", *settings)
    assert "1,024 tokens" in out
    for role, model in (("teacher", finished.path("models/teacher")), ("reference", tmp_path / "reference")):
        out = succeed(
            "score",
            corpus / "pool",
            "--model",
            model,
            "--out",
            tmp_path / f"{role}-scores",
            "--dtype",
            "float32",
            *device,
        )
        assert "nats per token" in out
    scores = ("--teacher", tmp_path / "teacher-scores", "--reference", tmp_path / "reference-scores")
    out = succeed("select", *scores, "--ratio", "0.25", "--out", tmp_path / "chosen")
    pool = json.loads((corpus / "pool" / "manifest.json").read_bytes())["counts"]["instances"]
    assert f"kept {pool // 4:,} of {pool:,} instances" in out
    rows = ("--rows", tmp_path / "chosen", "--held-out", corpus / "held_out")
    succeed("train", "qwen-0.5m", "--data", corpus / "pool", "--out", tmp_path / "student", *rows, *settings)
    counts = json.loads((tmp_path / "student" / "manifest.json").read_bytes())["counts"]
    assert counts["instances"] == pool // 4
    out = succeed(
        "eval", tmp_path / "student", "--held-out", corpus / "held_out", "--out", tmp_path / "evaluation", *device
    )
    assert "nats_per_token" in out
    assert "bits_per_byte" in out
    for name in ("corpus", "reference", "teacher-scores", "chosen", "student", "evaluation/student/held_out"):
        assert succeed("show", tmp_path / name)
    assert_harmless(out)
    assert "every byte" in succeed("verify", tmp_path)


def test_eval_puts_models_side_by_side_and_keeps_what_it_measured(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miniplm.scoring.huggingface.matmul_rate", lambda *_: 1e12)  # takes longer than these models
    models = [finished.path("models/teacher"), finished.path("models/reference")]
    held_out, documents = finished.path("corpus") / "held_out", finished.root.parent / "corpus" / "0.jsonl"
    call = [
        "eval", *models, "--held-out", held_out, "--documents", documents, "--windows", "all",
        "--sequence-length", "32", "--dtype", "float32", "--out", tmp_path / "out",
    ]  # fmt: skip
    out = succeed(*call)
    assert_harmless(out)
    assert out.splitlines()[0].split() == [model.name for model in models]
    legend = "± is one standard error."
    assert out.splitlines()[-2:] == [legend, f"table: {tmp_path / 'out' / 'evaluations.csv'}"]
    whole = json.loads((tmp_path / "out" / "evaluations.json").read_bytes())
    written = whole.pop("rows")
    assert whole == {"missing": {}, "notes": {}}
    expected = []
    for model in models:
        for of in ("held_out", "documents"):
            found = open_evaluation(tmp_path / "out" / model.name / of)
            assert (
                found.scores.packed
                == artifact.read(
                    held_out if of == "held_out" else tmp_path / "out" / model.name / "documents-packed"
                ).fingerprint
            )
            expected += [{"model": model.name, **row.as_dict()} for row in found.rows]
            whole = found.value("nats_per_token")
            assert f"{whole.value:.4f} ± {whole.standard_error:.4f}" in out
    assert written == expected
    assert {row["dataset"] for row in written} == {"held_out", "documents"}
    with (tmp_path / "out" / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: "" if value is None else str(value) for key, value in row.items()} for row in expected]
    before = times(tmp_path / "out" / models[0].name)
    assert succeed(*call, "--tokenizer", "packed") == out
    assert times(tmp_path / "out" / models[0].name) == before, "what is measured is not measured again"
    one = ["eval", models[1], "--held-out", held_out, "--dtype", "float32", "--out", tmp_path / "out"]
    assert succeed(*one).splitlines()[0].split() == [model.name for model in reversed(models)]
    again = json.loads((tmp_path / "out" / "evaluations.json").read_bytes())["rows"]
    assert sorted(map(str, again)) == sorted(map(str, written)), "a smaller call takes nothing from the table"


def test_eval_puts_tasks_to_a_model_and_says_what_is_missing(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str]
) -> None:
    question = {"goal": "read", "sol1": "a text", "sol2": "a token", "label": 0}
    science = {"question": "What?", "correct_answer": "a", "support": "", "label": 0}
    science |= {f"distractor{number}": "b" for number in (1, 2, 3)}
    for name, record in (("piqa/validation", question), ("sciq/validation", science)):
        path = tmp_path / "benchmarks" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(f"{json.dumps(record)}\n" * 3)
    model = finished.path("models/teacher")
    out = succeed(
        "eval", model, "--tasks", " paper, sciq ,", "--tasks-data", tmp_path / "benchmarks", "--limit", "2",
        "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["piqa", "sciq"]
    assert lines[3:5] == ["± is one standard error.", "2 questions each"]
    assert "without storycloze_2018, whose examples are not there" in lines
    assert "sciq: validation split, where the harness scores test" in lines
    written = json.loads((tmp_path / "out" / "evaluations.json").read_bytes())
    assert [row["n"] for row in written["rows"]] == [2, 2]
    assert "storycloze_2018" in written["missing"][model.name]
    assert written["notes"][model.name]["sciq"] == "validation split, where the harness scores test"
    with (tmp_path / "benchmarks" / "piqa" / "validation.jsonl").open("a") as file:
        file.write(json.dumps(question | {"goal": "write"}) + "\n")
    other = finished.path("models/reference")
    out = succeed(
        "eval", other, "--tasks", "piqa", "--tasks-data", tmp_path / "benchmarks", "--limit", "2",
        "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    unlike = [line for line in out.splitlines() if "other data" in line]
    assert unlike == [f"piqa: other data or settings than those of {other.name} ({model.name})"]


def test_eval_measures_a_sample_of_documents(
    finished: Finished, tmp_path: Path, succeed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miniplm.scoring.huggingface.matmul_rate", lambda *_: 1e12)
    model = finished.path("models/teacher")
    succeed(
        "eval", model, "--documents", finished.root.parent / "corpus" / "*.jsonl", "--sample", "7",
        "--sequence-length", "32", "--dtype", "float32", "--out", tmp_path / "out",
    )  # fmt: skip
    assert len(open_evaluation(tmp_path / "out" / model.name / "documents").scores) == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--documents", "x", "--counted", "nonsense"], "--counted bears only on --held-out, which is not given"),
        (["--documents", "x", "--tokenizer", "own"], "--tokenizer bears only on --held-out"),
        (["--held-out", "x", "--sample", "9"], "--sample bears only on --documents"),
        (["--held-out", "x", "--tasks-data", "y"], "--tasks-data bears only on --tasks"),
        (["--tasks", " ,"], "--tasks ' ,' names no task"),
        (["--documents", "{corpus}/0.jsonl", "{corpus}/1.jsonl"], "quote the glob"),
        (["--documents", "x", "{corpus}/nowhere"], "no such folder"),
        ([], "nothing to measure on"),
    ],
)
def test_eval_measures_nothing_where_something_given_cannot_be_meant(
    given: list[str], message: str, finished: Finished, tmp_path: Path, fail: Callable[..., str]
) -> None:
    arguments = [text.format(corpus=finished.root.parent / "corpus") for text in given]
    assert message in fail("eval", finished.path("models/teacher"), *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_other_instances_are_refused_for_training(
    finished: Finished, tmp_path: Path, fail: Callable[..., str]
) -> None:
    message = fail(
        "train", "qwen-0.5m", "--data", finished.path("corpus") / "reference", "--tokens", "1e5",
        "--rows", finished.path("selections/difference"), "--out", tmp_path / "model",
    )  # fmt: skip
    assert "other instances" in message


def test_a_score_tells_how_fast_it_was_and_keeps_it(
    finished: Finished, succeed: Callable[..., str], tmp_path: Path
) -> None:
    model = finished.path("models/teacher")
    out = succeed("score", finished.pool, "--model", model, "--out", tmp_path / "scores", "--documents", "isolate")
    assert "tokens/s" in out
    assert "of this machine's matrix products" in out
    how = artifact.provenance(tmp_path / "scores")
    assert how["tokens_per_s"] > 0
    assert 0 < how["share_of_matmul_rate"] < 1
    assert how["flops_per_s"] < how["matmul_flops_per_s"]
    assert artifact.read(tmp_path / "scores").identity.recipe["documents"] == "isolate"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing torch's compiler causes them
def test_drift_prints_each_way_and_writes_the_table(
    finished: Finished, succeed: Callable[..., str], tmp_path: Path
) -> None:
    out = succeed(
        "drift", finished.pool, "--teacher", finished.path("models/teacher"), "--reference",
        finished.path("models/reference"), "--sample", "24", "--out", tmp_path / "drift",
    )  # fmt: skip
    rows = json.loads((tmp_path / "drift" / "drift.json").read_bytes())
    assert len(rows) >= 6
    for row in rows:
        assert any(line.startswith(row["way"]) for line in out.splitlines())


def test_a_server_that_is_not_there_is_an_error(finished: Finished, fail: Callable[..., str], tmp_path: Path) -> None:
    err = fail(
        "score", finished.pool, "--server", "http://user:secret@127.0.0.1:9/v1", "--model", "x", "--out", tmp_path / "s"
    )
    assert "secret" not in err
