"""The drop-in against Liger itself: its chunked loss on the CPU, its Triton loss in Triton's interpreter."""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from backends import NIGHTLY
from liger_cases import (
    BATCH,
    CHUNKED,
    INTERPRETED_CASES,
    LENGTH,
    LOSS_TYPES,
    ROOT,
    TOKEN_LEVEL_ONLY,
    TRITON,
    Case,
    Inputs,
    check_chunked,
    check_interpreted_logps,
    check_interpreted_losses,
    chunked_call,
    chunked_is_valid,
    chunked_loss,
    chunked_result,
    compare,
    compare_results,
    liger_chunked,
    pairwise,
    plain_result,
    run_interpreted,
    triton_call,
    triton_is_valid,
    triton_result,
    use_backend,
)
from torch import Tensor

from syncr1.kernels import liger as ours

AT_NIGHT = pytest.mark.skipif(not NIGHTLY, reason="SYNCR1_NIGHTLY=1 runs it")
SEEDS = range(4) if NIGHTLY else range(1)
CHUNKED_CASES = [case for seed in SEEDS for case in pairwise(CHUNKED, chunked_is_valid, seed)]
TRITON_CASES = [case for seed in SEEDS for case in pairwise(TRITON, triton_is_valid, seed)]


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_backend(request.param, monkeypatch)


def a_case(**given: Any) -> Case:
    return {name: values[0] for name, values in (CHUNKED | TRITON).items()} | {"mask": "ragged"} | given


def clone(inputs: Inputs, **given: Any) -> Inputs:
    other = copy.copy(inputs)
    for name, value in given.items():
        setattr(other, name, value)
    return other


def run_chunked(module: Any, case: Case, inputs: Inputs, **settings: Any) -> dict[str, Any]:
    loss = chunked_loss(module, case, inputs, **settings)
    return chunked_result(lambda leaves: chunked_call(loss, inputs, leaves), inputs)


def flatten(result: dict[str, Any]) -> list[Tensor]:
    parts = [result["loss"], *result.get("metrics", ()), *result.get("grads", ()), *result.get("others", ())]
    return [part.detach() for part in (*parts, result.get("grad")) if part is not None]


@pytest.mark.parametrize("case", CHUNKED_CASES, ids=range(len(CHUNKED_CASES)))
def test_chunked_loss_is_that_of_liger(case: Case, backend: str) -> None:
    check_chunked(case)


def assert_formulas(case: Case) -> None:
    inputs = Inputs(case)
    actual = triton_result(ours, case, inputs)
    compare_results(actual, plain_result(case, inputs))
    assert not actual["grad"][:, -1].any()
    if inputs.mask is not None:
        assert not actual["grad"][:, :-1][inputs.mask == 0].any()
    assert actual["inplace"] == (case["inplace"] and not case["strided"])
    if not actual["inplace"]:
        torch.testing.assert_close(actual["logits"], inputs.logits, rtol=0, atol=0)


@pytest.mark.parametrize("case", TRITON_CASES, ids=range(len(TRITON_CASES)))
def test_triton_loss_is_what_its_formulas_say(case: Case, backend: str) -> None:
    assert_formulas(case)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    count = len(INTERPRETED_CASES) if NIGHTLY else 13  # of which every type meets every level
    return run_interpreted(tmp_path_factory.mktemp("liger"), count)


@pytest.mark.slow
def test_triton_loss_is_that_of_liger(interpreted: dict[str, Any], backend: str) -> None:
    check_interpreted_losses(interpreted["losses"])


@pytest.mark.slow
def test_log_probabilities_are_those_of_liger(interpreted: dict[str, Any], backend: str) -> None:
    check_interpreted_logps(interpreted["logps"])


DRAWN = ("temperature", "num_items", "mask_dtype", "max_length", "shapes", "bias", "frozen", "inplace", "strided")
"""Parameters that meet no other in the formulas: each case has some value of theirs."""


def product(
    grid: Mapping[str, Sequence[Any]], loss_type: str, valid: Callable[[Case], bool], seed: int = 0
) -> Iterator[Case]:
    """All valid cases of one loss type."""
    rng = random.Random(seed)
    crossed = {name: values for name, values in grid.items() if name not in DRAWN} | {"loss_type": (loss_type,)}
    for values in itertools.product(*crossed.values()):
        case = {name: rng.choice(grid[name]) for name in grid} | dict(zip(crossed, values, strict=True))
        if case["max_length"] is None and loss_type == "dr_grpo":
            case["max_length"] = 9
        if valid(case):
            yield case


