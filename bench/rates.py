"""What this machine can do at most: bytes it reads in a second, and bare products of the model's own weights.

The floor of a rollout is made of work that nobody can leave out: every prompt, with its photo, through the model once;
every token through the decoder and its head at the row count of the batch, where the products cannot be faster than
reading the weights; keys and values read once per step, a prompt's once per group.

Dims: M rows of a product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

READ_BYTES = 1 << 29
"""More than any cache."""


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median wall time; a GPU is waited for."""
    on_gpu = torch.cuda.is_available()
    run()
    found = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def bandwidth(device: str) -> float:
    """Bytes per second of one pass over memory."""
    data = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / seconds_of(data.sum)


def linears(*modules: nn.Module) -> list[Tensor]:
    """The weights of every linear layer."""
    return [part.weight for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


@torch.no_grad()
def products(weights: Iterable[Tensor], rows: int) -> float:
    """Seconds of bare products of M rows with each weight, one after another, as a forward pass meets them."""
    weights = list(weights)
    inputs = {
        width: torch.randn(rows, width, dtype=weights[0].dtype, device=weights[0].device)
        for width in {weight.shape[1] for weight in weights}
    }
    return seconds_of(lambda: [nn.functional.linear(inputs[weight.shape[1]], weight) for weight in weights])


def num_bytes(weights: Iterable[Tensor]) -> int:
    """Of all weights."""
    return sum(weight.nbytes for weight in weights)


def rollout_floor(
    model: Any,
    *,
    device: str,
    num_photos: int,
    photo_rows: int,
    prompt_tokens: int,
    rows: int,
    steps: int,
    head: Iterable[Tensor],
    kv_read_bytes: float,
) -> dict[str, float]:
    """Seconds by part.

    Args:
        model: transformers' Janus.
        device: cpu or cuda.
        num_photos: encoded once each.
        photo_rows: embeddings of a photo.
        prompt_tokens: of all prompts, each once.
        rows: of a decoding step.
        steps: decoding steps.
        head: weights of the head.
        kv_read_bytes: keys and values read over all steps.
    """
    read = bandwidth(device)
    trunk = linears(model.model.language_model)
    step = [*trunk, *head]
    step_products, step_weights = products(step, rows), num_bytes(step) / read
    found = {
        "prompts": products(trunk, prompt_tokens),
        "steps": steps * max(step_products, step_weights),
        "keys and values": kv_read_bytes / read,
    }
    if num_photos:
        found["photos"] = num_photos * products(linears(model.model.vision_model, model.model.aligner), photo_rows)
    return found
