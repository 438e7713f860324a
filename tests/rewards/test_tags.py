"""Reading `<think>…</think><answer>…</answer>`: what counts, what does not, and that the work is linear."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.rewards.builtin import tags
from syncr1.engine.rewards.builtin.tags import Tagged, answer_of, parse_tagged

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", Tagged("a", "b")),
        (" \n<think>a\nb</think>\n \t<answer> b </answer>\n", Tagged("a\nb", "b")),
        ("<think></think><answer></answer>", Tagged("", "")),
        ("<think>1 < 2 and 3 > 2</think><answer>二</answer>", Tagged("1 < 2 and 3 > 2", "二")),
        ("", None),
        ("b", None),
        ("<answer>b</answer>", None),
        ("<think>a</think>", None),
        ("<answer>b</answer><think>a</think>", None),
        ("<think>a</think>.<answer>b</answer>", None),
        ("so <think>a</think><answer>b</answer>", None),
        ("<think>a</think><answer>b</answer> so", None),
        ("<think>a<answer>b</answer></think>", None),
        ("<think>a<answer></think>b</answer>", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think><think>a</think><answer>b</answer>", None),
        ("<think>a</think></think><answer>b</answer>", None),
        ("<THINK>a</THINK><ANSWER>b</ANSWER>", None),
        ("<think>a</think><answer>b", None),
    ],
)
def test_parse_tagged(text: str, expected: Tagged | None) -> None:
    assert parse_tagged(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "b"),
        ("<answer> b\n</answer> and more", "b"),
        ("<answer></answer>", ""),
        ("<think>maybe <answer>a</answer></think><answer>b</answer>", "b"),
        ("<answer>a</answer><answer>b", "a"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer>a</answer></answer>", "a"),
        ("</answer><answer>", None),
        ("a</answer>", None),
        ("<answer>a", None),
        ("b", None),
        ("", None),
    ],
)
def test_answer_of_takes_the_last_complete_block(text: str, expected: str | None) -> None:
    assert answer_of(text) == expected


SOUP = st.lists(st.sampled_from([*TAGS, " ", "\n", "a", "<", "/think>", "é"]), max_size=12).map("".join)


@given(st.one_of(st.text(), SOUP))
def test_any_text_is_read_and_both_readers_agree(text: str) -> None:
    tagged, answer = parse_tagged(text), answer_of(text)
    if tagged is not None:
        assert tagged.answer == answer
        assert not any(tag in part for tag in TAGS for part in (tagged.think, tagged.answer))
    if answer is not None:
        assert "<answer>" not in answer and "</answer>" not in answer


@given(st.text(alphabet=st.characters(exclude_characters="<")), st.text(alphabet=st.characters(exclude_characters="<")))
def test_what_was_written_is_read_back(think: str, answer: str) -> None:
    assert parse_tagged(f"<think>{think}</think> <answer>{answer}</answer>") == Tagged(think.strip(), answer.strip())


def lines_run(function: Callable[[str], Any], text: str) -> int:
    """Lines of `tags.py` that one call executes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != tags.__file__:
            return None
        count += event == "line"
        return trace

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        function(text)
    finally:
        sys.settrace(earlier)
    return count


@pytest.mark.parametrize("function", [parse_tagged, answer_of])
@pytest.mark.parametrize("spam", [*TAGS, "<think></think>", "<answer></answer>", "</answer><answer>"])
def test_work_does_not_grow_with_the_number_of_tags(function: Callable[[str], Any], spam: str) -> None:
    """A fixed number of statements, none of which is a regular expression: each is one pass of a `str` method."""
    for close in ("", "</answer>"):
        few, many = (lines_run(function, "<think>" + spam * times + close) for times in (10, 5000))
        assert 0 < many <= few + 5
    tree = ast.parse(Path(str(tags.__file__)).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "re" not in imported and not [node for node in ast.walk(tree) if isinstance(node, ast.While)]
