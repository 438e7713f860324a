"""The one training forward: trunk once over the packed axis, each head on its own rows, one fused loss.

The axis holds every prompt once and the responses behind; the loss sees the responses alone.

Everything that needs the policy's weights happens inside `PolicyForward.forward`, because DeepSpeed must see the call:
a forward that bypasses `engine(...)` has wrong gradients under ZeRO-3, without an error.

Where sampling was truncated (top_k, top_p, min_p), every log-probability, the reference model's included, is that over
the ids that the sampler kept: the ratio is 1 on policy, and the KL is that of the two distributions given the kept set,
blind to what either does outside of it.

Dims: Tp tokens of prompts, T tokens of responses, S sequences, N rows of one vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from syncr1.kernels.api import SharedPrefixLayout, TokenStream, linear_grpo_loss, linear_logp

from ..policies.attention_interface import PackedLayout
from ..policies.base import Head, Policy
from ..records import IMAGE, MODALITY_NAMES, FilledImages, FilledStates, PackedBatch, SegmentKind
from ..settings.modality import clip_of, each, value_of
from ..settings.train_config import ImportanceCorrection, MaskedLogp, PolicyLogp
from .free_branch import mixed_head

Branch = tuple[Tensor, Tensor]
"""Hidden states of an axis, and which of them predicts each of the batch's tokens [T]; of free branches images' alone
mean something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Settings of Sync-GRPO's loss, named and meant as the flags are (`TrainConfig`).

    `PolicyForward` is the one place where they get the names of `syncr1.kernels.api.linear_grpo_loss`.  What the kernel
    would take from one call, the whole step gives here, so that micro-batches can be cut anywhere: advantages come with
    the batch, from the step's plan, and bnpo divides by the update's tokens.
    """

    loss_type: str = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    image_epsilon: float | None = None
    image_epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    image_beta: float | None = None
    anchor_beta: float = 0.0
    """KL weight on batches of anchors."""
    temperature: float = 1.0
    policy_logp: PolicyLogp = "conditional"
    """Of image tokens in batches with a free branch; without one it is the conditional anyway."""
    masked_logp: MaskedLogp = "committed"
    """With `step` a sequence is a step of an image, or a word, and its ratio the product over its tokens."""
    image_temperature: float | None = None
    importance_correction: ImportanceCorrection = "none"
    importance_level: Literal["token", "sequence"] = "token"
    importance_cap: float = 3.0
    top_entropy_quantile: float = 1.0
    credit: Literal["shared", "per_segment", "image_only"] = "shared"
    text_loss_weight: float = 1.0
    image_loss_weight: float = 1.0
    max_length: int | None = None
    """Tokens that a trajectory has at most, those of its image included: dr_grpo's divisor."""

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or (self.image_beta or 0) > 0 or self.anchor_beta > 0

    @property
    def scores_first(self) -> bool:
        """The update begins with a forward pass without gradient, from which `learn/correction.py` says what each
        token's loss is multiplied by."""
        return self.importance_correction != "none" or self.top_entropy_quantile < 1


