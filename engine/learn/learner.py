"""The optimizer's side, on DeepSpeed: ZeRO 0-3, bf16, gradient clipping. The only file that imports deepspeed.

One update is: any number of micro-batches forward and backward, then one step.  Losses are divided by the update's
token counts over all ranks, so gradients do not depend on how a batch is cut into micro-batches or spread over ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidiactl") else "cuda")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
from torch import Tensor

from syncr1.kernels.api import non_finite_passes

from ..checkpoints.sharded import sync_tree
from ..errors import NotFinite
from ..forward.objective import Objective, PolicyForward
from ..policies.base import Policy
from ..policies.lora import adapter_disabled, base_of, has_lora, save_adapter
from ..processes.group import local_device
from ..processes.watchdog import gathering
from ..records import IMAGE, MODALITY_NAMES, PackedBatch
from ..stopwatch import Stopwatch
from .correction import of_high_entropy, sampler_ratio
from .metrics import COUNT, pooled
from .optimizer import ClippedAdamW, LearnerSettings, clips_here, deepspeed_config

logger = logging.getLogger(__name__)

SEQUENCE_MEANS = frozenset({"grpo", "sapo", "luspo", "dr_grpo"})
"""Loss types that average over sequences; a micro-batch counts by its share of them."""


class Learner:
    """Owns the trained weights.

    Args:
        policy: a `Policy`; moved to the device and wrapped by DeepSpeed.
        objective: the loss's settings; a KL term needs a reference, which shares what is frozen with the policy.
        settings: optimizer and ZeRO.
        reference: frozen policy that the KL term refers to; None: `policy` as it is now, without its adapters. Under
            ZeRO-3 with adapters and None, heads that are trained are part of the reference: give one then.
    """

    def __init__(
        self, policy: Policy, objective: Objective, settings: LearnerSettings, reference: Policy | None = None
    ) -> None:
        self.policy, self.objective, self.settings = policy, objective, settings
        self.device = local_device()
        self._reference: PolicyForward | None = None
        # Where ZeRO-3 splits weights that others share, the base is this policy without its adapters.
        self._base_inside = objective.needs_reference and reference is None and has_lora(policy)
        self._base_inside &= settings.zero_stage == 3
        if objective.needs_reference and not self._base_inside:
            reference = reference or (base_of(policy) if settings.zero_stage < 3 else policy.frozen_copy())
            self._reference = PolicyForward(reference.to(self.device), objective)
        if settings.gradient_checkpointing:
            policy.checkpoint_activations()
        forward = PolicyForward(policy, objective)
        trained = [p for p in forward.parameters() if p.requires_grad]
        adamw = ClippedAdamW if clips_here(settings) else torch.optim.AdamW
        optimizer = adamw(
            trained,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
        )
        if isinstance(optimizer, ClippedAdamW):
            optimizer.max_norm = settings.max_grad_norm or math.inf
        self._skipped_in_a_row = 0
        self._time = Stopwatch()
        self.scoring: Mapping[str, float] = {}
        """Of the last `score`, by its own trajectories: how far sampler and trainer disagree, under TRL's names."""
        if self.device.type == "cpu":
            # DeepSpeed would compile its shared-memory collective for half a minute; gloo does as well here.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=forward,
            model_parameters=trained,
            optimizer=optimizer,
            config=deepspeed_config(settings, sum(parameter.numel() for parameter in trained)),
        )

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    @property
    def seconds(self) -> dict[str, float]:
        """Of the last update, by stage: forward, backward, optimizer."""
        return self._time.seconds

    @contextmanager
    def sampling(self) -> Iterator[Policy]:
        """The policy with whole weights, in eval mode: under ZeRO-3 they are gathered for the duration."""
        self.engine.eval()
        try:
            if self.settings.zero_stage < 3:
                yield self.policy
            else:
                # DeepSpeed's helper restores its hooks only when its body ends normally, so an error waits outside.
                failure: BaseException | None = None
                with unwrap_model_for_generation(self.engine):
                    try:
                        yield self.policy
                    except BaseException as error:
                        failure = error
                if failure is not None:
                    raise failure
        finally:
            self.engine.train()

    @torch.no_grad()
    def score(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with `ref_logp` where a KL term needs it, `old_logp` where several updates follow, and `is_ratio`
        where the objective corrects for the sampler or leaves tokens out.  What that says is then in `scoring`.

        With one update per rollout the loss takes its own detached log-probabilities as the old ones: the same numbers.
        """
        several, scores_first = self.settings.num_iterations > 1, self.objective.scores_first
        scored: list[PackedBatch] = []
        entropies: list[Tensor] = []
        told: list[dict[str, float]] = []
        for batch in self._aligned(batches):
            moved = batch.to(self.device)
            ref = self._reference(moved)["logp"] if self._reference is not None else None
            if self._base_inside:
                with adapter_disabled(self.policy):
                    ref = self.engine(moved)["logp"]
            out = self.engine(moved) if several or scores_first else {}
            ratio: Tensor | None = None
            if self.objective.importance_correction != "none":
                ratio, values = sampler_ratio(moved, out["logp"], self.objective)
                told.append(values)
            if scores_first:
                entropies.append(out["entropy"])
            scored.append(replace(moved, ref_logp=ref, old_logp=out["logp"] if several else None, is_ratio=ratio))
        self.scoring = pooled(told)
        return self._of_high_entropy(scored, entropies) if self.objective.top_entropy_quantile < 1 else scored

    def _of_high_entropy(self, batches: Sequence[PackedBatch], entropies: Sequence[Tensor]) -> list[PackedBatch]:
        """The batches with 0 in `is_ratio` where `top_entropy_quantile` leaves a token out. Collective."""
        high = of_high_entropy(
            batches, entropies, self.objective.top_entropy_quantile, lambda own: torch.cat(self._of_all_ranks(own))
        )
        return [
            replace(batch, is_ratio=mask.float() if batch.is_ratio is None else batch.is_ratio * mask)
            for batch, mask in zip(batches, high, strict=True)
        ]

    def update(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """`num_iterations` optimizer steps on the scored batches; returns the last one's metrics under TRL's names, but
        for how far sampler and trainer disagree, which is the first one's: its weights are those that sampled; and in
        `updates_skipped` how many all ranks left out because a gradient was NaN or infinite.

        Raises:
            NotFinite: more than `max_skipped_updates` in a row were; weights and optimizer are as before them.
        """
        self._time = Stopwatch()
        told = [self._step(batches) for _ in range(self.settings.num_iterations)]
        replay, skipped = "rollout/replay_logp_max_abs", "updates_skipped"
        return told[-1] | {replay: told[0][replay], skipped: math.fsum(update[skipped] for update in told)}

    def _step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        num_items, shares = self._normalisers(batches)
        told: list[dict[str, float]] = []
        total, replay, finite = 0.0, 0.0, True
        for batch, share in zip(batches, shares, strict=True):
            with self._time("forward"), non_finite_passes():
                out = self.engine(batch, num_items=num_items, share=share)
            with self._time("backward"):
                self.engine.backward(out["loss"], scale_wrt_gas=False)
            total += float(out["loss"].detach())
            replay = max(replay, replay_error(batch, out["logp"]))
            finite &= math.isfinite(float(out["loss"].detach() + out["logp"].sum()))
            told.append(measured(batch, out))
        with self._time("optimizer"):
            self.engine.step()
        metrics = pooled(told)
        norm = self._grad_norm()
        skipped = not math.isfinite(norm)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self._report_skipped(finite)
        return metrics | {
            "loss": total,
            "grad_norm": norm,
            "rollout/replay_logp_max_abs": replay,
            "updates_skipped": float(skipped),
        }

    def _grad_norm(self) -> float:
        """Of the last update's gradients over all ranks, before clipping; the same on all ranks.

        DeepSpeed says infinity for what is not finite, and then changes nothing; so does `ClippedAdamW`."""
        norm = self.optimizer.norm if clips_here(self.settings) else self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _report_skipped(self, finite_here: bool) -> None:
        """Says whose it was; ends the run when it does not stop. Collective: all ranks skip together."""
        ranks = torch.zeros(self.world_size, dtype=torch.float64)
        ranks[self.rank] = float(not finite_here)
        where = [str(rank) for rank, bad in enumerate(self.all_reduce(ranks).tolist()) if bad]
        of = f"the loss of rank {', '.join(where[:8])}" if where else "a gradient, but no loss,"
        text = f"{of} is NaN or infinite: all ranks skip this update ({self._skipped_in_a_row} in a row)"
        if self.rank == 0:
            logger.warning(text)
        if self._skipped_in_a_row > self.settings.max_skipped_updates:
            raise NotFinite(
                f"{text}; more than max_skipped_updates = {self.settings.max_skipped_updates}: lower learning_rate or "
                "max_grad_norm, or look for an overflow (bf16, temperature); the newest checkpoint is whole"
            )

    def _normalisers(self, batches: Sequence[PackedBatch]) -> tuple[dict[str, float], list[float]]:
        """Token counts per modality and sequence shares of an update, so that DeepSpeed's mean over ranks is right."""
        counts = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            for code in range(2):
                counts[code] += float((batch.loss_mask & (batch.modality == code)).sum())
            if batch.filled is not None and bool(batch.loss_mask.any()):
                counts[IMAGE] += batch.filled.num_items - float((batch.loss_mask & (batch.modality == IMAGE)).sum())
            # Not of batches that only make the number the same on every rank.
            counts[2] += (batch.cu_seqlens.numel() - 1) * bool(batch.loss_mask.any())
        totals = self.all_reduce(counts) / self.world_size
        num_items: dict[str, float] = {name: max(1.0, float(totals[code])) for code, name in enumerate(MODALITY_NAMES)}
        if self.objective.loss_type not in SEQUENCE_MEANS:
            return num_items, [1.0] * len(batches)
        return num_items, [(batch.cu_seqlens.numel() - 1) / max(1.0, float(totals[2])) for batch in batches]

    def _aligned(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The same number of micro-batches on every rank, the added ones without loss, so that collectives match."""
        most = int(self.all_reduce(torch.tensor([len(batches)]), op=dist.ReduceOp.MAX))
        smallest = min(batches, key=lambda batch: batch.num_tokens)
        idle = smallest.without_loss()
        return [*batches, *[idle] * (most - len(batches))]

    def all_reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum (or `op`) of a small CPU tensor over ranks."""
        if self.world_size == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, op=op)
        return moved.cpu()

    def gathered(self, values: Mapping[str, float]) -> list[dict[str, float]]:
        """What each rank calls this with, in order of ranks; names may differ. Collective."""
        if self.world_size == 1:
            return [dict(values)]
        text = torch.frombuffer(bytearray(json.dumps(dict(values)).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part.tolist())) for part in self._of_all_ranks(text)]

    def of_each_rank(self, count: int) -> list[int]:
        """A number of each rank, in order of ranks. Collective."""
        counts = torch.zeros(self.world_size, dtype=torch.long)
        counts[self.rank] = count
        return [int(number) for number in self.all_reduce(counts).tolist()]

    def _of_all_ranks(self, values: Tensor) -> list[Tensor]:
        """A vector of each rank, of any length, in order of ranks; on the CPU. Collective."""
        if self.world_size == 1:
            return [values.cpu()]
        lengths = self.of_each_rank(values.numel())
        mine = values.new_zeros(max(lengths), device=self.device)
        mine[: values.numel()] = values
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return [part[:length].cpu() for part, length in zip(parts, lengths, strict=True)]

    def save(self, folder: Path, add: Callable[[Path], object] = lambda draft: None) -> None:
        """The policy in transformers' format, adapters added to its weights, and beside it in peft's; every rank must
        call it.  The folder appears whole, with what `add` writes into it, in place of one that is there.

        Raises:
            CheckpointError: under ZeRO-3, where not all ranks did.
        """
        if self.settings.zero_stage == 3:  # which gathers the weights: the others would be waited for
            gathering("saving the model")()
        with self.sampling() as policy:
            if self.rank == 0:
                draft, old = (folder.with_name(f".draft-{name}-{folder.name}") for name in ("new", "old"))
                for left in (draft, old):
                    shutil.rmtree(left, ignore_errors=True)
                policy.save(draft)
                if has_lora(policy):
                    save_adapter(policy, draft / "adapter")
                add(draft)
                sync_tree(draft)
                if folder.exists():
                    os.rename(folder, old)
                os.rename(draft, folder)
                shutil.rmtree(old, ignore_errors=True)


