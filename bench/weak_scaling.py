"""Weak scaling over nodes: 1, 2 and 4 machines made of network namespaces, each with as many prompts as one has alone.

    python bench/weak_scaling.py                              1, 2 and 4 nodes, three rounds; about 20 minutes
    python bench/weak_scaling.py --network 1gbit 100mbit      the same with every machine's network so slow
    python bench/weak_scaling.py --zero_stage 0 3             other ways to share out
    python bench/weak_scaling.py --quick --out /tmp/x         two nodes, few steps: shows that everything runs

The run is the recipe's own, started over a hostfile, with `ip netns exec` where ssh would be (paced.py says what is
emulated: a GPU's computing, by a fixed sleep, so that the cores of this machine are not the limit).  Efficiency is the
time of a step on one node over that on N.  What is expected is written down before a step is measured:

    step(N) = step(1) + c a(N) + b / B * A(N)

with c collectives and b bytes of a step, a(N) the time of an all-reduce of 8 bytes and A(N) that of one of B bytes, as
many as the gradients, both measured over the same network before the training.  What is measured beyond that is cores
and unequal ranks.  Sizes take turns, so that other load on the machine meets all of them.  Root and iproute2 are
needed.  Rates are shaped by the kernel's tbf; delays would need its netem, which not every kernel has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import machine
from namespaces import INTERFACE, Cluster, cluster, missing

HERE = Path(__file__).resolve().parent
GOAL = 0.9
FAST = "unshaped"
RESULTS = HERE / "results"
Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What every node does."""

    prompts: int = 2
    """Per node."""
    rollout: float = 2.4
    """Seconds of sampling, rewards and packing per prompt."""
    update: float = 0.6
    """Seconds of an update per prompt, beside its own."""
    steps: int = 9
    save_every: int = 4

    @property
    def computing(self) -> float:
        """Emulated seconds of a step."""
        return self.prompts * (self.rollout + self.update)

    def is_save(self, step: int) -> bool:
        """Whether a checkpoint is written at the end of the step."""
        return (step + 1) % self.save_every == 0


QUICK = Work(prompts=1, rollout=0.3, update=0.1, steps=3, save_every=2)


def make_model(folder: Path) -> int:
    """An untrained tiny Janus; returns the bytes of its gradients."""
    from syncr1.engine.world.attributes import CONCEPTS
    from syncr1.engine.world.base_model import corpus
    from syncr1.engine.world.tiny_janus import build_policy

    policy = build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=0, freeze_vision=True)
    policy.save(folder)
    return 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)


def slow_down(nodes: Cluster, rate: str) -> None:
    """Limits what each machine sends; the bucket is 10 ms of it, at least a packet of the largest size."""
    units = {"gbit": 1e9, "mbit": 1e6}
    bits = float(rate[:-4]) * units[rate[-4:]]
    shape = ["tbf", "rate", rate, "burst", str(max(65536, int(bits / 800))), "latency", "500ms"]
    for address in nodes.addresses:
        command = ["tc", "-n", nodes.prefix + address, "qdisc", "add", "dev", INTERFACE, "root", *shape]
        subprocess.run(command, check=True)


def run_once(num_nodes: int, stage: int, network: str, work: Work, model: Path, num_bytes: int) -> Run:
    """One training; what its steps cost."""
    with tempfile.TemporaryDirectory(prefix="syncr1-scaling-") as name, cluster(num_nodes) as nodes:
        out = Path(name)
        if network != FAST:
            slow_down(nodes, network)
        command = [
            *(sys.executable, str(HERE / "paced.py"), "--model", str(model), "--output_dir", str(out / "run")),
            *("--nodes", str(num_nodes), "--hostfile", str(nodes.hostfile(out / "hostfile"))),
            *("--launcher", nodes.launcher, "--max_restarts", "0", "--zero_stage", str(stage)),
            *("--prompts_per_step", str(num_nodes * work.prompts), "--num_generations", "2"),
            *("--max_completion_length", "4", "--max_steps", str(work.steps), "--eval_samples", "0"),
            *("--sample_steps", "0", "--checkpointing_steps", str(work.save_every)),
        ]
        pace = {
            "SYNCR1_PACE_ROLLOUT": work.rollout,
            "SYNCR1_PACE_UPDATE": work.update,
            "SYNCR1_PACE_OUT": out,
            "SYNCR1_PACE_BYTES": num_bytes,
        }
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        environment = os.environ | quiet | {"GLOO_SOCKET_IFNAME": INTERFACE} | {k: str(v) for k, v in pace.items()}
        started = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            env=environment,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise SystemExit(f"weak_scaling: {num_nodes} nodes ended with {done.returncode}\n{done.stdout[-4000:]}")
        ranks = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(num_nodes)]
    known = {"nodes": num_nodes, "zero_stage": stage, "network": network}
    return known | {"start_seconds": ranks[0]["steps"][0]["at"] - started} | read_run(ranks, work)


