"""Preview DGS from a run's rewards: a partly drawn image is judged by those that look at images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import Prompt
from ..rollout.preview_gate import PreviewGate
from ..settings.train_config import TrainConfig
from .ensemble import RewardSet, combine
from .hooks import state_of
from .judge.llm_judge import LLMJudge
from .reward import columns_for
from .scoring import score_columns
from .yours.remote import RemoteReward

REMOTE = (LLMJudge, RemoteReward)


def build_preview(config: TrainConfig, rewards: RewardSet) -> PreviewGate | None:
    """Preview DGS, judged by the run's own image rewards on the partly drawn image, or by what stands for them in a
    preview (`RewardSet.preview`); a redraw changes no text reward.

    A remote judge, slow and costly, is not asked.  None when it is switched off, and when no reward looks at images.
    """
    judged = zip(rewards.kinds, rewards.functions.values(), strict=True)
    columns = [k for k, (kind, judge) in enumerate(judged) if kind == "image" and not isinstance(judge, REMOTE)]
    weights = rewards.weight_tensor()[columns]
    if config.preview_fraction == 0 or not bool((weights > 0).any()):
        return None
    judges = {rewards.names[k]: rewards.functions[rewards.names[k]] for k in columns}
    if rewards.preview is not None:
        judges, weights = {"preview": rewards.preview}, torch.ones(1)

    def scorer(prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        """As `score`: anchors are not shown to the judges and have no score."""
        shown, pictures = [i for i, prompt in enumerate(prompts) if prompt.rewarded], images.cpu()
        under_way = columns_for([prompts[i] for i in shown], [texts[i] for i in shown], [pictures[i] for i in shown])
        state = state_of(config, gate.step)
        table = score_columns(under_way, judges, config.reward_timeout, state=state).placed(shown, len(prompts))
        return combine(table.values, weights, renormalise=True)

    gate = PreviewGate(
        scorer,
        fraction=config.preview_fraction,
        threshold=config.preview_threshold,
        acceptance=config.preview_acceptance,
        dead_band=config.preview_dead_band,
        completion=config.preview_completion,
        max_attempts=config.preview_max_attempts,
        min_keep=config.preview_min_keep,
    )
    return gate
