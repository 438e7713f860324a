"""What must not change a result by a single bit: order, neighbours, threads, poison, pruned tokens. Generated batches.

`HYPOTHESIS_PROFILE=nightly pytest tests/kernels/test_kernel_invariances.py` draws many more batches.

Dims: `T` packed tokens, `S` sequences, `N` rows, `B` decode rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    LinearCase,
    LossCase,
    Values,
    linear_cases,
    loss_cases,
    run_linear,
    run_loss,
    same_bits,
    sequence_of_token,
    threads,
)
from kernel_rows import Draw, RowCase, draws, row_cases, run_rows
from torch import Tensor

from syncr1.kernels.api import TokenStream
from syncr1.kernels.streams import Modality

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def group_by_group(case: LossCase) -> LossCase:
    """The same batch under options that look at one group at a time."""
    options = {**case.options, "scale": "loo" if case.options.get("scale") == "batch" else "group"}
    options |= {"aggregate": "sum_then_normalize"}
    options |= {"dgs": "variance_mass"} if options.get("dgs") == "random" else {}
    return replace(case, options=options)


def members_of(case: LossCase) -> list[list[int]]:
    """The sequences of each group."""
    starts = [0, *accumulate(case.groups)]
    return [list(range(a, a + n)) for a, n in zip(starts, case.groups, strict=False)]


def assert_moved(whole: Values, part: Values, tokens_T: Tensor, order: list[int], num_sequences: int) -> None:
    """What belongs to a token or a sequence went with it, bit for bit."""
    assert part["grad logp"].equal(whole["grad logp"][tokens_T])
    assert part["keep"].equal(whole["keep"][order])
    rows = whole["advantages"].view(-1, num_sequences) if num_sequences else whole["advantages"][None]
    assert part["advantages"].equal(rows[:, order].reshape(-1))


@BACKEND
@given(case=loss_cases(), data=st.data())
def test_groups_and_sequences_in_another_order(backend: str, case: LossCase, data: st.DataObject) -> None:
    case = group_by_group(case)
    groups = members_of(case)
    if not any(name.startswith("rewards") for name in case.members):
        # given advantages need no sum over their group, but ties of a rule go by position
        case = replace(case, options={**case.options, "dgs": "none"})
        groups = [data.draw(st.permutations(group)) for group in groups]
    groups = data.draw(st.permutations(groups))
    order = [s for group in groups for s in group]
    moved, tokens_T = case.take(order, [len(group) for group in groups])
    whole, other = run_loss(case, backend), run_loss(moved, backend)
    assert_moved(whole, other, tokens_T, order, len(order))
    torch.testing.assert_close(
        other["loss"], whole["loss"], rtol=1e-4, atol=1e-4 * float(1 + whole["grad logp"].abs().sum())
    )


@BACKEND
@given(case=loss_cases(), data=st.data())
def test_a_pack_cut_in_two(backend: str, case: LossCase, data: st.DataObject) -> None:
    """The divisors given, each half has the gradients that it had in the whole, and the losses add up."""
    case = group_by_group(case)
    options = {**case.options, "num_sequences": 6.0, "top_entropy_quantile": 1.0}
    options["num_items"] = {"text": 7.0, "image": 5.0} if options.get("num_items") is None else options["num_items"]
    options["loss_type"] = "dapo" if options["loss_type"] == "bnpo" else options["loss_type"]
    case = replace(case, options=options)
    whole, groups = run_loss(case, backend), members_of(case)
    cut, total = data.draw(st.integers(0, len(groups))), torch.zeros(())
    for part in (groups[:cut], groups[cut:]):
        order = [s for group in part for s in group]
        half, tokens_T = case.take(order, [len(group) for group in part])
        found = run_loss(half, backend)
        assert_moved(whole, found, tokens_T, order, len(case.lengths))
        total = total + found["loss"]
    scale = float(1 + whole["grad logp"].abs().sum())
    torch.testing.assert_close(total, whole["loss"], rtol=1e-4, atol=1e-4 * scale)


@BACKEND
@given(rows=row_cases(linear=False), data=st.data())
def test_rows_of_logits_do_not_see_each_other(backend: str, rows: RowCase, data: st.DataObject) -> None:
    whole = run_rows(rows, backend)
    num_rows = len(rows.targets)
    order = torch.tensor(data.draw(st.permutations(range(num_rows))), dtype=torch.int64)
    cut = data.draw(st.integers(0, num_rows))
    for part in (order, order[:cut], order[cut:]):
        picked = replace(
            rows,
            operands={"logits": rows.operands["logits"][part]},
            targets=rows.targets[part],
            upstream=rows.upstream[:, part],
        )
        same_bits({name: values[part] for name, values in whole.items()}, run_rows(picked, backend))


@BACKEND
@given(case=draws(), data=st.data())
def test_draws_do_not_see_each_other(backend: str, case: Draw, data: st.DataObject) -> None:
    whole, num_rows = case.run(backend), len(case.cond)
    order = torch.tensor(data.draw(st.permutations(range(num_rows))), dtype=torch.int64)
    cut = data.draw(st.integers(0, num_rows))
    for part in (order, order[:cut], order[cut:]):
        same_bits({name: values[part] for name, values in whole.items()}, case.run(backend, part))


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested records, dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_of(part)]
    if isinstance(value, list | tuple):
        return [t for part in value for t in tensors_of(part)]
    fields = getattr(value, "__dataclass_fields__", ())
    return [t for name in fields for t in tensors_of(getattr(value, name))]


CASES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, str], Values]]] = {
    "grpo_loss": (loss_cases(), run_loss),
    "linear_grpo_loss": (linear_cases(), run_linear),
    "selective_logp": (row_cases(linear=False), run_rows),
    "linear_logp": (row_cases(linear=True), run_rows),
    "cfg_sample": (draws(), lambda case, backend: case.run(backend)),
}


@BACKEND
@pytest.mark.parametrize("op", CASES)
@given(data=st.data())
def test_again_and_on_two_threads(backend: str, op: str, data: st.DataObject) -> None:
    """Three runs are bitwise equal, and no argument has changed.

    Not so torch's matrix products, whose last bits may depend on the number of threads (seen on an AMD EPYC).
    """
    cases, run = CASES[op]
    case = data.draw(cases)
    before = [t.clone() for t in tensors_of(case)]
    once = run(case, backend)
    same_bits(once, run(case, backend))
    with threads(2):
        threaded = run(case, backend)
    if op.startswith("linear"):
        for name, value in once.items():
            scale = float(value.detach().double().nan_to_num(0, 0, 0).abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(threaded[name], value, rtol=1e-5, atol=1e-6 + 1e-5 * scale, equal_nan=True)
    else:
        same_bits(once, threaded)
    for was, now in zip(before, tensors_of(case), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def large_batch() -> LinearCase:
    """Enough rows and logits for the work to be shared out among threads."""
    lengths, groups, total = [700, 1, 1300, 900], [2, 2], 2901
    rows = torch.randperm(total)
    heads: list[tuple[Tensor, int, Modality]] = [(rows[:1500], 900, "text"), (rows[1500:], 1100, "image")]
    streams = [
        TokenStream(
            torch.randn(len(at), 64), torch.randn(size, 64) / 8, torch.randint(size, (len(at),)), at, modality=m
        )
        for at, size, m in heads
    ]
    tokens = {
        "logp": torch.zeros(total),
        "old_logp": torch.randn(total) / 4 - 7.5,
        "ref_logp": torch.randn(total) / 4 - 7.5,
    }
    case = LossCase(lengths, groups, tokens, {"rewards": torch.tensor([0.0, 1.0, 2.0, 0.5])}, {"beta": 0.1})
    return LinearCase(streams, case, ["hidden0", "weight0", "hidden1", "weight1"], torch.zeros(2, total), 600)


@BACKEND
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_large_batch_on_one_and_on_two_threads(backend: str, ratio: str) -> None:
    """Bitwise equal from run to run; another number of threads changes the order of sums in torch's own products."""
    linear = large_batch()
    linear.case.options["ratio"] = ratio
    results = []
    for number in (1, 2):
        with threads(number):
            results.append(run_linear(linear, backend))
            same_bits(results[-1], run_linear(linear, backend))
    one, two = results
    assert all(bool(one[f"grad {name}"].any()) for name in linear.trained)
    for name, values in one.items():
        size = float(values.abs().max()) if values.is_floating_point() else 0.0
        torch.testing.assert_close(two[name], values, rtol=1e-5, atol=1e-6 * size)