def read_run(ranks: Sequence[dict[str, Any]], work: Work) -> Run:
    """What the ranks' files say about a step: of rank 0 the time, of all of them the cost.

    The first step warms up; steps that end with a checkpoint are apart."""
    costs = [
        [
            {k: after[k] - before[k] for k in before if k != "calls"}
            for before, after in zip(rank["steps"], rank["steps"][1:], strict=False)
        ]
        for rank in ranks
    ]
    plain = [step for step in range(1, len(costs[0])) if not work.is_save(step)]
    saves = [step for step in range(1, len(costs[0])) if work.is_save(step)]

    def middle(key: str, over: Any = statistics.mean, steps: Iterable[int] = plain) -> float:
        return statistics.median(over([cost[step][key] for cost in costs]) for step in steps)

    seconds = middle("at", lambda values: values[0])
    first, last = (ranks[0]["steps"][index]["calls"] for index in (plain[0], plain[0] + 1))
    return {
        "step_seconds": seconds,
        "save_seconds": middle("at", lambda values: values[0], saves) if saves else None,
        "all_seconds": statistics.mean(cost["at"] for cost in costs[0][1:]),
        "cpu_seconds": middle("cpu_seconds", sum),
        "collectives": middle("collectives"),
        "calls": {name: last[name] - first.get(name, 0) for name in last if last[name] != first.get(name, 0)},
        "collective_bytes": middle("collective_bytes"),
        # The last to arrive waits for nobody.
        "collective_seconds": middle("collective_seconds", min),
        "sent_bytes": middle("sent_bytes"),
        "over_pace": middle("over_pace", max),
        "small_seconds": max(rank["network"]["small_seconds"] for rank in ranks),
        "large_seconds": max(rank["network"]["large_seconds"] for rank in ranks),
    }


def expected_seconds(run: Run, alone: float, num_bytes: int) -> float:
    """step(N) of the formula above."""
    if run["nodes"] == 1:
        return alone
    reductions = run["collective_bytes"] / num_bytes
    return float(alone + run["collectives"] * run["small_seconds"] + reductions * run["large_seconds"])


