"""Artifacts: finished or absent, whatever happens; refused, with both sides, when they are something else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from miniplm import artifact
from miniplm.artifact import Identity, Workspace
from miniplm.errors import (
    ArtifactBusyError,
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactMissingError,
    StorageError,
)

WHAT = Identity("toy", 1, {"ratio": 0.5, "inner": {"seed": 0}}, {"corpus": "c" * 64})


class KilledError(Exception):
    """Stands for the end of the process in the middle of the work."""


def two_parts(work: Workspace) -> Mapping[str, Any]:
    """Writes `a` and `sub/b` where they are not there yet; says in provenance which it wrote."""
    wrote = []
    for name, text in (("a", "alpha"), ("sub/b", "beta")):
        if not work.has(name):
            with work.part(name) as path:
                path.write_text(text)
            wrote.append(name)
    work.provenance["wrote"] = wrote
    return {"parts": 2}


def stops_after_a(work: Workspace) -> Mapping[str, Any]:
    with work.part("a") as path:
        path.write_text("alpha")
    raise KilledError


def begin(out: Path) -> Path:
    """Unfinished work at `out`, with part `a` in it; returns the `.partial` folder."""
    with pytest.raises(KilledError):
        artifact.make(out, WHAT, stops_after_a)
    return artifact.partial_path(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != artifact.PROVENANCE
    }


def never(work: Workspace) -> Mapping[str, Any]:
    raise AssertionError("the work was called although nothing was to be done")


def test_a_finished_artifact_has_its_parts_its_manifest_and_no_trace_of_the_work(tmp_path: Path) -> None:
    manifest = artifact.make(tmp_path / "out", WHAT, two_parts)
    assert sorted(contents(tmp_path / "out")) == ["a", "manifest.json", "sub/b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert manifest.fingerprint == WHAT.fingerprint
    assert manifest.counts == {"parts": 2}
    assert {name: size for name, (size, _) in manifest.files.items()} == {"a": 5, "sub/b": 4}


def test_interrupted_work_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    begin(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert artifact.finished(tmp_path / "out", WHAT) is None
    with pytest.raises(ArtifactMissingError, match="not finished"):
        artifact.read(tmp_path / "out")


def test_interrupted_work_goes_on_from_the_parts_that_are_there_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    artifact.make(tmp_path / "undisturbed", WHAT, two_parts)
    begin(tmp_path / "out")
    artifact.make(tmp_path / "out", WHAT, two_parts)
    assert artifact.provenance(tmp_path / "out")["wrote"] == ["sub/b"]
    assert artifact.provenance(tmp_path / "out")["resumed"] is True
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_finished_artifact_is_not_made_again(tmp_path: Path) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert artifact.make(tmp_path / "out", WHAT, never).counts == {"parts": 2}
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_an_exception_inside_a_part_leaves_no_final_name(tmp_path: Path) -> None:
    def fails(work: Workspace) -> Mapping[str, Any]:
        with work.part("a") as path:
            path.write_text("half of it")
            raise KilledError
        return {}

    with pytest.raises(KilledError):
        artifact.make(tmp_path / "out", WHAT, fails)
    assert not (artifact.partial_path(tmp_path / "out") / "a").exists()


def test_leftovers_of_half_written_parts_are_removed_on_resume(tmp_path: Path) -> None:
    partial = begin(tmp_path / "out")
    (partial / "sub").mkdir()
    (partial / "sub" / "b.tmp").write_text("half")
    (partial / "folder.tmp").mkdir()
    (partial / "folder.tmp" / "inner.tmp").write_text("half")
    artifact.make(tmp_path / "out", WHAT, two_parts)
    assert sorted(contents(tmp_path / "out")) == ["a", "manifest.json", "sub/b"]


def test_a_folder_is_removed_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a folder of training state must not pass for the whole when the work goes on."""

    def killed_in_the_middle(folder: Path, *_: object, **__: object) -> None:
        next(p for p in sorted(Path(folder).iterdir()) if p.is_file()).unlink()
        raise KilledError

    def removes(work: Workspace) -> Mapping[str, Any]:
        with work.part("state") as folder:
            folder.mkdir()
            for name in ("complete", "weights"):
                (folder / name).touch()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", killed_in_the_middle)
            work.remove("state")
        return {}

    with pytest.raises(KilledError):
        artifact.make(tmp_path / "out", WHAT, removes)
    seen = []

    def looks(work: Workspace) -> Mapping[str, Any]:
        seen.extend(sorted(p.name for p in work.path.rglob("*") if p.name in {"complete", "weights"}))
        return {}

    artifact.make(tmp_path / "out", WHAT, looks)
    assert seen in ([], ["complete", "weights"])


