"""lifetimes.py: a process that has ended is known to have, even where its number is used again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from syncr1.engine.processes.lifetimes import Lifetime


def test_this_process_lives() -> None:
    own = Lifetime.own()
    assert own.pid == os.getpid() and own.is_here and not own.is_over
    assert Lifetime.read(own.text()) == own


def test_one_that_ended_is_over() -> None:
    """Also while nobody has asked how: a zombie computes no more."""
    code = "from syncr1.engine.processes.lifetimes import Lifetime; print(Lifetime.own().text())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        life = Lifetime.read(child.stdout.read())
        assert life is not None and life.pid == child.pid
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert life.is_over
    assert life.is_over


def test_a_number_that_is_used_again_is_another_process() -> None:
    own = Lifetime.own()
    assert replace(own, started=own.started + 1).is_over


def test_of_other_machines_nothing_is_known() -> None:
    far = replace(Lifetime.own(), machine="elsewhere")
    assert not far.is_here and not far.is_over
    nowhere = replace(far, machine="")
    assert not nowhere.is_here and Lifetime.read(nowhere.text()) == nowhere


@pytest.mark.parametrize("text", ["", "a b", "a 1 x", "a -1 2", "a 1 2 3"])
def test_anything_else_is_none(text: str) -> None:
    assert Lifetime.read(text) is None
