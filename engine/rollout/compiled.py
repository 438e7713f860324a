"""torch.compile for the trunk of decoding steps: one token per row, so launches and small kernels are the cost.

Rows are a symbolic size, so that a batch may shrink without compiling again; the caches' columns are not.  With
symbolic columns torch 2.13's Inductor gives every layer the first layer's view of a cache that an op writes to (the
storage offset is lost), without an error.

Dims: R rows, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from types import FunctionType

import torch
from torch import Tensor

from ..policies.attention_interface import AttentionLayout
from ..policies.base import Policy
from ..policies.cache import Decode

_log = logging.getLogger(__name__)


class CompiledTrunk:
    """A policy's trunk, compiled for `Decode`; any other layout goes to the plain one.

    The policy may be trained between calls: weights are inputs of what is compiled. Inside a CUDA graph, run it once
    before capture, because the first call compiles.

    Args:
        policy: whose trunk it is; its modules must have no hooks, which would break the graph.
        backend: of torch.compile.
        max_shapes: sizes of caches to compile for. With more, after a warning, the plain trunk runs.
    """

    def __init__(self, policy: Policy, *, backend: str = "inductor", max_shapes: int = 8) -> None:
        self.policy, self.max_shapes = policy, max_shapes
        self._compiled_for: set[Hashable] = set()
        self._refused: set[Hashable] = set()

        def trunk(embeddings: Tensor, position_ids: Tensor, layout: Decode) -> Tensor:
            return policy.trunk(embeddings, position_ids, layout)

        # A code object of its own: dynamo counts recompilations, and refuses more than a few, per code object.
        fresh = FunctionType(trunk.__code__.replace(), trunk.__globals__, "trunk", None, trunk.__closure__)
        self._compiled = torch.compile(fresh, backend=backend, dynamic=False, fullgraph=True)

    def __call__(self, embeddings: Tensor, position_ids: Tensor, layout: AttentionLayout) -> Tensor:
        """[R, 1, D], [R, 1] -> [R, 1, D] final hidden states; see `Policy.trunk`."""
        if not isinstance(layout, Decode) or torch.is_grad_enabled():
            return self.policy.trunk(embeddings, position_ids, layout)
        key = _key(embeddings, layout)
        if key not in self._compiled_for and len(self._compiled_for) >= self.max_shapes:
            if key not in self._refused:
                self._refused.add(key)
                _log.warning(
                    "compiled trunk: compiled for %d sizes of caches already, so (one row, prompt columns, "
                    "own columns, …) = %s runs uncompiled; allocate caches in few sizes, or raise max_shapes",
                    self.max_shapes,
                    key,
                )
            return self.policy.trunk(embeddings, position_ids, layout)
        for tensor in (embeddings, position_ids, layout.spans):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if key in self._compiled_for:
            return self._compiled(embeddings, position_ids, layout)
        self._compiled_for.add(key)
        # Every key may cost an entry; the default of 8 is for accidents, which max_shapes guards against here.
        with torch._dynamo.config.patch(recompile_limit=4 * self.max_shapes):
            return self._compiled(embeddings, position_ids, layout)


def _key(embeddings: Tensor, layout: Decode) -> Hashable:
    """What makes dynamo compile again. One row is a case of its own, because sizes 0 and 1 are never symbolic."""
    columns = layout.prompts.keys.shape[2], layout.own.keys.shape[2]
    return embeddings.shape[0] == 1, *columns, torch.is_inference_mode_enabled(), embeddings.dtype
