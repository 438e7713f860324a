"""A table of mistakes: each ends in one line a setting that says what was expected, what came and what to do, with exit
code 2, before any work, and without torch where torch is not needed to know it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from children import ChildrenSeconds
from made import cache_folder
from mistake import run_cold
from mistakes import TABLE, WITH_A_MODEL, Mistake, program

EARLY = [mistake for mistake in TABLE if not mistake.needs_torch and not mistake.is_module]
LATE = [mistake for mistake in (*TABLE, *WITH_A_MODEL) if mistake.needs_torch and not mistake.is_module]
COLD = [mistake for mistake in TABLE if mistake.is_module or mistake.name in ("no network wanted", "a shard missing")]


def check(mistake: Mistake, said: str, code: int | None) -> None:
    lines = said.splitlines()
    assert code == 2, said
    assert len(lines) == mistake.lines and "Traceback" not in said, said
    assert mistake.words in said, said
    assert "hunter2" not in said and "swordfish" not in said, "what files of keys hold is nobody's to read"
    for line in lines:
        assert re.match(r"\w+\.py: ", line) and re.search(r"; \S|\?$", line), f"no remedy: {line}"
        assert mistake.needs_torch or ("expected" in line and ("got" in line or "is not" in line)), line


def test_there_are_sixty() -> None:
    assert len(TABLE) >= 60 and len({mistake.name for mistake in TABLE}) == len(TABLE)


@pytest.mark.parametrize("mistake", EARLY, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told_without_torch(mistake: Mistake, tmp_path: Path) -> None:
    """Where torch cannot be imported: who needs none does not notice."""
    said, code = ended(mistake, tmp_path, torch=False)
    check(mistake, said, code)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", LATE, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told_before_a_model_is_made(mistake: Mistake, tmp_path: Path) -> None:
    made = set(cache_folder().glob("tiny_base-*"))
    said, code = ended(mistake, tmp_path, torch=True)
    check(mistake, said, code)
    assert set(cache_folder().glob("tiny_base-*")) == made


def ended(mistake: Mistake, folder: Path, *, torch: bool) -> tuple[str, int | None]:
    """What it says on stderr, and its exit code."""
    mistake.files(folder)
    script, *flags = program(mistake)
    env = warm.environment(cache_folder()) | dict(mistake.env)
    running = warm.Program(script, *flags, env=env, cwd=folder, torch=torch, file_size=mistake.file_size)
    out, said = running.communicate(timeout=120)
    assert torch or "loading torch" not in out
    return said, running.poll()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", COLD, ids=lambda mistake: mistake.name)
def test_a_mistake_costs_a_new_process_little(mistake: Mistake, tmp_path: Path) -> None:
    mistake.files(tmp_path)
    with ChildrenSeconds() as seconds:
        done = run_cold(mistake, tmp_path)
    check(mistake, done.stderr, done.returncode)
    assert seconds.used < (15 if mistake.needs_torch else 5)


def test_an_old_python_is_told_by_the_first_file() -> None:
    code = "import sys; sys.version_info = (3, 10, 1); import runpy; runpy.run_path('recipes/corl.py')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=warm.ROOT, env=warm.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected 3.11 or 3.12" in done.stderr and len(done.stderr.splitlines()) == 1
