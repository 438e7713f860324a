"""Backend `native`: C++ on CPU, loaded through a plain C ABI.

`libsyncr1_native.so` lies beside this file when the install found a compiler. Ops: forward only; where a gradient is
wanted, `reference` serves. Pointers go to tensors that are float32 or float64, int64 and contiguous; anything else is
copied into that form first.

Dims: `S` sequences, `P` groups, `N` rows, `V` vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from syncr1.kernels.layout import check_rewards
from syncr1.kernels.options import AGGREGATES, RULES, SCALES, check_choice
from syncr1.kernels.reference import advantage as reference_advantage
from syncr1.kernels.reference.logp import check_selective
from syncr1.kernels.reference.select import advantage_energy, check_selection, per_modality, total_reward

ABI_VERSION = 1
LIBRARY = Path(__file__).parent / "libsyncr1_native.so"

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES = {
    # rewards [S] f64, offsets [P+1] i64, P, scale, eps, out [S] f32
    "syncr1_group_advantages": [_POINTER, _POINTER, _INT, _INT, _DOUBLE, _POINTER],
    # energy [S] f64, reward [S] f64, offsets [P+1] i64, P, rule, mass, keep (-1 = half), min_keep, seed, out [S] u8
    "syncr1_dgs_select": [_POINTER, _POINTER, _POINTER, _INT, _INT, _DOUBLE, _INT, _INT, _INT, _POINTER],
    # logits [N, V] f32, row stride, targets [N] i64, N, V, temperature, forbidden [F] i64, F, logp [N], entropy [N]
    "syncr1_selective_logp": [
        _POINTER, _INT, _POINTER, _INT, _INT, _DOUBLE, _POINTER, _INT, _POINTER, _POINTER,
    ],
}  # fmt: skip


@cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why it cannot be used."""
    if not LIBRARY.exists():
        return "the C++ library was not built (no compiler or cmake at install time); install again where there is one"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the C++ library does not load ({error}); install again on this machine"
    library.syncr1_abi_version.restype = ctypes.c_int32
    found = library.syncr1_abi_version()
    if found != ABI_VERSION:
        return f"the C++ library has ABI {found}, this code wants {ABI_VERSION}; install again"
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return f"the C++ library lacks {name}; install again"
        function.argtypes, function.restype = arguments, None
    return library


def unavailable_reason() -> str | None:
    """Why the backend is absent, or None."""
    library = load()
    return library if isinstance(library, str) else None


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why these tensors are not served, or None."""
    if any(t.device.type != "cpu" for t in tensors):
        return "it serves CPU tensors only"
    if any(t.dtype != torch.float32 for t in tensors):
        return "it serves float32 only"
    if torch.is_grad_enabled() and op == "selective_logp" and any(t.requires_grad for t in tensors):
        return "it has no backward; use torch.no_grad() or another backend"
    return None


def _call(name: str, *arguments: Tensor | float) -> None:
    library = load()
    assert isinstance(library, ctypes.CDLL)  # dispatch asked unavailable_reason()
    getattr(library, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    *,
    weights: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    aggregate: str = "sum_then_normalize",
) -> Tensor:
    """See `syncr1.kernels.api.group_advantages`."""
    op = "group_advantages"
    check_rewards(op, rewards, group_offsets, weights)
    check_choice(op, "scale", scale, SCALES)
    check_choice(op, "aggregate", aggregate, AGGREGATES)
    if rewards.dim() == 2 and aggregate == "normalize_then_sum":
        return reference_advantage.group_advantages(
            rewards, group_offsets, weights=weights, scale=scale, eps=eps, aggregate="normalize_then_sum"  # type: ignore[arg-type]
        )  # fmt: skip
    reward_S = reference_advantage.combine_rewards(rewards.detach(), weights).contiguous()
    offsets = group_offsets.long().contiguous()
    out_S = torch.empty(reward_S.numel(), dtype=torch.float32)
    _call("syncr1_group_advantages", reward_S, offsets, offsets.numel() - 1, SCALES.index(scale), eps, out_S)
    return out_S


def dgs_select(
    rewards: Tensor | Mapping[str, Tensor],
    group_offsets: Tensor,
    *,
    rule: str = "variance_mass",
    mass: float = 0.9,
    keep: int | None = None,
    min_keep: int = 2,
    seed: int = 0,
    weights: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    aggregate: str = "sum_then_normalize",
) -> Tensor:
    """See `syncr1.kernels.api.dgs_select`."""
    check_selection("dgs_select", rule, mass, keep, min_keep)
    parts = per_modality("dgs_select", rewards)
    energy_S = advantage_energy(
        [
            group_advantages(part, group_offsets, weights=weights, scale=scale, eps=eps, aggregate=aggregate)
            for part in parts
        ]
    )
    reward_S = total_reward(parts, weights).contiguous()
    offsets = group_offsets.long().contiguous()
    out_S = torch.empty(reward_S.numel(), dtype=torch.uint8)
    _call(
        "syncr1_dgs_select", energy_S, reward_S, offsets, offsets.numel() - 1, RULES.index(rule), mass,
        -1 if keep is None else keep, min_keep, seed, out_S,
    )  # fmt: skip
    return out_S.bool()


def selective_logp(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `syncr1.kernels.api.selective_logp`."""
    check_selective("selective_logp", logits, targets, temperature, forbidden)
    logits_NV = logits.detach()
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    num_rows, vocabulary = logits_NV.shape
    targets_N = targets.long().contiguous()
    ids = torch.empty(0, dtype=torch.int64) if forbidden is None else forbidden.contiguous()
    logp_N, entropy_N = torch.empty(num_rows), torch.empty(num_rows)
    _call(
        "syncr1_selective_logp", logits_NV, logits_NV.stride(0), targets_N, num_rows, vocabulary, temperature, ids,
        ids.numel(), logp_N, entropy_N,
    )  # fmt: skip
    return logp_N, entropy_N


OPS = {"group_advantages": group_advantages, "dgs_select": dgs_select, "selective_logp": selective_logp}
