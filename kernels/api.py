"""The public ops: `from syncr1.kernels.api import grpo_loss, …`.

Each op is served by one of several backends with one meaning (`syncr1.kernels.dispatch`); `backend=` names one.

Dims: `T` packed tokens, `S` sequences, `P` prompts (groups), `N` rows of one vocabulary, `V` vocabulary, `D` hidden,
`K` rewards, `B` decode rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import calls, checks, ranges
from .attention import SharedPrefixLayout, attention_provider, shared_prefix_attention
from .checks import NonFiniteError, non_finite_passes
from .decode_attention import prefix_decode_attention
from .dispatch import BackendError, choose, same_device
from .options import Aggregate, LossOptions, Rule, Scale, check_selection, check_statistics
from .plan import Rewards, per_modality
from .records import CFGSample, GRPOOutput, TokenStream

__all__ = [
    "group_advantages", "dgs_select", "grpo_loss", "linear_grpo_loss", "linear_logp", "selective_logp", "cfg_sample",
    "shared_prefix_attention", "prefix_decode_attention", "SharedPrefixLayout", "TokenStream", "GRPOOutput",
    "CFGSample", "LossOptions", "BackendError", "NonFiniteError",
    "attention_provider", "non_finite_passes",
]  # fmt: skip


def _list_options(op: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the fields of LossOptions as keywords in `help(op)` and in editors that ask the signature."""
    signature = inspect.signature(op)
    plain = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    listed = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(LossOptions)
    ]
    op.__signature__ = signature.replace(parameters=[*plain, *listed])  # type: ignore[attr-defined]
    return op


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    *,
    weights: Tensor | None = None,
    scale: Scale = "group",
    eps: float = 1e-4,
    aggregate: Aggregate = "sum_then_normalize",
    backend: str | None = None,
) -> Tensor:
    """Advantage of each sequence relative to its group.

    Equivalent PyTorch, for one group without NaN:
        r = (rewards * weights).sum(1)
        A = (r - r.mean()) / (r.std() + eps) if r.max() - r.min() > 2**-21 * r.abs().max() else torch.zeros_like(r)

    Args:
        rewards: [S] or [S, K] float, finite; NaN = no reward. NaN components are left out of the weighted sum; a
            sequence without any is left out of the statistics and gets 0.
        group_offsets: [P+1] int; group p is sequences `group_offsets[p]:group_offsets[p+1]`, of any size.
        weights: [K] float, finite, or None (all 1); only with [S, K].
        scale: "group" divides by std_group + eps (unbiased), "batch" by std of all rewards + eps, "none" only centres,
            "loo" subtracts the mean of the *other* members.
        eps: finite, ≥ 0, in units of the reward.
        aggregate: "sum_then_normalize", or "normalize_then_sum": each reward is normalised in its group, the weighted
            sum is normalised over the batch (GDPO).
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        [S] float32 (float64 for float64 rewards), no gradient; exactly 0 where a group's valid rewards are all equal
        up to four units in the last place of float32 (2⁻²¹ of the largest).

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: GRPO (arXiv 2402.03300); RLOO (2402.14740); Dr. GRPO (2503.20783); GDPO (2601.05242).
    """
    op = "group_advantages"
    check_statistics(op, scale, eps, aggregate)
    checks.check_float(op, "rewards", rewards)
    same_device(op, rewards=rewards, group_offsets=group_offsets, weights=weights)
    chosen = choose(op, backend, rewards)
    result: Tensor = calls.registered.group_advantages(
        rewards.detach(), group_offsets, weights, scale, float(eps), aggregate, chosen
    )
    return result


def dgs_select(
    rewards: Rewards,
    group_offsets: Tensor,
    *,
    rule: Rule = "variance_mass",
    mass: float = 0.9,
    keep: int | None = None,
    min_keep: int = 2,
    seed: int = 0,
    weights: Tensor | None = None,
    scale: Scale = "group",
    eps: float = 1e-4,
    aggregate: Aggregate = "sum_then_normalize",
    backend: str | None = None,
) -> Tensor:
    """Which trajectories of each group are trained on (Dynamic Group Scaling).

    Equivalent PyTorch, for rule "variance_mass" and one group:
        energy, order = group_advantages(rewards, offsets).square().sort(descending=True, stable=True)
        size = int((energy.cumsum(0) < mass * energy.sum()).sum()) + 1
        keep = torch.zeros_like(rewards, dtype=torch.bool); keep[order[:max(size, min_keep)]] = True

    Args:
        rewards: as in `group_advantages`, or {"text": …, "image": …}: then |A| is sqrt(A_text² + A_image²), and top_k
            and max_variance rank by the sum of both rewards.
        group_offsets: [P+1] int.
        rule: "variance_mass" keeps the smallest set with at least `mass` of Σ A²; "max_variance" the `keep`
            trajectories of greatest reward variance (PODS); "top_k" the `keep` best (GFPO); "random" as many as
            variance_mass, drawn by `seed`; "none" everything.
        mass: in (0, 1], met to a relative 1e-9.
        keep: ≥ 1 per group; None = half of the group, rounded up. For max_variance and top_k.
        min_keep: ≥ 0; lower bound per group with variance. Groups without variance keep nothing (except under "none").
        seed: of the rule "random".
        weights, scale, eps, aggregate: of the advantages.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        [S] bool. Ties go to the lower index; sequences without a reward are never kept (except under "none").

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: PODS (arXiv 2504.13818); GFPO (2508.09726).
    """
    op = "dgs_select"
    check_selection(op, rule, mass, keep, min_keep, seed)
    check_statistics(op, scale, eps, aggregate)
    same_device(op, rewards=rewards, group_offsets=group_offsets, weights=weights)
    parts = [part.detach() for part in per_modality(op, "rewards", rewards)]
    chosen = choose(op, backend, *parts)
    result: Tensor = calls.registered.dgs_select(
        parts, group_offsets, weights, scale, float(eps), aggregate, rule, float(mass),
        None if keep is None else int(keep), int(min_keep), int(seed), chosen,
    )  # fmt: skip
    return result


