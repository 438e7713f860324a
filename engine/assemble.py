"""Puts a run's parts together from its settings: data, policy, rewards, preview, evaluation.

Without `--model` and `--data` the parts are the embedded ones: a tiny Janus on a rendered world, made on first use and
kept in a cache folder.  With them, the same functions load a checkpoint and read a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncr1.engine.config import SyncR1Config
from syncr1.engine.dgs import PreviewGate
from syncr1.engine.evaluate.run import Evaluation, evaluate
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.prompts import load_benchmark
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.base import score
from syncr1.engine.rewards.caption import CaptionLikelihood
from syncr1.engine.rewards.ensemble import RewardSet, build_rewards, combine
from syncr1.engine.rewards.identity import IdentityReward
from syncr1.engine.rewards.judge import AttributeScorer, index_scorer, posterior_scorer
from syncr1.engine.rollout import Sampling, generate
from syncr1.engine.world.attributes import VALUES
from syncr1.engine.world.base_model import BaseSettings, train_base
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.disk import write_world
from syncr1.engine.world.general import write_general
from syncr1.engine.world.judge_cnn import JudgeCNN, train_judge
from syncr1.engine.world.vq import load_vq

Report = Callable[[str], None]


def cache_dir() -> Path:
    """Where made things are kept: `SYNCR1_CACHE`, or `~/.cache/syncr1`."""
    return Path(os.environ.get("SYNCR1_CACHE") or Path.home() / ".cache" / "syncr1")


def _fingerprint(*parts: object) -> str:
    """Names a cache entry: by its settings and by the code and weights that it is made with."""
    digest = hashlib.blake2b(digest_size=6)
    world = Path(__file__).parent / "world"
    for path in sorted([*world.glob("*.py"), *world.glob("*.safetensors"), *world.glob("*.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def _made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made on first use: in full, or not at all, even when two runs make it at the same time."""
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        make(draft)
        try:
            draft.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(draft)
    return folder


def prepare_data(config: SyncR1Config) -> Path:
    """The data folder: the user's, or the rendered world, written on first use."""
    if config.data is not None:
        return config.data

    def write(folder: Path) -> None:
        write_world(folder)
        write_general(folder)

    return _made_once(cache_dir() / f"world-{_fingerprint('world')}", write)


def prepare_policy(
    config: SyncR1Config, settings: BaseSettings | None = None, report: Report | None = None
) -> JanusPolicy:
    """The starting point: the user's checkpoint, or the tiny base, trained on first use."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    if config.model is not None:
        return JanusPolicy.from_pretrained(config.model, dtype=dtype)
    folder = tiny_base(settings or BaseSettings(), report)
    return JanusPolicy.from_pretrained(folder, dtype=dtype)


def tiny_base(settings: BaseSettings, report: Report | None = None) -> Path:
    """Folder of the tiny base in transformers' format; trained when the cache has none for these settings."""

    def say(step: int, loss: float) -> None:
        if report is not None:
            report(f"step {step + 1}/{settings.steps}  loss {loss:.2f}")

    folder = cache_dir() / f"tiny_base-{_fingerprint(asdict(settings))}"
    return _made_once(folder, lambda draft: train_base(settings, say).save(draft))


def build_reward_set(config: SyncR1Config, frozen: Policy, prompts: Sequence[Prompt]) -> RewardSet:
    """The ensemble reward: identity by a frozen vision tower, judge by attributes or by likelihood, text by BLEU.

    Args:
        config: weights.
        frozen: the policy as training begins (`Policy.frozen_copy`); it judges and does not change.
        prompts: what will be trained on; decides whether attributes can be read.
    """
    named = all(prompt.attributes for prompt in prompts if "image" in prompt.segments)
    return build_rewards(
        features=frozen.vision_features,
        image_size=frozen.image_size,
        scorer=posterior_scorer(checker_of(frozen).posterior, VALUES)
        if any(prompt.attributes for prompt in prompts)
        else None,
        caption_logp=None if named else CaptionLikelihood(frozen),
        identity_weight=config.identity_weight,
        judge_weight=config.judge_weight,
        text_weight=config.text_weight,
    )


def checker_of(policy: Policy) -> AttributeChecker:
    """The world's attribute reader, as this policy's image tokenizer draws the world."""
    return AttributeChecker.from_round_trip(lambda images: policy.draw(policy.image_tokens(images)))


def build_preview(config: SyncR1Config, rewards: RewardSet) -> PreviewGate | None:
    """Preview DGS, judged by the run's own image rewards on the partly drawn image; a redraw changes no text reward.

    None when it is switched off, and when no reward looks at images.
    """
    columns = [k for k, kind in enumerate(rewards.kinds) if kind == "image"]
    weights = rewards.weight_tensor()[columns]
    if config.preview_fraction == 0 or not bool((weights > 0).any()):
        return None
    judges = {rewards.names[k]: rewards.functions[rewards.names[k]] for k in columns}

    def scorer(prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        partial = [
            Rollout(
                prompt=prompt,
                member=0,
                prompt_tokens=torch.zeros(0),
                prompt_image=None,
                segments=(),
                text=text,
                image=image,
            )
            for prompt, text, image in zip(prompts, texts, images.cpu(), strict=True)
        ]
        return combine(score(partial, judges, timeout=config.reward_timeout).values, weights, renormalise=True)

    return PreviewGate(
        scorer,
        fraction=config.preview_fraction,
        threshold=config.preview_threshold,
        acceptance=config.preview_acceptance,
        max_attempts=config.preview_max_attempts,
        min_keep=config.preview_min_keep,
    )


class Evaluator:
    """Scores a policy on the held-out half of the data, before and after.

    Args:
        config: for sampling settings and the number of items.
        frozen: whose image tokenizer reads the rendered world and whose vision tower judges likeness.
        root: the data folder.
    """

    def __init__(self, config: SyncR1Config, frozen: Policy, root: Path) -> None:
        self.config = config
        self.benchmark = load_benchmark(root)
        self._likeness = IdentityReward(frozen.vision_features, frozen.image_size)
        self._scorers: dict[str, AttributeScorer] = {}
        if any(prompt.attributes for prompts in self.benchmark.values() for prompt in prompts):
            self._scorers = {
                "checker": index_scorer(checker_of(frozen).read_indices, VALUES),
                "cnn": index_scorer(_judge().read_indices, VALUES),
            }

    def __call__(self, policy: Policy) -> Evaluation:
        c = self.config

        def draw(prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
            sampling = Sampling(
                num_generations=1,
                temperature=temperature,
                max_text_tokens=c.max_completion_length,
                cfg_weight=c.eval_cfg_weight,
                seed=c.seed,
                step=-1,
            )
            return generate(policy, prompts, sampling)

        return evaluate(
            draw, self.benchmark, image_scorers=self._scorers, identity=self._likeness, num_items=c.eval_samples, seed=0
        )


def _judge() -> JudgeCNN:
    """The independent classifier, which no reward uses; trained in seconds at first use and kept."""

    def make(draft: Path) -> None:
        draft.mkdir()
        save_file(train_judge(load_vq()).state_dict(), draft / "judge.safetensors")

    folder = _made_once(cache_dir() / f"judge-{_fingerprint('judge')}", make)
    judge = JudgeCNN()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.requires_grad_(False).eval()
