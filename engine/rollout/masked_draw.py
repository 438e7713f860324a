"""Drawing images in masked order: all places at once, filled in by steps, with preview DGS on the way.

    image's sequence = turn | frame . places . frame          the span behind the turn sees itself whole

A turn's keys are computed once, for all members that share it and for all steps; so are those of the free prompt. A
step is one pass of the trunk over the spans of all images, with guidance a second time behind the free prompt, one
fused sampler call on what is unknown, and a choice of what to keep (mask_schedule.py). Random numbers are keyed by
trajectory, step and place: what is drawn does not depend on the batch around it.

A preview shows the proposal: what the last step drew of every place. What is drawn again starts from masks alone; what
goes on goes on from the state, masks included. (The released Sync-R1 goes on from the filled preview, which settles the
picture there and then.)

Source: MaskGIT (arXiv 2202.04200), Show-o's `t2i_generate`.

Dims: n images, N tokens of an image, U unknown ones, L = N and its frame, D hidden, W words of a kept set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from syncr1.kernels.api import CFGSample, SharedPrefixLayout, attention_provider, cfg_sample
from syncr1.kernels.reference.philox import uniform

from ..policies.base import Policy
from ..policies.cache import FillIn, Prefill, Store
from ..records import Segment
from .decode import Linear, Phase
from .draft import Draft
from .mask_schedule import MaskSchedule
from .preview import Drawing, dropped_of
from .preview_gate import PreviewGate

ROWS_AT_ONCE = 1 << 13
"""Places whose logits exist at a time."""
FEW_STEPS = 4
"""Not worth a capture, which costs two passes."""
CONFIDENCE = 1
"""Stream of the random numbers of confidence; those of tokens have 0."""


@dataclass(slots=True, kw_only=True)
class Filled:
    """Images under way, on the policy's device."""

    tokens: Tensor
    """[n, N] int64; the policy's mask where nothing is settled."""
    order: Tensor
    """[n, N] int64: the step that settled it; -1."""
    proposal: Tensor
    """[n, N] int64: the picture as the last step drew it, masks filled."""
    logp: Tensor
    logp_mixed: Tensor
    entropy: Tensor
    """[n, N] float32 each, of settled tokens."""
    support: Tensor
    """[n, N, W] int32; W is 0 where nothing is left out."""
    proposals: Tensor
    """[n, T', N] int64: what each step drew; T' is 0 where that is not kept."""
    proposal_logp: Tensor
    """[n, T', 2, N] float32; NaN where it was known before."""

    @classmethod
    def masked(cls, policy: Policy, num_images: int, words: int, kept_steps: int = 0) -> Filled:
        size = (num_images, policy.num_image_tokens)
        tokens = torch.full(size, policy.mask_token, device=policy.device)
        nothing = torch.zeros(size, device=policy.device)
        return cls(
            tokens=tokens,
            order=torch.full_like(tokens, -1),
            proposal=tokens.clone(),
            logp=nothing,
            logp_mixed=nothing.clone(),
            entropy=nothing.clone(),
            support=torch.zeros(*size, words, dtype=torch.int32, device=policy.device),
            proposals=tokens[:, None].repeat(1, kept_steps, 1),
            proposal_logp=nothing[:, None, None].repeat(1, kept_steps, 2, 1).fill_(float("nan")),
        )

    @property
    def keeps(self) -> bool:
        """What each step drew is kept."""
        return self.proposals.shape[1] > 0

    def take(self, index: Tensor) -> Filled:
        """A copy of images `index` [m]."""
        return Filled(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def put(self, index: Tensor, other: Filled) -> None:
        """Images `index` become `other`'s."""
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, index, getattr(other, field.name))

    def segments(self, truncated: bool) -> list[Segment]:
        """[n], on the CPU; with kept sets where sampling was truncated."""
        columns = {field.name: getattr(self, field.name).cpu() for field in fields(self) if field.name != "proposal"}
        for name, kept in (("support", truncated), ("proposals", self.keeps), ("proposal_logp", self.keeps)):
            if not kept:
                del columns[name]
        rows = range(len(self.tokens))
        return [Segment(kind="image", **{name: column[row] for name, column in columns.items()}) for row in rows]

    def settle(self, step: int, places: Tensor, kept: Tensor, sample: CFGSample) -> None:
        """Of the drawn `places` [n, U] those at columns `kept` [n, K] stay; all of them are proposed."""
        n = len(places)
        rows = torch.arange(n, device=places.device)[:, None]
        drawn = sample.token.view(n, -1)
        self.proposal.copy_(self.tokens)
        self.proposal.scatter_(1, places, drawn)
        where = places.gather(1, kept)
        self.tokens.scatter_(1, where, drawn.gather(1, kept))
        self.order.scatter_(1, where, torch.full_like(where, step))
        for mine, theirs in (
            (self.logp, sample.logp),
            (self.logp_mixed, sample.logp_mixed),
            (self.entropy, sample.entropy),
        ):
            mine.scatter_(1, where, theirs.float().view(n, -1).gather(1, kept))
        if self.keeps:
            self.proposals[:, step] = self.proposal
            for side, values in enumerate((sample.logp, sample.logp_mixed)):
                self.proposal_logp[:, step, side].scatter_(1, places, values.float().view(n, -1))
        if sample.support is not None:
            self.support[rows, where] = sample.support.view(n, places.shape[1], -1)[rows, kept]


