"""Makes `import torchvision` work beside a CPU build of torch; import it before transformers, lpips or torchvision.

torchvision's wheel registers fake kernels for its compiled operators when it is imported.  Its compiled library does
not load beside a torch build that it was not made for, so the operators are missing and the import raises
`operator torchvision::nms does not exist`, which takes transformers' Janus and lpips down with it (torch 2.13 CPU).
Neither uses those operators: declaring their schemas is enough.
"""

from __future__ import annotations

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = torch.library.Library("torchvision", "FRAGMENT")


def _declare_missing_operators() -> None:
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import sys

        for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[name]
        for schema in _SCHEMAS.values():
            _library.define(schema)
        import torchvision  # noqa: F401


_declare_missing_operators()
