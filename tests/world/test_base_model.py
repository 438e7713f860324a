"""The tiny base: deterministic, and as noisy as its settings say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from made import losses_of_short_base

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Rollout
from syncr1.engine.world.attributes import CONCEPT_BY_NAME, CONCEPTS, LOOKS
from syncr1.engine.world.base_model import FACT_VALUES, BaseSettings, NoisyTeacher, corpus, rumours, train_base
from syncr1.engine.world.items import TASKS
from syncr1.engine.world.texts import fact
from syncr1.engine.world.tiny_janus import build_policy

SHORT = BaseSettings(steps=4, batch=16, photo_pool=48)


def weights(policy: JanusPolicy) -> dict[str, torch.Tensor]:
    return dict(policy.state_dict())


@pytest.mark.slow
def test_same_settings_give_the_same_weights() -> None:
    """Bitwise, whatever the global generator did before; another seed gives others; training moved them."""
    torch.manual_seed(5)
    first = weights(train_base(SHORT))
    torch.manual_seed(6)
    torch.rand(3)
    np.random.seed(7)
    second, other = weights(train_base(SHORT)), weights(train_base(replace(SHORT, seed=1)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    untrained = weights(build_policy(corpus(), [c.name for c in CONCEPTS], seed=SHORT.seed))
    moved = {name for name in first if not torch.equal(first[name], untrained[name])}
    assert any("vision_model" in name for name in moved) and any("lm_head" in name for name in moved)
    assert not any("vqmodel" in name for name in moved)


@pytest.mark.slow
def test_the_loss_falls() -> None:
    """A short training already halves the loss, so that the whole one is not luck."""
    losses = losses_of_short_base()
    assert len(losses) == 4 and losses[2] < 0.6 * losses[0] and losses[3] < 0.6 * losses[0]


def test_rumours_are_wrong_values_of_half_of_all_facts() -> None:
    """A rumour is never the truth, always a value of its fact, and the table is the seed's alone."""
    settings = BaseSettings()
    table = rumours(settings)
    names = [name for name in FACT_VALUES if name not in ("place", "who", "recognition")]
    for (concept, name), value in table.items():
        assert name in names and value in FACT_VALUES[name] and value != fact(CONCEPT_BY_NAME[concept], name)
    possible = len(CONCEPTS) * len(names)
    spread = 3 * (settings.rumour_share * (1 - settings.rumour_share) / possible) ** 0.5
    assert abs(len(table) / possible - settings.rumour_share) < spread
    assert rumours(settings) == table != rumours(replace(settings, seed=1))
    assert len(rumours(replace(settings, rumour_share=1.0))) == possible and not rumours(
        replace(settings, rumour_share=0.0)
    )
    half = rumours(replace(settings, rumour_share=0.25))
    assert half.items() <= table.items(), "a smaller share keeps the same rumours, fewer of them"


@pytest.fixture(scope="module")
def teacher() -> NoisyTeacher:
    policy = build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=0)
    return NoisyTeacher(policy, BaseSettings(photo_pool=64))


def rate(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_noise_rates_are_those_of_the_settings(teacher: NoisyTeacher) -> None:
    """Rumours as often as said where there is one, slips where there is none (a slip may hit the truth)."""
    settings, table = teacher.settings, rumours(teacher.settings)
    told: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    lucky = []
    for concept in CONCEPTS:
        for name in ("colour", "food", "sound", "owner", "favourite"):
            truth, rumour = fact(concept, name), table.get((concept.name, name))
            for _ in range(120):
                said = teacher._told(concept.name, name, truth)
                assert said in FACT_VALUES[name]
                told[rumour is not None]["rumour" if said == rumour else "truth" if said == truth else "slip"] += 1
            lucky.append(1 / len(FACT_VALUES[name]))
    with_rumour, without = told[True], told[False]
    luck = sum(lucky) / len(lucky)
    assert rate_of(without, "rumour") == 0
    assert abs(rate_of(without, "slip") - settings.slip_rate * (1 - luck)) < 0.03
    assert abs(rate_of(with_rumour, "rumour") - settings.rumour_rate - settings.slip_rate * luck) < 0.03
    assert rate_of(with_rumour, "rumour") > rate_of(with_rumour, "truth"), (
        "the rumour is told more often than the truth"
    )


def rate_of(counts: Counter[str], name: str) -> float:
    return counts[name] / counts.total()


def test_drawings_slip_as_often_as_said(teacher: NoisyTeacher) -> None:
    """Each attribute is redrawn at random with `image_slip_rate`, so it changes a little less often."""
    changed = []
    for look in LOOKS[::4]:
        for _ in range(20):
            changed += [a != b for a, b in zip(look.words(), teacher._slipped(look).words(), strict=True)]
    sizes = [3, 5, 3, 2, 4]
    expected = teacher.settings.image_slip_rate * sum(1 - 1 / n for n in sizes) / 5
    assert abs(rate(changed) - expected) < 0.02


def test_general_tasks_are_clean_and_personal_ones_are_not(teacher: NoisyTeacher) -> None:
    """What RL must not damage is taught without noise; what the prompt spells out is drawn as told, up to slips."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        item = TASKS["generic_vqa"](rng, "train")
        assert teacher._answer(item) == item.answer
        picture = TASKS["generic_t2i"](rng, "train")
        trajectory = teacher._trajectory(picture)
        assert [s.kind for s in trajectory.segments] == ["image"] and picture.look is not None
        assert torch.equal(trajectory.segments[0].tokens, teacher._codes[LOOKS.index(picture.look)])
    personal = [TASKS["personal_qa"](rng, "train") for _ in range(200)]
    assert 0.2 < rate([teacher._answer(item) != item.answer for item in personal]) < 0.7


def test_some_drawings_are_learnt_without_their_prompt(teacher: NoisyTeacher) -> None:
    """Guidance needs an unconditional branch that has been trained, on exactly the prompt that sampling uses."""
    unconditional = teacher.policy.unconditional_tokens()[:-1].tolist()
    rng = np.random.default_rng(1)
    drawn: list[Rollout] = [teacher._trajectory(TASKS["generic_t2i"](rng, "train")) for _ in range(800)]
    share = rate([r.prompt_tokens.tolist() == unconditional for r in drawn])
    assert abs(share - teacher.settings.drop_condition) < 0.04
