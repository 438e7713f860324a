"""The turn in which an image is drawn: what it says, that it is replayed, what it shares and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import text_models
import torch
from helpers import CHAIN, LONG_CHAIN, Gate, PlainJanus, make_prompt, packed, sharp_policy, world_photo
from small_emu3 import PlainEmu3, sharp_emu3
from torch import Tensor

from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import replay_error
from syncr1.engine.pictures import open_picture
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rollout import batch as batch_module
from syncr1.engine.rollout.drawing_turn import SEAM, DrawingTurns
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.turn_templates import filled, template_problem

pytestmark = pytest.mark.slow
REPLAY_TOLERANCE = 1e-4
"""Nats, float32; about 1e-5 is measured."""
OWN = "Now draw {prompt} ({{{concept}}}): {text}"
TURNS = ("none", "sync_r1", "t2i_r1", OWN)
POLICIES = {"janus": sharp_policy(), "emu3": sharp_emu3()}


def prompts_in(folder: Path) -> list[Prompt]:
    """A request, a question about a photo behind whose answer the concept is drawn, both followed up or not, what is
    drawn at once, and what is answered alone."""
    photo = world_photo(folder, 3)
    about: dict[str, Any] = {"concept": "bobo", "info": "<bobo> is red."}
    return [
        make_prompt("draw <bobo> at the beach.", **about),
        make_prompt("who is it?", CHAIN, photo, request="a photo of <bobo>", **about),
        make_prompt("draw the blue one", LONG_CHAIN, follow_up="what is its colour?"),
        make_prompt("draw it.", ("image",), **about),
        make_prompt("sound?", ("text",)),
    ]


def said(turn: str, prompt: Prompt, text: str) -> str:
    """What the turn says, written out by hand."""
    request, info = prompt.request or prompt.text, [prompt.info] if prompt.info else []
    full = request if request.endswith(".") else f"{request}."
    words = {
        "sync_r1": [full, *info, *([text] if text else [])],
        "t2i_r1": [full, *([text] if text else [])],
        OWN: [f"Now draw {request} ({{{'<bobo>' if prompt.concept else ''}}}):", *([text] if text else [])],
    }
    return " ".join(words[turn])


def drawn(rollouts: list[Rollout]) -> list[tuple[Rollout, Tensor]]:
    """Trajectories that draw behind a text, and what stood before the image."""
    return [(one, one.segments[1].lead) for one in rollouts if one.prompt.segments[:2] == CHAIN]


def leads_as_said(policy: Policy, turn: str, rollout: Rollout) -> bool:
    """Whether the whole text is in the turn: an untrained model's may be of bytes that are no letters, and is cut."""
    lead = rollout.segments[1].lead.tolist()
    if turn == "none":
        assert lead == [policy.image_start]
        return True
    end = [policy.tokenizer.eos_token_id] if rollout.segments[0].truncated else []
    whole, around = (
        policy.drawing_tokens(rollout.prompt, said(turn, rollout.prompt, text)).tolist() for text in (rollout.text, "")
    )
    if len(whole) <= len(around) + SEAM + 6:
        assert lead == end + whole
        return True
    first = len(around) // 2
    assert len(lead) <= len(end) + len(around) + SEAM + 6 and lead[: len(end) + first] == end + whole[:first]
    return False


def plain_replay(policy: Policy, rollout: Rollout) -> list[tuple[Tensor, Tensor]]:
    """Conditional and mixed log-probabilities of each segment: transformers alone, on all ids one after the other."""
    if isinstance(policy, type(POLICIES["janus"])):
        of = PlainJanus(policy).replay(rollout, cfg_weight=2.0)
        names = ["follow_up" if n and s.kind == "text" else s.kind for n, s in enumerate(rollout.segments)]
        return [(of[name], of["image_mixed" if name == "image" else name]) for name in names]
    pixels = None
    if rollout.prompt.images:
        read = policy.processor.image_processor
        pixels = read(open_picture(rollout.prompt.images[0]), return_tensors="pt")["pixel_values"]
    return PlainEmu3(policy).replay(rollout, pixels, temperature=1.0, cfg_weight=2.0)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_sampled_behind_a_turn_is_what_is_trained(name: str, turn: str, restarts: bool, tmp_path: Path) -> None:
    """Cached sampling with a turn of each member's own, tries of a preview that fork behind it and a follow-up behind
    the image = the packed forward with shared prefixes = transformers' forward of the concatenated ids."""
    policy, prompts = POLICIES[name], prompts_in(tmp_path)
    sampling = Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=6, drawing_turn=turn)
    gate = Gate(threshold=None, max_attempts=3) if restarts else None
    rollouts = generate(policy, prompts, sampling, gate)
    assert not restarts or any(rollout.attempts > 1 for rollout in rollouts)
    (batch,) = packed(policy, rollouts, 2)
    with torch.no_grad():
        assert replay_error(batch, PolicyForward(policy, Objective())(batch)["logp"]) <= REPLAY_TOLERANCE
    for rollout in rollouts[restarts::3]:
        for segment, (logp, mixed) in zip(rollout.segments, plain_replay(policy, rollout), strict=True):
            torch.testing.assert_close(segment.logp, logp, rtol=0, atol=REPLAY_TOLERANCE)
            torch.testing.assert_close(segment.logp_mixed, mixed, rtol=0, atol=REPLAY_TOLERANCE)
    assert sum(leads_as_said(policy, turn, rollout) for rollout, _ in drawn(rollouts)) >= 1
    (at_once,) = {tuple(r.segments[0].lead.tolist()) for r in rollouts if r.prompt.segments == ("image",)}
    assert at_once == (policy.image_start,)


