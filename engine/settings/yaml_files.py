"""Settings as YAML and back: every key known, none twice, plain values only; explained by the docstrings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import ConfigError, one_line
from .schema import choices, coerce, in_yaml, settings_of, unknown_name, wrong_type

Config = TypeVar("Config")

MAX_YAML_BYTES = 1 << 15
"""Twice what all settings and their explanations take; anything larger is something else, and slow to read."""

MAX_PROBLEMS = 20
"""Told at once."""

MAX_DEPTH = 8
"""Of lists and mappings within each other; settings need two, and a file of verl's, which gets its remedies, seven."""


class _StrictLoader(yaml.SafeLoader):
    """`yaml.safe_load` that refuses a key that comes twice, where the plain one silently keeps the last, and what no
    settings need and a few lines make huge: aliases, and lists in lists in lists."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise ConfigError(f"line {line}: expected plain values, got an alias (*name); write the value out")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise ConfigError(f"line {line}: expected a setting, got lists within lists; take brackets out")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{key.value}: expected once, got it given twice (line {line}); remove one of them")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _paths(name: str, value: Any) -> Iterator[str]:
    """The dotted paths in a nested mapping, as verl's files have them; `name` itself for anything else."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _paths(f"{name}.{key}", inner)
    else:
        yield name


def read_yaml(config_type: type, source: str | Path) -> dict[str, Any]:
    """Field -> value from a YAML file (a Path) or a YAML text (a str); only the fields that it names.

    Raises ConfigError for unknown or duplicate keys, tags (`!!python/...`), wrong types, and NaN or infinity.
    """
    where, text = ("YAML", source) if isinstance(source, str) else (str(source), _read(source))
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{where}: expected settings of at most {MAX_YAML_BYTES} characters, got {len(text)}; pass a settings file"
        )
    try:
        # _StrictLoader is a SafeLoader: it builds plain values only.
        loaded = yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    # PyYAML reads `2001-99-99`, `!!bool x` and `!!int ''` with errors that are none of its own.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{where}: expected `setting: value` lines, got what is not plain YAML: {one_line(error)}; correct it"
        ) from error
    if loaded is None and not isinstance(source, str):
        raise ConfigError(
            f"{where}: expected `setting: value` lines, got a file without any; write some, or leave --config out"
        )
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{where}: expected `setting: value` lines, got {type(loaded).__name__}; recipes/sync_r1.yaml is an example"
        )
    known = {setting.name: setting for setting in settings_of(config_type)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for number, (name, value) in enumerate(loaded.items(), 1):
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"{len(loaded) - number + 1} more settings were not looked at")
            break
        if name not in known:
            theirs = [path for path in _paths(str(name), value) if path in getattr(config_type, "RENAMED", {})]
            problems += [unknown_name(path, config_type) for path in theirs[:MAX_PROBLEMS] or [str(name)]]
            continue
        try:
            values[name] = coerce(value, known[name].type)
        except ValueError:
            problems.append(wrong_type(known[name], value))
    if problems:
        raise ConfigError.of([f"{where}: {problem}" for problem in problems])
    return values


def _read(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(
            f"--config: expected a YAML file, got {path}, which does not exist or is not a file; correct the path"
        )
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(
            f"--config: expected a YAML file of at most {MAX_YAML_BYTES} bytes, got {path}, which is no settings file; "
            "correct the path"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config: expected UTF-8 text, got {path}, which cannot be read as that ({one_line(error)}); correct it"
        ) from error


def from_yaml(config_type: type[Config], source: str | Path) -> Config:
    """`config_type` with the values of a YAML file (a Path) or text (a str), and defaults for the rest."""
    return config_type(**read_yaml(config_type, source))


def to_yaml(config: Any, *, comments: bool = True) -> str:
    """Every setting as YAML, explained by the dataclass's own docstrings; `from_yaml` gives `config` back."""
    lines: list[str] = []
    section = ""
    for setting in settings_of(config.__class__):
        if comments and setting.section != section:
            section = setting.section
            lines += ["", f"# {section[0].upper()}{section[1:]} ".ljust(100, "-"), ""]
        if comments:
            options = choices(setting.type)
            doc = setting.doc + (f" [{' | '.join(map(str, options))}]" if options else "")
            lines += [f"# {line}" for line in textwrap.wrap(doc, 98, break_on_hyphens=False)]
        lines.append(f"{setting.name}: {in_yaml(getattr(config, setting.name))}")
    return "\n".join(lines).lstrip("\n") + "\n"
