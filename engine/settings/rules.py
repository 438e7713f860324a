"""Rules over several settings, of every recipe; what a single one must be stands beside its field.

A rule takes the settings and returns what is wrong with them in words: field, what was expected, what came, the remedy.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..errors import kind_of, shown
from .masked_rules import masked_problems
from .modality import clip_of
from .reward_specs import reward_name
from .schema import Rule
from .source_names import split_named
from .template_kwargs import template_kwargs_problems
from .turn_templates import drawing_problems


def objective_problems(c: Any) -> list[str]:
    problems = []
    if c.importance_sampling_level == "sequence" and c.loss_type in ("cispo", "sapo", "vespo"):
        problems.append(
            f"importance_sampling_level: expected token for loss_type {c.loss_type}, got sequence; take token, or "
            "grpo, bnpo, dr_grpo, dapo, luspo"
        )
    bounds = {"epsilon_high": clip_of(c, "text")[1], "image_epsilon_high": clip_of(c, "image")[1]}
    if c.loss_type == "cispo":
        problems += [
            f"{name}: for cispo it bounds the ratio itself, so expected at least 1, got {upper:g}"
            f"{' (from epsilon)' * (getattr(c, name) is None)}; 5 is usual"
            for name, upper in bounds.items()
            if upper < 1 and not (name == "image_epsilon_high" and upper == bounds["epsilon_high"])
        ]
    if c.delta is not None:
        upper = 1 + max(bounds.values())
        if c.loss_type in ("cispo", "sapo", "vespo"):
            problems.append(
                f"delta: expected none, as loss_type {c.loss_type} has no such bound, got {c.delta}; drop it"
            )
        elif c.delta <= upper:
            problems.append(f"delta: expected more than 1 + epsilon_high = {upper:g}, got {c.delta}; raise it")
    if c.image_loss_weight == 0 and (c.text_loss_weight == 0 or c.credit == "image_only"):
        problems.append(
            f"image_loss_weight: expected a positive one with text_loss_weight {c.text_loss_weight:g} and credit "
            f"{c.credit}, got 0, which leaves nothing to learn; give a modality that has credit a positive weight"
        )
    return problems


def correction_problems(c: Any) -> list[str]:
    """What multiplies token losses and vespo takes into its own weight of a whole sequence."""
    problems = []
    if c.loss_type == "vespo" and c.importance_correction != "none" and c.importance_level == "sequence":
        problems.append(
            "importance_level: expected token for loss_type vespo, which makes the product itself, got sequence; take "
            "token"
        )
    if c.loss_type == "vespo" and c.top_entropy_quantile < 1:
        problems.append(
            f"top_entropy_quantile: expected 1 for loss_type vespo, which weighs whole sequences, got "
            f"{c.top_entropy_quantile:g}; leave it out"
        )
    return problems


def staleness_problems(c: Any) -> list[str]:
    """What another process that samples one step ahead cannot be had with."""
    if c.rollout_staleness != 1:
        return []
    problems, at = [], "with rollout_staleness 1"
    if c.importance_correction == "none":
        problems.append(
            f"importance_correction: expected truncate or mask {at}, whose rollouts are of the weights of one step "
            "before, got none; set --importance_correction truncate"
        )
    if c.zero_stage == 3:
        problems.append(
            f"zero_stage: expected 0, 1 or 2 {at}, which hands whole weights to another process, got 3; lower it"
        )
    if c.compile_decode:
        problems.append(f"compile_decode: expected false {at}, got true; leave it out")
    for name in ("nodes", "ranks_per_node"):
        if (getattr(c, name) or 1) > 1:
            problems.append(
                f"{name}: expected 1 {at}, which one rank alone can have so far, got {getattr(c, name)}; set "
                "--rollout_staleness 0"
            )
    return problems


def ranks_problem(count: int) -> str:
    """Why so many ranks cannot sample one step ahead; "" where they can."""
    if count == 1:
        return ""
    remedy = "set it to 0, or start one rank"
    return f"rollout_staleness: expected 0 on {count} ranks, none of which can sample ahead so far, got 1; {remedy}"


def gpus_problem(count: int) -> str:
    """Why a run on a GPU cannot sample one step ahead beside so many; two processes on one would share its time."""
    if count > 1:
        return ""
    remedy = "set it to 0, or make another GPU visible (CUDA_VISIBLE_DEVICES)"
    return f"rollout_staleness: expected a second GPU for the process that samples ahead, got {count}; {remedy}"


def judge_problems(c: Any) -> list[str]:
    words = "" if c.judge_url is None else address_problem(c.judge_url)
    problems = [f"judge_url: {words}"] if words else []
    if c.judge_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", c.judge_key_env, re.ASCII):
        problems.append(
            "judge_key_env: expected the name of an environment variable, got what cannot be one (not shown here: it "
            "may be the key itself); put the key into a variable, and its name here"
        )
    if problems or (c.judge_url is None) == (c.judge_model is None):
        return problems
    given, missing = ("judge_url", "judge_model") if c.judge_url is not None else ("judge_model", "judge_url")
    return [f"{missing}: expected beside {given} ({getattr(c, given)}), got none; give both, or neither"]


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
        problems.append("reward_weights: expected a positive one, got 0 for all, so that nothing is learnt; raise one")
    if not c.reward_funcs and c.REWARDS:
        problems.append(f"reward_funcs: expected at least one, got none; try {' '.join(c.REWARDS[:4])}")
    for name in sorted({name for name in c.reward_funcs if c.reward_funcs.count(name) > 1}):
        problems.append(f"reward_funcs: expected each reward once, got {name} twice; name it once")
    called = [reward_name(spec) for spec in dict.fromkeys(c.reward_funcs)]
    for name in sorted({name for name in called if called.count(name) > 1}):
        problems.append(f"reward_funcs: expected names that differ, as columns have them, got {name} twice; rename one")
    return problems


class AddressForm(NamedTuple):
    """What an address is of, for the words about one that cannot be."""

    example: str
    whose: str
    """Which one to give."""
    key: str
    """What to do with a key."""


CHAT_ADDRESS = AddressForm(
    "https://host/v1",
    "an OpenAI-compatible server's, up to and with /v1",
    "name the variable that holds the key (judge_key_env)",
)
SCORER_ADDRESS = AddressForm(
    "https://host:8080/path",
    "a reward server's",
    "make it in a function, which names the variable that holds a key (docs/rewards.md)",
)


def address_problem(address: str, *, allow_http: bool = False, form: AddressForm = CHAT_ADDRESS) -> str:
    """What is wrong with a server's address, in words; "" where nothing is. A secret in it would stand in the run's
    config.yaml; the words do not repeat it.

    Args:
        address: of a judge, what stands before `/chat/completions`.
        allow_http: plain http to other hosts than this machine.
        form: what the address is of.
    """
    expected = f"expected an address like {form.example}"
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        return f"{expected}, got one with no host or port that there can be; correct it"
    if "@" in url.netloc or url.query or url.fragment:
        return f"{expected}, got one with a user, password, query or fragment; {form.key}"
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        return f"{expected}, got {shown(address)}; give {form.whose}"
    if url.scheme == "http" and not (allow_http or is_this_machine(url.hostname)):
        return (
            f"expected https, or this machine, got {url.hostname} over plain http; use https, or forward its port to "
            "this machine"
        )
    return ""


def is_this_machine(host: str) -> bool:
    """Whether nobody else hears what is sent to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def dgs_problems(c: Any) -> list[str]:
    problems = []
    if c.dgs in ("max_variance", "top_k") and c.dgs_keep is None:
        problems.append(
            f"dgs_keep: expected a number of trajectories for dgs {c.dgs}, got none; try "
            f"{max(1, c.num_generations // 2)}"
        )
    if c.dgs == "max_variance" and c.dgs_keep == 1:
        problems.append("dgs_keep: expected at least 2 for max_variance, got 1, which has no variance; raise it")
    if c.dgs_keep is not None and c.dgs_keep > c.num_generations:
        problems.append(f"dgs_keep: expected at most num_generations = {c.num_generations}, got {c.dgs_keep}; lower it")
    return problems


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def path_problems(c: Any) -> list[str]:
    problems = []
    if c.model is not None:
        folder = os.path.expanduser(c.model)
        # `isdir`, unlike Path's, is False for a name that no file could have.
        if not os.path.isdir(folder) and (os.path.exists(folder) or not may_be_hub_name(c.model)):
            problems.append(
                f"model: expected a checkpoint folder or a hub name, got {c.model}, which is not a folder"
                f"{f' but {kind_of(folder)}' if os.path.exists(folder) else ''}; correct it"
            )
    if c.output_dir.exists() and not c.output_dir.is_dir():
        problems.append(f"output_dir: expected a folder, got the file {c.output_dir}; choose another name")
    return problems


