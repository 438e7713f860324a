"""Names the machine and the versions that a result was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch": "torch", "triton": "triton", "liger": "liger_kernel", "trl": "trl", "transformers": "transformers"}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """In words."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """A file name: `cpu-xeon-2core`, `nvidia-h200`."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    words = re.sub(r"\([^)]*\)|@.*", " ", _cpu_name().lower())
    words = re.sub(r"\b(intel|amd|processor|cpu|core|\d+-core)\b", " ", words)
    return re.sub(r"[^a-z0-9]+", "-", f"cpu {words} {os.cpu_count()}core").strip("-")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: str) -> dict[str, Any]:
    """What a number depends on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "omp": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "python": platform.python_version(),
        **{name: _version(distribution) for name, distribution in PACKAGES.items()},
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "kernels", "engine", "bench")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