def distinct(sides: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[list[int]]]:
    """Sequences [sides][n] of ids -> (each of them once, [sides][n] which of them).  In the order of their first use,
    so that the members of a group stay adjacent."""
    found: dict[tuple[int, ...], int] = {}
    kept: list[Tensor] = []
    which: list[list[int]] = []
    for side in sides:
        which.append([])
        for ids in side:
            key = tuple(ids.tolist())
            if key not in found:
                found[key] = len(kept)
                kept.append(ids)
            which[-1].append(found[key])
    return kept, which


class Easel:
    """What images are drawn behind: every distinct turn and free prompt once, as keys and values.

    Args:
        policy: whose images they are.
        linear: multiplies hidden states with a head.
        store: a cache with a span for each of `prefixes`.
        prefixes: distinct turns and free prompts.
        beside: [sides] of [n] int64 each: the prefix of every image, and with guidance its free one.
    """

    def __init__(
        self,
        policy: Policy,
        linear: Linear,
        store: Store,
        prefixes: Sequence[Tensor],
        beside: Sequence[Sequence[int]],
    ) -> None:
        self.policy, self.linear, self.store = policy, linear, store
        self.lengths, self.beside = [ids.numel() for ids in prefixes], beside
        layout = Prefill(store)
        embeddings = policy.embed(torch.cat(list(prefixes)).to(policy.device), "text")
        policy.trunk(embeddings[None], layout.position_ids[None], layout)
        self._frame = [policy.embed(ids.to(policy.device), "text") for ids in policy.image_frame()]


