"""What of torch belongs to the run, while code of a user's is loaded or called.

A file of rewards may begin with `torch.set_grad_enabled(False)` or `torch.set_default_dtype(torch.float64)`, which
suits a script that only scores; training wants gradients, and numbers of the model's own type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_left_alone() -> Iterator[None]:
    """Behind it torch's default dtype and device, grad mode and determinism are as they were before.

    Grad mode and default device are of the calling thread, the others of the process.  Generators are not put back:
    nothing here draws from torch's own."""
    dtype, device, has_grad = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    is_exact, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        if torch.get_default_device() != device:  # setting it slows every later call down
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(has_grad)
        torch.use_deterministic_algorithms(is_exact, warn_only=only_warns)
