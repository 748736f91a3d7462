"""The house: who may see whom. Each floor sees itself and those below it; on a floor no two modules see each other."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [  # top first
    ["__main__", "cli"],
    ["profiling"],
    ["pipeline"],
    ["serving"],
    ["planning"],
    ["export.writing", "export.verify"],  # which make a picture
    ["runtime"],
    ["model"],
    ["export"],
    ["loading"],
    ["conditioning"],
    ["samplers"],
    ["models"],
    ["kernels"],
    [
        *["checks", "device", "errors", "files", "heap", "image", "metadata", "openmp", "reading", "request"],
        *["sizes", "spans", "system", "version"],
    ],
]
GOES_UP: set[tuple[str, str]] = set()
CIRCLES: list[set[str]] = []  # known, and to become none
PRIVATE: set[str] = set()


def modules() -> dict[str, ast.Module]:
    """All of them, by their names without fastldm's."""
    found = {}
    for top in ("fastldm", "kernels", "export"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = [*([] if top == "fastldm" else [top]), *path.relative_to(ROOT / top).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name or "fastldm"] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules that one imports, wherever in it, under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            base = (node.module or "").removeprefix("fastldm").removeprefix(".")
            if (node.module or "").split(".")[0] == "fastldm":
                for alias in node.names:
                    full = f"{base}.{alias.name}".removeprefix(".")
                    found.add(full if full in MODULES else base or "fastldm")
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2] or "fastldm"
                for alias in node.names
                if alias.name.split(".")[0] == "fastldm"
            }
    return found - {name}


def floor(name: str) -> int:
    """The number of a module's floor, from the top. The package itself is above all: it gives users what is below."""
    parts = name.split(".")
    rooms = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((k for room in rooms for k, floor in enumerate(FLOORS) if room in floor), -1)


def test_every_module_has_a_floor() -> None:
    assert {name for name in MODULES if floor(name) < 0} == {"fastldm"}


def test_no_import_goes_up() -> None:
    found = {(one, other) for one in MODULES for other in imports(one) if floor(other) < floor(one)}
    assert found == GOES_UP


def test_no_circles() -> None:
    assert circles({name: imports(name) for name in MODULES if name != "fastldm"}) == CIRCLES


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules of which each reaches all others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name] & edges.keys()):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            at = stack.index(name)
            group = set(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    sys.setrecursionlimit(10_000)
    for name in sorted(edges):
        if name not in index:
            visit(name)
    return sorted(found, key=len)


def test_nobody_uses_what_is_private_elsewhere() -> None:
    """Names of modules, and attributes that only another module's classes define. (A NamedTuple's own begin with an
    underscore and are public.)"""
    owners = defaultdict(set)
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                owners[node.name].add(name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
                owners[node.attr].add(name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                owners[node.target.id].add(name)
    found = set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node):
                if node.attr in owners and name not in owners[node.attr]:
                    found.add(f"{name}: {node.attr}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastldm"):
                found |= {f"{name}: {alias.name}" for alias in node.names if is_private(alias.name)}
    assert found == PRIVATE


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in {"_replace", "_asdict", "_fields", "_make"}


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}


def test_no_test_imports_a_test() -> None:
    """What two of them share is in support/."""
    pattern = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)  # also in code that a test runs in a process
    found = {path.name: pattern.findall(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    assert len(found) > 80
    assert not {name: imports for name, imports in found.items() if imports}


def test_the_drawing_is_of_these_floors() -> None:
    svg = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["svg"]
    assert (ROOT / "docs" / "architecture.svg").read_text("utf-8") == svg(), "run `python docs/architecture.py`"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_pages_name_files_that_there_are(page: str) -> None:
    names = re.findall(r"`([\w./]+(?:/|\.py|\.toml))`", (ROOT / page).read_text("utf-8"))
    assert names
    assert not [name for name in names if not (ROOT / name).exists() and name not in ("adapters/", "server/")]
