"""Flags and a YAML file to a settings dataclass: `--config run.yaml` gives defaults, flags override them.

Works for any dataclass that `schema.py` can read, so every recipe has the same command line and one style of message.
Whatever is wrong is said on stderr, all of it at once, with exit code 2 before torch is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..errors import ConfigError, refuse, shown
from .flags_help import help_text
from .habits import of_override
from .schema import Setting, coerce, out_of_range, settings_of, unknown_name, wrong_type
from .yaml_files import read_yaml, to_yaml

Config = TypeVar("Config")

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
"""What may stand behind a flag that is on or off; nothing is on."""


def parse(
    config_type: type[Config],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    default_yaml: str | Path | None = None,
    positional: str | None = None,
) -> Config:
    """The settings that `argv` asks for, checked; prints what is wrong and exits with code 2 otherwise.

    Args:
        config_type: flat dataclass, its `__post_init__` raising ConfigError for values that cannot work.
        argv: flags without the program's name; None: `sys.argv[1:]`.
        description: the first lines of `--help`; None: the dataclass's docstring.
        default_yaml: settings file of the embedded default, which counts where neither a flag nor `--config` names a
            `model`; must exist.
        positional: the list that takes words without a flag, as `report.py RUN RUN2`; None: there may be none.

    Precedence: flag, then `--config`, then `default_yaml`, then the dataclass.  The values are checked once, together,
    so a flag may complete a file.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        program = f"{Path(sys.argv[0]).name}{'' if positional is None else f' {positional.upper()} ...'}"
        print(help_text(config_type, description or config_type.__doc__ or "", program))
        raise SystemExit(0)
    flags = _Flags(config_type, positional).read(arguments)
    problems, values = flags.problems, dict[str, Any]()
    if flags.config_file is not None:
        try:
            values = read_yaml(config_type, flags.config_file)
        except ConfigError as error:
            problems += str(error).splitlines()
    values = _beneath(config_type, values, flags.values)
    if default_yaml is not None and values.get("model") is None:
        values = _beneath(config_type, read_yaml(config_type, Path(default_yaml)), values)
    if problems:  # rules over several settings would complain of what a misspelt flag was to give
        refuse(ConfigError.of(problems + _of_range(config_type, flags.values)))
    try:
        return config_type(**values)
    except ConfigError as error:
        refuse(error)


def _of_range(config_type: type, values: dict[str, Any]) -> list[str]:
    given = [setting for setting in settings_of(config_type) if setting.name in values]
    return [problem for setting in given for problem in out_of_range(setting, values[setting.name])]


def _beneath(config_type: type, lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Both, the upper ones first; a list that goes with another one (weights with their functions) goes as it does."""
    pairs: dict[str, str] = getattr(config_type, "GOES_WITH", {})
    return {name: value for name, value in lower.items() if pairs.get(name) not in upper} | upper


def write_default_yaml(config_type: type, path: str | Path) -> None:
    """Writes every setting's default with its explanation to `path`, as `recipes/*.yaml` are made."""
    command = f'python -c "from {config_type.__module__} import {config_type.__name__} as C; '
    command += f"from {__name__} import write_default_yaml as w; w(C, '{Path(path).as_posix()}')\""
    Path(path).write_text(
        f"# Every setting of {config_type.__name__} at its default. Copy what you change and pass it with --config.\n"
        f"# Written from the dataclass by:\n"
        f"#   {command}\n\n" + to_yaml(config_type()),
        encoding="utf-8",
    )


@dataclass
class _Flags:
    """A command line, read: `--name value`, `--name=value`, `--on`, `--no_on`, `--list a b c`; hyphens as underscores.

    A flag that comes twice counts the last time."""

    config_type: type
    positional: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    config_file: Path | None = None

    def read(self, arguments: Sequence[str]) -> _Flags:
        settings = {setting.name: setting for setting in settings_of(self.config_type)}
        files: list[str] = []
        pending = list(arguments)
        while pending:
            word = pending.pop(0)
            if not word.startswith("--") or word == "--":
                self._stray(word, settings)
                continue
            name, equals, inline = word[2:].partition("=")
            name = name.replace("-", "_")
            given = [inline] if equals else _behind(pending)
            if name == "config":
                files += self._config(given, pending, bool(equals))
            elif name in settings:
                self._set(settings[name], given, pending, bool(equals))
            elif name.startswith("no_") and name[3:] in settings and _is_switch(settings[name[3:]]):
                self._set(settings[name[3:]], given, pending, bool(equals))
                self.values[name[3:]] = not self.values.get(name[3:], False)
            else:
                told = unknown_name(name, self.config_type)
                self.problems.append("--" + told.replace("did you mean ", "did you mean --"))
                if not equals:  # what is verl's is told as well
                    self.problems += filter(None, (of_override(word, self.config_type) for word in given))
                del pending[: 0 if equals else len(given)]
        if len(files) > 1:
            self.problems.append(f"--config: expected one file, got it given {len(files)} times; pass one")
        self.config_file = Path(files[0]).expanduser() if len(files) == 1 else None
        return self

    def _config(self, given: list[str], pending: list[str], inline: bool) -> list[str]:
        if not given or not given[0]:
            self.problems.append("--config: expected a YAML file after it, got nothing; name one, or leave it out")
            return []
        del pending[: 0 if inline else 1]
        return given[:1]

    def _set(self, setting: Setting, given: list[str], pending: list[str], inline: bool) -> None:
        """Takes as many words as the setting has values."""
        if _is_switch(setting) and not given:
            self.values[setting.name] = True
            return
        is_list = get_origin(setting.type) is tuple
        words = given if is_list else given[:1]
        del pending[: 0 if inline else len(words)]
        if not words:
            few, remedy = ("values", "list some, or leave it out") if is_list else ("a value", "give one")
            self.problems.append(f"{setting.name}: expected {few} after --{setting.name}, got nothing; {remedy}")
            return
        try:
            value = tuple(_value(word, get_args(setting.type)[0]) for word in words) if is_list else words[0]
            self.values[setting.name] = coerce(value if is_list else _value(words[0], setting.type), setting.type)
        except ValueError:
            self.problems.append(wrong_type(setting, " ".join(words)))

    def _stray(self, word: str, settings: dict[str, Setting]) -> None:
        if self.positional is not None and not word.startswith(("-", "–", "—")):
            self.values[self.positional] = (*self.values.get(self.positional, ()), word)
            return
        bare = word.lstrip("-–—−").partition("=")[0].replace("-", "_")
        remedy = f"did you mean --{bare}?" if bare in settings else "--help lists all settings"
        theirs = of_override(word, self.config_type)
        if theirs is not None:
            self.problems.append(theirs)
            return
        self.problems.append(f"{shown(word)}: expected --setting value, got a word without a setting; {remedy}")


def _is_switch(setting: Setting) -> bool:
    return setting.type in (bool, bool | None)


def _behind(pending: Sequence[str]) -> list[str]:
    """The words up to the next flag."""
    end = next((at for at, word in enumerate(pending) if word.startswith(("--", "–", "—"))), len(pending))
    return list(pending[:end])


def _value(word: str, annotation: Any) -> Any:
    """A word of the command line as a plain value for `coerce`; ValueError where it is none."""
    if get_origin(annotation) in (Union, UnionType):
        if word == "None":
            return None
        return _value(word, next(part for part in get_args(annotation) if part is not type(None)))
    if get_origin(annotation) is Literal:
        return next((option for option in get_args(annotation) if str(option) == word), word)
    if annotation is bool:
        if word.lower() not in YES + NO:
            raise ValueError
        return word.lower() in YES
    return int(word) if annotation is int else word
