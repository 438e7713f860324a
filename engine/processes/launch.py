"""`--nodes 4` from any recipe: under torchrun, in a Slurm allocation, or over a hostfile; otherwise exit 2.

    torchrun has started this process       -> it is a rank: check that torchrun's nodes are the ones asked for
    --hostfile, or none of the others and a hostfile at its usual place
                                            -> an agent with torchrun on every host (nodes.py), watched from here
    a task of srun, one per node            -> this node's torchrun
    a shell or script in a Slurm allocation -> srun with one such task per node
    nothing of the kind                     -> exit 2 with the commands to paste; never a run on one machine instead

Ranks meet through torchrun's c10d rendezvous at the first host.  A run that was started again goes on from its last
checkpoint.  Nothing heavy is imported: all of this is over before torch is loaded.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from ..errors import ConfigError, Preempted, refuse
from .hosts import DEFAULT_HOSTFILE, Host, check_host, check_launcher, executor, read_hostfile
from .interrupts import preemptible
from .nodes import passed_environment, run_nodes
from .restarts import Restarts
from .run_folder import check_free, numbered, unused_folder

Config = TypeVar("Config")
How = Literal["here", "rank", "torchrun", "hosts", "srun", "srun_task"]
PORTS = range(15000, 30000)
"""For the rendezvous: below those that systems hand out by themselves."""
RENDEZVOUS_SECONDS = 600  # that the nodes wait for each other at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a run starts, decided from its settings and this process's environment."""

    how: How
    nodes: int
    ranks: int
    """Over all nodes; those of other machines are taken to be as many as here where nothing tells."""
    words: str
    """For people."""
    command: tuple[str, ...] = ()
    """What this process becomes: srun or torchrun."""
    hosts: tuple[Host, ...] = ()
    """Of a hostfile, with as many slots as they get ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the settings and the command line ask for."""

    recipe: Path
    argv: tuple[str, ...]
    nodes: int | None
    ranks_per_node: int | None
    hostfile: Path | None
    launcher: str
    max_restarts: int
    shutdown_timeout: int
    output_dir: Path | None = None
    """Where its checkpoints will be."""

    @classmethod
    def of(cls, config: Any, recipe: str | Path, argv: Sequence[str]) -> Request:
        """The part of a recipe's settings that says where it runs."""
        return cls(
            recipe=Path(recipe).resolve(),
            argv=tuple(argv),
            nodes=config.nodes,
            ranks_per_node=config.ranks_per_node,
            hostfile=config.hostfile,
            launcher=config.launcher,
            max_restarts=config.max_restarts,
            shutdown_timeout=config.shutdown_timeout,
            output_dir=_written_to(config),
        )

    def program(self) -> list[str]:
        return [str(self.recipe), *self.argv]

    def torchrun(self, nodes: int, ranks: int, restarts: int, *more: str) -> list[str]:
        """A node's torchrun; `more` says where nodes meet."""
        flags = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *more]
        watched = [f"--output_dir={self.output_dir}"] if restarts and self.output_dir else []
        return [sys.executable, "-m", "syncr1.engine.processes.torchrun", *watched, *flags, *self.program()]


def launch(config: Config, recipe: str | Path, argv: Sequence[str] | None = None) -> Config:
    """The settings with which this process runs the recipe itself, alone or as a rank; else it does not return.

    For nodes that cannot be had it prints what is wrong and what to do, and exits with code 2.
    """
    settings: Any = config
    if settings.dry_run:  # tells the plan instead
        return config
    try:
        request = Request.of(settings, recipe, sys.argv[1:] if argv is None else argv)
        start = decide(request, os.environ)
        resumes = settings.resume_from_checkpoint is not None
        if resumes and start.how != "rank":
            _check_free(settings)
        if start.how in ("here", "rank"):
            return config
        _check_shares(settings, start.ranks)
        print(f"syncr1: {start.words}", file=sys.stderr, flush=True)
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(request.shutdown_timeout)
        if not resumes and not restarted():
            start, request = _pinned(start, request, settings.output_dir)
        if start.how == "hosts":
            raise SystemExit(_run_on_hosts(request, start, _key_names(settings)))
        _become(start.command)
    except ConfigError as error:
        refuse(error, by_all=True)


def _written_to(config: Any) -> Path:
    """The folder of the run, or that of which it is a numbered neighbour."""
    asked: str | None = config.resume_from_checkpoint
    if asked in (None, "latest"):
        return Path(config.output_dir).absolute()
    named = Path(str(asked)).expanduser().absolute()
    return named.parent.parent if named.parent.name == "checkpoints" else named


