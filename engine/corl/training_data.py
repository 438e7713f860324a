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

from ..data.loaded import Loaded, load_pairs
from ..data.samples import KINDS, Kind, Sample, of_kinds
from ..data.stream import PromptStream, Shuffled
from ..errors import NoSplitError
from ..methods.bad_rows import BadRows
from ..methods.data_checks import Say, check_usable, found_in, say_unused
from ..policies.auto import model_draws
from ..records import Prompt
from ..settings.source_names import is_one_file
from ..show.data_found import DataFound
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


class TrainingData:
    """The data of all trainings of a run, each source read once.

    Args:
        config: the run's settings; `data_<training>` replaces `root` in the second stage.
        root: the data of the first stage.
        instruction: what questions are put into, where they do not speak of `<think>` themselves; None: nothing.
        rows: what becomes of rows that cannot be used; None: as the settings say.
    """

    def __init__(
        self, config: CorlConfig, root: str | Path, instruction: str | None = None, rows: BadRows | None = None
    ) -> None:
        self.config, self.root, self.instruction = config, root, instruction
        self.rows = rows or BadRows.of(config, None)
        self._draws = model_draws(config.model)
        self._read: dict[tuple[str, str], Loaded] = {}

    @property
    def sources(self) -> list[str]:
        """What is trained on, each once."""
        config = self.config
        named = (self.root, config.data_t2i, config.data_mcq, config.data_oe)
        return list(dict.fromkeys(str(source) for source in named if source is not None))

    @property
    def skipped(self) -> dict[str, str]:
        """See `Loaded.skipped`, of all that has been read so far."""
        return {row: words for loaded in self._read.values() for row, words in loaded.skipped.items()}

    def check(self, say: Say) -> None:
        """Refuses what cannot be used of the user's data, or leaves it out; says what is not used. Collective.

        Raises:
            DataError: what cannot be used of it; PictureError: pictures that cannot be read.
            ConfigError: none of the rewards can score it, or there is no model that could learn from it.
        """
        for source in self.sources:
            loaded = self._of(source, self.config.data_split)
            say_unused(loaded.unused, say)
            held_out = plain = None
            if source == str(self.root) and self.config.eval_samples:
                with suppress(NoSplitError):  # said where the evaluation is put together
                    held_out = self._held_out()
                    loaded.held_out = {"held out": held_out.prompts}
            if self.config.model is None and self.instruction is not None:
                plain = self._load(source, self.config.data_split, None).prompts
            check_usable(self.config, loaded, source, say, self.rows, plain=plain)
            if held_out is not None:
                held_out.leave_out(loaded.skipped)

    def found(self) -> DataFound:
        """What has been read, for the run's folder."""
        for source in self.sources:
            self._of(source, self.config.data_split)
        split = self.config.eval_split
        held_out = [loaded for (_, part), loaded in self._read.items() if part == split != self.config.data_split]
        trained = [loaded for loaded in self._read.values() if not any(loaded is one for one in held_out)]
        whole = Loaded(
            [sample for loaded in trained for sample in loaded.samples],
            held_out={"": [prompt for loaded in held_out for prompt in loaded.prompts]},
            unused=[line for loaded in trained for line in loaded.unused],
            skipped=self.skipped,
        )
        return found_in(whole)

    def samples(self, training: Training) -> list[Sample]:
        """The samples of one training; DataError where nothing of its kind is there."""
        config = self.config
        source = str(getattr(config, f"data_{training}", None) or self.root)
        samples = of_kinds(self._of(source, config.data_split).samples, WANTED[training], source, config.data_split)
        if training != "unified" or config.unify == "none" or config.strategy == "alternating":
            samples = [tuple(replace(prompt, sample=None) for prompt in sample) for sample in samples]
        return samples

    def refined(self) -> tuple[tuple[Training, ...], str]:
        """The second stage's trainings that `stage` asks for and the data has prompts for, and why others are left
        out.

        Stage `all` on data of one skill has none: its first stage has trained just that.
        """
        config, root = self.config, self.root
        if config.stage not in ("all", "refined"):
            return tuple(training for training in REFINED if training == config.stage), ""
        kinds = {prompt.task for prompt in self._of(str(root), config.data_split).prompts}
        there = tuple(training for training in REFINED if getattr(config, f"data_{training}") or training in kinds)
        if config.stage == "all" and ("t2i" not in there or there == ("t2i",)):
            what = "to draw" if "t2i" not in there else "to answer"
            told = f"nothing {what} in {root}: the first stage is all there is; --stage refined trains each kind apart"
            return (), told
        absent = [training for training in REFINED if training not in there]
        return there, f"nothing of {', '.join(absent)} in {root}: left out" if absent else ""

    def trainings(self) -> tuple[Training, ...]:
        """Those that the settings ask for, of both stages, in their order."""
        first: tuple[Training, ...] = ()
        if self.config.stage in ("all", "unified"):
            whole = self.config.strategy in ("unified", "alternating")
            first = ("unified",) if whole else ("generation", "understanding")
        return (*first, *self.refined()[0])

    def held_out(self) -> dict[str, list[Prompt]]:
        """Task (t2i, mcq, oe) -> prompts of the evaluation split that the model can do.

        Raises:
            NoSplitError: nothing is held out.
            DataError: what is held out cannot be used.
        """
        tasks: dict[str, list[Prompt]] = {}
        kinds: tuple[Kind, ...] = KINDS if self._draws else ("mcq", "oe")
        source, split = self.config.eval_data or self.root, self.config.eval_split
        for sample in of_kinds(self._held_out().samples, kinds, source, split):
            for prompt in sample:
                tasks.setdefault(prompt.task, []).append(replace(prompt, sample=None))
        return {task: tasks[task] for task in KINDS if task in tasks}

    def _held_out(self) -> Loaded:
        if self.config.eval_data is None and is_one_file(self.root):
            told = "a file or a named split has no held-out part; give one by --eval_data"
            raise NoSplitError(f"{self.root}: {told}")
        return self._of(str(self.config.eval_data or self.root), self.config.eval_split)

    def _of(self, source: str, split: str) -> Loaded:
        if (source, split) not in self._read:
            self._read[source, split] = self._load(source, split, self.instruction)
        return self._read[source, split]

    def _load(self, source: str, split: str, instruction: str | None) -> Loaded:
        folder = self.config.image_folder
        read = partial(load_pairs, source, split, draws=self._draws, instruction=instruction, image_folder=folder)
        return self.rows.read(source, read)


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
