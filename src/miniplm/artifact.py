"""Artifacts: directories that are finished or not there, and know what they are.

In: an `Identity` (what is made, of what) and a function that fills a folder, part by part.
Out: a folder with `manifest.json` in it: identity, counts, and the size and sha256 of every file.

What is promised. Work happens in `<name>.partial/`. Each part is written to a temporary name, fsynced and renamed, so a
part that is there is whole. The manifest is written last, then one rename makes the artifact appear. Interrupt
anything anywhere, call again with the same identity, and the work goes on from the parts that are there; the bytes,
manifest included, are those of an undisturbed run. An artifact is never appended to and never overwritten.

How this copy came to be (seconds, versions, batch sizes) is in `provenance.json`, the one file that differs
from run to run; it is not listed in the manifest.

Not covered: two machines writing the same artifact over a network file system without working `flock`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from miniplm.errors import (
    ArtifactBusyError,
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactMissingError,
    StorageError,
)

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
_IDENTITY = "identity.json"
_LOCK = ".lock"
_TEMPORARY = ".tmp"
_ALMOST_FULL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """What an artifact is, never how it is made.

    Attributes:
        kind: `packed`, `scores`, `selection`, `model`, ...
        version: of the stage's code; raised when the stage computes something else.
        recipe: the stage's settings. Batch sizes, devices, worker counts and paths are not settings.
        inputs: role -> fingerprint of what it is made of.

    """

    kind: str
    version: int
    recipe: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The four fields as plain JSON types."""
        return {"kind": self.kind, "version": self.version, "recipe": self.recipe, "inputs": self.inputs}

    @property
    def fingerprint(self) -> str:
        """sha256 in hexadecimal of the canonical JSON of the four fields; the order of keys does not matter."""
        return hashlib.sha256(_canonical(self.as_dict())).hexdigest()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        path: the artifact's folder.
        identity: what it is.
        counts: what the stage counted.
        files: name -> (bytes, sha256); a folder that is itself an artifact is listed by its manifest alone.

    """

    path: Path
    identity: Identity
    counts: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the identity."""
        return self.identity.fingerprint


class Workspace:
    """The `.partial` folder of an artifact in the making; handed to the function that fills it.

    Attributes:
        path: the folder. Everything in it becomes part of the artifact unless it is removed.
        provenance: JSON-able facts on how this run went; the caller adds to it.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.provenance: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        """Whether the part is there; if it is, it is whole."""
        return (self.path / name).exists()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """Yield a temporary path to write a file or folder to; on leaving it is fsynced and renamed to `name`.

        Raises:
            StorageError: the disk is full. The parts that are finished stay.

        """
        final = self.path / name
        final.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: a worker that was given up may still be writing the same part elsewhere
        temporary = final.with_name(f"{final.name}.{socket.gethostname()}-{os.getpid()}{_TEMPORARY}")
        with storage(final):
            yield temporary
            fsync_tree(temporary)
            temporary.rename(final)
            _fsync(final.parent)

    def write_json(self, name: str, value: object) -> None:
        """Write a part that is a small JSON document."""
        with self.part(name) as temporary:
            temporary.write_bytes(pretty_json(value))

    def remove(self, name: str) -> None:
        """Remove a part that served its purpose (a file or a folder); nothing happens if it is not there."""
        target = self.path / name
        if target.is_dir():  # renamed first: half a folder must not pass for the whole one when the work goes on
            doomed = target.rename(target.with_name(target.name + _TEMPORARY))
            shutil.rmtree(doomed)
        else:
            target.unlink(missing_ok=True)

    def seal(self, name: str, identity: Identity, counts: Mapping[str, Any]) -> None:
        """Make the subfolder `name` an artifact of its own, so that it can be opened and verified by itself."""
        (self.path / name).mkdir(parents=True, exist_ok=True)
        _tidy(self.path / name)
        self.write_json(f"{name}/{MANIFEST}", _manifest(self.path / name, identity, counts))


def make(path: Path | str, identity: Identity, work: Callable[[Workspace], Mapping[str, Any]]) -> Manifest:
    """Return the manifest of the artifact at `path`, made by `work` first if it is not there.

    `work(workspace)` fills `workspace.path` and returns the counts for the manifest. It is called again after an
    interruption and must go on from the parts that `workspace.has`.

    Raises:
        ArtifactMismatchError: `path`, or unfinished work beside it, is something else.
        ArtifactBusyError: another process is at work on it.
        StorageError: the disk is full.

    """
    path = Path(path)
    if (found := finished(path, identity)) is not None:
        return found
    partial = partial_path(path)
    with storage(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with _lock(partial):
            if (found := finished(path, identity)) is not None:  # another process was faster
                shutil.rmtree(partial)
                return found
            resumed = _claim(partial, identity, path)
            if not (partial / MANIFEST).exists():
                workspace = Workspace(partial)
                begun = time.monotonic()
                counts = work(workspace)
                _tidy(partial)
                seconds = round(time.monotonic() - begun, 3)
                how = {"seconds": seconds, "resumed": resumed, **workspace.provenance, **_versions()}
                workspace.write_json(PROVENANCE, how)
                workspace.write_json(MANIFEST, _manifest(partial, identity, counts))
            for ours in (_IDENTITY, _LOCK):
                (partial / ours).unlink(missing_ok=True)
            partial.rename(path)
            _fsync(path.parent)
    return read(path)


def finished(path: Path | str, identity: Identity) -> Manifest | None:
    """The manifest of the artifact at `path` if it is there, None if it is not.

    Raises:
        ArtifactMismatchError: something else is there.

    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / MANIFEST).is_file():
        raise ArtifactMismatchError(
            f"{path} is there, but it is no artifact of miniplm (it has no {MANIFEST}).",
            remedy="Choose another output folder, or move it away.",
        )
    manifest = read(path)
    if manifest.fingerprint != identity.fingerprint:
        raise ArtifactMismatchError(
            f"{path} holds something else than what was asked for.",
            facts=_differences(manifest.identity, identity),
            remedy="Artifacts are never overwritten: choose another output folder, or remove this one.",
        )
    return manifest


