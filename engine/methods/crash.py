"""crash.txt: what a report of our own faults needs, written where the run writes; a few lines on the terminal."""

from __future__ import annotations

import configparser
import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import EXIT_CRASHED, one_line
from ..show import recent
from ..whole_files import write_atomically

CRASH = "crash.txt"
PACKAGES = ("syncr1", "torch", "transformers", "deepspeed", "triton", "tokenizers", "safetensors", "huggingface_hub")
MOST_LINES = 40
"""Of the log, and of the terminal."""
METRICS = 5
"""Of the last steps, whose metrics are shown."""


class LogKept(logging.Handler):
    """Keeps the last lines of the log from its making to `close`; what is shown without it is shown with it."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(one_line(f"{record.levelname} {record.name}: {record.getMessage()}")[:500])
        alone = logging.getLogger().handlers == [self]
        if alone and logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)  # which would have shown it, had this handler not been there

    def close(self) -> None:
        logging.getLogger().removeHandler(self)
        super().close()

    def lines(self) -> list[str]:
        return list(self._lines)


def crashed(error: BaseException, config: object, log: Iterable[str] = ()) -> int:
    """Writes crash.txt and says so on stderr; the exit code.

    Args:
        error: with its traceback.
        config: the run's settings.
        log: the last lines of the log.
    """
    program = Path(sys.argv[0]).name or "syncr1"
    last = "".join(traceback.format_exception_only(error)).strip()
    lines = [f"{last[:500]}{_place(error)}"]
    text = crash_text(error, config, log)
    try:
        where = _written(text, config)
    except OSError as failed:  # there is no place for a file at all: the terminal is what is left
        print(text, file=sys.stderr)
        lines.append(f"no report of it could be written ({one_line(failed)}); it stands above")
        where = None
    if where is not None:
        lines.append(f"this is a fault of syncr1: traceback, versions, settings and the last lines are in {where}")
    lines.append(f"please report it {report_to()}, with that text; keys and tokens are left out of it")
    print(*(f"{program}: {one_line(line)}" for line in lines), sep="\n", file=sys.stderr, flush=True)
    return EXIT_CRASHED


def report_to() -> str:
    """Where: the address that the project's own files or this checkout give; else in terms of whom it came from."""
    try:
        urls = importlib.metadata.metadata("syncr1").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    named = {name.strip().lower(): url.strip() for name, _, url in (entry.partition(",") for entry in urls)}
    address = named.get("issues") or named.get("repository") or _origin()
    return f"at {address}" if address else "where you got syncr1 from (its repository's issues, or who gave it to you)"


def _origin() -> str:
    """Where this checkout was cloned from, when that is an address others can reach; without names and keys in it."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        config.read(Path(__file__).resolve().parents[2] / ".git" / "config", encoding="utf-8")
    url = config.get('remote "origin"', "url", fallback="")
    found = re.fullmatch(r"(?:https?://|ssh://|git@)(?:[^@/]*@)?(?P<where>[^@]+?)(?:\.git)?/?", url)
    return (
        f"https://{found['where'].replace(':', '/', 1) if url.startswith('git@') else found['where']}" if found else ""
    )


def crash_text(error: BaseException, config: object, log: Iterable[str] = ()) -> str:
    """The report; values of variables named like secrets, tokens and passwords in addresses are left out."""
    from ..checkpoints.model_card import redact

    parts = {
        "what happened": ["".join(traceback.format_exception_only(error)).strip()],
        "while": [recent.stage() or "starting"],
        "command": [shlex.join([sys.executable, *sys.argv])],
        "folder": [str(Path.cwd())],
        "time": [time.strftime("%Y-%m-%dT%H:%M:%S%z")],
        "traceback": ["".join(traceback.format_exception(error)).rstrip()],
        "versions": [f"python {platform.python_version()}", *_versions()],
        "machine": _machine(),
        "last lines on the terminal": recent.last_lines(),
        "last lines of the log": list(log),
        "last steps": _last_metrics(),
        "settings": _settings(config),
    }
    return redact("".join(f"{name}\n{_indented(lines)}\n" for name, lines in parts.items()))


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"  {line}\n" for text in lines or ["none"] for line in text.splitlines() or [""])


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package}: not installed")
    return found


def _machine() -> list[str]:
    lines = [platform.platform(), f"{os.cpu_count()} cores"]
    lines += [f"{name} {os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        lines += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return lines


def _last_metrics() -> list[str]:
    folder = recent.run_folder()
    files = [] if folder is None else sorted(folder.glob("**/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    return files[-1].read_text(encoding="utf-8", errors="replace").splitlines()[-METRICS:] if files else []


def _settings(config: object) -> list[str]:
    from ..settings.yaml_files import to_yaml

    try:
        return to_yaml(config, comments=False).splitlines()
    except (TypeError, KeyError, OSError):  # no settings dataclass
        return [repr(config)]


def _written(text: str, config: object) -> Path:
    """The path of the file: in the run's folder; before there is one, beside output_dir; else in the working directory
    or, where nothing can be written either, among temporary files."""
    rank = os.environ.get("RANK", "0")
    name = CRASH if rank == "0" else f"crash-rank{rank}.txt"
    output = Path(getattr(config, "output_dir", None) or "run")
    folder = recent.run_folder()
    beside = [parent / f"{output.name}-{name}" for parent in (output.parent, Path(), Path(tempfile.gettempdir()))]
    for path in beside if folder is None else [folder / name, *beside]:
        if path.parent.is_dir():
            try:
                write_atomically(path, text)
            except OSError:
                continue
            return path
    raise OSError("no folder can be written")