def try_all(cases: Iterator[Case], check: Callable[[Case], None]) -> None:
    """Every failure with its case, not the first alone."""
    failures, count = [], 0
    for case in cases:
        count += 1
        try:
            check(case)
        except AssertionError as error:
            failures.append(f"{case}\n{error}")
    assert not failures, f"{len(failures)} of {count} cases\n" + "\n\n".join(failures[:5])
    assert count >= 300


@AT_NIGHT
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_whole_product_of_parameters(loss_type: str, backend: str) -> None:
    try_all(product(CHUNKED, loss_type, chunked_is_valid), check_chunked)
    try_all(product(TRITON, loss_type, triton_is_valid), assert_formulas)


def test_signatures_are_those_of_liger() -> None:
    theirs, chunked = pytest.importorskip("liger_kernel.transformers.grpo_loss"), liger_chunked()
    for mine, other in (
        (ours.triton_grpo_loss, theirs.triton_grpo_loss),
        (ours.fused_selective_log_softmax, theirs.fused_selective_log_softmax),
        (ours.LigerFusedLinearGRPOLoss.__init__, chunked.LigerFusedLinearGRPOLoss.__init__),
        (ours.LigerFusedLinearGRPOLoss.forward, chunked.LigerFusedLinearGRPOLoss.forward),
    ):
        listed, expected = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (mine, other)
        )
        assert listed == expected
    assert vars(ours.LigerFusedLinearGRPOLoss()).keys() == vars(chunked.LigerFusedLinearGRPOLoss()).keys()


def test_it_does_without_liger() -> None:
    for path in sorted((ROOT / "kernels" / "liger").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(name.startswith("liger_kernel") for name in names), path


@pytest.mark.parametrize(("grid", "valid"), [(CHUNKED, chunked_is_valid), (TRITON, triton_is_valid)])
def test_every_pair_of_values_meets(grid: dict[str, Sequence[Any]], valid: Callable[[Case], bool]) -> None:
    cases = pairwise(grid, valid)
    for first, second in itertools.combinations(grid, 2):
        met = {(str(case[first]), str(case[second])) for case in cases}
        missing = {(str(a), str(b)) for a, b in itertools.product(grid[first], grid[second])} - met
        assert len(missing) in ((0,) if "loss_type" not in (first, second) else (0, 1, 3, 6))
        for one, other in itertools.product(grid[first], grid[second]):
            if (str(one), str(other)) in missing:
                assert not valid(a_case(level="token", delta=None, max_length=9) | {first: one, second: other})


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss_type": "cispo", "level": "sequence"},
        {"loss_type": "sapo", "level": "sequence"},
        {"loss_type": "vespo", "level": "sequence"},
        {"loss_type": "ppo"},
        {"level": "word"},
        {"loss_type": "dr_grpo", "max_length": None},
        {"is_ratio": torch.ones(BATCH + 1)},
        {"is_ratio": torch.ones(BATCH, 2)},
        {"is_ratio": torch.ones(BATCH, LENGTH, 1)},
    ],
)
def test_chunked_errors_are_those_of_liger(wrong: dict[str, Any]) -> None:
    case = a_case(max_length=9) | {name: value for name, value in wrong.items() if name != "is_ratio"}
    inputs = clone(Inputs(a_case()), **({"is_ratio": wrong["is_ratio"]} if "is_ratio" in wrong else {}))
    raised = []
    for module in (liger_chunked(), ours):
        with pytest.raises((ValueError, AssertionError)) as error:
            run_chunked(module, case, inputs)
        raised.append(error.type)
    assert raised[0] is raised[1]


@pytest.mark.parametrize("settings", [{"delta": 0.0}, {"sapo_temperature_pos": 0.0}, {"sapo_temperature_neg": -1.0}])
def test_constructor_errors_are_those_of_liger(settings: dict[str, float]) -> None:
    for module in (liger_chunked(), ours):
        with pytest.raises(ValueError, match=next(iter(settings))):
            module.LigerFusedLinearGRPOLoss(**settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss_type": "cispo", "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        {"loss_type": "ppo"},
        {"importance_sampling_level": "word"},
        {"loss_type": "cispo", "delta": 2.0},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.0},
        {"loss_type": "sapo", "sapo_temperature_neg": -1.0},
        {"ref_logp": None},
        {"advantages": None},
        {"vllm_is_ratio": torch.ones(BATCH, 2)},
    ],
)
def test_triton_errors_are_those_of_liger(wrong: dict[str, Any]) -> None:
    theirs = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    inputs, raised = Inputs(a_case()), []
    given = {"logits": inputs.logits, "old_logp": inputs.old, "ref_logp": inputs.ref_logps,
             "completion_ids": inputs.ids, "advantages": inputs.advantages} | wrong  # fmt: skip
    for module in (theirs, ours):
        with pytest.raises((ValueError, AssertionError)) as error:
            module.triton_grpo_loss(**given)
        raised.append(error.type)
    assert raised[0] is raised[1]


