"""hosts.py: DeepSpeed's hostfile read strictly, and commands that no host name can bend."""

from __future__ import annotations

import shlex
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers import ROOT

from syncr1.engine.errors import ConfigError
from syncr1.engine.processes.hosts import Host, check_host, executor, parse_hostfile, read_hostfile

HOSTILE = [
    *(
        "-oProxyCommand=touch x",
        "a;b",
        "a b",
        "$(reboot)",
        "`id`",
        "a\nb",
        "a'b",
        'a"b',
        "a|b",
        "a&b",
        "../a",
        "",
        "a/b",
    ),
    *("a.", "-a", "@a", "u@", "u@@a", "u@-a", "a:22", "[::1]", "ä", "a" * 300, "a\x00b", "{host}"),
]


def test_hosts_comments_and_blank_lines() -> None:
    text = "# the cluster\n\nworker-1 slots=8\n  user@10.0.0.2\tslots=4  # the small one\r\n"
    assert parse_hostfile(text) == (Host("worker-1", 8), Host("user@10.0.0.2", 4))
    assert [host.address for host in parse_hostfile(text)] == ["worker-1", "10.0.0.2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "expected `name slots=n`"),
        ("a slots=", "expected `name slots=n`"),
        ("a slots=-1", "expected `name slots=n`"),
        ("a slots=2 b slots=2", "expected `name slots=n`"),
        ("a slots=0", "at least 1 slot"),
        ("a slots=1\nb slots=1\na slots=2", "line 3: a comes twice"),
        ("a slots=1\nu@a slots=2", "comes twice"),
        ("a slots=99999", "expected `name slots=n`"),
        ("a;b slots=1", "expected a host name"),
        ("# none\n", "got none"),
        ("", "got none"),
    ],
)
def test_refused_lines(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_hostfile(text)


def test_files_that_are_no_hostfile(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a slots=1")
    (tmp_path / "large").write_text("#" * (1 << 21))
    for name in ("absent", "binary", "large", "."):
        with pytest.raises(ConfigError, match="hostfile:"):
            read_hostfile(tmp_path / name)
    (tmp_path / "good").write_text("a slots=2\n")
    assert read_hostfile(tmp_path / "good") == (Host("a", 2),)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a host name"):
        check_host(name)
    for launcher in ("ssh", "ip netns exec {host}"):
        with pytest.raises(ConfigError, match="expected a host name"):
            executor(launcher, Host(name, 1), ["true"])


@hypothesis.given(st.text(max_size=40))
def test_any_text_is_hosts_or_a_config_error(text: str) -> None:
    try:
        hosts = parse_hostfile(text)
    except ConfigError:
        return
    assert hosts and all(host.slots >= 1 and shlex.quote(host.address) == host.address for host in hosts)


def test_the_example_is_a_hostfile() -> None:
    assert [host.slots for host in read_hostfile(ROOT / "examples" / "hostfile")] == [8, 8, 8, 8]


def test_ssh_gets_one_line_that_its_shell_reads_back() -> None:
    command = ["/a b/python", "-m", "x", "it's; rm -rf $HOME"]
    made = executor("ssh", Host("user@node-1", 8), command)
    assert made[0] == "ssh" and made[-3:-1] == ["--", "user@node-1"] and "BatchMode=yes" in made
    assert shlex.split(made[-1]) == ["exec", *command]


def test_a_command_of_your_own() -> None:
    made = executor("ip netns exec 'a {host}'", Host("u@n1", 1), ["x y", "z"])
    assert made == ["ip", "netns", "exec", "a u@n1", "x y", "z"]
    for launcher in ("rsh", "{host}", "ip netns 'exec {host}", "", "sudo ssh"):
        with pytest.raises(ConfigError, match="launcher"):
            executor(launcher, Host("n1", 1), ["x"])
