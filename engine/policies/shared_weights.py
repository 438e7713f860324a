"""A policy's trained weights in memory that two processes see: one writes them, the other takes them over."""

from __future__ import annotations

import torch

from ..processes.beside import SharedBytes
from .base import Policy

ALIGNED = 64
"""Bytes that every tensor begins at a multiple of."""


class SharedWeights:
    """Room for what a policy trains; what is frozen both processes have from the same checkpoint.

    Args:
        policy: whose parameters say how much room; under ZeRO-3 they are not whole.
        descriptor: of the other process's memory; None makes it.
    """

    def __init__(self, policy: Policy, descriptor: int | None = None) -> None:
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad and p.numel()}
        self.layout = [[name, str(p.dtype), list(p.shape)] for name, p in trained.items()]
        """Name, dtype and shape of every tensor, in order; plain, so that two processes can compare theirs."""
        offsets, end = [], 0
        for parameter in trained.values():
            offsets.append(end)
            end += -(-parameter.numel() * parameter.element_size() // ALIGNED) * ALIGNED
        self.memory = SharedBytes(end, descriptor)
        self._vectors = {
            name: self.memory.vector(p.dtype, p.numel(), offset)
            for (name, p), offset in zip(trained.items(), offsets, strict=True)
        }

    @torch.no_grad()
    def write(self, policy: Policy) -> None:
        """Puts the policy's weights there; nobody must be reading."""
        for name, parameter in policy.named_parameters():
            if name in self._vectors:
                self._vectors[name].copy_(parameter.flatten())

    @torch.no_grad()
    def read(self, policy: Policy) -> None:
        """Gives the policy the weights that are there, in place."""
        for name, parameter in policy.named_parameters():
            if name in self._vectors:
                parameter.copy_(self._vectors[name].view(parameter.shape))
