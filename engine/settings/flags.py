"""Flags and a YAML file to a settings dataclass: `--config run.yaml` gives defaults, flags override them.

Works for any dataclass that `schema.py` can read, so every recipe has the same command line.
Whatever is wrong is said on stderr with exit code 2 before torch is imported.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from ..errors import ConfigError
from .habits import respelled
from .schema import read_yaml, settings_of, to_yaml, unknown_name

Config = TypeVar("Config")

_CONFIG_HELP = "YAML file with settings (such as a run's own config.yaml); flags override what it says."


def parse(
    config_type: type[Config],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    default_yaml: str | Path | None = None,
) -> Config:
    """The settings that `argv` asks for, checked; prints what is wrong and exits with code 2 otherwise.

    Args:
        config_type: flat dataclass, its `__post_init__` raising ConfigError for values that cannot work.
        argv: flags without the program's name; None: `sys.argv[1:]`.
        description: the first lines of `--help`; None: the dataclass's docstring.
        default_yaml: settings file that is read when no `--config` is given; must exist.

    Precedence: flag, then `--config` (or `default_yaml`), then the dataclass.  The values are checked once, together,
    so a flag may complete a file.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config_file, arguments = _take_config(arguments)
        arguments, problems = respelled(arguments, config_type)
        _refuse_unknown_flags(arguments, config_type, problems)
        source = config_file if config_file is not None else default_yaml
        from_file = {} if source is None else read_yaml(config_type, Path(source))
        values = _parse_flags(config_type, arguments, from_file, description or config_type.__doc__ or "")
        return config_type(**values)
    except ConfigError as error:
        _refuse(error)


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


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Splits `--config FILE` or `--config=FILE` off: its values must be known before the flags are read."""
    rest: list[str] = []
    found: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config":
            value = next(pending, None)
            if value is None or value.startswith("--"):
                raise ConfigError("--config: expected a YAML file after it, got nothing")
            found.append(value)
        elif argument.startswith("--config="):
            found.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if len(found) > 1:
        raise ConfigError(f"--config: given {len(found)} times ({', '.join(found)}); pass one file")
    return (Path(found[0]).expanduser() if found else None), rest


def _refuse_unknown_flags(arguments: list[str], config_type: type, found: list[str]) -> None:
    """Names every unknown flag with the nearest one, or with what TRL's name is called here, after what was `found`."""
    known = {setting.name for setting in settings_of(config_type)} | {"help"}
    problems = list(found)
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        name = argument[2:].split("=", 1)[0].replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            problems.append("--" + unknown_name(name, config_type).replace("did you mean ", "did you mean --"))
    if problems:
        raise ConfigError.of(problems)


def _parse_flags(
    config_type: type, arguments: list[str], from_file: dict[str, Any], description: str
) -> dict[str, Any]:
    """Field -> value, by tyro, which also writes the help.  Tyro groups by nested dataclass, so each section of the
    flat dataclass becomes one; that also keeps `config_type` from being built before all values are known."""
    import tyro  # here, so that reading YAML alone does not need it

    config_file = Annotated[Path | None, tyro.conf.arg(help=_CONFIG_HELP)]
    sections: dict[str, list[tuple[str, Any, Any]]] = {
        "settings_file": [("config", config_file, dataclasses.field(default=None))]
    }
    for setting in settings_of(config_type):
        default = from_file.get(setting.name, setting.default)
        argument = tyro.conf.arg(help=setting.doc, help_behavior_hint="(default: nothing)" if default == () else None)
        sections.setdefault(_group(setting.section), []).append(
            (setting.name, Annotated[setting.type, argument], dataclasses.field(default=default))
        )
    groups = {name: dataclasses.make_dataclass(name, fields) for name, fields in sections.items()}
    everything = dataclasses.make_dataclass(
        config_type.__name__, [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in groups.items()]
    )
    for made in (everything, *groups.values()):
        made.__doc__ = ""  # dataclasses writes a signature there, which tyro would print
    parsed: Any = tyro.cli(
        everything,
        args=arguments,
        prog=Path(sys.argv[0]).name,
        description=description,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return {s.name: getattr(getattr(parsed, _group(s.section)), s.name) for s in settings_of(config_type)}


def _group(section: str) -> str:
    """A section's title as a name in Python: what `--help` calls the group."""
    return re.sub(r"\W+", "_", section)


def _refuse(error: ConfigError) -> NoReturn:
    program = Path(sys.argv[0]).name or "syncr1"
    lines = str(error).splitlines()
    heading = "this setting cannot work" if len(lines) == 1 else f"{len(lines)} settings cannot work"
    print(f"{program}: {heading}", *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
    print(f"All settings, explained: {program} --help", file=sys.stderr)
    raise SystemExit(2)
