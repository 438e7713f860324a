"""Held-out scores while a training goes on, and the best model so far, kept whole in `checkpoints/best`.

Scoring takes no random number from the training: the states of all generators are put back, so that a run with
`eval_steps` learns what it would learn without, to the last bit.  What was best is written into that folder, so that it
outlives the process; a resumed run scores the steps that come again, finds the same, and goes on from there.
"""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..evaluate.held_out import Evaluation, Evaluator, Scores
from ..learn.learner import Learner
from ..records import StepMetrics
from ..settings.train_config import TrainConfig
from ..show.names import GENERAL, SUMMARY
from ..show.scores import flatten_scores, show_score
from .resume import load_random_state, random_state

BEST = "best"
"""Folder below `checkpoints/`; `save_total_limit` counts checkpoints to resume from alone."""
RECORD = "best.json"
"""In that folder: which step's model it is, and by what score."""
SCORE = "score"
"""Name of the mean of main scores."""

MAIN = ("all_right/cnn", "all_right/", "score/sampled", "score/greedy", "attributes/", "reward/")
"""A task's main score is the first of these that it has: whole drawings right, by the network that training never saw
where there is one, an answer drawn as in training, attributes right, a reward."""

OF_SCORES = frozenset({"eval_samples", "eval_cfg_weight", "max_completion_length", "seed"})
"""Settings that another best score cannot be compared under."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best model so far."""

    step: int
    """After how many steps."""
    metric: str
    value: float
    measured: dict[str, Any]
    """`OF_SCORES` as they were."""


