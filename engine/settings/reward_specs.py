"""What `reward_funcs` names: `[codebase@]place:function`, or `codebase@address#name` of a reward server.

Read before anything heavy is loaded: by the settings' rules, the checks before a run and the loader.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

SERVERS = ("unirl", "verl_omni", "flow_grpo", "openrlhf")
"""Codebases whose reward servers' protocols are spoken."""


def split_spec(spec: str) -> tuple[list[str], str]:
    """What stands before the marks `@`, outermost first, and what behind them; a mark within a path is the path's."""
    before, target = list[str](), spec
    while (parts := target.partition("@"))[1] and parts[0].isidentifier():
        before.append(parts[0])
        target = parts[2]
    return before, target


def is_address(target: str) -> bool:
    """Whether it is a server's address, not the place of a function."""
    return target.partition("://")[0].lower() in ("http", "https") and "://" in target


def served_name(target: str) -> str:
    """What stands behind the # of an address: which reward of that server, "" for the only one."""
    return unquote(target.partition("#")[2])


def reward_name(spec: str) -> str:
    """The column's name: what stands behind the last colon, `brightness` for `verl@my.py:brightness`; of a server the
    name behind the #, else its host's."""
    target = split_spec(spec)[1]
    if is_address(target):
        try:
            host = urlsplit(target).hostname or "server"
        except ValueError:  # what the address's own check tells
            host = "server"
        return "_".join((served_name(target) or host).replace("/", " ").split())
    return spec.rpartition(":")[2].removesuffix("()")


def server_problem(before: list[str], target: str) -> str:
    """What is wrong with how a server is named, but for its address itself; "" where nothing is."""
    codebase = before[-1] if before else ""
    known = ", ".join(SERVERS)
    if codebase not in SERVERS:
        got = f"{codebase}@" if codebase else "none"
        return (
            f"expected the codebase whose protocol the server speaks before its address ({known}), got {got}; name it"
        )
    if codebase == "unirl" and not served_name(target):
        return "expected the server's name for the reward behind the address, got none; add it, as in #pickscore"
    return ""
