"""The rules of the house that the imports and the file names can show."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.backend_independent

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "kllama").rglob("*.py"))
FRAMEWORKS = {"jax", "jaxlib", "flax", "tensorflow", "tensorflow_text", "tf_keras", "torch"}

# An import goes from a room to one further down, or to its neighbour. What is not a room may be imported from anywhere.
FLOORS = {
    "cli": 6,
    "models": 5,
    "generation": 4,
    "training": 4,
    "text": 4,
    "checkpoints": 4,
    "layers": 3,
    "core": 2,
    "backend": 1,
}
OPEN_TO_ALL = {"kllama.checkpoints.progress"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file it does so."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = f"{source}.{alias.name}" in MODULES
                yield f"{source}.{alias.name}" if is_module else source


def room(module: str) -> str:
    """The folder of `kllama` that a module lies in; for what lies beside the folders, its own name."""
    return module.split(".")[1] if "." in module else module


def inner_imports(module: str) -> set[str]:
    """The files of kllama that a file of kllama imports."""
    return {name for name in imports(MODULES[module]) if name in MODULES and name != module}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of a graph, as the nodes along it; empty if there is none."""
    done: set[str] = set()

    def visit(node, trail):
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in done:
            for target in sorted(graph[node]):
                if cycle := visit(target, [*trail, node]):
                    return cycle
            done.add(node)
        return []

    return next((cycle for node in graph if (cycle := visit(node, []))), [])


def test_the_walk_sees_imports_of_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "kllama" / "core" / "probe.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import jax.numpy as jnp\ndef f():\n    from torch import nn\n    from ..layers import x\n    from . import y\n"
    )
    assert list(imports(path)) == ["jax.numpy", "torch", "kllama.layers", "kllama.core"]


def test_find_cycle():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("module", MODULES)
def test_frameworks_are_imported_in_backend_only(module):
    found = {name for name in imports(MODULES[module]) if name.split(".")[0] in FRAMEWORKS}
    assert not found or room(module) == "backend"


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in FLOORS])
def test_imports_never_go_upward(module):
    floor = FLOORS[room(module)]
    targets = inner_imports(module) - OPEN_TO_ALL
    assert not {name for name in targets if FLOORS.get(room(name), 0) > floor}


def test_no_two_files_import_each_other():
    assert find_cycle({name: inner_imports(name) for name in MODULES if name != "kllama"} | {"kllama": set()}) == []


def test_no_two_rooms_import_each_other():
    graph = {name: set() for name in FLOORS}
    for module in MODULES:
        if room(module) in FLOORS:
            targets = {room(name) for name in inner_imports(module) - OPEN_TO_ALL}
            graph[room(module)] |= targets & FLOORS.keys() - {room(module)}
    assert find_cycle(graph) == []


def test_every_folder_is_a_room():
    folders = {path.parent.relative_to(ROOT / "kllama").parts[0] for path in FILES if path.parent != ROOT / "kllama"}
    assert folders <= FLOORS.keys()


def test_no_file_is_named_after_nothing():
    assert not {"util", "utils", "common", "helper", "helpers", "misc"} & {path.stem for path in FILES}
