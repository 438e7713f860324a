"""The pass over a user's data before the first step: every picture opened, every prompt's length counted.

One rank of each machine makes it, the others wait; all leave out the same rows or raise the same error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from .. import errors
from ..data.loaded import Loaded, row_of
from ..data.opened import broken_pictures, pictures_error, pictures_of, shown_by
from ..errors import ConfigError, PictureError
from ..policies.inputs import Inputs
from ..processes.group import of_all_ranks
from ..rollout.capacity import unusable_prompts
from ..settings.train_config import TrainConfig, WorldName
from .bad_rows import BadRows
from .dry_run import policy_without_weights

Say = Callable[[str], None]


def check_pictures(loaded: Loaded, data: object, say: Say, rows: BadRows) -> None:
    """Opens every picture; rows whose picture cannot be read are left out, or all ranks raise PictureError.
    Collective."""

    def look() -> dict[str, str]:
        refs = pictures_of(loaded.everything())
        broken = broken_pictures(refs, say)
        if broken and not rows.skip:
            raise pictures_error([*broken.values()], len(refs), rows.remedy)
        bad: dict[str, str] = {}
        for prompt in loaded.everything() if broken else ():
            if words := next((broken[ref] for ref in shown_by(prompt) if ref in broken), ""):
                bad.setdefault(row_of(prompt), words)
        return bad

    rows.settle(loaded, _on_all_ranks(look), data)


def check_prompts(config: TrainConfig, loaded: Loaded, data: object, rows: BadRows, world: WorldName) -> None:
    """Counts every prompt's tokens, through the checkpoint's own template; rows that the model cannot take are left
    out, or all ranks raise DataError. No weights are read. Collective."""

    def look() -> dict[str, str]:
        policy = Inputs.of(config).given_to(policy_without_weights(config.model, world))
        problems = unusable_prompts(policy, loaded.everything(), config.drawing_turn, config.max_completion_length)
        bad: dict[str, str] = {}
        for prompt, words in problems:
            bad.setdefault(row_of(prompt), words)
        return bad

    rows.settle(loaded, _on_all_ranks(look), data)


def _on_all_ranks(look: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What the first rank of any machine has found; what one of them raises, all do. Collective."""
    mine: tuple[dict[str, str], str, str] = {}, "", ""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            mine = look(), "", ""
        except (PictureError, ConfigError) as error:
            mine = {}, type(error).__name__, str(error)
    found: dict[str, str] = {}
    for told in of_all_ranks(json.dumps(mine)):
        bad, kind, words = json.loads(told)
        if kind:
            raise getattr(errors, kind)(words)
        found = bad | found
    return found
