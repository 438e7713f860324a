"""Programs as forks of a process that has imported everything: they start in a tenth of a second, not in seven.

For tests of what a program does.  How it starts (flags before torch, a launcher) is for a process of its own.  As a
script this is the process that is forked, one for all of a session's: for each program it reads the name of a file that
says what to run.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncr1.engine.processes.meeting import free_port

if TYPE_CHECKING:
    import pytest  # the process that is forked has no need of it

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    *("syncr1.engine.methods.sync_r1", "syncr1.engine.corl.run", "syncr1.engine.methods.evaluation"),
    *("syncr1.engine.methods.dry_run", "syncr1.engine.data.samples", "syncr1.engine.world.embedded"),
    *("gradient_cases", "resume_cases", "deepspeed.runtime.zero.stage3"),
)


LIGHT = ("syncr1.engine.corl.config", "syncr1.engine.methods.evaluation_config", "syncr1.engine.methods.preflight")
"""What a recipe imports before torch."""
NO_TORCH = "no-torch"
SESSION_FOLDER = "SYNCR1_TEST_SESSION"
"""Variable that names `session_folder`; conftest.py sets it."""
LAST_WORDS = 20.0
"""Seconds that ranks have to end by themselves once one of them has failed, as a launcher gives them."""


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """One for all processes of a session: those of xdist keep theirs below it."""
    folder = factory.getbasetemp()
    return folder.parent if folder.name.startswith("popen-gw") else folder


def environment(cache_dir: Path | None = None) -> dict[str, str]:
    """This process's, without what a launcher tells a rank."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "COLUMNS": "100"}
    return clean | threads | ({} if cache_dir is None else {"SYNCR1_CACHE": str(cache_dir)})


