"""Properties of every public op over generated batches, on the C++ backend and the reference.

`pytest test_kernel_properties.py` draws the same few examples every time. The nightly run draws new ones, more
than ten thousand:

    HYPOTHESIS_PROFILE=nightly pytest tests/kernels/test_kernel_properties.py

Dims: `T` packed tokens, `S` sequences, `N` rows, `V` vocabulary, `D` hidden, `B` decode rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from backends import NATIVE
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    MAX_LOG_RATIO,
    RESOLUTION,
    LinearCase,
    LossCase,
    Values,
    as_good,
    credit,
    linear_cases,
    loss_cases,
    offsets_of,
    run_linear,
    run_loss,
)
from kernel_rows import Draw, RowCase, draws, row_cases, run_rows, undecided
from torch import Tensor

from syncr1.kernels.api import dgs_select, group_advantages
from syncr1.kernels.options import AGGREGATES, RULES, SCALES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MANY = hypothesis.settings(max_examples=max(100, hypothesis.settings().max_examples))
"""For the two losses, whose options are many."""
EIGHTHS = st.integers(-24, 24).map(lambda n: n / 8) | st.just(torch.nan)


def span(case: LossCase) -> float:
    """1 + the greatest log-ratio, or sum of their sizes: its rounding error is the relative error of a ratio."""
    mask_T, logp_T = case.mask, case.tokens["logp"]
    gaps = [case.tokens[n][mask_T] - logp_T[mask_T] for n in ("old_logp", "ref_logp") if n in case.tokens]
    widest = max((float(gap.abs().max()) for gap in gaps if gap.numel()), default=0.0)
    # vespo's weight is the exponential of an exponent of up to a few hundred
    terms = max(case.lengths, default=1) if case.options.get("ratio") == "product" else 1
    return 1 + terms * min(widest, MAX_LOG_RATIO) + (300 if case.options["loss_type"] == "vespo" else 0)


def loss_floor(case: LossCase, exact: Values, grad_T: Tensor) -> float:
    """The terms of a loss may cancel: its floor follows their sizes, not that of their sum."""
    options, num_tokens = case.options, int(case.mask.sum())
    divided_by_count = options["loss_type"] != "luspo" and options.get("num_items") is None
    advantage = float(exact["advantages"].abs().max()) if exact["advantages"].numel() else 0.0
    terms = advantage * 10 * (2 if divided_by_count else num_tokens)
    return float(exact["loss"].abs() + grad_T.abs().sum()) + terms


def assert_values(case: LossCase, mine: Values, single: Values, exact: Values, sizes: dict[str, float]) -> None:
    assert mine["keep"].equal(exact["keep"])
    assert mine.keys() == exact.keys()
    for name, truth in exact.items():
        if name != "keep" and truth.numel():
            size = sizes.get(name, max(1.0, float(truth.abs().max())) * sizes.get("other", 1.0))
            assert bool(mine[name].isfinite().all()), name
            as_good(name, mine[name], single[name], truth, RESOLUTION * span(case) * size + 1e-30)


@NATIVE
@MANY
@given(case=loss_cases())
def test_grpo_loss_follows_float64(case: LossCase) -> None:
    mine, single = run_loss(case, "native"), run_loss(case, "reference")
    exact = run_loss(case, "reference", torch.float64)
    grad_T = exact["grad logp"]
    largest = float(grad_T.abs().max()) if grad_T.numel() else 0.0
    assert_values(case, mine, single, exact, {"loss": loss_floor(case, exact, grad_T), "grad logp": largest})
    assert not bool(mine["grad logp"][~case.mask].any())


def from_log_probabilities(linear: LinearCase) -> LossCase:
    """The batch that `grpo_loss` sees: log-probabilities and entropies in float64, the streams' mask and modality."""
    case = linear.case
    mask_T, modality_T = torch.zeros_like(case.mask), torch.zeros(len(case.mask), dtype=torch.uint8)
    for stream in linear.streams:
        mask_T[stream.rows] = True
        modality_T[stream.rows] = int(stream.modality == "image")
    logp_T, entropy_T = linear.scored
    more = {"logp": logp_T, "entropy": entropy_T, "modality": modality_T, "loss_mask": mask_T & case.mask}
    return replace(case, tokens={**case.tokens, **more})


@NATIVE
@pytest.mark.slow
@MANY
@given(linear=linear_cases())
def test_linear_grpo_loss_follows_float64(linear: LinearCase) -> None:
    case = from_log_probabilities(linear)
    plain = run_loss(case, "reference", torch.float64)
    exact = run_linear(linear, "reference", torch.float64)
    torch.testing.assert_close(exact["loss"], plain["loss"], rtol=1e-9, atol=1e-9)
    grad_T = plain["grad logp"].abs()
    logits, sizes = 1.0, {"loss": loss_floor(case, exact, grad_T)}
    for i, s in enumerate(linear.streams):
        rows, tau = grad_T[s.rows], s.temperature
        if not len(rows):
            continue
        z = s.hidden @ s.weight.t() + (0.0 if s.bias is None else s.bias)
        logits = max(logits, float(z.abs().max()) / tau)
        sizes[f"grad hidden{i}"] = float(rows.max() * s.weight.abs().max()) * 2 / tau
        sizes[f"grad weight{i}"] = float(rows.sum() * s.hidden.abs().max()) / tau
        sizes[f"grad bias{i}"] = float(rows.sum()) / tau
    # the log-probabilities themselves are as exact as the logits
    sizes = {name: size * (1 + logits) for name, size in {**sizes, "other": 1.0}.items()}
    assert_values(case, run_linear(linear, "native"), run_linear(linear, "reference"), exact, sizes)


