"""verl's `key=value` on a command line: what is called otherwise here gets its remedy (renamed.py)."""

from __future__ import annotations

import re

from .renamed import remedy_of
from .schema import settings_of, unknown_name

_OVERRIDE = re.compile(r"[+~]{0,2}(?P<path>[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*)=(?P<value>.*)", re.DOTALL)
"""Hydra's `key=value`."""


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
