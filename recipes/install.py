"""Makes .venv and installs into it, saying what comes, how far it is, and where it is kept; `make` calls it.

    python3 recipes/install.py              what training needs
    python3 recipes/install.py --dev        and what the tests, the linters and the documentation need
    python3 recipes/install.py --versions oldest
                                            into build/versions/oldest what the tests need, of the versions that
                                            constraints/oldest.txt names

By `uv` where that is on the PATH, else by pip: the same pins (constraints.txt), the same indexes. Nothing but Python's
standard library is needed. Everything that the installer says is in build/install.log.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "build" / "install.log"
SETS = ROOT / "constraints"
"""Versions that are tested beside those of constraints.txt: a file a set."""
STAMPS = {False: ".runtime-stamp", True: ".setup-stamp"}
"""In the environment, by whether the tests' packages are there: `make` compares their times with its inputs'."""
WHAT = {
    False: "PyTorch, transformers, DeepSpeed and what they need: 67 packages",
    True: "PyTorch, transformers, DeepSpeed, and what tests, linters and documentation need: 125 packages",
}
SIZES = {False: (375, 1.7, 2900, 6.0), True: (680, 2.9, 3000, 7.0)}
"""MB to download and GB on disk, with PyTorch's build for CPUs and with the one for CUDA, on x86-64 Linux."""
GPU_PINS = re.compile(r"(torch|torchvision|triton)==")
"""With a GPU these are left out, so that the build for that machine is taken."""
BEAT = 3.0
"""Seconds between two lines where stdout is no terminal."""
NO_NATIVE = (
    "syncr1: the C++ library was not built (cmake or a C++17 compiler is missing, see build/native/*.log); the "
    "reference backend (plain PyTorch) will serve every op."
)
HOOK = "syncr1_torchvision"
CANNOT = 2
"""Exit code where the machine, or what was handed in, is in the way; docs/errors.md has all."""


class Failed(Exception):
    """The installation cannot go on; the message says why and what to do."""


# What is said while something runs ------------------------------------------------------------------------------------


@contextmanager
def told(state: Callable[[], str]) -> Iterator[None]:
    """While the block runs `state()` is shown: a line that changes on a terminal, elsewhere one every few seconds."""
    over, began, moving = threading.Event(), time.monotonic(), sys.stdout.isatty()

    def speak() -> None:
        while not over.wait(0.5 if moving else BEAT):
            line = f"  {duration(time.monotonic() - began)}: {state()}"
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}" if moving else line, end="", flush=True)
            if not moving:
                print(flush=True)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        print("\r\033[K" if moving else "", end="", flush=True)


def duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def megabytes(folder: Path) -> float:
    """Of all files below `folder`, which may change meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total / 1e6


class Progress:
    """What pip is doing, read from its lines; how much of it, from the folders that it writes to."""

    def __init__(self, downloads: Path, packages: Path) -> None:
        self._downloads, self._packages = downloads, packages
        self._doing, self._found, self._size, self._there = "starting", 0, 0.0, 0
        self._names: list[str] = []
        """What is unpacked, in that order."""

    def read(self, line: str) -> None:
        line = line.strip()
        if line.startswith("Collecting "):
            self._found, self._size = self._found + 1, 0.0
            self._doing = f"{self._found} packages found, now {line.split()[1]}"
        elif found := re.match(r"Downloading (\S+?)(?:-py\S*|-cp\S*|\.tar\S*)? \(([\d.]+) ([kMG])B\)", line):
            name, size, unit = found.groups()
            self._doing, self._size = f"downloading {name}", float(size) * {"k": 1e-3, "M": 1.0, "G": 1e3}[unit]
        elif line.startswith(("Installing build dependencies", "Getting requirements", "Preparing")):
            self._doing, self._size = line.partition(":")[0].lower(), 0.0
        elif line.startswith("Building"):
            self._doing, self._size = "building syncr1 and its C++ library", 0.0
        elif line.startswith("Installing collected packages:"):
            self._names, self._there = line.partition(":")[2].replace(" ", "").split(","), self._records()

    def state(self) -> str:
        if self._names:
            done = min(max(0, self._records() - self._there), len(self._names) - 1)
            return f"unpacking {self._names[done]}, {done + 1} of {len(self._names)} packages"
        if self._size >= 5:
            return f"{self._doing}: {min(self._size, megabytes(self._downloads)):.0f} of {self._size:.0f} MB"
        return self._doing

    def _records(self) -> int:
        return len(list(self._packages.glob("*.dist-info")))


# The installers -------------------------------------------------------------------------------------------------------


def run(command: list[str], environment: Mapping[str, str], read: Callable[[str], None]) -> None:
    """Runs an installer; its lines go to the log and to `read`.

    Raises:
        Failed: it did not end with 0.
    """
    with LOG.open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        last: list[str] = []
        for line in process.stdout:
            log.write(line)
            read(line)
            last = [*last[-11:], line.rstrip()]
    if process.wait() != 0:
        said = "\n".join(f"  {line}" for line in last)
        raise Failed(
            f"{Path(command[0]).name} ended with exit code {process.returncode}. Its last lines (all: {LOG}):\n{said}\n"
            "What was downloaded is kept: the same command goes on. Is there a network, a proxy to be named "
            f"(HTTPS_PROXY), and room on the disk ({shutil.disk_usage(ROOT).free / 1e9:.1f} GB are free)?"
        )


def with_pip(python: Path, packages: Path, wanted: list[str]) -> None:
    """Installs what `wanted` says, in pip's words, into the folder `packages`."""
    with tempfile.TemporaryDirectory(prefix="syncr1-install-") as downloads:
        progress = Progress(Path(downloads), packages)
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        with told(progress.state):
            run([*command, *wanted], {**os.environ, "TMPDIR": downloads, "PYTHONUNBUFFERED": "1"}, progress.read)