class Spans:
    """Spans of some images on one axis, in the order of their prefixes; a side after the other."""

    def __init__(self, easel: Easel, images: Sequence[int]) -> None:
        device, policy = easel.policy.device, easel.policy
        self.easel = easel
        self.length = policy.num_image_tokens + sum(len(part) for part in easel._frame)
        prefix = torch.tensor([side[image] for side in easel.beside for image in images], dtype=torch.long)
        order = prefix.argsort(stable=True)
        counts = torch.bincount(prefix, minlength=len(easel.lengths)).tolist()
        spans = torch.full((len(prefix),), self.length, dtype=torch.int32)
        self.layout = SharedPrefixLayout(
            torch.tensor(easel.store.starts, dtype=torch.int32),
            torch.tensor([0, *accumulate(spans.tolist())], dtype=torch.int32),
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            None,
            spans,
        ).to(device)
        self.order, self.back = order.to(device), order.argsort().to(device)
        starts = torch.tensor(easel.lengths)[prefix[order]]
        self.positions = (starts[:, None] + torch.arange(self.length)).flatten().to(device)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[n, N] int64 -> [sides, n, N, D] hidden states, each of its own place."""
        easel, policy = self.easel, self.easel.policy
        n, N = tokens.shape
        before, behind = (part.expand(n, *part.shape) for part in easel._frame)
        places = policy.embed(tokens.flatten(), "image").view(n, N, -1)
        spans = torch.cat([before, places, behind], 1)
        spans = spans.repeat(len(easel.beside), 1, 1)[self.order]
        hidden = policy.trunk(spans.flatten(0, 1)[None], self.positions[None], FillIn(easel.store, self.layout))[0]
        hidden = hidden.view(len(self.order), self.length, -1)[self.back]
        return hidden[:, before.shape[1] : before.shape[1] + N].unflatten(0, (len(easel.beside), n))


def captures(policy: Policy) -> bool:
    """A pass can be a CUDA graph: attention's kernels serve it. Its plain PyTorch makes tensors on the way, which no
    capture allows."""
    shape = policy.cache_shape()
    return attention_provider(shape.device, dtype=shape.dtype, head_size=shape.head_dim).startswith("flash")


class GraphedSpans:
    """The pass of `Spans.hidden` captured once and replayed for every step: its shape is the same in all.

    Args:
        spans: of images on a GPU.
        tokens: [n, N] int64, any.
        pool: memory that graphs share.
    """

    def __init__(self, spans: Spans, tokens: Tensor, pool: Any) -> None:
        self._tokens = tokens.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            spans.hidden(self._tokens)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._hidden = spans.hidden(self._tokens)

    def hidden(self, tokens: Tensor) -> Tensor:
        """As `Spans.hidden`; overwritten by the next call."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._hidden


@dataclass(slots=True, kw_only=True)
class MaskedCanvas:
    """Everything that drawing needs to know."""

    easel: Easel
    phase: Phase
    schedule: MaskSchedule
    drafts: list[Draft]
    """[n] what they are so far."""
    keys: list[Tensor]
    """[attempts] of [n] int64: the random keys of each try."""
    words: int
    """W."""
    kept_steps: int = 0
    """T'."""
    graphs: Any = None
    """Memory of CUDA graphs; None: without."""

    def blank(self, num_images: int) -> Filled:
        """Images of masks alone."""
        return Filled.masked(self.easel.policy, num_images, self.words, self.kept_steps)


def draw_masked(canvas: MaskedCanvas, preview: PreviewGate | None) -> tuple[Filled, Drawing]:
    """Fills in every image; what previews give up is left as it was proposed."""
    c, n = canvas, len(canvas.drafts)
    policy, steps = c.easel.policy, c.schedule.num_steps
    first = 0 if preview is None else c.schedule.preview_step(preview.fraction)
    keys, everyone = c.keys[0], list(range(n))
    filled = c.blank(n)
    _run(c, filled, everyone, keys, 0, first or steps)
    attempts, dropped, tries = torch.ones(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool), n
    if preview is not None and first:
        scores = _score(c, preview, filled.proposal, everyone)
        judged = ~scores.isnan()
        preview.observe(int(preview.accepts(scores).sum()), int(judged.sum()))
        for attempt in range(2, preview.max_attempts + 1):
            # What cannot be judged is drawn once: more tries could not be compared.
            pending = (judged & ~preview.accepts(scores)).nonzero().squeeze(1)
            if not pending.numel():
                break
            where = pending.to(keys.device)
            tried = c.blank(len(pending))
            _run(c, tried, pending.tolist(), c.keys[attempt - 1][where], 0, first)
            tried_scores = _score(c, preview, tried.proposal, pending.tolist())
            preview.observe(int(preview.accepts(tried_scores).sum()), int(pending.numel()))
            better = tried_scores.nan_to_num(nan=float("-inf")) > scores[pending]
            winners = better.nonzero().squeeze(1)
            won = where[winners.to(where.device)]
            filled.put(won, tried.take(winners.to(where.device)))
            keys = keys.index_copy(0, won, c.keys[attempt - 1][won])
            scores[pending[winners]] = tried_scores[winners]
            attempts[pending] = attempt
            tries += pending.numel()
        dropped = dropped_of(preview, c.drafts, scores, judged)
        staying = (~dropped).nonzero().squeeze(1)
        index = staying.to(keys.device)
        going = filled.take(index)
        _run(c, going, staying.tolist(), keys[index], first, steps)
        filled.put(index, going)
    filled.tokens = torch.where(filled.tokens == policy.mask_token, filled.proposal, filled.tokens)
    rest = steps - first if first else 0
    share = policy.num_image_tokens / steps
    staying_count = n - int(dropped.sum())
    drawing = Drawing(
        keys=keys,
        attempts=attempts.tolist(),
        dropped=dropped.tolist(),
        num_drawn=round(share * (tries * (first or steps) + staying_count * rest)),
        num_saved=round(share * (tries - staying_count) * rest),
    )
    return filled, drawing


