"""The loss on the guided distribution against two whole forwards in float64; cutting changes no gradient; w = 1."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, LONG_CHAIN, PlainJanus, make_prompt, packed, sharp_policy
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import Learner
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import IMAGE, PackedBatch, Prompt, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.train_config import PolicyLogp

pytestmark = pytest.mark.slow
GUIDED: tuple[PolicyLogp, ...] = ("guided", "guided_detached")
GROUP, WEIGHT, TEMPERATURE = 2, 5.0, 0.8


@pytest.fixture(scope="module", autouse=True)
def _exact_norm() -> Any:
    """transformers' own rounds to float32 whatever comes in, and guidance makes five times as much of it."""

    def exact(module: Any, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact)
        yield


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy().double()


@pytest.fixture(scope="module")
def other(policy: JanusPolicy) -> JanusPolicy:
    """A policy a little away: old and reference log-probabilities come from it, those of its own free branch."""
    made = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.0005 * p.std() * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return made


PROMPTS = [
    make_prompt("draw it.", ("image",)),
    make_prompt("sound?", ("text",)),
    make_prompt("draw the creature, round, red, at the beach.", CHAIN),
    make_prompt("draw the blue one.", LONG_CHAIN, follow_up="what is its colour?"),
]


def drawn(
    policy: JanusPolicy, weight: float = WEIGHT, prompts: Sequence[Prompt] = PROMPTS, **more: Any
) -> list[Rollout]:
    sampling = Sampling(num_generations=GROUP, cfg_weight=weight, temperature=TEMPERATURE, max_text_tokens=6, **more)
    return generate(policy, prompts, sampling)


@pytest.fixture(scope="module")
def rollouts(policy: JanusPolicy) -> list[Rollout]:
    return drawn(policy, unconditional="pads")


def objective(how: PolicyLogp, **more: Any) -> Objective:
    return Objective(**{"loss_type": "dapo", "temperature": TEMPERATURE, "policy_logp": how, "beta": 0.1} | more)


class FakeRanks:
    """`Learner._normalisers` for one rank, without DeepSpeed."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.world_size = objective, 1

    def all_reduce(self, values: Tensor) -> Tensor:
        return values


def gradients(policy: JanusPolicy, how: Objective, batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """Of an update's loss, by name; `loss` among them."""
    num_items, shares = Learner._normalisers(FakeRanks(how), batches)  # type: ignore[arg-type]
    forward = PolicyForward(policy, how)
    loss = torch.stack(
        [forward(b, num_items=num_items, share=s)["loss"] for b, s in zip(batches, shares, strict=True)]
    ).sum()
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    made = {name: g for (name, _), g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}
    return made | {"loss": loss.detach()}


def scored(batches: Sequence[PackedBatch], other: JanusPolicy, how: Objective) -> list[PackedBatch]:
    forward = PolicyForward(other, how)
    with torch.no_grad():
        scores = [forward(batch)["logp"] for batch in batches]
    return [replace(b, old_logp=s, ref_logp=s) for b, s in zip(batches, scores, strict=True)]


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each parameter's gradient."""
    assert set(got) == set(want) and len(want) > 20
    for name, expected in want.items():
        assert float((got[name] - expected).abs().max() / expected.abs().max()) <= tolerance, name


# Two forwards by hand -------------------------------------------------------------------------------------------------


def by_hand(plain: PlainJanus, rollout: Rollout, how: PolicyLogp) -> list[tuple[str, Tensor]]:
    """Each segment's log-probabilities, the whole conditional sequence and the whole free one through transformers."""
    pieces, out = [plain.prompt(rollout.prompt)], []
    for segment in rollout.segments:
        pieces.append(plain.lead(segment))
        first = sum(map(len, pieces))
        pieces.append(plain.text(segment.tokens) if segment.kind == "text" else plain.image(segment.tokens))
        hidden = plain.hidden(torch.cat(pieces))[first - 1 : -1]
        if segment.kind == "text":
            logits = plain.text_logits(hidden)
        else:
            assert segment.free_prompt is not None
            beside = plain.hidden(torch.cat([plain.text(segment.free_prompt), pieces[-1]]))
            head = plain.model.model.generation_head
            c, u = (head.activation_fn(head.proj_out(x)) for x in (hidden, beside[-1 - len(segment.tokens) : -1]))
            u = head.vision_head(u.detach() if how == "guided_detached" else u)
            logits = u + WEIGHT * (head.vision_head(c) - u)
        logp = (logits / TEMPERATURE).log_softmax(-1).gather(1, segment.tokens[:, None])[:, 0]
        out.append((segment.kind, logp))
    return out


