"""Generated rows of logits for the tests of `selective_logp`, `linear_logp` and `cfg_sample`.

Dims: `N` rows, `V` vocabulary, `D` hidden, `B` decode rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from kernel_cases import Values
from torch import Tensor

from syncr1.kernels.api import cfg_sample, linear_logp, selective_logp
from syncr1.kernels.reference.philox import uniform
from syncr1.kernels.reference.sample import truncate

WIDTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 257, 1025, 2100]) | st.integers(1, 300)


@dataclass(frozen=True)
class RowCase:
    """Operands of `selective_logp` (`logits`) or `linear_logp` (`hidden`, `weight`, `bias`), and what they share."""

    operands: Values
    targets: Tensor
    temperature: float
    forbidden: Tensor | None
    upstream: Tensor
    """[2, N]: gradients of log-probability and entropy."""


@st.composite
def row_cases(draw: st.DrawFn, *, linear: bool) -> RowCase:
    num_rows, size = draw(st.integers(0, 9)), draw(st.sampled_from([2, 3, 17, 40]) if linear else WIDTHS)
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    spread = draw(st.sampled_from([0.01, 1.0, 9.0]))
    if linear:
        width = draw(st.sampled_from([1, 3, 8]))
        operands = {
            "hidden": torch.randn(num_rows, width, generator=random) * spread,
            "weight": torch.randn(size, width, generator=random),
        }
        if draw(st.booleans()):
            operands["bias"] = torch.randn(size, generator=random)
    else:
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        operands = {"logits": (torch.randn(num_rows, size, generator=random) * spread).to(dtype)}
    order = torch.randperm(size, generator=random)
    num_forbidden = draw(st.integers(0, min(3, size - 1)))
    forbidden = order[:num_forbidden] if num_forbidden or draw(st.booleans()) else None
    targets = order[num_forbidden:][torch.randint(size - num_forbidden, (num_rows,), generator=random)]
    upstream = (
        torch.randn(2, num_rows, generator=random)
        * torch.tensor(draw(st.sampled_from([(1, 1), (1, 0), (0, 1)])))[:, None]
    )
    return RowCase(operands, targets, draw(st.sampled_from([1.0, 0.3, 1.7])), forbidden, upstream)


def run_rows(rows: RowCase, backend: str, dtype: torch.dtype | None = None) -> Values:
    leaves = {n: (v if dtype is None else v.to(dtype)).clone().requires_grad_() for n, v in rows.operands.items()}
    op: Any = selective_logp if "logits" in leaves else linear_logp
    operands = [leaf for name, leaf in leaves.items() if name != "bias"]
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    logp, entropy = op(
        *operands, rows.targets, temperature=rows.temperature, forbidden=rows.forbidden, backend=backend, **bias
    )
    upstream = rows.upstream.to(logp.dtype)
    grads = torch.autograd.grad((logp * upstream[0] + entropy * upstream[1]).sum(), list(leaves.values()))
    return {"logp": logp, "entropy": entropy, **dict(zip(leaves, grads, strict=True))}


@dataclass(frozen=True)
class Draw:
    """Arguments of `cfg_sample`."""

    cond: Tensor
    uncond: Tensor | None
    keys: Values
    settings: dict[str, Any]

    def run(self, backend: str, rows: Tensor | slice = slice(None), dtype: torch.dtype | None = None) -> Values:
        logits = [None if z is None else z[rows].to(dtype or z.dtype) for z in (self.cond, self.uncond)]
        assert logits[0] is not None
        out = cfg_sample(
            logits[0],
            logits[1],
            seed=self.keys["seed"][rows],
            offset=self.keys["offset"][rows],
            backend=backend,
            **self.settings,
        )
        return {name: getattr(out, name) for name in ("token", "logp", "logp_mixed", "entropy")}


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    num_rows, width = draw(st.integers(0, 9)), draw(WIDTHS)
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    logits = torch.randn(2, num_rows, width, generator=random) * draw(st.sampled_from([1.0, 5.0]))
    if draw(st.booleans()):  # ties
        logits = logits.round()
    logits = logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    guided = draw(st.booleans())
    forbidden = torch.randperm(width, generator=random)[: draw(st.integers(0, min(3, width - 1)))]
    limit = (1 << 63) - 1
    keys = {name: torch.randint(-limit, limit, (num_rows,), generator=random) for name in ("seed", "offset")}
    settings = {
        "cfg_weight": draw(st.sampled_from([0.0, 1.0, 5.0])) if guided else 1.0,
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        "top_k": draw(st.sampled_from([0, 0, 1, 3, 50])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.9013, 0.3017, 1e-6])),
        "forbidden": forbidden if len(forbidden) or draw(st.booleans()) else None,
    }
    return Draw(logits[0], logits[1] if guided else None, keys, settings)


def undecided(case: Draw) -> Tensor:
    """[B] bool: which id a row gets hangs on the rounding of float32."""
    s, cond = case.settings, case.cond.double()
    mixed = cond if case.uncond is None else case.uncond.double() + s["cfg_weight"] * (cond - case.uncond.double())
    mixed = mixed / (s["temperature"] or 1.0)
    if s["forbidden"] is not None:
        mixed = mixed.index_fill(1, s["forbidden"], -torch.inf)
    logp = mixed.log_softmax(dim=1)
    ordered = logp.sort(dim=1, descending=True).values
    gaps = ordered[:, :-1] - ordered[:, 1:]
    tied = ((gaps > 0) & (gaps < 1e-5)).any(dim=1) & ((s["top_k"] > 0) | (s["top_p"] < 1) | (s["temperature"] == 0))
    kept = truncate(logp, s["top_k"], 1.0).exp()
    held = kept.sort(dim=1, descending=True).values.cumsum(dim=1)
    edge = ((held - s["top_p"] * held[:, -1:]).abs() < 1e-6).any(dim=1) & (s["top_p"] < 1)
    cumulative = truncate(logp, s["top_k"], s["top_p"]).exp().cumsum(dim=1)
    threshold = uniform(case.keys["seed"], case.keys["offset"]).unsqueeze(1) * cumulative[:, -1:]
    return tied | edge | ((cumulative - threshold).abs() < 1e-7).any(dim=1)
