"""A dataclass of settings, for any recipe: documented, typed, and refused early when wrong.

A settings dataclass is flat, has a docstring under each field, and marks its parts with `# --- title ---` lines.  The
docstrings are the one place where a setting is explained: the flags' help and the YAML's comments are made from them.
What a number must be stands beside it: `Annotated[int, Range("a step needs a prompt", ge=1)]`.  Nothing here imports
torch, so a mistyped key is refused before anything slow is loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import ConfigError, shown
from .renamed import remedy_of, remedy_of_value

Config = TypeVar("Config")
Rule = Callable[[Any], list[str]]
"""Settings to what is wrong with them, in words: field, what was expected, what came, the remedy."""

_SECTION = re.compile(r"^\s*# --- (?P<title>.+?) ---\s*$")


@dataclass(frozen=True, slots=True)
class Range:
    """What a number must be, beside its type; None is always allowed.  The bounds are named as pydantic's."""

    remedy: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    words: str = ""
    """What is said instead of the bounds."""

    def holds(self, value: float) -> bool:
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        bounds = {"more than": self.gt, "at least": self.ge, "below": self.lt, "at most": self.le}
        return self.words or " and ".join(f"{said} {bound:g}" for said, bound in bounds.items() if bound is not None)


class Setting(NamedTuple):
    """One field of a settings dataclass, as people read it."""

    name: str
    type: Any
    range: Range | None
    default: Any
    doc: str
    section: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every recipe's settings share: they are checked when they are made.

    Raises:
        ConfigError: lists every setting that cannot work.
    """

    RULES: ClassVar[tuple[Rule, ...]] = ()
    """What is checked beside types and ranges, once those hold."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Names that people bring from elsewhere, and what to set instead."""

    def __post_init__(self) -> None:
        if problems := problems_of(self):
            raise ConfigError.of(problems)


@functools.cache
def settings_of(config_type: type) -> tuple[Setting, ...]:
    """The fields of `config_type`, with the docstring and the section that their source gives them, section by section.

    A dataclass that builds on another one may add to its sections; where it gives a field a new default, it explains it
    again and gives its range."""
    docs: dict[str, tuple[str, str]] = {}
    for part in reversed(config_type.__mro__):
        if dataclasses.is_dataclass(part):
            docs |= _field_docs(part)
    hints = get_type_hints(config_type, include_extras=True)
    found = []
    for field in dataclasses.fields(config_type):
        doc, section = docs[field.name]
        hint, limits = hints[field.name], None
        if get_origin(hint) is Annotated:
            hint, limits = get_args(hint)
        default = field.default_factory() if callable(field.default_factory) else field.default
        found.append(Setting(field.name, hint, limits, default, doc, section))
    order = list(dict.fromkeys(setting.section for setting in found))
    return tuple(sorted(found, key=lambda setting: order.index(setting.section)))


def at_defaults(config: Any) -> set[str]:
    """The settings that are as they would be if nobody had named them."""
    return {
        setting.name for setting in settings_of(config.__class__) if getattr(config, setting.name) == setting.default
    }


def _field_docs(part: type) -> dict[str, tuple[str, str]]:
    """Name -> (docstring, section) of the fields that this very class writes down."""
    source = textwrap.dedent(inspect.getsource(part))
    lines = enumerate(source.splitlines(), 1)
    starts = [(number, found["title"]) for number, line in lines if (found := _SECTION.match(line))]
    class_def = ast.parse(source).body[0]
    assert isinstance(class_def, ast.ClassDef)
    docs: dict[str, tuple[str, str]] = {}
    for node, following in zip(class_def.body, [*class_def.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        section = next((title for number, title in reversed(starts) if number < node.lineno), "settings")
        docs[node.target.id] = text, section
    return docs


def choices(annotation: Any) -> tuple[Any, ...]:
    """What a Literal (possibly inside a tuple or beside None) allows; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) if part is not Ellipsis for choice in choices(part))


def describe(annotation: Any) -> str:
    """A type in words for messages: `an integer or null`, `one of dapo, grpo`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in args)
    if origin is tuple:
        return f"a list, each item {describe(args[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return "null" if annotation is type(None) else names.get(annotation, str(annotation))


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as `annotation`, or ValueError.  Only changes that cannot lose anything are made: an integer where a
    number is due, `1e-4` (text to YAML 1.1, as it has no dot), a list or one text for a tuple, text for a path."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and (value is None or value == "None"):  # `None` is text to YAML
            return None
        return coerce(value, next(part for part in args if part is not type(None)))
    if origin is Literal:
        # `1 == True` in Python, but zero_stage: true is a slip.
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise ValueError
    if origin is tuple and isinstance(value, str):
        value = [value]  # one item may stand alone, as for argparse and in transformers' files
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(item, args[0]) for item in value)
    if annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer of 400 digits
            raise ValueError from None
        if math.isfinite(number):
            return number
    elif annotation is Path and isinstance(value, str | Path) and str(value).strip() and _is_text(str(value)):
        return _path(value)
    elif annotation in (int, str, bool) and type(value) is annotation and _fits(value):  # a bool is an int: exactly
        return value
    raise ValueError


