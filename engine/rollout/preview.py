"""Drawing images with preview DGS: unpromising tries are drawn again, or given up, early.

After a fraction of the image tokens the rest is filled in cheaply and the picture is scored.  What the gate (dgs.py)
does not accept is restarted from the image's first token, up to a cap; the best try stays.  A gate that drops then
gives up what still lies below its threshold, except the best few of a group, and those rows are free.

Tries live in a small cache of their own, so a try that loses costs nothing but its steps.

Dims: n sequences that draw, k tokens at the preview, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..policies.base import Policy
from ..policies.cache import Rows, Store
from ..records import Prompt
from .decode import Phase, Samples, State
from .stepping import Stepper


class Preview(Protocol):
    """Preview DGS as the sampler sees it; the rule itself lives in dgs.py."""

    fraction: float
    max_attempts: int
    min_keep: int | None
    """Members of a group that are drawn to their end whatever their score; None: nobody is dropped."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        """[n] float32 scores of partly drawn images [n, 3, H, W]; NaN = cannot be judged."""
        ...

    def accepts(self, scores: Tensor) -> Tensor:
        """[n] bool."""
        ...

    def observe(self, num_accepted: int, num_attempts: int) -> None: ...


@dataclass(slots=True, kw_only=True)
class Canvas:
    """Everything that drawing needs to know about the batch."""

    policy: Policy
    stepper: Stepper
    phase: Phase
    prompts: Store
    own: Store
    rows: Rows
    """[B]: every sequence of the batch; those that draw have the image's start behind them."""
    guides: Rows | None
    """[B]: their unconditional twins."""
    chosen: list[int]
    """[n] the sequences that draw."""
    asked: list[Prompt]
    """[n]"""
    texts: list[str]
    """[n] what they said before."""
    keys: list[Tensor]
    """[attempts] of [n] int64: the random keys of each try."""
    goes_on: bool
    """Something follows an image, so its last token is fed too."""


@dataclass(slots=True, kw_only=True)
class Drawing:
    """What came out; [n] each."""

    samples: Samples
    keys: Tensor
    attempts: list[int]
    dropped: list[bool]
    num_drawn: int
    """Image tokens sampled, those of rejected tries included."""
    num_saved: int
    """Image tokens that rejected tries and dropped members would have needed to their end."""


def preview_length(preview: Preview | None, num_tokens: int, forced: Tensor | None = None) -> int:
    """Tokens at the preview, a fraction of those that are sampled; 0: there is none."""
    if preview is None:
        return 0
    sampled = range(num_tokens) if forced is None else (forced < 0).nonzero().squeeze(1).tolist()
    count = max(1, round(preview.fraction * len(sampled)))
    return int(sampled[count - 1]) + 1 if count < len(sampled) else 0


def draw(canvas: Canvas, preview: Preview | None) -> Drawing:
    """Draws every image; `rows` and `guides` of the canvas then stand behind them."""
    c, n = canvas, len(canvas.chosen)
    num_tokens = c.phase.max_tokens
    length = preview_length(preview, num_tokens, c.policy.forced_image_tokens())
    samples = c.stepper.samples("image", len(c.rows), num_tokens)
    index = torch.tensor(c.chosen, device=c.rows.position.device)
    keys = c.keys[0]
    fork = (c.rows.take(index), None if c.guides is None else c.guides.take(index))
    _run(c, State.start(fork[0], index, keys, fork[1]), samples, 0, length or num_tokens)
    if preview is None or not length:
        return Drawing(samples=samples, keys=keys, attempts=[1] * n, dropped=[False] * n, num_drawn=n * num_tokens,
                       num_saved=0)  # fmt: skip
    scores = _score(c, preview, samples.token[index, :length], range(n))
    judged = ~scores.isnan()
    preview.observe(int(preview.accepts(scores).sum()), int(judged.sum()))
    attempts = torch.ones(n, dtype=torch.long)
    num_tries = n
    for attempt in range(2, preview.max_attempts + 1):
        # What cannot be judged (an anchor, a failed reward) is drawn once: more tries would be chosen by nothing.
        pending = (judged & ~preview.accepts(scores)).nonzero().squeeze(1)
        if not pending.numel():
            break
        better, tried_scores = _try_again(c, preview, fork, pending, c.keys[attempt - 1], samples, scores, length)
        where = pending[better].to(keys.device)
        keys = keys.index_copy(0, where, c.keys[attempt - 1][where])
        scores[pending[better]] = tried_scores[better]
        attempts[pending] = attempt
        num_tries += pending.numel()
    dropped = _dropped(preview, c.asked, scores, judged)
    staying = index[(~dropped).nonzero().squeeze(1).to(index.device)]
    guides = None if c.guides is None else c.guides.take(staying)
    state = State.start(c.rows.take(staying), staying, keys[(~dropped).to(keys.device)], guides)
    state.step.fill_(length)
    _run(c, state, samples, length, num_tokens)
    rest = num_tokens - length
    num_drawn = num_tries * length + staying.numel() * rest
    return Drawing(samples=samples, keys=keys, attempts=attempts.tolist(), dropped=dropped.tolist(),
                   num_drawn=num_drawn, num_saved=(num_tries - staying.numel()) * rest)  # fmt: skip


