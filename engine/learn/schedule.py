"""The learning rate of each step: warm-up, then the shape that `lr_scheduler_type` names, as transformers names them.

Sources: transformers' `get_scheduler` for the shapes. Its warm-up begins at 0 and so wastes a step; this one does not.
"""

from __future__ import annotations

import math

from ..settings.train_config import TrainConfig

FLOOR = 0.1
"""Share of the peak that the shapes `…_with_min_lr` end at."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step`, counted from 0: linear warm-up over `warmup_steps`, then down until `max_steps`."""
    shape, peak = config.lr_scheduler_type, config.learning_rate
    if shape == "constant":
        return peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if shape == "constant_with_warmup":
        return peak
    left = 1.0 - (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if shape.startswith("cosine"):
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return peak * (FLOOR + (1.0 - FLOOR) * left) if shape.endswith("_with_min_lr") else peak * left
