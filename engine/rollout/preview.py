"""Drawing images with preview DGS: unpromising tries are drawn again, or given up, early.

After a fraction of the image tokens the rest is filled in cheaply (completion.py) and the picture is scored.  What the
gate (preview_gate.py) does not accept is restarted from the image's first token, up to a cap; the best try stays.  A
gate that drops then gives up what still lies below its threshold, except the best few of a group, and those rows are
free.

Tries live in a small cache of their own, so a try that loses costs nothing but its steps.

Dims: n sequences that draw, k tokens at the preview, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..policies.base import Policy
from ..policies.cache import Rows, Store
from .completion import fill, most_likely
from .decode import Phase, Samples, State, Tables, support_words
from .draft import Draft
from .preview_gate import PreviewGate
from .stepping import Stepper


@dataclass(slots=True, kw_only=True)
class Canvas:
    """Everything that drawing needs to know about the batch."""

    policy: Policy
    stepper: Stepper
    phase: Phase
    tables: Tables
    """Every sequence of the batch; those that draw have the image's start behind them."""
    chosen: list[int]
    """[n] the sequences that draw."""
    drafts: list[Draft]
    """[n] what they are so far."""
    keys: list[Tensor]
    """[attempts] of [n] int64: the random keys of each try."""
    goes_on: bool
    """Something follows an image, so its last token is fed too."""


@dataclass(slots=True, kw_only=True)
class Drawing:
    """What came out; [n] each."""

    keys: Tensor
    attempts: list[int]
    dropped: list[bool]
    num_drawn: int
    """Image tokens sampled, those of rejected tries included."""
    num_saved: int
    """Image tokens that rejected tries and dropped members would have needed to their end."""


def preview_length(preview: PreviewGate | None, num_tokens: int, forced: Tensor | None = None) -> int:
    """Tokens at the preview, a fraction of those that are sampled; 0: there is none."""
    if preview is None:
        return 0
    sampled = range(num_tokens) if forced is None else (forced < 0).nonzero().squeeze(1).tolist()
    count = max(1, round(preview.fraction * len(sampled)))
    return int(sampled[count - 1]) + 1 if count < len(sampled) else 0


def draw(canvas: Canvas, preview: PreviewGate | None) -> tuple[Samples, Drawing]:
    """Draws every image, in raster order; the canvas's tables then stand behind them."""
    c, n = canvas, len(canvas.chosen)
    num_tokens = c.phase.max_tokens
    length = preview_length(preview, num_tokens, c.policy.forced_image_tokens())
    words = support_words(c.policy, c.phase, c.tables.sides[0].hidden)
    samples = c.stepper.samples("image", len(c.tables.sides[0]), num_tokens, words)
    keys = c.keys[0]
    index = torch.tensor(c.chosen, device=keys.device)
    fork = [side.take(index) for side in c.tables.sides]
    _run(c, State.start(fork, index, keys), samples, 0, length or num_tokens)
    if preview is None or not length:
        return samples, Drawing(keys=keys, attempts=[1] * n, dropped=[False] * n, num_drawn=n * num_tokens, num_saved=0)
    standing = [side.take(index) for side in c.tables.sides]
    scores = _score(c, preview, samples.token[index, :length], range(n), standing, c.tables.own)
    judged = ~scores.isnan()
    preview.observe(int(preview.accepts(scores).sum()), int(judged.sum()))
    attempts = torch.ones(n, dtype=torch.long)
    num_tries = n
    for attempt in range(2, preview.max_attempts + 1):
        # What cannot be judged (an anchor, a failed reward) is drawn once: more tries could not be compared.
        pending = (judged & ~preview.accepts(scores)).nonzero().squeeze(1)
        if not pending.numel():
            break
        better, tried_scores = _try_again(c, preview, fork, pending, c.keys[attempt - 1], samples, scores, length)
        where = pending[better].to(keys.device)
        keys = keys.index_copy(0, where, c.keys[attempt - 1][where])
        scores[pending[better]] = tried_scores[better]
        attempts[pending] = attempt
        num_tries += pending.numel()
    dropped = dropped_of(preview, c.drafts, scores, judged)
    staying = index[(~dropped).nonzero().squeeze(1).to(index.device)]
    sides = [side.take(staying) for side in c.tables.sides]
    state = State.start(sides, staying, keys[(~dropped).to(keys.device)])
    state.step.fill_(length)
    _run(c, state, samples, length, num_tokens)
    rest = num_tokens - length
    num_drawn = num_tries * length + staying.numel() * rest
    return samples, Drawing(
        keys=keys,
        attempts=attempts.tolist(),
        dropped=dropped.tolist(),
        num_drawn=num_drawn,
        num_saved=(num_tries - staying.numel()) * rest,
    )


