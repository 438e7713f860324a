"""Peak memory that one call adds to its inputs: the gradients that it returns are part of it.

CPU: every provider gets a fresh process. Its inputs are allocated; the call runs once at a tiny size and the bare
products run once at full width, so that libraries, thread pools and the packing buffers that the BLAS keeps (11 MiB
with MKL on one thread) are there; providers that compile run once at full size. Then the peak resident size is reset,
the call runs once, and the answer is the peak (VmHWM of /proc/self/status) minus the resident size before. Blocks are
mapped and unmapped one by one (MALLOC_MMAP_THRESHOLD_), so freed memory of the preparation does not hide anything.
Without /proc the peak is getrusage's, which cannot be reset: then the answer is a lower bound.
CUDA: `torch.cuda.max_memory_allocated` minus what was allocated before, in this process.

    python bench/memory.py memory_16k "ours native"
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMPILES = ("compile",)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _peak_on_cpu(run: Any) -> tuple[int, str]:
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kept = run()
        unit = 1 if sys.platform == "darwin" else 1024
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
        del kept
        return peak, "getrusage, a lower bound"
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return peak, "VmHWM"


def _peak_on_cuda(run: Any) -> tuple[int, str]:
    import torch

    run()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak, "max_memory_allocated"


def probe(case_name: str, provider_name: str, device: str, quick: bool) -> dict[str, Any]:
    """Measures in this process."""
    import shapes
    from cases import cases_of
    from interleaved import Unavailable

    case, shape = cases_of(device, quick)[case_name]
    try:
        if not any(word in provider_name for word in COMPILES):
            tiny = {p.name: p for p in case.build(shapes.quick(shape))}[provider_name]
            tiny.prepare()()
        if case.library is not None:
            case.library(shape)()
        run = {p.name: p for p in case.build(shape)}[provider_name].prepare()
        if any(word in provider_name for word in COMPILES):
            run()
        peak, method = _peak_on_cpu(run) if device == "cpu" else _peak_on_cuda(run)
    except Unavailable as reason:
        return {"skipped": str(reason)}
    except RuntimeError as error:
        return {"skipped": f"failed: {str(error).splitlines()[0][:200]}"}
    return {"bytes": peak, "method": method}


def peak(case_name: str, provider_name: str, device: str, quick: bool = False) -> dict[str, Any]:
    """{"bytes", "method"} or {"skipped"}: in a process of its own on a CPU, in this one on CUDA."""
    if device != "cpu":
        return probe(case_name, provider_name, device, quick)
    command = [sys.executable, str(HERE / "memory.py"), case_name, provider_name, *(["--quick"] if quick else [])]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("provider")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(probe(arguments.case, arguments.provider, arguments.device, arguments.quick)))


if __name__ == "__main__":
    main()