def test_reference_policy_is_asked_for_and_only_one_used() -> None:
    inputs = Inputs(a_case())
    arguments = (inputs.hidden, inputs.weight, inputs.ids, inputs.mask, inputs.advantages)
    reference = {"ref_input": inputs.ref_hidden, "ref_weight": inputs.ref_weight}
    for module in (liger_chunked(), ours):
        loss = module.LigerFusedLinearGRPOLoss(compiled=False)
        with pytest.raises(AssertionError, match="ref_input must be provided"):
            loss(*arguments)
        with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
            both, _ = loss(*arguments, ref_per_token_logps=inputs.ref_logps, **reference)
        assert both == loss(*arguments, ref_per_token_logps=inputs.ref_logps)[0]
        assert both != loss(*arguments, **reference)[0]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mask", ["ragged", "row"])
def test_masked_positions_may_hold_anything(loss_type: str, mask: str, backend: str) -> None:
    for level in ("token", "sequence")[: 1 if loss_type in TOKEN_LEVEL_ONLY else 2]:
        case = a_case(loss_type=loss_type, level=level, mask=mask, is_ratio="BT", inplace=False)
        for ref in ("logps", "input"):
            clean = Inputs(case)
            assert clean.mask is not None and clean.is_ratio is not None and clean.old is not None
            masked = clean.mask == 0
            # vespo sums the logarithms over all positions, as Liger does; NaN counts as 1 there
            clean.is_ratio = torch.where(masked, 1.0, clean.is_ratio)
            hole = masked.unsqueeze(-1)
            dirty = clone(
                clean, case=case | {"ref": ref}, hidden=clean.hidden.masked_fill(hole, torch.nan),
                ids=clean.ids.masked_fill(masked, -100), old=clean.old.masked_fill(masked, torch.inf),
                ref_logps=clean.ref_logps.masked_fill(masked, torch.nan),
                ref_hidden=clean.ref_hidden.masked_fill(hole, torch.nan),
                is_ratio=clean.is_ratio.masked_fill(masked, torch.nan),
                advantages=clean.advantages.masked_fill(masked.all(1), torch.nan),
                logits=clean.logits.masked_fill(torch.nn.functional.pad(hole, (0, 0, 0, 1), value=True), torch.nan),
            )  # fmt: skip
            clean.case = dirty.case
            expected, actual = (run_chunked(ours, clean.case, inputs) for inputs in (clean, dirty))
            torch.testing.assert_close(flatten(actual), flatten(expected), rtol=0, atol=0)
            for reduce in (True, False):
                case = clean.case | {"reduce": reduce}
                expected, actual = (triton_result(ours, case, inputs) for inputs in (clean, dirty))
                torch.testing.assert_close(flatten(actual), flatten(expected), rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "vespo"])
