"""Where the time of an op goes: torch.profiler's top kernels, and what they achieve of the machine's two ceilings.

`profile/<op>`: linear_grpo_loss and cfg_sample at the sizes of the goals, and one decoding step of an image rollout of
a random Janus-Pro-1B.  Bytes and operations are those that the op cannot do without, so a share of a ceiling is a lower
bound of what the kernels themselves reach.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import cases
import gpu_machine
import models
import problems
import shapes
import torch
from gpu_report import Report
from sides import Sides, photo_folder, work_of

from syncr1.engine.rollout.sampler import RolloutEngine
from syncr1.engine.rollout.sampling import Sampling

TOP = 12
"""Kernels that are told of."""
PRODUCTS = ("gemm", "cutlass", "nvjet", "xmma", "cublas", "aten::mm", "aten::addmm", "aten::linear")
"""In the names of the vendor's matrix products."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one call cannot do without.

    Args:
        product_flops: of matrix products.
        product_bytes: that the products read and write at least.
        our_bytes: that our own kernels read and write at least.
    """

    product_flops: float = 0.0
    product_bytes: float = 0.0
    our_bytes: float = 0.0


def our_kernels() -> set[str]:
    """Names of the Triton functions."""
    from syncr1.kernels import triton_ops

    found = set()
    for part in pkgutil.iter_modules(triton_ops.__path__):
        module = importlib.import_module(f"{triton_ops.__name__}.{part.name}")
        found |= {name for name, value in vars(module).items() if hasattr(value, "arg_names")}
    return found


def profiled(run: Callable[[], Any], device: str, calls: int = 3) -> list[dict[str, Any]]:
    """Rows {name, calls, us} per call of `run`, most time first; on a CPU its operators."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    run()
    with profile(activities=activities) as taken:
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    rows = []
    for event in taken.key_averages():
        on_device = "CUDA" in str(getattr(event, "device_type", ""))
        if device == "cuda" and not on_device:
            continue
        micros = getattr(event, "self_device_time_total", 0.0) if on_device else event.self_cpu_time_total
        if micros > 0:
            rows.append({"name": event.key[:160], "calls": event.count / calls, "us": micros / calls})
    return sorted(rows, key=lambda row: -row["us"])


def achieved(rows: list[dict[str, Any]], work: Work, ceilings: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By kind of kernel: time, bytes or operations a second, and the share of the ceiling."""
    names = our_kernels()
    seconds = {"products": 0.0, "ours": 0.0, "other": 0.0}
    for row in rows:
        kind = "ours" if row["name"] in names else "other"
        if any(word in row["name"].lower() for word in PRODUCTS):
            kind = "products"
        seconds[kind] += row["us"] / 1e6
    found: dict[str, dict[str, float]] = {kind: {"us": value * 1e6} for kind, value in seconds.items()}
    bandwidth, rate = ceilings["copy_bytes_per_second"], ceilings["bf16_flops"]
    if seconds["products"] and work.product_flops:
        flops = work.product_flops / seconds["products"]
        found["products"] |= {"flops": flops, "share_of_products": flops / rate}
    for kind, amount in (("products", work.product_bytes), ("ours", work.our_bytes)):
        if seconds[kind] and amount:
            speed = amount / seconds[kind]
            found[kind] |= {"bytes_per_second": speed, "share_of_copy": speed / bandwidth}
    return found


def linear(device: str, quick: bool) -> tuple[Callable[[], Any], Work]:
    """The head and the loss: three products, and a sweep over the logits that reads them once and writes them once."""
    shape = cases.cases_of(device, quick)["linear_large"][1]
    assert isinstance(shape, shapes.HeadShape)
    N, V, D, item = shape.rows, shape.vocabulary, shape.hidden, shape.dtype.itemsize
    work = Work(6.0 * N * V * D, 3.0 * item * (N * V + V * D + N * D), 2.0 * N * V * item)
    backend = "native" if device == "cpu" else "triton"
    return cases.our_head(problems.head_problem(shape), backend), work


def sample(device: str, quick: bool, name: str = "cfg_sample") -> tuple[Callable[[], Any], Work]:
    """Guidance and the draw: both sets of logits are read once."""
    shape = cases.cases_of(device, quick)[name][1]
    assert isinstance(shape, shapes.LogitShape)
    chosen = next(p for p in cases.CASES[name].build(shape) if p.name in ("ours native", "ours triton"))
    return chosen.prepare(), Work(our_bytes=2.0 * shape.rows * shape.vocabulary * shape.dtype.itemsize)


def decoding(device: str, quick: bool, sides: Sides) -> tuple[Callable[[], Any], Work]:
    """One step of image tokens, in the middle of the images; on a CPU a whole tiny rollout."""
    engine = RolloutEngine(sides.policy)
    sampling = Sampling(num_generations=sides.work.group, cfg_weight=sides.work.cfg_weight)
    engine.generate(sides.drawings, sampling)
    if device == "cpu":
        return lambda: engine.generate(sides.drawings[:1], sampling), Work()
    step = next(reversed(engine.stepper._graphs.values()))
    state, half = step.state, sides.size.image_tokens // 2

    def run() -> None:
        state.step.zero_()
        state.rows.own_length.fill_(half)
        step.replay()

    import rates

    model = sides.policy.model
    weights = rates.linears(model.model.language_model, model.model.generation_head)
    rows = len(state.rows)
    prompts = sum(int(ids.numel()) for ids in sides.ids(sides.drawings))
    read = (prompts + sides.policy.unconditional_tokens().numel() + rows * half) * sides.kv_token_bytes
    flops = 2.0 * rows * sum(weight.numel() for weight in weights)
    work = Work(flops, rates.num_bytes(weights), read)
    return run, work


def run(report: Report, pretend: bool, what: str) -> None:
    """`linear_grpo_loss`, `cfg_sample`, `cfg_sample_top_p` or `decode_step`."""
    device = "cpu" if pretend else "cuda"
    ceilings = gpu_machine.ceilings(device, *((1 << 24, 256) if pretend else (2 << 30, gpu_machine.SIDE)))
    with photo_folder() as folder:
        if what == "linear_grpo_loss":
            call, work = linear(device, pretend)
        elif what == "decode_step":
            size, amount = models.size_of(device, pretend), work_of(device, pretend)
            call, work = decoding(device, pretend, Sides(size, amount, folder, 0, amount.drawings))
        else:
            call, work = sample(device, pretend, what)
        rows = profiled(call, device)
    if not rows:
        report.line(name=f"{what}: the profiler", ok=None, detail="it saw no kernel")
    total = sum(row["us"] for row in rows)
    seconds = gpu_machine.seconds_of(call, device, repeats=5)
    report.write(
        top=[{**row, "share": row["us"] / total} for row in rows[:TOP]],
        kernels=sum(row["calls"] for row in rows),
        kernel_us=total,
        call_us=seconds * 1e6,
        achieved=achieved(rows, work, ceilings),
        ceilings=ceilings,
    )
