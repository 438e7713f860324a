"""CoRL's embedded default over seeds, and the paper's pilot study: which way of training both skills gains most.

    python bench/corl_seeds.py --seeds 3 --jobs 2                 all stages, before and after
    python bench/corl_seeds.py --seeds 3 --jobs 2 --pilot         the first stage alone, by each strategy

Each seed trains its own tiny base and its own RL runs (`recipes/corl.py`, as a user would).  Results go to
bench/results/corl.json, the table to stdout.  Higher is better; scores are shares of held-out items.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ablations import is_finished
from score_tables import CORL, corl_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "corl.json"
ITEMS = 100
"""Held-out ones of each task, as recipes/corl_tiny.yaml has it."""
STRATEGIES = ("unified", "alternating", "separate", "separate_merged")
BASE = (
    "import sys; from pathlib import Path; "
    "from syncr1.engine.world.corl_base import CorlBaseSettings, train_corl_base; "
    "train_corl_base(CorlBaseSettings(seed=int(sys.argv[1]))).save(Path(sys.argv[2]))"
)
"""The world itself is seed 0's for every base."""


def timed(command: list[str], log: Path) -> float:
    """Runs with one thread; returns the wall time in seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    start = time.perf_counter()
    with log.open("w") as out:
        subprocess.run([sys.executable, *command], env=environment, stdout=out, stderr=subprocess.STDOUT, check=True)
    return time.perf_counter() - start


def make_base(work: Path, seed: int) -> Path:
    folder = work / f"base-{seed}"
    if not (folder / "processor_config.json").is_file():
        seconds = timed(["-c", BASE, str(seed), str(folder)], work / f"base-{seed}.log")
        print(f"base {seed}: {seconds:.0f} s", flush=True)
    return folder


def make_run(work: Path, name: str, seed: int, flags: list[str]) -> dict[str, dict[str, float]]:
    """`before` and `after` of one run."""
    folder = work / f"{name}-{seed}"
    if not is_finished(folder):
        shutil.rmtree(folder, ignore_errors=True)  # what was cut off
        recipe = [str(ROOT / "recipes" / "corl.py"), "--config", str(ROOT / "recipes" / "corl_tiny.yaml")]
        arguments = ["--model", str(work / f"base-{seed}"), "--seed", str(seed), "--output_dir", str(folder), *flags]
        seconds = timed([*recipe, *arguments], work / f"{name}-{seed}.log")
        print(f"{name} seed {seed}: {seconds:.0f} s", flush=True)
    scores = json.loads((folder / "scores.json").read_text())
    return {when: {m: scores[when][m] for m in CORL} for when in ("before", "after")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--pilot", action="store_true", help="the first stage alone, by each strategy")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "corl_seeds")
    given, extra = parser.parse_known_args()
    runs = {"all stages": ["--stage", "all"]}
    if given.pilot:
        runs = {name: ["--stage", "unified", "--strategy", name] for name in STRATEGIES}
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda seed: make_base(given.work, seed), range(given.seeds)))
        wanted = [(name, seed) for name in runs for seed in range(given.seeds)]
        done = list(
            pool.map(
                lambda job: make_run(given.work, job[0].replace(" ", "_"), job[1], [*runs[job[0]], *extra]), wanted
            )
        )
    results: dict[str, Any] = {name: [] for name in runs}
    for (name, _), scores in zip(wanted, done, strict=True):
        results[name].append(scores)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(known | results, indent=1) + "\n")
    print(*corl_table(results, ITEMS), sep="\n")


if __name__ == "__main__":
    main()
