"""Checkpoints of format 1: an optimizer's masters and moments by number, as its ZeRO stage cuts them on its ranks.

    master.i, exp_avg.i, exp_avg_sq.i, step.i

Where one master ends inside of a group is not in the file, so the same ranks and the same stage alone can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .optimizer_state import MASTER, MOMENTS, STEP, begin, masters_of, put, states_of


def check_numbered(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError when `tensors` are not of this model, these ranks or this ZeRO stage."""
    masters = masters_of(optimizer)
    wanted = {f"{MASTER}.{index}": master.shape for index, master in enumerate(masters)}
    got = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(f"{MASTER}.")}
    if got != wanted:
        odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))[0]
        raise CheckpointError(
            f"the checkpoint's weights are not this run's: {odd} is {_shown(got.get(odd))} there, "
            f"{_shown(wanted.get(odd))} here; resume with the model and settings that it was saved with"
        )
    for name, tensor in tensors.items():
        kind, index = _split(name)
        if kind not in (MASTER, STEP, *MOMENTS) or not 0 <= index < len(masters):
            raise CheckpointError(f"the checkpoint's optimizer is not this run's: it has {name!r}; start a new run")
        shape = torch.Size() if kind == STEP else masters[index].shape
        if tensor.shape != shape:
            raise CheckpointError(f"the checkpoint's {name} is {_shown(tensor.shape)}, expected {_shown(shape)}")


def load_numbered(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors that were checked into the optimizer; `spread` then makes the weights of it."""
    masters, states = masters_of(optimizer), states_of(optimizer)
    if any(not name.startswith(f"{MASTER}.") for name in tensors):
        begin(optimizer)
    for name, value in tensors.items():
        kind, index = _split(name)
        master = masters[index]
        put(master if kind == MASTER else states[master][kind], 0, value.reshape(-1))


def _split(name: str) -> tuple[str, int]:
    kind, _, index = name.rpartition(".")
    return kind, int(index) if index.isascii() and index.isdigit() else -1


def _shown(shape: Any) -> str:
    return "absent" if shape is None else str(list(shape))
