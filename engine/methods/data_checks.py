"""What a run makes sure of before a model is loaded: its data are without fault, can be learnt from and be rewarded.

`--dry_run` and recipes/check_data.py make the same checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..data.loaded import Loaded, load_chains, row_of
from ..data.opened import pictures_of
from ..errors import DataError
from ..policies.auto import model_draws
from ..records import Prompt
from ..rewards.scorable import check_scorable
from ..settings.train_config import TrainConfig, WorldName
from ..show.data_found import DataFound, examples_among
from ..world.worlds import WORLDS, World
from .bad_rows import BadRows, say_skipped
from .first_pass import check_pictures, check_prompts
from .foreign import check_own_world
from .sync_r1_config import SyncR1Config

Say = Callable[[str], None]


def chains(config: SyncR1Config, source: Path, rows: BadRows) -> Loaded:
    """What Sync-R1 reads of `source`; raises DataError for what cannot be read."""
    draws, scored = model_draws(config.model), config.eval_samples > 0
    told = config.tells_concepts
    reading = partial(
        load_chains,
        source,
        draws=draws,
        scored=scored,
        eval_data=config.eval_data,
        concept_info=told,
        image_folder=config.image_folder,
    )
    return rows.read(source, reading)


def checked_chains(config: SyncR1Config, source: Path, say: Say, rows: BadRows | None = None) -> Loaded:
    """What Sync-R1 reads of `source`; the user's own data are checked, and `say` is told what is not used. Collective.

    Raises:
        DataError: what cannot be used of it; PictureError: pictures that cannot be read.
        ConfigError: none of the rewards can score it, or there is no model that could learn from it.
    """
    rows = rows or BadRows.of(config, None)
    loaded = chains(config, source, rows)
    for line in loaded.told[:1]:
        say(line)
    if config.drawing_turn == "none" and any(prompt.info for prompt in loaded.prompts):
        say(
            "info.json's info is said in a drawing turn alone, and drawing_turn is none; --drawing_turn sync_r1 has one"
        )
    if config.data is not None:
        say_unused(loaded.unused, say)
        check_usable(config, loaded, config.data, say, rows, world=config.world)
    return loaded


def check_usable(
    config: TrainConfig,
    loaded: Loaded,
    data: object,
    say: Say,
    rows: BadRows,
    *,
    plain: Sequence[Prompt] | None = None,
    world: WorldName = "rendered",
) -> None:
    """Refuses data of a user's that this run cannot train on, or leaves out what it cannot use; raises as
    `checked_chains`. Collective.

    Args:
        config: model and rewards.
        loaded: what was read.
        data: its name.
        say: takes lines about what has no reward, what is left out, and about progress.
        rows: what becomes of rows that cannot be used.
        plain: the prompts to train on without an instruction around; None: they have none.
        world: whose tiny base stands in without a model.
    """
    rows.settle(loaded, attribute_problems(loaded.everything(), data), data)
    if config.model is None:
        check_own_world(WORLDS[world], data, plain or loaded.prompts, pictures_of(loaded.prompts))
    names, remote = config.reward_funcs, config.judge_url is not None
    for line in check_scorable(["remote_judge" if remote and n == "judge" else n for n in names], loaded.prompts, data):
        say(line)
    check_pictures(loaded, data, rows)
    check_prompts(config, loaded, data, rows, world)
    say_skipped(loaded.skipped, len(loaded.samples), say)


def check_attributes(prompts: Sequence[Prompt], data: object) -> None:
    """Raises DataError where prompts have attributes that no reader knows: those of one embedded world are read."""
    for words in attribute_problems(prompts, data).values():
        raise DataError(words)


def attribute_problems(prompts: Sequence[Prompt], data: object) -> dict[str, str]:
    """Rows with such attributes, by name; none where one of the embedded worlds has all that there are."""
    unknown: list[tuple[Prompt, str, str]] = []
    for world in WORLDS.values():
        found = [one for prompt in prompts for one in _unknown(prompt, world)]
        if not found:
            return {}
        unknown = found if not unknown or len(found) < len(unknown) else unknown
    known = " or ".join(f"{one.title} ({', '.join(one.values)})" for one in WORLDS.values())
    return {
        row_of(prompt): f"{data}: prompt {prompt.id}: attributes: expected those of {known} with its values, got "
        f"{name}: {value}; leave attributes out, a judge then scores the drawings"
        for prompt, name, value in reversed(unknown)  # the first that a row has
    }


def _unknown(prompt: Prompt, world: World) -> list[tuple[Prompt, str, str]]:
    look = prompt.attributes or {}
    return [(prompt, name, value) for name, value in look.items() if value not in world.values.get(name, ())]


def found_in(loaded: Loaded) -> DataFound:
    """What a run says of its data in its folder."""
    uses = {
        "to train on": loaded.prompts,
        "anchors": loaded.anchors,
        "held out": [prompt for some in loaded.held_out.values() for prompt in some],
    }
    return DataFound(
        tasks={use: dict(Counter(p.task for p in some).most_common()) for use, some in uses.items() if some},
        pictures=len(pictures_of(loaded.everything())),
        skipped=loaded.skipped,
        unused=loaded.unused,
        examples=examples_among(loaded.prompts),
    )


def say_unused(unused: Sequence[str], say: Say, most: int = 8) -> None:
    """A line for each thing of the data that is not used, as far as they fit."""
    for line in unused[:most]:
        say(f"not used: {line}")
    if len(unused) > most:
        say(f"not used: {len(unused) - most} more; recipes/check_data.py lists them")
