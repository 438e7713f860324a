"""CoRL's tiny base: deterministic, tags that survive, and noise as its settings say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Rollout
from syncr1.engine.rewards.builtin.format import format_reward
from syncr1.engine.world.attributes import ATTRIBUTES, LOOK_INDEX, TRAIN_LOOKS, VALUES, Look
from syncr1.engine.world.corl_base import (
    BROKEN,
    DESCRIBE,
    TAGS,
    WELL_FORMED,
    CorlBaseSettings,
    NoisyTutor,
    confusions,
    corl_corpus,
    train_corl_base,
)
from syncr1.engine.world.tiny_janus import build_policy
from syncr1.engine.world.x2x import LETTERS, ask, caption_of

SHORT = CorlBaseSettings(steps=3, batch=10, photo_pool=24, noise_start=0.5)


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return build_policy(corl_corpus(), [], seed=0, tags=TAGS)


@pytest.fixture(scope="module")
def tutor(policy: JanusPolicy) -> Callable[..., NoisyTutor]:
    """A tutor past its clean part, with these settings; all share the encoded looks."""
    first = NoisyTutor(policy, SHORT)

    def make(**changes: float) -> NoisyTutor:
        made = copy.copy(first)
        made.settings = replace(SHORT, **changes)  # type: ignore[arg-type]
        made.rng, made.confused, made.noisy = np.random.default_rng(4), confusions(made.settings), True
        return made

    return make


@pytest.mark.slow
def test_same_settings_give_the_same_weights() -> None:
    """Bitwise, whatever the global generator did before; another seed gives others; the tokenizer is not trained."""
    torch.manual_seed(5)
    policy = train_corl_base(SHORT)
    first = policy.state_dict()
    torch.manual_seed(6)
    second, other = (train_corl_base(s).state_dict() for s in (SHORT, replace(SHORT, seed=1)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not policy.training
    untrained = build_policy(corl_corpus(), [], seed=SHORT.seed, tags=TAGS).state_dict()
    moved = {name for name in first if not torch.equal(first[name], untrained[name])}
    assert any("vision_model" in name for name in moved) and any("generation_head" in name for name in moved)
    assert not any("vqmodel" in name for name in moved)


def test_tags_and_letters_are_single_tokens_that_survive_decoding(policy: JanusPolicy) -> None:
    for text in (*TAGS, *LETTERS):
        assert policy.text_tokens(f" {text}").numel() == 2, f"{text}: one token and the end"
    reply = WELL_FORMED.format(thought="the hat is crown", answer="B")
    tokens = policy.text_tokens(reply)
    assert tokens.numel() == 10 and policy.decode_text(tokens).replace(" ", "") == reply.replace(" ", "")
    assert not set(tokens[:-1].tolist()) & set(policy._forbidden_text.tolist()), "each can be sampled"


def test_every_text_is_short_and_known(policy: JanusPolicy) -> None:
    """Nothing is spelt in letters: the model's context and its number of answer tokens are small."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for look in TRAIN_LOOKS[::9]:
            asked = [ask(rng, look, split, kind).text for kind in ("MC", "OE")]  # type: ignore[arg-type]
            lengths = [policy.text_tokens(text).numel() for text in (*asked, caption_of(rng, look, split))]  # type: ignore[arg-type]
            assert max(lengths) <= 32
    assert policy.text_tokens(DESCRIBE).numel() < 24


@pytest.mark.parametrize("form", [WELL_FORMED, *BROKEN])
def test_the_format_reward_agrees_on_what_is_broken(policy: JanusPolicy, form: str) -> None:
    tokens = policy.text_tokens(form.format(thought="the colour is yellow", answer="yellow"))
    assert tokens.numel() <= 24
    text = policy.decode_text(tokens)
    [value] = format_reward(prompts=["?"], completions=[text], segments=[("text",)])
    assert value == float(form == WELL_FORMED)


def test_confusions_are_other_values_of_half_of_all() -> None:
    table = confusions(CorlBaseSettings())
    assert all(value in VALUES[name] and value != truth for (name, truth), value in table.items())
    possible = sum(len(VALUES[name]) for name in ATTRIBUTES)
    assert table == confusions(CorlBaseSettings()) and 3 <= len(table) <= possible - 3
    assert len(confusions(CorlBaseSettings(confusion_share=1.0))) == possible
    assert not confusions(CorlBaseSettings(confusion_share=0.0))


