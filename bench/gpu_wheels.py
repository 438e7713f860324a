"""Packages that a bare GPU machine lacks, carried as wheels: collected where there is a network, installed where not.

Such a machine has torch, triton, transformers and the usual scientific packages.  What is missing is deepspeed and the
peers, and what those need: their own metadata says it, at the versions of constraints.txt where it names one.  Nothing
is collected that would bring another torch or triton, or that the machine has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
WANTED = ("deepspeed", "liger-kernel", "trl", "lpips", "nltk", "datasets", "cut-cross-entropy")
"""In the order in which they matter."""
PEERS = {"cut-cross-entropy": "==25.1.1"}
"""Versions of what only the benchmarks compare with."""
BUILT = {"deepspeed": {"DS_BUILD_OPS": "0"}}
"""Published as source only: built here, in pure Python."""
THERE = frozenset(
    (
        "accelerate",
        "aiohttp",
        "click",
        "einops",
        "filelock",
        "fsspec",
        "httpx",
        "huggingface-hub",
        "hypothesis",
        "jinja2",
        "joblib",
        "matplotlib",
        "msgpack",
        "ninja",
        "numpy",
        "packaging",
        "pandas",
        "peft",
        "pillow",
        "psutil",
        "py-cpuinfo",
        "pyarrow",
        "pytest",
        "pytest-xdist",
        "pyyaml",
        "regex",
        "requests",
        "rich",
        "safetensors",
        "scikit-image",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "setuptools",
        "tensorboard",
        "tokenizers",
        "torch",
        "torchaudio",
        "torchmetrics",
        "torchvision",
        "tqdm",
        "transformers",
        "triton",
        "typing-extensions",
    )
)
"""What the machine has; never collected."""
MOST_BYTES = 64 << 20
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_12_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)


def normal(name: str) -> str:
    """A distribution's name as it is compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def pins() -> dict[str, str]:
    """name -> `==version` of constraints.txt."""
    found = dict(PEERS)
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, equals, version = line.strip().partition("==")
        if equals and not name.startswith("#"):
            found[normal(name)] = f"=={version}"
    return found


def needs(wheel: Path) -> list[tuple[str, str]]:
    """(name, specifier) of what a wheel requires on Linux under Python 3.12, without extras."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
    there = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "extra": "",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    return [(normal(r.name), str(r.specifier)) for r in requirements if r.marker is None or r.marker.evaluate(there)]


def command_of(name: str, specifier: str, folder: Path) -> list[str]:
    """pip's, for one distribution without its needs."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if name in BUILT:
        return [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), f"{name}{specifier}"]
    tags = [part for platform in PLATFORMS for part in ("--platform", platform)]
    return [
        *pip,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        *tags,
        "-d",
        str(folder),
        f"{name}{specifier}",
    ]


def fetched(name: str, specifier: str, folder: Path) -> Path | None:
    """The wheel of a distribution, downloaded or built unless it is there; None: pip could not, and said why."""
    before = wheel_of(name, folder)
    if before is not None:
        return before
    done = subprocess.run(command_of(name, specifier, folder), env=os.environ | BUILT.get(name, {}), check=False)
    return wheel_of(name, folder) if done.returncode == 0 else None


def wheel_of(name: str, folder: Path) -> Path | None:
    """By the distribution's name."""
    return next((path for path in sorted(folder.glob("*.whl")) if normal(path.name.split("-")[0]) == name), None)


def collect(folder: Path) -> int:
    """Fills the folder; prints what it holds; 1 where something is missing or it is too large to carry."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned, missing = pins(), []  # type: dict[str, str], list[str]
    queue = [(name, pinned.get(name, "")) for name in WANTED]
    seen: set[str] = set()
    while queue:
        name, specifier = queue.pop(0)
        if name in seen or name in THERE:
            continue
        seen.add(name)
        wheel = fetched(name, specifier, folder)
        if wheel is None:
            missing.append(f"{name}{specifier}")
            continue
        queue += [(need, pinned.get(need, wanted)) for need, wanted in needs(wheel)]
    wheels = sorted(folder.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{total / 1e6:7.2f} MB  in {len(wheels)} wheels")
    for name in missing:
        print(
            f"bench/gpu.py: {name} could not be had as a wheel for Python {PYTHON}: see pip's words above",
            file=sys.stderr,
        )
    if total > MOST_BYTES:
        print(f"bench/gpu.py: more than {MOST_BYTES >> 20} MiB: too large to carry; leave some out", file=sys.stderr)
    return int(bool(missing) or total > MOST_BYTES)


def install(folder: Path, target: Path) -> Path:
    """Puts the wheels into a folder for PYTHONPATH; one that cannot be installed leaves the others.

    Args:
        folder: of wheels.
        target: is made.

    Returns:
        `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
    wheels = [str(wheel) for wheel in sorted(folder.glob("*.whl"))]
    done = subprocess.run([*pip, *wheels], check=False) if wheels else None
    if done is not None and done.returncode:
        for wheel in wheels:
            if subprocess.run([*pip, "--upgrade", wheel], check=False).returncode:
                print(f"bench/gpu.py: {wheel} could not be installed: see pip's words above", file=sys.stderr)
    return target
