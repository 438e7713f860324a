"""Settings of recipes/check_data.py."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..settings.rules import may_be_hub_name
from ..settings.schema import Range, Rule, Settings
from ..settings.source_names import split_named


def check_problems(c: Any) -> list[str]:
    problems = []
    if c.data is None:
        problems.append("data: expected a folder, a file or a hub name, got none; name what is to be checked")
    for name in ("data", "eval_data"):
        path = getattr(c, name)
        base = "" if path is None else split_named(path)[0]
        if base and not os.path.exists(base) and not ("/" in base and may_be_hub_name(base)):
            problems.append(f"{name}: expected a folder, file or hub name, got {path}, which is not there; correct it")
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckDataConfig(Settings):
    """What is checked, and for which recipe."""

    # --- data ---
    data: Path | None = None
    """What is to be trained on, as the recipes take it."""
    image_folder: Path | None = None
    """Folder that paths of pictures are relative to and stay within. None: that of the data file."""
    recipe: Literal["sync_r1", "corl"] = "sync_r1"
    """Which recipe is to train on it; they read different columns."""
    eval_data: Path | None = None
    """What is to be scored on. None: the held-out part of `data`."""
    data_split: str = "train"
    """CoRL: split that is trained on."""
    eval_split: str = "test"
    """CoRL: split that is held out."""
    model: str | None = None
    """Checkpoint, a folder or a hub name, with whose template every prompt's tokens are counted; no weights are read.
    None: lengths are not checked."""
    max_completion_length: Annotated[int | None, Range("leave it out for the recipe's default", ge=1)] = None
    """Tokens of an answer that must fit behind a prompt. None: the recipe's default."""
    model_draws: bool = True
    """Whether the model draws; one that does not (Llama, Qwen, …) answers prompts without a picture."""

    RULES: ClassVar[tuple[Rule, ...]] = (check_problems,)
    RENAMED: ClassVar[dict[str, str]] = {"method": "set recipe", "split": "set data_split"}
