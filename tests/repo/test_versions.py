"""The pins fit each other, and what the messages tell a user to install can be installed.

`constraints.txt` has, in comments, the Triton that the CUDA build of each torch brings: a machine with a GPU gets that
one, so the tests pin it too, although a CPU build of torch would take any. `constraints/` has the sets of versions that
are tested beside: `make test-versions`.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE))
BROUGHT = dict(re.findall(r"^# torch (\d+\.\d+) triton (\d+\.\d+\.\d+)$", CONSTRAINTS, re.MULTILINE))
"""torch, major and minor -> triton."""
SETS = {path.stem: path.read_text() for path in sorted((ROOT / "constraints").glob("*.txt"))}
PINS_OF = {name: dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)) for name, text in SETS.items()}
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


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def python_of(name: str) -> str:
    (python,) = re.findall(r"^# python (\S+)$", SETS[name], re.MULTILINE)
    return str(python)


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_whole(name: str) -> None:
    """Its Triton is its torch's; it names nothing that the usual pins do not, for a Python that is allowed; it has a
    target; what contributors and owners of a GPU read says what is in it."""
    pins = PINS_OF[name]
    assert pins["triton"] == BROUGHT[minor(pins["torch"])] and pins.keys() <= PINS.keys()
    assert {"torch", "torchvision", "triton", "transformers"} <= pins.keys()
    least, most = re.findall(r"3\.\d+", PROJECT["requires-python"])
    assert numbers(least) <= numbers(python_of(name)) < numbers(most)
    target = f"test-{name.replace('_', '-')}"
    assert re.search(rf"^\.PHONY:.*(\\\n.*)*\b{target}\b", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"`make {target}`" in (ROOT / "CONTRIBUTING.md").read_text()
    (row,) = re.findall(rf"^\| `make {target}` \|.*$", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert row.split(" | ")[1:5] == [pins["torch"], pins["transformers"], pins["triton"], python_of(name)]


def test_the_oldest_set_is_every_floor() -> None:
    """Of what runs and tests need; so a floor that nobody has tried cannot be written down."""
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    floors = dict(pair for need in asked for pair in re.findall(r"^([\w.-]+)>=([\d.]+)", need))
    pins, oldest = PINS_OF["oldest"], SETS["oldest"].partition("# --")[0]
    assert {name: numbers(pins[name])[: len(numbers(floor))] for name, floor in floors.items()} == {
        name: numbers(floor) for name, floor in floors.items()
    }
    assert set(re.findall(r"^([\w.-]+)==", oldest, re.MULTILINE)) == floors.keys()
    assert f"# python {PROJECT['requires-python'].partition(',')[0].removeprefix('>=')}\n" in oldest
    assert [name for name in pins if numbers(pins[name]) > numbers(PINS[name])] == []


def test_the_newest_set_is_no_older_than_the_usual_one() -> None:
    pins = PINS_OF["newest"]
    assert minor(pins["torch"]) == list(BROUGHT)[-1]
    assert [name for name in pins if numbers(pins[name]) < numbers(PINS[name])] == []


def test_an_environment_of_a_set_has_its_versions() -> None:
    """Where these tests run in one: else the suite would try the usual versions over again, unseen."""
    place = Path(sys.prefix)
    if place.parent != ROOT / "build" / "versions":
        pytest.skip("not in an environment of `make test-versions`")
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in PINS_OF[place.name]}
    assert found == PINS_OF[place.name]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" == python_of(place.name)


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
