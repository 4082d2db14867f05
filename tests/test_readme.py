"""README's commands run as they stand, in order, on a small corpus; its make targets exist."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from conftest import write_jsonl
from miniplm import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [
        line[2:].split(" # ")[0].strip()
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with README's `data/` and `recipes/`; the demo's recipe is made small enough for a test."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").mkdir()
    for number in range(2):
        write_jsonl(folder / "data" / f"{number}.jsonl", 1500, words=120, seed=number)
    with (folder / "data" / "names.jsonl").open("w") as file:  # enough different words for 1,024 tokens
        for n in range(400):
            name = hashlib.sha256(str(n).encode()).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))
            file.write(
                json.dumps({"text": f"{name[: n % 40 + 8]} is the {n} th name. " * 12, "source": "names"}) + "\n"
            )
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    recipe = folder / "recipes" / "quickstart.yaml"
    small = recipe.read_text()
    for pattern, value in (
        (r"budget_bytes: \S+,", "budget_bytes: 1.5e6,"),
        (r"vocab_size: \d+, sample_bytes: [\d.e]+", "vocab_size: 1024, sample_bytes: 5e5"),
        (r"(preset: qwen-)\S+?,", r"\g<1>0.5m,"), (r" tokens: [\d.]+e6", " tokens: 3e4"),
        (r"held_out: 0\.\d+", "held_out: 0.1"), (r"reference: 0\.\d+,", "reference: 0.2,"),
    ):  # fmt: skip
        small, changed = re.subn(pattern, value, small)
        assert changed, pattern
    recipe.write_text(small)
    return folder


def test_the_make_targets_that_readme_names_exist() -> None:
    named = [command for command in commands() if command.startswith("make ")]
    assert named == ["make demo", "make test"]
    for command in named:
        planned = subprocess.run(
            [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert {"make demo": "miniplm run recipes/quickstart.yaml", "make test": "pytest"}[command] in planned


def test_the_commands_of_the_other_pages_are_such_that_the_program_takes_them() -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    pages = sorted((ROOT / "docs").glob("*.md"))
    there = [line[2:] for page in pages for line in page.read_text().splitlines() if line.startswith("$ miniplm ")]
    assert there
    for command in there:
        _, verb, *arguments = shlex.split(command)
        known[verb].make_context(verb, arguments)  # raises, naming the option, if it cannot be called so


@pytest.mark.slow
def test_the_commands_run_in_order(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    ran = [command for command in commands() if command.startswith("miniplm ")]
    assert len(ran) >= 12
    for command in ran:
        verb, *arguments = shlex.split(command)[1:]
        expanded = [str(p) for a in arguments for p in (sorted(Path().glob(a)) if "*" in a else [a])]
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, *expanded])
        assert ended.value.code == 0, f"{command}\n{capsys.readouterr()}"
    printed = capsys.readouterr().out
    assert "against control" in printed
    assert (workplace / "runs" / "quickstart" / "report.html").is_file()


@pytest.mark.slow
def test_the_python_block_runs(workplace: Path) -> None:
    (block,) = blocks("python")
    ran = subprocess.run([sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "bits_per_byte" in ran.stdout
