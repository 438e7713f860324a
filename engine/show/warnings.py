"""What a practitioner would look at twice: found in a run's metrics and held-out scores, with the limit and the remedy.

`Watch` sees a run step by step and tells each warning once, for the terminal; `warnings_of` sees all of it, for the
report.  Both are one set of checks, whose limits stand here and nowhere else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .names import AT_CHANCE, BELOW_CHANCE, FELL
from .scores import ScoreRow, show_change, show_interval, show_score

WINDOW = 10
"""Steps that a mean is over, the newest ones: single steps are noisy."""
LEAST = 3
"""Steps before a mean is judged."""

CONSTANT_REWARD = 0.01
"""A reward's spread within a step, as a share of the largest reward's: below, it decides nothing."""
DEAD_GROUPS = 0.5
"""Share of groups in which all rewards are equal."""
LOST_ENTROPY = 0.1
"""Of a kind of token's entropy, as a share of its first `LEAST` steps'."""
NO_GUIDANCE = 0.01
"""Nats that guidance moves an image token's log-probability by, on average."""
CLIPPED = 0.3
"""Share of tokens whose change was cut off."""
TRUNCATED = 0.3
"""Share of texts that ran into their length limit."""
REPLAY = 0.5
"""Nats between the sampler's and the trainer's log-probability of a token: float32 has below .001, bf16 below .5."""

MODALITIES = ("text", "image")
Row = Mapping[str, Any]
"""A step's metrics by their names; None or NaN where there was nothing to measure."""


class Warned(NamedTuple):
    """Something to look at."""

    name: str
    """Of the check, and what it is about: `constant reward: judge`."""
    threshold: float
    words: str
    """What was found."""
    remedy: str
    first: int = 0
    """Step, counted from 1, at which it held first, and last; 0: it is about the held-out scores."""
    last: int = 0

    @property
    def text(self) -> str:
        """A sentence or two for a person."""
        span = f"step {self.first}" if self.first == self.last else f"first at step {self.first}, last at {self.last}"
        return f"{self.words}{f' ({span})' if self.first else ''}: {self.remedy}."


def warnings_of(rows: Sequence[Row], scores: Sequence[ScoreRow] = ()) -> list[Warned]:
    """Every warning of a run, in the order in which they came up.

    Args:
        rows: metrics.jsonl's, from the first step on.
        scores: `score_rows` before and after.
    """
    watch = Watch()
    for step, row in enumerate(rows, 1):
        watch.see(row, step)
    return [*watch.found.values(), *of_scores(scores)]


class Watch:
    """Sees a run's steps in their order."""

    def __init__(self) -> None:
        self.found: dict[str, Warned] = {}
        """By name: as it was last told, with the first and the last step at which it held."""
        self._window: deque[Row] = deque(maxlen=WINDOW)
        self._first: list[Row] = []
        self._failed = self._skipped = 0.0

    def see(self, row: Row, step: int) -> list[Warned]:
        """Takes a step, counted from 1; returns what it has to warn of that it did not before."""
        self._window.append(row)
        if len(self._first) < LEAST:
            self._first.append(row)
        self._failed += number(row, "reward_failures") or 0.0
        skipped = number(row, "updates_skipped")
        self._skipped += float("loss" in row and number(row, "loss") is None) if skipped is None else skipped
        seen = Seen(list(self._window), self._first, self._failed, self._skipped)
        new = []
        for warned in (warned for check in CHECKS for warned in check(seen)):
            known = self.found.get(warned.name)
            self.found[warned.name] = warned._replace(first=known.first if known else step, last=step)
            if known is None:
                new.append(self.found[warned.name])
        return new


@dataclass(frozen=True, slots=True)
class Seen:
    """What a check may look at."""

    window: list[Row]
    """The newest steps."""
    first: list[Row]
    """The run's first."""
    failed: float
    """Calls of rewards that failed, so far."""
    skipped: float
    """Updates that were not finite, so far."""

    def mean(self, name: str) -> float | None:
        """Over the window; None before there is enough to judge."""
        return _mean(self.window, name)


