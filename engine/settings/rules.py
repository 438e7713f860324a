"""Rules over several settings, of every recipe; what a single one must be stands beside its field.

A rule takes the settings and returns what is wrong with them in words: field, what was expected, what came, the remedy.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .schema import Rule


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


def reward_problems(c: Any) -> list[str]:
    """What can be known of reward functions before their files are run."""
    problems = []
    if c.reward_weights and len(c.reward_weights) != len(c.reward_funcs):
        problems.append(
            f"reward_weights: expected {len(c.reward_funcs)}, one per reward_funcs, got {len(c.reward_weights)}; "
            "list one for each name"
        )
    for weight in c.reward_weights:
        if not weight >= 0:
            problems.append(f"reward_weights: expected numbers of at least 0, got {weight:g}; leave that reward out")
    if c.reward_weights and not any(c.reward_weights):
        problems.append("reward_weights: all are 0, so nothing would be learnt; give one reward a positive weight")
    if not c.reward_funcs and c.REWARDS:
        problems.append(f"reward_funcs: expected at least one, got none; try {' '.join(c.REWARDS[:4])}")
    for name in sorted({name for name in c.reward_funcs if c.reward_funcs.count(name) > 1}):
        problems.append(f"reward_funcs: {name} is given twice; name it once")
    called = [spec.rpartition(":")[2].removesuffix("()") for spec in dict.fromkeys(c.reward_funcs)]
    for name in sorted({name for name in called if called.count(name) > 1}):
        problems.append(f"reward_funcs: two rewards are called {name}, which names their columns; rename one of them")
    return problems + [
        problem for spec in c.reward_funcs if spec not in c.REWARDS if (problem := _spec_problem(spec, c.REWARDS))
    ]


def _spec_problem(spec: str, built_in: tuple[str, ...]) -> str:
    """What is wrong with the name of a user's own reward; "" where only loading it can tell."""
    known = f"one of {', '.join(built_in)}, " if built_in else ""
    where, colon, function = spec.rpartition(":")
    if not where or not function:
        nearest = [] if colon else difflib.get_close_matches(spec, built_in, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "name the function behind a colon"
        return f"reward_funcs: expected {known}[adapter@]file.py:function or module:function, got {spec!r}; {hint}"
    path = os.path.expanduser(where.rpartition("@")[2])
    if path.endswith(".py") and not os.path.isfile(path) and not os.path.isfile(os.path.expanduser(where)):
        return f"reward_funcs: no file {path}, got {spec!r}; a path is relative to the working directory"
    return ""


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


TRAINING: tuple[Rule, ...] = (
    objective_problems,
    judge_problems,
    reward_problems,
    dgs_problems,
    path_problems,
    run_problems,
)
"""What every training's settings must keep."""


# One recipe's own -----------------------------------------------------------------------------------------------------


def sync_r1_problems(c: Any) -> list[str]:
    problems = []
    for name in ("data", "eval_data"):
        path = getattr(c, name)
        if path is not None and not path.exists() and not ("/" in str(path) and may_be_hub_name(str(path))):
            problems.append(
                f"{name}: expected a folder in the UnifyBench++ layout, a table of prompts or a hub name, got {path}, "
                f"which is not there; leave it out for {'the rendered world' if name == 'data' else 'that of data'}"
            )
    if c.reward_funcs and not c.reward_weights and not any(map(c.weight_of, c.reward_funcs)):
        problems.append("identity_weight, judge_weight, text_weight: all are 0; give one of them a positive weight")
    if c.anchor_fraction > 0 and c.anchor_beta == 0:
        problems.append(
            f"anchor_fraction: anchors learn from the KL term alone, so {c.anchor_fraction:g} is pointless with "
            "anchor_beta 0; set --anchor_fraction 0, or a positive anchor_beta"
        )
    return problems


def corl_problems(c: Any) -> list[str]:
    problems = []
    if c.cycle_image == c.cycle_text == "none" and "cycle" in c.reward_funcs:
        problems.append("cycle_image, cycle_text: both are none, so cycle compares nothing; leave it out or give one")
    if "judge" in c.reward_funcs and c.judge_url is None:
        problems.append("reward_funcs: judge needs a judge_url, got none; give one, or leave judge out")
    if c.stage == "merge" and len(c.merge_models) < 2:
        problems.append(f"merge_models: --stage merge needs at least 2 checkpoints, got {len(c.merge_models)}")
    if c.stage == "merge" and c.merge_base is None:
        problems.append("merge_base: --stage merge needs the model that both were trained from, got none")
    if c.stage == "merge" and c.merge_method == "gaussian" and len(c.merge_models) > 2:
        problems.append(
            f"merge_models: gaussian merges 2 models, got {len(c.merge_models)}; take fnorm or mean for more"
        )
    if c.max_steps == 0 or c.refined_max_steps == 0:
        problems.append("max_steps, refined_max_steps: expected at least 1, or -1 for num_train_epochs, got 0")
    if c.tim_policy == "live" and c.zero_stage == 3 and "tim" in c.reward_funcs:
        problems.append(
            "tim_policy: under zero_stage 3 the trained weights are not whole while rewards run, got live; take frozen"
        )
    return problems


def evaluation_problems(c: Any) -> list[str]:
    problems = []
    if (
        c.data is not None
        and c.data_form in ("unifybench", "geneval", "dpg")
        and not os.path.exists(os.path.expanduser(c.data))
    ):
        problems.append(f"data: expected a folder or file in the form {c.data_form}, got {c.data}, which is not there")
    if c.stage == "score" and not (c.output_dir / "manifest.json").is_file():
        problems.append(
            f"output_dir: {c.output_dir} holds nothing generated (no manifest.json); run --stage generate first"
        )
    if not (c.greedy_texts or c.sampled_texts):
        problems.append("greedy_texts, sampled_texts: both are off, so nothing would be answered; leave one on")
    if "dpg" in c.export and c.images_per_prompt > 4:
        problems.append(f"images_per_prompt: DPG-Bench's grid holds 4 images, got {c.images_per_prompt}; lower it")
    for kind in sorted(set(c.export)):
        if c.export.count(kind) > 1:
            problems.append(f"export: {kind} is given twice; name it once")
    return problems
