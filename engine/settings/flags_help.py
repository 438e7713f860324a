"""What `--help` prints: the recipe's own lines as they are, then every setting with its type, default and meaning."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any, get_args, get_origin

from .schema import Setting, choices, describe, in_yaml, settings_of

CONFIG_HELP = "YAML file with settings (such as a run's own config.yaml); flags override what it says."
WIDEST = 100
"""Characters of a line, on a wide terminal and in a pipe."""


def help_text(config_type: type, description: str, program: str) -> str:
    """All of it; a section of the settings dataclass is a heading.

    Args:
        config_type: whose settings they are.
        description: lines that stay as they are.
        program: its name.
    """
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    lines = [f"usage: {program} [--config FILE] [--setting value ...]", "", description.strip(), ""]
    lines += _entry("--config FILE", CONFIG_HELP, width)
    section = ""
    for setting in settings_of(config_type):
        if setting.section != section:
            section = setting.section
            lines += ["", section]
        lines += _entry(_flag(setting), f"{setting.doc} {_default(setting)}", width)
    return "\n".join(lines)


def _entry(flag: str, meaning: str, width: int) -> list[str]:
    body = textwrap.wrap(meaning, max(20, width - 6), break_on_hyphens=False, break_long_words=False)
    return [f"  {flag}", *(f"      {line}" for line in body)]


def _flag(setting: Setting) -> str:
    if setting.type is bool:
        return f"--{setting.name}, --no_{setting.name}"
    several = get_origin(setting.type) is tuple
    word = "{" + "|".join(map(str, choices(setting.type))) + "}" if choices(setting.type) else _kind(setting.type)
    return f"--{setting.name} [{word} ...]" if several else f"--{setting.name} {word}"


def _kind(annotation: Any) -> str:
    """INTEGER, NUMBER, TEXT or PATH."""
    args = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    return describe(args[0] if args else annotation).split()[-1].upper()


def _default(setting: Setting) -> str:
    value = "nothing" if setting.default == () else "none" if setting.default is None else in_yaml(setting.default)
    limits = f"{setting.range}; " if setting.range is not None else ""
    return f"({limits}default: {value})"
