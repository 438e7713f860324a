"""The page on rewards says what is true: its Python runs, its commands parse, its tables name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.judge.llm_judge import FIELDS
from syncr1.engine.rewards.reward import columns_of
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rewards.yours.adapters import ADAPTERS
from syncr1.engine.rewards.yours.custom import load_reward, reward_name
from syncr1.engine.settings.flags import parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def drawing(number: int, brightness: float) -> Rollout:
    prompt = Prompt(id="p", task="gen", text="a dog", segments=("image",))
    nothing = torch.zeros(0, dtype=torch.int64)
    image = torch.full((3, 4, 4), brightness)
    return Rollout(prompt=prompt, member=number, prompt_tokens=nothing, prompt_image=None, segments=(), image=image)


def test_python_blocks_run() -> None:
    scope: dict[str, object] = {}
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        exec(compile(block, "rewards.md", "exec"), scope)  # blocks build on those before them
    assert "127.0.0.1" in repr(scope["judge"]())  # type: ignore[operator]


def test_the_example_s_file_works_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    functions = {reward_name(spec): load_reward(spec) for spec in ("my_rewards.py:brightness", "my_rewards.py:concise")}
    table = score([drawing(0, 0.5), drawing(1, 0.25)], functions)
    assert table.names == ("brightness", "concise") and not any(table.failures.values())
    assert table.values[:, 0].tolist() == [1.0, 0.5] and table.values[:, 1].isnan().all()


def test_commands_parse() -> None:
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert commands and all(command[:2] == ["python", "recipes/corl.py"] for command in commands)
    configs = [parse(CorlConfig, command[2:]) for command in commands]
    assert configs[0].reward_funcs == ("accuracy", "format", "my_rewards.py:brightness")
    assert configs[0].reward_weights == (0.8, 0.8, 1.0)
    assert all(hasattr(config, "reward_timeout") for config in configs)


def test_tables_name_what_there_is() -> None:
    columns, adapters = (
        re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for table in PAGE.split("## Functions of")[:2]
    )
    named = {name for cell in columns for name in re.findall(r"`(\w+)`", cell)}
    assert named <= set(columns_of([drawing(0, 0.5)]))
    assert [cell.strip("`") for cell in adapters] == list(ADAPTERS)
    assert all(f"`{{{field}}}`" in PAGE for field in FIELDS)
