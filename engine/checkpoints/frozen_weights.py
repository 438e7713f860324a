"""Whether a starting model is the one that a checkpoint's run began with: a checkpoint holds what is trained alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..processes.group import place
from .optimizer_state import numel_of
from .sharded import everywhere

SAMPLES = 64
"""Of a frozen weight, at least, where it has so many elements."""


def frozen_fingerprint(model: nn.Module) -> str:
    """Of the model's shape and of some of every frozen weight: enough to tell another model, cheap for a large one.

    The same on any number of ranks and under every ZeRO stage.  Collective."""
    parameters = dict(model.named_parameters())
    frozen = [p for p in parameters.values() if not p.requires_grad]
    if any(hasattr(p, "ds_tensor") for p in frozen):  # ZeRO 3: each rank has a part of each
        parts = everywhere(lambda: [_bytes(_samples(p)) for p in frozen], "telling the frozen weights")
        samples = [b"".join(pieces) for pieces in zip(*parts, strict=True)]
    else:
        samples = [_bytes(_samples(p)) for p in frozen]
    told, digest = iter(samples), hashlib.sha256()
    for name, parameter in parameters.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        digest.update(f"{name} {list(shape)} {parameter.requires_grad}\n".encode())
        if not parameter.requires_grad:
            digest.update(next(told))
    return digest.hexdigest()


def fingerprint_of_format_1(model: nn.Module) -> str:
    """What format 1 tells: the same, but under ZeRO 3 of the shares that the asking rank has."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        digest.update(f"{name} {list(held.shape)} {parameter.requires_grad}\n".encode())
        if not parameter.requires_grad:
            digest.update(_bytes(held.reshape(-1)[:: _stride(held.numel())]))
    return digest.hexdigest()


def _samples(parameter: Tensor) -> Tensor:
    """Every so many elements of the flattened weight; under ZeRO 3 those of them that lie in this rank's share."""
    numel, share = numel_of(parameter), getattr(parameter, "ds_tensor", None)
    held = parameter.detach().reshape(-1) if share is None else share
    start = 0 if share is None else share.numel() * place()[0]
    mine: Tensor = held[: max(0, numel - start)]  # the last share is filled up
    return mine[-start % _stride(numel) :: _stride(numel)]


def _stride(numel: int) -> int:
    return max(1, numel // SAMPLES)


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
