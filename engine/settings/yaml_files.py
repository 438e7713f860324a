"""Settings as YAML and back: every key known, none twice, plain values only; explained by the docstrings."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import ConfigError, kind_of
from .schema import choices, coerce, in_yaml, settings_of, unknown_name, wrong_type

Config = TypeVar("Config")

MAX_YAML_BYTES = 1 << 16
"""Twice what all settings and their explanations take; anything larger is something else, and slow to read."""

MAX_PROBLEMS = 20
"""Told at once."""

MAX_DEPTH = 8
"""Of lists and mappings within each other; settings need two, and a file of verl's, which gets its remedies, seven."""


_NAME = re.compile(r"[A-Za-z_][\w./-]{0,60}", re.ASCII)
"""What a setting's name may look like; nothing else of a file is repeated before it is known for one of settings."""


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
                name = key.value if _NAME.fullmatch(str(key.value)) else "a key"
                raise ConfigError(f"{name}: expected once, got it given twice (line {line}); remove one of them")
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
            f"{where}: expected `setting: value` lines, got what is not plain YAML: {_reason(error)}; correct it"
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
    if not isinstance(source, str):
        _check_settings(config_type, loaded, where)
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


def _reason(error: Exception) -> str:
    """What is wrong and where, without what stands there: it may be a file of somebody's keys."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return "a character or a value that YAML has not"
    line = f" (line {error.problem_mark.line + 1})" if error.problem_mark is not None else ""
    return re.sub(r"'(?!<)[^']{3,}'", "…", " ".join(error.problem.split())) + line


def _check_settings(config_type: type, loaded: Mapping[Any, Any], where: str) -> None:
    """Refuses a file most of whose keys are nobody's settings in a line, so that a slip in a path shows no secrets."""
    known = [setting.name for setting in settings_of(config_type)]
    renamed: Mapping[str, str] = getattr(config_type, "RENAMED", {})
    strange = 0
    for name, value in loaded.items():
        word = str(name)[:80].replace("-", "_")
        theirs = any(path.replace("-", "_") in renamed for path in _paths(str(name), value)) or word in renamed
        strange += not (word in known or theirs or difflib.get_close_matches(word, known, n=1))
        if 2 * strange > len(loaded) or (strange > 1 and 2 * strange == len(loaded)):
            raise ConfigError(
                f"{where}: expected settings of this recipe, got {len(loaded)} keys, most of which are none of its; "
                "correct the path, --help lists the settings"
            )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"--config: expected a YAML file, got {path}, {kind_of(path)}; correct the path")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(
            f"--config: expected a YAML file of at most {MAX_YAML_BYTES} bytes, got {path}, which is no settings file; "
            "correct the path"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = f"which cannot be read ({error.strerror})" if isinstance(error, OSError) else "which holds other bytes"
        raise ConfigError(f"--config: expected UTF-8 text, got {path}, {got}; correct the path") from error


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