def _run(c: Canvas, state: State, samples: Samples, first: int, last: int) -> None:
    if len(state):
        feed_last = c.goes_on or last < c.phase.max_tokens
        c.stepper.run(c.phase, state, samples, c.tables, num_steps=last - first, feed_last=feed_last)


def _score(
    c: Canvas, preview: PreviewGate, tokens: Tensor, rows: Sequence[int], standing: Sequence[Rows], own: Store
) -> Tensor:
    """[n'] scores of the first tokens [n', k] of sequences `rows` of the canvas, on the CPU; `standing` [n'] each are
    where their sides stand in `own`."""
    whole = fill(tokens, c.phase.max_tokens, c.policy.forced_image_tokens())
    if preview.completion == "likely":
        given = (c.policy, whole, tokens.shape[1], standing, c.tables.prompts, own)
        whole = most_likely(*given, cfg_weight=c.phase.cfg_weight)
    pictures = c.policy.draw(whole)
    drafts = [c.drafts[i] for i in rows]
    return preview.score([d.prompt for d in drafts], [d.text for d in drafts], pictures).cpu()


def _try_again(
    c: Canvas,
    preview: PreviewGate,
    fork: Sequence[Rows],
    pending: Tensor,
    keys: Tensor,
    samples: Samples,
    scores: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Draws `pending` once more from the fork; what is better replaces what was. (better [n'] bool, scores [n'])"""
    device, own = keys.device, c.tables.own
    index = pending.to(device)
    sides = [rows.take(index) for rows in fork]
    homes = [rows.own_spans() for rows in sides]
    reach = preview.reach(length, c.phase.max_tokens)
    sizes = [seen + reach for home in homes for _, seen in home]
    scratch = c.stepper.store("tries", c.policy.cache_shape(), sizes)
    starts = iter(scratch.starts)
    for rows, home in zip(sides, homes, strict=True):
        places = [next(starts) for _ in home]
        for place, (start, seen) in zip(places, home, strict=True):
            scratch.copy_span(place, own, start, seen)
        rows.own_start.copy_(torch.tensor(places))
    tried = c.stepper.samples("tries", len(pending), length, samples.support.shape[2])
    slots = torch.arange(len(pending), device=device)
    state, tables = State.start(sides, slots, keys[index]), replace(c.tables, own=scratch, sides=sides)
    c.stepper.run(c.phase, state, tried, tables, num_steps=length, feed_last=True)
    tried_scores = _score(c, preview, tried.token[slots], pending.tolist(), sides, scratch)
    preview.observe(int(preview.accepts(tried_scores).sum()), int(pending.numel()))
    better = tried_scores.nan_to_num(nan=float("-inf")) > scores[pending]
    winners = better.nonzero().squeeze(1)
    where = torch.tensor([c.chosen[i] for i in pending[winners].tolist()], device=device, dtype=torch.long)
    samples.take(where, tried, winners.to(device), length)
    for rows, home, table in zip(sides, homes, c.tables.sides, strict=True):
        table.hidden[where] = rows.hidden[winners.to(device)]
        places = rows.own_start.tolist()
        for row in winners.tolist():
            start, seen = home[row]
            own.copy_span(start + seen, scratch, places[row] + seen, length)
    return better, tried_scores


def dropped_of(preview: PreviewGate, drafts: Sequence[Draft], scores: Tensor, judged: Tensor) -> Tensor:
    """[n] bool: judged, below the threshold, and not among the best `min_keep` of their group."""
    dropped = torch.zeros(len(drafts), dtype=torch.bool)
    if preview.min_keep is None:
        return dropped
    accepted = preview.accepts(scores)
    groups: dict[str, list[int]] = {}
    for i, draft in enumerate(drafts):
        groups.setdefault(draft.prompt.id, []).append(i)
    for group in groups.values():
        # The sort is stable and best first; what cannot be judged stays and counts.
        order = sorted(group, key=lambda i: -float("inf") if not judged[i] else -float(scores[i]))
        for i in order[preview.min_keep :]:
            dropped[i] = bool(judged[i]) and not bool(accepted[i])
    return dropped
