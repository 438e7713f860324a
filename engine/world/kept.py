"""What a training that makes something on first use has reached, in a file: one that is cut off goes on from there.

The parameters, AdamW's state and every generator of random numbers, so that the result is the same to the last bit. The
learning rate and the batches follow from the step and from the generators.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..whole_files import write_atomically

EVERY = 5.0
"""Seconds between two writings: what a kill costs at most."""
_STATES = ("step", "exp_avg", "exp_avg_sq")


class Kept:
    """A training's state at `path`, which need not exist yet.

    Args:
        path: of the file. Its name says what is made and by which code and settings: no other training may take it up.
        every: seconds between two writings.
    """

    def __init__(self, path: Path, every: float = EVERY) -> None:
        self.path, self._every, self._written = path, every, time.monotonic()
        self._generators: list[np.random.Generator | torch.Generator] = [torch.default_generator]
        self._tensors: dict[str, Tensor] = {}
        self._told: dict[str, Any] = {}
        self.steps = 0
        """That the file says are done; 0 without one, or with one that cannot be used."""
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(file.metadata()["told"])
                if told["torch"] == torch.__version__:  # another one may round in another way
                    self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    self._told, self.steps = told, int(told["steps"])
        except (SafetensorError, OSError, ValueError, TypeError, KeyError):
            path.unlink(missing_ok=True)  # damaged, though it is written whole: made anew

    def watch(self, generator: np.random.Generator | torch.Generator) -> None:
        """A generator that the training draws from, as it is before the first step; torch's own is watched already."""
        self._generators.append(generator)

    def restore(self, trained: Sequence[Tensor], optimizer: torch.optim.AdamW) -> int:
        """Puts everything back and returns how many steps are done.

        Args:
            trained: the parameters, in the order in which they were saved.
            optimizer: theirs.
        """
        if not self.steps:
            return 0
        with torch.no_grad():
            for index, parameter in enumerate(trained):
                parameter.copy_(self._tensors[f"trained.{index}"])
                # Those that no batch has reached yet have no state.
                held = {name: self._tensors.get(f"{name}.{index}") for name in _STATES}
                if held["step"] is not None:
                    optimizer.state[parameter] = held
        for index, generator in enumerate(self._generators):
            if isinstance(generator, torch.Generator):
                generator.set_state(self._tensors[f"generator.{index}"])
            else:
                generator.bit_generator.state = self._told["generators"][str(index)]
        self._tensors.clear()
        return self.steps

    def save(self, steps: int, trained: Sequence[Tensor], optimizer: torch.optim.AdamW) -> None:
        """Writes the state after `steps` steps where it is time to."""
        if time.monotonic() - self._written < self._every:
            return
        tensors = {f"trained.{index}": parameter.detach() for index, parameter in enumerate(trained)}
        for index, parameter in enumerate(trained):
            tensors |= {f"{name}.{index}": value for name, value in optimizer.state[parameter].items()}
        states: dict[str, Any] = {}
        for index, generator in enumerate(self._generators):
            if isinstance(generator, torch.Generator):
                tensors[f"generator.{index}"] = generator.get_state()
            else:
                states[str(index)] = generator.bit_generator.state
        told = {"steps": steps, "torch": torch.__version__, "generators": states}
        write_atomically(self.path, save(tensors, {"told": json.dumps(told)}))
        self.steps, self._written = steps, time.monotonic()
