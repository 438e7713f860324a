"""Whole runs with rollout_staleness 1, whose two processes are killed, asked to end, and refused what they were given:
neither outlives the other, each end is that of a run with one process, and what goes on is the undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import Launched, metrics_of
from made import short_base, world_folder
from warm import ROOT, environment

pytestmark = pytest.mark.slow
STALE = ["--rollout_staleness", "1", "--importance_correction", "truncate"]
NUM_STEPS = 9


def recipe(*flags: str) -> list[str]:
    settings = {
        "model": short_base(),
        "data": world_folder(),
        "prompts_per_step": 6,
        "num_generations": 4,
        "max_steps": NUM_STEPS,
        "checkpointing_steps": 2,
        "eval_samples": 0,
        "report_steps": 0,
        "sample_steps": 0,
        "replay_check_steps": 1,
        "refill": 1,
    }
    return ["recipes/sync_r1.py", *(f"--{name}={value}" for name, value in settings.items()), *flags]


def begun(folder: Path, *flags: str) -> Launched:
    return Launched(folder, folder.with_suffix(".log"), recipe(*STALE, *flags))


def until(what: Callable[[], object], run: Launched, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        over = run.poll() is not None or time.monotonic() > deadline
        assert not over, Path(run._log.name).read_text()[-3000:]
        time.sleep(0.02)


def ended(run: Launched, seconds: float = 300) -> tuple[int | None, str]:
    """Exit code, and what was printed."""
    until(lambda: run.poll() is not None, run, seconds)
    run.poll()
    return run.process.returncode, Path(run._log.name).read_text()


def beside(run: Launched) -> int | None:
    """The process that samples ahead."""
    pids = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    return next((int(p) for p in pids if b"sync_r1_ahead" in Path(f"/proc/{p}/cmdline").read_bytes()), None)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Metrics of an undisturbed run."""
    run = begun(tmp_path_factory.mktemp("whole") / "run")
    pid: list[int | None] = []
    until(lambda: pid.append(beside(run)) or pid[-1], run)
    code, said = ended(run)
    assert code == 0, said[-3000:]
    assert pid[-1] is not None and not lives(pid[-1])
    rows = metrics_of(run.run)
    assert [row["rollout/staleness"] for row in rows] == [0.0, *[1.0] * (NUM_STEPS - 1)]
    return rows


def test_the_first_step_is_that_of_one_process(whole: list[dict[str, object]], tmp_path: Path) -> None:
    """Drawn and scored with the same weights in another process: the same to the last bit, but for the correction."""
    run = Launched(
        tmp_path / "one", tmp_path / "one.log", recipe("--importance_correction", "truncate", "--max_steps=1")
    )
    code, said = ended(run)
    assert code == 0, said[-3000:]
    (row,) = metrics_of(run.run)
    assert {name: value for name, value in whole[0].items() if name != "rollout/staleness"} == row


def test_corl(tmp_path: Path) -> None:
    """Its first stage, whose halves share an advantage: the first step is that of one process, the others are stale."""
    flags = ["--stage=unified", "--unify=advantage", "--max_steps=2", "--prompts_per_step=2", "--num_generations=4"]
    flags += ["--max_completion_length=24", "--eval_samples=0", "--replay_check_steps=1"]
    rows = []
    for name, stale in (("one", STALE[2:]), ("two", STALE)):
        run = Launched(tmp_path / name, tmp_path / f"{name}.log", ["recipes/corl.py", *flags, *stale])
        code, said = ended(run)
        assert code == 0, said[-3000:]
        rows.append(metrics_of(run.run))
    one, two = rows
    assert [row.pop("rollout/staleness") for row in two] == [0, 1] and one[0] == two[0] and one[1] != two[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end(number: int, whole: list[dict[str, object]], tmp_path: Path) -> None:
    """All processes, as a scheduler does: a checkpoint, 75, and the same command goes on as if nothing had been."""
    run = begun(tmp_path / "run", "--resume_from_checkpoint", "latest")
    until(lambda: run.steps()[1] >= 3, run)
    other = beside(run)
    assert other is not None
    for pid in (other, run.process.pid):
        os.kill(pid, number)
    code, said = ended(run)
    assert code == 75 and "go on with --resume_from_checkpoint latest" in said, said[-3000:]
    assert not lives(other)
    code, said = ended(begun(tmp_path / "run", "--resume_from_checkpoint", "latest"))
    assert code == 0 and metrics_of(tmp_path / "run") == whole, said[-3000:]


def test_ctrl_c(tmp_path: Path) -> None:
    """It reaches both; the step is finished, the model saved."""
    run = begun(tmp_path / "run")
    until(lambda: run.steps()[1] >= 2, run)
    other = beside(run)
    assert other is not None
    for pid in (other, run.process.pid):
        os.kill(pid, signal.SIGINT)
    code, said = ended(run)
    assert code == 0 and "stopped at step" in said, said[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "last" / "config.json").is_file() and not lives(other)


@pytest.mark.parametrize("victim", ["first", "other"])
def test_sigkill(victim: str, whole: list[dict[str, object]], tmp_path: Path) -> None:
    """Of either: the other ends within seconds, says why if it can, and the run goes on from its checkpoint."""
    run = begun(tmp_path / "run")
    until(lambda: run.steps()[1] >= 5, run)
    other = beside(run)
    assert other is not None
    os.kill(other if victim == "other" else run.process.pid, signal.SIGKILL)
    began = time.monotonic()
    code, said = ended(run, 60)
    until(lambda: not lives(other), run, 10)
    print(f"\n{victim} killed: ended after {time.monotonic() - began:.1f} s")
    if victim == "other":
        line = "syncr1: the process that samples ahead (rollout_staleness 1) ended (signal 9: out of memory, or"
        assert code == 70 and len(re.findall(re.escape(line), said)) == 1 and "Traceback" not in said, said[-3000:]
    code, said = ended(begun(tmp_path / "run", "--resume_from_checkpoint", "latest"))
    assert code == 0 and metrics_of(tmp_path / "run") == whole, said[-3000:]


def test_a_reward_that_breaks(tmp_path: Path) -> None:
    """The same words and the same code as with one process, after the same step."""
    (tmp_path / "mine.py").write_text(
        "COUNT = [0]\ndef mine(images, **columns):\n    COUNT[0] += 1\n"
        "    return ['good' if COUNT[0] > 3 else 0.5] * len(images)\nmine.kind = 'text'\n"
    )
    said = []
    for stale in ([], STALE):
        command = [sys.executable, *recipe("--reward_funcs", f"{tmp_path / 'mine.py'}:mine", "--refill=0", *stale)]
        folder = tmp_path / f"run{len(stale)}"
        done = subprocess.run(
            [*command, "--output_dir", str(folder)],
            cwd=ROOT,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 2, done.stderr[-3000:]
        said.append((done.stderr.strip().splitlines()[-1], len(metrics_of(folder))))
    one, two = said
    # Each process calls functions of its own: the trial call is the first one's, and counts there alone.
    place = r"step \d|prompt '[^']+'"
    assert re.sub(place, "", one[0]) == re.sub(place, "", two[0]) and "'mine' at index 0" in one[0]
    assert (one[1], two[1]) == (3, 4)
