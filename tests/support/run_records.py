"""Small real records for the tests of what a run writes and shows."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from syncr1.engine.records import Prompt, Rollout, Segment, SegmentKind, StepMetrics

HOSTILE = "</td><script>alert(1)</script>\"'&amp;"
"""Text that must arrive as text."""


def segment(kind: SegmentKind, length: int) -> Segment:
    zeros = torch.zeros(length)
    return Segment(kind=kind, tokens=zeros.long(), logp=zeros, logp_mixed=zeros, entropy=zeros)


def make_prompt(name: str, folder: Path | None = None, *, draws: bool = True) -> Prompt:
    """A drawing request, or a question; with a photo where a folder for it is given."""
    photo = None
    if folder is not None:
        photo = folder / f"{name}.png"
        Image.new("RGB", (24, 24), "green").save(photo)
    return Prompt(
        id=f"train/{name}",
        task="rea_gen" if draws else "qa",
        text=f"Draw <{name}> {HOSTILE}",
        answer="red",
        images=() if photo is None else (photo,),
        segments=("text", "image") if draws else ("text",),
    )


def make_rollout(prompt: Prompt, member: int, *, text: str = "red", size: int = 24) -> Rollout:
    """A trajectory with what its prompt's segments ask for."""
    image = torch.full((3, size, size), 0.1 * member) if "image" in prompt.segments else None
    return Rollout(
        prompt=prompt,
        member=member,
        prompt_tokens=torch.zeros(3, dtype=torch.int64),
        prompt_image=None,
        segments=tuple(segment(kind, 4) for kind in prompt.segments),
        text=text,
        image=image,
        attempts=1 + member % 2,
    )


def make_group(prompt: Prompt, size: int = 3) -> list[Rollout]:
    return [make_rollout(prompt, member) for member in range(size)]


def make_metrics(step: int, **values: float) -> StepMetrics:
    """One step's metrics under the trainer's names."""
    return StepMetrics(
        step=step,
        values={
            "reward": 0.5 + 0.01 * step,
            "reward_std": 0.2,
            "rewards/identity/mean": 0.4,
            "rewards/text/mean": float("nan"),
            "frac_reward_zero_std": 0.1,
            "loss": 0.01,
            "grad_norm": 1.0,
            "learning_rate": 1e-4,
            "kl/text": 0.1,
            "kl/image": 0.02,
            "entropy/text": 1.0,
            "entropy/image": 2.0,
            "clip_ratio/region_mean": 0.0,
            "dgs/tokens_saved_fraction": 0.3,
            "tokens_per_second": 1234.5,
            "num_tokens": 600.0,
            "step_time": 0.5,
            "reward_failures": 0.0,
            **values,
        },
        seconds={"rollout": 0.3, "update": 0.2},
    )


SCORES_BEFORE = {"qa": {"greedy": 0.8, "sampled": 0.55}, "rea_gen": {"checker": 0.6, "cnn": 0.59}, "summary": 0.6}
SCORES_AFTER = {"qa": {"greedy": 0.78, "sampled": 0.88}, "rea_gen": {"checker": 0.85, "cnn": 0.84}, "summary": 0.8}
