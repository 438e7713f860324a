"""Messages that fit on a page and on any terminal."""

from __future__ import annotations

import pickle

import pytest

from syncr1.engine.errors import MOST_CHARACTERS, Refused, printable, shown


def test_what_fits_stays() -> None:
    assert printable("café\n" * 9) == "café\n" * 9


def test_the_middle_of_a_long_message_goes() -> None:
    """Place and remedy stay; wrapped in another error it is not cut any shorter than that one."""
    told = str(Refused("rows.jsonl, line 1: got " + "x" * 50_000 + "; correct it"))
    assert told.startswith("rows.jsonl, line 1: got x") and told.endswith("x; correct it")
    assert len(told) == MOST_CHARACTERS and len(printable(told)) == MOST_CHARACTERS
    assert str(Refused(f"train: {told}")).endswith("; correct it")


def test_halves_of_surrogate_pairs_are_written_out() -> None:
    assert str(Refused("a\ud800b")) == "a\\ud800b"


def test_errors_reach_other_processes() -> None:
    error = pickle.loads(pickle.dumps(Refused("a\ud800b")))
    assert type(error) is Refused and str(error) == "a\\ud800b"


def test_shown() -> None:
    deep: list[object] = []
    for _ in range(3000):
        deep = [deep]
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown("x" * 100) == "'" + "x" * 76 + "..."
    assert shown(deep) == "list that is too deep or too long to show"
    assert shown(10**5000) == "int that is too deep or too long to show"


@pytest.mark.parametrize("longest", [10, 300])
def test_shown_is_as_long_as_asked(longest: int) -> None:
    assert len(shown("x" * 1000, longest)) == longest