def assert_rows(rows: RowCase) -> None:
    mine, single, exact = (
        run_rows(rows, "native"),
        run_rows(rows, "reference"),
        run_rows(rows, "reference", torch.float64),
    )
    operands = rows.operands
    largest = {name: float(v.abs().max()) if v.numel() else 0.0 for name, v in operands.items()}
    logits = (
        largest["logits"]
        if "logits" in operands
        else (largest["hidden"] * largest["weight"] * operands["weight"].shape[1] + largest.get("bias", 0.0))
    )
    size = (1 + logits) / min(rows.temperature, 1.0)
    total = float(rows.upstream.abs().sum()) * (1 + logits) / rows.temperature
    sizes = {"hidden": total * largest.get("weight", 0.0), "weight": total * largest.get("hidden", 0.0), "bias": total}
    for name, truth in exact.items():
        floor = RESOLUTION * size * max(1.0, sizes.get(name, total))
        if name in operands and operands[name].dtype == torch.bfloat16 and truth.numel():
            floor += 2**-9 * float(truth.abs().max())
        as_good(name, mine[name], single[name], truth, floor)
    assert mine["logp"].dtype == mine["entropy"].dtype == torch.float32


@NATIVE
@given(rows=row_cases(linear=False))
def test_selective_logp_follows_float64(rows: RowCase) -> None:
    assert_rows(rows)


@NATIVE
@given(rows=row_cases(linear=True), chunk_rows=st.sampled_from([1, 2, 3, 4096]))
def test_linear_logp_follows_float64(rows: RowCase, chunk_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("syncr1.kernels.linear.CHUNK_ROWS", (1, chunk_rows))
        assert_rows(rows)


@NATIVE
@given(
    data=st.data(),
    groups=st.lists(st.integers(0, 9), max_size=5),
    scale=st.sampled_from(SCALES),
    aggregate=st.sampled_from(AGGREGATES),
    eps=st.sampled_from([0.0, 1e-4, 1.0]),
    values=st.sampled_from([EIGHTHS, st.floats(-9, 9, width=32), st.sampled_from([0.0, 1.0, torch.nan])]),
)
def test_group_advantages_follow_float64(
    data: st.DataObject, groups: list[int], scale: Any, aggregate: Any, eps: float, values: st.SearchStrategy[float]
) -> None:
    num_columns = data.draw(st.sampled_from([None, 1, 2, 3]))
    count = sum(groups) * (num_columns or 1)
    rewards = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float32)
    rewards = rewards if num_columns is None else rewards.view(-1, num_columns)
    weights = (
        None if num_columns is None else data.draw(st.none() | st.just(torch.tensor([1.0, 0.3, -2.0])[:num_columns]))
    )
    settings = {"weights": weights, "scale": scale, "eps": eps, "aggregate": aggregate}
    offsets = offsets_of(groups)
    mine = group_advantages(rewards, offsets, backend="native", **settings)
    exact = group_advantages(rewards.double(), offsets, backend="reference", **settings)
    assert mine.dtype == torch.float32
    # a spread in the last place of float64 is divided by itself where eps is 0
    spreads = [float(g.max() - g.min()) for g in torch.nan_to_num(rewards).split(groups) if g.numel()]
    hypothesis.assume(eps > 0 or all(s == 0 or s > 1e-6 for s in spreads))
    torch.testing.assert_close(mine.double(), exact, rtol=RESOLUTION, atol=1e-8)
    if num_columns is None:
        for group, out in zip(rewards.split(groups), mine.split(groups), strict=True):
            valid = ~group.isnan()
            assert not bool(out[~valid].any())
            assert not bool(out.any()) or group[valid].min() < group[valid].max()


@NATIVE
@given(
    data=st.data(),
    groups=st.lists(st.integers(0, 9), max_size=5),
    rule=st.sampled_from(RULES),
    mass=st.sampled_from([1e-6, 0.25, 0.5, 0.9, 1.0]),
    keep=st.none() | st.integers(1, 9),
    min_keep=st.integers(0, 9),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    scale=st.sampled_from(SCALES),
)
def test_dgs_select_keeps_what_the_specification_keeps(
    data: st.DataObject,
    groups: list[int],
    rule: Any,
    mass: float,
    keep: int | None,
    min_keep: int,
    seed: int,
    scale: Any,
) -> None:
    members, weights = data.draw(credit(sum(groups), given=False))
    rewards: Any = members["rewards"] if "rewards" in members else {k.split("/")[1]: v for k, v in members.items()}
    settings = {"rule": rule, "mass": mass, "keep": keep, "min_keep": min_keep, "seed": seed, "weights": weights}
    mine, exact = (
        dgs_select(rewards, offsets_of(groups), backend=backend, scale=scale, **settings)
        for backend in ("native", "reference")
    )
    assert mine.equal(exact)


@NATIVE
@given(case=draws())
def test_cfg_sample_follows_float64(case: Draw) -> None:
    mine, exact = case.run("native"), case.run("reference", dtype=torch.float64)
    same = mine["token"] == exact["token"]
    assert bool((same | undecided(case)).all())
    logits = [z.double().abs().max().item() for z in (case.cond, case.uncond) if z is not None and z.numel()]
    size = (1 + sum(logits) * max(1.0, 2 * case.settings["cfg_weight"])) / min(case.settings["temperature"] or 1.0, 1.0)
    for name in ("logp", "logp_mixed", "entropy"):
        error = (mine[name].double() - exact[name])[same].abs()
        assert not len(error) or float(error.max()) <= 2 * RESOLUTION * size, name
