"""The C++ backend against the reference. Skipped, with the reason, where the library was not built."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncr1.kernels import dispatch, native
from syncr1.kernels.api import BackendError, dgs_select, group_advantages, grpo_loss, selective_logp
from syncr1.kernels.options import RULES, SCALES

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason())),
]
REWARD = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, -4.5, math.nan]) | st.floats(-9, 9, width=32)
GROUPS = st.lists(st.lists(REWARD, max_size=9), max_size=5)


def packed(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(g) for g in groups], dtype=torch.int64)
    return torch.tensor([r for g in groups for r in g]), torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


@pytest.mark.parametrize("scale", SCALES)
@given(groups=GROUPS)
def test_group_advantages(groups: list[list[float]], scale: str) -> None:
    rewards, offsets = packed(groups)
    results = [group_advantages(rewards, offsets, scale=scale, backend=b) for b in ("native", "reference")]  # type: ignore[arg-type]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert (results[0] == 0).equal(results[1] == 0)


@pytest.mark.parametrize("rule", RULES)
@given(groups=GROUPS, mass=st.sampled_from([0.25, 0.5, 0.9, 1.0]), keep=st.none() | st.integers(1, 5))
def test_dgs_select(groups: list[list[float]], rule: str, mass: float, keep: int | None) -> None:
    rewards, offsets = packed(groups)
    settings = {"rule": rule, "mass": mass, "keep": keep, "min_keep": 1, "seed": 2**40 + 3}
    results = [dgs_select(rewards, offsets, backend=b, **settings) for b in ("native", "reference")]  # type: ignore[arg-type]
    assert results[0].equal(results[1])


def test_components_and_modalities() -> None:
    rewards, offsets, weights = torch.rand(12, 3), torch.tensor([0, 5, 12]), torch.tensor([1.0, 0.0, 2.0])
    for aggregate in ("sum_then_normalize", "normalize_then_sum"):
        results = [
            group_advantages(rewards, offsets, weights=weights, aggregate=aggregate, backend=b)  # type: ignore[arg-type]
            for b in ("native", "reference")
        ]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    both = {"text": rewards[:, 0], "image": rewards[:, 1]}
    assert dgs_select(both, offsets, backend="native").equal(dgs_select(both, offsets, backend="reference"))


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 7), (1, 1), (5, 63), (33, 507), (9, 16384)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_logp_is_as_accurate_as_the_reference(rows: int, vocabulary: int, temperature: float) -> None:
    logits, targets = 6 * torch.randn(rows, vocabulary), torch.randint(0, vocabulary, (rows,))
    forbidden = torch.arange(0, vocabulary, 5)[1:]
    targets = torch.where(torch.isin(targets, forbidden), 0, targets)
    arguments = {"temperature": temperature, "forbidden": forbidden}
    truth = selective_logp(logits.double(), targets, **arguments, backend="reference")  # type: ignore[arg-type]
    mine = selective_logp(logits, targets, **arguments, backend="native")  # type: ignore[arg-type]
    theirs = selective_logp(logits, targets, **arguments, backend="reference")  # type: ignore[arg-type]
    for native_value, reference_value, exact in zip(mine, theirs, truth, strict=True):
        if rows:
            assert (native_value - exact).abs().max() <= 2 * (reference_value - exact).abs().max() + 1e-6


def test_selective_logp_of_views_forbidden_targets_and_infinite_logits() -> None:
    logits = torch.randn(6, 20)
    targets = torch.tensor([0, 1, 2])
    for view in (logits[::2], logits[:3, 5:], logits.t()[:3]):
        torch.testing.assert_close(
            selective_logp(view, targets, backend="native"), selective_logp(view, targets, backend="reference")
        )
    masked = logits[:3].clone()
    masked[:, 7] = -torch.inf
    logp, entropy = selective_logp(masked, targets, forbidden=torch.tensor([2]), backend="native")
    assert logp[2] == -torch.inf and torch.isfinite(entropy).all()
    masked[0, 11] = torch.nan
    logp, entropy = selective_logp(masked, targets, backend="native")
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [True, False, False]


def test_rule_of_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    serves = {name: getattr(dispatch.load(name)[0], "OPS", {}) for name in ("native", "reference")}

    def chosen(*arguments: object) -> str:
        function = dispatch.select(*arguments)  # type: ignore[arg-type]
        return next(name for name, ops in serves.items() if function in ops.values())

    assert chosen("selective_logp", None, single) == "native"
    assert chosen("selective_logp", None, double) == "reference"
    assert chosen("selective_logp", None, single.clone().requires_grad_()) == "reference"
    assert chosen("grpo_loss", None, single) == "reference"
    monkeypatch.setenv("SYNCR1_BACKEND", "reference")
    assert chosen("selective_logp", None, single) == "reference"
    assert chosen("selective_logp", "native", single) == "native"
    monkeypatch.setenv("SYNCR1_BACKEND", "native")
    assert chosen("grpo_loss", None, single) == "reference"
    with pytest.raises(BackendError, match="it serves float32 only"):
        selective_logp(double, torch.zeros(2, dtype=torch.int64), backend="native")
    with pytest.raises(BackendError, match="does not implement grpo_loss"):
        offsets = torch.tensor([0, 1])
        grpo_loss(torch.zeros(1), None, torch.zeros(1), offsets, offsets, backend="native")


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    native.load.cache_clear()
    assert "ABI 1, this code wants 999" in str(native.unavailable_reason())
    native.load.cache_clear()