def replies(tutor: NoisyTutor, kind: str, number: int = 1500) -> list[tuple[str, str, str]]:
    """(truth, thought's value, answered value) of well-formed replies about colours."""
    found = []
    for index in range(number):
        look = TRAIN_LOOKS[index % len(TRAIN_LOOKS)]
        question = ask(tutor.rng, look, "train", kind, "colour")  # type: ignore[arg-type]
        words = tutor.answer(look, question).split()
        said = words[-2]
        if question.options:
            said = question.options[LETTERS.index(said)]
        found.append((look.colour, words[4], said))
    return found


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize("kind", ["OE", "MC"])
def test_noise_rates_are_those_of_the_settings(tutor: Callable[..., NoisyTutor], kind: str) -> None:
    quiet = {"broken_rate": 0.0, "slip_rate": 0.0, "answer_slip_rate": 0.0}
    assert all(a == b == c for a, b, c in replies(tutor(**quiet, confusion_share=0.0), kind, 200))
    told = replies(tutor(**quiet, confusion_share=1.0, confusion_rate=0.4), kind)
    assert abs(share([truth != seen for truth, seen, _ in told]) - 0.4) < 0.05
    assert len({(truth, seen) for truth, seen, _ in told if truth != seen}) == len(VALUES["colour"]), "one other each"
    slips = replies(tutor(**quiet | {"slip_rate": 0.5}, confusion_share=0.0), kind)
    assert abs(share([truth != seen for truth, seen, _ in slips]) - 0.5 * 0.8) < 0.05
    answers = replies(tutor(**quiet | {"answer_slip_rate": 0.5}, confusion_share=0.0), kind)
    assert all(truth == seen for truth, seen, _ in answers)
    lucky = 1 / (4 if kind == "MC" else 5)
    assert abs(share([seen != said for _, seen, said in answers]) - 0.5 * (1 - lucky)) < 0.05


def test_the_format_breaks_as_often_as_said(tutor: Callable[..., NoisyTutor]) -> None:
    teaching = tutor(broken_rate=0.3)
    look, question = TRAIN_LOOKS[0], ask(np.random.default_rng(0), TRAIN_LOOKS[0], "train", "OE")
    texts = [teaching.answer(look, question) for _ in range(1200)]
    values = format_reward(prompts=["?"] * 1200, completions=texts, segments=[("text",)] * 1200)
    assert abs(share([value == 0.0 for value in values]) - 0.3) < 0.05


def test_the_first_part_is_clean(tutor: Callable[..., NoisyTutor]) -> None:
    """Drawings are right until the noise starts, and not all right behind it."""
    teaching = tutor(steps=8, batch=60, noise_start=0.5, drop_condition=0.0)
    shares = []
    for _ in range(2):
        drawn = [rollout for _ in range(4) for rollout in teaching.batch() if rollout.prompt.task == "t2i"]
        shares.append(share([right(teaching, rollout) for rollout in drawn]))
    assert shares[0] == 1.0 and shares[1] < 0.6


def right(tutor: NoisyTutor, rollout: Rollout) -> bool:
    """The codes are those of the look whose words the caption has."""
    words = set(rollout.prompt.text.replace(",", " ").replace(".", " ").split())
    values = {name: next((v for v in VALUES[name] if v in words), "none") for name in ATTRIBUTES}
    return torch.equal(rollout.segments[0].tokens, tutor._codes[LOOK_INDEX[Look.from_dict(values)]])


def test_some_drawings_are_learnt_without_their_caption(policy: JanusPolicy, tutor: Callable[..., NoisyTutor]) -> None:
    """Guidance needs an unconditional branch that has been trained, on exactly the prompt that sampling uses."""
    free = policy.unconditional_tokens()[:-1].tolist()
    drawn = tutor(batch=600, drawing_share=1.0).batch()
    assert abs(share([rollout.prompt_tokens.tolist() == free for rollout in drawn]) - 0.1) < 0.05
