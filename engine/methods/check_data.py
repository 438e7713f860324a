"""The check of a user's data: every fault of it, what each task has, what is not used and why; recipes/check_data.py.

Reads as the recipes do, with the same readers, and trains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from ..data.faults import Faults
from ..data.loaded import Loaded, is_folder_of_concepts, load_chains, load_pairs
from ..data.opened import pictures_of
from ..errors import ConfigError, NoSplitError
from ..records import Prompt
from ..rewards.scorable import check_scorable
from ..settings.source_names import is_one_file
from .check_data_config import CheckDataConfig
from .data_checks import check_attributes
from .dry_run import policy_without_weights
from .first_pass import opened, unusable_rows
from .sync_r1_config import SyncR1Config

Say = Callable[[str], None]
PAPERS = ("cycle", "tim", "accuracy", "format")
"""CoRL's rewards by default."""
CORL_LENGTH = 512
"""CoRL's max_completion_length by default."""


def check(config: CheckDataConfig, say: Say = print) -> bool:
    """Says all there is to say about the data; whether they can be trained on."""
    faults = Faults(keep=True)
    loaded = Loaded()
    with faults.here():
        loaded = _read(config, faults)
    assert config.data is not None  # the settings were checked
    form = "a UnifyBench++ folder" if is_folder_of_concepts(config.data) else "a table"
    say(f"{config.data}: {form}, as recipes/{config.recipe}.py reads it")
    say(f"  to train on  {_counts(loaded.prompts)}")
    if loaded.anchors:
        say(f"  anchors      {_counts(loaded.anchors)}")
    say(f"  held out     {_counts(p for some in loaded.held_out.values() for p in some)}")
    with faults.here():
        check_attributes(loaded.everything(), config.data)
    refs = pictures_of(loaded.everything())
    broken = opened(refs, config.data)
    say(f"  pictures     {len(refs)}" + (", all can be read" if refs and not broken else ""))
    found = [*dict.fromkeys([*faults.found, *broken.values(), *_unusable(config, loaded)])]
    unrewarded: list[str] = []
    if loaded.prompts:
        try:
            names = SyncR1Config().reward_funcs if config.recipe == "sync_r1" else PAPERS
            unrewarded = check_scorable(names, loaded.prompts, config.data)
        except ConfigError as error:
            found.append(str(error))
    elif not found:
        found.append(f"{config.data}: nothing to train on")
    if loaded.no_scores:
        say(loaded.no_scores)
    for line in loaded.told:
        say(f"  {line}")
    _list(say, "not used", loaded.unused)
    _list(say, "without a reward, by the recipe's default ones", unrewarded)
    _list(say, "faults", found)
    of_rows = bool(loaded.samples) and not faults.of_no_row()
    skip = ", or --bad_rows skip trains on the other rows" if of_rows else ""
    say(f"nothing of this can be trained on until the faults are mended{skip}" if found else "no fault")
    return not found


def _read(config: CheckDataConfig, faults: Faults) -> Loaded:
    assert config.data is not None
    if config.recipe == "sync_r1":
        return load_chains(
            config.data,
            draws=config.model_draws,
            eval_data=config.eval_data,
            concept_info=True,
            image_folder=config.image_folder,
            faults=faults,
        )
    read = partial(load_pairs, draws=config.model_draws, image_folder=config.image_folder, faults=faults)
    loaded = read(config.data, config.data_split)
    with suppress(NoSplitError):
        if config.eval_data is not None or not (is_one_file(config.data) or is_folder_of_concepts(config.data)):
            held_out = read(config.eval_data or config.data, config.eval_split)
            for prompt in held_out.prompts:
                loaded.held_out.setdefault(prompt.task, []).append(prompt)
    if not loaded.held_out:
        loaded.no_scores = "no table before and after: nothing is held out; give it by --eval_data"
    return loaded


def _unusable(config: CheckDataConfig, loaded: Loaded) -> list[str]:
    """What is wrong with prompts that the model cannot take, where one is named."""
    if config.model is None:
        return []
    default = CORL_LENGTH if config.recipe == "corl" else SyncR1Config().max_completion_length
    policy, length = policy_without_weights(config.model), config.max_completion_length
    return [*unusable_rows(policy, loaded.everything(), config.data, "none", length or default).values()]


def _counts(prompts: Iterable[Prompt]) -> str:
    """`12: vqa 8 · qa 4`, or `nothing`."""
    counts = Counter(prompt.task for prompt in prompts)
    if not counts:
        return "nothing"
    return f"{counts.total()} prompts: " + " · ".join(f"{task} {count}" for task, count in counts.most_common())


def _list(say: Say, title: str, lines: list[str]) -> None:
    if lines:
        say(f"{title}: {len(lines)}")
        for line in lines:
            say(f"  {line}")
