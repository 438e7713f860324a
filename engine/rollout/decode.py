"""The token loop: sequences that advance together, one token a step, nothing read back.

    hidden -> head -> fused guided sample -> embedding -> trunk -> hidden

One step is one head, one sampler and one forward over all rows, written so that a CUDA graph can replay it: every
tensor keeps its place and changes in place, lengths live on the device.  With guidance a sequence has two rows,
conditional and unconditional, in the same forward.

Dims: B sequences, R rows (B, or 2 B with guidance), L most tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from syncr1.kernels.api import CFGSample, cfg_sample
from syncr1.kernels.support import num_words

from ..policies.attention_interface import AttentionLayout
from ..policies.base import Policy
from ..policies.cache import Decode, Rows, Store
from ..records import SegmentKind
from .sampling import EVERYTHING, Truncation

Trunk = Callable[[Tensor, Tensor, AttentionLayout], Tensor]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is sampled, and how."""

    kind: SegmentKind
    max_tokens: int
    temperature: float = 1.0
    cfg_weight: float = 1.0
    truncation: Truncation = EVERYTHING
    first_offset: int = 0
    """Random-number counter of the first token."""
    ends: tuple[int, ...] = ()
    """Ids after which a sequence stops; none for images."""


class Samples:
    """What was sampled: [B + 1, L] each; the last row takes what padding rows write.

    Args:
        num_sequences: B.
        max_tokens: L.
        words: W of a kept set, see `support_words`.
    """

    def __init__(self, num_sequences: int, max_tokens: int, device: torch.device, words: int = 0) -> None:
        size = (num_sequences + 1, max_tokens)
        self.token = torch.zeros(size, dtype=torch.long, device=device)
        self.logp, self.logp_mixed, self.entropy = (torch.zeros(size, device=device) for _ in range(3))
        # [B + 1, L, W] the ids that could be drawn; W is 0 where nothing is left out.
        self.support = torch.zeros(*size, words, dtype=torch.int32, device=device)
        self.length = torch.zeros(num_sequences + 1, dtype=torch.long, device=device)

    def write(self, slot: Tensor, step: Tensor, sample: CFGSample) -> None:
        """Column `step` (a scalar on the device) of sequences `slot` [B]."""
        where = (slot, step.expand(slot.shape[0]))
        self.token.index_put_(where, sample.token)
        for column, values in ((self.logp, sample.logp), (self.logp_mixed, sample.logp_mixed)):
            column.index_put_(where, values.float())
        self.entropy.index_put_(where, sample.entropy.float())
        if sample.support is not None:
            self.support.index_put_(where, sample.support)

    def take(self, where: Tensor, other: Samples, which: Tensor, num_tokens: int) -> None:
        """The first `num_tokens` of sequences `where` become those of `other`'s sequences `which`."""
        for name in ("token", "logp", "logp_mixed", "entropy", "support"):
            getattr(self, name)[where, :num_tokens] = getattr(other, name)[which, :num_tokens]
        self.length[where] = other.length[which]


def support_words(policy: Policy, phase: Phase, hidden: Tensor) -> int:
    """Words of a kept set of the phase's vocabulary, 0 where it keeps all; `hidden` [n, D] is any."""
    return num_words(policy.head(hidden[:1], phase.kind).weight.shape[0]) if phase.truncation.acts else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Where every sequence of a batch stands, and the caches that hold what it has seen."""

    prompts: Store
    own: Store
    sides: Sequence[Rows]
    """[B] each: the conditional rows, and with guidance their unconditional twins."""


@dataclass(slots=True)
class State:
    """Sequences under way."""

    rows: Rows
    """[R]: the conditional rows, then the unconditional ones."""
    slot: Tensor
    """[B] int64: the sequence's place in `Samples` and in the tables; B of the tables for padding."""
    key: Tensor
    """[B] int64: keys the random numbers."""
    alive: Tensor
    """[B] bool: False once it has ended, and for padding."""
    step: Tensor
    """Scalar int64: tokens sampled so far."""

    @classmethod
    def start(cls, sides: Sequence[Rows], slot: Tensor, key: Tensor) -> State:
        """`sides` [B] each, as in `Tables`, are copied."""
        everyone = torch.ones_like(slot, dtype=torch.bool)
        return cls(Rows.cat(sides), slot, key, everyone, torch.zeros((), dtype=torch.long, device=slot.device))

    def __len__(self) -> int:
        return self.slot.shape[0]

    @property
    def guided(self) -> bool:
        return len(self.rows) > len(self)

    def sides(self) -> list[Rows]:
        """[B] each, as in `Tables`, in the state's own memory."""
        size = len(self)
        return [self.rows.part(slice(first, first + size)) for first in range(0, len(self.rows), size)]

    def take(self, index: Tensor) -> State:
        """A copy holding the sequences `index` [n]."""
        rows = torch.cat([index, index + len(self)]) if self.guided else index
        step = self.step.clone()
        return State(self.rows.take(rows), self.slot[index], self.key[index], self.alive[index], step)

    def copy_(self, other: State) -> None:
        """Becomes `other`, of the same size, in place."""
        for name in ("slot", "key", "alive", "step"):
            getattr(self, name).copy_(getattr(other, name))
        self.rows.copy_(other.rows)

    def save(self, tables: Tables) -> None:
        """Writes where the sequences stand into the batch's tables; without guidance, on the conditional side alone."""
        for table, side in zip(tables.sides, self.sides(), strict=False):
            table.put(self.slot, side)