def may_be_hub_name(model: str) -> bool:
    """`organisation/name` is one, also with `@revision` behind it; `./x` and `a/b/c` are paths, so is `runs/x` where
    a folder `runs` exists."""
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
            f"resume_from_checkpoint: expected latest, a checkpoint or a run's folder, got {asked}, no folder; correct "
            "the path"
        )
    for tracker in sorted(set(c.report_to)):
        if c.report_to.count(tracker) > 1:
            problems.append(f"report_to: expected each tracker once, got {tracker} twice; name it once")
        if tracker in ("none", "all"):
            if len(set(c.report_to)) > 1:
                problems.append(f"report_to: expected {tracker} alone, got {' '.join(c.report_to)}; take it out")
        elif importlib.util.find_spec(tracker) is None:
            problems.append(
                f"report_to: expected an installed tracker, got {tracker}, which is not; run "
                f"`pip install {tracker}`, or leave it out"
            )
    return problems


def held_out_problems(c: Any) -> list[str]:
    problems = []
    if c.eval_steps and not c.eval_samples:
        problems.append(f"eval_samples: expected items to score every {c.eval_steps} steps, got 0; 192 is usual")
    for name in ("load_best_model_at_end", "metric_for_best_model"):
        if getattr(c, name) and not c.eval_steps:
            problems.append(f"eval_steps: expected some for {name}, which needs scores on the way, got 0; give one")
    return problems


