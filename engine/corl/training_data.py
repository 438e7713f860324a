"""What each training of CoRL sees: samples whose halves share a reward, or one half alone, step by step.

A sample is a drawing prompt and a question about one picture (`data/samples.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.loaded import load_pairs, read_whole
from ..data.samples import KINDS, Kind, Sample, load_samples
from ..data.stream import PromptStream, Shuffled
from ..errors import DataError
from ..methods.data_checks import Say, check_usable, say_unused
from ..policies.auto import model_draws
from ..records import Prompt
from ..settings.source_names import is_one_file
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
        image_folder=config.image_folder,
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
    samples = load_samples(
        root,
        config.data_split,
        instruction=instruction,
        image_folder=config.image_folder,
        model_draws=model_draws(config.model),
    )
    kinds = {prompt.task for sample in samples for prompt in sample}
    there = tuple(training for training in REFINED if getattr(config, f"data_{training}") or training in kinds)
    if config.stage == "all" and ("t2i" not in there or there == ("t2i",)):
        what = "to draw" if "t2i" not in there else "to answer"
        return (), f"nothing {what} in {root}: the first stage is all there is; --stage refined trains each kind apart"
    absent = [training for training in REFINED if training not in there]
    return there, f"nothing of {', '.join(absent)} in {root}: left out" if absent else ""


def all_trainings(config: CorlConfig, root: str | Path, instruction: str | None = None) -> tuple[Training, ...]:
    """The trainings that the settings ask for, of both stages, in their order."""
    first: tuple[Training, ...] = ()
    if config.stage in ("all", "unified"):
        whole = config.strategy in ("unified", "alternating")
        first = ("unified",) if whole else ("generation", "understanding")
    return (*first, *refined_trainings(config, root, instruction)[0])


def check_data(config: CorlConfig, say: Say) -> None:
    """Reads the user's data once for all trainings; says what is not used. Collective.

    Raises:
        DataError: what cannot be used of it; PictureError: pictures that cannot be read.
        ConfigError: none of the rewards can score it, or there is no model that could learn from it.
    """
    assert config.data is not None
    draws, folder = model_draws(config.model), config.image_folder
    sources = dict.fromkeys(
        str(source) for source in (config.data, config.data_t2i, config.data_mcq, config.data_oe) if source is not None
    )
    for source in sources:
        loaded = read_whole(source, partial(load_pairs, source, config.data_split, draws=draws, image_folder=folder))
        say_unused(loaded.unused, say)
        if source == str(config.data) and config.eval_samples:
            with suppress(DataError):  # said where the evaluation is put together
                loaded.held_out = held_out_prompts(config, config.data)
        check_usable(config, loaded, source, say)


def held_out_prompts(config: CorlConfig, root: str | Path, instruction: str | None = None) -> dict[str, list[Prompt]]:
    """Task (t2i, mcq, oe) -> prompts of the evaluation split that the model can do; DataError where there is none."""
    if config.eval_data is None and is_one_file(root):
        raise DataError(f"{root}: a file or a named split has no held-out part; give one by --eval_data")
    draws, source = model_draws(config.model), config.eval_data or root
    kinds: tuple[Kind, ...] = KINDS if draws else ("mcq", "oe")
    tasks: dict[str, list[Prompt]] = {}
    for sample in load_samples(
        source,
        config.eval_split,
        kinds=kinds,
        instruction=instruction,
        image_folder=config.image_folder,
        model_draws=draws,
    ):
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

    def more(self, wanted: Sequence[int]) -> list[Prompt] | None:
        """Of the stream that the step under way is of."""
        return self.streams[(self.step - 1) % len(self.streams)].more(wanted)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        for stream, part in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(part)
