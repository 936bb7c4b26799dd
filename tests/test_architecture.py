"""The one import rule: a folder imports only folders below it, and no two modules import each other."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "meam_policy": ROOT / "meam_policy",
    "meam_training": ROOT / "training" / "meam_training",
    "meam_export": ROOT / "export" / "meam_export",
}

STOREYS = {
    "meam_policy": (
        {"terminal_text"},
        {"errors"},
        {"extras", "given_files", "typed"},
        {"spec", "graph", "atomic_files", "console", "toml_file"},
        {"robot", "flight"},
        {"inference", "folder", "acting", "environments"},
        {"policy", "rollouts", "diagnosis", "loop", "cpp"},
        {"replay"},
        {"meam_policy"},
        {"cli"},
        {"commands", "__main__"},
    ),
    "meam_training": (
        {"setting_text"},
        {"flow", "config", "data"},
        {"networks", "collection"},
        {"algorithm"},
        {"learning"},
        {"runs"},
        {"trainer"},
        {"meam_training", "benchmark"},
        {"commands"},
    ),
    "meam_export": (
        {"graph", "triton"},
        {"variants"},
        {"card", "deploy"},
        {"export", "report"},
        {"meam_export", "demo", "benchmark"},
        {"commands"},
    ),
}
"""Rooms from the ground up: folders and files of a package; the package's name stands for its `__init__`.

A room may import those on lower storeys, and none beside it.
"""

BELOW = {"meam_policy": (), "meam_training": ("meam_policy",), "meam_export": ("meam_policy", "meam_training")}


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room(module: str) -> str:
    """The folder or file of a package in which a module is."""
    return module.split(".")[1] if "." in module else module


@cache
def imports() -> list[tuple[str, str]]:
    """Which module of ours imports which, those for type checking included."""
    return [
        (module, target)
        for module, tree in modules().items()
        for target in _targets(tree)
        if target.split(".")[0] in PACKAGES
    ]


def _targets(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_is_on_one_storey(package):
    rooms = {room(module) for module in modules() if module.split(".")[0] == package}
    placed = [name for storey in STOREYS[package] for name in storey]
    assert sorted(placed) == sorted(rooms)


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_rooms_below_them(package):
    height = {name: number for number, storey in enumerate(STOREYS[package]) for name in storey}
    upwards = [
        f"{module} imports {target}"
        for module, target in imports()
        if module.split(".")[0] == target.split(".")[0] == package
        and room(module) != room(target)
        and height[room(target)] >= height[room(module)]
    ]
    assert upwards == []


def test_packages_import_only_packages_below_them():
    outwards = [(module.split(".")[0], target.split(".")[0]) for module, target in imports()]
    assert {(one, other) for one, other in outwards if one != other and other not in BELOW[one]} == set()


def test_no_two_modules_import_each_other_not_even_by_way_of_others():
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, target in imports():
        # What a package's own modules take from its __init__ they would wait for in vain.
        graph[module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