def read(path: Path | str, kind: str | None = None) -> Manifest:
    """Read a manifest and check that every file is there with its size (`verify` checks the bytes).

    Raises:
        ArtifactMissingError: nothing is there, or it is not finished.
        ArtifactMismatchError: it is of another kind.
        ArtifactDamagedError: the manifest cannot be read, a file is missing or has another size.

    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        unfinished = partial_path(path).is_dir()
        raise ArtifactMissingError(
            f"{path} is {'not finished' if unfinished else 'not an artifact of miniplm'}.",
            facts={"expected": f"a folder with {MANIFEST} in it"},
            remedy="Run the command that makes it again; it goes on where it stopped." if unfinished else "",
        )
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
        identity = Identity(raw["kind"], raw["version"], raw["recipe"], raw["inputs"])
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in raw["files"].items()}
        manifest = Manifest(path, identity, raw["counts"], files)
        recorded = raw["fingerprint"], raw["contents"]
        computed = manifest.fingerprint, _contents(raw["counts"], raw["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path / MANIFEST, "a manifest", f"not one ({error})") from error
    for name, said, is_ in zip(("fingerprint", "contents"), recorded, computed, strict=True):
        if said != is_:
            raise _damaged(path / MANIFEST, f"{name} {str(said)[:12]}", f"what it says gives {is_[:12]}")
    if kind is not None and identity.kind != kind:
        raise ArtifactMismatchError(
            f"{path} is not of the kind that is needed.", facts={"found": identity.kind, "expected": kind}
        )
    for name, (size, _) in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise _damaged(path / name, f"{size:,} bytes", "no such file" if found is None else f"{found:,} bytes")
    return manifest


def provenance(path: Path | str) -> dict[str, Any]:
    """How this copy came to be (`seconds`, versions, throughput); empty if that was not kept."""
    file = Path(path) / PROVENANCE
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def find(root: Path | str) -> list[Path]:
    """Every finished artifact at and below `root`, in order of path."""
    root = Path(root)
    folders = (manifest.parent for manifest in root.rglob(MANIFEST) if _is_ours(manifest))
    return sorted(f for f in folders if not any(part.endswith(".partial") for part in f.relative_to(root).parts))


def _is_ours(manifest: Path) -> bool:
    """Whether a `manifest.json` is one of ours: web applications have such files too. One that is no JSON may be."""
    try:
        raw = json.loads(manifest.read_bytes())
    except ValueError:
        return True
    return isinstance(raw, dict) and {"fingerprint", "kind"} <= raw.keys()


def verify(path: Path | str) -> Iterator[str]:
    """Read every byte of the artifact at `path` and yield one line for each thing that is not as its manifest says."""
    path = Path(path)
    try:
        manifest = read(path)
    except ArtifactDamagedError as error:
        yield str(error)
        return
    for name, (_, expected) in manifest.files.items():
        if (found := file_sha256(path / name)) != expected:
            yield str(_damaged(path / name, f"sha256 {expected[:12]}", f"sha256 {found[:12]}"))
    for extra in sorted(set(_listed(path)) - set(manifest.files)):
        yield f"{path / extra} is not in the manifest: it was put there afterwards."


def partial_path(path: Path) -> Path:
    """Where the artifact at `path` is made."""
    return path.with_name(path.name + ".partial")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """`file_sha256`, from the cache of earlier runs if the file has not been touched since.

    Hashing 100 GB takes minutes; a second run of a finished recipe must not. The cache is in `$XDG_CACHE_HOME/miniplm`.
    """
    stat = path.stat()
    known_by = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "miniplm" / "sha256"
    entry = cache / hashlib.sha256(_canonical(known_by)).hexdigest()
    if entry.is_file() and len(known := entry.read_text()) == 64:
        return known
    found = file_sha256(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written (a read-only home) costs time, nothing else
        cache.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_name(f"{entry.name}.{os.getpid()}")
        temporary.write_text(found)
        temporary.rename(entry)
    return found


def pretty_json(value: object) -> bytes:
    """JSON as every file of ours has it: two spaces, keys in the order given, a final newline, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where and how much.

    Raises:
        StorageError: the disk or the quota is full.

    """
    try:
        yield
    except Exception as error:
        folder = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(folder).free
        if isinstance(error, StorageError) or not _says_full(error, free):
            raise
        raise StorageError(
            f"no space left while writing {path}.",
            facts={"free": f"{free / 1e6:,.1f} MB", "in": folder},
            remedy="Free some space and type the same command again; what is finished is kept.",
        ) from error


def _says_full(error: Exception, free: int) -> bool:
    """Whether an error is about space. Some libraries say so only in words, torch not even that ("write failed")."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    words = str(error).lower()
    return "no space left" in words or ("write" in words and free < _ALMOST_FULL_BYTES)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _manifest(folder: Path, identity: Identity, counts: Mapping[str, Any]) -> dict[str, Any]:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in _listed(folder)
    }
    return {
        "fingerprint": identity.fingerprint,
        "contents": _contents(counts, files),
        **identity.as_dict(),
        "counts": counts,
        "files": files,
    }


