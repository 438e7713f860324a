"""Settings of a Sync-R1 run: one frozen dataclass, TRL's names where TRL has one.

This file imports nothing heavy, so that a mistyped flag is refused before torch is loaded.
The docstring under a field is its flag's help and its comment in `recipes/sync_r1.yaml`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from syncr1.engine.settings import ConfigError, from_yaml, normalise, to_yaml

__all__ = ["ConfigError", "Credit", "DGSRule", "LossType", "SyncR1Config", "check", "from_yaml", "to_yaml"]

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Credit = Literal["shared", "per_segment", "image_only"]
DGSRule = Literal["variance_mass", "max_variance", "top_k", "random", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncR1Config:
    """Settings of `recipes/sync_r1.py`. Without any, the embedded default runs: a tiny Janus on a rendered world."""

    # --- model, data and output ---
    model: str | None = None
    """Janus checkpoint in transformers' format: a folder or a hub name. None: the tiny base, trained on first use."""
    data: Path | None = None
    """Folder in the UnifyBench++ layout. None: the rendered world."""
    output_dir: Path = Path("runs/sync_r1")
    """The run's folder; a number is appended when it already holds a run."""
    seed: int = 0
    """Seeds sampling, prompt order and dropout; the same seed gives the same run."""

    # --- length of the run ---
    max_steps: int = 100
    """Rollout-and-update steps."""
    prompts_per_step: int = 16
    """Groups per step, over all ranks (TRL: generation_batch_size / num_generations)."""
    num_generations: int = 8
    """G: trajectories per prompt. Their rewards are compared with each other, so at least 2."""
    num_iterations: int = 1
    """Optimizer updates per rollout (the GRPO paper's mu)."""

    # --- sampling ---
    temperature: float = 1.0
    """Of text and image sampling; log-probabilities are taken at the same temperature."""
    max_completion_length: int = 16
    """Text tokens at most; image segments always have the model's full number of tokens."""
    cfg_weight: float = 1.5
    """Classifier-free guidance w of image tokens in rollouts: u + w (c - u); 1 is without. Janus-Pro draws at 5."""
    eval_cfg_weight: float = 1.5
    """Guidance when images are drawn for evaluation and for showing."""

    # --- the objective ---
    learning_rate: float = 5e-4
    """AdamW's peak. The default suits the tiny base; for Janus-Pro start near 1e-6."""
    warmup_steps: int = 5
    """Linear warm-up; afterwards the rate falls linearly to a tenth."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip of the global gradient norm; 0 switches it off."""
    beta: float = 0.02
    """Weight of the k3 KL to the starting model; 0 needs no reference model."""
    loss_type: LossType = "dapo"
    """Per-token loss and its reduction, as TRL defines them."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token, or one per trajectory: the geometric mean over its tokens (GSPO)."""
    epsilon: float = 0.2
    """Clip range of the ratio: at least 1 - epsilon."""
    epsilon_high: float | None = None
    """Clip range upwards: at most 1 + epsilon_high. None: the same as epsilon. For cispo it is the bound itself."""
    delta: float | None = None
    """Bound of the ratio where the advantage is negative (two-sided clipping), above 1 + epsilon_high. None: none."""
    scale_rewards: Literal["group", "batch", "none", "loo"] = "group"
    """What an advantage is divided by: its group's or the batch's standard deviation, or nothing; loo: leave-one-out
    baseline."""
    credit: Credit = "shared"
    """Which reward a token answers for: both segments share one advantage (the paper), each its own segment's
    rewards, or only image tokens learn (the released code)."""
    text_loss_weight: float = 1.0
    """Weight of text tokens in the loss."""
    image_loss_weight: float = 1.0
    """Weight of image tokens in the loss."""

    # --- reward weights ---
    identity_weight: float = 0.26
    """Does the image show this very concept? The paper's total is R = .65 (.4 R_id + .6 R_vlm) + .35 R_txt."""
    judge_weight: float = 0.39
    """Does the image show what was asked for (R_vlm: a vision-language model's verdict)?"""
    text_weight: float = 0.35
    """Does the text say what is true of the concept (R_txt)?"""
    reward_timeout: float = 120.0
    """Seconds that a step's reward functions may take; a late one counts as failed, never as 0."""

    # --- dynamic group scaling ---
    dgs: DGSRule = "variance_mass"
    """Which trajectories are trained on once their rewards are known; random, the control, keeps as many as
    variance_mass does; none prunes nothing."""
    dgs_mass: float = 0.9
    """variance_mass: share of the group's sum of squared advantages that is kept."""
    dgs_keep: int | None = None
    """max_variance and top_k: trajectories kept per group."""
    preview_fraction: float = 0.25
    """Preview DGS: score a trajectory after this fraction of its image tokens; 0 switches the preview off."""
    preview_threshold: float | None = None
    """Score above which a preview is accepted at the start; adapts afterwards. None: from the first step's previews, so
    that the target acceptance is met."""
    preview_acceptance: float = 0.75
    """Acceptance rate that the threshold adapts to (the released code: 0.25)."""
    preview_max_attempts: int = 2
    """Tries per trajectory; the best one is kept when none passes."""
    preview_min_keep: int | None = None
    """Give up members whose tries all failed, except this many of a group, the best ones. None: nobody is given up."""

    # --- what stays as it was ---
    anchor_fraction: float = 0.1875
    """Share of a step's groups that are anchors: general prompts without reward, held in place by their KL term."""
    anchor_beta: float = 8.0
    """Weight of the KL term on anchors; it takes nothing from the rewards, so it can be far above beta:
    from 0.5 to 10, general drawing fell by .05 to .00 and a fifth of the gains went with it (measured)."""

    # --- the learner ---
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what the ranks share out. 1: optimizer state, 2: also gradients, 3: also parameters."""
    bf16: bool = False
    """Compute in bfloat16 with float32 master weights."""
    max_tokens_per_microbatch: int = 16384
    """Packed tokens of one forward and backward. Lower it when memory runs out; the result stays the same."""
    share_prefix: bool = True
    """Compute a prompt once for its whole group in training; off, every trajectory brings a copy: the same result."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in backward: less memory, a third more time."""
    use_liger_kernel: bool = True
    """Liger's RMSNorm, SwiGLU and RoPE in the language model, on a GPU."""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs, on a GPU and below ZeRO-3."""
    compile_decode: bool = False
    """Run decoding steps through torch.compile."""
    nodes: int = 1
    """Machines. This version trains on one."""

    # --- what is written and shown ---
    eval_samples: int = 192
    """Held-out items per task in the before/after table; 0 skips the evaluation."""
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers beside metrics.jsonl and report.html, which are always written."""
    logging_steps: int = 1
    """Every this many steps a line is printed (where there is no terminal) and sent to the trackers."""
    replay_check_steps: int = 10
    """Every this many steps the sampler's log-probabilities are compared with the trainer's; 0: never."""
    sample_steps: int = 20
    """Every this many steps an image grid with prompts and texts goes to `samples/`; 0: never."""
    resume_from_checkpoint: str | None = None
    """Not in this version."""
    dry_run: bool = False
    """Print the resolved settings and one data batch, then end."""

    RENAMED: ClassVar[dict[str, str]] = {
        "model_name_or_path": "set model",
        "dataset_name": "set data, a folder",
        "per_device_train_batch_size": "set prompts_per_step (groups) and max_tokens_per_microbatch (memory)",
        "gradient_accumulation_steps": "accumulation follows from max_tokens_per_microbatch",
        "generation_batch_size": "set prompts_per_step, which counts groups",
        "num_train_epochs": "set max_steps",
        "epsilon_low": "set epsilon",
        "reward_weights": "set identity_weight, judge_weight and text_weight",
        "vllm_mode": "rollouts are the engine's own",
        "use_vllm": "rollouts are the engine's own",
    }
    """Names that people bring from TRL, and what to set instead."""

    def __post_init__(self) -> None:
        check(self)


