"""Registered op `syncr1::linear_grpo_loss`: the row plan, the products of each head, the loss, the gradients.

Losses that a row knows alone take one sweep of three products per chunk; those that need the whole sequence or batch
first (sequence ratios, vespo, entropy quantiles) take two sweeps and a fourth product, and so do float16 heads, whose
second sweep is in backward (`late_gradients`). Loss and metrics come from the same kernel as `syncr1::grpo_loss`.
Backends `native` and `triton`; `reference` is ordinary autograd.

Dims: `T` packed tokens, `S` sequences, `N` rows of a stream, `V` vocabulary, `D` hidden, `M` modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_allowed, check_log_probabilities, check_loss_inputs, check_streams
from ..dispatch import module_of
from ..layout import PackedLayout
from ..linear import HeadRows, Workspace, chosen_rows, gradient_pass, loss_pass, score_rows
from ..options import LossOptions, decode
from ..plan import (
    Scores,
    acting_tokens,
    check_credit,
    divisors,
    entropy_thresholds,
    modality_masks,
    policy_mask,
    score_rewards,
    stream_layout,
    token_advantages,
    token_weights,
)
from ..records import MODALITIES, TokenStream
from ..terms import METRICS, Head, RowSettings, RowTerms, TokenLoss, row_loss
from . import late_gradients
from .logp import refuse_second_derivative
from .loss import is_per_sequence, loss_dtype, plain, token_loss
from .register import differentiates, fakes, implements

OP = "linear_grpo_loss"
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]
Grads = list[tuple[Tensor, Tensor, Tensor]]
Scored = tuple[Tensor, Tensor, TokenLoss, Grads]


def acting_rows(streams: Sequence[TokenStream], acting_T: Tensor) -> tuple[list[HeadRows], list[Tensor]]:
    """The rows of each stream that take part in the products, and their packed positions."""
    heads, positions = [], []
    rows = [stream.rows.long() for stream in streams]
    for stream, at, chosen in zip(streams, rows, chosen_rows([acting_T[at] for at in rows]), strict=True):
        head = Head(stream.bias, stream.temperature, stream.forbidden)
        whole = HeadRows(stream.hidden, stream.weight, stream.targets.long().contiguous(), head)
        heads.append(whole if chosen is None else whole.subset(chosen))
        positions.append(at if chosen is None else at[chosen])
    return heads, positions


@dataclass(frozen=True, slots=True, eq=False)
class Ratios:
    """What the ratios of a batch are taken against; each as the caller gave it."""

    old_logp: Tensor | None
    ref_logp: Tensor | None
    is_ratio: Tensor | None


class LinearLoss:
    """One call after checks: which rows of each head act, and the two ways through them."""

    def __init__(
        self,
        module: Any,
        options: LossOptions,
        streams: Sequence[TokenStream],
        layout: PackedLayout,
        scores: Scores,
        ratios: Ratios,
        num_items: Tensor | None,
        needs: Sequence[bool],
    ) -> None:
        self.module, self.options, self.streams, self.layout = module, options, streams, layout
        self.scores, self.ratios, self.num_items = scores, ratios, num_items
        self.counted_T, self.image_T = policy_mask(layout, scores), layout.image_tokens
        self.sequence_T = layout.sequence_of_token
        self.acting_T = acting_tokens(options, scores, self.counted_T, self.sequence_T, self.image_T)
        check_allowed(OP, streams, self.acting_T)
        self.heads, self.positions = acting_rows(streams, self.acting_T)
        self.needs = [needs[3 * index : 3 * index + 3] for index in range(len(streams))]

    @property
    def rows_know_alone(self) -> bool:
        """The gradient of a row follows from its own log-probability."""
        o = self.options
        return o.ratio == "token" and row_loss(o.loss_type) is not None and o.top_entropy_quantile == 1

    def one_sweep(self) -> Scored:
        """Three products per chunk."""
        weights = (self.options, self.layout, self.counted_T, self.image_T, self.sequence_T, self.num_items)
        ratios, sampler_T = self.ratios, plain(self.ratios.is_ratio)
        if sampler_T is not None and is_per_sequence(ratios.is_ratio, self.layout.num_tokens):
            sampler_T = sampler_T[self.sequence_T]
        terms = RowTerms(
            token_advantages(self.scores, self.sequence_T, self.image_T),
            token_weights(*weights),
            plain(ratios.old_logp),
            plain(ratios.ref_logp),
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
        divisor = divisors(options, masks, self.num_items)
        if options.loss_type == "bnpo":
            options = replace(options, loss_type="dapo")
        return token_loss(
            self.module, replace(self.layout, loss_mask=self.acting_T), options, logp_T,
            old_logp=self.ratios.old_logp, ref_logp=self.ratios.ref_logp, is_ratio=self.ratios.is_ratio,
            entropy=entropy_T, scores=self.scores, thresholds=thresholds, num_items=divisor,
        )  # fmt: skip


def _gather_streams(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[Tensor],
    forbidden: Sequence[Tensor],
    temperature: Sequence[float],
    modality: Sequence[int],
) -> list[TokenStream]:
    parts = zip(hidden, weight, targets, rows, bias, temperature, modality, forbidden, strict=True)
    return [
        TokenStream(h, w, t, r, _present(b), float(tau), MODALITIES[m], _present(f))
        for h, w, t, r, b, tau, m, f in parts
    ]


def _present(values: Tensor) -> Tensor | None:
    """None for an empty tensor: autograd takes lists of tensors, not of tensors and None."""
    return values if values.numel() else None


@implements(
    "linear_grpo_loss",
    (
        "(Tensor[] hidden, Tensor[] weight, Tensor[] bias, Tensor[] targets, Tensor[] rows, Tensor[] forbidden,"
        " float[] temperature, int[] stream_modality, Tensor? old_logp, Tensor[] rewards, Tensor[] advantages,"
        " Tensor cu_seqlens, Tensor group_offsets, Tensor? loss_mask, Tensor? modality, Tensor? ref_logp,"
        " Tensor? is_ratio, Tensor? weights, Tensor? num_items, SymInt num_tokens, bool[] needs, str settings,"
        " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])"
    ),
    reads_back=True,  # how many rows act; with an entropy quantile, how many tokens
)
def linear_grpo_loss(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[Tensor],
    forbidden: Sequence[Tensor],
    temperature: Sequence[float],
    stream_modality: Sequence[int],
    old_logp: Tensor | None,
    rewards: Sequence[Tensor],
    advantages: Sequence[Tensor],
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    loss_mask: Tensor | None,
    modality: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    num_tokens: int,
    needs: Sequence[bool],
    settings: str,
    backend: str,
) -> Outputs:
    """(loss, logp [T], entropy [T], advantages [M, S], keep [S], metrics [18], gradients).

    Lists hold one entry per stream, an empty tensor where it has no bias or nothing forbidden. `needs` and gradients
    hold hidden, weight and bias of each stream in turn; a gradient not needed is empty. Of float16 heads there are
    d loss / d logp [T], log-sum-exp [T] and an empty tensor in their place.
    """
    options, module = decode(settings), module_of(backend)
    streams = _gather_streams(hidden, weight, bias, targets, rows, forbidden, temperature, stream_modality)
    given = PackedLayout(cu_seqlens, group_offsets, modality, loss_mask, num_tokens)
    check_loss_inputs(
        OP, given, options, {"old_logp": old_logp, "ref_logp": ref_logp, "is_ratio": is_ratio, "num_items": num_items}
    )
    check_streams(OP, streams, num_tokens)
    check_credit(OP, rewards, advantages, given, weights)
    layout = stream_layout(OP, streams, given)
    scores = score_rewards(module, rewards, advantages, group_offsets, options, weights)
    ratios = Ratios(old_logp, ref_logp, is_ratio)
    call = LinearLoss(module, options, streams, layout, scores, ratios, num_items, needs)
    once = call.rows_know_alone and any(needs)
    if late_gradients.formed_late(hidden):
        logp_T, entropy_T, result, grads = call.late()
    else:
        logp_T, entropy_T, result, grads = call.one_sweep() if once else call.two_sweeps()
    flat = [grad for parts in grads for grad in parts] or [hidden[0].new_empty(0) for _ in needs]
    return result.loss, logp_T, entropy_T, result.advantages, result.keep, result.metrics, flat


@fakes("linear_grpo_loss")
def _(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[Tensor],
    forbidden: Sequence[Tensor],
    temperature: Sequence[float],
    stream_modality: Sequence[int],
    old_logp: Tensor | None,
    rewards: Sequence[Tensor],
    advantages: Sequence[Tensor],
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    loss_mask: Tensor | None,
    modality: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    num_tokens: int,
    needs: Sequence[bool],
    settings: str,
    backend: str,
) -> Outputs:
    like, num_sequences = hidden[0], cu_seqlens.shape[0] - 1
    wide = loss_dtype(like, backend)
    parts = [part for triple in zip(hidden, weight, bias, strict=True) for part in triple]
    grads = [part.new_empty(part.shape) if need else like.new_empty(0) for part, need in zip(parts, needs, strict=True)]
    if late_gradients.formed_late(hidden):
        grads = [
            like.new_empty(n, dtype=kind) for n, kind in ((num_tokens, torch.float32), (num_tokens, torch.float64))
        ]
        grads.append(like.new_empty(0, dtype=torch.float64))
    return (
        like.new_empty((), dtype=wide),
        like.new_empty(num_tokens, dtype=wide),
        like.new_empty(num_tokens, dtype=wide),
        like.new_empty((len(rewards) or len(advantages), num_sequences), dtype=torch.float32),
        like.new_empty(num_sequences, dtype=torch.bool),
        like.new_empty(len(METRICS), dtype=torch.float32),
        grads,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.num_streams, ctx.needs, ctx.counts = len(inputs[0]), inputs[20], (len(inputs[9]), len(inputs[10]))
    ctx.late = late_gradients.formed_late(inputs[0])
    if ctx.late:
        late_gradients.save(ctx, inputs, output[6][0], output[6][1], output[2])
    else:
        ctx.save_for_backward(*output[6])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *others: Any) -> tuple[Any, ...]:
    refuse_second_derivative(OP)
    nothing: list[None] = [None] * ctx.num_streams
    grads: list[list[Tensor | None]] = [list(nothing) for _ in range(3)]
    if grad_loss is not None:
        formed = late_gradients.gradients(ctx, grad_loss) if ctx.late else ctx.saved_tensors
        for index, (grad, need) in enumerate(zip(formed, ctx.needs, strict=True)):
            grads[index % 3][index // 3] = None if not need else grad if ctx.late else _scale(grad, grad_loss)
    lists = ([None] * ctx.counts[0], [None] * ctx.counts[1])
    return (*grads, nothing, nothing, nothing, None, None, None, *lists, *(None,) * 12)


def _scale(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad · grad_loss: in place where autograd lets go of the saved gradient afterwards: dW exists only once.

    The public op hands these outputs to nobody else.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if type(grad) is not Tensor or keeps_graph() or torch._C._functorch.is_legacy_batchedtensor(grad_loss):
        return grad * grad_loss.to(grad.dtype)
    if grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        return grad.detach()
    return grad.detach().mul_(grad_loss)


differentiates("linear_grpo_loss", _save, _differentiate)
