"""An optimizer's state as plain tensors by parameter, out of DeepSpeed's wrappers: what exact resuming needs.

    master/NAME                   float32 weights that AdamW steps on
    exp_avg/NAME, exp_avg_sq/NAME its moments, once it has stepped
    step/NAME                     its count of steps

Of each parameter a rank has the elements that its part of the optimizer steps on, flattened.  Ranks hold them in their
order, whatever the ZeRO stage: 0 keeps all of them on every rank, 1 and 2 cut a group's flat vector into equal parts, 3
cuts each parameter.  So a whole parameter is what the ranks hold of it, one after the other, without what fills parts
up, and no description of the cuts is needed to cut it again for other ranks or another stage (recut.py).

Weights in the compute dtype are the masters rounded, so they are not kept: they are made again when a state is loaded.
Frozen weights belong to the starting model.  DeepSpeed's own files would do as well, but they are pickles.

Source: the attributes and the order of loading are those of DeepSpeed 0.19's `load_state_dict` of each wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..processes.group import place

MASTER, STEP = "master", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """What this rank's optimizer holds of a parameter: `length` elements from `start` on in the flattened parameter,
    from `offset` on in the flattened master."""

    name: str
    numel: int
    """Of the whole parameter."""
    master: int
    offset: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """[length] a view of this piece of a master or of one of its moments; DeepSpeed's are contiguous."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def optimizer_tensors(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """Everything of this rank that the next updates depend on, not copied.

    Args:
        optimizer: what `deepspeed.initialize` returned: a wrapper of any ZeRO stage, or torch's own AdamW.
        model: whose parameters it trains; they are named as there.
    """
    masters, states = masters_of(optimizer), states_of(optimizer)
    tensors: dict[str, Tensor] = {}
    for piece in pieces_of(optimizer, model):
        master = masters[piece.master]
        for kind, value in {MASTER: master, **states.get(master, {})}.items():
            tensors[f"{kind}/{piece.name}"] = value if kind == STEP else piece.of(value)
    return tensors


def pieces_of(optimizer: Any, model: nn.Module) -> list[Piece]:
    """What this rank holds of each trained parameter; those that it holds nothing of are left out.

    Raises:
        CheckpointError: the optimizer holds something that is no parameter of `model`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pieces = []
    for parameter, *where in _places(optimizer):
        if id(parameter) not in names:
            raise CheckpointError(
                f"{type(optimizer).__name__}: expected masters that are the model's parameters or made of them, got "
                f"one of shape {list(parameter.shape)}; use the version of DeepSpeed that constraints.txt names"
            )
        piece = Piece(names[id(parameter)], numel_of(parameter), *where)
        if piece.length > 0:
            pieces.append(piece)
    return pieces


def numel_of(parameter: Tensor) -> int:
    """Elements of the whole parameter, also where ZeRO 3 has taken it apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def masters_of(optimizer: Any) -> list[Tensor]:
    """What AdamW steps on, on this rank."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return list(optimizer.fp32_partitioned_groups_flat)
    # ZeRO 1 and 2 and bf16 without ZeRO put their masters into AdamW's own groups.
    return [master for group in _adamw(optimizer).param_groups for master in group["params"]]


def states_of(optimizer: Any) -> dict[Tensor, dict[str, Tensor]]:
    """AdamW's state of each master; empty before its first step."""
    states: dict[Tensor, dict[str, Tensor]] = _adamw(optimizer).state
    return states


def _adamw(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _places(optimizer: Any) -> Iterator[tuple[Tensor, int, int, int, int]]:
    """(parameter, master, offset, start, length) of every trained parameter; a length below 1: not here."""
    rank, _ = place()
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3: each parameter in equal parts
        for index, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                share = parameter.partition_numel()
                yield parameter, index, offset, share * rank, min(share, numel_of(parameter) - share * rank)
                offset += share
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2: each group's flat vector in equal parts
        for index, group in enumerate(optimizer.bit16_groups):
            flat = optimizer.bit16_groups_flat[index]
            parts = [part.numel() for part in optimizer.parallel_partitioned_bit16_groups[index]]
            begin, end = sum(parts[:rank]), sum(parts[: rank + 1])
            for parameter in group:  # each is a view of the flat vector, whatever was put between them
                at = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                first, last = max(at, begin), min(at + parameter.numel(), end)
                yield parameter, index, first - begin, first - at, last - first
    else:  # without ZeRO: each parameter its own master (float32), or one beside it (bf16)
        groups = getattr(optimizer, "fp16_groups", None) or [g["params"] for g in optimizer.param_groups]
        for index, parameter in enumerate(parameter for group in groups for parameter in group):
            yield parameter, index, 0, 0, parameter.numel()


@torch.no_grad()
def begin(optimizer: Any) -> None:
    """AdamW's state as it makes it before its first step, of the masters that it has none of."""
    states = states_of(optimizer)
    for master in masters_of(optimizer):
        if not states.get(master):
            states[master] = {STEP: torch.zeros(())}  # on the CPU, as AdamW keeps it
            states[master] |= {kind: torch.zeros_like(master) for kind in MOMENTS}


@torch.no_grad()
def put(target: Tensor, offset: int, values: Tensor) -> None:
    """Writes `values` [n] over `target`, flattened, from element `offset` on."""
    target.data.view(-1).narrow(0, offset, values.numel()).copy_(values)


@torch.no_grad()
def spread(optimizer: Any) -> None:
    """Makes the model's weights from the masters: rounds them to the compute dtype, and gives every rank the parts that
    others hold. Collective."""
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