def measured(batch: PackedBatch, out: Mapping[str, Tensor]) -> dict[str, float]:
    """The loss's metrics of one micro-batch, with how many sequences and groups its shares are of."""
    values = {name.removeprefix("metric/"): float(v) for name, v in out.items() if name.startswith("metric/")}
    counts = {"frac_kept": batch.cu_seqlens.numel() - 1, "frac_reward_zero_std": batch.group_offsets.numel() - 1}
    learns = bool(batch.loss_mask.any())  # else it only makes the number of batches the same on every rank
    if batch.anchor and learns:
        held = {name.removeprefix("kl/"): kl for name, kl in values.items() if name.startswith("kl/")}
        values |= {f"kl_anchors/{name}": kl for name, kl in held.items()}
        values |= {f"{COUNT}kl_anchors/{name}": values.get(f"tokens/{name}", 0.0) for name in held}
    return values | {f"{COUNT}{name}": float(count * learns) for name, count in counts.items()}


def replay_error(batch: PackedBatch, logp: Tensor) -> float:
    """Largest |sampler's log-probability - trainer's|, nats; 0 when nothing was sampled.

    The loss computes none (and says 0) for tokens that it has no use for, those of groups without an advantage; 0 is
    the answer, too, where one id could be drawn: of a sequence that has an advantage it counts.
    """
    sequences = torch.arange(len(batch.advantages), device=logp.device)
    sequence_of = sequences.repeat_interleave(batch.cu_seqlens.diff().to(logp.device))
    computed = (logp != 0) | (batch.advantages.to(logp.device)[sequence_of, batch.modality.long()] != 0)
    where = batch.loss_mask & batch.sampled_logp.isfinite() & computed
    return float((batch.sampled_logp - logp)[where].abs().max()) if bool(where.any()) else 0.0
