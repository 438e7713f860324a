"""What only a GPU can show of an op: graphs, streams, read-backs of the host, addresses beyond 2³¹."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_checks import distance, serving
from gpu_problems import PROBLEMS, Problem, Tensors, head_losses
from gpu_report import Report, Skipped
from torch import Tensor

from syncr1.kernels.api import cfg_sample, linear_logp, prefix_decode_attention, selective_logp

LARGE_BYTES = 40 << 30
"""Free memory that the checks of large addresses want."""
NEAR = 2.0**-6
"""Distance of results whose bfloat16 products were summed in another order."""
RATIOS = {"": "token", ", sequence ratios": "sequence"}
READ_BACKS = {
    "linear_grpo_loss": 1,
    "linear_grpo_loss, sequence ratios": 2,
    "grpo_loss": 0,
    "cfg_sample": 0,
    "prefix_decode_attention": 0,
}
"""At most so many per call. Sequence ratios wait twice: how many rows act, and how many of them have a gradient."""
CALLS = {"grpo_loss": 3, "cfg_sample": 5}
"""Calls of the op in one of its problem's."""


def fresh(inputs: Tensors) -> dict[str, Tensor]:
    """Other floating values in tensors of the same shapes: each one's entries in reverse order of its first axis."""
    return {name: t.flip(0).clone() if t.is_floating_point() else t.clone() for name, t in inputs.items()}


def judged(found: Tensors, expected: Tensors) -> tuple[bool | None, str]:
    """Whether two results of the same call agree: bitwise, but for the vendor's products, which may choose another
    algorithm on another stream: then by distance, and the line says so."""
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    if not differing:
        return True, ""
    off = {name: distance(found[name], expected[name]) for name in differing}
    detail = ", ".join(f"{name} off by {error:.1e}" for name, error in list(off.items())[:4])
    close = all(error <= NEAR for error in off.values())  # NaN is not
    return (None, f"not bitwise: {detail}") if close else (False, detail)