def check(config: SyncR1Config) -> None:
    """Raises one ConfigError that lists every setting that cannot work."""
    problems = normalise(config)
    if not problems:  # the rules below compare numbers, so types come first
        for rules in (_check_ranges, _check_objective, _check_dgs_and_anchors, _check_paths, _check_run):
            problems += rules(config)
    if problems:
        raise ConfigError.of(problems)


class _Range(NamedTuple):
    words: str
    holds: Callable[[float], bool]


_POSITIVE = _Range("more than 0", lambda value: value > 0)
_AT_LEAST_0 = _Range("at least 0", lambda value: value >= 0)
_AT_LEAST_1 = _Range("at least 1", lambda value: value >= 1)
_BELOW_1 = _Range("at least 0 and below 1", lambda value: 0 <= value < 1)
_SHARE = _Range("more than 0 and at most 1", lambda value: 0 < value <= 1)

_RANGES: dict[str, tuple[_Range, str]] = {
    "seed": (_Range("0 to 2^32 - 1", lambda value: 0 <= value < 2**32), "take any other number"),
    "max_steps": (_AT_LEAST_1, "--dry_run tries the settings without training"),
    "prompts_per_step": (_AT_LEAST_1, "a step needs a prompt"),
    "num_generations": (_Range("at least 2", lambda value: value >= 2), "a group of one has no advantage; try 8"),
    "num_iterations": (_AT_LEAST_1, "1 is on-policy"),
    "temperature": (_POSITIVE, "1 samples the model's own distribution; greedy groups would be all alike"),
    "max_completion_length": (_AT_LEAST_1, "raise it"),
    "cfg_weight": (_AT_LEAST_0, "1 is without guidance"),
    "eval_cfg_weight": (_AT_LEAST_0, "1 is without guidance"),
    "learning_rate": (_POSITIVE, "for Janus-Pro start near 1e-6"),
    "warmup_steps": (_AT_LEAST_0, "0 starts at the peak"),
    "weight_decay": (_AT_LEAST_0, "0 switches it off"),
    "max_grad_norm": (_AT_LEAST_0, "0 switches clipping off"),
    "beta": (_AT_LEAST_0, "0 switches the KL term off"),
    "epsilon": (_Range("more than 0 and below 1", lambda value: 0 < value < 1), "TRL's default is 0.2"),
    "epsilon_high": (_POSITIVE, "leave it out to use epsilon"),
    "text_loss_weight": (_AT_LEAST_0, "0 leaves text tokens out"),
    "image_loss_weight": (_AT_LEAST_0, "0 leaves image tokens out"),
    "identity_weight": (_AT_LEAST_0, "0 leaves this reward out"),
    "judge_weight": (_AT_LEAST_0, "0 leaves this reward out"),
    "text_weight": (_AT_LEAST_0, "0 leaves this reward out"),
    "reward_timeout": (_POSITIVE, "a reward needs time; 120 is the default"),
    "dgs_mass": (_SHARE, "1 keeps every trajectory that has an advantage"),
    "dgs_keep": (_AT_LEAST_1, "--dgs none keeps all"),
    "preview_fraction": (_BELOW_1, "0 switches the preview off"),
    "preview_threshold": (_Range("0 to 1", lambda value: 0 <= value <= 1), "rewards lie in this range"),
    "preview_acceptance": (_SHARE, "1 accepts every preview"),
    "preview_max_attempts": (_AT_LEAST_1, "1 never tries again"),
    "preview_min_keep": (_Range("at least 2", lambda value: value >= 2), "rewards are compared within a group"),
    "anchor_beta": (_AT_LEAST_0, "8 is the default"),
    "anchor_fraction": (_BELOW_1, "0 trains without anchors"),
    "max_tokens_per_microbatch": (_AT_LEAST_1, "16384 fits the tiny base"),
    "eval_samples": (_AT_LEAST_0, "0 skips the evaluation"),
    "logging_steps": (_AT_LEAST_1, "1 logs every step"),
    "replay_check_steps": (_AT_LEAST_0, "0 never checks"),
    "sample_steps": (_AT_LEAST_0, "0 never writes samples"),
    "nodes": (_AT_LEAST_1, "1 is this machine"),
}


