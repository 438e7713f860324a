"""Everything that a GPU can answer, in one call of nine minutes that survives a failure half way.

    python bench/gpu.py                                  540 seconds; bench/results/<device>.json, .md and .log
    python bench/gpu.py --seconds 1200 --out FOLDER
    python bench/gpu.py --only ops/linear_large profile  some parts or steps
    python bench/gpu.py --pretend                        tiny sizes on a CPU: shows that every part reports
    python bench/gpu.py --collect_wheels FOLDER          on a machine with a network: what a bare one lacks
    python bench/gpu.py --wheels FOLDER                  on the bare one: installs them for this run

It needs torch and triton; PYTHONPATH is set for every step, nothing of ours is installed.  gpu_parts.py lists the parts
by their worth; each step is a process with a limit of its own, so that one which hangs, raises or finds no module takes
nothing else along.  Files are rewritten after every step, so a run that is killed leaves what it knows.

Exit code: 0 when every step came to its end and no check was wrong; 1 else, after everything else ran; goals that were
missed are on the page and change nothing.  2: nothing was started (no GPU, a wrong argument); 130, 143: by a signal.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import gpu_parts
import gpu_wheels
from gpu_page import Files, number
from gpu_process import Outcome, Part, Runner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CACHES = ROOT / "build" / "gpu"
"""Compiled kernels: a second run on the same machine does not compile again."""
SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DS_BUILD_OPS": "0",
}


class Stopped(Exception):
    """A signal asked for the end."""


def gpu_name() -> str | None:
    """The first GPU's, as nvidia-smi has it; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def file_name(device: str) -> str:
    """`NVIDIA H200` as `nvidia-h200`, like the other benchmarks' files."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu"


def environment_of(wheels: Path | None, scratch: Path) -> dict[str, str]:
    """Of every step: this folder and the wheels on PYTHONPATH, compiled kernels kept under build/."""
    paths = [str(ROOT)]
    if wheels is not None:
        paths.append(str(gpu_wheels.install(wheels, scratch / "site")))
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = SETTINGS | given
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [given.get("PYTHONPATH", "")])])
    for name, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        found.setdefault(name, str(CACHES / folder))
    return found


def run(
    parts: Sequence[Part],
    *,
    seconds: float,
    out: Path,
    name: str,
    pretend: bool,
    environment: dict[str, str],
    scratch: Path,
) -> int:
    """Runs the parts and writes the files; returns the exit code."""
    began = time.monotonic()
    files = Files(out, name, parts, pretend)
    outcomes: list[Outcome] = []

    def told(outcome: Outcome) -> None:
        outcomes.append(outcome)
        files.add_log(outcome)
        files.write(outcomes, time.monotonic() - began, finished=False)
        name, took = f"{outcome.part}/{outcome.step}", f"{outcome.seconds:.1f} s"
        print(f"[{time.monotonic() - began:4.0f} s] {name}: {outcome.status} in {took}  {outcome.why}", flush=True)

    runner, code = Runner(seconds, scratch, environment, told), 0
    try:
        runner.run(parts)
    except Stopped as signalled:
        code = 128 + int(signalled.args[0])
    everything = files.write(outcomes, time.monotonic() - began, finished=code == 0)
    for line in everything["goals"]:
        measured = line.get("why", "") if line["measured"] is None else number(line["measured"])
        print(f"{ {True: 'met', False: 'MISSED', None: '-'}[line['met']]:>6}  {line['goal']}   {measured}")
    print(f"{files.page}\n{files.json}", flush=True)
    return code or int(not all(outcome.reported for outcome in outcomes))


def _stop(number_: int, _: FrameType | None) -> None:
    signal.signal(number_, signal.SIG_IGN)  # once
    raise Stopped(number_)


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the three files")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART[/STEP]")
    parser.add_argument("--pretend", action="store_true", help="tiny sizes on a CPU; claims nothing")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="installed for this run, without a network")
    parser.add_argument("--collect_wheels", type=Path, metavar="FOLDER", help="only download what a bare machine lacks")
    parser.add_argument("--processes", type=int, help="steps that may run at once where nothing is timed")
    parser.add_argument("--list", action="store_true", help="only print parts and steps")
    parsed = parser.parse_args(given)
    if parsed.seconds <= 0:
        parser.error(f"--seconds: expected more than 0, got {parsed.seconds:g}")
    if parsed.wheels is not None and not parsed.wheels.is_dir():
        parser.error(
            f"--wheels: {parsed.wheels} is no folder; make one with --collect_wheels on a machine with a network"
        )
    cores = os.cpu_count() or 1
    processes = parsed.processes or (cores if parsed.pretend else max(1, cores * 3 // 4))
    try:
        parsed.parts = gpu_parts.chosen(gpu_parts.all_parts(parsed.pretend, processes), parsed.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    given, began = arguments_of(arguments), time.monotonic()
    if given.list:
        for part in given.parts:
            print(f"{part.name} ({part.seconds:.0f} s): {', '.join(step.name for step in part.steps)}")
        return 0
    if given.collect_wheels is not None:
        return gpu_wheels.collect(given.collect_wheels)
    device = "pretend" if given.pretend else gpu_name()
    if device is None:
        print("bench/gpu.py: nvidia-smi shows no GPU; --pretend shows on a CPU that every part runs", file=sys.stderr)
        return 2
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _stop)
    with tempfile.TemporaryDirectory(prefix="syncr1-gpu-") as scratch:
        environment = environment_of(given.wheels, Path(scratch))
        if given.pretend:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        left = given.seconds - (time.monotonic() - began)  # installing wheels took some
        return run(
            given.parts,
            seconds=left,
            out=given.out,
            name=file_name(device),
            pretend=given.pretend,
            environment=environment,
            scratch=Path(scratch),
        )


if __name__ == "__main__":
    sys.exit(main())
