"""What is asked of a training between two of its steps, and what it then does; `processes/interrupts.py` lists it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import Preempted
from ..learn.trainer import Trainer
from ..processes.interrupts import Interrupts
from ..show.runlog import NullRunLog, RunLog
from .resume import Checkpoints

SAVE = "SAVE"
"""A file of this name in a run's folder asks for a checkpoint and the model after the step under way."""


class StopRequests:
    """Asked between steps, on every rank, whether the training ends here: what one rank is asked for all do.

    Args:
        trainer: the training.
        checkpoints: its checkpoints.
        interrupts: what signals asked this rank for.
        log: of the run, in whose folder a file SAVE may appear.
        say: takes a line for the user.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        log: RunLog | NullRunLog,
        say: Callable[[str], None],
    ) -> None:
        self.trainer, self.checkpoints, self.interrupts, self.log, self.say = trainer, checkpoints, interrupts, log, say
        self._wish = log.folder / SAVE

    def __call__(self) -> bool:
        """True after Ctrl-C. Collective.

        Raises:
            Preempted: a checkpoint is saved, and the run is to end at once.
            CheckpointError: a checkpoint could not be written.
        """
        stop, preempt, save, failed = self._agreed()
        if failed:
            self.checkpoints.wait()  # raises, on all ranks at this same place
        if preempt or save:
            self._save_checkpoint()
        if save:
            self._save_model()
        if preempt:
            steps = self.trainer.step
            raise Preempted(f"stopped after {steps} steps; go on with --resume_from_checkpoint latest")
        return stop

    def _agreed(self) -> tuple[bool, ...]:
        """Whether any rank met Ctrl-C, SIGTERM or SIGUSR1, a file SAVE, or a checkpoint that it could not write."""
        learner = self.trainer.learner
        wished = learner.rank == 0 and self._wish.exists()
        own = [self.interrupts.stop, self.interrupts.preempt, wished, self.checkpoints.failed]
        return tuple(map(bool, learner.all_reduce(torch.tensor(own, dtype=torch.int32)).tolist()))

    def _save_checkpoint(self) -> None:
        self.log.sync()
        self.checkpoints.save(self.trainer)
        self.checkpoints.wait()

    def _save_model(self) -> None:
        folder = self.checkpoints.root / f"model_{self.trainer.step:06d}"
        self.trainer.learner.save(folder)
        self._wish.unlink(missing_ok=True)
        self.say(f"{SAVE}: a checkpoint and {folder}")
