"""Every mistake of the table in a process of its own, as a user makes it, with a clock: `make test-faults`, or

    python -m pytest tests/campaigns/test_mistakes_cold.py -q

prints name, seconds of the clock and of a core, exit code, and the line. The clock's are of a machine with other work.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from children import ChildrenSeconds
from mistake import run_cold
from mistakes import TABLE, WITH_A_MODEL


def test_every_mistake_cold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a setting and exit code 2; within 5 seconds of a core, 15 where torch is needed."""
    wrong = []
    for number, mistake in enumerate((*TABLE, *WITH_A_MODEL)):
        folder = tmp_path / str(number)
        folder.mkdir()
        mistake.files(folder)
        began = time.monotonic()
        with ChildrenSeconds() as seconds:
            done = run_cold(mistake, folder)
        told = done.stderr.splitlines()
        clock, code = time.monotonic() - began, done.returncode
        with capsys.disabled():
            row = f"{clock:6.2f} s {seconds.used:6.2f} s  exit {code}  {mistake.name}"
            print(f"{row}\n{'':20}{told[-1][:160] if told else ''}", flush=True)
        limit = 15 if mistake.needs_torch else 5
        if code != 2 or len(told) != mistake.lines or seconds.used > limit or mistake.words not in done.stderr:
            wrong.append(f"{mistake.name}: exit {code}, {seconds.used:.1f} s\n{done.stderr[-2000:]}")
    assert wrong == [], "\n".join(wrong)