@pytest.mark.parametrize("num_items", [None, 40])
def test_divisor_over_ranks(loss_type: str, num_items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which the other has twice as many loss tokens."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, **_: total.mul_(3))
    case = a_case(loss_type=loss_type, num_items=num_items)
    inputs = Inputs(case)
    theirs, mine = (run_chunked(module, case, inputs) for module in (liger_chunked(), ours))
    for actual, expected in zip(flatten(mine), flatten(theirs), strict=True):
        compare(actual, expected, loss_type)
    scale = {None: 1.5, 40: 20 / float(inputs.mask.sum())}[num_items] if loss_type != "grpo" else 1.0  # type: ignore[union-attr]
    both = triton_result(ours, case, inputs)
    monkeypatch.undo()
    alone = triton_result(ours, case | {"num_items": None}, clone(inputs, num_items=None))
    compare(both["grad"] * scale, alone["grad"], "gradient")


def test_logits_are_gone_after_an_inplace_backward(backend: str) -> None:
    case, inputs = a_case(), Inputs(a_case())
    logits = inputs.logits.clone().requires_grad_() * 1
    loss, _ = triton_call(ours, case, inputs, logits)
    gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_that_are_needed_again_are_not_overwritten_in_silence(backend: str) -> None:
    case, inputs = a_case(), Inputs(a_case())
    logits = inputs.logits.clone().requires_grad_() * 1
    loss, _ = triton_call(ours, case, inputs, logits)
    other = logits.square().sum()  # saves the logits; which backward comes first is autograd's choice
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
        other.backward()


@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
def test_inputs_need_not_be_contiguous(loss_type: str, backend: str) -> None:
    case = a_case(loss_type=loss_type, is_ratio="BT", inplace=True)
    inputs = Inputs(case)
    names = ("weight", "ids", "advantages", "old", "ref_logps", "is_ratio", "mask")
    spread = {name: torch.stack([value := getattr(inputs, name), value], dim=-1)[..., 0] for name in names}
    assert not any(value.is_contiguous() for value in spread.values())
    hidden = torch.cat([inputs.hidden, inputs.hidden], dim=1)[:, :LENGTH]
    other = clone(inputs, hidden=hidden, **spread)
    torch.testing.assert_close(flatten(run_chunked(ours, case, other)), flatten(run_chunked(ours, case, inputs)))
    expected = flatten(triton_result(ours, case, inputs))
    torch.testing.assert_close(flatten(triton_result(ours, case, other)), expected)
    transposed = inputs.logits.transpose(0, 2).contiguous().transpose(0, 2)
    leaf = transposed.requires_grad_()
    loss, _ = triton_call(ours, case, other, leaf * 1)
    (loss * 3).backward()
    torch.testing.assert_close(leaf.grad, expected[-1])


@pytest.mark.parametrize("old", [80.0, -80.0])
def test_absurd_ratios_stay_finite(old: float, backend: str) -> None:
    for loss_type in LOSS_TYPES:
        case = a_case(loss_type=loss_type)
        inputs = Inputs(case)
        far = clone(inputs, old=torch.full((BATCH, LENGTH), -old), ref_logps=torch.full((BATCH, LENGTH), old))
        for result in (run_chunked(ours, case, far), triton_result(ours, case, far)):
            assert all(part.isfinite().all() for part in flatten(result))


def test_settings_without_effect() -> None:
    case, inputs = a_case(), Inputs(a_case())
    plain = run_chunked(ours, case, inputs)
    for settings in ({"compiled": True}, {"chunk_size": 2}):
        loss = ours.LigerFusedLinearGRPOLoss(**settings)
        assert vars(loss).items() >= settings.items()
    torch.testing.assert_close(flatten(run_chunked(ours, case, inputs, chunk_size=2)), flatten(plain), rtol=0, atol=0)


def test_rows_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCR1_BACKEND", "reference")
    case, inputs = a_case(), Inputs(a_case())
    whole = flatten(triton_result(ours, case, inputs))
    monkeypatch.setattr("syncr1.kernels.liger.logits.REFERENCE_ROWS", 4)
    torch.testing.assert_close(flatten(triton_result(ours, case, inputs)), whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32])
def test_bfloat16(loss_type: str, head: torch.dtype, backend: str) -> None:
    """Beside Liger in float32 on the same numbers: rounded logits move a log-probability by about 2^-8."""
    case = a_case(loss_type=loss_type, mask="full", max_length=9)
    inputs = Inputs(case)
    hidden, weight, bias, logits = (p.bfloat16() for p in (inputs.hidden, inputs.weight, inputs.bias, inputs.logits))  # type: ignore[union-attr]
    exact = clone(inputs, hidden=hidden.float(), weight=weight.float(), bias=bias.float(), logits=logits.float())
    rounded = clone(inputs, hidden=hidden, weight=weight.to(head), bias=bias.to(head), logits=logits)
    actual, expected = run_chunked(ours, case, rounded), run_chunked(liger_chunked(), case, exact)
    assert actual["loss"].dtype == torch.float32
    assert [grad.dtype for grad in actual["grads"]] == [torch.bfloat16, head, head]
    pairs = [*zip(flatten(actual), flatten(expected), strict=True)]
    pairs += zip(flatten(triton_result(ours, case, rounded)), flatten(plain_result(case, exact)), strict=True)
    for value, other in pairs:
        size = float(other.abs().max())
        torch.testing.assert_close(value.double(), other.double(), rtol=3e-2, atol=2e-2 * size + 1e-3)
