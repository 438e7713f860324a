"""Time of the public ops per backend, at the shapes of the embedded default and at Janus-Pro's image vocabulary.

    pytest bench/                                 interleaved rounds, medians; no assertion on time
    pytest bench/ --benchmark-json=bench/results/ops.json

Floors: an op that reads its logits once needs bytes / memory bandwidth; `memory_read` is that floor, measured here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from syncr1.kernels.api import TokenStream, cfg_sample, dgs_select, group_advantages, linear_grpo_loss, selective_logp

BACKENDS = ("reference", "native")
SHAPES = {"tiny": (4096, 600), "image vocabulary": (512, 16384)}


def groups(num_groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.rand(num_groups * size), torch.arange(0, num_groups * size + 1, size, dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_read(benchmark: Any, shape: str) -> None:
    rows, vocabulary = SHAPES[shape]
    logits = torch.randn(rows, vocabulary)
    benchmark.group = f"selective_logp, {shape}"
    benchmark(logits.sum)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_selective_logp(benchmark: Any, shape: str, backend: str) -> None:
    rows, vocabulary = SHAPES[shape]
    logits, targets = torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    benchmark.group = f"selective_logp, {shape}"
    benchmark(selective_logp, logits, targets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [group_advantages, dgs_select], ids=lambda op: op.__name__)
def test_group_statistics(benchmark: Any, op: Any, backend: str) -> None:
    rewards, offsets = groups(50, 8)
    benchmark.group = f"{op.__name__}, 50 groups of 8"
    benchmark(op, rewards, offsets, backend=backend)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "cfg"])
def test_cfg_sample(benchmark: Any, guided: bool) -> None:
    cond, uncond = torch.randn(256, 256), torch.randn(256, 256)
    benchmark.group = "cfg_sample, 256 x 256"
    benchmark(
        cfg_sample,
        cond,
        uncond if guided else None,
        cfg_weight=1.5 if guided else 1.0,
        temperature=1.0,
        seed=1,
        offset=3,
    )


def bare(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, advantage: torch.Tensor) -> None:
    """The least that any implementation does: one product, log-softmax, gather, and their gradients."""
    logp = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    (-(advantage * logp).mean()).backward()


@pytest.mark.parametrize("what", ["bare autograd", "linear_grpo_loss"])
def test_linear_grpo_loss(benchmark: Any, what: str) -> None:
    rewards, offsets = groups(16, 8)
    length, hidden_size, vocabulary = 16, 128, 256
    tokens = rewards.numel() * length
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    stream = TokenStream(hidden, weight, targets, torch.arange(tokens))
    advantage = group_advantages(rewards, offsets).repeat_interleave(length)

    def fused() -> None:
        linear_grpo_loss([stream], rewards, cu_seqlens, offsets, num_items=tokens).loss.backward()

    benchmark.group = "linear_grpo_loss, 2048 x 128 x 256, forward and backward"
    benchmark(fused if what == "linear_grpo_loss" else lambda: bare(hidden, weight, targets, advantage))
