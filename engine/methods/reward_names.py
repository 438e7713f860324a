"""A user's reward functions, looked at without running them: the file, its syntax, the function, its imports."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ..errors import kind_of, shown
from ..settings.reward_specs import is_address, reward_name, server_problem, split_spec
from ..settings.rules import SCORER_ADDRESS, address_problem

FORM = "[adapter@]package.module:function or [adapter@]path/to/file.py:function"


def reward_problems(setting: str, specs: Sequence[str], built_in: Collection[str]) -> list[str]:
    """What is wrong with the rewards that a setting names, in words.

    Args:
        setting: whose values they are.
        specs: names of rewards, and places of functions.
        built_in: names that need no place.
    """
    found = (_problem(spec, built_in) for spec in specs if spec not in built_in)
    return [f"{setting}: {problem}" for problem in found if problem]


def _problem(spec: str, built_in: Collection[str]) -> str:
    before, target = split_spec(spec)
    if is_address(target):
        address = target.partition("#")[0]
        problem = server_problem(before, target) or address_problem(address, form=SCORER_ADDRESS)
        return f"{problem} (reward {reward_name(spec)!r})" if problem else ""  # not the address: it may hold a secret
    where, colon, attribute = target.rpartition(":")
    if not colon or not where or not attribute:
        near = difflib.get_close_matches(spec, built_in, n=1)
        remedy = f"did you mean {near[0]}?" if near else "docs/rewards.md has examples"
        names = f"one of {', '.join(built_in)}, or {FORM}" if built_in else FORM
        return f"expected {names}, got {shown(spec)}; {remedy}"
    path = _file_of(where)
    if isinstance(path, str):
        return f"expected a file or module with {attribute}, got {shown(spec)}: {path}"
    return "" if path is None else _source_problem(spec, path, attribute.removesuffix("()").split(".")[0])


def _file_of(where: str) -> Path | str | None:
    """The source behind a place; words where there is none, None where only importing it would tell."""
    if where.endswith(".py"):
        path = Path(where).expanduser()
        if path.is_file():
            return path
        if path.exists():
            return f"{path} is {kind_of(path)}; name the file in it that defines the function"
        near = _near(path)
        return f"no file {path}; {f'did you mean {near}?' if near else 'a path is relative to the working directory'}"
    first, *more = where.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return f"no module {first!r}; install it, put its folder on PYTHONPATH, or give the file, path/to/{first}.py"
    if not more:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        inside = Path(folder, *more)
        for path in (inside.with_suffix(".py"), inside / "__init__.py"):
            if path.is_file():
                return path
    return None


def _near(path: Path) -> str:
    """A Python file beside the one that is not there, with a name like its."""
    names = [other.name for other in path.parent.glob("*.py") if other.is_file()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.with_name(near[0])) if near else ""


def _source_problem(spec: str, path: Path, attribute: str) -> str:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        line = f"line {error.lineno}" if error.lineno else "a line"
        return f"expected Python in {path}, got {error.msg} at {line}; correct it"
    except (OSError, ValueError, RecursionError) as error:
        return f"expected Python in {path}, got a file that cannot be read ({error}); correct it"
    names, all_known = _defined(tree.body)
    if attribute not in names and all_known:
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        near = difflib.get_close_matches(attribute, functions, n=1)
        listed = f"it has {', '.join(functions[:10])}" if functions else "it defines no function"
        remedy = f"did you mean {near[0]}?" if near else listed
        return f"expected {attribute} in {path}, got {shown(spec)}, which is not defined there; {remedy}"
    absent = [name for name in _imported(tree.body) if not _is_there(name, path.parent)]
    if absent:
        return f"expected what {path} imports, got no module {absent[0]!r}; run `pip install {absent[0]}`"
    return ""


def _defined(body: Sequence[ast.stmt]) -> tuple[set[str], bool]:
    """Names that a module has once it has run, and whether those are all."""
    names, all_known = set[str](), True
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                all_known &= alias.name != "*"
                names.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        elif not isinstance(node, ast.Expr):  # if, try, with, for: what they define depends on how they go
            all_known = False
    used = {part.id for part in ast.walk(ast.Module(list(body), [])) if isinstance(part, ast.Name)}
    return names, all_known and "__getattr__" not in names and not used & {"globals", "exec", "setattr", "vars"}


def _imported(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Top modules that running the file imports at once; those within `try` and `if` it may do without."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def _is_there(name: str, folder: Path) -> bool:
    """A module that can be imported, or (the function may put its folder on the path) one beside the file."""
    if name in sys.modules or name in sys.stdlib_module_names:
        return True
    try:
        return importlib.util.find_spec(name) is not None or any(folder.glob(f"{name}*"))
    except (ImportError, ValueError):
        return True
