"""Training beside padded rows: one forward and backward over the same trajectories, prompts shared or repeated.

Trajectories are made by hand, so that every side trains on the same tokens; photos are embedded before.  The padded
sides are transformers' model over [S, L + R] rows: with our fused head and loss on the rows that predict a sampled
token (what is left is prompts and attention), with eager logits of those rows (ULM-R1), and of every position.

Dims: P prompts, G members, S sequences, L tokens of a prompt and its photo, R sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from comparison import OURS, Case, Comparison, Goal, Provider, Told
from released import Logits, Sampled, padded_update
from sides import Sides, text_score
from torch import Tensor, nn

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.records import PackedBatch, Rollout, Segment
from syncr1.engine.stopwatch import Stopwatch
from syncr1.kernels.api import grpo_plan

PADDED = "padded"
VARIANTS: dict[str, Logits] = {
    f"{PADDED}, our head and loss": "sampled rows, fused",
    f"{PADDED}, eager logits": "sampled rows",
    f"{PADDED}, logits of every position": "every position",
}


def trajectories(sides: Sides, lengths: Sequence[Sequence[int]], seed: int = 0) -> list[Rollout]:
    """Random answers: `lengths[p][g]` tokens for member g of question p."""
    generator = torch.Generator().manual_seed(seed)
    policy = sides.policy
    first = max(sides.forbidden) + 1  # control tokens are the first ids
    with torch.no_grad():
        photos = policy.see(policy.load_images([p.images[0] for p in sides.questions if p.images])).cpu()
    rollouts = []
    for prompt, photo, group in zip(sides.questions, photos, lengths, strict=False):
        for member, length in enumerate(group):
            tokens = torch.randint(first, sides.size.vocabulary, (length,), generator=generator)
            logp = torch.full((length,), -1.0)
            segment = Segment(kind="text", tokens=tokens, logp=logp, logp_mixed=logp, entropy=-logp)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    member=member,
                    prompt_tokens=policy.prompt_tokens(prompt),
                    prompt_image=photo,
                    segments=(segment,),
                )
            )
    return rollouts


def packed(sides: Sides, rollouts: Sequence[Rollout], rewards: Tensor) -> PackedBatch:
    """All of them in one batch; rewards [S]."""
    group = len(rollouts) // len({r.prompt.id for r in rollouts})
    plan = grpo_plan(rewards, torch.arange(0, len(rollouts) + 1, group, dtype=torch.int32))
    assert isinstance(plan.advantages, Tensor)
    advantages_S2 = plan.advantages[:, None].expand(-1, 2).contiguous()
    (batch,) = pack(sides.policy, rollouts, advantages_S2, plan.keep, num_generations=group, max_tokens=1 << 60)
    return batch.to(sides.policy.device)


def as_sampled(sides: Sides, rollouts: Sequence[Rollout]) -> tuple[Sampled, Tensor]:
    """The same trajectories, all of one length, and the photos' embeddings, as the padded sides take them."""
    prompts = {r.prompt.id: r for r in rollouts}
    ids = torch.stack([r.prompt_tokens for r in prompts.values()])
    tokens = torch.stack([r.segments[0].tokens for r in rollouts])
    photos = torch.stack([r.prompt_image for r in prompts.values() if r.prompt_image is not None])
    device = sides.policy.device
    return Sampled(ids.to(device), tokens.to(device), 0), photos.to(device)


def rewards_of(rollouts: Sequence[Rollout]) -> Tensor:
    """[S]."""
    return torch.stack([text_score(r.segments[0].tokens) for r in rollouts])


def our_update(forward: PolicyForward, batch: PackedBatch, time: Stopwatch | None = None) -> float:
    """Forward and backward over a packed batch; gradients are left in the parameters. Returns the loss."""
    time = time or Stopwatch()
    counts = [float((batch.loss_mask & (batch.modality == code)).sum()) for code in (0, 1)]
    with time("forward"):
        loss = forward(batch, num_items={"text": max(1.0, counts[0]), "image": max(1.0, counts[1])})["loss"]
    with time("backward"):
        loss.backward()
    return float(loss.detach())


