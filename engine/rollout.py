"""Prompt x G -> Rollout: sampling text and image tokens as one causal sequence per trajectory.

    prompt . text tokens . image_start . image tokens

Each prompt (its image embeddings included) is prefilled once and its keys and values are copied to the group's members;
the classifier-free branch is prefilled once per batch.  All rows advance together.  Log-probabilities are recorded as
they are sampled, conditional and CFG-mixed.  A row's random numbers are keyed by (seed, step, prompt, member, attempt)
and by its own token counter, so its tokens do not depend on the batch that it happens to be in.

Dims: P prompts, G members, B = P*G rows, L tokens, N image tokens, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from syncr1.engine.attention import KVCache
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import Prompt, Rollout, Segment, SegmentKind
from syncr1.kernels.api import CFGSample, cfg_sample

SUPPORTED_SEGMENTS: tuple[tuple[SegmentKind, ...], ...] = (("text",), ("image",), ("text", "image"))
_IMAGE_OFFSET = 1 << 20
"""Token counters of image tokens start here, so that they do not depend on how long the text was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How trajectories are drawn."""

    num_generations: int = 8
    temperature: float = 1.0
    """0 is greedy."""
    max_text_tokens: int = 16
    cfg_weight: float = 1.0
    """Classifier-free guidance of image tokens, u + w (c - u); 1 leaves the branch out."""
    seed: int = 0
    step: int = 0
    """Salts the random numbers, so that each step draws afresh."""


class Preview(Protocol):
    """Preview DGS as the sampler sees it; the rule itself lives in dgs.py."""

    fraction: float
    max_attempts: int

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        """[n] float32 scores of partly drawn images [n, 3, H, W]; NaN = cannot be judged."""
        ...

    def accepts(self, scores: Tensor) -> Tensor:
        """[n] bool."""
        ...

    def observe(self, num_accepted: int, num_attempts: int) -> None: ...


@torch.no_grad()
def generate(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, preview: Preview | None = None
) -> list[Rollout]:
    """Samples `num_generations` trajectories of each prompt.

    Args:
        policy: in eval mode; its parameters must be whole (under ZeRO-3: gathered).
        prompts: any mix of segment plans.
        sampling: temperature, lengths, guidance, seed.
        preview: preview DGS; None draws every image to its end.

    Returns:
        len(prompts) * G rollouts, the members of a prompt adjacent, in the order of the prompts.

    Raises:
        ValueError: a prompt asks for a segment plan that is not in SUPPORTED_SEGMENTS.
    """
    for prompt in prompts:
        if prompt.segments not in SUPPORTED_SEGMENTS:
            raise ValueError(
                f"generate: prompt {prompt.id} has segments {prompt.segments}, expected one of {SUPPORTED_SEGMENTS}"
            )
    results: list[list[Rollout]] = [[] for _ in prompts]
    for plan in SUPPORTED_SEGMENTS:
        chosen = [i for i, prompt in enumerate(prompts) if prompt.segments == plan]
        if not chosen:
            continue
        rollouts = _generate_plan(policy, [prompts[i] for i in chosen], sampling, preview)
        for row, i in enumerate(chosen):
            results[i] = rollouts[row * sampling.num_generations : (row + 1) * sampling.num_generations]
    return [rollout for group in results for rollout in group]


def trajectory_key(sampling: Sampling, prompt: Prompt, member: int, attempt: int = 1) -> int:
    """63-bit key of a trajectory's random numbers."""
    text = f"{sampling.seed}/{sampling.step}/{prompt.id}/{member}/{attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class _Branch:
    """Rows under way: their cache, the hidden states that predict the next token, and the next positions."""

    def __init__(self, policy: Policy, cache: KVCache, hidden: Tensor, positions: Tensor) -> None:
        self.policy, self.cache, self.hidden, self.positions = policy, cache, hidden, positions

    def feed(self, embeddings_BD: Tensor, valid: Tensor) -> None:
        """One token per row; rows where `valid` is False stay where they are."""
        layout = self.cache.extend(valid[:, None])
        hidden = self.policy.trunk(embeddings_BD[:, None], self.positions[:, None], layout)[:, 0]
        self.hidden = torch.where(valid[:, None], hidden, self.hidden)
        self.positions = self.positions + valid.long()

    def rows(self, index: Tensor, capacity: int | None = None) -> _Branch:
        return _Branch(self.policy, self.cache.rows(index, capacity), self.hidden[index], self.positions[index])

    def write_rows(self, index: Tensor, other: _Branch) -> None:
        self.cache.write_rows(index, other.cache)
        self.hidden = self.hidden.index_copy(0, index, other.hidden)
        self.positions = self.positions.index_copy(0, index, other.positions)

    def logits(self, kind: SegmentKind) -> tuple[Tensor, Tensor | None]:
        head = self.policy.head(self.hidden, kind)
        return torch.nn.functional.linear(head.hidden, head.weight, head.bias), head.forbidden


