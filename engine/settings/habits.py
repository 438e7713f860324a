"""Spellings of a command line that people are used to: `--bf16 True`, `--output-dir`, verl's `data.seed=1`.

What means the same is respelled as this program's flags; what is called otherwise here gets its remedy (renamed.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import get_origin

from .renamed import remedy_of, remedy_of_value
from .schema import Setting, describe, settings_of, unknown_name

TRUE = frozenset({"true", "yes", "on", "1", "t", "y"})
FALSE = frozenset({"false", "no", "off", "0", "f", "n"})

_OVERRIDE = re.compile(r"[+~]{0,2}(?P<path>[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*)=(?P<value>.*)", re.DOTALL)
"""Hydra's `key=value`."""


def respelled(arguments: Sequence[str], config_type: type) -> tuple[list[str], list[str]]:
    """The arguments in this program's spelling, and what is wrong with those that mean nothing here, in words.

    >>> from .train_config import TrainConfig
    >>> respelled(["--bf16", "True", "--output-dir=x"], TrainConfig)
    (['--bf16', '--output_dir=x'], [])
    """
    known = {setting.name: setting for setting in settings_of(config_type)}
    kept: list[str] = []
    problems: list[str] = []
    pending, values_left = list(arguments), 0.0
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            problem = None if values_left > 0 else of_override(argument, config_type)
            values_left -= 1
            problems, kept = (problems, [*kept, argument]) if problem is None else ([*problems, problem], kept)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        behind = value if equals else pending[0] if pending and not pending[0].startswith("--") else ""
        switch = known.get(name.removeprefix("no_"))
        if switch is not None and switch.type is bool and behind and not of_override(behind, config_type):
            pending = pending if equals else pending[1:]
            problems += _switch(kept, switch.name, name != switch.name, behind)
        else:
            kept.append(f"--{name}{equals}{value}")
            problems += _of_value(known.get(name), behind)
        values_left = 0 if equals or name not in known else _num_values(known[name])
    return kept, problems


def _num_values(setting: Setting) -> float:
    """How many words may stand behind its flag."""
    return 0 if setting.type is bool else math.inf if get_origin(setting.type) is tuple else 1


def _switch(kept: list[str], name: str, negated: bool, value: str) -> list[str]:
    """Adds `--name` or `--no_name` to `kept`; what is wrong where the value is neither true nor false."""
    if value.lower() not in TRUE | FALSE:
        return [f"--{name}: expected nothing behind it, or true or false, got {value}; write --{name} or --no_{name}"]
    kept.append(f"--{name}" if (value.lower() in TRUE) != negated else f"--no_{name}")
    return []


def _of_value(setting: Setting | None, value: str) -> list[str]:
    remedy = None if setting is None else remedy_of_value(setting.name, value)
    if setting is None or remedy is None:
        return []
    return [f"--{setting.name}: expected {describe(setting.type)}, got {value}; {remedy}"]


def of_override(argument: str, config_type: type) -> str | None:
    """What to say about a `key=value` as hydra takes it: a path of verl's, or a name that is a flag here."""
    found = _OVERRIDE.fullmatch(argument)
    if found is None:
        return None
    path = found["path"].replace("/", ".")
    if path in {setting.name for setting in settings_of(config_type)}:
        return f"{path}=…: expected a flag, got {argument[:80]}; write --{path} {found['value'][:60]}"
    known = remedy_of(path, getattr(config_type, "RENAMED", {}))
    return None if known is None else unknown_name(path, config_type)