def _check_free(config: Any) -> None:
    """Refuses to resume a run that still goes on, before anything is loaded."""
    folder = _written_to(config)
    runs = (
        numbered(folder, lambda run: (run / "config.yaml").is_file())
        if config.resume_from_checkpoint == "latest"
        else []
    )
    check_free(runs[0] if runs else folder)


def _check_shares(settings: Any, ranks: int) -> None:
    """Every rank takes as many prompts of a step; said by one process, before there are so many."""
    size = settings.prompts_per_step
    if size % ranks and getattr(settings, "stage", "all") in ("all", "unified"):
        raise ConfigError(
            f"prompts_per_step: expected a multiple of the {ranks} ranks, got {size}; take "
            f"{max(1, round(size / ranks)) * ranks}"
        )


def _become(command: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    try:
        os.execvp(command[0], list(command))
    except FileNotFoundError as error:
        raise ConfigError(
            f"nodes: expected {command[0]}, got none: {command[0]} is not on this machine's PATH; add it there, or "
            "start without nodes"
        ) from error


def _pinned(start: Start, request: Request, output_dir: Path) -> tuple[Start, Request]:
    """Names the run's folder now: after a restart, ranks must find the checkpoints of this run and of no older one."""
    more = ("--output_dir", str(unused_folder(output_dir)))
    return replace(start, command=(*start.command, *more)), replace(request, argv=(*request.argv, *more))


def restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """This process replaces one of a run that had begun: torchrun started it again, or Slurm its job."""
    return _count(environ, "TORCHELASTIC_RESTART_COUNT") > 0 or requeued(environ)


def requeued(environ: Mapping[str, str] = os.environ) -> bool:
    """Slurm has started this process's job again."""
    return _count(environ, "SLURM_RESTART_COUNT") > 0


def decide(request: Request, environ: Mapping[str, str]) -> Start:
    """How the run starts; ConfigError where it cannot start as asked.

    Args:
        request: what is asked for.
        environ: environment variables of this process.
    """
    check_launcher(request.launcher)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _as_rank(request, environ)
    wants_more = (request.nodes or 1) > 1 or request.hostfile is not None
    if request.nodes is None and not wants_more and _count(environ, "SLURM_STEP_NUM_TASKS") > 1:
        raise ConfigError(
            f"nodes: srun started {_count(environ, 'SLURM_STEP_NUM_TASKS')} copies of this program, each a run of "
            "its own; pass --nodes N with one task per node, or start one task"
        )
    if not wants_more:
        return _on_this_machine(request, environ)
    hostfile = request.hostfile
    if hostfile is None and "SLURM_JOB_ID" in environ:
        return _under_slurm(request, environ)
    if hostfile is None:
        usual = Path(environ.get("SYNCR1_HOSTFILE", DEFAULT_HOSTFILE))
        hostfile = usual if "SYNCR1_HOSTFILE" in environ or usual.is_file() else None
    if hostfile is not None:
        return _on_hosts(request, read_hostfile(hostfile), hostfile)
    raise ConfigError(_no_nodes(request, environ))


def _as_rank(request: Request, environ: Mapping[str, str]) -> Start:
    """torchrun and DeepSpeed's launcher tell the number of nodes; a plain rank is taken to be alone on its node."""
    world = _count(environ, "WORLD_SIZE")
    local = _count(environ, "LOCAL_WORLD_SIZE") or _count(environ, "LOCAL_SIZE") or 1
    nodes = _count(environ, "GROUP_WORLD_SIZE") or _count(environ, "CROSS_SIZE") or max(1, world // local)
    if request.nodes is not None and request.nodes != nodes:
        raise ConfigError(
            f"nodes: expected {nodes}, as torchrun started ({world} ranks), got {request.nodes}; start torchrun with "
            f"--nnodes={request.nodes}, or pass --nodes {nodes}"
        )
    if request.ranks_per_node is not None and request.ranks_per_node != local:
        raise ConfigError(
            f"ranks_per_node: expected {local}, as torchrun started, got {request.ranks_per_node}; start torchrun with "
            f"--nproc-per-node={request.ranks_per_node}, or leave --ranks_per_node out"
        )
    return Start(how="rank", nodes=nodes, ranks=world, words=f"a rank that torchrun started, one of {world}")


def _on_this_machine(request: Request, environ: Mapping[str, str]) -> Start:
    allocated = _count(environ, "SLURM_JOB_NUM_NODES")
    unused = f" of the {allocated} that Slurm allocated; --nodes {allocated} takes all" if allocated > 1 else ""
    if request.nodes is None and request.ranks_per_node is None:
        return Start(how="here", nodes=1, ranks=1, words=f"one process on this machine{unused}")
    ranks = request.ranks_per_node or count_gpus(environ)
    if ranks == 1:
        return Start(how="here", nodes=1, ranks=1, words=f"one process on this machine{unused}")
    command = request.torchrun(1, ranks, request.max_restarts, "--standalone")
    words = f"{ranks} ranks on this machine{unused}"
    return Start(how="torchrun", nodes=1, ranks=ranks, words=words, command=tuple(command))


def _on_hosts(request: Request, hosts: Sequence[Host], hostfile: Path) -> Start:
    nodes = len(hosts) if request.nodes is None else request.nodes
    if nodes > len(hosts):
        raise ConfigError(
            f"nodes: expected at most {len(hosts)}, the hosts in {hostfile}, got {nodes}; add hosts or lower --nodes"
        )
    chosen = tuple(Host(host.name, request.ranks_per_node or host.slots) for host in hosts[:nodes])
    ranks = sum(host.slots for host in chosen)
    names = ", ".join(host.name for host in chosen[:4]) + (", …" if nodes > 4 else "")
    words = f"{ranks} ranks on {nodes} nodes from {hostfile}: {names}"
    return Start(how="hosts", nodes=nodes, ranks=ranks, words=words, hosts=chosen)


def _under_slurm(request: Request, environ: Mapping[str, str]) -> Start:
    nodes = request.nodes or 1
    ranks = request.ranks_per_node or count_gpus(environ)
    tasks = _count(environ, "SLURM_STEP_NUM_TASKS")
    job = environ["SLURM_JOB_ID"]
    if tasks > 1:  # srun made copies of this program: this is one of them
        if tasks != nodes or _count(environ, "SLURM_STEP_NUM_NODES") != nodes:
            raise ConfigError(
                f"nodes: expected one task of srun on each of {nodes} nodes, got {tasks} tasks on "
                f"{_count(environ, 'SLURM_STEP_NUM_NODES')}; start srun with --nodes={nodes} --ntasks-per-node=1"
            )
        return _srun_task(request, environ, nodes, ranks)
    allocated = _count(environ, "SLURM_JOB_NUM_NODES") or _count(environ, "SLURM_NNODES")
    if allocated < nodes:
        raise ConfigError(
            f"nodes: expected at most {allocated}, what Slurm allocated to job {job}, got {nodes}; ask for more:\n"
            f"  {_sbatch(request, nodes, ranks)}"
        )
    # srun stopped inheriting the script's --cpus-per-task in Slurm 22.05; a task would get one core.
    cores = environ.get("SLURM_CPUS_PER_TASK")
    more = [f"--cpus-per-task={cores}"] if cores and cores.isdigit() else []
    flags = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *more]
    command = ["srun", *flags, sys.executable, *request.program()]
    words = f"{nodes} nodes of Slurm's job {job}, {ranks} ranks each"
    return Start(how="srun", nodes=nodes, ranks=nodes * ranks, words=words, command=tuple(command))


def _srun_task(request: Request, environ: Mapping[str, str], nodes: int, ranks: int) -> Start:
    """This node's torchrun; the step's first host keeps the rendezvous."""
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    head = first_host(names)
    number = "".join(re.findall(r"[0-9]", environ["SLURM_JOB_ID"] + environ.get("SLURM_STEP_ID", "0")))
    is_head = environ.get("SLURM_NODEID", "0") == "0"
    more = [f"--rdzv-endpoint={head}:{PORTS[int(number or 0) % len(PORTS)]}", f"--rdzv-id=slurm-{number}"]
    if "SLURMD_NODENAME" in environ:
        more.append(f"--local-addr={check_host(environ['SLURMD_NODENAME'])}")
    command = request.torchrun(nodes, ranks, request.max_restarts, *_rendezvous(is_head), *more)
    words = f"node {environ.get('SLURM_NODEID', '?')} of {nodes}, {ranks} ranks, meeting at {head}"
    return Start(how="srun_task", nodes=nodes, ranks=nodes * ranks, words=words, command=tuple(command))


def _rendezvous(is_head: bool) -> list[str]:
    # Told, not guessed: torchrun compares the endpoint with the machine's own name, which aliases defeat.
    conf = f"is_host={'true' if is_head else 'false'},join_timeout={RENDEZVOUS_SECONDS}"
    return ["--rdzv-backend=c10d", f"--rdzv-conf={conf}"]


def host_commands(request: Request, hosts: Sequence[Host], port: int, name: str) -> list[list[str]]:
    """torchrun for each host. They share one way to start again, that of nodes.py, which also replaces a lost node."""
    head = hosts[0].address
    meeting = (f"--rdzv-endpoint={head}:{port}", f"--rdzv-id={name}")
    return [
        request.torchrun(len(hosts), host.slots, 0, *_rendezvous(i == 0), *meeting, f"--local-addr={host.address}")
        for i, host in enumerate(hosts)
    ]


def _run_on_hosts(request: Request, start: Start, secret_names: Sequence[str]) -> int:
    def commands(restarts: int) -> list[list[str]]:
        resume = ("--resume_from_checkpoint", "latest") if restarts else ()
        # Another port and name each time: what is left of the last attempt cannot join.
        port, name = secrets.choice(PORTS), f"syncr1-{secrets.token_hex(4)}"
        return host_commands(replace(request, argv=(*request.argv, *resume)), start.hosts, port, name)

    agent = [sys.executable, "-m", "syncr1.engine.processes.nodes"]
    try:
        with preemptible("all nodes have ended; go on with --resume_from_checkpoint latest"):
            return run_nodes(
                [host.name for host in start.hosts],
                commands,
                [executor(request.launcher, host, agent) for host in start.hosts],
                folder=Path.cwd(),
                environment=passed_environment(os.environ, secret_names),
                restarts=Restarts(request.max_restarts, request.output_dir),
                grace=request.shutdown_timeout + 10,  # torchrun's comes first
                say=lambda line: print(f"syncr1: {line}", file=sys.stderr, flush=True),
            )
    except Preempted as stopped:
        print(f"syncr1: {stopped}", file=sys.stderr)
        return stopped.code
    except FileNotFoundError as error:
        raise ConfigError(f"launcher: {error.filename} is not on this machine's PATH; give another") from error
    except KeyboardInterrupt:
        print("syncr1: stopped; all nodes have ended", file=sys.stderr)
        return 130


def _key_names(config: Any) -> list[str]:
    """Variables that hold keys which the settings name."""
    return [name for name in (getattr(config, "judge_key_env", None),) if name]


def first_host(node_list: str) -> str:
    """The first name of Slurm's notation: `a[03-05,9],b` -> `a03`."""
    found = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list)
    name = re.sub(r"\[([^\[\],-]*)[^\[\]]*\]", r"\1", found.group()) if found else ""
    return check_host(name)


