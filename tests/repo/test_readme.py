"""The README's Python runs as it stands there, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # TRL's import needs it where torchvision's wheel does not fit torch

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def test_python_blocks_run() -> None:
    pytest.importorskip("trl")
    blocks = python_blocks("README.md")
    assert len(blocks) == 5
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)  # blocks build on those before them
