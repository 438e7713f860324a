"""Rules of the repository that no type checker knows: who may import what, nothing unsafe, nothing of one machine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("kernels", "engine", "recipes", "bench")


def tracked() -> list[Path]:
    """Text files that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    binary = {".png", ".safetensors", ".so", ".pdf", ".jpg", ".gif"}
    return [path for path in paths if path.is_file() and path.suffix not in binary]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders or SHIPPED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), parsed(path)


def imports(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every module that the file `name` imports; names that it takes from a package too."""
    package = ["syncr1", *Path(name).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.lineno, ".".join([*above, module])) for module in modules)


def test_imports_are_relative_within_a_package_and_absolute_across() -> None:
    """So that an editor follows them with and without an install; `compat` by name, because it must come first."""
    wrong = []
    for name, tree in trees("engine", "kernels"):
        own = f"syncr1.{name.split('/')[0]}"
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level >= len(Path(name).parts):
                wrong.append(f"{name}:{node.lineno} leaves {own}")
            if not node.level and node.module and f"{node.module}.".startswith(f"{own}."):
                wrong.append(f"{name}:{node.lineno} {node.module}")
    assert wrong == []


@cache
def calls(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


def test_no_path_of_one_machine() -> None:
    """A path of the machine that something was written on works nowhere else."""
    machine = re.compile("|".join(("/" + "work/", "/" + "root/", "/home/" + r"\w", "/Users/" + r"\w")))
    found = [
        f"{p.relative_to(ROOT)}: {m.group()}" for p in tracked() if (m := machine.search(p.read_text(errors="ignore")))
    ]
    assert found == []


def test_files_that_are_named_exist() -> None:
    """Paths from the top in comments, docstrings and pages; not what a build makes, nor a name with `<…>` in it."""
    path = re.compile(r"(?<![\w./-])(?:engine|kernels|recipes|bench|tests|docs)(?:/[\w.-]*\w)+(?![\w<*{%/-])")
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".cpp", ".h"}
    texts = [file for file in tracked() if file.suffix in kinds or file.name == "Makefile"]
    gone = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in texts
        for name in path.findall(file.read_text())
        if not any((ROOT / f"{name}{suffix}").exists() for suffix in ("", ".py")) and not name.endswith(".so")
    }
    assert gone == set()


def test_one_file_imports_deepspeed() -> None:
    users = {name for name, tree in trees() for _, module in imports(tree, name) if module.split(".")[0] == "deepspeed"}
    assert users == {"engine/learn/learner.py"}


def test_kernels_import_torch_and_themselves() -> None:
    """Anywhere in the file, also in a function: another codebase imports the ops without the engine's dependencies."""
    allowed = {"torch", "triton", "syncr1.kernels", "numpy"}
    standard = set(__import__("sys").stdlib_module_names)
    foreign = [
        f"{name}:{line} {module}"
        for name, tree in trees("kernels")
        for line, module in imports(tree, name)
        if module.split(".")[0] not in standard | allowed and not module.startswith("syncr1.kernels")
    ]
    assert [entry for entry in foreign if "liger" not in entry and "trl" not in entry] == []


ROOMS = (
    *("compat", "errors", "reasons", "pictures", "records", "whole_files", "stopwatch"),
    *("settings", "processes", "answers", "data", "policies", "rollout", "forward", "show", "checkpoints", "rewards"),
    *("learn", "evaluate", "world", "methods", "corl", "api"),
)
"""Folders and files directly under engine/, lowest first: each may use those before it, and none behind it."""


def room_of(module: str) -> str:
    """`policies` of `syncr1.engine.policies.base`."""
    return module.split(".")[2]


def engine_modules() -> dict[str, set[str]]:
    """Each module of the engine and those that it imports, in functions as well."""
    files = {f"syncr1.{name.removesuffix('.py').replace('/', '.')}": (name, tree) for name, tree in trees("engine")}
    modules = {module.removesuffix(".__init__"): entry for module, entry in files.items()}
    return {
        module: {used for _, used in imported_modules(tree, name) if used in modules} - {module}
        for module, (name, tree) in modules.items()
    }


def imported_modules(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """As `imports`, and `package.module` of `from package import module`, without what only type checkers read."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    typing_only = {statement for block in blocks for statement in block.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in typing_only:
            for line, module in imports(ast.Module([node], []), name):
                yield line, module
                yield from ((line, f"{module}.{alias.name}") for alias in node.names)


def test_every_room_has_its_rank() -> None:
    found = {path.stem for path in (ROOT / "engine").iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    assert found == set(ROOMS)
    assert len(ROOMS) <= 25


def test_nothing_imports_upward() -> None:
    """Data flows one way: prompts, rollout, reward, loss, step; the methods, which put it together, are at the top."""
    upward = [
        f"{module} uses {used}"
        for module, uses in engine_modules().items()
        for used in sorted(uses)
        if module.count(".") > 1 and used.count(".") > 1
        if ROOMS.index(room_of(used)) > ROOMS.index(room_of(module))
    ]
    assert upward == []


def test_no_circle_of_files() -> None:
    modules = engine_modules()
    while leaves := {module for module, uses in modules.items() if not uses & modules.keys()}:
        modules = {module: uses - leaves for module, uses in modules.items() if module not in leaves}
    assert modules == {}, "these, or some of them, import each other"


def test_a_basename_means_one_thing() -> None:
    """So that `plan` or `records` in a sentence needs no folder."""
    names = [path.stem for path in (ROOT / "engine").rglob("*.py") if path.stem != "__init__"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("*.py"))}
    assert rooms - set(ROOMS) == {"support", "kernels", "repo", "bench", "campaigns"}
    assert {room for room in ROOMS if (ROOT / "engine" / room).is_dir()} <= rooms
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]
    names = [path.stem for path in (ROOT / "tests").rglob("*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_compat_is_imported_before_transformers() -> None:
    """Else torchvision's wheel beside a CPU build of torch takes Janus down; see engine/compat.py."""
    wrong = []
    for name, tree in trees("engine", "recipes", "tests"):
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = [m for node in top for _, m in imports(ast.Module([node], []), name)]
        heavy = [
            i for i, module in enumerate(modules) if module.split(".")[0] in ("transformers", "lpips", "torchvision")
        ]
        if heavy and name != "engine/compat.py" and "syncr1.engine.compat" not in modules[: heavy[0]]:
            wrong.append(name)
    assert wrong == []


def test_nothing_unpickles_evaluates_or_runs_a_shell() -> None:
    """Checkpoints, settings and data come from strangers: safetensors, plain YAML and JSON only."""
    found = []
    for name, tree in trees():
        found += [
            f"{name}:{line} {m}"
            for line, m in imports(tree, name)
            if m.split(".")[0] in ("pickle", "dill", "marshal", "shelve")
        ]
        for function, call in calls(tree):
            given = keywords(call)
            unsafe = {
                "torch.load": given.get("weights_only") != "True",
                "yaml.load": given.get("Loader") != "_StrictLoader",
                "yaml.unsafe_load": True,
                "yaml.full_load": True,
                "eval": True,
                "exec": True,
                "os.system": True,
            }
            if unsafe.get(function) or given.get("shell") == "True" or given.get("trust_remote_code") == "True":
                found.append(f"{name}:{call.lineno} {function}")
    assert found == []


def test_the_strict_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from syncr1.engine.settings.yaml_files import _StrictLoader

    assert issubclass(_StrictLoader, yaml.SafeLoader)


def test_checkpoints_are_read_as_safetensors() -> None:
    loads = [
        keywords(call)
        for name, tree in trees("engine")
        for function, call in calls(tree)
        if function.endswith("model_class.from_pretrained")
    ]
    assert len(loads) == 2 and all(given.get("use_safetensors") == "True" for given in loads)


def test_every_source_file_says_what_it_is_for() -> None:
    silent = [name for name, tree in trees("kernels", "engine", "recipes", "tests") if not ast.get_docstring(tree)]
    assert silent == []


def test_continuous_integration_runs_the_whole_suite() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
    makefile = (ROOT / "Makefile").read_text()
    suite = re.search(r"^test:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert suite and "pytest tests" in suite.group(1) and "not slow" not in suite.group(1)


@pytest.mark.skipif(shutil.which("make") is None or sys.platform != "linux", reason="needs make, and Triton's wheels")
def test_make_test_fetches_the_tritons_that_its_tests_compile_with(tmp_path: Path) -> None:
    """On a fresh machine; else test_triton_aot.py would skip what it is for."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--no-print-directory", "-n", "test", "PYTHON=python3"]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    fetched = re.findall(r"recipes/install.py .*--triton (\S+) build/triton/\1$", planned, re.MULTILINE)
    compiled = re.search(
        r"parametrize\(\"version\", \[(.*)\]\)", (ROOT / "tests/kernels/test_triton_aot.py").read_text()
    )
    assert compiled and fetched == re.findall(r"[\d.]+", compiled.group(1)), planned
