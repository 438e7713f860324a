"""launch.py: what `--nodes` becomes in every environment, and that it never becomes less than was asked for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers import ROOT, environment

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.processes import launch as launch_file
from syncr1.engine.processes.hosts import Host
from syncr1.engine.processes.launch import (
    Request,
    count_gpus,
    decide,
    first_host,
    host_commands,
    launch,
    restarted,
)
from syncr1.engine.processes.run_folder import unused_folder

RECIPE = ROOT / "recipes" / "sync_r1.py"
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "gpu[03-06]",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "32",
}
TASK = SLURM | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-06]",
    "SLURMD_NODENAME": "gpu05",
}


def request(nodes: int | None = None, ranks: int | None = None, **more: object) -> Request:
    config = SyncR1Config(nodes=nodes, ranks_per_node=ranks)
    return replace(Request.of(config, RECIPE, ["--seed", "it's 1"]), **more)  # type: ignore[arg-type]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\nc slots=2\n")
    return tmp_path / "hosts"


@pytest.fixture(autouse=True)
def _no_usual_hostfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch_file, "DEFAULT_HOSTFILE", tmp_path / "job" / "hostfile")
    for name in set(os.environ) - set(environment()):  # what a test that trained in this process has left
        monkeypatch.delenv(name)


# The decision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "ranks", "environ", "how", "total"),
    [
        (None, None, {}, "here", (1, 1)),
        (1, 1, {}, "here", (1, 1)),
        (1, 4, {}, "torchrun", (1, 4)),
        (None, 4, {}, "torchrun", (1, 4)),
        (1, None, {"CUDA_VISIBLE_DEVICES": "0,1"}, "torchrun", (1, 2)),
        (None, None, {"CUDA_VISIBLE_DEVICES": "0,1"}, "here", (1, 1)),
        (None, None, TORCHRUN, "rank", (4, 16)),
        (4, None, TORCHRUN, "rank", (4, 16)),
        (4, 4, TORCHRUN, "rank", (4, 16)),
        (2, None, {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_SIZE": "8", "CROSS_SIZE": "2"}, "rank", (2, 16)),
        (2, None, {"RANK": "0", "WORLD_SIZE": "2"}, "rank", (2, 2)),
        (4, None, TORCHRUN | SLURM, "rank", (4, 16)),
        (4, None, SLURM, "srun", (4, 32)),
        (2, 3, SLURM, "srun", (2, 6)),
        (4, None, SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, "srun", (4, 32)),
        (4, None, TASK, "srun_task", (4, 32)),
        (None, None, SLURM, "here", (1, 1)),
    ],
)
def test_how_a_run_starts(
    nodes: int | None, ranks: int | None, environ: dict[str, str], how: str, total: tuple[int, int]
) -> None:
    start = decide(request(nodes, ranks), environ)
    assert (start.how, (start.nodes, start.ranks)) == (how, total)


@pytest.mark.parametrize(
    ("nodes", "ranks", "environ", "words"),
    [
        (4, None, {}, "sbatch --nodes=4"),
        (2, None, TORCHRUN, "--nnodes=2"),
        (1, None, TORCHRUN, "expected 4, as torchrun started"),
        (None, 8, TORCHRUN, "--nproc-per-node=8"),
        (8, None, SLURM, "sbatch --nodes=8"),
        (4, None, TASK | {"SLURM_STEP_NUM_TASKS": "8"}, "--ntasks-per-node=1"),
        (2, None, TASK, "--nodes=2"),
        (None, None, TASK, "srun started 4 copies"),
        (4, None, TASK | {"SLURM_STEP_NODELIST": "$(x)"}, "expected a host name"),
    ],
)
def test_what_cannot_be_had_is_refused(
    nodes: int | None, ranks: int | None, environ: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        decide(request(nodes, ranks), environ)


def test_a_hostfile(hostfile: Path) -> None:
    start = decide(request(2, hostfile=hostfile), {})
    assert (start.how, start.nodes, start.ranks) == ("hosts", 2, 16) and start.hosts == (Host("a", 8), Host("b", 8))
    assert decide(request(hostfile=hostfile), {}).ranks == 18
    assert decide(request(3, 2, hostfile=hostfile), {}).ranks == 6
    assert decide(request(2, hostfile=hostfile), SLURM).how == "hosts"  # what is given by name goes first
    assert decide(request(4, hostfile=hostfile), TORCHRUN).how == "rank"
    with pytest.raises(ConfigError, match="at most 3"):
        decide(request(4, hostfile=hostfile), {})


def test_the_usual_hostfile(hostfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(request(2), {"SYNCR1_HOSTFILE": str(hostfile)}).how == "hosts"
    monkeypatch.setattr(launch_file, "DEFAULT_HOSTFILE", hostfile)
    assert decide(request(2), {}).how == "hosts" and decide(request(), {}).how == "here"
    assert decide(request(2), SLURM).how == "srun"
    with pytest.raises(ConfigError, match="hostfile: expected a text file"):
        decide(request(2), {"SYNCR1_HOSTFILE": str(hostfile.parent / "absent")})


names = st.sampled_from([*TORCHRUN, *TASK, "CROSS_SIZE", "CUDA_VISIBLE_DEVICES"])
values = st.sampled_from(["0", "1", "2", "4", "8", "", "x", "0,1", "n[1-4]", "-1"])


@hypothesis.given(st.dictionaries(names, values, max_size=8), st.integers(2, 8), st.sampled_from([None, 1, 2]))
def test_several_nodes_never_become_one(environ: dict[str, str], nodes: int, ranks: int | None) -> None:
    """Whatever the environment says: as many nodes as asked for, or a refusal."""
    try:
        start = decide(request(nodes, ranks), environ)
    except ConfigError:
        return
    assert start.nodes == nodes and start.ranks >= nodes and start.how in ("rank", "srun", "srun_task")


# Commands -------------------------------------------------------------------------------------------------------------


def flags_of(command: list[str] | tuple[str, ...]) -> dict[str, str]:
    return dict(part[2:].split("=", 1) for part in command if part.startswith("--") and "=" in part)


def test_nothing_is_started_without_nodes_and_the_commands_can_be_pasted() -> None:
    """Exit code 2, at once; the shell reads the three commands back as they are meant."""
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--nodes", "4", "--output_dir", "a b;c"],
        cwd=ROOT,
        text=True,
        env=environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "loading torch" not in done.stdout and "Traceback" not in done.stderr
    lines = [line.strip() for line in done.stderr.splitlines()]
    program = [str(RECIPE), "--nodes", "4", "--output_dir", "a b;c"]
    (sbatch,) = (shlex.split(line) for line in lines if line.startswith("sbatch "))
    assert shlex.split(flags_of(sbatch)["wrap"])[2:] == program and flags_of(sbatch)["nodes"] == "4"
    (torchrun,) = (shlex.split(line) for line in lines if line.partition(" ")[0].endswith("torchrun"))
    assert torchrun[-len(program) :] == program
    flags = flags_of(torchrun)
    assert (flags["nnodes"], flags["rdzv-backend"]) == ("4", "c10d")
    assert re.fullmatch(r".+:\d+", flags["rdzv-endpoint"])
    (by_hostfile,) = (line for line in lines if line.startswith("printf "))
    made = subprocess.run(["sh", "-c", by_hostfile.partition(" > ")[0]], capture_output=True, text=True, check=True)
    assert made.stdout == "".join(f"host{number} slots=1\n" for number in range(1, 5))
    assert shlex.split(by_hostfile.rpartition("&& ")[2])[1:] == [*program, "--hostfile", "hostfile"]


def test_torchrun_takes_the_command_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own parser reads the flags of every node's command."""
    from torch.distributed.run import parse_args

    commands = host_commands(request(2), (Host("u@a", 8), Host("b", 4)), 20000, "run-1")
    for index, command in enumerate(commands):
        parsed = parse_args(command[3:])
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", ("8", "4")[index], 0)
        assert parsed.rdzv_endpoint == "a:20000" and parsed.local_addr == "ab"[index] and parsed.rdzv_id == "run-1"
        assert f"is_host={('true', 'false')[index]}" in parsed.rdzv_conf
        assert [parsed.training_script, *parsed.training_script_args] == [str(RECIPE), "--seed", "it's 1"]