def _check_ranges(c: SyncR1Config) -> list[str]:
    values = ((name, getattr(c, name), wanted, remedy) for name, (wanted, remedy) in _RANGES.items())
    return [
        f"{name}: expected {wanted.words}, got {value}; {remedy}"
        for name, value, wanted, remedy in values
        if value is not None and not wanted.holds(value)
    ]


def _check_objective(c: SyncR1Config) -> list[str]:
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
    if c.identity_weight == c.judge_weight == c.text_weight == 0:
        problems.append("identity_weight, judge_weight, text_weight: all are 0; give one of them a positive weight")
    if c.image_loss_weight == 0 and (c.text_loss_weight == 0 or c.credit == "image_only"):
        problems.append(
            f"image_loss_weight: 0 leaves nothing to learn with text_loss_weight {c.text_loss_weight:g} and credit "
            f"{c.credit}; give a modality that has credit a positive weight"
        )
    return problems


def _check_dgs_and_anchors(c: SyncR1Config) -> list[str]:
    problems = []
    if c.dgs in ("max_variance", "top_k") and c.dgs_keep is None:
        problems.append(
            f"dgs_keep: {c.dgs} needs a number of trajectories, got none; try {max(1, c.num_generations // 2)}"
        )
    if c.dgs == "max_variance" and c.dgs_keep == 1:
        problems.append("dgs_keep: one trajectory has no variance, got 1 for max_variance; give at least 2")
    if c.dgs_keep is not None and c.dgs_keep > c.num_generations:
        problems.append(f"dgs_keep: expected at most num_generations = {c.num_generations}, got {c.dgs_keep}; lower it")
    if c.anchor_fraction > 0 and c.anchor_beta == 0:
        problems.append(
            f"anchor_fraction: anchors learn from the KL term alone, so {c.anchor_fraction:g} is pointless with "
            "anchor_beta 0; set --anchor_fraction 0, or a positive anchor_beta"
        )
    return problems


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def _check_paths(c: SyncR1Config) -> list[str]:
    problems = []
    if c.model is not None:
        folder = Path(c.model).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                problems.append(f"model: expected transformers' format, but {c.model} has no config.json")
        elif folder.exists() or not _may_be_hub_name(c.model):
            problems.append(f"model: expected a checkpoint folder or a hub name, got {c.model}, which is not a folder")
    if c.data is not None and not c.data.is_dir():
        problems.append(
            f"data: expected a folder in the UnifyBench++ layout, got {c.data}, which is not a folder; "
            "leave it out for the rendered world"
        )
    if c.output_dir.exists() and not c.output_dir.is_dir():
        problems.append(f"output_dir: expected a folder, got the file {c.output_dir}; choose another name")
    return problems


def _may_be_hub_name(model: str) -> bool:
    """`organisation/name` is one; `./x` and `a/b/c` are paths, and so is `runs/x` where a folder `runs` exists."""
    if not _HUB_NAME.fullmatch(model) or model.startswith((".", "~")):
        return False
    return "/" not in model or not Path(model).parent.is_dir()


def _check_run(c: SyncR1Config) -> list[str]:
    problems = []
    if c.nodes > 1:
        problems.append(
            f"nodes: expected 1, got {c.nodes}; this version does not train on several machines. "
            "It does not fall back to one by itself: leave --nodes out to run on this machine"
        )
    if c.resume_from_checkpoint is not None:
        problems.append(
            f"resume_from_checkpoint: this version cannot resume yet, got {c.resume_from_checkpoint!r}; to train on "
            "from a saved model, pass its folder as --model"
        )
    for tracker in sorted(set(c.report_to)):
        if c.report_to.count(tracker) > 1:
            problems.append(f"report_to: {tracker} is given twice; name it once")
        if importlib.util.find_spec(tracker) is None:
            problems.append(f"report_to: {tracker} is not installed; run `pip install {tracker}`, or leave it out")
    return problems
