"""One batch of prompts, sampled phase by phase: text, image, follow-up.

Each prompt, its image included, runs through the model once, and so does a classifier-free prompt; members hold only
what they add (cache.py).  Text and image phases advance over all groups together, a sequence that ended frees its rows,
and the next phase goes on from the same cache.

Dims: P prompts, G members, B = P*G sequences, N image tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..policies.cache import Extend, Prefill, Rows
from ..records import Prompt, Rollout, Segment, SegmentKind
from ..settings.modality import value_of
from ..stopwatch import Stopwatch
from .capacity import Sizes, check_fits, check_plans, check_prompts
from .completion import fill
from .decode import Phase, Samples, State, Tables, advance, support_words
from .draft import Draft
from .drawing_turn import DrawingTurns
from .free_prompts import FreePrompts
from .mask_schedule import MaskSchedule
from .masked_draw import Easel, MaskedCanvas, captures, distinct, draw_masked
from .preview import Canvas, Drawing, draw, preview_length
from .preview_gate import PreviewGate
from .sampling import RolloutStats, Sampling, trajectory_key
from .stepping import Stepper

IMAGE_OFFSET, FOLLOW_UP_OFFSET = 1 << 20, 1 << 21
"""Random-number counters of image and follow-up tokens start here, so that they do not depend on the text's length."""
TURNS_AT_ONCE = 1 << 15
"""Tokens of drawing turns in one pass: their activations are counted nowhere."""
DRAWN_AT_ONCE = 64
"""Images that the VQ decoder gets at a time."""


