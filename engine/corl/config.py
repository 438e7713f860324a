"""Settings of a CoRL run: what every recipe has (train_config.py), and the two stages, rewards and merge of the method.

The defaults are the paper's (arXiv 2505.17534, section 3 and Table 5).  The fields that every recipe has are the first
stage's; `for_stage` gives the settings of any of the trainings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import ConfigError
from ..settings.rules import AT_LEAST_0, AT_LEAST_1, POSITIVE, RANGES, RULES, Range, Rule
from ..settings.train_config import DGSRule, TrainConfig

__all__ = ["REFINED", "ConfigError", "CorlConfig", "Stage", "Training"]

Stage = Literal["all", "unified", "refined", "t2i", "mcq", "oe", "merge"]
Training = Literal["unified", "generation", "understanding", "t2i", "mcq", "oe"]
"""One training: of the first stage (`unified`, or a half of it: the pilot study's strategies) or of the second."""
REFINED: tuple[Training, ...] = ("t2i", "mcq", "oe")
IMAGE_REWARDS = ("cycle", "tim", "clip_text", "clip_image", "judge")
TEXT_REWARDS = ("accuracy", "format", "bleu")
"""The built-in rewards, by what they judge."""


def _own_problems(c: CorlConfig) -> list[str]:
    problems = []
    if c.reward_weights and len(c.reward_weights) != len(c.reward_funcs):
        problems.append(
            f"reward_weights: expected {len(c.reward_funcs)}, one per reward_funcs, got {len(c.reward_weights)}; "
            "leave them out for the paper's"
        )
    for weight in c.reward_weights:
        if not weight >= 0:
            problems.append(f"reward_weights: expected numbers of at least 0, got {weight:g}; leave that reward out")
    if not c.reward_funcs:
        problems.append("reward_funcs: expected at least one, got none; try cycle tim accuracy format")
    for name in sorted({name for name in c.reward_funcs if c.reward_funcs.count(name) > 1}):
        problems.append(f"reward_funcs: {name} is given twice; name it once")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CorlConfig(TrainConfig):
    """Settings of `recipes/corl.py`. Without any, the embedded default runs: `recipes/corl_tiny.yaml`."""

    # --- model, data and output ---
    data: str | None = None
    """A hub data set's name, a folder or a file (parquet, JSONL) with the columns of x2x_rft_22k or of TRL's
    prompt-only format, or a UnifyBench++ folder. None: the rendered world."""
    data_t2i: str | None = None
    """Prompts of the second stage's drawing run. None: those of `data`."""
    data_mcq: str | None = None
    """Multiple-choice questions of the second stage. None: those of `data`."""
    data_oe: str | None = None
    """Open-ended questions of the second stage. None: those of `data`."""
    think_instruction: bool = True
    """Put questions that do not speak of <think> themselves into an instruction to think first and answer in tags."""
    data_split: str = "train"
    """Split of the data that is trained on."""
    eval_data: str | None = None
    """What the table before and after is made on. None: the eval_split of `data`; without one nothing is scored."""
    eval_split: str = "test"
    """Split of the data that is held out."""
    output_dir: Path = Path("runs/corl")
    """The run's folder, with one folder for each training; a number is appended when it already holds a run."""

    # --- stages ---
    stage: Stage = "all"
    """all: unified, then the three refined runs, then merge. Any of them alone starts from `model`; refined is the
    three; merge takes merge_models."""
    strategy: Literal["unified", "separate", "separate_merged", "alternating"] = "unified"
    """How the first stage trains both skills (the paper's pilot study): one reward for both; two models, one a skill;
    the same two, merged; or one model, a step of drawing after a step of answering."""

    # --- length of the run ---
    max_steps: int = -1
    """Steps of the first stage; -1: as many as num_train_epochs takes."""
    prompts_per_step: int = 16
    """Samples of a step in the first stage, over all ranks; each brings a group of drawings and a group of answers."""
    num_train_epochs: float = 1.0
    """Passes over the data of the first stage."""

    # --- sampling ---
    max_completion_length: int = 512
    """Text tokens at most; image segments always have the model's full number of tokens."""
    cfg_weight: float = 5.0
    """Classifier-free guidance w of image tokens in rollouts: u + w (c - u); 1 is without."""
    eval_cfg_weight: float = 5.0
    """Guidance when images are drawn for evaluation and for showing."""

    # --- the objective ---
    learning_rate: float = 4e-6
    """AdamW's peak in the first stage."""
    warmup_steps: int = 0
    """Linear warm-up; afterwards the rate falls linearly to a tenth."""
    beta: float = 0.0
    """Weight of the k3 KL in the first stage, which has none."""
    epsilon: float = 0.2
    """Clip range of the ratio. CoRL does not clip: with num_iterations 1 the ratio is 1, and nothing is clipped."""

    # --- rewards ---
    reward_funcs: tuple[str, ...] = ("cycle", "tim", "accuracy", "format")
    """cycle, tim, accuracy, format, clip_text, clip_image, judge, bleu, or your own: `module:function`,
    `file.py:function`, `verl@file.py:function` (docs/rewards.md)."""
    reward_weights: tuple[float, ...] = ()
    """One for each of reward_funcs. None given: 1, and understanding_weight for accuracy and format."""
    understanding_weight: float = 0.8
    """Lambda: R = R_cycle + R_TIM + lambda (R_acc + R_format) in the first stage. The second has no such weight."""
    cycle_image: Literal["lpips", "rmse", "none"] = "lpips"
    """Likeness of drawing and real picture: 1 - LPIPS (the paper), or 1 - RMSE in a sliding window."""
    cycle_text: Literal["spice", "bertscore", "soft_jaccard", "none"] = "spice"
    """Likeness of prompt and re-caption: SPICE (the paper), BERTScore F1 (the released code), or a soft Jaccard
    index."""
    cycle_normalise: bool = True
    """Divide the cycle reward by its two parts, so that it lies in [0, 1]; off: their sum, as released."""
    captioner: str = "Salesforce/blip-image-captioning-base"
    """BLIP that captions drawings: folder or hub name; `policy` lets a frozen copy of the policy do it, `world` takes
    the rendered world's."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk of LPIPS."""
    lpips_weights: str = "torchvision"
    """The trunk's weights: torchvision downloads them, a safetensors file, or random (seeded; for tests and tiny
    runs)."""
    lpips_size: int = 224
    """Side in pixels that pictures are brought to for LPIPS; 0: as they are."""
    spice_parser: str = "lizhuang144/flan-t5-base-VG-factual-sg"
    """FactualSceneGraph's parser: folder or hub name; `world` reads the captions of the rendered world."""
    spice_synonyms: Literal["wordnet", "none"] = "wordnet"
    """Whether words of one WordNet set are the same to SPICE; the table comes by `pip install --no-deps
    FactualSceneGraph`."""
    bert: str = "google-bert/bert-base-uncased"
    """Model of BERTScore: folder or hub name."""
    clip: str = "openai/clip-vit-base-patch32"
    """Model of clip_text and clip_image: folder or hub name."""
    tim_policy: Literal["live", "frozen"] = "live"
    """Whose hidden states match text and image: the policy in training (the paper), which it can learn to please, or a
    frozen copy."""
    accuracy_variant: Literal["paper", "released"] = "paper"
    """Binary accuracy, or the released code's, with partial credit by a soft Jaccard index."""
    unify: Literal["reward", "advantage", "none"] = "reward"
    """What the halves of a sample share in the first stage: one reward, one advantage (the sum of both, each of its own
    rewards), or nothing."""

    # --- dynamic group scaling ---
    dgs: DGSRule = "none"
    """Which trajectories are trained on once their rewards are known. CoRL trains on all; none prunes nothing."""
    preview_fraction: float = 0.0
    """Preview DGS: score a trajectory after this fraction of its image tokens; 0 switches the preview off."""

    # --- second stage ---
    refined_max_steps: int = -1
    """Steps of each refined run; -1: as many as refined_num_train_epochs takes."""
    refined_num_train_epochs: float = 1.0
    """Passes over a refined run's data."""
    refined_learning_rate: float = 1e-6
    """AdamW's peak in the refined runs."""
    refined_beta: float = 0.02
    """Weight of the k3 KL to the model that a refined run starts from."""
    refined_num_generations: int = 16
    """G of the refined runs."""
    refined_t2i_prompts_per_step: int = 16
    """Prompts of a step of the drawing run."""
    refined_text_prompts_per_step: int = 32
    """Prompts of a step of the mcq and oe runs."""

    # --- merge ---
    merge_method: Literal["gaussian", "fnorm", "mean"] = "gaussian"
    """How the mcq and oe models become one; gaussian is the paper's."""
    merge_base: str | None = None
    """W0, from which changes are measured. None: the model that the refined runs started from; --stage merge needs
    it."""
    merge_models: tuple[str, ...] = ()
    """--stage merge: folders of the models to merge."""

    RANGES: ClassVar[dict[str, tuple[Range, str]]] = RANGES | {
        "max_steps": (Range("at least 1, or -1", lambda value: value >= -1), "-1 takes num_train_epochs"),
        "refined_max_steps": (
            Range("at least 1, or -1", lambda value: value >= -1),
            "-1 takes refined_num_train_epochs",
        ),
        "num_train_epochs": (POSITIVE, "1 sees every sample once"),
        "refined_num_train_epochs": (POSITIVE, "1 sees every sample once"),
        "understanding_weight": (AT_LEAST_0, "the paper's is 0.8"),
        "lpips_size": (AT_LEAST_0, "0 leaves pictures as they are"),
        "refined_learning_rate": (POSITIVE, "the paper's is 1e-6"),
        "refined_beta": (AT_LEAST_0, "0 switches the KL term off"),
        "refined_num_generations": RANGES["num_generations"],
        "refined_t2i_prompts_per_step": (AT_LEAST_1, "a step needs a prompt"),
        "refined_text_prompts_per_step": (AT_LEAST_1, "a step needs a prompt"),
    }
    RULES: ClassVar[tuple[Rule, ...]] = (*RULES, _own_problems)

    def for_stage(self, training: Training, num_samples: int, **changes: Any) -> CorlConfig:
        """The settings of one training: the second stage's in place of the first's, epochs turned into steps.

        Args:
            training: which one.
            num_samples: of its data, to count an epoch.
            changes: other fields to replace, such as `model` and `output_dir`.

        Raises:
            ConfigError: there are fewer samples than one step takes.
        """
        if training in REFINED:
            t2i = training == "t2i"
            changes = {
                "max_steps": self.refined_max_steps,
                "num_train_epochs": self.refined_num_train_epochs,
                "learning_rate": self.refined_learning_rate,
                "beta": self.refined_beta,
                "num_generations": self.refined_num_generations,
                "prompts_per_step": self.refined_t2i_prompts_per_step if t2i else self.refined_text_prompts_per_step,
                **changes,
            }
        made = replace(self, **changes)
        if made.prompts_per_step > num_samples:
            name = "prompts_per_step"
            if training in REFINED:
                name = f"refined_{'t2i' if training == 't2i' else 'text'}_prompts_per_step"
            raise ConfigError(
                f"{name}: training {training} has {num_samples} samples, so a step cannot take {made.prompts_per_step} "
                "different ones; lower it"
            )
        if made.max_steps > 0:
            return made
        return replace(made, max_steps=max(1, math.ceil(num_samples * made.num_train_epochs / made.prompts_per_step)))

    def weight_of(self, name: str, training: Training) -> float:
        """The weight of a reward in one training: as given, or the paper's, whose lambda is the first stage's alone."""
        if self.reward_weights:
            return self.reward_weights[self.reward_funcs.index(name)]
        return self.understanding_weight if name in TEXT_REWARDS and training not in REFINED else 1.0
