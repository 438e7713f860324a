"""The machines of a run: DeepSpeed's hostfile, read strictly, and how a command reaches each of them.

    # comment
    worker-1 slots=8
    worker-2 slots=8

Nothing of a host's name, of the run's flags or of the environment ever passes through a shell that could read it
otherwise: names are checked here, and all else travels to the node's agent (nodes.py) over its standard input.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, kind_of

DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed looks."""
MAX_BYTES = 1 << 20

_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,31}@)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[0-9]{1,4})")
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=30", "ServerAliveInterval=15", "ServerAliveCountMax=4")
_SSH = ("ssh", *(word for option in _OPTIONS for word in ("-o", option)))


@dataclass(frozen=True, slots=True)
class Host:
    """A machine and how many processes it takes."""

    name: str
    """As the launcher reaches it; `user@name` is allowed."""
    slots: int

    @property
    def address(self) -> str:
        """As the other machines reach it."""
        return self.name.rpartition("@")[2]


def check_host(name: str) -> str:
    """`name` if it is a host's name or IPv4 address, perhaps with a user; ConfigError for anything else."""
    if not _HOST.fullmatch(name):
        raise ConfigError(
            f"hostfile: expected a host name or IPv4 address (letters, digits, dots, dashes), got {name!r}; rename it"
        )
    return name


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts in the file's order.

    Raises ConfigError for a file that is not there, a line that is not `name slots=n`, a name that comes twice, a count
    of 0, and a file without hosts.
    """
    expected = f"hostfile: expected a text file with lines `name slots=n`, got {path},"
    if not path.is_file():
        raise ConfigError(f"{expected} {kind_of(path)}; correct the path")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{expected} which is over {MAX_BYTES} bytes; correct the path")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{expected} which cannot be read ({error.strerror}); change its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{expected} which holds other bytes than UTF-8; correct the path") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, where: str = "hostfile") -> tuple[Host, ...]:
    """`read_hostfile` of a text; `where` names it in errors."""
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.split("\n"), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = _LINE.fullmatch(content)
        if found is None:
            words = len(content.split())  # not shown: the file may be one of somebody's keys
            got = (
                f"a line of {words} word{'s' * (words != 1)} without slots="
                if "slots=" not in content
                else "another form"
            )
            raise ConfigError(
                f"{where}, line {number}: expected `name slots=n`, got {got}; correct the line or the path"
            )
        host = Host(check_host(found["name"]), int(found["slots"]))
        if host.slots == 0:
            raise ConfigError(f"{where}, line {number}: expected at least 1 slot, got 0; leave {host.name} out")
        if host.address in hosts:
            raise ConfigError(f"{where}, line {number}: {host.address} comes twice; give it one line with all slots")
        hosts[host.address] = host
    if not hosts:
        raise ConfigError(f"{where}: expected a line `name slots=n` per machine, got none")
    return tuple(hosts.values())


def check_launcher(launcher: str) -> list[str]:
    """The words of a launcher's command; ConfigError for one that cannot work."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(f"launcher: cannot read {launcher!r} as a command: {error}") from error
    if words != ["ssh"] and not any("{host}" in word for word in words[1:]):
        raise ConfigError(
            f"launcher: expected ssh, or a command with {{host}} in it, as `ip netns exec {{host}}`, got {launcher!r}"
        )
    return words


def executor(launcher: str, host: Host, command: Sequence[str]) -> list[str]:
    """What runs `command` on `host`: through ssh, or by a command of your own that takes it as its last words."""
    words = check_launcher(launcher)
    if words == ["ssh"]:
        # The far side's shell reads one line; `--` keeps a name from being read as an option.
        return [*_SSH, "--", check_host(host.name), shlex.join(["exec", *command])]
    return [*(word.replace("{host}", check_host(host.name)) for word in words), *command]