def count_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a process started here would see, without loading torch; 1 where there are none."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip():
        return len(visible.split(","))
    told = _count(environ, "SLURM_GPUS_ON_NODE")
    if told:
        return told
    return len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia[0-9]+", p.name)]) or 1


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0


def _no_nodes(request: Request, environ: Mapping[str, str]) -> str:
    """What to paste where nothing says which machines there are."""
    nodes, ranks = request.nodes or 1, request.ranks_per_node or count_gpus(environ)
    here = socket.gethostname()
    beside = Path(sys.executable).with_name("torchrun")
    torchrun = [str(beside) if beside.exists() else "torchrun", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={here}:29500", "--rdzv-id=syncr1"]
    program = [*torchrun, f"--max-restarts={request.max_restarts}", *meeting, *request.program()]
    slots = shlex.join(f"host{number} slots={ranks}" for number in range(1, nodes + 1))
    by_hostfile = shlex.join([sys.executable, *request.program(), "--hostfile", "hostfile"])
    lines = [
        f"nodes: expected {nodes} machines, got none that are known: torchrun did not start this process, it is in no "
        f"Slurm allocation, and there is no hostfile ({DEFAULT_HOSTFILE}); it does not become a run on one machine by "
        "itself, start one of:",
        f"  {_sbatch(request, nodes, ranks)}",
        f"  {shlex.join(program)}",
        f"    (on each machine; {here} is one of them)",
        f"  printf '%s\\n' {slots} > hostfile && {by_hostfile}",
    ]
    if request.ranks_per_node is None and ranks == 1:
        lines.append("  (no GPU is seen here, so these start 1 rank per machine; --ranks_per_node 8 makes it 8)")
    return "\n".join(lines)


def _sbatch(request: Request, nodes: int, ranks: int) -> str:
    """A batch job that runs this very command in an allocation; Slurm puts it back into the queue when a node dies."""
    gpus = [f"--gpus-per-node={ranks}"] if ranks > 1 or Path("/dev/nvidia0").exists() else []
    program = shlex.join(["exec", sys.executable, *request.program()])
    nodes_of = [f"--nodes={nodes}", "--ntasks-per-node=1", *gpus, "--exclusive"]
    again = ["--requeue", "--open-mode=append", f"--chdir={Path.cwd()}"]
    return shlex.join(["sbatch", *nodes_of, *again, f"--wrap={program}"])
