"""docs/rewards.md: its example works in a run, its tables name what there is; its Python runs in test_docs.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from made import cache_folder
from recipe_cases import recipe_here
from scorer_servers import deqa, serving, unirl, verl_omni
from scorer_servers import openrlhf as rlhf

from syncr1.engine import rewards
from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.hooks import HOOKS
from syncr1.engine.rewards.judge.llm_judge import FIELDS
from syncr1.engine.rewards.reward import columns_of
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rewards.trial import try_rewards
from syncr1.engine.rewards.yours.adapters import ADAPTERS
from syncr1.engine.rewards.yours.custom import load_reward
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.reward_specs import SERVERS, reward_name

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


AESTHETICS = """
def make():
    def brightness(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)), {}
    return brightness
"""
SCORES = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": float((ground_truth or "") in solution_str), "acc": True}
"""
COMMANDS = [
    shlex.split(re.sub(r"(^|\s)#.*", "", line))  # within a word the sign is none of a comment
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's file, and one for each other codebase."""
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    (tmp_path / "scores.py").write_text(SCORES)
    (tmp_path / "aesthetics.py").write_text(AESTHETICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    return tmp_path


@pytest.fixture
def served() -> Iterator[Callable[[str], str]]:
    """A spec with the address of a small server that speaks what the page says, where it names a server."""
    speaks = {"unirl": unirl, "verl_omni": verl_omni, "flow_grpo": deqa, "openrlhf": rlhf}
    with ExitStack() as stack:

        def at_home(spec: str) -> str:
            codebase, found, name = spec.partition("@http://")
            if not found:
                return spec
            address, _, name = name.partition("#")
            path = address.partition("/")[2]
            url = stack.enter_context(serving(speaks[codebase])).url
            return f"{codebase}@{url}/{path}#{'red' if codebase == 'unirl' else name}".replace("/#", "#")

        yield at_home


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_name_functions_that_work(command: list[str], workplace: Path, served: Callable[[str], str]) -> None:
    """As printed: the settings are taken, and each function is loaded and called once. What `isolated@` does besides,
    in a process of its own, is in test_isolated.py."""
    python, script, *flags = command
    kind = {"recipes/corl.py": CorlConfig, "recipes/sync_r1.py": SyncR1Config}[script]
    default = ROOT / "recipes" / "corl_tiny.yaml" if kind is CorlConfig else None
    config = parse(kind, flags, default_yaml=default)
    own = [served(spec.removeprefix("isolated@")) for spec in config.reward_funcs if spec not in kind.REWARDS]
    prompts = [
        Prompt(id="a", task="t2i", text="a dog", segments=("image",), target="a dog"),
        Prompt(id="b", task="oe", text="what is it?", segments=("text",), answer="a dog", qa_type="OE"),
    ]
    functions = {reward_name(spec): load_reward(spec) for spec in own}
    assert python == "python" and functions
    assert try_rewards(functions, prompts, image_size=8, encode=lambda text: [1], timeout=20.0) == []


@pytest.mark.slow
def test_a_dry_run_calls_them_too(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, script, *flags = next(command for command in COMMANDS if "identity" in command)
    out, _ = recipe_here(capsys, script.removeprefix("recipes/"), *flags, "--dry_run")
    assert "rewards: concise loaded, and called once on made-up trajectories" in out
    (workplace / "my_rewards.py").write_text("def concise(completions): return completions")
    sys.modules.pop(load_reward("my_rewards.py:concise").__module__)
    _, err = recipe_here(capsys, script.removeprefix("recipes/"), *flags, "--dry_run", expected=2)
    assert "end its parameters with **_" in err


def test_weights_go_with_the_names(workplace: Path) -> None:
    """Those of the tiny world's settings are for its four rewards; a user's choice of others is not bound to them."""
    flags = ["--reward_funcs", "accuracy", "my_rewards.py:brightness"]
    tiny = ROOT / "recipes" / "corl_tiny.yaml"
    assert parse(CorlConfig, flags, default_yaml=tiny).reward_weights == ()
    assert parse(CorlConfig, [], default_yaml=tiny).reward_weights == (4.0, 0.3, 0.8, 0.8)
    assert parse(CorlConfig, [*flags, "--reward_weights", ".5", "2"], default_yaml=tiny).reward_weights == (0.5, 2.0)
    assert parse(CorlConfig, ["--config", str(tiny), *flags]).reward_weights == ()


def test_tables_name_what_there_is() -> None:
    sections = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")}
    columns, hooks, adapters, servers = (
        re.findall(r"^\| (`.*?) \|", sections[title], re.MULTILINE)
        for title in (
            *("# Your reward", "What it may log, and the training's state"),
            *("Functions of other codebases", "A reward server"),
        )
    )
    named = {name for cell in columns for name in re.findall(r"`(\w+)`", cell)}
    assert named <= set(columns_of([drawing(0, 0.5)]))
    assert [cell.strip("`") for cell in adapters] == list(ADAPTERS)
    assert [cell.strip("`") for cell in servers] == list(SERVERS)
    assert {re.sub(r"[`(].*", "", cell[1:]) for cell in hooks} == set(HOOKS)
    assert all(f"`{{{field}}}`" in PAGE for field in FIELDS)


def test_the_short_names_load_nothing_before_they_are_used() -> None:
    assert all(callable(getattr(rewards, name)) or name == "ADAPTERS" for name in rewards.__all__)
    assert rewards.ADAPTERS is ADAPTERS
    code = "import sys, syncr1.engine.rewards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
