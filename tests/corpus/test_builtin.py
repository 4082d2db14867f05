"""The built-in corpus: drawn from what is installed, the same for the same seed, never mostly one package."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from miniplm import artifact
from miniplm.corpus import builtin
from miniplm.corpus.sources import Document, open_documents
from miniplm.errors import CorpusTooSmallError
from miniplm.packing.prepare import open_corpus
from miniplm.pipeline import library
from miniplm.recipe import CorpusSettings

BUDGET = 60_000
PACKAGES = 12


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation of its own: a standard library, packages, and what is to be left out."""
    stdlib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for package in range(PACKAGES):
        folder = site / f"package{package}"
        folder.mkdir(parents=True)
        for number in range(12):
            text = f"# {package} {number} é\n" + f"value_{package} = {number} * ratio\n" * 40
            (folder / f"module{number}.py").write_text(text)
        (folder / "copy.py").write_bytes((folder / "module0.py").read_bytes())
        (folder / "stub.py").write_text("x = 1\n")
        (folder / "latin.py").write_bytes("# é\n".encode("latin-1") * 200)
        (folder / "data.bin").write_bytes(b"x" * 1000)
    (site / "miniplm").mkdir()
    (site / "miniplm" / "own.py").write_text("ours = 1\n" * 100)
    (site / "huge").mkdir()
    (site / "huge" / "table.py").write_text("0,\n" * builtin.FILE_BYTES[1])
    for number in range(12):
        (stdlib / f"std{number}.py").write_text(f"# the standard library {number}\n" * 40)
    paths = {"stdlib": str(stdlib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: paths)
    return site


@pytest.mark.usefixtures("installed")
def test_a_draw_is_repeatable_and_another_seed_draws_others() -> None:
    first = builtin.draw(BUDGET, seed=0)
    assert builtin.draw(BUDGET, seed=0) == first
    other = builtin.draw(BUDGET, seed=1)
    assert other.content != first.content
    assert {f.id for f in other.files} != {f.id for f in first.files}


@pytest.mark.usefixtures("installed")
def test_the_budget_is_filled_and_hardly_exceeded() -> None:
    sample = builtin.draw(BUDGET, seed=0)
    largest = max(len(f.text.encode()) for f in sample.files)
    assert sample.text_bytes == sum(len(f.text.encode()) for f in sample.files)
    assert BUDGET <= sample.text_bytes < BUDGET + largest


@pytest.mark.usefixtures("installed")
def test_no_package_gives_more_than_its_share() -> None:
    taken: Counter[str] = Counter()
    for file in builtin.draw(BUDGET, seed=0).files:
        taken[file.source] += len(file.text.encode())
    assert max(taken.values()) <= builtin.MAX_SHARE * BUDGET
    assert len(taken) > 1 / builtin.MAX_SHARE


@pytest.mark.usefixtures("installed")
def test_copies_stubs_tables_other_encodings_and_ourselves_are_left_out() -> None:
    sample = builtin.draw(BUDGET, seed=0)
    digests = [hashlib.sha256(f.text.encode()).digest() for f in sample.files]
    assert len(set(digests)) == len(digests)
    assert len({f.id for f in sample.files}) == len(sample.files)
    names = {Path(f.id).name for f in sample.files}
    assert not names & {"stub.py", "table.py", "latin.py", "data.bin", "own.py"}
    assert {f.source for f in sample.files} <= {"python", *(f"package{n}" for n in range(PACKAGES))}


def test_another_text_in_a_file_is_another_corpus(installed: Path) -> None:
    before = builtin.draw(BUDGET, seed=0)
    path = next(f.id for f in before.files if f.id.startswith("site/")).removeprefix("site/")
    text = (installed / path).read_text()
    (installed / path).write_text(text.replace("ratio", "ritao"))
    after = builtin.draw(BUDGET, seed=0)
    assert [f.id for f in after.files] == [f.id for f in before.files]
    assert after.identity(BUDGET, 0).fingerprint != before.identity(BUDGET, 0).fingerprint


@pytest.mark.usefixtures("installed")
def test_too_little_to_draw_from_says_how_much_there_is() -> None:
    with pytest.raises(CorpusTooSmallError, match=r"(?s)found +0\.\d MB.*asked for +10\.0 MB"):
        builtin.draw(10_000_000, seed=0)


@pytest.mark.usefixtures("installed")
def test_a_snapshot_is_an_artifact_with_what_was_drawn(tmp_path: Path) -> None:
    sample = builtin.draw(BUDGET, seed=0)
    manifest = builtin.snapshot(tmp_path / "drawn", BUDGET, seed=0)
    assert manifest.identity == sample.identity(BUDGET, 0)
    assert manifest.counts["documents"] == len(sample.files)
    assert list(artifact.verify(tmp_path / "drawn")) == []
    documents = open_documents(CorpusSettings(files=str(tmp_path / "drawn" / "documents.parquet")))
    assert list(documents.read(0)) == [Document(f.id, f.text, f.source) for f in sample.files]


@pytest.mark.usefixtures("installed")
def test_prepare_reads_a_snapshot(tmp_path: Path) -> None:
    builtin.snapshot(tmp_path / "drawn", BUDGET, seed=0)
    corpus = library.prepare(
        str(tmp_path / "drawn" / "documents.parquet"),
        tokenizer={"train": {"vocab_size": 300}},
        out=tmp_path / "corpus",
        sequence_length=32,
        split={"reference": 0.2, "held_out": 0.2},
    )
    assert open_corpus(tmp_path / "corpus").manifest.counts == corpus.manifest.counts
    assert sum(part["documents"] for part in corpus.manifest.counts["parts"].values()) == len(
        builtin.draw(BUDGET, seed=0).files
    )


@pytest.mark.slow
def test_what_is_really_installed_here_gives_a_corpus() -> None:
    sample = builtin.draw(1_000_000, seed=0)
    assert sample.text_bytes >= 1_000_000
    assert len({f.source for f in sample.files}) > 1 / builtin.MAX_SHARE
    assert not any(f.source.startswith("miniplm") for f in sample.files)
