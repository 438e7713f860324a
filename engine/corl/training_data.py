"""What each training of CoRL sees: samples whose halves share a reward, or one half alone, step by step.

A sample is a drawing prompt and a question about one picture (`data/samples.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.samples import KINDS, Kind, Sample, load_samples
from ..data.stream import PromptStream, Shuffled
from ..errors import DataError
from ..policies.auto import model_draws
from ..records import Prompt
from .config import REFINED, CorlConfig, Training

WANTED: Mapping[Training, tuple[Kind, ...]] = {
    "unified": KINDS,
    "generation": ("t2i",),
    "understanding": ("mcq", "oe"),
    "t2i": ("t2i",),
    "mcq": ("mcq",),
    "oe": ("oe",),
}
"""The prompts that a training takes."""


def training_samples(
    config: CorlConfig, training: Training, root: str | Path, instruction: str | None = None
) -> list[Sample]:
    """The samples of one training.

    Args:
        config: whose `data_<training>` replaces `root` in the second stage.
        training: which one.
        root: the data of the first stage.
        instruction: what questions are put into, where they do not speak of `<think>` themselves; None: nothing.

    Raises:
        DataError: nothing of this kind is there.
    """
    source = getattr(config, f"data_{training}", None) or root
    samples = load_samples(
        source,
        config.data_split,
        kinds=WANTED[training],
        instruction=instruction,
        model_draws=model_draws(config.model),
    )
    if training != "unified" or config.unify == "none" or config.strategy == "alternating":
        samples = [tuple(replace(prompt, sample=None) for prompt in sample) for sample in samples]
    return samples


def refined_trainings(
    config: CorlConfig, root: str | Path, instruction: str | None = None
) -> tuple[tuple[Training, ...], str]:
    """The second stage's trainings that `stage` asks for and the data has prompts for, and why others are left out.

    Stage `all` on data of one skill has none: its first stage has trained just that.
    """
    if config.stage not in ("all", "refined"):
        return tuple(training for training in REFINED if training == config.stage), ""
    samples = load_samples(root, config.data_split, instruction=instruction, model_draws=model_draws(config.model))
    kinds = {prompt.task for sample in samples for prompt in sample}
    there = tuple(training for training in REFINED if getattr(config, f"data_{training}") or training in kinds)
    if config.stage == "all" and ("t2i" not in there or there == ("t2i",)):
        what = "to draw" if "t2i" not in there else "to answer"
        return (), f"nothing {what} in {root}: the first stage is all there is; --stage refined trains each kind apart"
    absent = [training for training in REFINED if training not in there]
    return there, f"nothing of {', '.join(absent)} in {root}: left out" if absent else ""


def held_out_prompts(config: CorlConfig, root: str | Path, instruction: str | None = None) -> dict[str, list[Prompt]]:
    """Task (t2i, mcq, oe) -> prompts of the evaluation split that the model can do; DataError where there is none."""
    if config.eval_data is None and os.path.isfile(root):
        raise DataError(f"{root}: a file has no held-out part; give one by --eval_data")
    draws, source = model_draws(config.model), config.eval_data or root
    kinds: tuple[Kind, ...] = KINDS if draws else ("mcq", "oe")
    tasks: dict[str, list[Prompt]] = {}
    for sample in load_samples(source, config.eval_split, kinds=kinds, instruction=instruction, model_draws=draws):
        for prompt in sample:
            tasks.setdefault(prompt.task, []).append(replace(prompt, sample=None))
    return {task: tasks[task] for task in KINDS if task in tasks}


def stream_of(
    config: CorlConfig, training: Training, samples: Sequence[Sample], rank: int = 0, world_size: int = 1
) -> PromptStream | AlternatingStream:
    """The prompts of each step: whole samples, or drawings and questions in turn (`strategy="alternating"`)."""

    def stream(some: Sequence[Sample], seed: int) -> PromptStream:
        return PromptStream(Shuffled(some, seed=seed, prompts_per_step=config.prompts_per_step), rank, world_size)

    if training != "unified" or config.strategy != "alternating":
        return stream(samples, config.seed)
    halves = [[tuple(p for p in sample if p.segments == (kind,)) for sample in samples] for kind in ("image", "text")]
    return AlternatingStream([stream([s for s in half if s], config.seed + i) for i, half in enumerate(halves)])


class AlternatingStream:
    """A step from each stream in turn: the pilot study's alternating RL."""

    def __init__(self, streams: Sequence[PromptStream]) -> None:
        self.streams, self.step = list(streams), 0

    def next_step(self) -> list[Prompt]:
        stream = self.streams[self.step % len(self.streams)]
        self.step += 1
        return stream.next_step()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        for stream, part in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(part)
