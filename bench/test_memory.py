"""Peak memory of `linear_grpo_loss` beside that of the peers, each provider in a process of its own on a CPU.

pytest bench/test_memory.py -s       bytes are printed and land in the extra_info of --benchmark-json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases_of
from goals import MIB, hidden_bytes, workspace_bytes
from memory import peak

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [
    pytest.param(name, provider.name, id=f"{name}-{provider.name}")
    for name, (case, shape) in cases_of(DEVICE, quick=True).items()
    if case.memory
    for provider in case.build(shape)
]


@pytest.mark.parametrize(("name", "provider"), PAIRS)
def test_peak(request: pytest.FixtureRequest, benchmark: Any, name: str, provider: str) -> None:
    quick = bool(request.config.getoption("--quick"))
    _, shape = cases_of(DEVICE, quick)[name]
    benchmark.group = f"{name}, {shape}"
    found = benchmark.pedantic(peak, (name, provider, DEVICE, quick), rounds=1)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    benchmark.extra_info |= found | {"dhidden": hidden_bytes(shape), "workspace_and_dweight": workspace_bytes(shape)}
    print(
        f"\n{name}, {provider}: {found['bytes'] / MIB:.0f} MiB, {hidden_bytes(shape) / MIB:.0f} of them dX; "
        f"one chunk's workspace + dW are {workspace_bytes(shape) / MIB:.0f} MiB"
    )