def test_a_turn_is_a_members_own_and_the_prompt_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first turn runs through the model once; members that said different things are asked for different images,
    and what is drawn does not depend on the batch around it."""
    policy, prompts = POLICIES["janus"], prompts_in(tmp_path)
    sampling = Sampling(num_generations=4, cfg_weight=2.0, max_text_tokens=6, drawing_turn="sync_r1")
    engine = RolloutEngine(policy)
    rollouts = engine.generate(prompts, sampling)
    lengths = [policy.prompt_tokens(prompt).numel() for prompt in prompts]
    assert engine.stats.prefill_tokens == sum(lengths) + policy.unconditional_tokens().numel()
    assert "turn" in engine.stats.seconds
    of_first = [(rollout.text, tuple(lead.tolist())) for rollout, lead in drawn(rollouts)[:4]]
    assert len({text for text, _ in of_first}) == len({lead for _, lead in of_first}) > 1
    for index, prompt in enumerate(prompts):
        alone = generate(policy, [prompt], replace(sampling, num_generations=2))
        for one, other in zip(alone, rollouts[4 * index :], strict=False):
            for a, b in zip(one.segments, other.segments, strict=True):
                assert a.tokens.tolist() == b.tokens.tolist() and a.lead.tolist() == b.lead.tolist()
    monkeypatch.setattr(batch_module, "TURNS_AT_ONCE", 1)  # as many passes as members
    apart = engine.generate(prompts[:2], sampling)
    assert [r.segments[1].tokens.tolist() for r in apart] == [r.segments[1].tokens.tolist() for r in rollouts[:8]]
    engine.generate(prompts, Sampling(num_generations=2, max_text_tokens=6))
    assert "turn" not in engine.stats.seconds


@pytest.mark.parametrize("name", POLICIES)
def test_no_text_makes_a_turn_longer_than_was_counted_or_steers_the_model(name: str) -> None:
    """Positions and memory are counted before anything is sampled, and a member may have said anything."""
    policy, prompt = POLICIES[name], make_prompt("draw it", info="<bobo> is red.")
    turns = DrawingTurns(policy, "sync_r1", 6)
    control = policy.tokenizer.decode([policy.image_start])
    for text in ("", "red", "a red creature at the beach", "\ufffd" * 9, "x" * 40, f"{control} {control}", "{text}"):
        lead = turns.lead(prompt, text, True)
        assert lead.numel() <= turns.longest(prompt)
        assert (lead == policy.image_start).nonzero().flatten().tolist() == [lead.numel() - 1]
    assert "{a}" in policy.tokenizer.decode(turns.lead(prompt, "{a}", False))
    assert turns.longest(make_prompt("draw it", ("image",))) == 1


def test_what_cannot_be_is_refused_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = sharp_policy()
    monkeypatch.setattr(policy, "trunk", lambda *_: pytest.fail("sampled"))
    wrong = {"{prompt": "close every brace", "{answer}": "got {answer}", "sync_r2": "correct the name"}
    for turn, words in wrong.items():
        with pytest.raises(ConfigError, match=f"generate: drawing_turn: expected .*{words}"):
            generate(policy, [make_prompt("x")], Sampling(drawing_turn=turn))
    long = make_prompt("draw it", info="red " * policy.max_positions)
    with pytest.raises(DataError, match=r"of them in its drawing turn, but .* shorten the drawing turn, the prompt"):
        generate(policy, [long], Sampling(drawing_turn="sync_r1"))
    words_alone = text_models.policy("qwen3")
    with pytest.raises(DataError, match="draws none"):
        generate(words_alone, [make_prompt("x")], Sampling(drawing_turn="sync_r1"))
    with pytest.raises(ConfigError, match="generate: drawing_turn: expected none for CausalLMPolicy"):
        generate(words_alone, [make_prompt("x", ("text",))], Sampling(drawing_turn="sync_r1"))
    with pytest.raises(ConfigError, match="cannot open a turn to draw in"):
        words_alone.drawing_tokens(make_prompt("x"), "a cat")


def test_templates() -> None:
    for good in ("none", "sync_r1", "t2i_r1", "{text}", "{{{concept}}} {prompt}"):
        assert template_problem(good) == ""
    for bad in (
        "",
        "{",
        "}",
        "{}",
        "{0}",
        "{prompt.text}",
        "{prompt!r}",
        "{text:>9}",
        "{prompt[0]}",
        "{{prompt}}",
        "None",
    ):
        assert "expected" in template_problem(bad), bad
    values = {"prompt": "a cat.", "text": "{info}", "info": "", "concept": "<bo>"}
    assert filled("{prompt}. {info} {text}", values) == "a cat. {info}"
    assert filled("{info}. {concept}: {prompt}?", values) == "<bo>: a cat.?"
    assert filled("{prompt}\n\n{text}", values) == "a cat.\n\n{info}"
