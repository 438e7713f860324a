"""All that a run reads of a source: what it trains on, what it is scored by, and what of the data it does not use.

Every loader hands its faults in, so that they are told together; a run ends where there is one (`read_whole`),
recipes/check_data.py lists them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import DataError, NoSplitError, shown
from ..records import Prompt
from ..settings.source_names import is_one_file
from .faults import Faults
from .prompts import benchmark_prompts, by_task, load_anchors, load_training_prompts
from .samples import Sample, chains_of, load_samples, samples_of
from .table import Table, open_table
from .unifybench import told_of_concepts
from .unused import lone_letters, unused_columns, unused_files


@dataclass(slots=True)
class Loaded:
    """What one source has for one method."""

    samples: list[Sample] = field(default_factory=list)
    """To train on; Sync-R1's hold one prompt each."""
    anchors: list[Prompt] = field(default_factory=list)
    held_out: dict[str, list[Prompt]] = field(default_factory=dict)
    """By task."""
    unused: list[str] = field(default_factory=list)
    """What is there and not used, in words."""
    told: list[str] = field(default_factory=list)
    """What the policy is told of concepts, in words: a line for all, then one for each concept and request."""
    no_scores: str = ""
    """Why nothing is held out, where nothing is."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What is left out because it cannot be used, and why: a row by its place in the data where it could not be read,
    else by its name (`row_of`)."""

    @property
    def prompts(self) -> list[Prompt]:
        return [prompt for sample in self.samples for prompt in sample]

    def everything(self) -> list[Prompt]:
        """To train on, anchors and held out."""
        return [*self.prompts, *self.anchors, *(prompt for some in self.held_out.values() for prompt in some)]

    def leave_out(self, bad: Mapping[str, str]) -> None:
        """Leaves out the rows of these names, each with what is wrong with it; halves of a row go together."""
        if not bad:
            return
        self.skipped |= bad
        self.samples = [sample for sample in self.samples if not any(row_of(prompt) in bad for prompt in sample)]
        self.anchors = [prompt for prompt in self.anchors if row_of(prompt) not in bad]
        kept = {task: [p for p in some if row_of(p) not in bad] for task, some in self.held_out.items()}
        self.held_out = {task: some for task, some in kept.items() if some}


def row_of(prompt: Prompt) -> str:
    """The name of the row that a prompt is of."""
    return prompt.sample or prompt.id


def read_whole(
    data: object,
    read: Callable[..., Loaded],
    *,
    skip: bool = False,
    without: Mapping[str, str] | None = None,
    remedy: str = "",
) -> Loaded:
    """What `read`, which takes `faults`, reads, if it is without fault.

    Args:
        data: what errors call it.
        read: a loader.
        skip: rows with a fault are left out, and `Loaded.skipped` says which.
        without: `Loaded.skipped` of before, which is left out again whatever it is by now.
        remedy: what an error says can be done where rows alone have faults.

    Raises:
        NoSplitError: the source is there and lacks the split.
        DataError: the first of the faults, and how many more there are; with `skip`, of those that are not a row's.
    """
    without = without or {}
    faults = Faults(keep=True, without=without)
    found = None
    try:
        found = read(faults=faults)
    except NoSplitError:
        raise
    except DataError as error:
        faults.add(error)
    if not skip or faults.of_no_row():
        faults.raise_first(data, remedy)
    assert found is not None  # else there was a fault that is no row's
    if faults.rows and not found.samples:
        raise DataError(f"{data}: every row has a fault; the first: {faults.found[0]}")
    found.leave_out(without)
    found.skipped |= faults.rows
    return found


