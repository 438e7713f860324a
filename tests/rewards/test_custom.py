"""Loading a user's reward by name: files, modules, classes, makers, adapters, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from syncr1.engine.errors import RewardSpecError
from syncr1.engine.rewards.yours.custom import load_reward
from syncr1.engine.settings.reward_specs import reward_name

SOURCE = """
from dataclasses import dataclass

LIMIT = 3
loads = []
loads.append(1)

def long_enough(*, completions, **_):
    return [float(len(text) >= LIMIT) for text in completions]

async def later(*, completions, **_):
    return [1.0] * len(completions)

@dataclass
class Weighted:
    weight: float = 2.0

    def __call__(self, *, completions, **_):
        return [self.weight] * len(completions)

    @staticmethod
    def fixed(*, completions, **_):
        return [7.0] * len(completions)

class Needy:
    def __init__(self, model):
        self.model = model

def make():
    return lambda *, completions, **_: [5.0] * len(completions)

def make_of(model):
    return make()

def broken():
    raise OSError("no weights there")

class Parsing:
    def __init__(self):
        raise SystemExit("usage: scores.py --model NAME")

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": float(solution_str == ground_truth)}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return "my_rewards.py"


def call(spec: str, *texts: str, **columns: Any) -> Any:
    return load_reward(spec)(completions=list(texts), **columns)


def test_functions_classes_and_makers_of_a_file(file: str) -> None:
    assert call(f"{file}:long_enough", "ab", "abc") == [0.0, 1.0]
    assert call(f"{file}:Weighted", "a") == [2.0]
    assert call(f"{file}:Weighted()", "a") == [2.0]
    assert call(f"{file}:Weighted.fixed", "a") == [7.0]
    assert call(f"{file}:make()", "a") == [5.0]
    assert call(f"{Path(file).resolve()}:long_enough", "abc") == [1.0]
    assert call(f"./{file}:long_enough", "abc") == [1.0]


def test_a_file_is_run_once_and_files_of_one_name_stay_apart(file: str, tmp_path: Path) -> None:
    first = load_reward(f"{file}:long_enough")
    assert load_reward(f"./{file}:long_enough") is first
    other = tmp_path / "a@b" / "my_rewards.py"
    other.parent.mkdir()
    other.write_text(SOURCE.replace("LIMIT = 3", "LIMIT = 1"))
    assert call("./a@b/my_rewards.py:long_enough", "a") == [1.0], "a mark within a path is no adapter"
    assert first(completions=["a"]) == [0.0]  # type: ignore[comparison-overlap]


def test_a_module(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reward = load_reward("syncr1.engine.rewards.builtin.format:format_reward")
    assert reward(completions=["x"], segments=[("text",)]) == [0.0]  # type: ignore[comparison-overlap]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scored_module_of_test.py").write_text(SOURCE)
    assert call("scored_module_of_test:Weighted", "a") == [2.0]


def test_an_adapter(file: str) -> None:
    columns = {"prompts": ["p"] * 2, "images": [None] * 2, "answer": ["dog"] * 2}
    reward = load_reward(f"verl@{file}:compute_score")
    assert reward(completions=["dog", "cat"], **columns) == [1.0, 0.0]  # type: ignore[comparison-overlap]
    assert reward.__name__ == "compute_score"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("accuracy", "expected .*path/to/file.py:function"),
        ("", "expected .*module:function"),
        (":f", "expected"),
        ("my_rewards.py:", "expected"),
        ("my_rewards.py:()", "expected"),
        ("missing.py:f", "no file .*missing.py; a path is relative"),
        ("my_rewards.py:short", "has no 'short'; it has: .*long_enough"),
        ("my_rewards.py:Weighted.nothing", "has no 'Weighted.nothing'"),
        ("my_rewards.py:LIMIT", "'LIMIT' is a int, which cannot be called"),
        ("my_rewards.py:Needy", "without arguments.*'model'.*make"),
        ("my_rewards.py:make_of()", "without arguments.*'model'"),
        ("my_rewards.py:broken()", "OSError: no weights there"),
        ("my_rewards.py:Parsing", "ends the program .exit usage: scores.py --model NAME.; have it raise"),
        (
            "no_such_package_here.rewards:f",
            "no module 'no_such_package_here'; install it, put its folder",
        ),
        ("syncr1.engine.rewards.nothing:f", "no module 'syncr1.engine.rewards.nothing'"),
        ("very@my_rewards.py:f", "unknown adapter 'very'; known: verl, verl_batch, verl_omni, openrlhf"),
        ("bad.py:f", "running .*bad.py failed with ZeroDivisionError"),
        ("wrong.py:f", "failed with SyntaxError"),
        ("needs.py:f", "ModuleNotFoundError: No module named 'no_such_package_here'"),
        ("needs:f", "needs imports 'no_such_package_here', which is not installed"),
    ],
)
def test_errors_name_the_spec_and_the_remedy(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, problem: str
) -> None:
    (tmp_path / "bad.py").write_text("1 / 0")
    (tmp_path / "wrong.py").write_text("def f(:")
    (tmp_path / "needs.py").write_text("import no_such_package_here")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # a failed import leaves nothing behind that would hide it the second time
        with pytest.raises(RewardSpecError, match=problem) as caught:
            load_reward(spec)
        assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "name"),
    [("my.py:bright", "bright"), ("verl@a.b:score", "score"), ("my.py:make()", "make"), ("accuracy", "accuracy")],
)
def test_reward_name(spec: str, name: str) -> None:
    assert reward_name(spec) == name


@pytest.mark.parametrize("ends", ["sys.exit(3)", "argparse.ArgumentParser().parse_args(['--x'])"])
def test_a_file_that_ends_the_program_is_told(tmp_path: Path, ends: str) -> None:
    (tmp_path / "r.py").write_text(f"import argparse, sys\ndef f(*, completions, **_): return []\n{ends}\n")
    with pytest.raises(RewardSpecError, match="ends the program"):
        load_reward(f"{tmp_path / 'r.py'}:f")


def test_what_a_file_sets_in_torch_stays_with_it(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_default_device('meta')\ntorch.use_deterministic_algorithms(True)\n"
        "def f(*, completions, **_): return []\n"
    )
    load_reward(f"{tmp_path / 'r.py'}:f")
    assert torch.is_grad_enabled() and torch.ones(1).dtype == torch.float32
    assert torch.ones(1).device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()