def test_srun_starts_one_task_per_node_which_becomes_torchrun() -> None:
    start = decide(request(4), SLURM)
    flags = flags_of(start.command)
    assert start.command[0] == "srun" and start.command[-4:] == (sys.executable, str(RECIPE), "--seed", "it's 1")
    assert (flags["nodes"], flags["ntasks"], flags["ntasks-per-node"], flags["cpus-per-task"]) == ("4", "4", "1", "32")
    task = flags_of(decide(request(4), TASK).command)
    head = flags_of(decide(request(4), TASK | {"SLURM_NODEID": "0", "SLURMD_NODENAME": "gpu03"}).command)
    assert task["rdzv-endpoint"] == head["rdzv-endpoint"] and task["rdzv-endpoint"].startswith("gpu03:")
    assert task["rdzv-id"] == head["rdzv-id"] and task["max-restarts"] == "3" and task["local-addr"] == "gpu05"
    assert "is_host=true" in head["rdzv-conf"] and "is_host=false" in task["rdzv-conf"]
    other = flags_of(decide(request(4), TASK | {"SLURM_JOB_ID": "78"}).command)
    assert other["rdzv-endpoint"] != task["rdzv-endpoint"] and other["rdzv-id"] != task["rdzv-id"]


@pytest.mark.parametrize(
    ("names", "first"),
    [("gpu[03-06,9],x", "gpu03"), ("a,b", "a"), ("r[1-2]n[4,7]", "r1n4"), ("n7", "n7"), ("a[5]-ib,b", "a5-ib")],
)
def test_first_of_slurms_hosts(names: str, first: str) -> None:
    assert first_host(names) == first


