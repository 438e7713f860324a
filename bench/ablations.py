"""Scores over seeds: the default run (credit shared), DGS against its controls, the other kinds of credit, what is
scored of guided drawings, and drawing turns.

    python bench/ablations.py --seeds 5 --jobs 2 --eval_samples 256       further flags go to recipes/sync_r1.py
    python bench/ablations.py --gradient_variance

Each seed trains its own tiny base and its own RL run (`recipes/`, as a user would); a variant changes settings of the
RL run only, so variants are compared on the same bases.
Results go to bench/results/ablations.json, the tables to stdout (`bench/score_tables.py` makes them again).
Higher is better; scores are shares of held-out items.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from score_tables import task_table, variants_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

VARIANTS: dict[str, list[str]] = {
    "default": [],
    "dgs_none": ["--dgs", "none"],
    "dgs_random": ["--dgs", "random"],
    "preview_off": ["--preview_fraction", "0"],
    "credit_per_segment": ["--credit", "per_segment"],
    "credit_image_only": ["--credit", "image_only"],
    "no_anchors": ["--anchor_fraction", "0"],
    "guided": ["--policy_logp", "guided"],
    "guided_detached": ["--policy_logp", "guided_detached"],
    "w5": ["--cfg_weight", "5"],
    "w5_guided": ["--cfg_weight", "5", "--policy_logp", "guided"],
    "w5_guided_detached": ["--cfg_weight", "5", "--policy_logp", "guided_detached"],
    "turn_sync_r1": ["--drawing_turn", "sync_r1"],
}


def run_recipe(name: str, arguments: list[str], log: Path) -> float:
    """Runs a recipe with one thread; returns its wall time in seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    start = time.perf_counter()
    with log.open("w") as out:
        command = [sys.executable, str(ROOT / "recipes" / name), *arguments]
        subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, check=True)
    return time.perf_counter() - start


def make_base(work: Path, seed: int) -> Path:
    folder = work / f"base-{seed}"
    if not (folder / "processor_config.json").is_file():
        seconds = run_recipe(
            "tiny_base.py", ["--seed", str(seed), "--output_dir", str(folder)], work / f"base-{seed}.log"
        )
        print(f"base {seed}: {seconds:.0f} s", flush=True)
    return folder


def make_run(work: Path, variant: str, seed: int, extra: list[str]) -> dict[str, float]:
    """One RL run's scores and costs, flat."""
    folder = work / f"{variant}-{seed}"
    if not is_finished(folder):
        shutil.rmtree(folder, ignore_errors=True)  # what was cut off
        arguments = ["--model", str(work / f"base-{seed}"), "--seed", str(seed), "--output_dir", str(folder)]
        seconds = run_recipe("sync_r1.py", [*arguments, *VARIANTS[variant], *extra], work / f"{variant}-{seed}.log")
        print(f"{variant} seed {seed}: {seconds:.0f} s", flush=True)
    return read_run(folder)


def is_finished(folder: Path) -> bool:
    """Scored after training; a run's page is there from its first second."""
    scores = folder / "scores.json"
    return scores.is_file() and bool(json.loads(scores.read_text()).get("after"))


