"""recipes/install.py: says what comes and how far it is, and takes uv where it is."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import pytest
from helpers import ROOT

PIP_SAYS = """\
Obtaining file:///somewhere/syncr1
  Installing build dependencies: started
  Installing build dependencies: finished with status 'done'
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)
Collecting rich>=14.1
  Downloading rich-15.0.0-py3-none-any.whl (310 kB)
Building wheels for collected packages: syncr1
Installing collected packages: rich, torch, syncr1
""".splitlines()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("install_recipe", ROOT / "recipes" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOG", tmp_path / "install.log")
    return module


def stand_in(folder: Path, lines: str) -> Path:
    """An installer of a few lines of shell, first on the PATH."""
    folder.mkdir(exist_ok=True)
    program = folder / "uv"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    return program


def test_progress_is_read_from_pips_lines(recipe: types.ModuleType, tmp_path: Path) -> None:
    """How much of a large download is there, from the folder that pip downloads to; how many packages, from theirs."""
    downloads, packages = tmp_path / "downloads", tmp_path / "packages"
    (downloads / "pip-unpack").mkdir(parents=True)
    (packages / "pip-23.2.dist-info").mkdir(parents=True)
    (downloads / "pip-unpack" / "part").write_bytes(b"0" * 40_000_000)
    progress, states = recipe.Progress(downloads, packages), []
    for line in PIP_SAYS:
        progress.read(line)
        states.append(progress.state())
    (packages / "rich-15.0.0.dist-info").mkdir()
    states.append(progress.state())
    assert states[1] == "installing build dependencies" and states[3] == "1 packages found, now torch==2.13.0"
    assert states[4] == "downloading torch-2.13.0: 40 of 527 MB" and states[6] == "downloading rich-15.0.0"
    assert states[7] == "building syncr1 and its C++ library"
    assert states[8:] == ["unpacking rich, 1 of 3 packages", "unpacking torch, 2 of 3 packages"]


def test_it_is_never_silent(
    recipe: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "BEAT", 0.05)
    with recipe.told(lambda: "unpacking"):
        recipe.time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and set(lines) == {"  0 s: unpacking"}


def test_a_failed_installer_is_quoted(recipe: types.ModuleType) -> None:
    said = "; ".join(f"print('line {i}')" for i in range(30))
    with pytest.raises(recipe.Failed) as failed:
        recipe.run([sys.executable, "-c", f"{said}; raise SystemExit(3)"], os.environ, lambda line: None)
    text = str(failed.value)
    assert "exit code 3" in text and "line 29" in text and "line 9\n" not in text and "network" in text
    assert "line 0\n" in recipe.LOG.read_text()


def test_uv_is_taken_where_it_is_and_pip_where_it_cannot(
    recipe: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """uv gets pip's own words, and pip's indexes, so that both take one build of PyTorch."""
    packages = tmp_path / "packages"
    packages.mkdir()
    settings = "[global]\nindex-url = https://example.org/simple\nextra-index-url =\n  file:///a\n  file:///b\n"
    (tmp_path / "pip.conf").write_text(settings + "[install]\nfind-links = /wheels\n")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    python, told = Path(sys.executable), tmp_path / "told"
    stand_in(tmp_path / "bin", f'echo "$@" > {told}; env | grep ^UV_ | sort >> {told}')
    recipe.install(python, packages, ["-c", "pins.txt", "-e", "."])
    first, *variables = told.read_text().splitlines()
    assert first == f"pip install --python {python} -c pins.txt -e ."
    values = dict(line.split("=", 1) for line in variables)
    assert values["UV_INDEX"].endswith("file:///a file:///b") and values["UV_FIND_LINKS"].endswith("/wheels")
    assert values["UV_DEFAULT_INDEX"] == "https://example.org/simple"
    assert values["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    stand_in(tmp_path / "bin", "echo no such build; exit 2")
    recipe.install(python, packages, ["--help"])
    out = capsys.readouterr().out
    assert "uv ended with exit code 2" in out and "no such build" in out and "trying again with pip" in out
    assert "Install packages from" in recipe.LOG.read_text(), "pip's own help"


def test_a_gpu_gets_its_own_build_of_torch(recipe: types.ModuleType) -> None:
    """The pins of torch, torchvision and triton are left out there, and nothing else is."""
    pins = set(re.findall(r"^[\w.-]+==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    path = recipe.constraints_for(True)
    kept = set(re.findall(r"^[\w.-]+==\S+$", path.read_text(), re.MULTILINE))
    assert {line.split("==")[0] for line in pins - kept} == {"torch", "torchvision", "triton"} and kept <= pins
    assert recipe.constraints_for(False).read_text() == (ROOT / "constraints.txt").read_text()


def test_a_set_of_versions_has_its_pins_and_of_the_rest_the_usual(recipe: types.ModuleType) -> None:
    """Each name once: pip refuses two."""

    def pins(path: Path) -> list[tuple[str, str]]:
        return re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.MULTILINE)

    for path in (ROOT / "constraints").glob("*.txt"):
        merged, usual = pins(recipe.constraints_for(True, path.stem)), dict(pins(ROOT / "constraints.txt"))
        assert len(merged) == len(usual) and dict(merged) == usual | dict(pins(path))


def test_a_set_is_for_one_python(recipe: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe.sys, "version_info", types.SimpleNamespace(major=3, minor=9))
    with pytest.raises(recipe.Failed, match=r"oldest .*expected Python 3.11, got 3.9 .*SET=oldest SET_PYTHON="):
        recipe.check_set("oldest")


def test_what_comes_is_said_and_room_for_it_is_asked(
    recipe: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = recipe.shutil.disk_usage(tmp_path)
    recipe.announce(tmp_path, False)
    first = capsys.readouterr().out
    assert str(tmp_path) in first and "to download 375 MB, on disk 1.7 GB" in first
    (tmp_path / recipe.STAMPS[False]).touch()
    recipe.announce(tmp_path, True)
    assert "what is there already stays" in capsys.readouterr().out
    monkeypatch.setattr(recipe.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(recipe.Failed, match=r"expected at least 1.2 GB of free space .*, got 1.0 GB; make room"):
        recipe.announce(tmp_path, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--venv", "/proc/none/venv"], "a folder that can be written"),
        (["--venv", "afile/venv"], "where {here}/afile is none"),
        (["--triton", "3.6"], "go together"),
    ],
)
def test_what_is_in_its_way_is_a_line_and_exit_2(
    recipe: types.ModuleType,
    flags: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "afile").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["install.py", *flags])
    try:
        code = recipe.main()
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and words.format(here=tmp_path) in told


def test_too_little_space_is_told_before_anything_comes(
    recipe: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "SIZES", {False: (375, 1e9, 2900, 6.0)})
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv")])
    assert recipe.main() == 2 and "GB of free space at" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()
