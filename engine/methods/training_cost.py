"""How much work scores and updates are, on what cost.py says that a rollout samples.

score (reference, old) . forward and backward
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..forward.masked_states import MaskedPlan
from ..forward.objective import Objective
from .cost import Assumed, Layout, Line, StepWork, Unit, seen_pairs
from .masked_cost import Filling, Turns

HEAD_UPDATE = 3
"""Products of a head in an update: logits, the gradient of hidden states, that of weights (the fused loss)."""


@dataclass(slots=True)
class _Trained:
    """What training computes, summed over groups."""

    tokens: float = 0.0
    pairs: float = 0.0
    free: float = 0.0
    """Tokens of the free branch, its prompts apart."""
    free_pairs: float = 0.0
    embedded: float = 0.0
    logits: float = 0.0
    beside: dict[int, float] = field(default_factory=dict)
    """Length of a free prompt -> its copies."""

    def add(self, u: Unit, line: Line, kept: float, share_prefix: bool, guided: bool) -> None:
        """A group whose images lie behind its prompt, on one axis."""
        copies = 1.0 if share_prefix else kept
        self.tokens += copies * line.prefix + kept * line.own
        self.pairs += copies * line.pairs + kept * seen_pairs(line.prefix, line.own)
        self.embedded += kept * line.image
        self.logits += kept * ((line.text + line.after) * u.head["text"] + line.image * u.head.get("image", 0.0))
        if guided and line.free:
            self.beside[line.free] = 1.0 if share_prefix else self.beside.get(line.free, 0.0) + kept
            self.free += kept * line.image
            self.free_pairs += kept * seen_pairs(line.free, line.image)

    def add_filled(
        self, u: Unit, line: Line, kept: float, share_prefix: bool, guided: bool, filling: Filling, plan: MaskedPlan
    ) -> None:
        """A group whose images have sequences of their own."""
        if line.text:
            copies = 1.0 if share_prefix else kept
            self.tokens += copies * line.prefix + kept * line.text
            self.pairs += copies * line.pairs + kept * seen_pairs(line.prefix, line.text)
            self.logits += kept * line.text * u.head["text"]
        if not line.image:
            return
        states = filling.states(plan)
        spans = kept * states
        turns = Turns.of(line.prefix, line.lead, kept, states, share_prefix)
        self.tokens += turns.tokens + spans * filling.span
        self.pairs += turns.pairs + spans * filling.pairs(turns.length)
        self.embedded += spans * line.image * (1 + guided)
        self.logits += kept * filling.scored(plan) * u.head["image"]
        if guided and line.free:
            self.beside[line.free] = 1.0 if share_prefix else self.beside.get(line.free, 0.0) + spans
            self.free += spans * filling.span
            self.free_pairs += spans * filling.pairs(line.free)


def add_training(
    work: StepWork,
    unit: Unit,
    layout: Layout,
    members: int,
    assumed: Assumed,
    objective: Objective,
    *,
    share_prefix: bool,
    num_iterations: int,
    masked: MaskedPlan | None = None,
) -> None:
    """Adds scoring and updates on what `add_rollout` sampled; `masked`: which states of filled-in images."""
    u, kept, it = unit, members * assumed.kept, _Trained()
    guided = objective.policy_logp != "conditional"
    for line in layout.lines:
        if layout.filling is None:
            it.add(u, line, kept, share_prefix, guided)
        else:
            it.add_filled(u, line, kept, share_prefix, guided, layout.filling, masked or MaskedPlan())
    free = it.free + sum(length * copies for length, copies in it.beside.items())
    free_pairs = it.free_pairs + sum(copies * seen_pairs(0, length) for length, copies in it.beside.items())
    passes = objective.needs_reference + (num_iterations > 1 or objective.scores_first)
    everything, pairs = it.tokens + free, it.pairs + free_pairs
    forward = u.token * everything + u.pair * pairs + u.image_embedding * it.embedded + it.logits
    work.score.add(passes * everything, passes * forward)
    apart = objective.policy_logp == "guided_detached"
    with_gradient, its_pairs = (it.tokens, it.pairs) if apart else (everything, pairs)
    update = u.token_update * with_gradient + u.pair_update * its_pairs + HEAD_UPDATE * it.logits
    update += HEAD_UPDATE * u.image_embedding * it.embedded
    if apart:
        update += u.token * free + u.pair * free_pairs
    work.update.add(num_iterations * everything, num_iterations * update)