_REPOSITORY = re.compile(r"(?:\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]*\w)?", re.ASCII)


def hub_problems(c: Any) -> list[str]:
    """A repository's name that the hub's own library refuses; before anything is imported for it."""
    name = c.hub_model_id
    if name is None or (
        _REPOSITORY.fullmatch(name)
        and all(len(part) <= 96 for part in name.split("/"))
        and not re.search(r"--|\.\.|\.git$", name)
    ):
        return []
    return [f"hub_model_id: expected name or organisation/name of letters, digits, - _ and ., got {name!r}; rename it"]


TRAINING: tuple[Rule, ...] = (
    *(drawing_problems, objective_problems, correction_problems, staleness_problems),
    *(judge_problems, reward_problems, dgs_problems, masked_problems),
    *(path_problems, run_problems, held_out_problems, hub_problems, template_kwargs_problems),
)
"""What every training's settings must keep."""


# One recipe's own -----------------------------------------------------------------------------------------------------


def sync_r1_problems(c: Any) -> list[str]:
    problems = []
    if c.model is not None and c.policy != "janus":
        problems.append(
            f"policy: expected none beside model ({c.model}), which says its kind, got {c.policy}; give one"
        )
    held_out = c.eval_data
    there = held_out is None or os.path.exists(os.path.expanduser(split_named(held_out)[0]))
    if not there and not ("/" in str(held_out) and may_be_hub_name(split_named(held_out)[0])):
        problems.append(
            "eval_data: expected a folder in the UnifyBench++ layout, a table of prompts or a hub name, got "
            f"{held_out}, which is not there; leave it out for that of data"
        )
    if c.reward_funcs and not c.reward_weights and not any(map(c.weight_of, c.reward_funcs)):
        problems.append("identity_weight, judge_weight, text_weight: expected a positive one, got 0 for all; raise one")
    if c.preview_score == "clip" and c.clip is None:
        problems.append(
            "clip: expected a CLIP for preview_score clip, got none; give its folder or hub name, or leave "
            "preview_score out"
        )
    if c.anchor_fraction > 0 and c.anchor_beta == 0:
        problems.append(
            f"anchor_fraction: expected 0 with anchor_beta 0, as anchors learn from the KL term alone, got "
            f"{c.anchor_fraction:g}; set --anchor_fraction 0, or a positive anchor_beta"
        )
    return problems


