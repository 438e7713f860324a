"""Makes `import torchvision` work beside a build of torch that it was not made for; import it before transformers.

torchvision registers fake kernels for its compiled operators when it is imported.  Where its compiled library does not
load (that of PyPI's wheel wants CUDA's libraries, which torch's build for CPUs lacks), the operators are missing and
the import raises `operator torchvision::nms does not exist`, which takes transformers' Janus and lpips down with it.
Neither uses those operators: declaring their schemas is enough.  It is done when somebody asks for torchvision, and not
before.  `recipes/install.py` copies this file into an environment that needs it in every interpreter: it imports
nothing of ours.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[Any] = []
"""A library of operators that nobody holds is gone again."""


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds no module: it is asked for torchvision before those that do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def declare_missing_operators() -> None:
    """Declares what torchvision expects of its compiled library, where that does not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or importlib.util.find_spec("torch") is None:
        return
    import torch

    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in missing:
            _declared[-1].define(schema)


sys.meta_path.insert(0, _BeforeTorchvision())
