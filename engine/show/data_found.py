"""What a run found in its data, in its folder: data.json, and data.png with three examples to look at.

tasks     {use: {task: prompts}}; use: to train on, anchors, held out
pictures  how many are shown or compared with
skipped   [{row, why}]: rows that are left out because they cannot be used
unused    what is there and not used, in words
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records import Prompt
from ..whole_files import write_atomically
from .run_files import DATA_FILE, DATA_SHEET
from .sheets import prompt_sheet

MOST_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFound:
    """See above."""

    tasks: Mapping[str, Mapping[str, int]]
    pictures: int
    skipped: Mapping[str, str]
    unused: Sequence[str]
    examples: Sequence[Prompt]
    """For data.png."""

    def write(self, folder: Path) -> None:
        """Both files; no picture where there is no example."""
        content = {
            "tasks": self.tasks,
            "pictures": self.pictures,
            "skipped": [{"row": row, "why": why} for row, why in self.skipped.items()],
            "unused": [*self.unused],
        }
        write_atomically(folder / DATA_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if self.examples:
            prompt_sheet("Examples of the data, as the model is asked", self.examples).save(folder / DATA_SHEET)


def examples_among(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Three to look at: of different tasks as far as there are as many, else from all over the data."""
    first = {prompt.task: prompt for prompt in reversed(prompts)}
    spread = [prompts[index * (len(prompts) - 1) // (MOST_EXAMPLES - 1)] for index in range(MOST_EXAMPLES) if prompts]
    found = {prompt.id: prompt for prompt in (*reversed(first.values()), *spread)}
    return list(found.values())[:MOST_EXAMPLES]