def corl_problems(c: Any) -> list[str]:
    problems = []
    if c.cycle_image == c.cycle_text == "none" and "cycle" in c.reward_funcs:
        problems.append("cycle_image, cycle_text: expected one for cycle to compare by, got none for both; give one")
    if "judge" in c.reward_funcs and c.judge_url is None:
        problems.append("judge_url: expected an address for reward_funcs judge, got none; give one, or leave judge out")
    if c.stage == "merge" and len(c.merge_models) < 2:
        problems.append(
            f"merge_models: expected at least 2 checkpoints for stage merge, got {len(c.merge_models)}; list them"
        )
    if c.stage == "merge" and c.merge_base is None:
        problems.append("merge_base: expected the model that both were trained from for stage merge, got none; name it")
    if c.stage == "merge" and c.merge_method == "gaussian" and len(c.merge_models) > 2:
        problems.append(
            f"merge_models: expected 2 for merge_method gaussian, got {len(c.merge_models)}; take fnorm or mean"
        )
    if c.max_steps == 0 or c.refined_max_steps == 0:
        problems.append(
            "max_steps, refined_max_steps: expected at least 1, or -1 for num_train_epochs, got 0; raise it"
        )
    if c.tim_policy == "live" and c.zero_stage == 3 and "tim" in c.reward_funcs:
        problems.append(
            "tim_policy: expected frozen under zero_stage 3, where weights are not whole while rewards run, got live; "
            "take frozen"
        )
    return problems


def evaluation_problems(c: Any) -> list[str]:
    problems = []
    if c.benchmark and c.data_form is not None:
        problems.append(
            f"data_form: expected none beside benchmark, which says how data are read, got {c.data_form}; leave it out"
        )
    if c.image_folder is not None and not c.image_folder.expanduser().is_dir():
        problems.append(f"image_folder: expected a folder of pictures, got {c.image_folder}, which is none; correct it")
    if (
        c.data is not None
        and c.data_form in ("unifybench", "geneval", "dpg")
        and not os.path.exists(os.path.expanduser(c.data))
    ):
        problems.append(
            f"data: expected a folder or file in the form {c.data_form}, got {c.data}, which is not there; correct it"
        )
    if c.stage == "score" and not (c.output_dir / "manifest.json").is_file():
        problems.append(
            f"output_dir: expected what stage generate has written (manifest.json), got {c.output_dir} without; run "
            "--stage generate first"
        )
    if c.baseline and c.stage == "generate":
        problems.append("baseline: expected a stage that scores, got generate; leave stage out, or set --stage score")
    if not (c.greedy_texts or c.sampled_texts):
        problems.append("greedy_texts, sampled_texts: expected one to answer by, got both off; leave one on")
    if "dpg" in c.export and c.images_per_prompt > 4:
        problems.append(f"images_per_prompt: expected at most 4, DPG-Bench's grid, got {c.images_per_prompt}; lower it")
    if "wise" in c.export and c.images_per_prompt > 1:
        problems.append(f"images_per_prompt: expected 1, as WISE scores them, got {c.images_per_prompt}; leave it out")
    for kind in sorted(set(c.export)):
        if c.export.count(kind) > 1:
            problems.append(f"export: expected each kind once, got {kind} twice; name it once")
    return problems