@pytest.mark.parametrize("unfinished", [True, False], ids=["unfinished", "finished"])
def test_another_identity_is_refused_with_both_sides(tmp_path: Path, unfinished: bool) -> None:
    if unfinished:
        begin(tmp_path / "out")
    else:
        artifact.make(tmp_path / "out", WHAT, two_parts)
    other = Identity("toy", 1, {"ratio": 0.25, "inner": {"seed": 7}}, {"corpus": "c" * 64})
    with pytest.raises(ArtifactMismatchError) as refused:
        artifact.make(tmp_path / "out", other, never)
    message = str(refused.value)
    assert str(tmp_path / "out") in message
    assert [line.split() for line in message.splitlines() if line.startswith("  recipe.")] == [
        ["recipe.ratio", "found", "0.5,", "asked", "for", "0.25"],
        ["recipe.inner.seed", "found", "0,", "asked", "for", "7"],
    ]
    assert "corpus" not in message, "what is equal is not shown"


def test_refused_work_is_left_as_it_was(tmp_path: Path) -> None:
    partial = begin(tmp_path / "out")
    before = contents(partial)
    with pytest.raises(ArtifactMismatchError):
        artifact.make(tmp_path / "out", Identity("other", 1, {}), never)
    assert contents(partial) == before


def test_a_folder_that_is_no_artifact_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactMismatchError, match="no artifact"):
        artifact.make(tmp_path / "out", WHAT, never)
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}
    assert not artifact.partial_path(tmp_path / "out").exists()


def test_a_file_where_the_artifact_would_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactMismatchError, match="no artifact"):
        artifact.make(tmp_path / "out", WHAT, never)


def test_an_empty_folder_may_become_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    artifact.make(tmp_path / "out", WHAT, two_parts)
    assert (tmp_path / "out" / "a").read_text() == "alpha"


def test_a_partial_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    partial = artifact.partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "a").write_text("years of work")
    (partial / "b.tmp").write_text("more of it")
    with pytest.raises(ArtifactMismatchError, match="no unfinished work of miniplm"):
        artifact.make(tmp_path / "out", WHAT, never)
    assert (partial / "a").read_text() == "years of work"
    assert (partial / "b.tmp").read_text() == "more of it"


def test_reading_nothing_says_that_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissingError, match="nowhere is not an artifact"):
        artifact.read(tmp_path / "nowhere")


def test_reading_another_kind_shows_both_kinds(tmp_path: Path) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    with pytest.raises(ArtifactMismatchError, match=r"(?s)found +toy.*expected +scores"):
        artifact.read(tmp_path / "out", kind="scores")


def test_a_truncated_file_is_named_on_reading(tmp_path: Path) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    os.truncate(tmp_path / "out" / "sub" / "b", 3)
    with pytest.raises(ArtifactDamagedError, match=r"(?s)sub/b.*expected +4 bytes.*found +3 bytes"):
        artifact.read(tmp_path / "out")
    assert "sub/b" in "".join(artifact.verify(tmp_path / "out"))


def test_a_missing_file_is_named_on_reading(tmp_path: Path) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    (tmp_path / "out" / "a").unlink()
    with pytest.raises(ArtifactDamagedError, match=r"(?s)out/a .*no such file"):
        artifact.read(tmp_path / "out")


def test_an_altered_byte_is_named_by_verify(tmp_path: Path) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    assert list(artifact.verify(tmp_path / "out")) == []
    (tmp_path / "out" / "sub" / "b").write_text("bete")
    artifact.read(tmp_path / "out")  # the size is right
    (problem,) = artifact.verify(tmp_path / "out")
    assert "sub/b" in problem
    assert "sha256" in problem


def test_a_file_that_was_added_is_named_by_verify(tmp_path: Path) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    (tmp_path / "out" / "sub" / "extra.txt").write_text("x")
    (problem,) = artifact.verify(tmp_path / "out")
    assert "sub/extra.txt" in problem


@pytest.mark.parametrize(
    ("field", "edited"),
    [
        ("kind", "scores"),
        ("version", 2),
        ("recipe", {"ratio": 0.9}),
        ("inputs", {}),
        ("counts", {"parts": 3}),
        ("files", {"a": {"bytes": 5, "sha256": "0" * 64}, "sub/b": {"bytes": 4, "sha256": "0" * 64}}),
    ],
)
def test_an_edited_manifest_is_detected(tmp_path: Path, field: str, edited: object) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    path = tmp_path / "out" / "manifest.json"
    raw = json.loads(path.read_bytes())
    raw[field] = edited
    path.write_bytes(artifact.pretty_json(raw))
    assert [problem for problem in artifact.verify(tmp_path / "out") if str(tmp_path / "out") in problem]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"kind": "toy"}', b"\xff\xfe"])
def test_a_manifest_that_is_none_is_damage_and_no_crash(tmp_path: Path, content: bytes) -> None:
    artifact.make(tmp_path / "out", WHAT, two_parts)
    (tmp_path / "out" / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactDamagedError, match=r"manifest\.json"):
        artifact.read(tmp_path / "out")


def test_provenance_is_kept_and_is_not_part_of_the_artifact(tmp_path: Path) -> None:
    manifest = artifact.make(tmp_path / "out", WHAT, two_parts)
    how = artifact.provenance(tmp_path / "out")
    assert how["resumed"] is False
    assert how["seconds"] >= 0
    assert "python" in how["versions"]
    assert artifact.PROVENANCE not in manifest.files
    (tmp_path / "out" / artifact.PROVENANCE).unlink()
    assert list(artifact.verify(tmp_path / "out")) == []
    assert artifact.provenance(tmp_path / "out") == {}