class Program:
    """A script that runs, as one process or as several ranks; like `subprocess.Popen`."""

    def __init__(
        self,
        script: str,
        *flags: str,
        env: dict[str, str],
        ranks: int = 1,
        cwd: Path = ROOT,
        torch: bool = True,
        file_size: int = 0,
    ) -> None:
        """`torch` False: where it fails to be imported, and starts in a hundredth of a second; `file_size`: bytes that
        a file may have, as on a full disk."""
        self._folder, port = tempfile.TemporaryDirectory(), free_port()
        self._paths = [Path(self._folder.name, str(rank)) for rank in range(ranks)]
        for rank, path in enumerate(self._paths):
            launcher = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            more = {name: str(value) for name, value in launcher.items()} if ranks > 1 else {}
            asked = {
                "argv": [script, *flags],
                "env": env | more,
                "cwd": str(cwd),
                "file_size": file_size,
            }
            path.with_suffix(".asked").write_text(json.dumps(asked))
            os.write(_forks(torch), f"{path}\n".encode())  # whole: it is shorter than what a pipe takes at once
        self.pids = [int(_awaited(path.with_suffix(".pid"))) for path in self._paths]

    def poll(self) -> int | None:
        """The exit code once all have ended, or one has failed: the first that is not 0, negative for a signal."""
        codes = self._codes()
        failed = [code for code in codes if code]
        return None if None in codes and not failed else next(iter(failed), 0)

    def _codes(self) -> list[int | None]:
        """Of each rank, None while it runs."""
        return [int(told) if (told := _told(path.with_suffix(".code"))) else None for path in self._paths]

    def seconds(self) -> float:
        """Of a core, that it used until it ended, its imports not counted."""
        return sum(float(_told(path.with_suffix(".seconds"))) for path in self._paths)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pids[0], number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Stdout and stderr, of all ranks one after the other; ends what does not end in time, or soon after its peer
        failed."""
        deadline = time.monotonic() + timeout
        while None in self._codes() and time.monotonic() < deadline:
            if self.poll() is not None:
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
            time.sleep(0.02)
        late = self.poll() is None
        self.kill()
        out, err = ("".join(path.with_suffix(end).read_text() for path in self._paths) for end in (".out", ".err"))
        if late:
            raise TimeoutError(f"{self._paths}: not ended after {timeout} s\n{out[-3000:]}{err[-3000:]}")
        return out, err

    def kill(self) -> None:
        for path, pid in zip(self._paths, self.pids, strict=True):
            if not _told(path.with_suffix(".code")):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
                _awaited(path.with_suffix(".code"))


def run(
    script: str, *flags: str, env: dict[str, str] | None = None, ranks: int = 1, expected: int = 0, timeout: float = 600
) -> tuple[str, str]:
    """Stdout and stderr of a script that ends as expected."""
    program = Program(script, *flags, env=environment() if env is None else env, ranks=ranks)
    out, err = program.communicate(timeout)
    assert program.poll() == expected, f"exit code {program.poll()}\n{out[-3000:]}{err[-6000:]}"
    print(f"{program.seconds():.1f} s of a core: {Path(script).name} {' '.join(flags)}")
    return out, err


@cache
def _forks(torch: bool = True) -> int:
    """Where the process that is forked reads what to run.  It is that of all processes of a session, and ends with the
    last of them."""
    folder = Path(os.environ[SESSION_FOLDER], "warm" if torch else NO_TORCH)
    with _locked(folder):
        pipe = folder / "asked"
        if pipe.exists():
            with contextlib.suppress(OSError):  # nobody reads: all that wrote have ended
                return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        else:
            os.mkfifo(pipe)
        reads = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # waits for nobody, and so does the next
        writes = os.open(pipe, os.O_WRONLY)
        command = [sys.executable, __file__, str(folder), *[NO_TORCH] * (not torch)]
        offline = environment() | {"HF_HUB_OFFLINE": "1"}  # read when its library is imported
        subprocess.Popen(command, cwd=ROOT, env=offline, stdin=reads)
        os.close(reads)
    return writes


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _told(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _awaited(path: Path, seconds: float = 120) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path}: the process that is forked does not answer"
        time.sleep(0.01)
    return path.read_text()


# The process that is forked -------------------------------------------------------------------------------------------


def main() -> None:
    os.setpgrp()
    sys.path.insert(0, str(Path(__file__).parent))
    before = set(os.environ)
    gc.disable()  # what is imported stays
    if NO_TORCH in sys.argv:
        sys.modules["torch"] = None  # type: ignore[assignment]  # `import torch` then raises ImportError
    for name in LIGHT if NO_TORCH in sys.argv else IMPORTED:
        importlib.import_module(name)
    if NO_TORCH not in sys.argv:
        importlib.import_module("kills").preload()
        _read_the_world_once()
        gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a guard ended
    set_by_imports = {name: value for name, value in os.environ.items() if name not in before}
    for path in _asked(Path(sys.argv[1])):
        asked = json.loads(path.with_suffix(".asked").read_text())
        asked["env"] = set_by_imports | asked["env"]
        if os.fork() == 0:
            _guard(path=path, **asked)


def _read_the_world_once() -> None:
    """What the world's tokenizer makes of the world, which takes a second in each program that scores drawings; by the
    tokenizer's weights."""
    judges = importlib.import_module("syncr1.engine.methods.judges")
    made: dict[bytes, Any] = {}
    round_trip = judges._round_trip

    def once(policy: Any, images: Any) -> Any:
        digest = blake2b(images.numpy().tobytes())
        model = getattr(policy.model, "model", policy.model)
        for weight in getattr(model, "vqmodel", policy.model).state_dict().values():
            digest.update(str(weight.dtype).encode() + weight.float().cpu().numpy().tobytes())
        if digest.digest() not in made:
            made[digest.digest()] = round_trip(policy, images)
        return made[digest.digest()].clone()

    judges._round_trip = once
    policy = importlib.import_module("syncr1.engine.world.tiny_janus").build_policy(["a"], [], seed=0)
    judges.grader_of(policy, importlib.import_module("syncr1.engine.world.worlds").WORLDS["rendered"])


def _asked(folder: Path) -> Iterator[Path]:
    """Until all who ask have ended: then so do the programs that still run, and this process."""
    rest = b""
    while True:
        os.set_blocking(0, True)
        read = os.read(0, 1 << 16)
        if not read:
            with _locked(folder), contextlib.suppress(BlockingIOError):  # somebody has come meanwhile
                os.set_blocking(0, False)
                read = os.read(0, 1 << 16)
                if not read:
                    os.killpg(0, signal.SIGKILL)
        *lines, rest = (rest + read).split(b"\n")
        yield from (Path(line.decode()) for line in lines)


def _guard(argv: list[str], env: dict[str, str], cwd: str, path: Path, file_size: int) -> None:
    """Starts the program, and writes how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        _become(argv, env, cwd, path)
    _write(path.with_suffix(".pid"), child)
    _, status, used = os.wait4(child, 0)
    _write(path.with_suffix(".seconds"), used.ru_utime + used.ru_stime)
    _write(path.with_suffix(".code"), os.waitstatus_to_exitcode(status))
    os._exit(0)


def _write(path: Path, value: float) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(str(value))
    draft.rename(path)


def _become(argv: list[str], env: dict[str, str], cwd: str, path: Path) -> None:
    """What a new interpreter would do with the script, up to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, end in enumerate((".out", ".err"), start=1):
        os.dup2(os.open(path.with_suffix(end), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, code = argv, 0
    sys.path[0] = str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
