"""Settings of a CoRL run: what every recipe has (train_config.py), and the two stages, rewards and merge of the method.

The defaults are the paper's (arXiv 2505.17534, section 3 and Table 5).  The fields that every recipe has are the first
stage's; `for_stage` gives the settings of any of the trainings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..errors import ConfigError
from ..settings.rules import TRAINING, corl_problems
from ..settings.schema import Range, Rule
from ..settings.train_config import (
    ClipRange,
    DGSRule,
    GroupSize,
    Guidance,
    KLWeight,
    LearningRate,
    MaxTokens,
    PreviewFraction,
    PromptsPerStep,
    TrainConfig,
    WarmupSteps,
)

__all__ = ["REFINED", "ConfigError", "CorlConfig", "Stage", "Training"]

Stage = Literal["all", "unified", "refined", "t2i", "mcq", "oe", "merge"]
Training = Literal["unified", "generation", "understanding", "t2i", "mcq", "oe"]
"""One training: of the first stage (`unified`, or a half of it: the pilot study's strategies) or of the second."""
REFINED: tuple[Training, ...] = ("t2i", "mcq", "oe")
IMAGE_REWARDS = ("cycle", "tim", "clip_text", "clip_image", "judge")
TEXT_REWARDS = ("accuracy", "format", "bleu")
"""The built-in rewards, by what they judge."""
Epochs = Annotated[float, Range("1 sees every sample once", gt=0)]


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
    max_steps: Annotated[int, Range("-1 takes num_train_epochs", ge=-1, words="at least 1, or -1")] = -1
    """Steps of the first stage; -1: as many as num_train_epochs takes."""
    prompts_per_step: PromptsPerStep = 16
    """Samples of a step in the first stage, over all ranks; each brings a group of drawings and a group of answers."""
    num_train_epochs: Epochs = 1.0
    """Passes over the data of the first stage."""

    # --- sampling ---
    max_completion_length: MaxTokens = 512
    """Text tokens at most; image segments always have the model's full number of tokens."""
    cfg_weight: Guidance = 5.0
    """Classifier-free guidance w of image tokens in rollouts: u + w (c - u); 1 is without."""
    eval_cfg_weight: Guidance = 5.0
    """Guidance when images are drawn for evaluation and for showing."""

    # --- the objective ---
    learning_rate: LearningRate = 4e-6
    """AdamW's peak in the first stage."""
    warmup_steps: WarmupSteps = 0
    """Steps over which the rate rises linearly to its peak; then it follows lr_scheduler_type."""
    beta: KLWeight = 0.0
    """Weight of the k3 KL in the first stage, which has none."""
    epsilon: ClipRange = 0.2
    """Clip range of the ratio. CoRL does not clip: with num_iterations 1 the ratio is 1, and nothing is clipped."""

    # --- rewards ---
    reward_funcs: tuple[str, ...] = ("cycle", "tim", "accuracy", "format")
    """cycle, tim, accuracy, format, clip_text, clip_image, judge, bleu, image rewards such as geneval, pickscore or ocr
    (docs/image_rewards.md), or your own: `module:function`, `file.py:function`, `verl@file.py:function`,
    `unirl@http://127.0.0.1:8080#pickscore` (docs/rewards.md)."""
    reward_weights: tuple[float, ...] = ()
    """One for each of reward_funcs. None given: 1, and understanding_weight for accuracy and format."""
    understanding_weight: Annotated[float, Range("the paper's is 0.8", ge=0)] = 0.8
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
    lpips_size: Annotated[int, Range("0 leaves pictures as they are", ge=0)] = 224
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
    preview_fraction: PreviewFraction = 0.0
    """Preview DGS: score a trajectory after this fraction of its image tokens; 0 switches the preview off."""

    # --- second stage ---
    refined_max_steps: Annotated[int, Range("-1 takes refined_num_train_epochs", ge=-1, words="at least 1, or -1")] = -1
    """Steps of each refined run; -1: as many as refined_num_train_epochs takes."""
    refined_num_train_epochs: Epochs = 1.0
    """Passes over a refined run's data."""
    refined_learning_rate: Annotated[float, Range("the paper's is 1e-6", gt=0)] = 1e-6
    """AdamW's peak in the refined runs."""
    refined_beta: KLWeight = 0.02
    """Weight of the k3 KL to the model that a refined run starts from."""
    refined_num_generations: GroupSize = 16
    """G of the refined runs."""
    refined_t2i_prompts_per_step: PromptsPerStep = 16
    """Prompts of a step of the drawing run."""
    refined_text_prompts_per_step: PromptsPerStep = 32
    """Prompts of a step of the mcq and oe runs."""

    # --- merge ---
    merge_method: Literal["gaussian", "fnorm", "mean"] = "gaussian"
    """How the mcq and oe models become one; gaussian is the paper's."""
    merge_base: str | None = None
    """W0, from which changes are measured. None: the model that the refined runs started from; --stage merge needs
    it."""
    merge_models: tuple[str, ...] = ()
    """--stage merge: folders of the models to merge."""

    RULES: ClassVar[tuple[Rule, ...]] = (*TRAINING, corl_problems)
    REWARDS: ClassVar[tuple[str, ...]] = (*IMAGE_REWARDS[:2], *TEXT_REWARDS[:2], *IMAGE_REWARDS[2:], *TEXT_REWARDS[2:])

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
                "image_beta": None,
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
