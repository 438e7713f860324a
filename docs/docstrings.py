"""Docstrings as the site shows them: `Equivalent PyTorch:` and the lines under it become a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class EquivalentCode(griffe.Extension):
    """Markdown takes indented lines for code where an empty line stands before them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^(Equivalent PyTorch.*:)\n(?= {4})", r"\1\n\n", text, flags=re.MULTILINE)
