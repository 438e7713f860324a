"""engine/interrupts.py: the first Ctrl-C is a request, the second one is heard at once, and both end with the block."""

from __future__ import annotations

import gc
import os
import signal
import threading

import pytest

from syncr1.engine.interrupts import Interrupts


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_a_request_and_the_second_is_not() -> None:
    said: list[str] = []
    with Interrupts(said.append) as interrupts:
        assert not interrupts.asked
        interrupt()
        assert interrupts.asked and len(said) == 1
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
        assert interrupts.asked


def test_handlers_are_put_back_and_other_threads_leave_them() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before

    def elsewhere() -> None:
        with Interrupts() as interrupts:
            assert not interrupts.asked and signal.getsignal(signal.SIGINT) == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