def _run(c: Canvas, state: State, samples: Samples, first: int, last: int) -> None:
    if len(state):
        c.stepper.run(c.phase, state, samples, c.prompts, c.own, c.rows, c.guides, num_steps=last - first,
                      feed_last=c.goes_on or last < c.phase.max_tokens)  # fmt: skip


def _score(c: Canvas, preview: Preview, tokens: Tensor, rows: Sequence[int]) -> Tensor:
    """[n'] scores of the first tokens [n', k] of sequences `rows` of the canvas, on the CPU."""
    pictures = c.policy.draw(fill(tokens, c.phase.max_tokens, c.policy.forced_image_tokens()))
    return preview.score([c.asked[i] for i in rows], [c.texts[i] for i in rows], pictures).float().cpu()


def _try_again(
    c: Canvas,
    preview: Preview,
    fork: tuple[Rows, Rows | None],
    pending: Tensor,
    keys: Tensor,
    samples: Samples,
    scores: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Draws `pending` once more from the fork; what is better replaces what was. (better [n'] bool, scores [n'])"""
    device = keys.device
    index = pending.to(device)
    sides = [rows.take(index) for rows in fork if rows is not None]
    spans = [rows.spans[:, 2:].tolist() for rows in sides]
    sizes = [seen + length for side in spans for _, seen in side]
    scratch = c.stepper.store("tries", c.policy.cache_shape(), sizes)
    starts = iter(scratch.starts)
    for rows, side in zip(sides, spans, strict=True):
        places = [next(starts) for _ in side]
        for place, (start, seen) in zip(places, side, strict=True):
            scratch.copy_span(place, c.own, start, seen)
        rows.spans[:, 2] = torch.tensor(places, device=device)
    tried = c.stepper.samples("tries", len(pending), length)
    slots = torch.arange(len(pending), device=device)
    state = State.start(sides[0], slots, keys[index], *sides[1:])
    c.stepper.run(c.phase, state, tried, c.prompts, scratch, sides[0], *sides[1:], num_steps=length, feed_last=True)
    tried_scores = _score(c, preview, tried.token[slots], pending.tolist())
    preview.observe(int(preview.accepts(tried_scores).sum()), int(pending.numel()))
    better = tried_scores.nan_to_num(nan=float("-inf")) > scores[pending]
    winners = better.nonzero().squeeze(1)
    where = torch.tensor([c.chosen[i] for i in pending[winners].tolist()], device=device, dtype=torch.long)
    samples.take(where, tried, winners.to(device), length)
    for rows, side, table in zip(sides, spans, (c.rows, c.guides), strict=False):
        assert table is not None
        table.hidden[where] = rows.hidden[winners.to(device)]
        places = rows.spans[:, 2].tolist()
        for row in winners.tolist():
            start, seen = side[row]
            c.own.copy_span(start + seen, scratch, places[row] + seen, length)
    return better, tried_scores


def _dropped(preview: Preview, asked: Sequence[Prompt], scores: Tensor, judged: Tensor) -> Tensor:
    """[n] bool: judged, below the threshold, and not among the best `min_keep` of their group."""
    dropped = torch.zeros(len(asked), dtype=torch.bool)
    if preview.min_keep is None:
        return dropped
    accepted = preview.accepts(scores)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(asked):
        groups.setdefault(prompt.id, []).append(i)
    for group in groups.values():
        # The sort is stable and best first; what cannot be judged stays and counts.
        order = sorted(group, key=lambda i: -float("inf") if not judged[i] else -float(scores[i]))
        for i in order[preview.min_keep :]:
            dropped[i] = bool(judged[i]) and not bool(accepted[i])
    return dropped


def fill(tokens: Tensor, num_tokens: int, forced: Tensor | None = None) -> Tensor:
    """[n, k] -> [n, N]: the rest of the picture repeats its last drawn row (cheap, and it stays a picture)."""
    if forced is not None:
        free = (forced < 0).to(tokens.device)
        whole = forced.to(tokens.device).repeat(tokens.shape[0], 1)
        whole[:, free] = fill(tokens[:, free[: tokens.shape[1]]], int(free.sum()))
        return whole
    side = round(num_tokens**0.5)
    columns = torch.arange(num_tokens, device=tokens.device)
    drawn = tokens.shape[1]
    last_row = max(0, (drawn // side - 1) * side)
    source = torch.where(columns < drawn, columns, (last_row + columns % side).clamp(max=drawn - 1))
    return tokens[:, source]