def test_gpus_are_counted_without_torch() -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "2,3,5"}) == 3
    assert count_gpus({"SLURM_GPUS_ON_NODE": "8"}) == 8
    assert count_gpus({}) >= 1


def test_the_example_of_a_batch_job_starts_all_of_its_nodes(tmp_path: Path) -> None:
    """bash runs it with a stand-in for the environment's python that tells its arguments."""
    script = (ROOT / "examples" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, re.MULTILINE))
    assert options["nodes"] == "4" and options["ntasks-per-node"] == "1" and "requeue" in options
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    environ = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_ID": "77",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm.sbatch"), "--seed", "a b"],
        env=environ,
        text=True,
        capture_output=True,
        check=True,
    )
    arguments = done.stdout.splitlines()
    assert arguments[:3] == ["recipes/sync_r1.py", "--nodes", "4"] and arguments[-2:] == ["--seed", "a b"]
    assert "runs/sync_r1-77" in arguments and options["signal"].startswith("USR1@")
    # Asked to stop before its time is up, it saves, ends with 75 and queues up again.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho scontrol "$@"\n')
    scontrol.chmod(0o755)
    python.write_text("#!/bin/sh\nexit 75\n")
    job = ["bash", str(ROOT / "examples" / "slurm.sbatch")]
    again = subprocess.run(
        job, text=True, capture_output=True, check=False, env=environ | {"PATH": f"{tmp_path}:{environ['PATH']}"}
    )
    assert (again.returncode, again.stdout) == (75, "scontrol requeue 77\n")


# Starting -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the process would have become."""
    commands: list[tuple[str, ...]] = []

    def execvp(name: str, command: tuple[str, ...]) -> None:
        assert name == command[0]
        commands.append(tuple(command))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvp", execvp)
    for name in (*TORCHRUN, *TASK, "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_a_runs_folder_is_named_before_it_starts(become: list[tuple[str, ...]], tmp_path: Path) -> None:
    """So that ranks which start again find this run's checkpoints, not those of an older run in output_dir."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = SyncR1Config(ranks_per_node=2, output_dir=tmp_path / "run")
    with pytest.raises(SystemExit):
        launch(config, RECIPE, ["--ranks_per_node", "2"])
    (command,) = become
    assert command[-2:] == ("--output_dir", str(tmp_path / "run-2"))
    assert unused_folder(tmp_path / "run") == tmp_path / "run-2" and unused_folder(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(SystemExit):
        launch(replace(config, resume_from_checkpoint="latest"), RECIPE, [])
    assert "--output_dir" not in become[-1]


def test_started_again() -> None:
    assert not restarted({}) and not restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert restarted({"SLURM_RESTART_COUNT": "2"}) and restarted({"TORCHELASTIC_RESTART_COUNT": "1"})


def test_a_dry_run_starts_nothing(become: list[tuple[str, ...]]) -> None:
    config = SyncR1Config(nodes=4, dry_run=True)
    assert launch(config, RECIPE, []) is config and become == []


def test_srun_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        launch(SyncR1Config(nodes=4, prompts_per_step=32, output_dir=tmp_path / "run"), RECIPE, ["--nodes", "4"])
    assert caught.value.code == 2 and "srun is not on this machine's PATH" in capsys.readouterr().err


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'numpy', 'transformers'}"
    code = f"import sys, syncr1.engine.processes.launch; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_start_is_told_to_people(hostfile: Path) -> None:
    starts = [
        decide(request(3, hostfile=hostfile), {}),
        decide(request(4), SLURM),
        decide(request(), SLURM),
    ]
    assert [start.words for start in starts] == [
        f"18 ranks on 3 nodes from {hostfile}: a, b, c",
        "4 nodes of Slurm's job 77, 8 ranks each",
        "one process on this machine of the 4 that Slurm allocated; --nodes 4 takes all",
    ]
