"""Preview Dynamic Group Scaling: restart, or give up, trajectories whose early image looks unpromising.

After a fraction of the image tokens a cheap completion is scored.  Tries at or below the threshold are drawn again, up
to a cap, and the best one stays; a gate with `min_keep` then drops what still lies there, except the best of a group.
The threshold follows a target acceptance rate:

    a = accepted / tried;   tau' = tau ** (1 + 0.12 (target - a))
    tau stays where |tau' - tau| <= dead_band, else it moves towards tau' by at most 0.005

The released code's dead band is 0.005: its tau moves by 0.005 or not at all, which leaves the acceptance rate about 12
points on either side of the target (at tau = 0.5).

How the sampler acts on it is preview.py; rewards/preview_scorer.py makes a gate of a run's rewards.  The other half of
DGS, which prunes after the reward is known, is `dgs_select` in syncr1.kernels.

Source: the released Sync-R1 (its loop has no cap, and it resumed from the filled preview, which froze the image).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..records import Prompt

PreviewScorer = Callable[[Sequence[Prompt], Sequence[str], Tensor], Tensor]
"""(prompts, texts, images [n, 3, H, W]) -> scores [n] float32 in about [0, 1]; NaN = cannot be judged."""

Completion = Literal["repeat", "likely"]

_GAIN = 0.12
_STEP = 0.005
_RANGE = (0.01, 0.99)


class PreviewGate:
    """The threshold of preview DGS, with its accounting. Its `state_dict` belongs in a checkpoint.

    Args:
        scorer: judges a partly drawn image.
        fraction: share of the image tokens after which the preview is taken, in (0, 1).
        threshold: starting value of tau, in (0, 1); None takes it from the first previews, such that the target is met.
        acceptance: acceptance rate that tau steers to (the released code: 0.25).
        dead_band: moves of tau up to this are left out; 0.005 is the released rule, 0 follows every step.
        completion: how the rest of the picture is made up (completion.py).
        max_attempts: tries per trajectory.
        min_keep: members of a group that are drawn to their end whatever their score, at least 2 so that their rewards
            can be compared; the others are dropped when no try passes. None: nobody is.
    """

    def __init__(
        self,
        scorer: PreviewScorer,
        *,
        fraction: float,
        threshold: float | None,
        acceptance: float,
        max_attempts: int,
        dead_band: float = 0.0,
        completion: Completion = "repeat",
        min_keep: int | None = None,
    ) -> None:
        if min_keep is not None and min_keep < 2:
            raise ValueError(
                f"PreviewGate: min_keep must be at least 2, or None, got {min_keep}; 2 keeps a group alive"
            )
        self._scorer = scorer
        self.fraction = fraction
        self.threshold = threshold
        self.acceptance = acceptance
        self.max_attempts = max_attempts
        self.dead_band = dead_band
        self.completion = completion
        self.min_keep = min_keep
        self.step = 0
        """Steps of the training that are done, for a scorer that asks."""
        self._accepted = 0
        self._tried = 0

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        """[n] float32 scores of partly drawn images [n, 3, H, W]; NaN = cannot be judged."""
        scores = self._scorer(prompts, texts, images)
        if scores.shape != (len(prompts),):
            raise ValueError(f"PreviewGate: the scorer must return [{len(prompts)}] scores, got {tuple(scores.shape)}")
        known = scores[scores.isfinite()].float()
        if self.threshold is None and known.numel():
            self.threshold = _within(float(known.quantile(1.0 - self.acceptance)))
        return scores.float()

    def reach(self, num_drawn: int, num_tokens: int) -> int:
        """Columns of keys and values that a row of a try needs for its image, of `num_tokens` tokens."""
        return num_tokens if self.completion == "likely" else num_drawn

    def accepts(self, scores: Tensor) -> Tensor:
        """[n] bool; a score of NaN or -inf is never accepted."""
        return scores > (_RANGE[0] if self.threshold is None else self.threshold)

    def observe(self, num_accepted: int, num_attempts: int) -> None:
        self._accepted += num_accepted
        self._tried += num_attempts

    @property
    def counts(self) -> Tensor:
        """[2] float64: accepted and tried in this step; summed over ranks before `adapt`."""
        return torch.tensor([self._accepted, self._tried], dtype=torch.float64)

    def adapt(self, accepted: int | None = None, tried: int | None = None) -> float:
        """Moves the threshold once per step and forgets the step's counts.

        Args:
            accepted, tried: counts over all ranks; None takes this rank's own.

        Returns:
            The acceptance rate; NaN when nothing was tried, and then the threshold stays.
        """
        accepted = self._accepted if accepted is None else accepted
        tried = self._tried if tried is None else tried
        self._accepted = self._tried = 0
        if tried == 0 or self.threshold is None:
            return float("nan")
        rate = accepted / tried
        wanted = self.threshold ** (1 + _GAIN * (self.acceptance - rate))
        move = wanted - self.threshold
        if abs(move) > self.dead_band:
            self.threshold = _within(self.threshold + min(_STEP, max(-_STEP, move)))
        return rate

    def state_dict(self) -> dict[str, float | None]:
        return {"threshold": self.threshold, "accepted": float(self._accepted), "tried": float(self._tried)}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.threshold = state["threshold"]
        self._accepted, self._tried = int(state["accepted"] or 0), int(state["tried"] or 0)


def _within(threshold: float) -> float:
    return min(_RANGE[1], max(_RANGE[0], threshold))
