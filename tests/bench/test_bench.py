"""The benchmarks compare like with like: every provider of a case computes the same values, and the table runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
try:
    import cases
    import goals
    import interleaved
    import machine
    import memory
    import peers
    import problems
    import shapes
    import table
finally:
    sys.path.remove(str(BENCH))

CPU = cases.cases_of("cpu", quick=True)
TOLERANCE = 2e-5


def _values(
    case: str, names: list[str] | None = None, compiled: bool = False
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    entry, shape = CPU[case]
    for provider in entry.build(shape):
        if ("compile" in provider.name) is compiled and provider.values and (names is None or provider.name in names):
            try:
                found = provider.prepare()()
            except interleaved.Unavailable:
                continue
            yield provider, {key: torch.as_tensor(value).detach().double() for key, value in found.items()}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


def _assert_alike(case: str, compiled: bool) -> int:
    truths: dict[str, dict[str, Tensor]] = {}
    for provider, values in _values(case):
        if provider.name.startswith("ours reference") or provider.values not in truths:
            truths[provider.values] = values
    compared = 0
    for provider, values in _values(case, compiled=compiled):
        truth = truths[provider.values]
        shared = sorted(set(values) & set(truth))
        assert shared, provider.name
        distances = {key: _distance(values[key], truth[key]) for key in shared}
        assert max(distances.values()) < TOLERANCE, (provider.name, distances)
        compared += 1
    return compared


LOSSES = [name for name, (case, _) in CPU.items() if not name.startswith(("cfg", "memory"))]


@pytest.mark.parametrize("case", LOSSES)
def test_providers_of_a_case_agree(case: str) -> None:
    assert _assert_alike(case, compiled=False) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear_small", "grpo_loss", "selective_logp"])
def test_compiled_providers_agree(case: str) -> None:
    peers.need_compiler("cpu")
    assert _assert_alike(case, compiled=True) >= 1


@pytest.mark.parametrize("case", ["linear_small", "grpo_loss"])
def test_loss_is_not_trivial(case: str) -> None:
    """Clipping acts, gradients and rewards vary: two wrong implementations could else agree on zeros."""
    _, values = next(_values(case, ["ours reference"]))
    grad = next(value for name, value in values.items() if name.startswith("d"))
    assert float(grad.norm()) > 0
    assert 0.01 < float(values["clip_low"] + values["clip_high"]) < 0.5
    assert math.isfinite(float(values["loss"]))
    _, shape = CPU["pruned"]
    (whole, half) = (next(_values("pruned", [f"ours reference{suffix}"]))[1] for suffix in ("", ", half pruned"))
    rows = [value["dhidden/text"].abs().sum(1) > 0 for value in (whole, half)]
    assert int(rows[1].sum()) * 2 <= shape.rows and int(rows[0].sum()) > int(rows[1].sum())


@pytest.mark.parametrize("case", ["cfg_sample", "cfg_sample_top_p"])
def test_samplers_draw_from_the_same_set_and_report_the_same(case: str) -> None:
    _, shape = CPU[case]
    given = problems.logit_problem(shape)
    mixed = (given.uncond + cases.CFG_WEIGHT * (given.logits - given.uncond)).double()
    probability = mixed.softmax(-1)
    order = probability.argsort(-1, descending=True)
    rank = order.argsort(-1)
    kept = shape.top_k or shape.vocabulary
    ordered = torch.where(torch.arange(shape.vocabulary) < kept, probability.gather(1, order), 0.0)
    before = ((ordered / ordered.sum(-1, keepdim=True)).cumsum(-1) - ordered / ordered.sum(-1, keepdim=True)).gather(
        1, rank
    )
    allowed = (rank < kept) & (before <= shape.top_p + 1e-5)
    logp = given.logits.double().log_softmax(-1)
    names = set()
    for provider, values in _values(case):
        names.add(provider.name)
        token = values["token"].long()[:, None]
        assert bool(allowed.gather(1, token).all()), provider.name
        if "logp" in values:
            torch.testing.assert_close(values["logp"], logp.gather(1, token)[:, 0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                values["logp_mixed"], probability.log().gather(1, token)[:, 0], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(values["entropy"], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)
    assert {"ours reference", "eager", "token only, eager"} <= names
    if shape.top_p < 1:
        assert float(allowed.double().mean()) < 0.25, "the truncation does not act"


def test_rounds_interleave_and_a_failing_provider_leaves_the_others() -> None:
    calls: list[str] = []

    def prepare(name: str) -> Any:
        return lambda: lambda: calls.append(name)

    def absent() -> Any:
        raise interleaved.Unavailable("not here")

    def broken() -> Any:
        def run() -> None:
            raise RuntimeError("wrong version\nlong trace")

        return run

    budget = interleaved.Budget(seconds=0, min_rounds=4, sample_seconds=0.0)
    providers = {"a": prepare("a"), "b": prepare("b"), "absent": absent, "broken": broken, "c": prepare("c")}
    measured = interleaved.measure(providers, interleaved.HostClock(), budget)
    assert calls[-12:] == ["a", "b", "c"] * 4
    assert measured.skipped == {"absent": "not here", "broken": "failed: RuntimeError: wrong version"}
    assert [len(measured.samples[name]) for name in "abc"] == [4, 4, 4]


def test_statistics_of_the_rounds() -> None:
    measured = interleaved.Measured({"a": [4.0, 1.0, 3.0, 2.0, 5.0], "b": [2.0, 2.0, 1.0, 1.0, 1.0]})
    assert (measured.median("a"), measured.quantile("a", 0.2), measured.quantile("a", 0.8)) == (3.0, 1.8, 4.2)
    assert measured.ratio("a", "b") == 2.0, "the median of the ratios within a round: 2, 0.5, 3, 2, 5"
    assert interleaved.fastest(measured, ["a", "b", "absent"]) == "b"


def test_goals_know_met_from_missed() -> None:
    shape = shapes.CPU["linear_small"]
    samples = {
        "ours native": [1.0] * 3,
        cases.FLOOR: [0.95] * 3,
        "Liger chunked": [1.6] * 3,
        "Liger chunked, x": [1.8] * 3,
    }
    result = goals.CaseResult(shape, {"hot": interleaved.Measured(samples)}, {})
    near, faster = goals.lines({"linear_small": result}, "cpu")
    assert (near["met"], round(float(str(near["measured"])), 3)) == (True, 1.053)
    assert (faster["met"], faster["measured"]) == (False, 1.6), "against the fastest of Liger's settings"
    text = table.show_goals([near, faster])
    assert "| yes |" in text and "| NO |" in text


def test_workspace_of_the_memory_goal() -> None:
    """1024 rows of 16384 float32 are the 128 MiB of a chunk; dW is 32 MiB."""
    for name in ("memory_4k", "memory_16k"):
        assert goals.workspace_bytes(shapes.CPU[name]) == (128 + 32) << 20
    assert goals.hidden_bytes(shapes.CPU["memory_16k"]) == 32 << 20


def test_the_probe_sees_an_allocation() -> None:
    def run() -> Tensor:
        return torch.ones(64 << 18) + 0  # two tensors of 64 MiB, one returned

    found, method = memory._peak_on_cpu(run)
    if method != "VmHWM":
        pytest.skip(method)
    assert 120 << 20 <= found <= 136 << 20


def test_quick_table_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = table.main(["--quick", "--device", "cpu", "--no_compile", "--no_memory", "--out", str(tmp_path)])
    timed = {name for name, (case, _) in CPU.items() if case.timed}
    assert {name for name, case in content["cases"].items() if case["rows"]} == timed
    for name in timed:
        shown = {row["provider"] for row in content["cases"][name]["rows"]}
        assert cases.FLOOR in shown and any(provider.startswith("ours ") for provider in shown), name
    (path,) = tmp_path.iterdir()
    assert path.stem == machine.slug("cpu") and json.loads(path.read_text())["environment"]["torch"]
    assert "| goal | measured | met |" in capsys.readouterr().out
    table.main(
        ["--quick", "--device", "cpu", "--no_compile", "--no_memory", "--only", "on_policy", "--out", str(tmp_path)]
    )
    assert set(json.loads(path.read_text())["cases"]) == set(content["cases"]), "--only keeps the others"


def test_unknown_case_is_refused() -> None:
    with pytest.raises(SystemExit):
        table.main(["--only", "no_such_case"])