@BACKEND
@given(case=loss_cases())
def test_poison_outside_the_mask(backend: str, case: LossCase) -> None:
    clean = run_loss(case, backend)
    same_bits(clean, run_loss(case.poisoned(), backend))
    assert not bool(clean["grad logp"][~case.mask].any())


@BACKEND
@given(linear=linear_cases())
def test_poison_outside_the_mask_of_a_linear_loss(backend: str, linear: LinearCase) -> None:
    same_bits(run_linear(linear, backend), run_linear(linear.poisoned(), backend))


def pruned(case: LossCase) -> LossCase:
    rule = case.options.get("dgs", "none")
    return replace(case, options={**case.options, "dgs": "variance_mass" if rule == "none" else rule})


@BACKEND
@given(case=loss_cases())
def test_pruned_sequences_without_their_tokens(backend: str, case: LossCase) -> None:
    case = pruned(case)
    whole = run_loss(case, backend)
    emptied = (~whole["keep"]).nonzero()[:, 0].tolist()
    dropped, tokens_T = case.take(range(len(case.lengths)), case.groups, emptied)
    other = run_loss(dropped, backend)
    assert other["grad logp"].equal(whole["grad logp"][tokens_T])
    assert not bool(whole["grad logp"][~whole["keep"][sequence_of_token(case.lengths)]].any())
    close = {"grad logp", *(name for name in whole if name.startswith(("loss", "metric")))}
    same_bits(
        {name: values for name, values in whole.items() if name not in close},
        {name: values for name, values in other.items() if name not in close},
    )
    scale = float(1 + whole["grad logp"].abs().sum())
    for name in close - {"grad logp"}:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-4, atol=1e-4 * (scale if name == "loss" else 1))


@BACKEND
@given(linear=linear_cases())
def test_hidden_states_of_pruned_sequences_are_not_read(backend: str, linear: LinearCase) -> None:
    """Nor are those of masked tokens: NaN in them reaches nothing."""
    linear = replace(linear, case=pruned(linear.case))
    whole = run_linear(linear, backend)
    kept_T = whole["keep"][sequence_of_token(linear.case.lengths)] & linear.case.mask
    streams = [replace(s, hidden=torch.where(kept_T[s.rows].unsqueeze(1), s.hidden, torch.nan)) for s in linear.streams]
    same_bits(whole, run_linear(replace(linear, streams=streams), backend))
