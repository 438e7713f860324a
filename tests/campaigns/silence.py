"""How soon a command gives its first sign of life, and how long it is ever silent, as somebody at a terminal sees it.

    python tests/campaigns/silence.py -- make train ARGS="--output_dir runs/silence"
    python tests/campaigns/silence.py --piped --json build/silence.json -- make train

Every byte counts, and is stamped as it comes through a pseudo-terminal (or, with `--piped`, a pipe). For the numbers of
a first run, `SYNCR1_CACHE` names an empty folder. Ends with the command's exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")


@dataclass(frozen=True)
class Silence:
    """A time without output."""

    seconds: float
    at: float
    """Seconds after the start."""
    after: str
    """What was on the last line by then."""


@dataclass(frozen=True)
class Heard:
    """What a command was like to wait for."""

    code: int
    seconds: float
    first: float
    """Seconds to the first byte."""
    silences: list[Silence]
    """The longest first."""


def listen(command: list[str], *, piped: bool = False, longest: int = 8) -> Heard:
    """Runs `command`, whose output is passed on to stderr.

    Args:
        piped: through a pipe, not a terminal of 100 columns.
        longest: how many silences are kept.
    """
    ours, theirs = os.pipe() if piped else pty.openpty()
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "100"}
    )
    os.close(theirs)
    last, first, tail, silences = began, float("nan"), b"", []
    while data := _read(ours):
        now = time.monotonic()
        if first != first:
            first = now - began
        silences.append(Silence(round(now - last, 2), round(last - began, 1), _last_line(tail)))
        silences = sorted(silences, key=lambda silence: -silence.seconds)[:longest]
        last, tail = now, (tail + data)[-2000:]
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
    os.close(ours)
    code = process.wait()
    return Heard(code, round(time.monotonic() - began, 1), round(first, 2), silences)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # a terminal ends with an error
        return b""


def _last_line(tail: bytes) -> str:
    lines = [line.strip() for line in ESCAPES.sub(b"\n", tail).decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piped", action="store_true", help="through a pipe, as in a log file or CI")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("command", nargs="+", help="behind --")
    arguments = parser.parse_args()
    heard = listen(arguments.command, piped=arguments.piped)
    print(
        f"\n{heard.seconds:.0f} s, first sign of life after {heard.first:.2f} s; the longest silences:", file=sys.stderr
    )
    for silence in heard.silences:
        print(f"  {silence.seconds:5.1f} s at {silence.at:6.1f} s, after: {silence.after}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(heard), indent=2) + "\n")
    raise SystemExit(heard.code)


if __name__ == "__main__":
    main()
