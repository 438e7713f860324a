"""template_kwargs.py: arguments of a chat template, as flags, YAML and TRL write them."""

from __future__ import annotations

from typing import Any

import pytest

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.template_kwargs import arguments_of

GIVEN: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["enable_thinking=false"], {"enable_thinking": False}),
    (["date_string=26 Jul 2024", "n=3", "x=0.5"], {"date_string": "26 Jul 2024", "n": 3, "x": 0.5}),
    (["day=2024-07-26"], {"day": "2024-07-26"}),
    (["mood=calm: and quiet", "empty=", "sign=a=b"], {"mood": "calm: and quiet", "empty": None, "sign": "a=b"}),
    (['{"enable_thinking": true, "mood": "calm"}'], {"enable_thinking": True, "mood": "calm"}),
    (["tools=[a, b]", "a=1", "a=2"], {"tools": ["a", "b"], "a": 2}),
    (["day=2024-02-31"], {"day": "2024-02-31"}),
]


@pytest.mark.parametrize(("items", "expected"), GIVEN)
def test_arguments(items: list[str], expected: dict[str, Any]) -> None:
    assert arguments_of(items) == expected
    assert SyncR1Config(chat_template_kwargs=tuple(items)).chat_template_kwargs == tuple(items)


@pytest.mark.parametrize(
    "item", ["thinking", "=3", "a b=3", "tokenize=true", "{a", '{"tokenize": 1}', "{1: 2}", "-x=1"]
)
def test_what_is_no_argument_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs: expected"):
        SyncR1Config(chat_template_kwargs=(item,))
