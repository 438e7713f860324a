"""A checkpoint of Janus-Pro-7B's shapes is converted there and back in little memory; 30 GB of disk, minutes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepseek_janus import PRO_7B, save_holes, save_settings
from helpers import ROOT

MOST = 1.5
"""GiB of resident memory."""
WATCHED = """
import atexit, resource, runpy, sys
kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
atexit.register(lambda: print(f"most resident: {kib() / 2**20:.2f} GiB"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_seven_billion_weights_take_little_memory(tmp_path: Path) -> None:
    save_settings(tmp_path / "theirs", PRO_7B, torch.bfloat16)
    num_bytes = save_holes(tmp_path / "theirs", PRO_7B)
    assert num_bytes > 14e9
    if shutil.disk_usage(tmp_path).free < 2.1 * num_bytes:
        pytest.skip(f"needs {2.1 * num_bytes / 1e9:.0f} GB of disk")
    for source, output, to in (("theirs", "ours", "transformers"), ("ours", "back", "deepseek")):
        command = [sys.executable, "-c", WATCHED, str(ROOT / "recipes" / "convert.py"), "--to", to]
        command += ["--model", str(tmp_path / source), "--output", str(tmp_path / output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        assert float(done.stdout.rpartition("most resident: ")[2].split()[0]) <= MOST