def _fits(value: int | str | bool) -> bool:
    """Not a number or a text that later steps cannot take or write out."""
    return _is_text(value) if isinstance(value, str) else abs(value) < 2**63


def _is_text(value: str) -> bool:
    """Not empty, and such as the operating system and a terminal take."""
    return value != "" and "\0" not in value and value == value.encode("utf-8", "replace").decode()


def _path(value: str | Path) -> Path:
    """The path, `~` expanded; ValueError where no file could have that name."""
    try:
        path = Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long; no such user
        raise ValueError from error
    return path


def problems_of(config: Any) -> list[str]:
    """What cannot work, in words.  Gives every field of a frozen `config` its declared type in place.

    Numbers must be finite: NaN passes every comparison that is meant to catch it."""
    problems, rules = [], config.RULES
    for setting in settings_of(config.__class__):
        value = getattr(config, setting.name)
        try:
            value = coerce(value, setting.type)
        except ValueError:
            problems.append(wrong_type(setting, value))
            rules = ()  # they compare values of the right type
            continue
        object.__setattr__(config, setting.name, value)
        problems += out_of_range(setting, value)
    return problems + [problem for rule in rules for problem in rule(config)]


def out_of_range(setting: Setting, value: Any) -> list[str]:
    """What is wrong with a value of the right type, by its field's own range."""
    if setting.range is None or value is None or setting.range.holds(value):
        return []
    return [f"{setting.name}: expected {setting.range}, got {value}; {setting.range.remedy}"]


def wrong_type(setting: Setting, value: Any) -> str:
    """What is wrong with a value that `coerce` does not take."""
    wanted = describe(setting.type)
    if isinstance(value, int) and abs(value) >= 2**63:  # Python does not write integers of 4300 digits at all
        return f"{setting.name}: expected {wanted}, got an integer of {value.bit_length()} bits; take a smaller one"
    if str(value).lower().strip("+-.") in ("nan", "inf", "infinity"):
        wanted = wanted.replace("a number", "a finite number")
    if "a number" in wanted and _is_too_large(value):
        wanted, got = wanted.replace("a number", "a number of at most 1.8e308"), str(value)
        return f"{setting.name}: expected {wanted}, got {shown(got)}; default: {in_yaml(setting.default)}"
    nearest = nearest_choice(str(value)[:80], [str(choice) for choice in choices(setting.type)])
    remedy = f"did you mean {nearest}?" if nearest else f"default: {in_yaml(setting.default)}"
    remedy = remedy_of_value(setting.name, value.split() if isinstance(value, str) else value) or remedy
    kind = "" if isinstance(value, str) else f" ({type(value).__name__})"  # the quotes of a text say so
    return f"{setting.name}: expected {wanted}, got {shown(value)}{kind}; {remedy}"


def nearest_choice(value: str, allowed: Sequence[str]) -> str | None:
    """The choice that is most likely meant: the one of most letters all of whose words are among the value's, else one
    spelt like it; None where nothing is near.

    >>> nearest_choice("NVIDIA A100-SXM4-80GB", ["a100-40gb", "a100"])
    'a100'
    """

    def words(text: str) -> list[str]:
        return re.findall("[a-z0-9]+", text.lower())

    def plain(text: str) -> str:
        return "".join(words(text))

    said = words(value)
    said += [first + second for first, second in itertools.pairwise(said)]  # RTX 4090
    inside = [choice for choice in allowed if words(choice) and set(words(choice)) <= set(said)]
    same = [choice for choice in allowed if plain(choice) == plain(value)]
    near = difflib.get_close_matches(plain(value), [plain(choice) for choice in allowed], n=1)
    found = same or sorted(inside, key=len)[-1:] or [choice for choice in allowed if plain(choice) in near]
    return found[0] if found else None


def _is_too_large(value: Any) -> bool:
    """`1e400`: a number to people, infinity to a computer."""
    try:
        return "inf" not in str(value).lower() and math.isinf(float(str(value)))
    except ValueError:
        return False


def unknown_name(name: str, config_type: type) -> str:
    """What to say about a name that `config_type` lacks: its name here, or the nearest one."""
    known = [setting.name for setting in settings_of(config_type)]
    renamed: Mapping[str, str] = getattr(config_type, "RENAMED", {})
    name = name if len(name) <= 80 else f"{name[:77]}..."
    if (remedy := remedy_of(name.replace("-", "_"), renamed)) is not None:
        return f"{name}: expected a setting's name, got one that is unknown here; {remedy}"
    nearest = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all settings"
    return f"{name}: expected a setting's name, got an unknown setting; {hint}"


def in_yaml(value: Any) -> str:
    """`value` in YAML on one line."""
    if isinstance(value, tuple):
        value = list(value)
    plain = str(value) if isinstance(value, Path) else value
    dumped = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**9)
    return dumped.removesuffix("\n").removesuffix("\n...")