@_list_options
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    rewards: Rewards | None,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    advantages: Rewards | None = None,
    loss_mask: Tensor | None = None,
    modality: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> GRPOOutput:
    """GRPO-family loss of packed sequences, from per-token log-probabilities.

    Equivalent PyTorch, for the defaults without pruning:
        A = group_advantages(rewards, group_offsets)[sequence_of_token]
        ratio = (logp - old_logp).clamp(-20, 20).exp()
        token_loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
        loss = token_loss[loss_mask].sum() / loss_mask.sum()

    Args:
        logp: [T] float, nats; of the target tokens, with gradient. Values outside the loss mask may be anything.
        old_logp: [T] float, nats, of the policy that the ratio is taken against; None = `logp.detach()` (on policy).
        rewards: [S] or [S, K] float, NaN = none; or {"text": …, "image": …}: each token takes the advantage computed
            from the rewards of its own modality. None where `advantages` are given.
        cu_seqlens: [S+1] int; a pruned sequence stays in it with zero tokens, so statistics cover the whole group.
        group_offsets: [P+1] int.
        advantages: [S] float, or one [S] per modality: your own in place of rewards; `dgs` ranks by them.
        loss_mask: [T] bool, tokens the policy produced; None = all.
        modality: [T] uint8, 0 text, 1 image; None = all text (and metrics for text alone).
        ref_logp: [T] float, nats, of the reference policy.
        is_ratio: [S], [S, 1] or [T] float > 0; π_old/π_sampler, multiplied onto the policy term. Where T == S, [S] is
            read as [T]: pass [S, 1].
        entropy: [T] float, nats; for the metrics and `top_entropy_quantile`.
        weights: [K] float; reward weights.
        backend: see `syncr1.kernels.dispatch`.
        **options: fields of `LossOptions`.

    Returns:
        GRPOOutput; without any loss token the loss is 0 and every gradient finite and 0.

    Raises:
        ValueError: a shape, dtype or value is out of place, an option is unknown, or a log-probability that carries
            loss is not finite (NonFiniteError).

    Source: TRL's `GRPOTrainer` (formulas and defaults); luspo as in TRL issue 6654.
    """
    return calls.grpo_loss(
        logp, old_logp, rewards, cu_seqlens, group_offsets, advantages=advantages, loss_mask=loss_mask,
        modality=modality, ref_logp=ref_logp, is_ratio=is_ratio, entropy=entropy, weights=weights, backend=backend,
        options=options,
    )  # fmt: skip


