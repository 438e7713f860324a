"""What a run makes sure of before a model is loaded: its data are without fault, can be learnt from and be rewarded.

`--dry_run` and recipes/check_data.py make the same checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..data.loaded import Loaded, load_chains, read_whole
from ..data.opened import check_pictures, pictures_of
from ..errors import DataError, PictureError
from ..policies.auto import model_draws
from ..processes.group import of_all_ranks
from ..records import Prompt
from ..rewards.scorable import check_scorable
from ..settings.train_config import TrainConfig, WorldName
from ..world.worlds import WORLDS, World
from .foreign import check_own_world
from .sync_r1_config import SyncR1Config

Say = Callable[[str], None]


def chains(config: SyncR1Config, source: Path) -> Loaded:
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
    return read_whole(source, reading)


def checked_chains(config: SyncR1Config, source: Path, say: Say) -> Loaded:
    """What Sync-R1 reads of `source`; the user's own data are checked, and `say` is told what is not used. Collective.

    Raises:
        DataError: what cannot be used of it; PictureError: pictures that cannot be read.
        ConfigError: none of the rewards can score it, or there is no model that could learn from it.
    """
    loaded = chains(config, source)
    for line in loaded.told[:1]:
        say(line)
    if config.drawing_turn == "none" and any(prompt.info for prompt in loaded.prompts):
        say(
            "info.json's info is said in a drawing turn alone, and drawing_turn is none; --drawing_turn sync_r1 has one"
        )
    if config.data is not None:
        say_unused(loaded.unused, say)
        check_usable(config, loaded, config.data, say, world=config.world)
    return loaded


def check_usable(
    config: TrainConfig,
    loaded: Loaded,
    data: object,
    say: Say,
    names: Sequence[str] = (),
    world: WorldName = "rendered",
) -> None:
    """Refuses data of a user's that this run cannot train on; raises as `checked_chains`. Collective.

    Args:
        config: model and rewards.
        loaded: what was read.
        data: its name.
        say: takes lines about what has no reward, and about progress.
        names: of the rewards where they are not those of the settings.
        world: whose tiny base stands in without a model.
    """
    check_attributes(loaded.everything(), data)
    if config.model is None:
        check_own_world(WORLDS[world], data, loaded.prompts, pictures_of(loaded.prompts))
    names = names or config.reward_funcs
    remote = config.judge_url is not None
    for line in check_scorable(["remote_judge" if remote and n == "judge" else n for n in names], loaded.prompts, data):
        say(line)
    open_all(loaded, say)


def check_attributes(prompts: Sequence[Prompt], data: object) -> None:
    """Raises DataError where prompts have attributes that no reader knows: those of one embedded world are read."""
    for world in WORLDS.values():
        unknown = [found for prompt in prompts for found in _unknown(prompt, world)]
        if not unknown:
            return
        prompt, name, value = unknown[0]
    known = " or ".join(f"{one.title} ({', '.join(one.values)})" for one in WORLDS.values())
    raise DataError(
        f"{data}: prompt {prompt.id}: attributes: expected those of {known} with its values, got {name}: {value}; "
        "leave attributes out, a judge then scores the drawings"
    )


def _unknown(prompt: Prompt, world: World) -> list[tuple[Prompt, str, str]]:
    look = prompt.attributes or {}
    return [(prompt, name, value) for name, value in look.items() if value not in world.values.get(name, ())]


def open_all(loaded: Loaded, say: Say) -> None:
    """Opens every picture, on one rank of each machine; all ranks raise the PictureError of any. Collective."""
    problem = ""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            check_pictures(pictures_of(loaded.everything()), say)
        except PictureError as error:
            problem = str(error)
    told = next(filter(None, of_all_ranks(problem)), "")
    if told:
        raise PictureError(told)


def say_unused(unused: Sequence[str], say: Say, most: int = 8) -> None:
    """A line for each thing of the data that is not used, as far as they fit."""
    for line in unused[:most]:
        say(f"not used: {line}")
    if len(unused) > most:
        say(f"not used: {len(unused) - most} more; recipes/check_data.py lists them")