def read_run(folder: Path) -> dict[str, float]:
    scores = json.loads((folder / "scores.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {
        f"{when}/{name}": value
        for when in ("before", "after")
        for name, value in scores[when].items()
        if isinstance(value, int | float)  # what is said of single items stays in the run's folder
    }
    found["seconds"] = sum(step["step_time"] for step in steps)
    found["update_seconds"] = sum(
        value for step in steps for name, value in step.items() if name.startswith(("seconds/update/", "seconds/score"))
    )
    found["trained_tokens"] = sum(step["num_tokens"] * (1 - step["dgs/tokens_saved_fraction"]) for step in steps)
    found["tokens_saved"] = statistics.mean(step["dgs/tokens_saved_fraction"] for step in steps)
    found["replay_logp_max_abs"] = max(step.get("rollout/replay_logp_max_abs") or 0.0 for step in steps)
    return found


def costs_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: what each variant trained on and how long it took, means over seeds."""
    lines = ["| variant | tokens trained | saved | RL seconds | update seconds |", "|---|---|---|---|---|"]
    for variant, runs in results.items():
        cells = [
            statistics.mean(run[key] for run in runs)
            for key in ("trained_tokens", "tokens_saved", "seconds", "update_seconds")
        ]
        lines.append(f"| {variant} | {cells[0]:.0f} | {cells[1]:.1%} | {cells[2]:.0f} | {cells[3]:.0f} |")
    return "\n".join(lines)


def write_results(output: Path, results: dict[str, list[dict[str, float]]]) -> None:
    """Adds the variants to what the file has, with the versions and the commit that they were measured with."""
    from syncr1.engine.show.environment import environment

    known = json.loads(output.read_text()) if output.is_file() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(known | results | {"environment": environment()}, indent=1) + "\n")


def gradient_variance(model: Path, batches: int = 20) -> dict[str, dict[str, float]]:
    """Noise of the policy gradient under each DGS rule, on the same rollouts of one model.

    For gradients g_k of independent batches: noise = mean |g_k - mean g|^2 / |mean g|^2, which is how many batches must
    be averaged until noise equals signal; and the cosine between each rule's mean gradient and that of keeping all.
    """
    import torch

    from syncr1.engine.data.mixture import Mixture
    from syncr1.engine.data.prompts import load_training_prompts
    from syncr1.engine.data.stream import PromptStream
    from syncr1.engine.forward.objective import Objective, PolicyForward
    from syncr1.engine.forward.packing import pack
    from syncr1.engine.learn.credit import credited_rewards, plan_of
    from syncr1.engine.methods.sync_r1_config import SyncR1Config
    from syncr1.engine.methods.sync_r1_parts import build_reward_set, prepare_data
    from syncr1.engine.policies.janus import JanusPolicy
    from syncr1.engine.rewards.scoring import score
    from syncr1.engine.rollout.sampler import generate
    from syncr1.engine.rollout.sampling import Sampling
    from syncr1.engine.settings.train_config import DGSRule

    config = SyncR1Config()
    policy = JanusPolicy.from_pretrained(model).eval()
    prompts = load_training_prompts(prepare_data(config))
    rewards = build_reward_set(config, policy, prompts)
    stream = PromptStream(Mixture(prompts, seed=1, prompts_per_step=config.prompts_per_step))
    forward = PolicyForward(policy, Objective(credit=config.credit))
    trained = [p for p in policy.parameters() if p.requires_grad]
    rules: tuple[DGSRule, ...] = ("none", "variance_mass", "random")
    gradients: dict[str, list[torch.Tensor]] = {rule: [] for rule in rules}
    kept: dict[str, list[float]] = {rule: [] for rule in rules}
    for k in range(batches):
        sampling = Sampling(num_generations=config.num_generations, cfg_weight=config.cfg_weight, seed=7, step=k)
        rollouts = generate(policy, stream.next_step(), sampling)
        credit = credited_rewards(score(rollouts, rewards.functions).values, rollouts, rewards, config.credit)
        for rule in rules:
            plan = plan_of(
                credit, rollouts, replace(config, dgs=rule), step=k, holds_anchors=False, sum_over_ranks=lambda own: own
            )
            given = (policy, rollouts, plan.advantages_S2, plan.keep_S)
            (batch,) = pack(*given, num_generations=config.num_generations, max_tokens=1 << 30)
            # As in training: pruned tokens leave the normaliser too.
            masks = {name: batch.loss_mask & (batch.modality == code) for code, name in enumerate(("text", "image"))}
            counts = {name: float(mask.sum()) for name, mask in masks.items()}
            policy.zero_grad()
            forward(batch, num_items=counts)["loss"].backward()
            gradients[rule].append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).clone())
            kept[rule].append(float(plan.keep_S.float().mean()))
    means = {rule: torch.stack(g).mean(0) for rule, g in gradients.items()}
    found = {}
    for rule in rules:
        stacked = torch.stack(gradients[rule])
        spread = float((stacked - means[rule]).square().sum(1).mean()) * batches / (batches - 1)
        signal = max(1e-12, float(means[rule].square().sum()) - spread / batches)
        cosine = float(torch.nn.functional.cosine_similarity(means[rule], means["none"], dim=0))
        found[rule] = {"noise_to_signal": spread / signal, "cosine_to_all": cosine, "kept": statistics.mean(kept[rule])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json")
    parser.add_argument("--gradient_variance", action="store_true")
    arguments, extra = parser.parse_known_args()
    seeds, variants = range(arguments.seeds), arguments.variants.split(",")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda seed: make_base(arguments.work, seed), seeds))
        if arguments.gradient_variance:
            print(json.dumps(gradient_variance(arguments.work / "base-0"), indent=1))
            return
        jobs = {v: [pool.submit(make_run, arguments.work, v, seed, extra) for seed in seeds] for v in variants}
        results = {variant: [job.result() for job in mine] for variant, mine in jobs.items()}
    write_results(arguments.output, results)
    print("\n".join(variants_table(results)), costs_table(results), sep="\n\n")
    if "default" in results:
        print("", *task_table(results["default"]), sep="\n")


if __name__ == "__main__":
    main()