Check = Callable[[Seen], Iterator[Warned]]


def number(row: Row, name: str) -> float | None:
    """A finite metric; None for what is not there."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # not NaN, and no overflow


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [value for row in rows if (value := number(row, name)) is not None]
    return math.fsum(values) / len(values) if len(values) >= LEAST else None


# Checks ---------------------------------------------------------------------------------------------------------------


def _constant_rewards(seen: Seen) -> Iterator[Warned]:
    """A reward that says the same of every trajectory, or next to nothing beside the others."""
    names = dict.fromkeys(n.split("/")[1] for row in seen.window for n in row if n.startswith("rewards/"))
    spreads = {name: seen.mean(f"rewards/{name}/std") for name in names}
    known = {name: spread for name, spread in spreads.items() if spread is not None}
    for name, spread in known.items():
        level = seen.mean(f"rewards/{name}/mean") or 0.0
        if spread <= 1e-6 * abs(level) or spread < CONSTANT_REWARD * max(known.values()):
            yield Warned(
                f"constant reward: {name}",
                CONSTANT_REWARD,
                f"The reward {name!r} says the same of every trajectory, {level:.2f} on average with a spread of "
                f"{spread:.2g}, and decides nothing",
                "look at what it is given (samples/), or leave it out of --reward_funcs",
            )


def _failed_rewards(seen: Seen) -> Iterator[Warned]:
    if seen.failed > 0:
        yield Warned(
            "reward failed",
            0.0,
            f"Rewards that failed and were left out: {seen.failed:.0f}",
            "the run's output says why; --reward_timeout gives a slow one more seconds",
        )


def _no_reward(seen: Seen) -> Iterator[Warned]:
    newest = seen.window[-LEAST:]
    if len(newest) == LEAST and all("reward" in row and number(row, "reward") is None for row in newest):
        yield Warned(
            "no reward",
            0.0,
            f"No trajectory had a reward for {LEAST} steps, so nothing was learnt",
            "name one in --reward_funcs that applies to what the prompts ask for, which recipes/check_data.py lists",
        )


class Limit(NamedTuple):
    """A metric whose mean over the window, or newest value, is to stay on one side of a limit."""

    name: str
    metric: str
    limit: float
    words: str
    """With `{share:.0f}` in percent, or `{value}`."""
    remedy: str
    newest: bool = False
    """The newest step's value counts, and no mean."""
    least: bool = False
    """Below the limit is too little; else above it is too much."""


LIMITS = (
    Limit(
        "dead groups",
        "frac_reward_zero_std",
        DEAD_GROUPS,
        "{share:.0f} % of the groups had equal rewards and taught nothing",
        "draw such groups anew (--refill 3), double --num_generations, set --temperature 1 or above, or train on "
        "prompts that are right now and then",
    ),
    Limit(
        "guidance without effect",
        "rollout/guidance_logp_mean_abs",
        NO_GUIDANCE,
        "Guidance moves image tokens by {value:.2g} nats; the model draws alike with the prompt and without",
        "set --cfg_weight 1, which halves the time of drawing, or start from a --model that follows its prompts",
        newest=True,
        least=True,
    ),
    Limit(
        "clipped tokens",
        "clip_ratio/region_mean",
        CLIPPED,
        "{share:.0f} % of the tokens were clipped",
        "halve --learning_rate, or set --num_iterations 1",
    ),
    Limit(
        "truncated texts",
        "completions/clipped_ratio",
        TRUNCATED,
        "{share:.0f} % of the texts ran into their length limit",
        "double --max_completion_length",
    ),
    Limit(
        "sampler and trainer differ",
        "rollout/replay_logp_max_abs",
        REPLAY,
        "The sampler's and the trainer's log-probabilities of a token differed by {value:.2f} nats",
        "with --bf16 and guidance that is to be expected, and --importance_correction truncate weighs it; without "
        "--bf16 it is a fault of ours, please report it",
        newest=True,
    ),
)