def summary(runs: Sequence[Run], num_bytes: int) -> list[dict[str, Any]]:
    """A row per network, stage and number of nodes: medians over rounds, efficiency against one node's round."""
    rows = []
    for network, stage, nodes in dict.fromkeys((r["network"], r["zero_stage"], r["nodes"]) for r in runs):
        mine = [r for r in runs if (r["network"], r["zero_stage"], r["nodes"]) == (network, stage, nodes)]
        # One node sends nothing, so it is measured once for all networks.
        alone = [r for r in runs if (r["zero_stage"], r["nodes"]) == (stage, 1)]
        pairs = list(zip(alone, mine, strict=False)) if len(alone) == len(mine) else [(alone[0], r) for r in mine]
        row: dict[str, Any] = {"network": network, "zero_stage": stage, "nodes": nodes, "rounds": len(mine)}
        for key, value in mine[0].items():
            if key not in row and isinstance(value, int | float):
                row[key] = statistics.median(r[key] for r in mine)
        row["efficiency"] = statistics.median(a["step_seconds"] / r["step_seconds"] for a, r in pairs)
        row["efficiency_with_saves"] = statistics.median(a["all_seconds"] / r["all_seconds"] for a, r in pairs)
        row["expected"] = statistics.median(
            a["step_seconds"] / expected_seconds(r, a["step_seconds"], num_bytes) for a, r in pairs
        )
        row["cores_busy"] = row["cpu_seconds"] / row["step_seconds"] / (os.cpu_count() or 1)
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    titles = (
        "network",
        "ZeRO",
        "nodes",
        "step",
        "with a save",
        "efficiency",
        "expected",
        "with saves",
        "collectives",
        "sent per node",
        "in collectives",
        "cores busy",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    for r in rows:
        saved = "" if r.get("save_seconds") is None else f"{r['save_seconds']:.2f} s"
        cells = (
            r["network"],
            r["zero_stage"],
            r["nodes"],
            f"{r['step_seconds']:.2f} s",
            saved,
            f"{r['efficiency']:.3f}",
            f"{r['expected']:.3f}",
            f"{r['efficiency_with_saves']:.3f}",
            f"{r['collectives']:.0f}",
            f"{r['sent_bytes'] / 1e6:.2f} MB",
            f"{1e3 * r['collective_seconds']:.0f} ms",
            f"{r['cores_busy']:.0%}",
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--zero_stage", type=int, nargs="+", default=[2])
    parser.add_argument("--network", nargs="+", default=[FAST], help=f"{FAST}, or what each machine sends: 1gbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two nodes, few steps: shows that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        raise SystemExit(f"weak_scaling: {reason}; nothing was measured")
    work, sizes, rounds = (QUICK, [1, 2], 1) if given.quick else (Work(), sorted({1, *given.nodes}), given.rounds)
    environment = machine.environment("cpu")
    print(json.dumps(environment), flush=True)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="syncr1-scaling-") as name:
        num_bytes = make_model(Path(name) / "model")
        for number in range(rounds):
            for stage in given.zero_stage:
                for network, nodes in [(n, s) for s in sizes for n in given.network if s > 1 or n == given.network[0]]:
                    runs.append(run_once(nodes, stage, network, work, Path(name) / "model", num_bytes))
                    print(
                        f"round {number + 1}: {network}, ZeRO-{stage}, {nodes} nodes: "
                        f"{runs[-1]['step_seconds']:.2f} s a step",
                        file=sys.stderr,
                        flush=True,
                    )
    rows = summary(runs, num_bytes)
    print(show(rows))
    described = {
        "prompts_per_node": work.prompts,
        "emulated_seconds": work.computing,
        "steps": work.steps,
        "save_every": work.save_every,
        "gradient_bytes": num_bytes,
    }
    content = {"environment": environment, "work": described, "rows": rows, "runs": runs}
    content["goals"] = goals(rows, given.quick)
    write(given.out / f"{machine.slug('cpu')}-weak-scaling.json", content)
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Keeps what the file has of networks and stages that were not measured now."""

    def kept(rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        measured = {(row["network"], row["zero_stage"]) for row in new}
        return [row for row in rows if (row["network"], row["zero_stage"]) not in measured]

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        known = json.loads(path.read_text())
        for part in ("rows", "runs"):
            content[part] = kept(known[part], content[part]) + content[part]
        fresh = {line["goal"] for line in content["goals"]}
        content["goals"] = [line for line in known["goals"] if line["goal"] not in fresh] + content["goals"]
    path.write_text(json.dumps(content, indent=1) + "\n")


def goals(rows: Sequence[dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """Efficiency at the largest size on the unshaped network, per stage; quick runs say nothing about it."""
    largest = max(row["nodes"] for row in rows)
    found = []
    for row in rows:
        if row["nodes"] == largest > 1 and row["network"] == FAST:
            met = None if quick else row["efficiency"] >= GOAL
            text = f"weak scaling 1 -> {largest} nodes, ZeRO-{row['zero_stage']}: >= {GOAL}"
            found.append({"goal": text, "measured": row["efficiency"], "met": met})
            print(f"{text}: {row['efficiency']:.3f}{'' if met is None else ', met' if met else ', NOT met'}")
    return found


if __name__ == "__main__":
    main()
