"""The wheel, built and installed beside nothing else: `make package`."""

from __future__ import annotations

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
