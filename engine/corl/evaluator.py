"""Scores of a model on held-out drawing prompts and questions, with the run's own rewards and readers of attributes.

Answers are drawn twice, greedily and at temperature 1; pictures at temperature 1.  `mcq` and `oe` are scored by the
paper's binary accuracy, and by how often the form is kept; drawings by the attributes that they show, where the data
says which are right, and by every image reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..evaluate.held_out import Evaluation, Scores, choose
from ..evaluate.measures import attribute_metrics
from ..evaluate.tasks import tagged_scores
from ..policies.base import Policy
from ..records import Prompt, Rollout
from ..rewards.ensemble import RewardSet
from ..rewards.judge.attribute_judge import AttributeScorer
from ..rewards.reward import RewardFunction
from ..rewards.scoring import score
from ..rollout.sampler import Sampling, generate
from .config import CorlConfig

MAX_ROLLOUTS = 256
"""Sequences that are drawn at once."""
EXAMPLES = 4


class CorlEvaluator:
    """Scores any policy on the same held-out prompts.

    Args:
        config: sampling settings and the number of items of each task.
        benchmark: task -> prompts: t2i, mcq, oe.
        rewards: the run's; those of images are reported for drawings.
        scorers: readers of attributes by name, for data that says what a picture must show.
    """

    def __init__(
        self,
        config: CorlConfig,
        benchmark: Mapping[str, Sequence[Prompt]],
        rewards: RewardSet | None = None,
        scorers: Mapping[str, AttributeScorer] | None = None,
    ) -> None:
        self.config, self.scorers = config, scorers or {}
        self.prompts = {task: choose(prompts, config.eval_samples, 0) for task, prompts in benchmark.items()}
        self.image_rewards: dict[str, RewardFunction] = {}
        if rewards is not None:
            kinds = dict(zip(rewards.names, rewards.kinds, strict=True))
            self.image_rewards = {name: rewards.functions[name] for name in kinds if kinds[name] == "image"}

    def __call__(self, policy: Policy) -> Evaluation:
        """Draws, scores and averages; the same policy gives the same scores."""
        scores: Scores = {}
        examples: dict[str, list[Rollout]] = {}
        for task, prompts in self.prompts.items():
            sampled = self._draw(policy, prompts, 1.0)
            found = {"num_items": float(len(prompts))}
            if "text" in prompts[0].segments:
                found |= _answers(sampled, "sampled") | _answers(self._draw(policy, prompts, 0.0), "greedy")
            else:
                found |= self._drawings(sampled)
            scores[task] = found
            examples[task] = sampled[:: max(1, len(sampled) // EXAMPLES)][:EXAMPLES]
        return CorlScores(scores=scores, examples=examples)

    def _draw(self, policy: Policy, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        c = self.config
        sampling = Sampling(
            num_generations=1, temperature=temperature, max_text_tokens=c.max_completion_length,
            cfg_weight=c.eval_cfg_weight, seed=c.seed, step=-1,
        )  # fmt: skip
        parts = [prompts[i : i + MAX_ROLLOUTS] for i in range(0, len(prompts), MAX_ROLLOUTS)]
        return [rollout for part in parts for rollout in generate(policy, part, sampling)]

    def _drawings(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        pictures: list[Tensor] = [rollout.image for rollout in rollouts if rollout.image is not None]
        found: dict[str, float] = {}
        wanted = [rollout.prompt.attributes for rollout in rollouts]
        if self.scorers and all(wanted):
            found |= attribute_metrics(self.scorers, pictures, [attributes or {} for attributes in wanted])
        if self.image_rewards:
            table = score(rollouts, self.image_rewards, timeout=self.config.reward_timeout)
            found |= {
                f"reward/{name}": float(column[~column.isnan()].mean())
                for name, column in zip(table.names, table.values.unbind(1), strict=True)
                if not bool(column.isnan().all())
            }
        return found


class CorlScores(Evaluation):
    """`Evaluation` with CoRL's summary: understanding over mcq and oe, images by each reader or reward."""

    @property
    def summary(self) -> dict[str, float]:
        kept: dict[str, list[float]] = {}
        for metrics in self.scores.values():
            for name, value in metrics.items():
                head, _, how = name.partition("/")
                if head in ("score", "format"):
                    kept.setdefault(f"{'understanding' if head == 'score' else head}/{how}", []).append(value)
                elif head in ("attributes", "reward"):
                    kept.setdefault(f"image/{how}", []).append(value)
        return {name: sum(values) / len(values) for name, values in kept.items()}


def _answers(rollouts: Sequence[Rollout], how: str) -> dict[str, float]:
    found = tagged_scores([rollout.prompt for rollout in rollouts], [rollout.text for rollout in rollouts])
    return {f"{name}/{how}": found[name] for name in ("score", "format") if name in found}
