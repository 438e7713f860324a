"""docs/rewards.md: its example works in a run, its tables name what there is; its Python runs in test_docs.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncr1.engine import rewards
from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.judge.llm_judge import FIELDS
from syncr1.engine.rewards.reward import columns_of
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rewards.yours.adapters import ADAPTERS
from syncr1.engine.rewards.yours.custom import load_reward, reward_name
from syncr1.engine.settings.flags import parse

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def drawing(number: int, brightness: float) -> Rollout:
    prompt = Prompt(id="p", task="gen", text="a dog", segments=("image",))
    nothing = torch.zeros(0, dtype=torch.int64)
    image = torch.full((3, 4, 4), brightness)
    return Rollout(prompt=prompt, member=number, prompt_tokens=nothing, prompt_image=None, segments=(), image=image)


def test_the_example_s_file_works_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    functions = {reward_name(spec): load_reward(spec) for spec in ("my_rewards.py:brightness", "my_rewards.py:concise")}
    table = score([drawing(0, 0.5), drawing(1, 0.25)], functions)
    assert table.names == ("brightness", "concise") and not any(table.failures.values())
    assert table.values[:, 0].tolist() == [1.0, 0.5] and table.values[:, 1].isnan().all()


def test_the_judge_of_the_page_can_be_named(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("python") if "LLMJudge(" in block)
    (tmp_path / "my_rewards.py").write_text(block)
    assert "127.0.0.1" in repr(load_reward(f"{tmp_path}/my_rewards.py:judge()"))


def test_commands_name_what_the_page_says() -> None:
    first = next(line for block in blocks("bash") for line in block.splitlines())
    config = parse(CorlConfig, shlex.split(first)[2:])
    assert config.reward_funcs == ("accuracy", "format", "my_rewards.py:brightness")
    assert config.reward_weights == (0.8, 0.8, 1.0)


def test_tables_name_what_there_is() -> None:
    columns, adapters = (
        re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for table in PAGE.split("## Functions of")[:2]
    )
    named = {name for cell in columns for name in re.findall(r"`(\w+)`", cell)}
    assert named <= set(columns_of([drawing(0, 0.5)]))
    assert [cell.strip("`") for cell in adapters] == list(ADAPTERS)
    assert all(f"`{{{field}}}`" in PAGE for field in FIELDS)


def test_the_short_names_load_nothing_before_they_are_used() -> None:
    assert all(callable(getattr(rewards, name)) or name == "ADAPTERS" for name in rewards.__all__)
    assert rewards.ADAPTERS is ADAPTERS
    code = "import sys, syncr1.engine.rewards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
