"""The house: who may see whom. Each floor sees itself and those below it; on a floor no two modules see each other.

A name of another module is there for those who import it, so that no import up means that no function calls one of a
floor above by its name. What a function was given, such as a callback, it may call.
"""

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
    ["batches", "profiling", "server"],
    ["pipeline"],
    ["cascading"],
    ["adapting", "controlling", "image_prompting", "priors", "textual_inversion"],
    ["serving"],
    ["planning"],
    ["export.web", "export.writing", "export.verify"],  # which make a picture, or compare one
    ["runtime"],
    ["model"],
    ["export"],
    ["adapters"],
    ["loading"],
    ["conditioning"],
    ["samplers"],
    ["models"],
    ["kernels"],
    [
        *[
            "checks",
            "device",
            "errors",
            "files",
            "gradients",
            "heap",
            "image",
            "mask_crop",
            "metadata",
            "openmp",
            "reading",
            "request",
        ],
        *["sizes", "spans", "system", "version"],
    ],
]
GOES_UP: set[tuple[str, str]] = set()  # known offenders: none are left
CIRCLES: list[set[str]] = []
PRIVATE: set[str] = set()


def modules() -> dict[str, ast.Module]:
    """All of them, by their names without fastldm's."""
    trees = {}
    for top in ("fastldm", "kernels", "export"):
        for path in sorted((ROOT / top).rglob("*.py")):
            names = [*([] if top == "fastldm" else [top]), *path.relative_to(ROOT / top).with_suffix("").parts]
            name = ".".join(names[:-1] if names[-1] == "__init__" else names)
            trees[name or "fastldm"] = ast.parse(path.read_text())
    return trees


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules that a module imports, wherever in it, under TYPE_CHECKING and by import_module too."""
    imported = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            if (node.module or "").split(".")[0] == "fastldm":
                base = (node.module or "").removeprefix("fastldm").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".removeprefix(".")
                    imported.add(full if full in MODULES else base or "fastldm")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "fastldm"]
            imported |= {full.partition(".")[2] or "fastldm" for full in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            text = "".join(str(leaf.value) for leaf in ast.walk(node.args[0]) if isinstance(leaf, ast.Constant))
            imported |= {text.removeprefix("fastldm.").rstrip(".")} & MODULES.keys()  # or the package that it names
    return imported - {name}


def floor(name: str) -> int:
    """The number of a module's floor, from the top. The package itself is above all: it gives users what is below."""
    names = name.split(".")
    packages = [".".join(names[:n]) for n in range(len(names), 0, -1)]
    return next((k for package in packages for k, floor in enumerate(FLOORS) if package in floor), -1)


def test_every_module_has_a_floor() -> None:
    assert {name for name in MODULES if floor(name) < 0} == {"fastldm"}


def test_no_import_goes_up() -> None:
    upward = {(name, seen) for name in MODULES for seen in imports(name) if floor(seen) < floor(name)}
    assert upward == GOES_UP


def test_no_circles() -> None:
    assert circles({name: imports(name) for name in MODULES if name != "fastldm"}) == CIRCLES


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules of which each reaches all others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for neighbour in sorted(edges[name] & edges.keys()):
            if neighbour not in index:
                visit(neighbour)
            if neighbour in stack:
                low[name] = min(low[name], low[neighbour])
        if low[name] == index[name]:
            at = stack.index(name)
            group = set(stack[at:])
            del stack[at:]
            if len(group) > 1:
                groups.append(group)

    sys.setrecursionlimit(10_000)
    for name in sorted(edges):
        if name not in index:
            visit(name)
    return sorted(groups, key=len)


def test_private_names_are_used_in_their_module_only() -> None:
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
    uses = set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node):
                if node.attr in owners and name not in owners[node.attr]:
                    uses.add(f"{name}: {node.attr}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastldm"):
                uses |= {f"{name}: {alias.name}" for alias in node.names if is_private(alias.name)}
    assert uses == PRIVATE


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in {"_replace", "_asdict", "_fields", "_make"}


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}


def test_long_files_have_a_reason() -> None:
    """In their docstring, which then says "500 lines"."""
    for top in ("fastldm", "kernels", "export", "tests", "benchmarks", "docs"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text("utf-8")
            if len(text.splitlines()) > 500:
                assert "500 lines" in (ast.get_docstring(ast.parse(text)) or ""), path


def test_names_of_tests_are_under_ten_words() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    names = [name for text in texts for name in re.findall(r"def test_(\w+)\(", text)]
    assert len(names) > 900
    assert not [name for name in names if len(name.split("_")) >= 10]


def test_no_test_imports_a_test() -> None:
    """What two of them share is in support/."""
    pattern = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)  # also in code that a test runs in a process
    imported = {path.name: pattern.findall(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    assert len(imported) > 80
    assert not {name: tests for name, tests in imported.items() if tests}


def test_drawing_shows_these_floors() -> None:
    svg = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["svg"]
    assert (ROOT / "docs" / "architecture.svg").read_text("utf-8") == svg(), "run `python docs/architecture.py`"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_pages_name_existing_files(page: str) -> None:
    names = re.findall(r"`([\w./]+(?:/|\.py|\.toml))`", (ROOT / page).read_text("utf-8"))
    assert names
    assert not [name for name in names if not (ROOT / name).exists() and name != "server/"]
