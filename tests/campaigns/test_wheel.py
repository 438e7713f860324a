"""The wheel, built and installed beside nothing else, and `pip install .` into an empty environment: `make package`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

SHOWN = """
import torch
import syncr1.engine.methods.sync_r1_config
import syncr1.kernels.api as ops
from syncr1.kernels.native import unavailable_reason
print(ops.__file__, unavailable_reason())
print(ops.group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 2])).tolist())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_every_file_is_in_it_once(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    kinds = (".py", ".html", ".safetensors", ".json")
    sources = {
        f"syncr1/{path.relative_to(ROOT)}"
        for folder in ("kernels", "engine")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    assert len(names) == len(set(names))
    assert sources | {"syncr1/kernels/libsyncr1_native.so"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"syncr1"}


def test_it_works_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, values = done.stdout.splitlines()
    assert where.startswith(f"{target}/") and where.endswith(" None"), where
    assert "0.70" in values


EVERYTHING = """
import importlib, pkgutil, sys
import syncr1.engine, syncr1.kernels
failed, count = {}, 0
for package in (syncr1.engine, syncr1.kernels):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        if found.name.endswith("libsyncr1_native"):
            continue
        count += 1
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            failed[found.name] = error.name
assert "/site-packages/" in importlib.import_module("syncr1.engine.errors").__file__
print(count, failed)
"""
OPTIONAL = {"triton", "trl", "liger_kernel", "tensorboard", "wandb", "trackio"}
"""Extras of pyproject.toml: what needs one of them says so when it is asked for."""


def test_an_install_without_extras_needs_no_other_package(tmp_path: Path) -> None:
    """`pip install .` into an empty environment: every module is imported, and a recipe plans its run. Minutes."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(ROOT)]
    subprocess.run(command, check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    listed = said("-m", "pip", "list", "--format", "freeze")
    assert not [
        line for line in listed.splitlines() if line.split("==")[0] in ("pytest", "trl", "torchmetrics", "ruff")
    ]
    count, _, failed = said("-c", EVERYTHING).strip().splitlines()[-1].partition(" ")
    assert int(count) > 150 and set(eval(failed).values()) <= OPTIONAL, failed
    for recipe in ("sync_r1.py", "corl.py", "evaluate.py", "merge.py"):
        assert said(str(ROOT / "recipes" / recipe), "--help").startswith("usage: ")
    assert "prompts" in said(str(ROOT / "recipes" / "sync_r1.py"), "--dry_run")


def test_a_torchvision_that_does_not_fit_is_mended(tmp_path: Path) -> None:
    """In every interpreter of that environment, with nothing imported first."""
    spec = importlib.util.spec_from_file_location("install_recipe", ROOT / "recipes" / "install.py")
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef f(*_): ...\n"
    )
    (folder / "_C.so").write_text("for another torch")
    recipe.repair_torchvision(Path(stand_in_python(tmp_path)), tmp_path)
    assert (tmp_path / "syncr1_torchvision.pth").read_text() == "import syncr1_torchvision\n"
    start = f"import site, sys; site.addsitedir({str(tmp_path)!r}); sys.path.insert(0, {str(tmp_path)!r})\n"
    script = start + "import torchvision, torch\nprint(torchvision.__file__, torch.ops.torchvision.nms)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and str(folder) in done.stdout, done.stderr


def stand_in_python(folder: Path) -> str:
    """This interpreter, to which `folder` is where packages are."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)