def load_chains(
    source: Path,
    *,
    draws: bool = True,
    scored: bool = True,
    eval_data: Path | None = None,
    concept_info: bool = False,
    image_folder: Path | None = None,
    faults: Faults,
) -> Loaded:
    """What Sync-R1 reads.

    Args:
        source: a UnifyBench++ folder, or a table of prompts.
        draws: whether the model draws; one that does not answers.
        scored: whether held-out prompts are wanted.
        eval_data: where they come from; None: the held-out part of `source`.
        concept_info: the policy is told what info.json has of a concept.
        image_folder: of a table, what paths of pictures are relative to and confined to; None: the data's folder.
        faults: where what cannot be used is told of.
    """
    loaded = Loaded()
    if is_folder_of_concepts(source):
        prompts = load_training_prompts(source, concept_info=concept_info, faults=faults)
        loaded.samples = [(prompt,) for prompt in prompts]
        loaded.told = _told(source, prompts) if concept_info else []
        loaded.anchors = load_anchors(source, faults)
        loaded.unused = unused_files(source)
    else:
        table = open_table(source, "train", image_folder=image_folder, faults=faults)
        loaded.samples = [(prompt,) for prompt in chains_of(table, "train", draws, faults)]
        loaded.unused = unused_columns(table, _good_rows(table), loaded.prompts, "sync_r1")
        loaded.unused += lone_letters(loaded.prompts)
    if not scored:
        return loaded
    held_out = partial(_held_out_chains, draws=draws, told=concept_info, image_folder=image_folder, faults=faults)
    if eval_data is not None:
        loaded.held_out = held_out(eval_data)
    elif not is_one_file(source):
        with suppress(NoSplitError):  # a table may be all for training
            loaded.held_out = held_out(source)
    if not loaded.held_out:
        what = f"{'a file or a named split' if is_one_file(source) else source} has no held-out part"
        loaded.no_scores = f"no table before and after: {what}; give one by --eval_data, or --eval_samples 0"
    return loaded


def load_pairs(
    source: str | Path,
    split: str,
    *,
    draws: bool = True,
    instruction: str | None = None,
    image_folder: Path | None = None,
    faults: Faults,
) -> Loaded:
    """What CoRL's first stage reads of one split, drawings and questions; Sync-R1's arguments otherwise."""
    if is_folder_of_concepts(source):
        samples = load_samples(source, split, instruction=instruction, model_draws=draws, faults=faults)
        return Loaded(samples, unused=unused_files(Path(source)))
    table = open_table(source, split, image_folder=image_folder, faults=faults)
    samples = samples_of(table, split, instruction, draws, faults)
    loaded = Loaded(samples, unused=unused_columns(table, _good_rows(table), [], "corl"))
    loaded.unused += lone_letters(loaded.prompts)
    return loaded


def is_folder_of_concepts(source: str | Path) -> bool:
    """A UnifyBench++ folder, however incomplete."""
    return os.path.isdir(Path(source) / "concept")


def _told(root: Path, prompts: Sequence[Prompt]) -> list[str]:
    """See `Loaded.told`."""
    told = told_of_concepts(root)
    asked = {name: [p for p in prompts if p.concept == name and p.task == "rea"] for name in told}
    meant = {name: [prompt for prompt in some if prompt.options] for name, some in asked.items()}
    if not any(told.values()):
        return ["info.json has neither info nor extra_info of any concept: the policy is told nothing of them"]
    lines = [
        f"the policy is told of concepts: info of {sum(bool(one.info) for one in told.values())} and extra_info of "
        f"{sum(bool(one.facts) for one in told.values())} of {len(told)}; {sum(map(len, meant.values()))} of "
        f"{sum(map(len, asked.values()))} requests mean one item of it"
    ]
    for name, one in told.items():
        about = f"{'info' if one.info else 'no info'}, {len(one.facts)} items of extra_info"
        lines.append(f"<{name}>: {about}; {len(meant[name])} of {len(asked[name])} requests mean one of them")
        lines += [f"  {shown(prompt.request)} means {shown(prompt.answer)}" for prompt in meant[name]]
    return lines


def _held_out_chains(
    source: Path, *, draws: bool, told: bool, image_folder: Path | None, faults: Faults
) -> dict[str, list[Prompt]]:
    if is_folder_of_concepts(source):
        return benchmark_prompts(source, faults, concept_info=told)
    return by_task(
        chains_of(open_table(source, "test", image_folder=image_folder, faults=faults), "test", draws, faults)
    )


def _good_rows(table: Table) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for index in range(len(table)):
        with Faults(keep=True).here():  # told where prompts are made
            found.append(table.row(index))
    return found