class HeldOut:
    """Scores the model of one training on its way. Every rank makes one and calls it at the same steps.

    Args:
        config: of the training.
        learner: whose model.
        evaluator: None: nothing is held out.
        before: scores of the starting model; None where there are none.
        tasks: whose main scores count; none: all but the general ones, which are not trained.
        root: folder of checkpoints.
        card: writes the model's card into a folder.
        say: takes lines for people.

    Raises:
        ConfigError: no such metric_for_best_model.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        evaluator: Evaluator | None,
        before: Evaluation | None,
        tasks: frozenset[str],
        root: Path,
        card: Callable[[Path, Evaluation], None],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.learner, self.evaluator, self.tasks = config, learner, evaluator, tasks
        self.folder, self._card, self._say = root / BEST, card, say
        self._every = config.eval_steps if evaluator is not None else 0
        self._before = {} if before is None else self._values(before)
        self.metric = metric_of(config.metric_for_best_model, self._before) if self._every else SCORE
        self.best = self._kept() if self._every else None
        self._last: tuple[int, Evaluation] | None = None
        self._best_evaluation: Evaluation | None = None
        if config.eval_steps and evaluator is None:
            say("eval_steps: the data holds nothing out, so nothing is scored on the way")

    def due(self, num_steps: int) -> bool:
        """Whether the model is scored after so many steps."""
        return self._every > 0 and num_steps % self._every == 0

    def with_scores(self, metrics: StepMetrics, num_steps: int) -> StepMetrics:
        """A step's metrics and, as `eval/…`, the scores of the model that it left, which is kept if it is the best.
        Collective."""
        started = time.perf_counter()
        evaluation = self._score(num_steps)
        values = self._consider(num_steps, evaluation)
        seconds = {**metrics.seconds, "evaluation": time.perf_counter() - started}
        named = {f"eval/{name}": value for name, value in values.items()}
        return replace(metrics, values={**metrics.values, **named}, seconds=seconds)

    def at_the_end(self, num_steps: int) -> Evaluation | None:
        """Scores of the model as it is now, which may be the best as well. Collective."""
        if self._last is not None and self._last[0] == num_steps:
            return self._last[1]
        if self.evaluator is None:
            return None
        evaluation = self._score(num_steps)
        if self._every:
            self._consider(num_steps, evaluation)
        return evaluation

    def result(
        self, last: Path, after: Evaluation | None, score_again: Callable[[Path], Evaluation]
    ) -> tuple[Path, Evaluation | None]:
        """The model that the training leaves, and its scores: the last step's, or the best one's.

        Args:
            last: folder of the last step's model.
            after: its scores.
            score_again: scores a saved model, where the best one's scores went with another process.
        """
        if self.best is None:
            return last, after
        self._say(f"best model: step {self.best.step}, {self.metric} {show_score(self.best.value)}, {self.folder}")
        before = self._before.get(self.metric)
        if before is not None and self.best.value < before:
            self._say(f"no model was better than the starting one, whose {self.metric} is {show_score(before)}")
        if not self.config.load_best_model_at_end:
            return last, after
        return self.folder, self._best_evaluation or score_again(self.folder)

    def _score(self, num_steps: int) -> Evaluation:
        assert self.evaluator is not None
        with undisturbed(), self.learner.sampling() as policy:
            evaluation = self.evaluator(policy)
        self._last = num_steps, evaluation
        return evaluation

    def _consider(self, num_steps: int, evaluation: Evaluation) -> dict[str, float]:
        """Keeps the model if its score is the best so far; rank 0 decides, since others may round otherwise."""
        values = self._values(evaluation)
        value = values.get(self.metric, math.nan)
        is_best = self._agreed(value > (-math.inf if self.best is None else self.best.value))
        known = "" if self.metric not in self._before else f" (before {show_score(self._before[self.metric])})"
        told = f"step {num_steps}: held-out {self.metric} {show_score(None if math.isnan(value) else value)}{known}"
        self._say(told + (f", the best so far: checkpoints/{BEST}" if is_best else ""))
        if not is_best:
            return values
        self.best = Best(num_steps, self.metric, value, self._measured())
        self._best_evaluation = evaluation
        record = json.dumps(asdict(self.best), indent=2) + "\n"
        self.learner.save(self.folder, lambda draft: (draft / RECORD).write_text(record, encoding="utf-8"))
        self._card(self.folder, evaluation)
        return values

    def _agreed(self, yes: bool) -> bool:
        """Rank 0's answer, on every rank."""
        return bool(self.learner.all_reduce(torch.tensor([float(yes and self.learner.rank == 0)])) > 0)

    def _values(self, evaluation: Evaluation) -> dict[str, float]:
        """Every finite score by its name in scores.json, and the mean of main scores."""
        flat = flatten_scores({**evaluation.scores, SUMMARY: evaluation.summary})
        main = main_score(evaluation.scores, self.tasks)
        named = {SCORE: None if math.isnan(main) else main, **flat}
        return {name: value for name, value in named.items() if value is not None and not name.endswith("/num_items")}

    def _measured(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in sorted(OF_SCORES)}

    def _kept(self) -> Best | None:
        """What a run before this one has kept, if it was measured as this one measures."""
        try:
            kept = Best(**json.loads((self.folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        if (kept.metric, kept.measured) != (self.metric, self._measured()) or not isinstance(kept.value, float):
            self._say(
                f"{self.folder}: its score was measured otherwise ({kept.metric}, {kept.measured}); starting anew"
            )
            return None
        return kept


def metric_of(asked: str | None, known: Iterable[str]) -> str:
    """The name of the score that says which model is best; transformers' `eval_` before it is left out.

    Raises:
        ConfigError: none of the known ones.
    """
    names = list(known)
    wanted = (asked or SCORE).removeprefix("eval_").removeprefix("eval/")
    if wanted in names or asked is None:
        return wanted
    near = difflib.get_close_matches(wanted, names, n=1) or [name for name in names if wanted in name][:1]
    remedy = f"did you mean {near[0]}?" if near else f"take {SCORE}, or a name in scores.json"
    raise ConfigError(f"metric_for_best_model: expected one of {len(names)} held-out scores, got {asked}; {remedy}")


def main_score(scores: Scores, tasks: frozenset[str] = frozenset()) -> float:
    """Mean over tasks of each one's main score; NaN where none has any.

    Args:
        scores: by task.
        tasks: that count; none, or none of these: all but the general ones.
    """
    counted = [task for task in scores if task in tasks] or [task for task in scores if task not in GENERAL]
    found = [value for value in (_main(scores[task]) for task in counted) if not math.isnan(value)]
    return math.fsum(found) / len(found) if found else math.nan


def _main(measures: dict[str, float]) -> float:
    return next(
        (
            value
            for wanted in MAIN
            for name, value in measures.items()
            if (name.startswith(wanted) if wanted.endswith("/") else name == wanted)
        ),
        math.nan,
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts the states of all generators back, whatever the block draws."""
    state = random_state()
    try:
        yield
    finally:
        load_random_state(state)
