"""Every public op among threads, after a fork, under autocast, in deterministic mode and in an exported program.

Bits are promised of our own kernels; torch's matrix products may differ in the last ones with threads and alignment.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence

import pytest
import torch
from backends import BACKENDS, NIGHTLY
from op_calls import DIFFERENTIABLE, OPS, Leaves, trained_outputs
from torch import Tensor, nn

UNITS = {name: 8 if name == "shared_prefix_attention" else 40 for name in OPS}
WITH_PRODUCTS = ("linear_logp", "linear_grpo_loss", "shared_prefix_attention")
NUM_THREADS, ROUNDS = 8, 60 if NIGHTLY else 20


def results(name: str, backend: str | None = None) -> list[Tensor]:
    """Values and gradients of one call on fresh tensors."""
    op, units = OPS[name], UNITS[name]
    if name not in DIFFERENTIABLE:
        inputs = op.inputs(units)
        return [*op.values(inputs, backend), *(x for n, x in inputs.items() if n.startswith("own_"))]
    values, grads = trained_outputs(name, op.inputs(units, grad=True), backend)
    return [*values, *grads]


def differs(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    if name not in WITH_PRODUCTS:
        return not all(a.equal(b) for a, b in zip(found, expected, strict=True))
    pairs = zip(found, expected, strict=True)
    return not all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_threads_at_once(backend: str) -> None:
    """The workspace, the caches of settings and plans, and the library's own threads: no call sees another's."""
    expected = {name: results(name, backend) for name in OPS}
    wrong: list[str] = []
    start = threading.Barrier(NUM_THREADS)

    def work(index: int) -> None:
        names = list(OPS)[index % len(OPS) :] + list(OPS)[: index % len(OPS)]
        start.wait()
        for _ in range(ROUNDS):
            for name in names:
                try:
                    if differs(name, results(name, backend), expected[name]):
                        wrong.append(f"{name}: other values")
                except Exception as error:  # in a thread it would only be printed
                    wrong.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]


def _in_child(expected: dict[str, list[Tensor]], answer: multiprocessing.SimpleQueue[list[str]]) -> None:
    torch.set_num_threads(1)  # as a data loader's worker does: OpenMP's other threads are gone
    try:
        answer.put([name for name, values in expected.items() if differs(name, results(name), values)])
    except Exception as error:  # the parent waits for an answer
        answer.put([repr(error)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork() -> None:
    """As the workers of a data loader are made: caches, workspace and the library's state are copied into the child."""
    expected = {name: results(name) for name in OPS}
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(expected, answer), daemon=True)
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0 and answer.get() == []
    assert not any(differs(name, results(name), values) for name, values in expected.items())


@pytest.mark.parametrize("name", OPS)
def test_under_autocast(name: str) -> None:
    """Linear heads run in its dtype, as nn.Linear does; nothing else changes."""
    expected = results(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(name)
    if not name.startswith("linear"):
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
        return
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    assert any(not a.equal(b) for a, b in zip(found, expected, strict=True))
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), plain.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_in_deterministic_mode(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Nothing raises, and two runs are the same bits."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    expected = results(name, backend)
    torch.use_deterministic_algorithms(True)
    first, second = results(name, backend), results(name, backend)
    for mine, again, plain in zip(first, second, expected, strict=True):
        assert mine.equal(again)
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)


class Calls(nn.Module):
    """One op as a module; export asks for one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, inputs: Leaves) -> list[Tensor]:
        return OPS[self.name].values(inputs)


@pytest.mark.parametrize("name", OPS)
def test_exported(name: str) -> None:
    inputs = OPS[name].inputs(UNITS[name])
    expected = OPS[name].values({n: x.clone() for n, x in inputs.items()})
    program = torch.export.export(Calls(name), (inputs,))
    found = program.module()({n: x.clone() for n, x in OPS[name].inputs(UNITS[name]).items()})
    assert any(f"syncr1.{name}" in str(node.target) for node in program.graph.nodes)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