class PolicyForward(nn.Module):
    """What DeepSpeed wraps: log-probabilities of a packed batch, or the loss on it.

    Args:
        policy: a `Policy` that is an `nn.Module`.
        objective: the loss's settings.
    """

    def __init__(self, policy: Policy, objective: Objective) -> None:
        super().__init__()
        self.policy: Policy = policy
        self.objective = objective

    def forward(
        self, batch: PackedBatch, num_items: dict[str, float] | None = None, share: float = 1.0
    ) -> dict[str, Tensor]:
        """
        Args:
            batch: one micro-batch.
            num_items: tokens per modality that the loss is divided by, over all micro-batches and ranks of the update,
                per rank; None computes log-probabilities only.
            share: this micro-batch's part of the update's sequences, for loss types that average over sequences.

        Returns:
            Without `num_items`: `logp` and `entropy`, [T] float32, 0 where nothing was sampled.
            With it: `loss` (scalar, carries the gradient), `logp` [T], and `metric/<name>` scalars.
        """
        streams = self._streams(batch)
        if num_items is None:
            return self._log_probabilities(streams, batch.tokens.numel())
        o = self.objective
        lows, highs = zip(*(clip_of(o, name) for name in MODALITY_NAMES), strict=True)
        betas = [value_of(o, "beta", name) for name in MODALITY_NAMES]
        scale = 1.0 if batch.filled is None else batch.filled.scale
        weights = {
            "text": 0.0 if o.credit == "image_only" else o.text_loss_weight,
            "image": o.image_loss_weight * scale,
        }
        out = linear_grpo_loss(
            streams,
            None,
            batch.cu_seqlens,
            batch.group_offsets,
            advantages=dict(zip(MODALITY_NAMES, batch.advantages.unbind(1), strict=True)),
            loss_mask=batch.loss_mask,
            modality=batch.modality,
            old_logp=batch.old_logp,
            ref_logp=batch.ref_logp,
            loss_type="dapo" if o.loss_type == "bnpo" else o.loss_type,
            ratio="product" if o.masked_logp == "step" and batch.filled is not None else o.importance_sampling_level,
            is_ratio=batch.is_ratio,
            clip_low=each(*lows),
            clip_high=each(*highs),
            delta=o.delta,
            beta=o.anchor_beta if batch.anchor else each(*betas),
            num_items=num_items,
            max_length=o.max_length,
            weight=weights,
        )
        metrics = {f"metric/{name}": value for name, value in out.metrics.items()}
        return {"loss": out.loss * share, "logp": out.logp, **metrics}

    def _streams(self, batch: PackedBatch) -> list[TokenStream]:
        """Each vocabulary's rows, with the hidden states that predict them, of whichever vocabulary those are."""
        mine, twins = self._branches(batch)
        streams = []
        for code, name in enumerate(MODALITY_NAMES):
            rows = (batch.loss_mask & (batch.modality == code)).nonzero().squeeze(1)
            if not rows.numel() and not self.policy.num_image_tokens and name == "image":
                continue
            head = self._head(batch, mine, twins, rows, name)
            streams.append(
                TokenStream(
                    hidden=head.hidden,
                    weight=head.weight,
                    targets=batch.tokens[rows],
                    rows=rows,
                    bias=head.bias,
                    temperature=value_of(self.objective, "temperature", name),
                    modality=name,
                    forbidden=head.forbidden,
                    support=batch.support[code],
                )
            )
        return streams

    def _head(self, batch: PackedBatch, mine: Branch, twins: Branch | None, rows: Tensor, name: SegmentKind) -> Head:
        """A vocabulary's head on the hidden states that predict response tokens `rows`."""
        hidden, predicting = mine
        hidden = hidden[predicting[rows]]
        guided = batch.free or batch.filled
        if twins is None or guided is None or name != "image":
            return self.policy.head(hidden, name)
        free_hidden, free_predicting = twins
        return mixed_head(
            self.policy,
            hidden,
            free_hidden[free_predicting[rows]],
            _spread(guided.weight, guided.rows, batch)[rows],
            detached=self.objective.policy_logp == "guided_detached",
        )

    def _branches(self, batch: PackedBatch) -> tuple[Branch, Branch | None]:
        """Of the responses [T], and of the images behind their free prompts [Tf]."""
        free, how = batch.free, self.objective.policy_logp
        if batch.filled is not None:
            return self._filled_branches(batch, batch.filled)
        embeddings = self._embeddings(batch)
        if free is None or how == "conditional":
            return (self._trunk(embeddings, batch.layout), batch.layout.predicting_rows()), None
        first = batch.prefix_tokens.numel()
        images = embeddings[first + free.rows]
        if how == "guided":
            prompts = self.policy.embed(free.prompt_tokens, "text")
            joined = self._trunk(torch.cat([embeddings[:first], prompts, embeddings[first:], images]), free.joined)
            mine, twins = free.joined.predicting_rows().split([batch.tokens.numel(), free.rows.numel()])
            return (joined, mine), (joined, _spread(twins, free.rows, batch))
        with torch.no_grad():  # first, so that what the other pass keeps is not there yet
            prompts = self.policy.embed(free.prompt_tokens, "text")
            hidden = self._trunk(torch.cat([prompts, images]), free.layout)
        apart = hidden, _spread(free.layout.predicting_rows(), free.rows, batch)
        return (self._trunk(embeddings, batch.layout), batch.layout.predicting_rows()), apart

    def _filled_branches(self, batch: PackedBatch, filled: FilledImages) -> tuple[Branch, Branch | None]:
        """The same of a policy that fills images in: text is predicted by the place before it, images by their own."""
        how, free, apart = self.objective.policy_logp, filled.free, None
        if free is not None and how == "guided_detached":
            with torch.no_grad():
                hidden = self._trunk(torch.cat([*self._states(free)]), free.layout)
            apart = hidden, _spread(free.at + free.prompt_tokens.numel(), free.rows, batch)
        embeddings, first = self._embeddings(batch), batch.prefix_tokens.numel()
        branches, layout = [filled.drawn], filled.layout
        if free is not None and filled.both is not None and how == "guided":
            branches, layout = [filled.drawn, free], filled.both
        turns, spans = zip(*(self._states(states) for states in branches), strict=True)
        hidden = self._trunk(torch.cat([embeddings[:first], *turns, embeddings[first:], *spans]), layout)
        place, behind = layout.num_prefix_tokens, filled.attended.numel()
        text = _spread(layout.predicting_rows()[:behind], filled.attended, batch)
        place += behind
        predicting = []
        for states, span in zip(branches, spans, strict=True):
            predicting.append(text.index_copy(0, states.rows, states.at + place))
            place += len(span)
        twins = (hidden, predicting[1]) if len(predicting) > 1 else apart
        return (hidden, predicting[0]), twins

    def _states(self, states: FilledStates) -> tuple[Tensor, Tensor]:
        """([Tt, D], [M * L, D]) what the trunk is given of turns and of the states behind them."""
        policy = self.policy
        before, behind = (ids.to(states.codes.device) for ids in policy.image_frame())
        split = [states.prompt_tokens.numel(), before.numel(), behind.numel()]
        turns, before, behind = policy.embed(torch.cat([states.prompt_tokens, before, behind]), "text").split(split)
        codes = policy.embed(states.codes.flatten(), "image").unflatten(0, states.codes.shape)
        frames = (part.expand(len(codes), *part.shape) for part in (before, behind))
        return turns, torch.cat([next(frames), codes, next(frames)], 1).flatten(0, 1)

    def _trunk(self, embeddings: Tensor, layout: SharedPrefixLayout) -> Tensor:
        return self.policy.trunk(embeddings[None], layout.position_ids()[None], PackedLayout(layout))[0]

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[Tp + T, D] final hidden states of prompts and responses."""
        return self._trunk(self._embeddings(batch), batch.layout)

    def _embeddings(self, batch: PackedBatch) -> Tensor:
        """[Tp + T, D] what the trunk is given of prompts and responses."""
        is_image = batch.modality == IMAGE
        given = torch.where(is_image, 0, batch.tokens)
        if batch.filled is not None:
            given = given[batch.filled.attended]
        embeddings = self.policy.embed(torch.cat([batch.prefix_tokens, given]), "text")
        if self.policy.num_image_tokens and batch.filled is None:
            drawn = is_image.nonzero().squeeze(1)  # may be empty: ZeRO-3 wants every module to run on every rank
            image = self.policy.embed(batch.tokens[drawn], "image")
            embeddings = embeddings.index_copy(0, drawn + batch.prefix_tokens.numel(), image)
        if batch.image_rows.numel():
            embeddings = embeddings.index_copy(0, batch.image_rows, batch.image_embeddings.to(embeddings.dtype))
        return embeddings

    def _log_probabilities(self, streams: list[TokenStream], num_tokens: int) -> dict[str, Tensor]:
        logp = streams[0].hidden.new_zeros(num_tokens, dtype=torch.float32)
        entropy = torch.zeros_like(logp)
        for s in streams:
            row_logp, row_entropy = linear_logp(
                s.hidden,
                s.weight,
                s.targets,
                bias=s.bias,
                temperature=s.temperature,
                forbidden=s.forbidden,
                support=s.support,
            )
            logp = logp.index_copy(0, s.rows, row_logp.float())
            entropy = entropy.index_copy(0, s.rows, row_entropy.float())
        return {"logp": logp, "entropy": entropy}


def _spread(values: Tensor, rows: Tensor, batch: PackedBatch) -> Tensor:
    """`values` [n] of the batch's tokens `rows` [n], on its axis [T]; 0 elsewhere."""
    return values.new_zeros(batch.tokens.numel()).index_copy(0, rows, values)
