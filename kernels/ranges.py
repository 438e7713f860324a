"""Which numbers an option may be: one rule for every op and every backend, checked before anything is computed.

A number is an int or a float of Python or NumPy, or what stands for one while torch.compile traces. A bool is none,
neither is a tensor: reading it would make a GPU wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .checks import check_modality_keys, refuse

NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)
WHOLE = (int, torch.SymInt, Integral)
INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class Range:
    """The values of one option."""

    words: str
    """As the message says it."""
    holds: Callable[[float], bool]
    """Of a finite number."""
    remedy: str
    whole: bool = False
    optional: bool = False
    """None is a value, too."""

    def check(self, op: str, name: str, value: object) -> None:
        """Raises ValueError naming `op`, the option, what was expected, what came and the remedy."""
        if value is None and self.optional:
            return
        number = isinstance(value, WHOLE if self.whole else NUMBERS) and not isinstance(value, bool)
        if number and isinstance(value, (torch.SymFloat, torch.SymInt)):
            return  # traced: unknown until it runs
        # Comparisons in place of math.isfinite, which torch.compile cannot trace.
        if not number or not (-math.inf < value < math.inf and self.holds(value)):  # type: ignore[operator, arg-type]
            refuse(op, name, self.words, repr(value), self.remedy)


def _at_least_0(value: float) -> bool:
    return value >= 0


def _above_0(value: float) -> bool:
    return value > 0


def _fraction(value: float) -> bool:
    return 0 < value <= 1


EPS = Range("a finite number ≥ 0", _at_least_0, "it is added to a standard deviation; 1e-4 is usual")
MASS = Range("a number in (0, 1]", _fraction, "it is a fraction of the group's Σ A²")
KEEP = Range("an int ≥ 1, or None", lambda v: v >= 1, "None keeps half of each group", whole=True, optional=True)
MIN_KEEP = Range("an int ≥ 0", _at_least_0, "0 switches it off", whole=True)
SEED = Range("an int64", lambda v: -INT64 <= v < INT64, "reduce it modulo 2**63", whole=True)
TEMPERATURE = Range("a finite number > 0", _above_0, "greedy decoding scores at temperature 1")
ATTENTION_SCALE = Range(
    "a finite number > 0, or None", _above_0, "None is 1/√E; multiply the queries by any other factor", optional=True
)
SAMPLING: dict[str, Range] = {
    "cfg_weight": Range("a finite number", lambda v: True, "1 is no guidance, 5 Janus's usual one"),
    "temperature": Range("a finite number ≥ 0", _at_least_0, "0 is greedy"),
    "top_k": Range("an int ≥ 0", _at_least_0, "0 switches it off", whole=True),
    "top_p": Range("a number in (0, 1]", _fraction, "1.0 switches it off"),
    "min_p": Range("a number in [0, 1]", lambda v: 0 <= v <= 1, "0.0 switches it off"),
}
"""Numbers of `cfg_sample`."""

_CLIP = "it is a distance from ratio 1; for next to no bound pass 1e9"
_COUNT = "it is a divisor, and below 1 counts as 1"
_SHAPE = "leave it at its default, or see kernels/README.md"
LOSS: dict[str, Range] = {
    "clip_low": Range("a finite number ≥ 0", _at_least_0, _CLIP),
    "clip_high": Range("a finite number ≥ 0", _at_least_0, _CLIP),
    "delta": Range(
        "a finite number > 0, or None", _above_0, "None is no bound; more than 1 + clip_high is usual", optional=True
    ),
    "beta": Range("a finite number ≥ 0", _at_least_0, "below 0 it would drive the policy away from the reference"),
    "weight": Range("a finite number ≥ 0", _at_least_0, "below 0 it would turn the loss round; 0 switches it off"),
    "eps": EPS,
    "dgs_mass": MASS,
    "dgs_keep": KEEP,
    "dgs_min_keep": MIN_KEEP,
    "dgs_seed": SEED,
    "num_items": Range("a finite number ≥ 0, or None", _at_least_0, _COUNT, optional=True),
    "num_sequences": Range("a finite number ≥ 0, or None", _at_least_0, _COUNT, optional=True),
    "max_length": Range("an int > 0, or None", _above_0, "pass the completion length limit", whole=True, optional=True),
    "top_entropy_quantile": Range("a number in (0, 1]", _fraction, "1.0 uses every token"),
    "sapo_temperature_pos": Range("a finite number > 0", _above_0, _SHAPE),
    "sapo_temperature_neg": Range("a finite number > 0", _above_0, _SHAPE),
    "vespo_k_pos": Range("a finite number ≥ 0", _at_least_0, _SHAPE),
    "vespo_lambda_pos": Range("a finite number ≥ 0", _at_least_0, _SHAPE),
    "vespo_k_neg": Range("a finite number ≥ 0", _at_least_0, _SHAPE),
    "vespo_lambda_neg": Range("a finite number ≥ 0", _at_least_0, _SHAPE),
}
"""Numbers of `LossOptions`."""
BY_MODALITY = ("clip_low", "clip_high", "delta", "beta", "weight", "num_items")
"""Those that may be a dict of one number for text and one for images."""
SWITCHES = ("bias_corrected_kl", "score_all")


def check_loss_numbers(op: str, name: str, value: object) -> None:
    """A number of `LossOptions`, or a dict of them."""
    if name in BY_MODALITY and isinstance(value, Mapping):
        check_modality_keys(op, name, value)
        for modality, part in value.items():
            LOSS[name].check(op, f"{name}[{modality!r}]", part)
    else:
        LOSS[name].check(op, name, value)


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        refuse(op, name, f"one of {', '.join(choices)}", repr(value), "check the spelling")


def check_switch(op: str, name: str, value: object) -> None:
    """`value` is a bool."""
    if not isinstance(value, bool):
        refuse(op, name, "True or False", repr(value), "pass a bool")
