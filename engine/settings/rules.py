"""What a setting must be, beside its type: ranges, and rules over several settings.  Used by `TrainConfig` and its kin.

A rule takes the settings and returns what is wrong with them in words: field, what was expected, what came, the remedy.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

Rule = Callable[[Any], list[str]]
"""Settings to what is wrong with them, in words."""


class Range(NamedTuple):
    """What a number must be, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("more than 0", lambda value: value > 0)
AT_LEAST_0 = Range("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
BELOW_1 = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Range("more than 0 and at most 1", lambda value: 0 < value <= 1)

RANGES: dict[str, tuple[Range, str]] = {
    "seed": (Range("0 to 2^32 - 1", lambda value: 0 <= value < 2**32), "take any other number"),
    "max_steps": (AT_LEAST_1, "--dry_run tries the settings without training"),
    "prompts_per_step": (AT_LEAST_1, "a step needs a prompt"),
    "num_generations": (Range("at least 2", lambda value: value >= 2), "a group of one has no advantage; try 8"),
    "num_iterations": (AT_LEAST_1, "1 is on-policy"),
    "temperature": (POSITIVE, "1 samples the model's own distribution; greedy groups would be all alike"),
    "max_completion_length": (AT_LEAST_1, "raise it"),
    "cfg_weight": (AT_LEAST_0, "1 is without guidance"),
    "eval_cfg_weight": (AT_LEAST_0, "1 is without guidance"),
    "learning_rate": (POSITIVE, "for Janus-Pro start near 1e-6"),
    "warmup_steps": (AT_LEAST_0, "0 starts at the peak"),
    "weight_decay": (AT_LEAST_0, "0 switches it off"),
    "max_grad_norm": (AT_LEAST_0, "0 switches clipping off"),
    "beta": (AT_LEAST_0, "0 switches the KL term off"),
    "epsilon": (Range("more than 0 and below 1", lambda value: 0 < value < 1), "TRL's default is 0.2"),
    "epsilon_high": (POSITIVE, "leave it out to use epsilon"),
    "text_loss_weight": (AT_LEAST_0, "0 leaves text tokens out"),
    "image_loss_weight": (AT_LEAST_0, "0 leaves image tokens out"),
    "reward_timeout": (POSITIVE, "a reward needs time; 120 is the default"),
    "dgs_mass": (SHARE, "1 keeps every trajectory that has an advantage"),
    "dgs_keep": (AT_LEAST_1, "--dgs none keeps all"),
    "preview_fraction": (BELOW_1, "0 switches the preview off"),
    "preview_threshold": (Range("0 to 1", lambda value: 0 <= value <= 1), "rewards lie in this range"),
    "preview_acceptance": (SHARE, "1 accepts every preview"),
    "preview_max_attempts": (AT_LEAST_1, "1 never tries again"),
    "preview_min_keep": (Range("at least 2", lambda value: value >= 2), "rewards are compared within a group"),
    "lora_rank": (AT_LEAST_0, "0 trains the weights themselves"),
    "lora_alpha": (POSITIVE, "twice the rank is usual"),
    "max_tokens_per_microbatch": (AT_LEAST_1, "16384 fits the tiny base"),
    "eval_samples": (AT_LEAST_0, "0 skips the evaluation"),
    "logging_steps": (AT_LEAST_1, "1 logs every step"),
    "replay_check_steps": (AT_LEAST_0, "0 never checks"),
    "sample_steps": (AT_LEAST_0, "0 never writes samples"),
    "checkpointing_steps": (AT_LEAST_0, "0 saves at the end alone"),
    "save_total_limit": (AT_LEAST_1, "leave it out to keep all"),
    "nodes": (AT_LEAST_1, "1 is this machine"),
    "ranks_per_node": (AT_LEAST_1, "leave it out for one per GPU"),
    "max_restarts": (AT_LEAST_0, "0 gives up at the first loss"),
    "stage_timeout": (POSITIVE, "more than the longest rollout takes; 1800 is the default"),
    "shutdown_timeout": (AT_LEAST_1, "more than a step and a checkpoint take; 120 is the default"),
    "max_skipped_updates": (AT_LEAST_0, "0 ends the run at the first one"),
}


def range_problems(config: Any, ranges: Mapping[str, tuple[Range, str]]) -> list[str]:
    """What lies outside its range; None is always allowed."""
    values = ((name, getattr(config, name), wanted, remedy) for name, (wanted, remedy) in ranges.items())
    return [
        f"{name}: expected {wanted.words}, got {value}; {remedy}"
        for name, value, wanted, remedy in values
        if value is not None and not wanted.holds(value)
    ]


def objective_problems(c: Any) -> list[str]:
    problems = []
    if c.importance_sampling_level == "sequence" and c.loss_type in ("cispo", "sapo", "vespo"):
        problems.append(
            f"importance_sampling_level: sequence is not defined for loss_type {c.loss_type}; "
            "take token, or one of grpo, bnpo, dr_grpo, dapo, luspo"
        )
    if c.loss_type == "cispo" and (c.epsilon_high is None or c.epsilon_high < 1):
        problems.append(
            f"epsilon_high: for cispo it bounds the ratio itself, so expected at least 1, got "
            f"{c.epsilon_high if c.epsilon_high is not None else f'{c.epsilon} (from epsilon)'}; 5 is usual"
        )
    if c.delta is not None:
        upper = 1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high)
        if c.loss_type in ("cispo", "sapo", "vespo"):
            problems.append(f"delta: loss_type {c.loss_type} has no such bound, got {c.delta}; leave it out")
        elif c.delta <= upper:
            problems.append(f"delta: expected more than 1 + epsilon_high = {upper:g}, got {c.delta}; raise it")
    if c.image_loss_weight == 0 and (c.text_loss_weight == 0 or c.credit == "image_only"):
        problems.append(
            f"image_loss_weight: 0 leaves nothing to learn with text_loss_weight {c.text_loss_weight:g} and credit "
            f"{c.credit}; give a modality that has credit a positive weight"
        )
    return problems