@dataclass(slots=True)
class _Drawing:
    """Image tokens so far, [B, n] each, and the branches that continue them."""

    conditional: _Branch
    unconditional: _Branch | None
    samples: list[CFGSample]

    def columns(self, name: str) -> Tensor:
        return torch.stack([getattr(sample, name) for sample in self.samples], dim=1)


def _generate_plan(policy: Policy, prompts: list[Prompt], sampling: Sampling, preview: Preview | None) -> list[Rollout]:
    G = sampling.num_generations
    plan = prompts[0].segments
    text_room = sampling.max_text_tokens if "text" in plan else 0
    image_room = policy.num_image_tokens + 1 if "image" in plan else 0
    token_lists, images, prefix = _prefill(policy, prompts)
    members = torch.arange(len(prompts), device=prefix.hidden.device).repeat_interleave(G)
    branch = prefix.rows(members, prefix.cache.length + text_room + image_room)
    rows = [(prompt, member) for prompt in prompts for member in range(G)]

    text_segments: list[Segment | None] = [None] * len(rows)
    image_segments: list[Segment | None] = [None] * len(rows)
    drawn: Tensor | None = None
    attempts, uids = [1] * len(rows), [trajectory_key(sampling, *row) for row in rows]
    if "text" in plan:
        text_segments = list(_sample_text(policy, branch, rows, sampling))
    texts = [policy.decode_text(segment.tokens) if segment is not None else "" for segment in text_segments]
    if "image" in plan:
        drawing, uids, attempts = _sample_image(policy, branch, rows, texts, sampling, preview)
        tokens = drawing.columns("token")
        drawn = policy.draw(tokens).cpu()
        image_segments = list(_image_segments(drawing, tokens))
    return [
        Rollout(
            prompt=prompt,
            member=member,
            prompt_tokens=token_lists[i // G],
            prompt_image=images[i // G],
            segments=tuple(s for s in (text_segments[i], image_segments[i]) if s is not None),
            text=texts[i],
            image=None if drawn is None else drawn[i],
            attempts=attempts[i],
            uid=uids[i],
        )
        for i, (prompt, member) in enumerate(rows)
    ]


def _prefill(policy: Policy, prompts: list[Prompt]) -> tuple[list[Tensor], list[Tensor | None], _Branch]:
    """Runs the prompts, left-padded to one length: their tokens, image embeddings and the branch at their ends."""
    token_lists = [policy.prompt_tokens(prompt) for prompt in prompts]
    images: list[Tensor | None] = [None] * len(prompts)
    shown = [i for i, prompt in enumerate(prompts) if prompt.image is not None]
    if shown:
        seen = policy.see(policy.load_images([p for i in shown if (p := prompts[i].image) is not None]))
        for row, i in enumerate(shown):
            images[i] = seen[row]
    return token_lists, images, _start(policy, token_lists, images)


def _start(policy: Policy, token_lists: list[Tensor], images: list[Tensor | None]) -> _Branch:
    lengths = torch.tensor([tokens.numel() for tokens in token_lists])
    width = int(lengths.max())
    tokens_BL = torch.full((len(token_lists), width), policy.image_start, dtype=torch.long)
    for row, tokens in enumerate(token_lists):
        tokens_BL[row, width - tokens.numel() :] = tokens
    cache = policy.new_cache(len(token_lists), width)
    device = cache.keys.device
    tokens_BL, lengths = tokens_BL.to(device), lengths.to(device)
    columns = torch.arange(width, device=device)
    valid = columns[None] >= width - lengths[:, None]
    positions = (columns[None] - (width - lengths[:, None])).clamp(min=0)
    embeddings = policy.embed(tokens_BL, "text")
    slots = policy.image_slots(tokens_BL) & valid
    for row, image in enumerate(images):
        if image is not None:
            embeddings[row, slots[row]] = image.to(embeddings.dtype)
    hidden = policy.trunk(embeddings, positions, cache.extend(valid))[:, -1]
    return _Branch(policy, cache, hidden, lengths)


def _keys(rows: list[tuple[Prompt, int]], sampling: Sampling, attempt: int, device: torch.device) -> Tensor:
    return torch.tensor([trajectory_key(sampling, prompt, member, attempt) for prompt, member in rows], device=device)


def _sample_text(policy: Policy, branch: _Branch, rows: list[tuple[Prompt, int]], sampling: Sampling) -> list[Segment]:
    device = branch.hidden.device
    keys = _keys(rows, sampling, 1, device)
    ends = torch.tensor(sorted(policy.end_tokens), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    samples: list[CFGSample] = []
    lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
    for step in range(sampling.max_text_tokens):
        logits, forbidden = branch.logits("text")
        sample = cfg_sample(logits, temperature=sampling.temperature, seed=keys, offset=step, forbidden=forbidden)
        samples.append(sample)
        lengths += alive
        branch.feed(policy.embed(sample.token, "text"), alive)
        alive = alive & ~torch.isin(sample.token, ends)
        if not bool(alive.any()):
            break
    stacked = [
        torch.stack([getattr(s, name) for s in samples], 1).cpu() for name in ("token", "logp", "logp_mixed", "entropy")
    ]
    unfinished = alive.cpu()
    return [
        _segment("text", [column[i, :length] for column in stacked], truncated=bool(unfinished[i]))
        for i, length in enumerate(lengths.tolist())
    ]


def _segment(kind: SegmentKind, columns: list[Tensor], truncated: bool = False) -> Segment:
    tokens, logp, logp_mixed, entropy = columns
    return Segment(kind=kind, tokens=tokens, logp=logp, logp_mixed=logp_mixed, entropy=entropy, truncated=truncated)


def _image_segments(drawing: _Drawing, tokens: Tensor) -> list[Segment]:
    columns = [tokens.cpu(), *(drawing.columns(name).cpu() for name in ("logp", "logp_mixed", "entropy"))]
    return [_segment("image", [column[i] for column in columns]) for i in range(tokens.shape[0])]


def _sample_image(
    policy: Policy,
    branch: _Branch,
    rows: list[tuple[Prompt, int]],
    texts: list[str],
    sampling: Sampling,
    preview: Preview | None,
) -> tuple[_Drawing, list[int], list[int]]:
    """Every row's image, the key that it was drawn with, and the tries that it took."""
    B, N = len(rows), policy.num_image_tokens
    device = branch.hidden.device
    everyone = torch.ones(B, dtype=torch.bool, device=device)
    branch.feed(policy.embed(torch.full((B,), policy.image_start, device=device), "text"), everyone)
    unconditional = None
    if sampling.cfg_weight != 1.0:
        prefix = _start(policy, [policy.unconditional_tokens()], [None])
        unconditional = prefix.rows(torch.zeros(B, dtype=torch.long, device=device), prefix.cache.length + N)
    keys = _keys(rows, sampling, 1, device)
    start = _Drawing(branch, unconditional, [])
    num_preview = 0 if preview is None else max(1, round(preview.fraction * N))
    if preview is None or num_preview >= N:
        return _draw(policy, start, keys, sampling, 0, N), keys.tolist(), [1] * B
    drawing, keys, attempts = _draw_previewed(policy, start, rows, texts, keys, sampling, preview, num_preview)
    return _draw(policy, drawing, keys, sampling, num_preview, N), keys.tolist(), attempts


def _draw(policy: Policy, drawing: _Drawing, keys: Tensor, sampling: Sampling, first: int, last: int) -> _Drawing:
    """Draws image tokens first … last-1 of every row; leaves the given branches advanced."""
    everyone = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
    samples = list(drawing.samples)
    for step in range(first, last):
        conditional, forbidden = drawing.conditional.logits("image")
        unconditional = None if drawing.unconditional is None else drawing.unconditional.logits("image")[0]
        sample = cfg_sample(
            conditional,
            unconditional,
            cfg_weight=sampling.cfg_weight,
            temperature=sampling.temperature,
            seed=keys,
            offset=_IMAGE_OFFSET + step,
            forbidden=forbidden,
        )
        samples.append(sample)
        if step + 1 < policy.num_image_tokens:
            embeddings = policy.embed(sample.token, "image")
            drawing.conditional.feed(embeddings, everyone)
            if drawing.unconditional is not None:
                drawing.unconditional.feed(embeddings, everyone)
    return _Drawing(drawing.conditional, drawing.unconditional, samples)


def _draw_previewed(
    policy: Policy,
    start: _Drawing,
    rows: list[tuple[Prompt, int]],
    texts: list[str],
    keys: Tensor,
    sampling: Sampling,
    preview: Preview,
    num_preview: int,
) -> tuple[_Drawing, Tensor, list[int]]:
    """The first `num_preview` tokens of every row, restarted below the threshold; the best try stays if none passes."""
    device = keys.device
    everyone = torch.arange(keys.shape[0], device=device)
    capacities = [b.cache.capacity if b is not None else 0 for b in (start.conditional, start.unconditional)]

    def try_rows(index: Tensor, try_keys: Tensor) -> tuple[_Drawing, Tensor]:
        fresh = _Drawing(
            start.conditional.rows(index, capacities[0]),
            None if start.unconditional is None else start.unconditional.rows(index, capacities[1]),
            [],
        )
        drawn = _draw(policy, fresh, try_keys, sampling, 0, num_preview)
        pictures = policy.draw(_fill(drawn.columns("token"), policy.num_image_tokens))
        chosen = index.tolist()
        scores = preview.score([rows[i][0] for i in chosen], [texts[i] for i in chosen], pictures).to(device)
        return drawn, scores

    best, scores = try_rows(everyone, keys)
    # What cannot be judged (an anchor, a failed reward) is drawn once: more tries of it would be chosen by nothing.
    judged = ~scores.isnan()
    attempts = torch.ones(keys.shape[0], dtype=torch.long)
    preview.observe(int(preview.accepts(scores).sum()), int(judged.sum()))
    for attempt in range(2, preview.max_attempts + 1):
        pending = (judged & ~preview.accepts(scores)).nonzero().squeeze(1)
        if pending.numel() == 0:
            break
        try_keys = _keys([rows[i] for i in pending.tolist()], sampling, attempt, device)
        tried, tried_scores = try_rows(pending, try_keys)
        preview.observe(int(preview.accepts(tried_scores).sum()), int(pending.numel()))
        better = tried_scores.nan_to_num(nan=float("-inf")) > scores[pending]
        where, which = pending[better], better.nonzero().squeeze(1)
        _take(best, where, tried, which)
        scores[where] = tried_scores[which]
        keys = keys.index_copy(0, where, try_keys[which])
        attempts[pending.cpu()] = attempt
    return best, keys, attempts.tolist()


def _take(best: _Drawing, where: Tensor, tried: _Drawing, which: Tensor) -> None:
    """Rows `where` of `best` become rows `which` of `tried`."""
    if where.numel() == 0:
        return
    best.conditional.write_rows(where, tried.conditional.rows(which))
    if best.unconditional is not None and tried.unconditional is not None:
        best.unconditional.write_rows(where, tried.unconditional.rows(which))
    best.samples = [
        replace(
            old,
            **{
                name: getattr(old, name).index_copy(0, where, getattr(new, name)[which])
                for name in ("token", "logp", "logp_mixed", "entropy")
            },
        )
        for old, new in zip(best.samples, tried.samples, strict=True)
    ]


def _fill(tokens: Tensor, num_tokens: int) -> Tensor:
    """[n, k] -> [n, N]: the rest of the picture repeats its last drawn row (cheap, and it stays a picture)."""
    side = round(num_tokens**0.5)
    columns = torch.arange(num_tokens, device=tokens.device)
    drawn = tokens.shape[1]
    last_row = max(0, (drawn // side - 1) * side)
    source = torch.where(columns < drawn, columns, (last_row + columns % side).clamp(max=drawn - 1))
    return tokens[:, source]
