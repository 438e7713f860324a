"""Our kernels on tiny inputs, for `compute-sanitizer --tool racecheck` and `memcheck`: `sanitizer/<tool>`.

The step starts the tool on this file and reads what it prints.

    compute-sanitizer --tool racecheck python bench/gpu_sanitizer.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu_report import Report, Skipped

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = re.compile(r"={3,}\s*((?:RACECHECK|ERROR) SUMMARY:.*)")
FOUND = re.compile(r"={3,}\s*((?:Error|Warning|ERROR|Invalid|Race reported).*)")


def ours() -> None:
    """Every kernel, in each of its forms, on the smallest inputs that have several tiles."""
    import torch
    from gpu_problems import PROBLEMS

    from syncr1.kernels.api import TokenStream, cfg_sample, linear_grpo_loss, selective_logp

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name, problems in PROBLEMS.items():
        if name == "shared_prefix_attention":  # another library's kernels
            continue
        problem = problems(True)[1]
        for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
            problem.call(problem.cast(dtype, device), "triton")
        print(f"{name}: done", flush=True)
    if device == "cpu":
        return
    for vocabulary in (17000, 40000):  # rows that are swept, not held
        logits = torch.randn(2, vocabulary).to(device).requires_grad_()
        logp, entropy = selective_logp(logits, torch.tensor([3, 5]).to(device), backend="triton")
        torch.autograd.grad(logp[0] + entropy[1], logits)
        for options in ({}, {"top_k": 20}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1, "with_support": True}):
            cfg_sample(logits.detach(), seed=1, offset=2, backend="triton", **options)  # type: ignore[arg-type]
        print(f"{vocabulary} ids: done", flush=True)
    # Rows of a workspace that end inside 16 bytes, held and swept. Without a bias: the bytes behind its last id, which
    # a load of 16 takes along, are another's to memcheck.
    for vocabulary in (203, 17003):
        hidden, weight = (torch.randn(n, 16).to(device, torch.bfloat16).requires_grad_() for n in (4, vocabulary))
        where = torch.arange(4).to(device)
        stream = TokenStream(hidden, weight, where + vocabulary - 4, where)
        offsets = torch.arange(0, 5, 2).int().to(device)
        for ratio in ("token", "sequence"):
            out = linear_grpo_loss(
                [stream],
                where[:2].float(),
                offsets,
                torch.tensor([0, 2]).int().to(device),
                loss_mask=where >= 0,
                ratio=ratio,
                backend="triton",
            )
            torch.autograd.grad(out.loss, (hidden, weight))
        print(f"rows of {vocabulary} ids: done", flush=True)
    torch.cuda.synchronize()


def verdict(output: str) -> tuple[bool | None, str]:
    """Whether the tool found nothing, and what it said; None where it did not run to its summary: it refuses some
    virtual machines, which is no finding."""
    summaries = SUMMARY.findall(output)
    findings = [line for line in FOUND.findall(output) if "SUMMARY" not in line]
    detail = "; ".join([*summaries, *findings[:5]])[:600]
    if not summaries:
        return None, detail
    return not findings and all(re.search(r"\b0 (errors|hazards)", line) for line in summaries), detail


def run(report: Report, pretend: bool, tool: str) -> None:
    """One line: what the tool summed up."""
    program = shutil.which("compute-sanitizer")
    if program is None or pretend:
        raise Skipped("needs a GPU" if pretend else "compute-sanitizer is not on PATH")
    target = [sys.executable, str(Path(__file__).resolve())]
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a read beyond a tensor lands in the cache's block
    options = ["--tool", tool, "--target-processes", "application-only", "--report-api-errors", "no"]
    command = [program, *options, "--print-limit", "20", *target]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    ok, detail = verdict(done.stdout)
    detail = detail or f"no summary, exit code {done.returncode}: see the log"
    report.line(name=f"{tool}: our kernels", ok=ok, detail=detail, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    ours()
