"""An optimizer's state as plain tensors, out of DeepSpeed's wrappers and back: what exact resuming needs.

    master.i          float32 weights that AdamW steps on: a parameter (ZeRO 0), or this rank's share of a flat group
    step.i, exp_avg.i, exp_avg_sq.i      AdamW's state of it

Weights in the compute dtype are the masters rounded, so they are not kept: they are made again when a state is loaded.
Frozen weights belong to the starting model.  DeepSpeed's own files would do as well, but they are pickles.

Source: the attributes and the order of loading are those of DeepSpeed 0.19's `load_state_dict` of each wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

MASTER = "master"
STATES = ("step", "exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Everything that the next updates depend on, not copied.

    Args:
        optimizer: what `deepspeed.initialize` returned: a wrapper of any ZeRO stage, or torch's own AdamW.
    """
    states = _adamw(optimizer).state
    tensors: dict[str, Tensor] = {}
    for index, master in enumerate(_masters(optimizer)):
        tensors[f"{MASTER}.{index}"] = master
        for name, value in states.get(master, {}).items():
            tensors[f"{name}.{index}"] = value
    return tensors


def check_optimizer_tensors(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError when `tensors` are not of this model, these ranks or this ZeRO stage."""
    masters = _masters(optimizer)
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
        if kind not in (MASTER, *STATES) or not 0 <= index < len(masters):
            raise CheckpointError(f"the checkpoint's optimizer is not this run's: it has {name!r}; start a new run")
        shape = torch.Size() if kind == "step" else masters[index].shape
        if tensor.shape != shape:
            raise CheckpointError(f"the checkpoint's {name} is {_shown(tensor.shape)}, expected {_shown(shape)}")


@torch.no_grad()
def load_optimizer_tensors(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors that were checked back and makes the model's weights from them. Collective: they are gathered."""
    masters, states = _masters(optimizer), _adamw(optimizer).state
    for name, value in tensors.items():
        kind, index = _split(name)
        master = masters[index]
        if kind == MASTER:
            master.data.copy_(value)
        elif kind in states[master]:
            states[master][kind].copy_(value)  # in place: DeepSpeed may hold views of it
        else:  # AdamW keeps its count of steps on the CPU
            states[master][kind] = value.clone() if kind == "step" else value.to(master.device, copy=True)
    _spread(optimizer)


def _split(name: str) -> tuple[str, int]:
    kind, _, index = name.rpartition(".")
    return kind, int(index) if index.isascii() and index.isdigit() else -1


def _shown(shape: Any) -> str:
    return "absent" if shape is None else str(list(shape))


def _adamw(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _masters(optimizer: Any) -> list[Tensor]:
    return list(_find_masters(optimizer))


def _find_masters(optimizer: Any) -> Iterator[Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        yield from optimizer.fp32_partitioned_groups_flat
    else:  # ZeRO 1 and 2 and the bf16 wrappers put their masters into AdamW's own groups
        for group in _adamw(optimizer).param_groups:
            yield from group["params"]


def _spread(optimizer: Any) -> None:
    """Rounds the masters to the compute dtype, and gives every rank the parts that others hold."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat = optimizer.fp16_partitioned_groups_flat[index]
            flat.data.copy_(master.data)
            shares = optimizer.fp16_partitioned_groups[index]
            for share, value in zip(shares, optimizer.unflatten(flat, shares), strict=True):
                share.data = value.data
        if optimizer.persistent_parameters:  # small ones that every rank holds whole
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):  # bf16 without ZeRO
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)
