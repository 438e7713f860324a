"""How much work a step is, worked out before anything is sampled: tokens, multiply-adds and bytes of each part.

What a token, a picture and a logit cost is counted on the policy itself, without numbers (torch's `meta` device), by
torch's own counter; attention is counted by pairs of tokens that see each other.  How many there are follows from the
step's prompts, as the rollout and the packing lay them out.  Rewards' own models are not in it.

    rollout   see photos . prefill prompts . text, a token a step . drawing turns . images, guidance beside . VQ decode
              (where images are filled in, prompts and turns are prefilled, and each step is a pass over whole images)

Scores and updates are training_cost.py.

Dims: P prompts, G members, L prompt tokens, N image tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ConfigError
from ..policies.base import Policy
from ..records import Prompt, SegmentKind
from ..rollout.drawing_turn import DrawingTurns
from ..rollout.free_prompts import FreePrompts
from ..rollout.sampling import Sampling
from .masked_cost import Filling, Turns

ATTENTION_BACKWARD = 2.5
"""Of the forward: scores again, and the gradients of values, probabilities, queries and keys: five products for two."""
COUNTED = 8
"""Tokens that a part is counted on."""


@dataclass(slots=True)
class Work:
    """One part of a step."""

    tokens: float = 0.0
    """Through the decoder, guidance's among them."""
    multiply_adds: float = 0.0
    read_bytes: float = 0.0
    """Weights once a decoding step, and the keys and values that each row sees; 0 where many tokens go at once."""

    def add(self, tokens: float, multiply_adds: float, read_bytes: float = 0.0) -> None:
        self.tokens += tokens
        self.multiply_adds += multiply_adds
        self.read_bytes += read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What a policy's parts cost once, in multiply-adds."""

    token: float
    """Forward through the decoder, attention apart."""
    token_update: float
    """Forward and backward; with gradient checkpointing, forward once more."""
    pair: float
    """A token that sees one token, in all layers."""
    pair_update: float
    head: dict[SegmentKind, float]
    """A row of logits, with what lies before the last linear map."""
    image_embedding: float
    """Of an image token."""
    see: float
    """A photo through the vision tower and its aligner."""
    draw: float
    """A picture out of its tokens."""
    trunk_bytes: int
    """Read by a decoding step."""
    head_bytes: dict[SegmentKind, int]
    column_bytes: int
    """Keys and values of a token."""

    @classmethod
    def of(cls, policy: Policy) -> Unit:
        """
        Args:
            policy: on the device `meta`, with the adapters, dtype and checkpointing that it is trained with.
        """
        kinds: tuple[SegmentKind, ...] = ("text", "image") if policy.num_image_tokens else ("text",)
        pairs, again = _Pairs(), _checkpoints(policy.decoder())
        example = policy.embed(torch.zeros(1, COUNTED, dtype=torch.long, device="meta"), "text")
        places = torch.zeros(1, COUNTED, dtype=torch.long, device="meta")
        policy.eval()
        with torch.no_grad():
            token = _counted(lambda: policy.trunk(example, places, pairs)) / COUNTED
        policy.train()
        start = example.detach().requires_grad_(example.requires_grad)
        both = _counted(lambda: policy.trunk(start, places, _Pairs()).sum().backward()) / COUNTED
        policy.zero_grad(set_to_none=True)
        ids, side = torch.zeros(COUNTED, dtype=torch.long, device="meta"), policy.image_size
        hidden, item = example.detach()[0], example.dtype.itemsize
        picture = torch.empty(1, 3, side, side, device="meta")
        tokens = torch.zeros(1, policy.num_image_tokens, dtype=torch.long, device="meta")
        with torch.no_grad():
            heads = {kind: policy.head(hidden, kind).weight for kind in kinds}
            before = {kind: _counted(partial(policy.head, hidden, kind)) / COUNTED for kind in kinds}
            return cls(
                token=token,
                token_update=both,
                pair=pairs.each,
                pair_update=pairs.each * (1 + ATTENTION_BACKWARD + again),
                head={kind: before[kind] + weight.numel() for kind, weight in heads.items()},
                image_embedding=_counted(partial(policy.embed, ids, "image")) / COUNTED if side else 0.0,
                see=_counted(partial(policy.see, picture)) if side else 0.0,
                draw=_counted(partial(policy.draw, tokens)) if side else 0.0,
                trunk_bytes=item * (_size(policy.decoder()) - _size(policy.model.get_input_embeddings())),
                head_bytes={kind: item * weight.numel() for kind, weight in heads.items()},
                column_bytes=policy.cache_shape().num_bytes(1),
            )


class _Pairs:
    """An attention layout that computes nothing; knows what a pair of tokens costs in the layers that it was in."""

    def __init__(self) -> None:
        self.each = 0.0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.each += query.shape[1] * (query.shape[-1] + value.shape[-1])
        # Of the queries' and the values' graph, so that projections have their backward; without a product.
        repeats = query.shape[1] // value.shape[1]
        mixed = query + (key + value).repeat_interleave(repeats, 1)
        return mixed.transpose(1, 2)