def test_an_inner_artifact_can_be_read_and_verified_by_itself(tmp_path: Path) -> None:
    inner = Identity("packed", 1, {"part": "pool"})

    def work(workspace: Workspace) -> Mapping[str, Any]:
        with workspace.part("pool/rows") as path:
            path.write_text("rows")
        workspace.seal("pool", inner, {"instances": 4})
        return {}

    outer = artifact.make(tmp_path / "out", WHAT, work)
    assert list(outer.files) == ["pool/manifest.json"]
    assert artifact.read(tmp_path / "out" / "pool", kind="packed").counts == {"instances": 4}
    assert artifact.find(tmp_path) == [tmp_path / "out", tmp_path / "out" / "pool"]
    (tmp_path / "out" / "pool" / "rows").write_text("swor")
    assert "pool/rows" in "".join(artifact.verify(tmp_path / "out" / "pool"))


def test_find_sees_no_unfinished_work(tmp_path: Path) -> None:
    def stops(work: Workspace) -> Mapping[str, Any]:
        work.seal("pool", WHAT, {})
        raise KilledError

    with pytest.raises(KilledError):
        artifact.make(tmp_path / "out", WHAT, stops)
    assert artifact.find(tmp_path) == []


HOLDER = """
import sys, time
from miniplm import artifact
from miniplm.artifact import Identity

def work(workspace):
    print("working", flush=True)
    sys.stdin.readline()
    return {}

artifact.make(sys.argv[1], Identity("toy", 1, {}), work)
"""


def test_a_second_process_is_told_that_another_is_at_work_and_both_end_well(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "working\n"
        with pytest.raises(ArtifactBusyError, match="out"):
            artifact.make(out, Identity("toy", 1, {}), never)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.wait(timeout=30) == 0
    assert artifact.make(out, Identity("toy", 1, {}), never).fingerprint == Identity("toy", 1, {}).fingerprint


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "working\n"
        holder.send_signal(signal.SIGKILL)
    assert artifact.make(out, Identity("toy", 1, {}), lambda _: {"done": True}).counts == {"done": True}


@pytest.mark.parametrize("moment", ["unlink identity.json", "unlink .lock", "rename out.partial"])
def test_killed_between_the_manifest_and_the_rename_the_work_is_not_called_again(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    operation, name = moment.split()
    original = getattr(Path, operation)

    def killed(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name:
            raise KilledError
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, operation, killed)
        with pytest.raises(KilledError):
            artifact.make(out, WHAT, two_parts)
    assert not out.exists()
    assert (artifact.partial_path(out) / "manifest.json").exists()
    artifact.make(out, WHAT, never)
    assert sorted(contents(out)) == ["a", "manifest.json", "sub/b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_space_finished_parts_stay_and_a_later_call_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_up(work: Workspace) -> Mapping[str, Any]:
        with work.part("a") as path:
            path.write_text("alpha")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with work.part("sub/b") as path:
                path.write_text("be")
        return {}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"(?s)no space left.*sub/b.*free.*MB"):
        artifact.make(tmp_path / "out", WHAT, fills_up)
    partial = artifact.partial_path(tmp_path / "out")
    assert (partial / "a").read_text() == "alpha"
    assert not (partial / "sub" / "b").exists()
    artifact.make(tmp_path / "out", WHAT, two_parts)
    assert artifact.provenance(tmp_path / "out")["wrote"] == ["sub/b"]
    assert (tmp_path / "out" / "sub" / "b").read_text() == "beta"


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    def denied(work: Workspace) -> Mapping[str, Any]:
        with work.part("a"):
            raise PermissionError(errno.EACCES, "denied")
        return {}

    with pytest.raises(PermissionError):
        artifact.make(tmp_path / "out", WHAT, denied)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a 1 MB tmpfs needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a 1 MB tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_disk_that_is_really_full_the_work_stops_and_completes_when_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * 600_000)

    def work(workspace: Workspace) -> Mapping[str, Any]:
        for name in ("a", "b", "c"):
            if not workspace.has(name):
                with workspace.part(name) as path:
                    path.write_bytes(name.encode() * 200_000)
        return {}

    with pytest.raises(StorageError, match="no space left"):
        artifact.make(small_disk / "out", WHAT, work)
    assert not (small_disk / "out").exists()
    assert (artifact.partial_path(small_disk / "out") / "a").stat().st_size == 200_000
    ballast.unlink()
    artifact.make(small_disk / "out", WHAT, work)
    assert list(artifact.verify(small_disk / "out")) == []


def test_a_folder_in_which_nothing_was_made_yet_is_taken_over(tmp_path: Path) -> None:
    """As when a setting was refused at the start, and the command is typed again with another."""

    def refuse(_: Workspace) -> dict[str, int]:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        artifact.make(tmp_path / "a", Identity("k", 1, {"rate": 0}), refuse)
    assert artifact.make(tmp_path / "a", Identity("k", 1, {"rate": 1}), lambda _: {}).identity.recipe == {"rate": 1}