def judge_problems(c: Any) -> list[str]:
    problems = address_problems(c)
    if problems or (c.judge_url is None) == (c.judge_model is None):
        return problems
    given, missing = ("judge_url", "judge_model") if c.judge_url is not None else ("judge_model", "judge_url")
    return [f"{missing}: expected beside {given} ({getattr(c, given)}), got none; a judge needs both"]


def address_problems(c: Any) -> list[str]:
    """A secret in an address would stand in the run's config.yaml; the message does not repeat it."""
    try:
        url = urlsplit(c.judge_url or "")
        plain = "@" not in url.netloc and not url.query and not url.fragment
    except ValueError:
        plain = False
    if plain:
        return []
    remedy = "name the variable that holds the key in judge_key_env"
    return [f"judge_url: expected an address without user, password, query and fragment; {remedy}"]


def dgs_problems(c: Any) -> list[str]:
    problems = []
    if c.dgs in ("max_variance", "top_k") and c.dgs_keep is None:
        problems.append(
            f"dgs_keep: {c.dgs} needs a number of trajectories, got none; try {max(1, c.num_generations // 2)}"
        )
    if c.dgs == "max_variance" and c.dgs_keep == 1:
        problems.append("dgs_keep: one trajectory has no variance, got 1 for max_variance; give at least 2")
    if c.dgs_keep is not None and c.dgs_keep > c.num_generations:
        problems.append(f"dgs_keep: expected at most num_generations = {c.num_generations}, got {c.dgs_keep}; lower it")
    return problems


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def path_problems(c: Any) -> list[str]:
    problems = []
    if c.model is not None:
        folder = os.path.expanduser(c.model)
        if os.path.isdir(folder):  # unlike Path's, False for a name that no file could have
            if not os.path.isfile(os.path.join(folder, "config.json")):
                problems.append(f"model: expected transformers' format, but {c.model} has no config.json")
        elif os.path.exists(folder) or not may_be_hub_name(c.model):
            problems.append(f"model: expected a checkpoint folder or a hub name, got {c.model}, which is not a folder")
    if c.output_dir.exists() and not c.output_dir.is_dir():
        problems.append(f"output_dir: expected a folder, got the file {c.output_dir}; choose another name")
    return problems


def may_be_hub_name(model: str) -> bool:
    """`organisation/name` is one; `./x` and `a/b/c` are paths, and so is `runs/x` where a folder `runs` exists."""
    if not _HUB_NAME.fullmatch(model) or model.startswith((".", "~")):
        return False
    return "/" not in model or not os.path.isdir(Path(model).parent)


def run_problems(c: Any) -> list[str]:
    problems = []
    if c.reward_timeout >= c.stage_timeout:
        problems.append(
            f"reward_timeout: expected less than stage_timeout {c.stage_timeout:g}, got {c.reward_timeout:g}; lower it"
        )
    asked = c.resume_from_checkpoint
    if asked not in (None, "latest") and not os.path.isdir(os.path.expanduser(asked)):
        problems.append(
            f"resume_from_checkpoint: expected latest, a checkpoint or a run's folder, got {asked}, which is no folder"
        )
    for tracker in sorted(set(c.report_to)):
        if c.report_to.count(tracker) > 1:
            problems.append(f"report_to: {tracker} is given twice; name it once")
        if importlib.util.find_spec(tracker) is None:
            problems.append(f"report_to: {tracker} is not installed; run `pip install {tracker}`, or leave it out")
    return problems


RULES: tuple[Rule, ...] = (objective_problems, judge_problems, dgs_problems, path_problems, run_problems)
