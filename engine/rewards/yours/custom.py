"""Reward functions of a user's own, by name: `package.module:function`, `path/to/file.py:function`, `adapter@…`.

Naming a file runs it, as `python file.py` would: name only files that you trust.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import ConfigError, IsolatedError, RewardSpecError, shown
from ...settings.reward_specs import is_address, reward_name
from ..ensemble import Column
from ..reward import RewardFunction
from ..torch_state import torch_left_alone
from .adapters import ADAPTERS
from .isolated import IsolatedReward
from .remote import BUDGET, RemoteReward

ISOLATED = "isolated"
FORM = "expected [adapter@]package.module:function or [adapter@]path/to/file.py:function"


def own_column(spec: str, function: RewardFunction, weight: float, otherwise: str) -> Column:
    """What `load_reward` made of `spec`, as one of a set; `otherwise`: what it judges where its `kind` does not say.

    Raises:
        ConfigError: it judges neither texts nor images.
    """
    kind = str(getattr(function, "kind", otherwise))
    if kind not in ("text", "image"):
        raise ConfigError(
            f"reward_funcs: expected 'text' or 'image' as the kind of {spec}, got {shown(kind)}; set its `kind`"
        )
    return Column(reward_name(spec), function, weight, kind)


def load_reward(spec: str, *, budget: float = BUDGET) -> RewardFunction:
    """The reward function that `spec` names.

    A class is made into an object without arguments, and so is what stands before `()`: the result of a call without
    arguments, for functions that make reward functions. `adapter@` wraps one of another codebase, see `ADAPTERS`;
    `isolated@` runs it in a process of its own, and may stand before another adapter. Before an address the codebase is
    the one whose protocol the server there speaks, see `RemoteReward`.

    Args:
        spec: e.g. `my_rewards.py:brightness`, `my_package.rewards:Likeness`, `verl@scores.py:compute_score`,
            `unirl@http://127.0.0.1:8080#pickscore`.
        budget: seconds that a server has for a step.

    Raises:
        RewardSpecError: of another form, nothing there, an import that fails, or something that cannot be called.
    """
    adapter, found, target = spec.partition("@")
    if not (found and adapter.isidentifier()):  # else the mark belongs to a path, ./a@b/file.py
        adapter, target = "", spec
    if adapter == ISOLATED:
        try:
            return IsolatedReward(target)
        except IsolatedError as error:
            raise RewardSpecError(f"in a process of its own: {error}") from None
    if is_address(target):
        return RemoteReward(spec, budget=budget)
    if adapter and adapter not in ADAPTERS:
        known = ", ".join([*ADAPTERS, ISOLATED])
        raise RewardSpecError(f"reward {spec!r}: unknown adapter {adapter!r}; known: {known}")
    where, _, attribute = target.rpartition(":")
    makes = attribute.endswith("()")
    attribute = attribute.removesuffix("()")
    if not where or not attribute:
        raise RewardSpecError(f"reward {spec!r}: {FORM}")
    with torch_left_alone():
        value = _found(spec, where, attribute, makes)
    if not callable(value):
        raise RewardSpecError(
            f"reward {spec!r}: {attribute!r} is a {type(value).__name__}, which cannot be called; name a function, "
            "a class or an object with __call__"
        )
    return ADAPTERS[adapter](value) if adapter else value


def _found(spec: str, where: str, attribute: str, makes: bool) -> Any:
    """What `attribute` of a file or module is; `makes`, or a class: what calling it gives."""
    value: Any = _load_file(spec, where) if where.endswith(".py") else _load_module(spec, where)
    for part in attribute.split("."):
        if not hasattr(value, part):
            members = getattr(value, "__dict__", {})
            names = [name for name, item in members.items() if callable(item) and not name.startswith("_")]
            known = f"; it has: {', '.join(names[:20])}" if names else ""
            raise RewardSpecError(f"reward {spec!r}: {where} has no {attribute!r}{known}")
        value = getattr(value, part)
    return _made(spec, value) if makes or inspect.isclass(value) else value


def _made(spec: str, maker: Any) -> Any:
    try:
        inspect.signature(maker).bind()
    except TypeError as error:
        raise RewardSpecError(
            f"reward {spec!r}: it is made without arguments, and it wants some ({error}); write a function that "
            "makes it, and name that: file.py:make()"
        ) from None
    except ValueError:
        pass  # a builtin without a signature: the call itself will tell
    try:
        return maker()
    except Exception as error:
        raise RewardSpecError(f"reward {spec!r}: making it failed with {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise RewardSpecError(
            f"reward {spec!r}: expected what makes it to give a reward back, got one that ends the program (exit "
            f"{error.code}); have it raise an error, and read no command line"
        ) from error


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            remedy = f"install it, put its folder on PYTHONPATH, or give the file: path/to/{name.split('.')[-1]}.py:…"
            raise RewardSpecError(f"reward {spec!r}: no module {error.name!r}; {remedy}") from None
        raise RewardSpecError(f"reward {spec!r}: {name} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise RewardSpecError(
            f"reward {spec!r}: importing {name} failed with {type(error).__name__}: {error}"
        ) from error
    except SystemExit as error:
        raise _exits(spec, name, error) from error


def _exits(spec: str, what: str, error: SystemExit) -> RewardSpecError:
    """A script that reads its own command line, say: it would end the run without a word."""
    return RewardSpecError(
        f"reward {spec!r}: expected {what} to define its functions, got one that ends the program (exit "
        f'{error.code}); put what it does behind `if __name__ == "__main__":`'
    )


def _load_file(spec: str, where: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise RewardSpecError(f"reward {spec!r}: no file {path}; a path is relative to the working directory")
    # A name of its own, so that two files called rewards.py do not replace each other; loaded once per process.
    name = f"syncr1_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise RewardSpecError(f"reward {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardSpecError(f"reward {spec!r}: running {path} failed with {type(error).__name__}: {error}") from error
    except SystemExit as error:
        del sys.modules[name]
        raise _exits(spec, str(path), error) from error
    return module
