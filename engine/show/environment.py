"""What it takes to repeat a run: versions, commit, device and command, as environment.json has them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncr1.kernels.api import attention_provider
from syncr1.kernels.dispatch import available

PACKAGES = ("syncr1", "torch", "transformers", "deepspeed", "triton", "tokenizers", "safetensors", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, commit, device and command of this process; no environment variables, which may hold secrets."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "backends": available(),
        "attention": attention_provider("cuda" if cuda else "cpu"),
        "ranks": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
    }


def _commit() -> str | None:
    """The commit of the checkout that this file is in, `-dirty` with changes; None without one (an installed wheel)."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no commit yet
    return done.stdout.strip()
