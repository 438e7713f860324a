"""docs/image_rewards.md: its table names every image reward and its checkpoints, its commands' settings are taken."""

from __future__ import annotations

import re
import shlex

import pytest
from helpers import ROOT

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.rewards.images.image_rewards import CHECKPOINTS, problems_of
from syncr1.engine.settings.flags import parse

PAGE = (ROOT / "docs" / "image_rewards.md").read_text()
ROWS = {cells[1].strip(" `"): cells[4] for line in PAGE.splitlines() if len(cells := line.split("|")) == 6}
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python")
]


def test_the_table_has_every_reward_with_its_checkpoints() -> None:
    assert set(ROWS) - {"name", "---"} == set(CHECKPOINTS)
    for name, keys in CHECKPOINTS.items():
        told = dict(re.findall(r"`(\w+)`: `([^`]+)`", ROWS[name]))
        assert told == {key: known for key, known in keys.items() if known is not None}
        assert all(f"`{key}`: " in ROWS[name] for key in keys)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_taken(command: list[str]) -> None:
    kind = {"recipes/corl.py": CorlConfig, "recipes/sync_r1.py": SyncR1Config}[command[1]]
    default = ROOT / "recipes" / "corl_tiny.yaml" if kind is CorlConfig else None
    config = parse(kind, command[2:], default_yaml=default)
    assert problems_of(config.reward_funcs, config.reward_models) == []
