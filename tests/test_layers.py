"""Who imports whom: each layer imports only lower ones, and folders of one layer never meet."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import miniplm

ROOT = Path(miniplm.__file__).parent
LAYERS = [
    {"errors", "progress"},
    {"artifact", "recipe"},
    {"corpus", "engine", "engine.ray"},
    {"packing"},
    {"models", "scoring.base"},
    {"sampling"},
    {"analysis"},
    {"scoring", "training", "export"},
    {"evaluation"},
    {"pipeline"},
    {"report"},
    {"cli", ""},
    {"__main__"},
]
TORCH_FROM = 4  # the first layer that may import torch and transformers
TORCH = {"torch", "transformers", "accelerate"}
OWN_ROOMS = ("scoring.base", "engine.ray")  # modules that are a room by themselves
MAY_ALSO = {"engine.ray": "engine.base"}  # of its own layer
ONLY_IN = {  # package -> modules
    "ray": {"engine.ray"},
    "vllm": {"scoring.vllm"},
    "httpx": {"scoring.line"},
    "lm_eval": {"evaluation.harness", "evaluation.harness_model"},
}
THEMSELVES_LATE = {"evaluation.harness", "evaluation.harness_model"}  # may import it with the module: see the test


def rooms() -> Iterator[tuple[str, str, Path]]:
    """(module, room, file) of every module of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix("__init__").rstrip(".")
        yield module, room_of(module), path


def room_of(module: str) -> str:
    return module if module in OWN_ROOMS else module.split(".")[0]


def layer_of(room: str) -> int:
    return next(n for n, layer in enumerate(LAYERS) if room in layer)


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_room_in_the_layers() -> None:
    assert {room for _, room, _ in rooms()} <= set().union(*LAYERS)


def test_each_layer_imports_only_lower_ones() -> None:
    modules = {module for module, _, _ in rooms()}
    met = []
    for module, room, path in rooms():
        for name in imports(path):
            target = name.removeprefix("miniplm.")
            if not name.startswith("miniplm.") or target not in modules or not target:
                continue
            other = room_of(target)
            if other == room or room == "":
                continue
            if room.split(".")[0] == other.split(".")[0] and other == "scoring.base":
                continue
            if MAY_ALSO.get(room) == target:
                continue
            if layer_of(other) >= layer_of(room):
                met.append(f"{module} (layer {layer_of(room)}) imports {target} (layer {layer_of(other)})")
    assert not met, "\n".join(met)


def test_low_layers_know_nothing_of_torch() -> None:
    for module, room, path in rooms():
        if layer_of(room) < TORCH_FROM or room == "scoring.base":
            assert not {name.split(".")[0] for name in imports(path)} & TORCH, module


def test_packages_of_one_backend_are_imported_by_one_module_when_it_is_used() -> None:
    for package, homes in ONLY_IN.items():
        users = {module for module, _, path in rooms() if package in {n.split(".")[0] for n in imports(path)}}
        assert users <= homes, package
        early = {
            module
            for module, _, path in rooms()
            if package in {n.split(".")[0] for n in imports(path, top_level_only=True)}
        }
        assert early <= THEMSELVES_LATE, f"{package} is imported with the module, not when it is used"
    for module, _, path in rooms():
        late = {name.removeprefix("miniplm.") for name in imports(path, top_level_only=True)} & THEMSELVES_LATE
        assert not late or module in THEMSELVES_LATE, f"{module} imports {late}, and with it its package"


def test_the_two_lowest_layers_need_the_standard_library_pydantic_yaml_and_tqdm_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"pydantic", "yaml", "tqdm", "miniplm"}
    for module, room, path in rooms():
        if layer_of(room) < 2:
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {module: path for module, _, path in rooms()}
    graph = {
        module: {
            name.removeprefix("miniplm.")
            for name in imports(path, top_level_only=True)
            if name.startswith("miniplm.") and name.removeprefix("miniplm.") in modules.keys() - {module}
        }
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_room_is_called_utils() -> None:
    forbidden = {"utils", "util", "misc", "common", "helpers"}
    assert not forbidden & {part for module, _, _ in rooms() for part in module.split(".")}
