"""What the trainings of a CoRL run share: data, starting model, judges, the evaluation.

Without `--model` and `--data` they are the embedded ones, made on first use and kept in a cache folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..checkpoints.published import local_checkpoint
from ..data.questions import THINK_THEN_ANSWER
from ..data.samples import Sample
from ..errors import DataError
from ..evaluate.held_out import Evaluator
from ..learn.credit import CreditRule, shared_advantages
from ..methods.bad_rows import BadRows
from ..methods.judges import grader_of, world_reader, world_readers
from ..methods.sync_r1_parts import own_rewards
from ..policies.auto import load_policy
from ..policies.base import Policy
from ..policies.inputs import Inputs
from ..processes.group import local_device
from ..rewards.ensemble import RewardSet
from ..world.embedded import corl_base, prepare_x2x
from ..world.worlds import WORLDS
from .config import CorlConfig, Training
from .evaluator import evaluator_of
from .needs import check_needs
from .reward_parts import RewardParts
from .training_data import TrainingData

Report = Callable[[str], None]


def data_of(config: CorlConfig, rows: BadRows | None = None) -> TrainingData:
    """The run's data, and what their questions are put into: the tiny model knows the form without being told."""
    if config.data is None:
        return TrainingData(config, prepare_x2x(), None, rows)
    return TrainingData(config, config.data, THINK_THEN_ANSWER if config.think_instruction else None, rows)


class Parts:
    """Made once per run; the frozen copy of the starting model judges all of it.

    Args:
        config: the run's settings.
        report: takes lines about what is being made.
        data: what is trained on.
    """

    def __init__(self, config: CorlConfig, report: Report, data: TrainingData) -> None:
        self.config, self.data = config, data
        check_needs(config, data)  # before a base is trained, or a model loaded
        own = own_rewards(config)  # as well: a file that cannot be loaded is told at once
        self.base = str(corl_base(report=report)) if config.model is None else config.model
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        frozen = Inputs.of(config).given_to(load_policy(local_checkpoint(self.base, report), dtype=dtype))
        self.frozen: Policy = frozen.requires_grad_(False).eval().to(local_device())
        self._rewards = RewardParts(config, self.frozen, local_device(), report, own)
        self.evaluator = self._evaluator(report) if config.eval_samples else None

    def rewards(self, training: Training, policy: Policy, samples: Sequence[Sample]) -> RewardSet:
        """The rewards of one training of `policy`, as far as they judge what its samples ask for."""
        asked = {kind for sample in samples for prompt in sample for kind in prompt.segments}
        return self._rewards.of(training, policy, asked)

    def _evaluator(self, report: Report) -> Evaluator | None:
        try:
            benchmark = self.data.held_out()
        except DataError as error:
            report(f"no scores: {error}")
            return None
        # Only the rendered world says what a picture must show in words that can be read.
        world = WORLDS["rendered"]
        readers = world_readers(world, grader_of(self.frozen, world)) if self.config.data is None else None
        rewards = self._rewards.of("t2i", self.frozen) if "t2i" in benchmark else None
        return evaluator_of(
            self.config, benchmark, rewards, readers, None if readers is None else partial(world_reader, world)
        )


def credit_of_training(config: CorlConfig, name: Training, rewards: RewardSet) -> CreditRule | None:
    """What tokens of one training answer for; None: as `config.credit` says."""
    if config.unify != "advantage" or name != "unified":
        return None
    return partial(
        shared_advantages, rewards=rewards, scale=config.scale_rewards, text_weight=config.understanding_weight
    )
