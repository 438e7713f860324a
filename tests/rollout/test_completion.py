"""completion.py: what a preview shows beyond what was drawn, for both policies that draw, in the sampler's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, LONG_CHAIN, Gate, make_prompt, sharp_policy
from small_emu3 import sharp_emu3
from torch import Tensor

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import IMAGE, Prompt, Rollout
from syncr1.engine.rollout import completion
from syncr1.engine.rollout.completion import fill
from syncr1.engine.rollout.preview import preview_length
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling, trajectory_key


@pytest.fixture(scope="module", params=["janus", "emu3"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return sharp_policy() if request.param == "janus" else sharp_emu3()


class Watching(Gate):
    """Remembers the pictures that it judged."""

    def __init__(self, *, threshold: float, max_attempts: int, fraction: float = 0.5, how: str = "likely") -> None:
        self.pictures: list[Tensor] = []
        super().__init__(threshold=threshold, max_attempts=max_attempts, fraction=fraction)
        self.completion = how  # type: ignore[assignment]

    def _judge(self, prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        self.pictures.append(images)
        return super()._judge(prompts, texts, images)


@torch.no_grad()
def by_the_trainer(policy: Policy, rollouts: list[Rollout], drawn: int) -> Tensor:
    """[n, 3, H, W]: the most likely tokens after `drawn` under guidance, from one teacher-forced pass over the whole
    sequences."""
    as_if, starts = [], []
    for rollout in rollouts:
        at = next(i for i, segment in enumerate(rollout.segments) if segment.kind == "image")
        image = rollout.segments[at]
        tokens = fill(image.tokens[None, :drawn], policy.num_image_tokens, policy.forced_image_tokens())[0]
        nothing = torch.zeros(len(tokens))
        whole = replace(image, tokens=tokens, logp=nothing, logp_mixed=nothing, entropy=nothing)
        as_if.append(replace(rollout, segments=(*rollout.segments[:at], whole)))
        starts.append(tokens)
    n = len(rollouts)
    everything = torch.ones(n, dtype=torch.bool)
    given = (policy, as_if, torch.zeros(n, 2), everything)
    (batch,) = pack(*given, num_generations=1, max_tokens=1 << 30, guided=True)
    rows = (batch.modality == IMAGE).nonzero().squeeze(1)
    forward = PolicyForward(policy, Objective(policy_logp="guided"))
    head = forward._head(batch, *forward._branches(batch), rows, "image")
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    if head.forbidden is not None:
        logits[:, head.forbidden] = -torch.inf
    likely = logits.argmax(-1).view(n, -1)
    forced = policy.forced_image_tokens()
    if forced is not None:
        likely = torch.where(forced >= 0, forced, likely)
    return policy.draw(torch.cat([torch.stack(starts)[:, :drawn], likely[:, drawn:]], 1))


def test_likely_tokens_in_the_cache_are_the_trainers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of first tries and of further ones, of ragged texts before them, in as many passes as memory asks for."""
    monkeypatch.setattr(completion, "TOKENS_AT_ONCE", 3 * policy.num_image_tokens)
    monkeypatch.setattr(completion, "LOGITS_AT_ONCE", 5)
    prompts = [make_prompt("draw it.", CHAIN), make_prompt("draw this.", ("image",))]
    sampling = Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=6)
    num_second = 0
    for fraction in (0.05, 0.95):
        accepting = Watching(threshold=0.01, max_attempts=2, fraction=fraction)
        drawn = preview_length(accepting, policy.num_image_tokens, policy.forced_image_tokens())
        rollouts = generate(policy, prompts, sampling, accepting)
        torch.testing.assert_close(accepting.pictures[0], by_the_trainer(policy, rollouts, drawn))
        refusing = Watching(threshold=0.99, max_attempts=2, fraction=fraction)
        rollouts = generate(policy, prompts, sampling, refusing)
        expected = by_the_trainer(policy, rollouts, drawn)
        for row, rollout in enumerate(rollouts):
            tried = rollout.uid == trajectory_key(sampling, rollout.prompt, rollout.member, 2)
            torch.testing.assert_close(refusing.pictures[int(tried)][row], expected[row])
            num_second += tried
    assert num_second, "some second try was the better one"


@pytest.mark.parametrize("threshold", [0.01, 0.99])
def test_how_a_preview_is_completed_changes_no_token(policy: Policy, threshold: float) -> None:
    """Where the verdicts are alike: what was written behind a drawing into the cache is written over; turns that
    follow an image, too."""
    prompts = [make_prompt("draw it.", CHAIN), make_prompt("draw this.", LONG_CHAIN, follow_up="what is it?")]
    sampling = Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=5)
    engine, drawn = RolloutEngine(policy), []
    for how in ("repeat", "likely"):
        gate = Watching(threshold=threshold, max_attempts=1, how=how)
        drawn.append(engine.generate(prompts, sampling, gate))
    for one, other in zip(*drawn, strict=True):
        assert one.text == other.text and one.follow_up_text == other.follow_up_text
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.logp, theirs.logp)


def test_fill_repeats_the_last_drawn_row() -> None:
    assert fill(torch.arange(6)[None], 16).tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert fill(torch.arange(16)[None], 16).tolist() == [list(range(16))]
    assert fill(torch.tensor([[7]]), 4).tolist() == [[7, 7, 7, 7]]
