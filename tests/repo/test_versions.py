"""The pins fit each other, and what the messages tell a user to install can be installed.

`constraints.txt` has, in comments, the Triton that the CUDA build of each torch brings: a machine with a GPU gets that
one, so the tests pin it too, although a CPU build of torch would take any.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE))
BROUGHT = dict(re.findall(r"^# torch (\d+\.\d+) triton (\d+\.\d+\.\d+)$", CONSTRAINTS, re.MULTILINE))
"""torch, major and minor -> triton."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("README.md", "docs", "kernels", "engine", "recipes", "examples", "Makefile", "pyproject.toml")


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_torch_and_triton_are_pinned_as_torch_pairs_them() -> None:
    assert PINS["triton"] == BROUGHT[minor(PINS["torch"])]
    (floor,) = re.findall(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"]))
    assert minor(floor) == next(iter(BROUGHT)), "the table begins with the oldest torch that is allowed"
    minors = [int(version.split(".")[1]) for version in BROUGHT]
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_the_installed_torch_agrees_with_the_table() -> None:
    """A CUDA build names its Triton in its metadata; a CPU build names none."""
    wanted = [text for text in importlib.metadata.requires("torch") or [] if re.match(r"triton\W", text)]
    version = minor(importlib.metadata.version("torch"))
    if not wanted or version not in BROUGHT:
        pytest.skip(f"torch {version} names no Triton, or is not in the table: {wanted}")
    (number,) = re.findall(r"^triton\s*(?:==|~=)\s*([\d.]+)", wanted[0])
    assert minor(number) == minor(BROUGHT[version])


def test_a_gpu_gets_its_own_build() -> None:
    """The pins of torch, torchvision and triton are left out there, and nothing else is."""
    (pattern,) = re.findall(r"grep -vE '([^']+)' constraints.txt", (ROOT / "examples" / "Dockerfile").read_text())
    left = subprocess.run(["grep", "-vE", pattern], input=CONSTRAINTS, capture_output=True, text=True, check=True)
    kept = dict(re.findall(r"^([\w.-]+)==(\S+)$", left.stdout, re.MULTILINE))
    assert PINS.keys() - kept.keys() == {"torch", "torchvision", "triton"} and kept.items() <= PINS.items()


def texts() -> list[tuple[Path, str]]:
    found = [
        path for name in SOURCES for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    ]
    kinds = {".py", ".md", ".toml", ".yaml", ""}
    return [(path, path.read_text()) for path in found if path.is_file() and path.suffix in kinds]


def test_flash_attn_is_never_asked_of_an_isolated_build() -> None:
    """Its build imports torch, which pip's isolated environment lacks: no dependency, no extra, and no bare advice."""
    asked = [*PROJECT["dependencies"], *(need for extra in PROJECT["optional-dependencies"].values() for need in extra)]
    assert not [need for need in asked if re.match(r"flash[-_]attn", need)]
    bare = re.compile(r"pip install[^\n`'\")]*flash[-_]attn(?! --no-build-isolation)")
    assert [str(path) for path, text in texts() if bare.search(text)] == []


def test_extras_that_messages_name_exist() -> None:
    named = {extra for _, text in texts() for extra in re.findall(r"syncr1\[(\w+)\]|\"\.\[(\w+)\]\"", text)}
    wanted = {name for pair in named for name in pair if name}
    assert "dev" in wanted and wanted <= PROJECT["optional-dependencies"].keys()