class Batch:
    """One call of `generate`: the prompts are run when it is made, then phase follows phase."""

    def __init__(
        self,
        stepper: Stepper,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        preview: PreviewGate | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.stepper, self.policy, self.sampling, self.preview = stepper, stepper.policy, sampling, preview
        self.stats, self.time = RolloutStats(), Stopwatch()
        check_plans(self.policy, prompts)
        self.drawing = DrawingTurns(self.policy, sampling.drawing_turn, sampling.max_text_tokens)
        tokens = [self.policy.prompt_tokens(prompt) for prompt in prompts]
        turns = [self.policy.follow_up_tokens(p) if "image" in p.segments[:-1] else None for p in prompts]
        sizes = Sizes.of(self.policy, prompts, turns, self.drawing)
        check_prompts(self.policy, prompts, tokens, sizes, self.drawing)
        lengths, beside = [ids.numel() for ids in tokens], FreePrompts()
        if sampling.cfg_weight != 1.0 and any(sizes.images):
            beside = FreePrompts.of(self.policy, lengths, sizes.images, sampling.unconditional)
        # What images of their own sequences are drawn behind is run with their turns.
        free = FreePrompts() if self.drawing.apart else beside
        self._allocate([*lengths, *(ids.numel() for ids in free.tokens)], sizes, bool(free.tokens), max_bytes)
        with self.time("see"):
            images = self._see(prompts)
        with self.time("prefill"):
            sides = self._prefill([*tokens, *free.tokens], images, free)
        self.tables, self.rows = Tables(prompts=self.prompts, own=self.own, sides=sides), sides[0]
        self.drafts = [
            Draft(
                prompt=prompt,
                member=member,
                prompt_tokens=ids,
                prompt_image=image,
                follow_up=turn,
                free_prompt=beside.tokens[beside.beside[row]] if beside.tokens else None,
                uid=trajectory_key(sampling, prompt, member),
            )
            for row, (prompt, ids, image, turn) in enumerate(zip(prompts, tokens, images, turns, strict=True))
            for member in range(sampling.num_generations)
        ]

    def _allocate(self, prefixes: list[int], sizes: Sizes, guided: bool, max_bytes: int | None) -> None:
        """Makes the caches of the prompts, of `prefixes` tokens each, and of what members add to them."""
        stepper, policy, preview, G = self.stepper, self.policy, self.preview, self.sampling.num_generations
        shape, N = policy.cache_shape(), policy.num_image_tokens
        own = [length for length in sizes.own for _ in range(G)]
        if guided:
            own += [N * drawn for drawn in sizes.images for _ in range(G)]
        columns = sum(own)
        if preview is not None and preview.max_attempts > 1:
            length = preview_length(preview, N, policy.forced_image_tokens())
            columns += sizes.preview_columns(G, length, guided, preview.reach(length, N))
        if self.drawing.apart:
            columns = sum(own) + sizes.turn_columns(G, prefixes)
        check_fits(shape, sum(prefixes), columns, G, max_bytes, stepper.held_bytes)
        self.prompts = stepper.store("prompts", shape, prefixes)
        self.own = stepper.store("own", shape, own)
        self.stats.kv_bytes = shape.num_bytes(sum(prefixes) + sum(own))
        self.stats.prefill_tokens = sum(prefixes)

    def _prefill(self, prompts: Sequence[Tensor], images: Sequence[Tensor | None], free: FreePrompts) -> list[Rows]:
        """Runs each prompt once, the classifier-free ones last; gives every member's row, and its twin's."""
        policy, device, P, G = self.policy, self.prompts.keys.device, len(images), self.sampling.num_generations
        tokens = torch.cat(list(prompts)).to(device)
        embeddings = policy.embed(tokens, "text")
        seen = [image for image in images if image is not None]
        if seen:
            slots = policy.image_slots(tokens).nonzero().squeeze(1)
            embeddings = embeddings.index_copy(0, slots, torch.cat(seen).to(embeddings.dtype))
        layout = Prefill(self.prompts, [policy.whole_lead(ids) for ids in prompts])
        hidden = policy.trunk(embeddings[None], layout.position_ids[None], layout)[0]
        bounds = torch.tensor(self.prompts.starts, device=device)
        own_starts = torch.tensor(self.own.starts, device=device)

        def rows(prefix: Tensor, own_start: Tensor) -> Rows:
            start, end = bounds[prefix], bounds[prefix + 1]
            return Rows.behind(start, end - start, own_start, hidden[end - 1])

        owner = torch.arange(P, device=device).repeat_interleave(G)
        if not free.tokens:
            return [rows(owner, own_starts[: P * G])]
        twins = [rows(P + torch.tensor(free.beside, device=device)[owner], own_starts[P * G : 2 * P * G])]
        return [rows(owner, own_starts[: P * G]), *twins]

    def _see(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Each prompt's image embeddings; a photo that is shown more than once is encoded once."""
        paths = list(dict.fromkeys(image for prompt in prompts for image in prompt.images))
        if not paths:
            return [None] * len(prompts)
        seen = dict(zip(paths, self.policy.see(self.policy.load_images(paths)), strict=True))
        return [torch.cat([seen[image] for image in p.images]) if p.images else None for p in prompts]

    def finished(self) -> list[Rollout]:
        """What was sampled, in the order of the prompts; the members of a prompt adjacent."""
        return [draft.finished() for draft in self.drafts]

    # Phases, each over every sequence that has it -------------------------------------------------------------------

    def sample_text(self) -> None:
        """The text that comes first."""
        chosen = self._chosen(lambda draft: draft.prompt.segments[0] == "text")
        goes_on = any(len(self.drafts[i].prompt.segments) > 1 for i in chosen)
        with self.time("text"):
            segments = self._sample_text(chosen, first_offset=0, goes_on=goes_on)
        for i, segment in zip(chosen, segments, strict=True):
            self.drafts[i].segments.append(segment)
            self.drafts[i].text = self.policy.decode_text(segment.tokens)

    def draw_images(self) -> None:
        """Image start and image tokens; a preview may restart or drop sequences on the way."""
        chosen = self._chosen(lambda draft: "image" in draft.prompt.segments)
        if not chosen:
            return
        policy, sampling, stats = self.policy, self.sampling, self.stats
        phase = Phase(
            kind="image",
            max_tokens=policy.num_image_tokens,
            temperature=value_of(sampling, "temperature", "image"),
            cfg_weight=sampling.cfg_weight,
            truncation=sampling.truncation("image"),
            first_offset=IMAGE_OFFSET,
        )
        index = torch.tensor(chosen, device=self.rows.position.device)
        if self.drawing.apart:
            leads, segments, drawing = self._fill_in(chosen, phase)
        else:
            leads = self._open_images(chosen)
            with self.time("image"):
                samples, drawing = draw(self._canvas(chosen, phase), self.preview)
            segments = self._segments(samples, chosen, phase)
        stats.image_tokens, stats.image_tokens_saved = drawing.num_drawn, drawing.num_saved
        with self.time("draw"):
            # What was dropped is shown with its last row repeated.
            forced = policy.forced_image_tokens()
            tokens = torch.cat([fill(segment.tokens[None], phase.max_tokens, forced) for segment in segments])
            pictures = torch.cat([policy.draw(part.to(index.device)).cpu() for part in tokens.split(DRAWN_AT_ONCE)])
        keys = drawing.keys.tolist()
        for row, i in enumerate(chosen):
            draft = self.drafts[i]
            drawn = replace(segments[row], lead=leads[row])
            draft.segments.append(replace(drawn, guidance=sampling.cfg_weight, free_prompt=draft.free_prompt))
            draft.image, draft.uid = pictures[row], keys[row]
            draft.attempts, draft.dropped = drawing.attempts[row], drawing.dropped[row]

    def _open_images(self, chosen: list[int]) -> list[Tensor]:
        """Feeds what stands before an image, and gives it [n]: its start, at the end of a drawing turn where there is
        one."""
        leads = {}
        for i in chosen:
            draft = self.drafts[i]
            unended = any(segment.truncated for segment in draft.segments)
            leads[i] = self.drawing.lead(draft.prompt, draft.text, unended)
        at_once = [i for i in chosen if not self.drawing.applies(self.drafts[i].prompt)]
        if at_once:
            index = torch.tensor(at_once, device=self.rows.position.device)
            start = self.policy.embed(index.new_tensor([self.policy.image_start]), "text")
            with self.time("image"):
                rows = self.rows.take(index)
                advance(self.stepper.trunk, self.prompts, self.own, rows, start.expand(len(at_once), -1))
                self.rows.put(index, rows)
        in_turn = [i for i in chosen if self.drawing.applies(self.drafts[i].prompt)]
        if in_turn:
            step = max(1, TURNS_AT_ONCE // max(leads[i].numel() for i in in_turn))
            with self.time("turn"):
                for first in range(0, len(in_turn), step):
                    part = in_turn[first : first + step]
                    self._extend(part, [leads[i] for i in part], None)
        return list(leads.values())

    def _fill_in(self, chosen: list[int], phase: Phase) -> tuple[list[Tensor], list[Segment], Drawing]:
        """Draws the images in sequences of their own, all places at once; gives their turns, empty where an image
        follows its prompt."""
        policy, sampling, stepper = self.policy, self.sampling, self.stepper
        drafts = [self.drafts[i] for i in chosen]
        leads = [self.drawing.lead(d.prompt, d.text, False) for d in drafts]
        behind = [lead if lead.numel() else d.prompt_tokens for lead, d in zip(leads, drafts, strict=True)]
        sides = [behind, [d.free_prompt for d in drafts if d.free_prompt is not None]]
        prefixes, beside = distinct([side for side in sides if side])
        with self.time("turn"):
            store = stepper.store("turns", policy.cache_shape(), [ids.numel() for ids in prefixes])
            easel = Easel(policy, stepper.linear, store, prefixes, beside)
        self.stats.prefill_tokens += store.starts[-1]
        self.stats.kv_bytes += policy.cache_shape().num_bytes(store.starts[-1])
        canvas = MaskedCanvas(
            easel=easel,
            phase=phase,
            schedule=MaskSchedule(phase.max_tokens, sampling.image_steps, sampling.image_noise),
            drafts=drafts,
            keys=self._tries(chosen),
            words=support_words(policy, phase, self.rows.hidden),
            kept_steps=sampling.image_steps if sampling.keep_proposals else 0,
            graphs=stepper.pool if stepper.static and captures(policy) else None,
        )
        with self.time("image"):
            filled, drawing = draw_masked(canvas, self.preview)
        return leads, filled.segments(phase.truncation.acts), drawing

    def _tries(self, chosen: list[int]) -> list[Tensor]:
        """The random keys of each try of a drawing."""
        most = 1 if self.preview is None else self.preview.max_attempts
        return [self._keys(chosen, attempt) for attempt in range(1, most + 1)]

    def _canvas(self, chosen: list[int], phase: Phase) -> Canvas:
        drafts = [self.drafts[i] for i in chosen]
        return Canvas(
            policy=self.policy,
            stepper=self.stepper,
            phase=phase,
            tables=self.tables,
            chosen=chosen,
            drafts=drafts,
            keys=self._tries(chosen),
            goes_on=any(draft.follow_up is not None for draft in drafts),
        )

    def sample_follow_ups(self) -> None:
        """The follow-up turn, which shows the drawn image, and the text that answers it."""
        chosen = self._chosen(lambda draft: draft.follow_up is not None and not draft.dropped)
        if not chosen:
            return
        with self.time("follow_up"):
            turns = [turn for i in chosen if (turn := self.drafts[i].follow_up) is not None]
            seen = None  # where the turn has no room for the image, the model goes on from the tokens that it drew
            if any(bool(self.policy.image_slots(turn).any()) for turn in turns):
                images = [image for i in chosen if (image := self.drafts[i].image) is not None]
                seen = self.policy.see(torch.stack(images))
            self._extend(chosen, turns, seen)
            segments = self._sample_text(chosen, first_offset=FOLLOW_UP_OFFSET, goes_on=False)
        for row, i in enumerate(chosen):
            lead_image = None if seen is None else seen[row]
            self.drafts[i].segments.append(replace(segments[row], lead=turns[row], lead_image=lead_image))
            self.drafts[i].follow_up_text = self.policy.decode_text(segments[row].tokens)

    # ----------------------------------------------------------------------------------------------------------------

    def _chosen(self, which: Callable[[Draft], bool]) -> list[int]:
        """The rows of the drafts that a phase is for."""
        return [i for i, draft in enumerate(self.drafts) if which(draft)]

    def _sample_text(self, chosen: list[int], *, first_offset: int, goes_on: bool) -> list[Segment]:
        if not chosen:
            return []
        sampling, policy = self.sampling, self.policy
        phase = Phase(
            kind="text",
            max_tokens=sampling.max_text_tokens,
            temperature=sampling.temperature,
            truncation=sampling.truncation("text"),
            first_offset=first_offset,
            ends=tuple(sorted(policy.end_tokens)),
        )
        words = support_words(policy, phase, self.rows.hidden)
        samples = self.stepper.samples("text", len(self.drafts), phase.max_tokens, words)
        index = torch.tensor(chosen, device=self.rows.position.device)
        state = State.start([self.rows.take(index)], index, self._keys(chosen))
        self.stepper.run(phase, state, samples, self.tables, num_steps=phase.max_tokens, feed_last=goes_on)
        segments = self._segments(samples, chosen, phase)
        self.stats.text_tokens += sum(segment.tokens.numel() for segment in segments)
        return segments

    def _extend(self, chosen: list[int], turns: list[Tensor], seen: Tensor | None) -> None:
        """Runs given turns [n] behind sequences `chosen`, `seen` [n, tokens, D] at their image placeholders if any."""
        policy, device = self.policy, self.rows.position.device
        lengths = [turn.numel() for turn in turns]
        tokens = torch.nn.utils.rnn.pad_sequence(turns, batch_first=True).to(device)
        new = torch.arange(tokens.shape[1], device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        embeddings = policy.embed(tokens, "text")
        if seen is not None:
            embeddings[policy.image_slots(tokens) & new] = seen.flatten(0, 1).to(embeddings.dtype)
        rows = self.rows.take(torch.tensor(chosen, device=device))
        positions = rows.position[:, None] + torch.arange(tokens.shape[1], device=device)
        positions = torch.where(new, positions, 0)
        hidden = policy.trunk(embeddings, positions, Extend(self.prompts, self.own, rows.spans, lengths))
        added = torch.tensor(lengths, device=device)
        rows.advance(hidden[torch.arange(len(chosen), device=device), added - 1], added)
        self.rows.put(torch.tensor(chosen, device=device), rows)

    def _keys(self, chosen: Sequence[int], attempt: int = 1) -> Tensor:
        """[n] int64: keys of the sequences' random numbers."""
        drafts = [self.drafts[i] for i in chosen]
        keys = [trajectory_key(self.sampling, draft.prompt, draft.member, attempt) for draft in drafts]
        return torch.tensor(keys, device=self.rows.position.device)

    def _segments(self, samples: Samples, chosen: list[int], phase: Phase) -> list[Segment]:
        index = torch.tensor(chosen, device=samples.token.device)
        token, logp, mixed, entropy, length = (
            column[index].cpu()
            for column in (samples.token, samples.logp, samples.logp_mixed, samples.entropy, samples.length)
        )
        ended = torch.isin(token.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0], torch.tensor(phase.ends))
        kind: SegmentKind = phase.kind
        support = samples.support[index].cpu() if phase.truncation.acts else None
        return [
            Segment(
                kind=kind,
                tokens=token[row, :n],
                logp=logp[row, :n],
                logp_mixed=mixed[row, :n],
                entropy=entropy[row, :n],
                support=None if support is None else support[row, :n],
                truncated=kind == "text" and not bool(ended[row]),
            )
            for row, n in enumerate(length.tolist())
        ]
