"""The random generators of a process as plain tensors, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """The generators of Python, NumPy, torch and the GPU, as tensors."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([int(word) for word in (*legacy[1], legacy[2], legacy[3])], dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy[4]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_random_state(state: Mapping[str, Tensor]) -> None:
    """What `random_state` told; a GPU's is left out where there is none."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *words, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
