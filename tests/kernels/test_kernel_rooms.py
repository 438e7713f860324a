"""The order of `kernels/`: what each file may import, wherever in it the import stands, and one name for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))
FLOORS: tuple[tuple[str, ...], ...] = (
    ("layout", "outputs", "register", "streams", "support"),
    ("checks", "dispatch"),
    ("ranges",),
    ("options",),
    ("terms",),
    ("linear", "reference"),
    ("attention_ops", "native", "triton_ops"),
    ("attention",),
    ("ops",),
    ("api",),
    ("liger", "trl"),
)
"""Lowest first: a file imports from its own room and from lower floors. `reference` is the folder and `plan.py`: plain
PyTorch that every backend uses, between the folder's statistics and its losses."""
TWINS = ("ops", "reference", "native", "triton_ops")
"""Where one basename is one op: once as torch knows it, and once per backend."""


def module(path: Path) -> str:
    """`ops.loss` of ops/loss.py; a package is its `__init__`."""
    return ".".join(path.relative_to(KERNELS).with_suffix("").parts)


MODULES = {module(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """The files of kernels/ that this one imports, also inside functions and for type checkers alone."""
    package, found = module(path).split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package[: len(package) - node.level + 1]
        base = [*above, *(node.module.split(".") if node.module else [])]
        for name in (".".join([*base, alias.name]) for alias in node.names):
            found.add(name if name in MODULES else ".".join(base))
    return {name if name in MODULES else f"{name}.__init__" for name in found}


IMPORTS = {module(path): imported(path) for path in FILES}


def room(name: str) -> str:
    return "reference" if name == "plan" else name.split(".")[0]


def test_every_import_is_a_file() -> None:
    """Else the tests below would not see what it leads to."""
    assert set().union(*IMPORTS.values()) <= MODULES
    assert "ops.loss" in IMPORTS["api"] and "reference.segments" in IMPORTS["plan"]


def test_no_circle_of_files() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as circle:
        pytest.fail(" → ".join(circle.args[1]))


def test_nothing_imports_upward() -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    assert {room(name) for name in MODULES} == set(floor), "every room has a floor"
    upward = [
        f"{name} → {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(other) != room(name) and floor[room(other)] >= floor[room(name)]
    ]
    assert upward == []


def test_one_basename_means_one_thing() -> None:
    places = defaultdict(set)
    for path in FILES:
        above = path.relative_to(KERNELS).parts[:-1]
        places[path.stem].add("twin" if above and above[0] in TWINS else ".".join(above))
    several = {stem for stem, folders in places.items() if len(folders) > 1 and stem != "__init__"}
    assert several == set()