def loss_by_hand(
    plain: PlainJanus, other: PlainJanus, rollouts: list[Rollout], advantages: Tensor, how: PolicyLogp
) -> Tensor:
    sums: dict[str, list[Tensor]] = {"text": [], "image": []}
    for index, rollout in enumerate(rollouts):
        advantage = advantages[index].double()
        with torch.no_grad():
            before = by_hand(other, rollout, how)
        for (kind, logp), (_, old) in zip(by_hand(plain, rollout, how), before, strict=True):
            ratio = (logp - old).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
            sums[kind].append(0.1 * ((old - logp).exp() - (old - logp) - 1) - gain)
    return sum((torch.cat(values).mean() for values in sums.values()), start=torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("how", GUIDED)
def test_gradient_equals_two_whole_forwards(
    policy: JanusPolicy, other: JanusPolicy, rollouts: list[Rollout], how: PolicyLogp
) -> None:
    """Old and reference log-probabilities too are guided, by their own free branch. Two sets of logits are mixed here;
    detached is what the last linear map of the free branch is given, which both branches share."""
    wanted = objective(how, epsilon=0.05)
    batches = scored(packed(policy, rollouts, GROUP, 200, guided=True), other, wanted)
    assert len(batches) > 1
    advantages = torch.cat([batch.advantages[:, 0] for batch in batches])
    got = gradients(policy, wanted, batches)
    plain = PlainJanus(policy)
    expected = loss_by_hand(plain, PlainJanus(other), rollouts, advantages, how)
    assert float(got.pop("loss")) == pytest.approx(float(expected.detach()), rel=1e-6)
    named = [(n, p) for n, p in plain.model.named_parameters() if f"model.{n}" in got]
    found = torch.autograd.grad(expected, [p for _, p in named])
    assert_same(got, {f"model.{n}": g for (n, _), g in zip(named, found, strict=True)}, 1e-6)


def test_the_conventions_differ(policy: JanusPolicy, other: JanusPolicy, rollouts: list[Rollout]) -> None:
    """The control: what the comparison above could not tell apart would be no comparison."""
    found = []
    for how in ("conditional", *GUIDED):
        wanted = objective(how)
        found.append(gradients(policy, wanted, scored(packed(policy, rollouts, GROUP, guided=True), other, wanted)))
    name = "model.model.generation_head.vision_head.weight"
    for one, two in ((0, 1), (0, 2), (1, 2)):
        with pytest.raises(AssertionError):
            assert_same(found[one], found[two], 0.05)
    assert float((found[0][name] - found[1][name]).norm() / found[1][name].norm()) > 0.1


@pytest.mark.parametrize(
    ("how", "cuts"),
    [("guided", [(1 << 30, False), (150, True)]), ("guided_detached", [(150, False)])],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_cutting_and_sharing_change_no_gradient(
    policy: JanusPolicy, other: JanusPolicy, rollouts: list[Rollout], how: PolicyLogp, cuts: list[tuple[int, bool]]
) -> None:
    """Micro-batches of any size, copies of prompts, free ones too, pruned members: at most 1e-8 apart."""
    wanted, keep = objective(how), torch.ones(len(rollouts), dtype=torch.bool)
    keep[[1, 2]] = False
    (_, whole), *others = (
        (len(batches), gradients(policy, wanted, scored(batches, other, wanted)))
        for budget, share in [(1 << 30, True), *cuts]
        for batches in [packed(policy, rollouts, GROUP, budget, keep=keep, share_prefix=share, guided=True)]
    )
    assert max(count for count, _ in others) > 1
    for _, got in others:
        assert_same(got, whole, 1e-8)


@pytest.mark.parametrize("how", ["conditional", *GUIDED])
def test_on_policy_the_ratio_is_exactly_one(policy: JanusPolicy, rollouts: list[Rollout], how: PolicyLogp) -> None:
    """What `Learner.score` keeps and what the update computes are the same bits, in float32 as it trains."""
    single, wanted = copy.deepcopy(policy).float(), objective(how, beta=0.0)
    forward = PolicyForward(single, wanted)
    for batch in packed(single, rollouts, GROUP, 200, guided=how != "conditional"):
        with torch.no_grad():
            old = forward(batch)["logp"]
        out = forward(replace(batch, old_logp=old), num_items={"text": 9.0, "image": 99.0})
        for name in ("text", "image"):
            if f"metric/ratio_max/{name}" in out and float(out[f"metric/tokens/{name}"]):
                assert float(out[f"metric/ratio_max/{name}"]) == float(out[f"metric/ratio_min/{name}"]) == 1.0


# The branch -----------------------------------------------------------------------------------------------------------


def test_the_loss_keeps_its_axes(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """Only the attention's axis grows: by every kept image, and by each distinct free prompt once."""
    plain, free = (packed(policy, rollouts, GROUP, guided=guided)[0] for guided in (False, True))
    for name in ("prefix_tokens", "tokens", "modality", "loss_mask", "cu_seqlens", "group_offsets", "advantages"):
        assert torch.equal(getattr(plain, name), getattr(free, name)), name
    assert plain.free is None and free.free is not None
    images = [s for r in rollouts for s in r.segments if s.kind == "image"]
    prompts = {tuple(s.free_prompt.tolist()) for s in images if s.free_prompt is not None}
    assert len(prompts) == 3 and free.free.prompt_tokens.numel() == sum(map(len, prompts))
    assert free.num_tokens == plain.num_tokens + sum(len(s.tokens) for s in images) + sum(map(len, prompts))
    copied = packed(policy, rollouts, GROUP, guided=True, share_prefix=False)[0]
    assert copied.num_tokens == free.num_unshared_tokens == copied.num_unshared_tokens > free.num_tokens
    assert torch.equal(free.tokens[free.free.rows], torch.cat([s.tokens for s in images]))
    for budget in (1, 100, 200, 300, free.num_tokens):
        for batch in packed(policy, rollouts, GROUP, budget, guided=True):
            assert batch.num_tokens <= budget or batch.group_offsets.numel() == 2


def test_images_in_the_vocabulary_of_mixed_log_probabilities(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """`sampled_logp` is what the loss is compared with: mixed for images, and for text the only one there is."""
    plain, free = (packed(policy, rollouts, GROUP, guided=guided)[0] for guided in (False, True))
    images = plain.modality == IMAGE
    assert torch.equal(plain.sampled_logp[~images].nan_to_num(), free.sampled_logp[~images].nan_to_num())
    assert float((plain.sampled_logp - free.sampled_logp)[images].abs().max()) > 1.0


@pytest.mark.parametrize("how", GUIDED)
def test_a_batch_without_images_takes_part(policy: JanusPolicy, how: PolicyLogp) -> None:
    """Under ZeRO-3 every rank must run the same modules; text is scored as it ever was."""
    answers = drawn(policy, prompts=PROMPTS[1:2])
    (batch,), (plain,) = (packed(policy, answers, GROUP, guided=guided) for guided in (True, False))
    assert batch.free is not None and torch.equal(batch.free.prompt_tokens, policy.unconditional_tokens())
    calls, trunk = [], policy.trunk
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(policy, "trunk", lambda e, p, layout: calls.append(e.shape[1]) or trunk(e, p, layout))
        got = PolicyForward(policy, objective(how))(batch)["logp"]
        want = PolicyForward(policy, objective("conditional"))(plain)["logp"]
    assert len(calls) == (3 if how == "guided_detached" else 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_detached_keeps_nothing_of_the_free_branch(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """Its activations are not there for a backward: fewer bytes are saved than by both branches, and no more than by
    one but for the mixed rows."""
    saved = {}
    for how in ("conditional", *GUIDED):
        (batch,) = packed(policy, rollouts, GROUP, guided=how != "conditional")
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = PolicyForward(policy, objective(how, beta=0.0))(batch, num_items={"text": 9.0, "image": 99.0})
        saved[how] = sum(sizes.values())
        del out
    assert saved["guided"] > 1.3 * saved["conditional"] and saved["guided_detached"] < 1.1 * saved["conditional"]


def test_images_drawn_without_guidance_are_refused(policy: JanusPolicy) -> None:
    with pytest.raises(ValueError, match="drawn beside a free prompt"):
        packed(policy, drawn(policy, 1.0, PROMPTS[:1]), GROUP, guided=True)


def test_weights_below_one(policy: JanusPolicy) -> None:
    """w = 0 trains the free branch alone, 0.5 lies between the two; each replays."""
    for weight in (0.0, 0.5):
        rollouts = drawn(policy, weight, PROMPTS[:1])
        (batch,) = packed(policy, rollouts, GROUP, guided=True)
        with torch.no_grad():
            logp = PolicyForward(policy, objective("guided"))(batch)["logp"]
        assert float((logp - batch.sampled_logp)[batch.loss_mask].abs().max()) <= 1e-4, weight
