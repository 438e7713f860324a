"""Values: every op against `reference` in float64, at three sizes, in bfloat16 and float32.

What holds: an error of at most twice the reference's own in the same dtype, plus a rounding of that dtype; the second
call is bitwise the first; outputs come out of memory that holds NaN; inputs of other strides give the same values or
are refused.  Norms are over whole tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from gpu_problems import PROBLEMS, Problem, Tensors
from gpu_report import Report
from torch import Tensor

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}
Check = Callable[[Report, str, Problem, torch.dtype, str], None]
NUMPY_FAULT = "only 0-dimensional arrays can be converted"
"""What the interpreter of Triton 3.6 and 3.7 says beside numpy 2.4 and later."""
SAME_TOKENS = 0.9
"""Share of rows that must draw the token which the float64 sums draw: the others lie within a rounding of two."""


@contextmanager
def poisoned() -> Iterator[None]:
    """`empty` returns NaN: what an op leaves unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


def distance(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖, NaN where anything is."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-12))


def errors(found: Tensors, truth: Tensors, exact: tuple[str, ...]) -> dict[str, float]:
    """By output; of tokens the share that differs, of their log-probabilities where the token is the same."""
    result: dict[str, float] = {}
    for name, value in found.items():
        if name.endswith("/token") or name in exact:
            result[name] = float((value != truth[name]).double().mean())
        elif name.endswith("/logp of its token"):
            same = (
                found[name.replace("logp of its token", "token")] == truth[name.replace("logp of its token", "token")]
            )
            result[name] = distance(value[same], truth[name][same]) if bool(same.any()) else 0.0
        else:
            result[name] = distance(value, truth[name])
    return result


def allowed(name: str, theirs: float, value: Tensor, dtype: torch.dtype, exact: tuple[str, ...]) -> float:
    """The bound on an error."""
    if name in exact:
        return 0.0
    if name.endswith("/token"):
        return 1 - SAME_TOKENS
    # A loss is a sum in which advantages of both signs nearly cancel: it is small beside its terms.
    return 2 * theirs + ROUNDING[dtype] * (8 if value.dim() == 0 else 1)


def serving(op: str, pretend: bool) -> str | None:
    """The backend that is checked: what a GPU takes by default, in the interpreter where there is none."""
    return None if op == "shared_prefix_attention" else "triton"


def check_values(report: Report, op: str, problem: Problem, dtype: torch.dtype, device: str) -> None:
    """One line: the worst output, relative to what is allowed."""
    began = time.perf_counter()
    inputs = problem.cast(dtype, device)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = problem.call(wide, "reference")
    theirs = errors(problem.call(inputs, "reference"), truth, problem.exact)
    with poisoned():
        found = problem.call(inputs, serving(op, device == "cpu"))
    again = problem.call(inputs, serving(op, device == "cpu"))
    mine = errors(found, truth, problem.exact)
    bounds = {name: allowed(name, theirs[name], found[name], dtype, problem.exact) for name in mine}
    wrong = [name for name in mine if not mine[name] <= bounds[name]]  # NaN is wrong, too
    worst = max(mine, key=lambda name: mine[name] / max(bounds[name], 1e-12))
    shown = wrong or [worst]
    detail = ", ".join(f"{n} {mine[n]:.2e} (allowed {bounds[n]:.2e}, reference {theirs[n]:.2e})" for n in shown[:4])
    kind = str(dtype).removeprefix("torch.")
    title = f"{op}, {problem.shape}, {kind}"
    report.line(name=f"{title}: values", ok=not wrong, detail=detail, seconds=time.perf_counter() - began)
    differing = [name for name in found if not torch.equal(found[name], again[name])]
    report.line(name=f"{title}: second call bitwise equal", ok=not differing, detail=", ".join(differing[:6]))


def other_strides(tensor: Tensor) -> dict[str, Tensor]:
    """The same values, laid out otherwise."""
    apart = tensor.new_empty(*tensor.shape, 2)[..., 0].copy_(tensor)
    made = {"every second element": apart}
    if tensor.dim() > 1:
        made["transposed"] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        wider = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 3)
        made["rows of a wider tensor"] = wider[..., 1:-2].copy_(tensor)
    return made


def check_strides(report: Report, op: str, problem: Problem, dtype: torch.dtype, device: str) -> None:
    """Each input in each layout: the values of contiguous inputs, or a refusal."""
    inputs = problem.cast(dtype, device)
    expected = problem.call(inputs, serving(op, device == "cpu"))
    wrong, refused, count = [], [], 0
    for name in problem.strided:
        for how, changed in other_strides(inputs[name]).items():
            count += 1
            try:
                found = problem.call({**inputs, name: changed}, serving(op, device == "cpu"))
            except ValueError:
                refused.append(f"{name} {how}")
                continue
            off = {
                n: e
                for n, e in errors(found, expected, problem.exact).items()
                if not e <= (1 - SAME_TOKENS if n.endswith("/token") else 4 * ROUNDING[dtype])
            }
            wrong += [f"{name} {how}: {n} off by {e:.1e}" for n, e in off.items()]
    detail = "; ".join(wrong[:4]) or (f"refused: {', '.join(refused)}" if refused else f"{count} layouts")
    report.line(name=f"{op}, {problem.shape}: other strides", ok=not wrong, detail=detail)


def run(report: Report, pretend: bool, what: str) -> None:
    """All sizes of `<op>/<dtype>`; a size that raises is a line and the next one follows."""
    op, _, kind = what.partition("/")
    device, dtype = "cpu" if pretend else "cuda", getattr(torch, kind)
    torch.manual_seed(0)
    problems = PROBLEMS[op](pretend)[: 2 if pretend else None]  # the interpreter takes seconds for each
    for problem in problems:
        _guarded(report, f"{op}, {problem.shape}, {kind}", check_values, op, problem, dtype, device)
    if dtype is torch.float32:
        _guarded(report, f"{op}: other strides", check_strides, op, problems[0], dtype, device)


def _guarded(
    report: Report, name: str, check: Check, op: str, problem: Problem, dtype: torch.dtype, device: str
) -> None:
    """An error of one check is a line; a CUDA error that stays ends the step, as everything after it would fail."""
    try:
        check(report, op, problem, dtype, device)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        known = device == "cpu" and NUMPY_FAULT in first  # no fault of the kernels, and none of a GPU
        detail = f"{type(error).__name__}: {first}"
        if known:
            detail = f"Triton {version('triton')}'s interpreter does not run beside numpy {version('numpy')}"
        report.line(name=name, ok=None if known else False, detail=detail)
        if device == "cuda":
            torch.cuda.synchronize()  # raises again where the context is broken