def _contents(counts: object, files: object) -> str:
    """sha256 of what a manifest says beyond the identity."""
    return hashlib.sha256(_canonical([counts, files])).hexdigest()


def _listed(folder: Path) -> list[str]:
    """The files that a manifest lists: all but itself and how it came to be; inner artifacts by their manifest."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if here != folder and MANIFEST in files:
            folders.clear()
            files = [MANIFEST]
        names += [(here / file).relative_to(folder).as_posix() for file in files]
    ours = {MANIFEST, PROVENANCE, _IDENTITY, _LOCK}
    return sorted(name for name in names if name not in ours)


def _claim(partial: Path, identity: Identity, path: Path) -> bool:
    """Make sure that the work in `partial` is ours; say whether some had been done."""
    marker = partial / _IDENTITY
    if not marker.exists() and (partial / MANIFEST).exists():  # killed between the last write and the last rename
        marker = partial / MANIFEST
    if not marker.exists():
        strangers = sorted({entry.name for entry in partial.iterdir()} - {_LOCK, _IDENTITY + _TEMPORARY})
        if strangers:  # nothing of ours comes before the marker
            raise ArtifactMismatchError(
                f"{partial} is there, but it is no unfinished work of miniplm.",
                facts={"found": ", ".join(strangers[:5])},
                remedy=f"Move it away, or choose another output folder than {path}.",
            )
        _mark(partial, identity)
        return False
    raw = json.loads(marker.read_bytes())
    begun = Identity(raw["kind"], raw["version"], raw["recipe"], raw["inputs"])
    if begun.fingerprint != identity.fingerprint:
        if {entry.name for entry in partial.iterdir()} <= {_IDENTITY, _LOCK}:  # refused before anything was made
            _mark(partial, identity)
            return False
        raise ArtifactMismatchError(
            f"unfinished work on something else is in {partial}.",
            facts=_differences(begun, identity),
            remedy=f"Finish it with its own settings, remove {partial}, or choose another output folder than {path}.",
        )
    _tidy(partial)
    return any(entry.name not in {_IDENTITY, _LOCK} for entry in partial.iterdir())


def _mark(partial: Path, identity: Identity) -> None:
    """Write down whose work the folder is for."""
    marker = partial / _IDENTITY
    temporary = marker.with_name(_IDENTITY + _TEMPORARY)
    temporary.write_bytes(pretty_json(identity.as_dict()))
    _fsync(temporary)
    temporary.rename(marker)
    _fsync(partial)


def _tidy(folder: Path) -> None:
    """Remove what processes left behind that were killed while they wrote: this one's last run, an engine's workers."""
    for leftover in sorted(folder.rglob("*" + _TEMPORARY), reverse=True):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends."""
    with (partial / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactBusyError(
                f"another process is at work in {partial}.", remedy="Wait for it, or stop it and try again."
            ) from error
        yield


def _differences(found: Identity, asked: Identity) -> dict[str, str]:
    """The settings in which two identities differ, as `name -> found, asked for`."""
    old, new = _flat(found.as_dict()), _flat(asked.as_dict())
    lines = {
        key: f"found {old.get(key, '(none)')}, asked for {new.get(key, '(none)')}"
        for key in [*new, *(k for k in old if k not in new)]
        if old.get(key) != new.get(key)
    }
    return dict(list(lines.items())[:8])


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        text = json.dumps(value, ensure_ascii=False)
        return {prefix: text if len(text) <= 48 else text[:45] + "..."}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def _damaged(path: Path, expected: str, found: str) -> ArtifactDamagedError:
    return ArtifactDamagedError(
        f"{path} is not as it was written.",
        facts={"expected": expected, "found": found},
        remedy="Remove the artifact it belongs to and run the same command again; it is made anew.",
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make a file, or a folder and all that is in it, durable."""
    for inner in path.rglob("*") if path.is_dir() else ():
        _fsync(inner)
    _fsync(path)


def _versions() -> dict[str, Any]:
    names = ("miniplm", "torch", "transformers", "datasets", "tokenizers", "pyarrow", "numpy")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"versions": {"python": platform.python_version(), **versions}, "platform": platform.platform()}