def _score(c: MaskedCanvas, preview: PreviewGate, proposal: Tensor, rows: Sequence[int]) -> Tensor:
    """[n'] scores of proposed pictures [n', N] of images `rows`, on the CPU."""
    drafts = [c.drafts[i] for i in rows]
    return preview.score([d.prompt for d in drafts], [d.text for d in drafts], c.easel.policy.draw(proposal)).cpu()


def _run(c: MaskedCanvas, filled: Filled, images: Sequence[int], keys: Tensor, first: int, last: int) -> None:
    """Steps first … last - 1 on `filled`, which are `images` of the canvas with random `keys`."""
    if not images:
        return
    N = c.easel.policy.num_image_tokens
    spans = Spans(c.easel, images)
    hidden_of = spans.hidden
    if c.graphs is not None and last - first > FEW_STEPS:
        hidden_of = GraphedSpans(spans, filled.tokens, c.graphs).hidden
    unknown = N if first == 0 else c.schedule.left[first - 1]
    for step in range(first, last):
        # All images have as many unknown places: no host waits to learn how many.
        known = (filled.tokens != c.easel.policy.mask_token).int()
        places = known.argsort(dim=1, stable=True)[:, :unknown]
        counter = c.phase.first_offset + step * N + places
        sample = _sample(c, hidden_of(filled.tokens), places, keys, counter)
        left = c.schedule.left[step]
        confidence = sample.logp_mixed.view_as(places).double()
        if noise := c.schedule.noise[step]:
            chance = uniform(keys[:, None].expand_as(counter).flatten(), counter.flatten(), CONFIDENCE)
            confidence = confidence - noise * (-chance.log()).log().view_as(places)
        kept = confidence.topk(unknown - left, dim=1).indices
        filled.settle(step, places, kept, sample)
        unknown = left


def _sample(c: MaskedCanvas, hidden: Tensor, places: Tensor, keys: Tensor, counter: Tensor) -> CFGSample:
    """One fused call on the places [n, U], by the hidden states [sides, n, N, D]."""
    policy, phase, cut = c.easel.policy, c.phase, c.phase.truncation
    index = places[None, :, :, None].expand(len(hidden), -1, -1, hidden.shape[-1])
    rows = hidden.gather(2, index).flatten(1, 2)
    key, offset = keys[:, None].expand_as(places).flatten(), counter.flatten()
    parts = []
    for piece in torch.arange(rows.shape[1], device=rows.device).split(ROWS_AT_ONCE):
        heads = [policy.head(side[piece], "image") for side in rows]
        logits = [c.easel.linear(head.hidden, head.weight, head.bias) for head in heads]
        parts.append(
            cfg_sample(
                logits[0],
                logits[1] if len(logits) > 1 else None,
                cfg_weight=phase.cfg_weight if len(logits) > 1 else 1.0,
                temperature=phase.temperature,
                top_k=cut.top_k,
                top_p=cut.top_p,
                min_p=cut.min_p,
                seed=key[piece],
                offset=offset[piece],
                forbidden=heads[0].forbidden,
                with_support=cut.acts,
            )
        )
    if len(parts) == 1:
        return parts[0]
    kept = [part.support for part in parts if part.support is not None]
    token, logp, mixed, entropy = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("token", "logp", "logp_mixed", "entropy")
    )
    return CFGSample(token, logp, mixed, entropy, torch.cat(kept) if kept else None)