def real_share(sides: Sides) -> dict[str, float]:
    """Share of positions that a ragged batch really fills: ours, counted where the decoder gets them, and padded."""
    work = sides.work
    lengths = torch.randint(
        2, work.text_tokens + 1, (len(sides.questions), work.group), generator=torch.Generator().manual_seed(1)
    ).tolist()
    rollouts = trajectories(sides, lengths)
    batch = packed(sides, rollouts, rewards_of(rollouts))
    seen: list[int] = []
    hook = sides.policy.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    with torch.no_grad():
        PolicyForward(sides.policy, Objective())(batch)
    hook.remove()
    prompts = {r.prompt.id: r.prompt_tokens.numel() for r in rollouts}
    sampled = [length for group in lengths for length in group]
    longest = max(prompts.values()) + max(sampled)
    rows = sum(r.prompt_tokens.numel() for r in rollouts) + sum(sampled)
    return {OURS: (sum(prompts.values()) + sum(sampled)) / sum(seen), PADDED: rows / (len(rollouts) * longest)}


def training_goals(sides: Sides, ratio: float, found: Comparison) -> list[Goal]:
    """Bounds relative to the `ratio` of padded tokens to shared ones."""
    strict, usual = f"{PADDED}, our head and loss", f"{PADDED}, logits of every position"
    shares, share = real_share(sides), 0.85 if sides.size.device == "cuda" else 0.9
    return [
        Goal(
            f"training, faster than padded rows with our head and loss (token ratio {ratio:.2f})",
            found.ratio(strict, OURS),
            share * ratio,
        ),
        Goal(
            "shared prefix, times faster than padded rows / ratio of tokens",
            None if (faster := found.ratio(strict, OURS)) is None else faster / ratio,
            share,
            key="shared_prefix",
        ),
        Goal(
            f"training, faster than padded rows with all logits (token ratio {ratio:.2f})",
            found.ratio(usual, OURS),
            share * ratio,
        ),
        Goal(
            "training, peak extra memory / padded rows",
            found.memory_share(strict),
            0.5,
            True,
            key="training_memory",
        ),
        Goal(f"share of real tokens, ragged batch (padded: {shares[PADDED]:.3f})", shares[OURS], 0.97, unit=""),
    ]


def training(sides: Sides) -> Case:
    """One group: a prompt with a photo, G answers of R tokens."""
    G, R = sides.work.group, sides.work.text_tokens
    few_too = {few: trajectories(sides, [[2, 2]] if few else [[R] * G]) for few in (False, True)}
    forward = PolicyForward(sides.policy, Objective())
    batches = {few: packed(sides, rollouts, rewards_of(rollouts)) for few, rollouts in few_too.items()}
    padded = {few: as_sampled(sides, rollouts) for few, rollouts in few_too.items()}
    forbidden = torch.tensor(sides.forbidden, device=sides.policy.device)
    L = int(padded[False][0].prompt.shape[1])
    goals = partial(training_goals, sides, G * (L + R) / (L + G * R))

    def drop_gradients(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None

    def ours(short: bool) -> Told:
        few, time = short and sides.size.device == "cpu", Stopwatch()
        loss = our_update(forward, batches[few], time)
        drop_gradients(forward)
        return Told(time.seconds, {"loss": loss, "positions": batches[few].num_tokens})

    def theirs(logits: Logits, short: bool) -> Told:
        few, time = short and sides.size.device == "cpu", Stopwatch()
        sampled, photos = padded[few]
        with time("forward and backward"):
            loss = padded_update(
                sides.peer,
                sampled,
                photos,
                rewards_of(few_too[few]).to(photos.device),
                logits=logits,
                forbidden=forbidden,
            )
        drop_gradients(sides.peer)
        return Told(time.seconds, {"loss": loss, "positions": sampled.rows.numel()})

    providers = [Provider(OURS, ours)]
    providers += [Provider(name, lambda short, how=how: theirs(how, short)) for name, how in VARIANTS.items()]  # type: ignore[misc]
    return Case("Training, forward and backward", f"1 x {L} tokens, G {G}, R {R}; {sides.size}", providers, goals)