@_list_options
def linear_grpo_loss(
    streams: Sequence[TokenStream],
    rewards: Rewards | None,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    advantages: Rewards | None = None,
    old_logp: Tensor | None = None,
    loss_mask: Tensor | None = None,
    modality: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_ratio: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> GRPOOutput:
    """`grpo_loss` straight from hidden states, one head per modality; `[tokens, vocabulary]` never exists whole.

    Equivalent PyTorch:
        logp = torch.zeros(T)
        for s in streams:
            logp[s.rows] = linear_logp(s.hidden, s.weight, s.targets, bias=s.bias, temperature=s.temperature)[0]
        output = grpo_loss(logp, old_logp, rewards, cu_seqlens, group_offsets, …)

    Args:
        streams: rows of each vocabulary; tokens that no stream covers carry no loss. Masked and pruned rows, and where
            there is no KL rows of advantage 0 (see `score_all`), are left out of the matrix products.
        modality: optional; must agree with the streams, which carry it.
        rewards, cu_seqlens, group_offsets, advantages, old_logp, loss_mask, ref_logp, is_ratio, weights, backend,
            **options: as in `grpo_loss`. Under `torch.compile` pass at least one of old_logp, loss_mask, modality and
            ref_logp: it tells T.

    Returns:
        GRPOOutput; `logp` and `entropy` are 0 at tokens that were left out, and metrics are means over the others.
        Token ratios take three matrix products per row; `ratio="sequence"`, vespo and top_entropy_quantile need the
        rest of the sequence or batch first, float16 heads the scale of the loss, and take a fourth.

    Raises:
        ValueError: a shape, dtype or value is out of place, or a loss token's target is forbidden.

    Source: as `grpo_loss`.
    """
    return calls.linear_grpo_loss(
        streams, rewards, cu_seqlens, group_offsets, advantages=advantages, old_logp=old_logp, loss_mask=loss_mask,
        modality=modality, ref_logp=ref_logp, is_ratio=is_ratio, weights=weights, backend=backend, options=options,
    )  # fmt: skip


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of tokens from hidden states, without storing the logits.

    Equivalent PyTorch:
        logp_all = (F.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
        logp = logp_all.gather(1, targets[:, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(-1)

    Args:
        hidden: [N, D] float; with gradient.
        weight: [V, D], dtype of `hidden`; with gradient.
        targets: [N] int in [0, V).
        bias: [V] or None; with gradient.
        temperature: finite, > 0.
        forbidden: [F] int64 vocabulary ids whose logits are -inf; a forbidden target has log-probability -inf.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        (logp [N], entropy [N]), nats, float32 (float64 for float64 input), both with gradient.

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: chunked as in Cut Your Losses (arXiv 2411.09009) and Liger's fused losses.
    """
    return calls.linear_logp(hidden, weight, targets, bias, temperature, forbidden, backend)


def selective_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of tokens from logits.

    Equivalent PyTorch:
        logp_all = (logits.float() / temperature).log_softmax(-1)
        logp = logp_all.gather(1, targets[:, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(-1)

    Args:
        logits: [N, V] float; with gradient.
        targets: [N] int in [0, V).
        temperature: finite, > 0.
        forbidden: [F] int64 vocabulary ids whose logits are taken as -inf.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        (logp [N], entropy [N]), nats, float32 (float64 for float64 input).

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: TRL's `selective_log_softmax`.
    """
    return calls.selective_logp(logits, targets, temperature, forbidden, backend)


def cfg_sample(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    cfg_weight: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor,
    offset: int | Tensor,
    forbidden: Tensor | None = None,
    backend: str | None = None,
) -> CFGSample:
    """Samples one token per row under classifier-free guidance, with its log-probabilities.

    Equivalent PyTorch, up to the random numbers:
        z = uncond + cfg_weight * (cond - uncond)
        token = torch.multinomial((z / temperature).softmax(-1), 1)[:, 0]
        logp = (cond / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]

    Args:
        cond: [B, V] float; conditional logits.
        uncond: [B, V] float or None (no guidance).
        cfg_weight: any finite number; 1 = conditional, 5 = Janus's usual guidance.
        temperature: finite, ≥ 0; 0 is greedy, whose log-probabilities are reported at temperature 1.
        top_k: ≥ 0 most likely ids of z; 0 = all.
        top_p: in (0, 1]; the smallest set of ids holding that much of what top_k left, met to a relative 1e-6, ties to
            the lower id; 1 = all.
        seed: int or [B] int64.
        offset: int or [B] int64; counter of the draw. A row's token depends on its logits, seed and offset alone, so
            give each sequence and step its own offset (sequence_id * max_steps + step). One number for all rows counts
            on from row to row (row b draws at offset + b, and the next call starts at offset + B); rows draw with equal
            numbers only where seeds and offsets are given per row and are equal.
        forbidden: [F] int64 vocabulary ids that are never sampled; both distributions exclude them.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        CFGSample(token, logp, logp_mixed, entropy); `logp_mixed` is that of z before top_k and top_p.

    Raises:
        ValueError: a shape, dtype or value is out of place, or a row of logits has no distribution (NonFiniteError).

    Source: Philox4x32-10 (Salmon et al., SC 2011); guidance as in Janus's `generation_inference.py`.
    """
    op = "cfg_sample"
    given = {"cfg_weight": cfg_weight, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, allowed in ranges.SAMPLING.items():
        allowed.check(op, name, given[name])
    for name, counter in (("seed", seed), ("offset", offset)):
        if not isinstance(counter, Tensor):
            ranges.SEED.check(op, name, counter)
    checks.check_sampling(cond, uncond, cfg_weight, seed, offset)
    same_device(op, cond=cond, uncond=uncond, seed=seed, offset=offset, forbidden=forbidden)
    chosen = choose(op, backend, cond, uncond)
    # Filled on the device: a Python number copied there makes the host wait for it.
    seed_B, offset_B = (
        value.long() if isinstance(value, Tensor) else cond.new_full((), value, dtype=torch.int64)
        for value in (seed, offset)
    )
    if offset_B.dim() == 0:  # rows of one call are independent
        offset_B = offset_B + torch.arange(cond.shape[0], device=cond.device)
    seed_B = seed_B.expand(cond.shape[0])
    drawn = calls.registered.cfg_sample(
        cond.detach(), None if uncond is None else uncond.detach(), float(cfg_weight), float(temperature), int(top_k),
        float(top_p), seed_B, offset_B, forbidden, chosen,
    )  # fmt: skip
    return CFGSample(*drawn)