class TokenStep:
    """One step of a phase on one state, in place.

    Args:
        policy: for heads and embeddings.
        trunk: the policy's, or a compiled one.
        prompts, own: the caches.
        phase: what is sampled.
        state: advanced in place.
        samples: written in place.
        padded: some sequences are padding: they must not advance, although nothing in this phase ends.
        linear: multiplies hidden states with a head.
    """

    def __init__(
        self,
        policy: Policy,
        trunk: Trunk,
        prompts: Store,
        own: Store,
        phase: Phase,
        state: State,
        samples: Samples,
        *,
        padded: bool = False,
        linear: Linear = F.linear,
    ) -> None:
        self.policy, self.trunk, self.phase, self.linear = policy, trunk, phase, linear
        self.prompts, self.own = prompts, own
        self.state, self.samples = state, samples
        device = state.slot.device
        self._ends = torch.tensor(phase.ends, device=device) if phase.ends else None
        forced = policy.forced_image_tokens() if phase.kind == "image" else None
        self._forced = None if forced is None else forced.to(device)
        self._some_stand_still = padded or bool(phase.ends)

    def __call__(self, *, feed: bool = True) -> None:
        """Samples one token per sequence and, with `feed`, runs it through the trunk."""
        state, phase, cut = self.state, self.phase, self.phase.truncation
        head = self.policy.head(state.rows.hidden, phase.kind)
        logits = self.linear(head.hidden, head.weight, head.bias)
        sample = cfg_sample(
            logits[: len(state)],
            logits[len(state) :] if state.guided else None,
            cfg_weight=phase.cfg_weight,
            temperature=phase.temperature,
            top_k=cut.top_k,
            top_p=cut.top_p,
            min_p=cut.min_p,
            seed=state.key,
            # Per sequence, because keys are: which row of the batch a sequence is in must not matter.
            offset=(state.step + phase.first_offset).expand(len(state)),
            forbidden=head.forbidden,
            with_support=cut.acts,
        )
        if self._forced is not None:
            sample = _impose(sample, self._forced.index_select(0, state.step.view(1)))
        self.samples.write(state.slot, state.step, sample)
        self.samples.length.index_add_(0, state.slot, state.alive.long())
        if feed:
            advance(
                self.trunk,
                self.prompts,
                self.own,
                state.rows,
                self.policy.embed(sample.token, phase.kind),
                state.alive if self._some_stand_still else None,
            )
        state.step += 1
        if self._ends is not None:
            state.alive &= ~(sample.token[:, None] == self._ends).any(1)


def _impose(sample: CFGSample, forced: Tensor) -> CFGSample:
    """What is forced at this place [1], certain, instead of what was sampled; -1 leaves the sample as it is."""
    free = forced < 0
    logp, mixed, entropy = (torch.where(free, x, 0.0) for x in (sample.logp, sample.logp_mixed, sample.entropy))
    return CFGSample(torch.where(free, sample.token, forced), logp, mixed, entropy, sample.support)


def advance(
    trunk: Trunk,
    prompts: Store,
    own: Store,
    rows: Rows,
    embeddings_BD: Tensor,
    alive: Tensor | None = None,
) -> None:
    """One token per row through the trunk; moves the rows in place.

    Args:
        trunk: see Trunk.
        prompts, own: the caches.
        rows: [R], R a multiple of B.
        embeddings_BD: the tokens; repeated where the sequences have several rows.
        alive: [B] bool; the others stay where they are. None: all.
    """
    copies = len(rows) // embeddings_BD.shape[0]
    embeddings_RD = embeddings_BD.repeat(copies, 1) if copies > 1 else embeddings_BD
    spans = rows.spans
    if alive is not None:
        alive = alive.repeat(copies)
        # A row that stands still attends to one spare column, so that it disturbs nobody.
        spans = torch.where(alive[:, None], spans, own.nowhere)
    hidden_RD = trunk(embeddings_RD[:, None], rows.position[:, None], Decode(prompts, own, spans))[:, 0]
    if alive is None:
        rows.advance(hidden_RD, 1)
    else:
        rows.advance(torch.where(alive[:, None], hidden_RD, rows.hidden), alive)
