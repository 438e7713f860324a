"""reasons.py: real errors of the system and of libraries have a reason and a remedy; our own have none."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.reasons import reading, reason_of


def raised(act: Callable[[], object]) -> BaseException:
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def full() -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def too_many_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in held:
            os.close(file)


def port_in_use() -> None:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        first.listen()
        second.bind(first.getsockname())


def port_of_a_group_in_use() -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        torch.distributed.TCPStore("127.0.0.1", first.getsockname()[1], 1, True)


@pytest.mark.parametrize(
    ("act", "what", "remedy"),
    [
        (full, "expected free space, got No space left on device", "--resume_from_checkpoint latest"),
        (
            lambda: Path("/proc/sys/kernel/version").write_text("x"),
            "expected what may be read and written",
            "permissions",
        ),
        (too_many_files, "open files: expected one more, got Too many open files", "ulimit -n"),
        (port_of_a_group_in_use, "MASTER_PORT: expected a free port", "name another one"),
        (port_in_use, "MASTER_PORT: expected a free port", "name another one"),
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), "memory: expected room", "num_generations"),
        (lambda: bytearray(1 << 60), "memory: expected room", "--dry_run"),
        (lambda: Path("x" * 300).read_bytes(), "expected a name that the file system takes", "shorter"),
    ],
)
def test_real_errors_of_the_system(act: Callable[[], object], what: str, remedy: str) -> None:
    told = reason_of(raised(act))
    assert told is not None and what in told and "\n" not in told
    assert remedy in told.partition("; ")[2]


def test_safetensors_tells_a_full_disk_in_words(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        error = raised(lambda: save_file({"a": torch.zeros(5000)}, tmp_path / "m.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = reason_of(error, "saving")
    assert told is not None and told.startswith("disk (saving): expected free space, got File too large; "), error


@pytest.mark.parametrize(
    "error",
    [ValueError("from deep inside"), KeyError("a"), RuntimeError("shapes differ"), FileNotFoundError(2, "gone", "x")],
)
def test_our_own_faults_have_no_reason(error: Exception) -> None:
    assert reason_of(error) is None
    try:
        raise error from ValueError("of ours, too")
    except Exception as chained:
        assert reason_of(chained) is None


def test_what_was_merely_being_handled_is_no_reason() -> None:
    def act() -> None:
        try:
            full()
        except OSError:
            raise KeyError("a slip in the handler")  # noqa: B904  # as it happens

    assert reason_of(raised(act)) is None


def test_the_cause_counts() -> None:
    def act() -> None:
        try:
            full()
        except OSError as error:
            raise RuntimeError("could not be saved") from error

    assert "No space left" in str(reason_of(raised(act)))


def test_what_a_library_raises_over_a_file_is_about_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"nonsense")
    with (
        pytest.raises(ConfigError, match=r"lpips_weights: .*m\.safetensors: expected files .*; fetch"),
        reading("lpips_weights", tmp_path / "m.safetensors"),
    ):
        load_file(tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="as it is"), reading("data", "x"):
        raise DataError("as it is")
    with pytest.raises(RuntimeError), reading("model", "x"):  # memory says nothing about a file
        torch.empty(1 << 60, dtype=torch.uint8)