def with_uv(uv: str, python: Path, packages: Path, wanted: list[str]) -> None:
    """The same by uv, whose words are pip's."""
    with told(lambda: f"uv is at work, {len(list(packages.glob('*.dist-info')))} packages are there"):
        command = [uv, "pip", "install", "--python", str(python), *wanted]
        run(command, {**os.environ, **sources_of_pip(python)}, lambda line: None)


def sources_of_pip(python: Path) -> dict[str, str]:
    """pip's indexes and folders of wheels in uv's variables: uv reads none of pip's settings, and from other indexes
    there would come another build of PyTorch. What is set for uv itself stands."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^[^.\n]*\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE))
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
    names |= {"constraint": "UV_CONSTRAINT", "cert": "SSL_CERT_FILE"}
    values = {
        names[name]: " ".join(value.replace("\\n", " ").split()) for name, value in found.items() if name in names
    }
    values["UV_FIND_LINKS"] = values.get("UV_FIND_LINKS", "").replace(" ", ",")
    return {name: value for name, value in values.items() if value and name not in os.environ} | {
        "UV_INDEX_STRATEGY": os.environ.get("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip chooses
    }


def install(python: Path, packages: Path, wanted: list[str]) -> None:
    """By uv where it is there, by pip where it is not, or where uv cannot."""
    uv = shutil.which("uv")
    if uv is not None:
        try:
            return with_uv(uv, python, packages, wanted)
        except Failed as error:
            print(f"{error}\nsyncr1: trying again with pip", flush=True)
    return with_pip(python, packages, wanted)


def cache_of(python: Path) -> str:
    """Where wheels are kept for the next time, by the installer itself."""
    uv = shutil.which("uv")
    command = [uv, "cache", "dir"] if uv else [str(python), "-m", "pip", "cache", "dir"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "nowhere: the installer's cache is switched off"


# Around them ----------------------------------------------------------------------------------------------------------


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def constraints_for(gpu: bool, versions: str | None = None) -> Path:
    """The pins for this machine, or those of a set of versions: its own, and of the rest the usual ones."""
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    if versions is not None:
        own = (SETS / f"{versions}.txt").read_text().splitlines(keepends=True)
        names = {line.partition("==")[0] for line in own}
        lines, gpu = [line for line in lines if line.partition("==")[0] not in names] + own, False
    kept = ROOT / "build" / f"constraints{'' if versions is None else f'.{versions}'}.txt"
    kept.write_text("".join(line for line in lines if not (gpu and GPU_PINS.match(line))))
    return kept


def check_set(versions: str) -> None:
    """Raises Failed where a set of versions is for another Python: its file names one."""
    (wanted,) = re.findall(r"^# python (\S+)$", (SETS / f"{versions}.txt").read_text(), re.MULTILINE)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if wanted != here:
        raise Failed(
            f"the set {versions} of versions: expected Python {wanted}, got {here} ({sys.executable}); name one: "
            f"make test-versions SET={versions} SET_PYTHON=/path/to/python{wanted}"
        )


def announce(venv: Path, dev: bool, versions: str | None = None) -> None:
    """What will come, before anything does."""
    small, on_disk, large, large_on_disk = SIZES[dev]
    place = next(path for path in venv.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    upgrade = dev and (venv / STAMPS[False]).exists()
    what = WHAT[dev] if versions is None else f"the versions of constraints/{versions}.txt, and what the tests need"
    print(f"syncr1: installing into {venv}: {what}", flush=True)
    if upgrade:
        print("  what is there already stays: some 300 MB are to be downloaded, 1.2 GB on disk", flush=True)
    else:
        print(
            f"  to download {small} MB, on disk {on_disk} GB, with PyTorch's build for CPUs; with the one for CUDA, "
            f"which PyPI has for Linux, {large / 1e3:.1f} GB and {large_on_disk:.0f} GB. {free:.0f} GB are free",
            flush=True,
        )
    wanted = 1.2 if upgrade else on_disk
    if free < wanted:
        raise Failed(
            f"expected at least {wanted} GB of free space at {place}, got {free:.1f} GB; make room, or name another "
            "place (--venv, with make: VENV=)"
        )


def packages_of(venv: Path) -> Path:
    found = list(venv.absolute().glob("lib/python*/site-packages"))
    if len(found) != 1:
        raise Failed(
            f"expected an environment of one Python, got {venv} with {len(found)}; remove it, it is made again"
        )
    return found[0]


def check_places(*folders: Path) -> None:
    """Raises Failed where something that will be written to cannot be."""
    for folder in folders:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise Failed(f"expected a folder, got {folder}, where {there} is none; name another place")
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".syncr1-", dir=there))
        except OSError as error:
            raise Failed(
                f"expected a folder that can be written, got {there} ({error.strerror}); change its permissions, or "
                "take a copy of the repository that is yours"
            ) from error


def triton_alone(venv: Path, version: str, target: Path) -> None:
    """One Triton in a folder of its own, which appears whole: tests compile for several."""
    print(f"syncr1: Triton {version} for the tests, 200 MB to download, into {target}", flush=True)
    draft = target.with_name(f"{target.name}.part").absolute()
    shutil.rmtree(draft, ignore_errors=True)
    install(venv.absolute() / "bin" / "python", draft, ["--no-deps", "--target", str(draft), f"triton=={version}"])
    draft.rename(target)


def repair_torchvision(python: Path, packages: Path) -> None:
    """A torchvision that was built for another build of torch raises as it is imported, and with it transformers' Janus
    and lpips; the hook declares what is missing as soon as somebody asks for torchvision (engine/compat.py)."""
    hook, starter = packages / f"{HOOK}.py", packages / f"{HOOK}.pth"
    hook.unlink(missing_ok=True)
    starter.unlink(missing_ok=True)
    with told(lambda: "looking whether torchvision fits torch"):
        tried = subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if "torchvision::" in tried.stderr:
        shutil.copyfile(ROOT / "engine" / "compat.py", hook)
        starter.write_text(f"import {HOOK}\n")
        print("  this torchvision was built for another torch; its import is mended in this environment", flush=True)


def whole(venv: Path, dev: bool, versions: str | None = None) -> None:
    """The environment with everything in it; that of a set of versions has what the tests need."""
    dev = dev or versions is not None
    began, python = time.monotonic(), venv.absolute() / "bin" / "python"
    announce(venv, dev, versions)
    if not python.exists():
        with told(lambda: f"making {venv}"):
            run([sys.executable, "-m", "venv", str(venv)], os.environ, lambda line: None)
    packages = packages_of(venv)
    print(f"  wheels are kept for the next time in {cache_of(python)}", flush=True)
    wanted = ".[test]" if versions is not None else ".[dev]" if dev else "."
    install(python, packages, ["-c", str(constraints_for(has_gpu(), versions)), "-e", wanted])
    repair_torchvision(python, packages)
    if not (ROOT / "kernels" / "libsyncr1_native.so").is_file():
        print(NO_NATIVE)
    for stamp in {STAMPS[False], STAMPS[dev]}:
        (venv / stamp).touch()
    size = megabytes(packages) / 1e3
    print(f"syncr1: installed in {duration(time.monotonic() - began)}, {size:.1f} GB in {venv}", flush=True)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"install.py: expected flags of --help, got: {message}; correct them", file=sys.stderr)
        raise SystemExit(CANNOT)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="the environment, made where it is missing (default: .venv)")
    parser.add_argument("--dev", action="store_true", help="what tests, linters and documentation need, too")
    sets = sorted(path.stem for path in SETS.glob("*.txt"))
    parser.add_argument("--versions", metavar="SET", choices=sets, help="the versions in constraints/SET.txt")
    parser.add_argument("--triton", metavar="VERSION", help="this Triton alone, into the folder TARGET")
    parser.add_argument("target", nargs="?", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    usual = ".venv" if arguments.versions is None else f"build/versions/{arguments.versions}"
    venv: Path = arguments.venv or Path(usual)
    if (arguments.triton is None) != (arguments.target is None):
        parser.error("--triton VERSION and its folder go together")
    try:
        if arguments.versions is not None:
            check_set(arguments.versions)
        check_places(LOG.parent, arguments.target or venv)
        LOG.parent.mkdir(parents=True, exist_ok=True)
        LOG.write_text("")
        if arguments.triton is not None:
            triton_alone(venv, arguments.triton, arguments.target)
        else:
            whole(venv, arguments.dev, arguments.versions)
    except Failed as error:
        print(f"syncr1: {error}", file=sys.stderr)
        return CANNOT
    except OSError as error:  # a disk that is full by now
        remedy = "make room or change permissions; what was downloaded is kept, and the same command goes on"
        print(
            f"syncr1: {error.filename or 'disk'}: expected to write it, got {error.strerror}; {remedy}", file=sys.stderr
        )
        return CANNOT
    except KeyboardInterrupt:
        print("\nsyncr1: stopped; what was downloaded is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