def check_graph(report: Report, op: str, problem: Problem, call: Callable[[Tensors], dict[str, Tensor]]) -> None:
    """Captured once, replayed with other values in the same memory: bitwise what an eager call gives."""
    inputs = problem.cast(torch.bfloat16, "cuda")
    changed = fresh(inputs)
    expected = call(changed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    name = f"{op}: graph replay equals eager"
    try:
        with torch.cuda.graph(graph):
            kept = call(inputs)
    except Exception as error:
        torch.cuda.synchronize()
        detail = f"cannot be captured: {str(error).strip().splitlines()[0][:160]}"
        report.line(name=name, ok=False if problem.graph else None, detail=detail)
        return
    for key, value in changed.items():
        inputs[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    ok, detail = judged(kept, expected)
    report.line(name=name, ok=ok, detail=detail)


def check_streams(report: Report, op: str, problem: Problem, call: Callable[[Tensors], dict[str, Tensor]]) -> None:
    """Two calls on two streams, each behind a long wait, then memory is reused: nothing reads what is not ready."""
    first = problem.cast(torch.bfloat16, "cuda")
    second = fresh(first)
    expected = [call(first), call(second)]
    found = []
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    sources = [first, second]
    torch.cuda.synchronize()
    for stream, source in zip(streams, sources, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms: the inputs appear behind it
            late = {name: t.clone() for name, t in source.items()}
            found.append(call(late))
            del late
            torch.full((1 << 24,), torch.nan, device="cuda")  # takes memory that the call gave back
    torch.cuda.synchronize()
    for i in range(2):
        ok, detail = judged(found[i], expected[i])
        report.line(name=f"{op}: two streams, number {i}", ok=ok, detail=detail)


def check_autocast(report: Report, op: str, problem: Problem, call: Callable[[Tensors], dict[str, Tensor]]) -> None:
    """float32 inputs under autocast, and with TF32 products: as near to the reference as such products are."""
    inputs = problem.cast(torch.float32, "cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    for how in ("autocast", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = how == "tf32"
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
                found, expected = call(inputs), problem.call(inputs, "reference")
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        off = {
            name: distance(found[name], expected[name])
            for name in expected
            if found[name].is_floating_point() and found[name].dim() and "its token" not in name
        }
        worst = max(off, key=lambda name: off[name], default="")
        bad = [name for name, error in off.items() if not error <= 2 * NEAR]
        detail = f"{worst} off by {off[worst]:.1e}" if off else ""
        report.line(name=f"{op}: {how}", ok=not bad, detail=", ".join(bad) or detail)


def check_compiled(report: Report, op: str, problem: Problem, call: Callable[[Tensors], dict[str, Tensor]]) -> None:
    """Under `torch.compile`, twice: the same as eager."""
    inputs = problem.cast(torch.bfloat16, "cuda")
    expected, compiled = call(inputs), torch.compile(call)
    compiled(inputs)
    ok, detail = judged(compiled(inputs), expected)
    report.line(name=f"{op}: torch.compile", ok=ok, detail=detail)


def count_read_backs(run: Callable[[], Any]) -> tuple[int, list[str]]:
    """Times that the host waits for the device in one call, and where."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower()]
    return len(places), places


def check_read_backs(report: Report, op: str, problem: Problem, call: Callable[[Tensors], dict[str, Tensor]]) -> None:
    """Per call of the op, its gradients included; a problem's call may make several."""
    inputs, runs = problem.cast(torch.bfloat16, "cuda"), {"": call}
    if op == "linear_grpo_loss":
        backend = serving(op, False)
        runs = {kind: partial(head_losses, backend=backend, ratios=[ratio]) for kind, ratio in RATIOS.items()}
    for kind, run in runs.items():
        total, places = count_read_backs(partial(run, inputs))
        found, most = total / CALLS.get(op, 1), READ_BACKS.get(op + kind)
        report.line(
            name=f"{op}{kind}: read-backs per call",
            ok=None if most is None else found <= most,
            detail=f"{found:g}: {', '.join(sorted(set(places)))}",
        )
        if most is not None and not kind:
            report.write(goals={f"read_backs/{op}": {"measured": found}})


# Addresses beyond 2³¹ ---------------------------------------------------------------------------------------------


def _tail(report: Report, name: str, found: Tensors, expected: Tensors, bound: float) -> None:
    """Compares the last rows, which lie beyond 2³¹ elements."""
    off = {
        key: float((found[key].double() - expected[key].double()).norm() / expected[key].double().norm())
        for key in expected
    }
    wrong = {key: error for key, error in off.items() if not error <= bound}
    report.line(
        name=f"{name}: beyond 2^31 elements", ok=not wrong, detail=", ".join(f"{k} {v:.1e}" for k, v in off.items())
    )


def large_logits(report: Report, rows: int = 21504, vocabulary: int = 102400, device: str = "cuda") -> None:
    """[rows, vocabulary] bfloat16: `selective_logp` with its gradient, and `cfg_sample`."""
    last = slice(-64, None)
    logits = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    logp, entropy = selective_logp(logits, targets, backend="triton")
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    tail = logits.detach()[last].clone().requires_grad_()
    expected = selective_logp(tail, targets[last], backend="reference")
    (grad_tail,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), tail)
    found = {"logp": logp.detach()[last], "entropy": entropy.detach()[last], "dlogits": grad[last]}
    _tail(
        report,
        "selective_logp",
        found,
        {"logp": expected[0].detach(), "entropy": expected[1].detach(), "dlogits": grad_tail},
        0.02,
    )
    del grad
    seed, offset = torch.full((rows,), 3, device=device), torch.arange(rows, device=device)
    for options in ({}, {"top_k": 50, "top_p": 0.9}):
        whole = cfg_sample(logits.detach(), seed=seed, offset=offset, backend="triton", **options)  # type: ignore[arg-type]
        part = cfg_sample(
            logits.detach()[last].clone(),
            seed=seed[last].clone(),
            offset=offset[last].clone(),
            backend="triton",
            **options,
        )  # type: ignore[arg-type]
        same = float((whole.token[last] == part.token).double().mean())
        report.line(
            name=f"cfg_sample {options}: beyond 2^31 elements", ok=same == 1.0, detail=f"{same:.0%} same tokens"
        )


def large_caches(report: Report, columns: int = 1_200_000, device: str = "cuda") -> None:
    """Own keys [16, columns, 128] bfloat16: the last head's columns lie beyond 2³¹."""
    heads, width, rows = 16, 128, 8
    caches = [torch.randn(heads, columns, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
    prefix = [torch.randn(heads, 64, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
    query, key, value = (torch.randn(rows, heads, width, device=device, dtype=torch.bfloat16) for _ in range(3))
    start = columns - (rows - torch.arange(rows, device=device)) * 100
    zeros = torch.zeros_like(start)
    spans = torch.stack([zeros, zeros + 64, start, zeros + 70], 1)
    first = columns - rows * 100
    short = [cache[:, first:].clone() for cache in caches]
    moved = torch.stack([zeros, zeros + 64, start - first, zeros + 70], 1)
    expected = prefix_decode_attention(query, key, value, *prefix, *short, moved, backend="reference")
    found = prefix_decode_attention(query, key, value, *prefix, *caches, spans, backend="triton")
    stored = {"keys": caches[0][:, first:], "values": caches[1][:, first:]}
    _tail(
        report,
        "prefix_decode_attention",
        {"output": found, **stored},
        {"output": expected, "keys": short[0], "values": short[1]},
        0.02,
    )


def large_hidden(report: Report, rows: int = 1_100_000, device: str = "cuda") -> None:
    """Rows of 2,048: hidden states beyond 2³¹ elements against a small vocabulary."""
    hidden, vocabulary, last = 2048, 512, slice(-64, None)
    states = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, hidden, device=device, dtype=torch.bfloat16) / 30
    targets = torch.randint(vocabulary, (rows,), device=device)
    found = linear_logp(states, weight, targets, backend="triton")
    expected = linear_logp(states[last].clone(), weight, targets[last].clone(), backend="reference")
    names = ("logp", "entropy")
    _tail(
        report,
        "linear_logp",
        {n: f[last] for n, f in zip(names, found, strict=True)},
        dict(zip(names, expected, strict=True)),
        0.02,
    )


def run(report: Report, pretend: bool, op: str) -> None:
    """Of one op, or `large addresses`."""
    if pretend or not torch.cuda.is_available():
        raise Skipped("needs a GPU")
    torch.manual_seed(0)
    if op == "large addresses":
        free = torch.cuda.mem_get_info()[0]
        if free < LARGE_BYTES:
            raise Skipped(f"wants {LARGE_BYTES >> 30} GiB of free GPU memory, got {free >> 30}")
        checks: list[Callable[[], None]] = [
            lambda make=make: make(report)  # type: ignore[misc]
            for make in (large_logits, large_caches, large_hidden)
        ]
        names = ["logits", "caches", "hidden states"]
    else:
        problem = PROBLEMS[op](False)[0 if op == "groups" else 1]
        call = lambda inputs: problem.call(inputs, serving(op, False))  # noqa: E731
        # What is captured comes last: a capture that fails leaves the generator of random numbers captured.
        parts = (check_read_backs, check_streams, check_autocast, check_compiled, check_graph)
        checks = [lambda check=check: check(report, op, problem, call) for check in parts]  # type: ignore[misc]
        names = [check.__name__ for check in parts]
    for name, check in zip(names, checks, strict=True):
        try:
            check()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            report.line(name=f"{op}: {name}", ok=False, detail=f"{type(error).__name__}: {first}")
            torch.cuda.synchronize()  # raises again where the context is broken
        torch.cuda.empty_cache()
