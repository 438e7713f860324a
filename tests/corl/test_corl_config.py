"""config.py: the paper's settings are the defaults, each stage gets its own, and what cannot work is
refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from syncr1.engine.corl.config import CorlConfig, Training
from syncr1.engine.corl.training_data import AlternatingStream
from syncr1.engine.data.stream import PromptStream, Shuffled
from syncr1.engine.errors import ConfigError
from syncr1.engine.records import Prompt
from syncr1.engine.settings.schema import settings_of
from syncr1.engine.settings.yaml_files import from_yaml, to_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize(
    ("training", "group", "rate", "beta", "prompts", "weight"),
    [
        ("unified", 8, 4e-6, 0.0, 16, 0.8),
        ("t2i", 16, 1e-6, 0.02, 16, 1.0),
        ("mcq", 16, 1e-6, 0.02, 32, 1.0),
        ("oe", 16, 1e-6, 0.02, 32, 1.0),
    ],
)
def test_the_papers_table_is_the_default(
    training: Training, group: int, rate: float, beta: float, prompts: int, weight: float
) -> None:
    config = CorlConfig().for_stage(training, num_samples=22_479)
    assert (config.num_generations, config.learning_rate, config.beta) == (group, rate, beta)
    assert config.prompts_per_step == prompts and config.max_completion_length == 512
    assert config.weight_of("accuracy", training) == weight and config.weight_of("cycle", training) == 1.0
    assert config.max_steps == -(-22_479 // prompts)  # one epoch


def test_epochs_become_steps_and_steps_overrule_them() -> None:
    assert CorlConfig(num_train_epochs=0.5, prompts_per_step=4).for_stage("unified", 9).max_steps == 2
    assert CorlConfig(num_train_epochs=0.01).for_stage("unified", 99).max_steps == 1
    assert CorlConfig(max_steps=7).for_stage("unified", 99).max_steps == 7
    assert CorlConfig(max_steps=7, refined_max_steps=3).for_stage("mcq", 99).max_steps == 3


def test_weights_may_be_given() -> None:
    config = CorlConfig(reward_funcs=("format", "tim"), reward_weights=(0.1, 2.0))
    for training in ("unified", "mcq"):
        assert (config.weight_of("format", training), config.weight_of("tim", training)) == (0.1, 2.0)


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"reward_weights": (1.0,)}, "reward_weights", "expected 4"),
        ({"reward_weights": (1.0, 1.0, 1.0, -1.0)}, "reward_weights", "at least 0"),
        ({"reward_funcs": ()}, "reward_funcs", "at least one"),
        ({"reward_funcs": ("tim", "tim")}, "reward_funcs", "twice"),
        ({"cycle_image": "none", "cycle_text": "none"}, "cycle_image", "expected one for cycle"),
        ({"stage": "merge"}, "merge_models", "at least 2"),
        ({"stage": "merge", "merge_models": ("a", "b")}, "merge_base", "trained from"),
        ({"stage": "merge", "merge_models": ("a", "b", "c"), "merge_base": "w"}, "merge_models", "expected 2"),
        ({"stage": "mqc"}, "stage", "did you mean mcq"),
        ({"max_steps": 0}, "max_steps", "-1"),
        ({"num_generations": 1}, "num_generations", "at least 2"),
        ({"refined_num_generations": 1}, "refined_num_generations", "at least 2"),
        ({"refined_learning_rate": float("nan")}, "refined_learning_rate", "finite"),
        ({"zero_stage": 3}, "tim_policy", "frozen"),
        ({"understanding_weight": -0.1}, "understanding_weight", "at least 0"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CorlConfig(**settings)
    assert field in str(caught.value) and words in str(caught.value)


def test_every_setting_is_explained_once() -> None:
    found = settings_of(CorlConfig)
    assert all(setting.doc for setting in found) and len({s.name for s in found}) == len(found)
    sections = [setting.section for setting in found]
    assert sections == sorted(sections, key=sections.index), "a section's settings stand together"


def test_the_recipes_yaml_are_the_dataclass_and_what_the_tiny_world_changes() -> None:
    text = (RECIPES / "corl.yaml").read_text()
    assert text.endswith(to_yaml(CorlConfig())), "run the command at the top of recipes/corl.yaml"
    assert from_yaml(CorlConfig, RECIPES / "corl.yaml") == CorlConfig()
    tiny = from_yaml(CorlConfig, RECIPES / "corl_tiny.yaml")
    assert tiny.captioner == tiny.spice_parser == "world" and tiny.lpips_weights == "random"
    assert tiny.model is None and tiny.data is None


def test_alternating_steps_are_refilled_from_their_own_half() -> None:
    """A step of drawing gets drawings, one of answering answers, whatever was drawn before; a resumed run the same."""

    def stream() -> AlternatingStream:
        halves = [
            [(Prompt(id=f"{i}/{half}", task=half, text=f"{i}", sample=f"{i}"),) for i in range(8)]
            for half in ("t2i", "mm2t")
        ]
        orders = [Shuffled(half, seed=i, prompts_per_step=3) for i, half in enumerate(halves)]
        return AlternatingStream([PromptStream(order) for order in orders])

    first, resumed = stream(), stream()
    for task in ("t2i", "mm2t", "t2i"):
        had = first.next_step()
        more = first.more([2]) or []
        assert {prompt.task for prompt in (*had, *more)} == {task} and len({p.id for p in (*had, *more)}) == 5
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [p.id for p in resumed.next_step() + (resumed.more([3]) or [])] == [
        p.id for p in first.next_step() + (first.more([3]) or [])
    ]
