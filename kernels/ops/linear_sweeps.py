"""The ways of `linear_grpo_loss` through the rows that act: one sweep over the heads, two, or one and the rest later.

Losses that a row knows alone take one sweep of three products per chunk; those that need the whole sequence or batch
first (sequence ratios, vespo, entropy quantiles) take two sweeps and a fourth product, and so do float16 heads, whose
second sweep is in backward (`late_gradients`). Loss and metrics come from the same kernel as `syncr1::grpo_loss`.

Dims: `T` packed tokens, `N` rows of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_allowed, check_log_probabilities
from ..dispatch import module_of
from ..layout import PackedLayout
from ..linear import HeadRows, Workspace, chosen_rows, gradient_pass, loss_pass, score_rows
from ..plan import (
    acting_tokens,
    divisors,
    entropy_thresholds,
    modality_masks,
    policy_mask,
    score_rewards,
    token_advantages,
    token_weights,
    without_pruned,
)
from ..streams import TokenStream
from ..terms import LossInputs, RowSettings, RowTerms, TokenLoss, row_loss
from .late_gradients import head_of
from .loss import is_per_sequence, plain, token_loss

OP = "linear_grpo_loss"
Grads = list[tuple[Tensor, Tensor, Tensor]]
Scored = tuple[Tensor, Tensor, TokenLoss, Grads]


def acting_rows(
    streams: Sequence[TokenStream], acting_T: Tensor, kept_T: Tensor
) -> tuple[list[HeadRows], list[Tensor], Tensor | None]:
    """The rows of each stream that take part in the products and their packed positions; and the positions of what was
    not pruned, None where nothing was."""
    heads, positions = [], []
    rows = [stream.rows.long() for stream in streams]
    *each, kept = chosen_rows([*(acting_T[at] for at in rows), kept_T])
    for stream, at, chosen in zip(streams, rows, each, strict=True):
        whole = HeadRows(stream.hidden, stream.weight, stream.targets.long().contiguous(), head_of(stream))
        heads.append(whole if chosen is None else whole.subset(chosen))
        positions.append(at if chosen is None else at[chosen])
    return heads, positions, kept


class LinearLoss:
    """One call after checks: which rows of each head act, and the ways through them."""

    def __init__(
        self, streams: Sequence[TokenStream], inputs: LossInputs, layout: PackedLayout, needs: Sequence[bool]
    ) -> None:
        """`layout` has the mask and modality of the streams; `needs` is hidden, weight and bias of each in turn."""
        self.module, self.options = module_of(inputs.backend), inputs.options
        self.streams, self.inputs, self.layout = streams, inputs, layout
        self.scores = score_rewards(self.module, inputs)
        self.counted_T, self.image_T = policy_mask(layout, self.scores), layout.image_tokens
        self.sequence_T = layout.sequence_of_token
        self.acting_T = acting_tokens(self.options, self.scores, self.counted_T, self.sequence_T, self.image_T)
        check_allowed(OP, streams, self.acting_T)
        self.heads, self.positions, self.kept = acting_rows(streams, self.acting_T, self.scores.keep[self.sequence_T])
        self.needs = [needs[3 * index : 3 * index + 3] for index in range(len(streams))]

    @property
    def rows_know_alone(self) -> bool:
        """The gradient of a row follows from its own log-probability."""
        o = self.options
        return o.ratio == "token" and row_loss(o.loss_type) is not None and o.top_entropy_quantile == 1

    def one_sweep(self) -> Scored:
        """Three products per chunk."""
        inputs, sampler_T = self.inputs, plain(self.inputs.is_ratio)
        weights = (self.options, self.layout, self.counted_T, self.image_T, self.sequence_T, inputs.num_items)
        if sampler_T is not None and is_per_sequence(inputs.is_ratio, self.layout.num_tokens):
            sampler_T = sampler_T[self.sequence_T]
        terms = RowTerms(
            token_advantages(self.scores, self.sequence_T, self.image_T),
            token_weights(*weights),
            plain(inputs.old_logp),
            plain(inputs.ref_logp),
            sampler_T,
        )
        settings = [RowSettings.of(self.options, stream.modality) for stream in self.streams]
        each = list(zip(self.heads, self.positions, settings, self.needs, strict=True))
        with Workspace(self.heads) as workspace:
            passes = [
                loss_pass(self.module, rows, workspace, terms.at(at), own, needs) for rows, at, own, needs in each
            ]
        logp_T = self._collect([logp_N for logp_N, _, _ in passes])
        entropy_T = self._collect([entropy_N for _, entropy_N, _ in passes])
        return logp_T, entropy_T, self._loss(logp_T, entropy_T), [grads for _, _, grads in passes]

    def two_sweeps(self) -> Scored:
        """Four products per chunk: all log-probabilities first, then the gradients that need them all."""
        with Workspace(self.heads) as workspace:
            scored = [score_rows(self.module, rows, workspace) for rows in self.heads]
            logp_T, entropy_T = (self._collect([values[i] for values in scored]) for i in range(2))
            result = self._loss(logp_T, entropy_T)
            if not any(need for needs in self.needs for need in needs):
                return logp_T, entropy_T, result, []
            each = zip(self.heads, self._live_rows(result.grad_logp), scored, self.needs, strict=True)
            grads = [
                self._second_sweep(rows, grad_N, live, lse_N, entropy_N, needs, workspace)
                for rows, (grad_N, live), (_, entropy_N, lse_N), needs in each
            ]
        return logp_T, entropy_T, result, grads

    def late(self) -> Scored:
        """One product per chunk: what `late_gradients` forms the gradients from, d loss / d logp and log-sum-exp."""
        with Workspace(self.heads) as workspace:
            scored = [score_rows(self.module, rows, workspace) for rows in self.heads]
        logp_T, entropy_T = (self._collect([values[i] for values in scored]) for i in range(2))
        lse_T = self._collect([lse_N for _, _, lse_N in scored], torch.float64)
        result = self._loss(logp_T, entropy_T)
        return logp_T, entropy_T, result, [(result.grad_logp, lse_T, lse_T.new_empty(0))]

    def _live_rows(self, grad_T: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """(gradient of every row, where it is not 0) of each head: no product for clipped tokens."""
        grads = [grad_T[at] for at in self.positions]
        return list(zip(grads, chosen_rows([grad_N != 0 for grad_N in grads]), strict=True))

    def _second_sweep(
        self,
        rows: HeadRows,
        grad_N: Tensor,
        live: Tensor | None,
        lse_N: Tensor,
        entropy_N: Tensor,
        needs: Sequence[bool],
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if live is not None:
            rows, grad_N, lse_N, entropy_N = rows.subset(live), grad_N[live], lse_N[live], entropy_N[live]
        return gradient_pass(self.module, rows, workspace, lse_N, entropy_N, grad_N, None, needs)

    def _collect(self, values: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Per-row values of all heads on the packed axis, 0 elsewhere: [T]."""
        out_T = torch.zeros(self.layout.num_tokens, dtype=dtype, device=self.acting_T.device)
        for at, value in zip(self.positions, values, strict=True):
            out_T.index_copy_(0, at, value)
        return out_T

    def _loss(self, logp_T: Tensor, entropy_T: Tensor) -> TokenLoss:
        """Loss, gradient and metrics from the log-probabilities of the acting tokens."""
        options, num_tokens = self.options, self.layout.num_tokens
        check_log_probabilities(OP, self.acting_T, num_tokens, logp=logp_T)
        thresholds = None
        if options.top_entropy_quantile < 1:
            thresholds = entropy_thresholds(options, entropy_T, self.acting_T, self.image_T)
        # Divisors count loss tokens that were left out of the products, too.
        masks = modality_masks(options, self.counted_T, self.image_T)
        divisor = divisors(options, masks, self.inputs.num_items)
        if options.loss_type == "bnpo":
            options = replace(options, loss_type="dapo")
        layout = replace(self.layout, loss_mask=self.acting_T)
        inputs = self.inputs._replace(entropy=entropy_T, num_items=divisor)
        if self.kept is None:
            return token_loss(self.module, logp_T, inputs, options, layout, scores=self.scores, thresholds=thresholds)
        inputs, layout = without_pruned(inputs, layout, self.scores.keep, self.kept)
        logp = logp_T[self.kept]
        result = token_loss(self.module, logp, inputs, options, layout, scores=self.scores, thresholds=thresholds)
        return replace(result, grad_logp=torch.zeros_like(logp_T).index_copy_(0, self.kept, result.grad_logp))
