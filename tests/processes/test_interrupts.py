"""interrupts.py: the first Ctrl-C is a request, the second one is heard at once, and both end with the block."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from syncr1.engine.errors import EXIT_PREEMPTED, Preempted
from syncr1.engine.pictures import open_picture
from syncr1.engine.processes import interrupts
from syncr1.engine.processes.interrupts import PREEMPTING, Interrupts, preemptible


@pytest.fixture(autouse=True)
def _as_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C from the start."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in PREEMPTING}  # `nohup make test` ignores one
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(interrupts, "leave_terminal", lambda: None)  # these tests' own
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_a_request_and_the_second_is_not() -> None:
    said: list[str] = []
    with Interrupts(said.append) as interrupts:
        assert not interrupts.stop
        interrupt()
        assert interrupts.stop and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_one_that_strikes_in_a_destructor_is_not_lost() -> None:
    class Struck:
        def __del__(self) -> None:
            interrupt()

    with Interrupts() as interrupts:
        struck = Struck()
        del struck
        gc.collect()
        assert interrupts.stop


def test_handlers_are_put_back_and_other_threads_leave_them() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before

    def elsewhere() -> None:
        with Interrupts() as interrupts:
            assert not interrupts.stop and signal.getsignal(signal.SIGINT) == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


@pytest.mark.parametrize("number", PREEMPTING)
def test_schedulers_ask_once_and_are_never_early(number: signal.Signals) -> None:
    said: list[str] = []
    called: list[int] = []
    with Interrupts(said.append, lambda: called.append(1)) as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert interrupts.preempt and not interrupts.stop
        assert called == [1] and len(said) == 1 and number.name in said[0]


@pytest.mark.parametrize("number", PREEMPTING)
def test_outside_of_training_they_end_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"{number.name}: nothing to save") as ended, preemptible("nothing to save"):
        os.kill(os.getpid(), number)
        signal.pause()
    assert ended.value.code == EXIT_PREEMPTED and not ended.value.together
    assert signal.getsignal(number) == before


class Struck:
    """A signal comes while it is destroyed."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10):  # it is heard between two steps of the interpreter
            pass


def test_one_that_a_destructor_forgets_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(Preempted), preemptible("nothing to save"):
        struck = Struck()
        del struck
        time.sleep(20)
    assert time.monotonic() - start < 10 and "Exception ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("swallows", [Exception, BaseException])
def test_one_that_is_caught_is_not_lost(swallows: type[BaseException]) -> None:
    """Whoever catches all faults of a plug-in does not catch it; who catches everything has it until the end."""
    passed = []
    with pytest.raises(Preempted), preemptible("nothing to save"):
        with contextlib.suppress(swallows):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        passed.append(swallows)
    assert passed == ([BaseException] if swallows is BaseException else [])


def test_a_picture_that_is_being_read_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    load = Image.Image.load

    def struck(picture: Image.Image) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(picture)

    monkeypatch.setattr(Image.Image, "load", struck)
    with pytest.raises(Preempted), preemptible("nothing to save"):
        open_picture(tmp_path / "a.png")


def test_inside_training_they_wait() -> None:
    """The loop's flags stand before the run's."""
    with preemptible("outside"), Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.preempt
