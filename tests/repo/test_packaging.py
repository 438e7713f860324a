"""The folders do not shadow Hugging Face's `kernels`, kernels need torch alone, no compiler is no failure."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_repo import parsed

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "engine", "recipes", "bench", "tests")


def source_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def run(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    command = [sys.executable, *arguments, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_package_file_in_a_top_level_folder() -> None:
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []


def test_nothing_imports_a_bare_folder() -> None:
    bare = re.compile(rf"^\s*(import|from) ({'|'.join(FOLDERS)})\b", re.MULTILINE)
    assert [str(path) for path in source_files() if bare.search(path.read_text())] == []


def test_files_and_functions_stay_small() -> None:
    """400 lines a file; 60 lines a function, its signature (a drop-in has another's) and docstring not counted."""
    too_long = []
    for path in source_files():
        text = path.read_text()
        if len(text.splitlines()) > 400:
            too_long.append(str(path))
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 2
                if lines > 60:
                    too_long.append(f"{path}:{node.lineno} {node.name}")
    assert too_long == []


@pytest.mark.slow
def test_kernels_need_torch_alone() -> None:
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("transformers", "deepspeed", "tokenizers", "triton", "syncr1.engine")):
            raise ImportError(f"kernels imported {name}")

sys.meta_path.insert(0, Refuse())
import syncr1.kernels.api, syncr1.kernels.native, torch
from syncr1.kernels.api import group_advantages
print(group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 2])).tolist())
"""
    assert "0.70" in run(code)


@pytest.mark.slow
def test_transformers_is_not_shadowed_from_the_repository_root() -> None:
    code = "import transformers; from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(code, PYTHONPATH=str(ROOT)).strip() in {"True", "False"}


def test_every_module_and_data_file_is_packaged() -> None:
    code = "import setup; print(*setup.find_sub_packages('kernels'), *setup.find_sub_packages('engine'))"
    packages = set(run(code).split())
    folders = {p.parent for p in source_files() if p.relative_to(ROOT).parts[0] in ("kernels", "engine")}
    assert {"syncr1." + ".".join(folder.relative_to(ROOT).parts) for folder in folders} <= packages


@pytest.mark.slow
def test_a_source_distribution_holds_everything_once(tmp_path: Path) -> None:
    """The Python of both packages under their folders, not under the links too, and the C++ sources."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout.split()
    names = {name.split("/", 1)[1] for name in listed if not name.endswith("/")}
    wanted = [path for folder in ("kernels", "engine") for path in (ROOT / folder).rglob("*")]
    sources = {str(path.relative_to(ROOT)) for path in wanted if path.suffix in (".py", ".cpp", ".h", ".html")}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml"} <= names, sources - names
    assert not [name for name in names if name.startswith(("syncr1/engine", "syncr1/kernels"))]


def test_install_without_a_compiler_says_so_and_succeeds(tmp_path: Path) -> None:
    code = f"""
import sysconfig
from pathlib import Path
sysconfig.get_path = lambda name: {str(tmp_path)!r}
import setup
print(setup.NO_NATIVE.format(setup.build_native(Path({str(tmp_path / "build")!r}), Path({str(tmp_path)!r}))))
"""
    printed = run(code, PATH=str(tmp_path)).strip()
    assert printed.count("\n") == 0
    assert "C++ library not built (cmake was not found); the reference backend (plain PyTorch) will serve" in printed
    assert not list(tmp_path.glob("*.so"))


def test_a_compiler_that_fails_says_so(tmp_path: Path) -> None:
    code = f"""
import setup
from pathlib import Path
print(setup.build_native(Path({str(tmp_path / "build")!r}), Path({str(tmp_path)!r})))
"""
    setup_has_cmake = run("import setup; print(setup.find_tool('cmake') is not None)").strip()
    if setup_has_cmake != "True":
        pytest.skip("no cmake here")
    assert "configuring failed" in run(code, CXX=str(tmp_path / "absent"))


@pytest.mark.slow
def test_a_missing_library_leaves_the_reference(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import torch
from syncr1.kernels.native import library
library.LIBRARY = Path({str(tmp_path / "absent.so")!r})
from syncr1.kernels.api import BackendError, group_advantages
print(group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 2])).tolist())
try:
    group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), backend="native")
except BackendError as error:
    print(error)
"""
    printed = run(code, cwd=tmp_path)
    assert "0.70" in printed and "was not built" in printed