def _counted(run: Callable[[], object]) -> float:
    """Multiply-adds of a part; 0 of what this policy does not do."""
    with FlopCounterMode(display=False) as counter, suppress(ConfigError):
        run()
    return counter.get_total_flops() / 2


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _checkpoints(decoder: nn.Module) -> int:
    """Whether its layers are computed again in backward."""
    return int(any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What no one knows before a run."""

    text_tokens: float
    """Of each text segment."""
    kept: float = 1.0
    """Share of trajectories that pruning leaves."""
    tries: float = 1.0
    """Previews of each drawing; the redrawn ones among them."""
    preview_tokens: int = 0
    """Tokens at the preview; 0: there is none."""
    likely: bool = False
    """The rest of a preview takes one more pass of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A prompt of a step, in tokens."""

    prefix: int
    text: float
    """Of the first segment; 0 where there is none."""
    lead: float
    """Behind it up to the image's start, which is in it; 0 without an image."""
    image: int
    turn: int
    """The turn behind the image; 0 where nothing follows it."""
    after: float
    """The text that answers it."""
    free: int
    """The classifier-free prompt beside it; 0 without guidance."""
    shows: bool
    """The turn behind the image shows it."""
    whole: int = 0
    """Of the prompt, the first tokens that see each other whole."""

    @property
    def own(self) -> float:
        """What a member adds to the prompt."""
        return self.text + self.lead + self.image + self.turn + self.after

    @property
    def pairs(self) -> float:
        """Of the prompt's tokens."""
        return seen_pairs(0, self.prefix) + self.whole * (self.whole - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A step's prompts of one rank."""

    lines: list[Line]
    free: list[int]
    """The distinct classifier-free prompts."""
    photos: int
    """Different ones that prompts show."""
    max_text: int
    filling: Filling | None = None
    """How images are filled in, each in a sequence of its own."""

    @classmethod
    def of(cls, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, text_tokens: float) -> Layout:
        turns = DrawingTurns(policy, sampling.drawing_turn, sampling.max_text_tokens)
        tokens = [policy.prompt_tokens(prompt) for prompt in prompts]
        prefixes = [int(ids.numel()) for ids in tokens]
        draws = ["image" in prompt.segments for prompt in prompts]
        free = FreePrompts()
        if sampling.cfg_weight != 1.0 and any(draws):
            free = FreePrompts.of(policy, prefixes, draws, sampling.unconditional)
        lines = []
        for row, (prompt, prefix, drawn) in enumerate(zip(prompts, prefixes, draws, strict=True)):
            turn = policy.follow_up_tokens(prompt) if "image" in prompt.segments[:-1] else None
            # A drawing turn is as long as its text; `longest` counts that at its most.
            spare = sampling.max_text_tokens - text_tokens if turns.applies(prompt) else 0.0
            lines.append(
                Line(
                    prefix=prefix,
                    text=text_tokens * (prompt.segments[0] == "text"),
                    lead=(turns.longest(prompt) - spare) * drawn,
                    image=policy.num_image_tokens * drawn,
                    turn=0 if turn is None else turn.numel(),
                    after=0.0 if turn is None else text_tokens,
                    free=free.tokens[free.beside[row]].numel() if drawn and free.tokens else 0,
                    shows=turn is not None and bool(policy.image_slots(turn).any()),
                    whole=policy.whole_lead(tokens[row]),
                )
            )
        photos = len({image for prompt in prompts for image in prompt.images})
        filling = Filling.of(policy, sampling.image_steps)
        alone = [t.numel() for t in free.tokens]
        return cls(lines=lines, free=alone, photos=photos, max_text=sampling.max_text_tokens, filling=filling)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """A rank's step by its parts; of a rollout alone, scoring and updating are empty."""

    see: Work = field(default_factory=Work)
    prefill: Work = field(default_factory=Work)
    text: Work = field(default_factory=Work)
    image: Work = field(default_factory=Work)
    draw: Work = field(default_factory=Work)
    score: Work = field(default_factory=Work)
    update: Work = field(default_factory=Work)
    sampled: dict[SegmentKind, float] = field(default_factory=lambda: {"text": 0.0, "image": 0.0})
    """Tokens that trajectories hold in the end."""
    drawn: list[float] = field(default_factory=lambda: [0.0])
    """Image tokens sampled, those of tries that were given up among them."""

    @property
    def rollout(self) -> list[tuple[str, Work]]:
        return [(name, getattr(self, name)) for name in ("see", "prefill", "text", "image", "draw")]


def seen_pairs(start: float, count: float) -> float:
    """Pairs of `count` tokens behind `start` others, each seeing itself, too."""
    return count * start + count * (count + 1) / 2


def add_rollout(work: StepWork, unit: Unit, layout: Layout, members: int, assumed: Assumed) -> None:
    """Adds the sampling of `members` trajectories of each prompt to `work`."""
    u, lines, G = unit, layout.lines, members
    work.see.add(0, u.see * (layout.photos + G * sum(line.shows for line in lines)))
    for line in lines:
        work.prefill.add(line.prefix, u.token * line.prefix + u.pair * line.pairs)
    turns = [Turns.of(x.prefix, x.lead, G, 1, True) for x in lines if x.image and layout.filling is not None]
    for turn in (*turns, *(Turns(length, 1) for length in layout.free)):
        work.prefill.add(turn.tokens, u.token * turn.tokens + u.pair * turn.pairs)
    for line in lines:
        for start, count, last in (
            (line.prefix, line.text, line.lead > 0),
            (line.prefix + line.own - line.after, line.after, False),
        ):
            # What ended before its limit is fed its end as well.
            fed = max(0.0, count - (not last and count >= layout.max_text))
            pairs = G * seen_pairs(start, fed)
            work.text.add(
                G * fed, G * (u.token * fed + u.head["text"] * count) + u.pair * pairs, u.column_bytes * pairs
            )
            work.sampled["text"] += G * count
        if layout.filling is not None:
            if line.image:
                _add_filled(work, u, line, G, assumed, layout.filling)
            continue
        given = G * (line.turn + max(0.0, line.lead - 1))
        turned = G * seen_pairs(line.prefix + line.text, line.lead - 1) * (given > 0)
        work.text.add(given, u.token * given + u.pair * turned)
        if line.image:
            _add_image(work, u, line, G, assumed)
    steps = {"text": max((line.text for line in lines), default=0.0) + max((x.after for x in lines), default=0.0)}
    steps["image"] = max((line.image for line in lines), default=0) + assumed.preview_tokens * (assumed.tries > 1)
    if layout.filling is not None and steps["image"]:
        again = layout.filling.preview_step(assumed.preview_tokens) * (assumed.tries > 1)
        steps["image"] = layout.filling.num_steps + again
    work.text.read_bytes += steps["text"] * (u.trunk_bytes + u.head_bytes["text"])
    work.image.read_bytes += steps["image"] * (u.trunk_bytes + u.head_bytes.get("image", 0))


def _add_image(work: StepWork, u: Unit, line: Line, G: int, assumed: Assumed) -> None:
    """Images of a group: the conditional rows and their twins, tries that are drawn again, previews and pictures."""
    again, early = assumed.tries - 1, assumed.preview_tokens
    fed, base = line.image - (line.turn == 0), line.prefix + line.text + line.lead
    # The image's start is fed to the conditional rows alone: the twins' prompts end with it.
    work.image.add(G, G * (u.token + u.pair * base), G * u.column_bytes * base)
    for behind in (base, line.free) if line.free else (base,):
        for count, logits, times in ((fed, line.image, G), (early, early, G * again)):
            pairs = times * seen_pairs(behind, count)
            multiplied = times * (u.token * count + u.head["image"] * logits) + u.pair * pairs
            work.image.add(times * count, multiplied, u.column_bytes * pairs)
    work.image.add(0, u.image_embedding * G * (fed + again * early))
    if assumed.likely and early:
        rest, times = line.image - 1 - early, G * assumed.tries
        for behind in (base, line.free) if line.free else (base,):
            multiplied = (u.token + u.image_embedding) * rest + u.pair * seen_pairs(behind + early, rest)
            work.image.add(times * rest, times * multiplied)
        work.image.add(0, times * u.head["image"] * (rest + 1))
    work.draw.add(0, u.draw * G * (1 + assumed.tries * (early > 0)))
    work.sampled["image"] += G * line.image
    work.drawn[0] += G * (line.image + again * early)


def _add_filled(work: StepWork, u: Unit, line: Line, G: int, assumed: Assumed, filling: Filling) -> None:
    """Images of a group that are filled in: each step over all of their places, on both sides."""
    again, first = assumed.tries - 1, filling.preview_step(assumed.preview_tokens)
    base = line.lead or line.prefix
    for behind in (base, line.free) if line.free else (base,):
        for steps, times in ((filling.num_steps, G), (first, G * again)):
            each = u.token * filling.span + u.pair * filling.pairs(behind)
            multiplied = times * (steps * each + u.head["image"] * filling.rows(steps))
            read = u.column_bytes * times * steps * (behind + filling.span)
            work.image.add(times * steps * filling.span, multiplied, read)
    work.image.add(0, u.image_embedding * G * line.image * (filling.num_steps + again * first))
    work.draw.add(0, u.draw * G * (1 + assumed.tries * (first > 0)))
    work.sampled["image"] += G * line.image
    work.drawn[0] += G * line.image * (1 + again * first / filling.num_steps)