def _limits(seen: Seen) -> Iterator[Warned]:
    for name, metric, limit, words, remedy, newest, least in LIMITS:
        value = number(seen.window[-1], metric) if newest else seen.mean(metric)
        if value is not None and (value < limit if least else value > limit):
            yield Warned(name, limit, words.format(share=100 * value, value=value), remedy)


def _lost_entropy(seen: Seen) -> Iterator[Warned]:
    for kind in MODALITIES:
        # Steps that trained on such tokens: of none the entropy is 0.
        first, window = (
            [row for row in rows if number(row, f"tokens/{kind}") != 0] for rows in (seen.first, seen.window)
        )
        start, now = _mean(first, f"entropy/{kind}"), _mean(window, f"entropy/{kind}")
        # As many steps again before it is judged, so that the beginning is not compared with itself.
        if start is not None and now is not None and len(seen.window) > LEAST and now < LOST_ENTROPY * start:
            yield Warned(
                f"entropy collapsed: {kind}",
                LOST_ENTROPY,
                f"The entropy of {kind} tokens fell from {start:.3f} to {now:.3f} nats; the model stopped exploring",
                "halve --learning_rate, or double --beta (0.02 where it is 0)",
            )


def _not_finite(seen: Seen) -> Iterator[Warned]:
    if seen.skipped > 0:
        yield Warned(
            "updates that were not finite",
            0.0,
            f"The loss or a gradient was not finite in {seen.skipped:.0f} updates, which were skipped",
            "halve --learning_rate, or halve --max_grad_norm",
        )


CHECKS: tuple[Check, ...] = (_no_reward, _failed_rewards, _constant_rewards, _limits, _lost_entropy, _not_finite)


# Scores ---------------------------------------------------------------------------------------------------------------


HOLD = "halve --learning_rate, or double --beta or (Sync-R1) --anchor_beta; look at its examples"
"""What keeps a model from losing what it can do."""


def of_scores(rows: Sequence[ScoreRow]) -> list[Warned]:
    """Tasks that fell, and tasks at which the model guesses: one warning for each, by the first of its measures that
    says so; the summary repeats them and is left out."""
    found: list[Warned] = []
    for task in dict.fromkeys(row.task for row in rows if row.family != "summary"):
        mine = [row for row in rows if row.task == task]
        fell = next((row for row in mine if FELL in row.marks), None)
        guessed = next((r for r in mine if r.after is not None and {AT_CHANCE, BELOW_CHANCE} & set(r.marks)), None)
        if fell is not None:
            change = f"{show_change(fell)} {show_interval(fell.change_interval, fell.unit, signed=True)}"
            before, after = (show_score(value, fell.unit) for value in (fell.before, fell.after))
            words = f"{_named(fell)} fell from {before} to {after}, by {change}"
            tail = f", and is now where guessing is ({show_score(guessed.chance, guessed.unit)})" if guessed else ""
            found.append(Warned(f"fell: {fell.name}", 0.0, words + tail, HOLD))
        elif guessed is not None:
            found.append(_guessed(guessed))
    return found


def _guessed(row: ScoreRow) -> Warned:
    """The remedy depends on what the starting model could do."""
    after = f"{show_score(row.after, row.unit)} {show_interval(row.after_interval, row.unit)}"
    words = f"{_named(row)} is at {after}, where guessing scores {show_score(row.chance, row.unit)}"
    chance = row.chance or 0.0
    if row.before_interval is not None and row.before_interval[0] > chance:
        words += f", and was at {show_score(row.before, row.unit)} before"
        return Warned(f"at chance: {row.name}", chance, words, HOLD)
    before = f"{show_score(row.before, row.unit)} {show_interval(row.before_interval, row.unit)}".strip()
    remedy = (
        f"the starting model was there, too ({before}), so that RL has little to make more likely; start from a "
        "--model that does better"
    )
    return Warned(f"at chance: {row.name}", chance, words, remedy)


def _named(row: ScoreRow) -> str:
    unit = f", {row.unit}" if row.unit and row.family != "drawings" else ""
    return f"{row.label} ({row.measure}{unit}, {row.num_items} items)"
