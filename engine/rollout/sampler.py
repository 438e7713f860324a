"""Prompt x G -> Rollout: many groups sampled at once, each a causal sequence of text and image tokens.

    prompt . text . [drawing turn] . image_start . image . follow-up turn . text    (any of the three may be absent)

Each prompt, its image included, runs through the model once, and so does the classifier-free prompt; members hold only
what they add (cache.py).  Text and image phases advance over all groups together, a sequence that ended frees its rows,
and the next phase goes on from the same cache.  Log-probabilities, conditional and CFG-mixed, and the entropy come out
of the sampler in the same pass.  Random numbers are keyed by (seed, step, prompt, member, attempt) and the token's
place: what is drawn does not depend on the batch around it.

Dims: P prompts, G members, B = P*G sequences, N image tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from ..policies.base import Policy
from ..records import Prompt, Rollout
from .batch import Batch
from .decode import Trunk
from .few_rows import FewRows
from .preview_gate import PreviewGate
from .sampling import RolloutStats, Sampling
from .stepping import Stepper


class RolloutEngine:
    """Samples from a policy; keep one while the policy lives, so that a GPU's graphs and caches are reused.

    Args:
        policy: in eval mode while `generate` runs; its parameters must be whole (under ZeRO-3: gathered).
        cuda_graphs: replay decoding steps as CUDA graphs; None: where the policy is on a GPU. They hold the addresses
            of parameters, which must not move between calls (ZeRO-3 moves them).
        trunk: used for decoding steps instead of the policy's, e.g. a compiled one.
        max_bytes: the most that keys and values may take; None: what the device has free.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        cuda_graphs: bool | None = None,
        trunk: Trunk | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.policy, self.max_bytes = policy, max_bytes
        self.trunk: Trunk = trunk or policy.trunk
        on_cpu = policy.cache_shape().device.type == "cpu"
        few_rows = FewRows(policy) if on_cpu and trunk is None else None
        self.stepper = Stepper(policy, self.trunk, cuda_graphs, few_rows)
        self._decoding = nullcontext if few_rows is None else few_rows
        self.stats = RolloutStats()

    def release(self) -> None:
        """Frees caches and graphs that a GPU keeps between calls, for a training step that needs the room."""
        self.stepper.release()

    @torch.inference_mode(False)  # what a call keeps, and the tokens that it gives, are trained on later
    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, preview: PreviewGate | None = None
    ) -> list[Rollout]:
        """Samples `num_generations` trajectories of each prompt; `stats` then tells what it cost.

        Args:
            prompts: any mix of segment plans.
            sampling: temperature, lengths, guidance, drawing turn, seed.
            preview: preview DGS; None draws every image to its end.

        Returns:
            len(prompts) * G rollouts, the members of a prompt adjacent, in the order of the prompts.

        Raises:
            ValueError: a prompt is empty, longer than the model's positions, or asks for what cannot be sampled; or the
                drawing turn is none that there is.
            RolloutTooLarge: the keys and values do not fit; the message says which numbers to lower.
        """
        self.stats = RolloutStats()
        if not prompts:
            return []
        batch = Batch(self.stepper, prompts, sampling, preview, self.max_bytes)
        with self._decoding():
            batch.sample_text()
            batch.draw_images()
            batch.sample_follow_ups()
        self.stats = replace(batch.stats, seconds=batch.time.seconds)
        return batch.finished()


def generate(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, preview: PreviewGate | None = None
) -> list[Rollout]:
    """One call of a `RolloutEngine` of its own; see there."""
    return RolloutEngine(policy, cuda_graphs=False).generate(prompts, sampling, preview)
