"""Every op on inputs of three sizes, as the checks of `bench/gpu.py` take it: named tensors and one call.

Shapes: one small and odd, one of the image head, one of the text head with few rows, at the width that the goals are
measured at, so that what is compiled here is what is measured later.  With `pretend` three tiny ones.

Dims: `T` tokens, `S` sequences, `N` rows, `V` vocabulary, `D` hidden, `R` rows of a decode step, `E` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncr1.kernels.api import (
    SharedPrefixLayout,
    TokenStream,
    cfg_sample,
    dgs_select,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logp,
    prefix_decode_attention,
    selective_logp,
    shared_prefix_attention,
)

Tensors = Mapping[str, Tensor]
Call = Callable[[Tensors, str | None], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Problem:
    """One call.

    Args:
        shape: in words.
        inputs: tensors by name; floating ones are cast to the dtype that is checked, but for `wide`.
        call: the op and, where it has them, its gradients; `backend` as the op takes it.
        wide: names of floating inputs that stay float32 (rewards).
        exact: outputs that must be equal, not close.
        graph: the op promises to be captured in a CUDA graph.
        strided: inputs that a caller may hand over with any strides.
        written: inputs that the op writes to.
    """

    shape: str
    inputs: dict[str, Tensor]
    call: Call
    wide: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    graph: bool = True
    strided: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    def cast(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Copies on the device; floating ones of the dtype."""
        return {
            name: t.to(device, dtype if t.is_floating_point() and name not in self.wide else t.dtype, copy=True)
            for name, t in self.inputs.items()
        }


def with_gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the leaves, named after them."""
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def leaves_of(inputs: Tensors, *names: str) -> dict[str, Tensor]:
    """The named inputs as leaves with gradient."""
    return {name: inputs[name].detach().requires_grad_() for name in names}


def normal(*shape: int) -> Tensor:
    """Gaussian numbers, made on the GPU where there is one: a head of 200 million takes seconds on a host."""
    return torch.randn(*shape, device="cuda" if torch.cuda.is_available() else "cpu")


def packed(sequences: int, length: int, group: int) -> dict[str, Tensor]:
    """Ragged sequences and groups: lengths between half of `length` and all of it, one of them empty."""
    lengths = torch.randint(length // 2, length + 1, (sequences,))
    lengths[1] = 0
    return {
        "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        "group_offsets": torch.arange(0, sequences + 1, group).int(),
        "rewards": torch.rand(sequences),
    }


# Groups and losses ----------------------------------------------------------------------------------------------------


def groups(pretend: bool) -> list[Problem]:
    """`group_advantages` and `dgs_select`."""

    def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
        rewards, offsets = inputs["rewards"], inputs["group_offsets"]
        found = {f"advantages_{scale}": group_advantages(rewards, offsets, scale=scale, backend=backend)
                 for scale in ("group", "batch", "loo")}  # type: ignore[arg-type]  # fmt: skip
        for rule in ("variance_mass", "max_variance", "top_k"):
            found[f"keep_{rule}"] = dgs_select(rewards, offsets, rule=rule, backend=backend)  # type: ignore[arg-type]
        return found

    sizes = [(24, 8), (36, 6), (64, 16)] if pretend else [(24, 8), (1024, 8), (4096, 64)]
    exact = ("keep_variance_mass", "keep_max_variance", "keep_top_k")
    return [
        Problem(f"{s} in groups of {g}", packed(s, 4, g), call, ("rewards",), exact, strided=("rewards",))
        for s, g in sizes
    ]


def tokens(pretend: bool) -> list[Problem]:
    """`grpo_loss` of three loss types, with everything that it can take."""

    def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in ("dapo", "grpo", "cispo"):
            leaf = leaves_of(inputs, "logp")
            out = grpo_loss(
                leaf["logp"], inputs["old_logp"], inputs["rewards"], inputs["cu_seqlens"], inputs["group_offsets"],
                loss_mask=inputs["loss_mask"], modality=inputs["modality"], ref_logp=inputs["ref_logp"],
                entropy=inputs["entropy"], beta=0.04, loss_type=kind, num_items=100.0, backend=backend,
            )  # fmt: skip
            found |= {f"{kind}/loss": out.loss.detach(), f"{kind}/kl": out.metrics["kl/text"]}
            found |= {f"{kind}/{name}": grad for name, grad in with_gradients(out.loss, leaf).items()}
        return found

    def problem(sequences: int, length: int, group: int) -> Problem:
        inputs = packed(sequences, length, group)
        total = int(inputs["cu_seqlens"][-1])
        logp = -3 + torch.randn(total)
        inputs |= {"logp": logp, "old_logp": logp + 0.15 * torch.randn(total), "ref_logp": logp + 0.1,
                   "entropy": torch.rand(total), "loss_mask": torch.rand(total) < 0.9,
                   "modality": (torch.rand(total) < 0.5).to(torch.uint8)}  # fmt: skip
        return Problem(f"{total} tokens of {sequences} sequences", inputs, call, ("rewards",),
                       strided=("logp", "old_logp", "ref_logp", "loss_mask"))  # fmt: skip

    sizes = [(8, 9, 4), (12, 20, 4), (16, 33, 8)] if pretend else [(8, 9, 4), (64, 300, 8), (128, 680, 8)]
    return [problem(*size) for size in sizes]


# Heads ----------------------------------------------------------------------------------------------------------------


def head_sizes(pretend: bool) -> list[tuple[int, int, int]]:
    """(rows, hidden, vocabulary)."""
    if pretend:
        return [(11, 8, 37), (16, 16, 200), (24, 8, 130)]
    return [(251, 64, 1003), (512, 1024, 16384), (384, 2048, 102400)]


def head_inputs(rows: int, hidden: int, vocabulary: int) -> dict[str, Tensor]:
    """Logits of standard deviation 1.5."""
    return {
        "hidden": normal(rows, hidden),
        "weight": normal(vocabulary, hidden) * 1.5 / math.sqrt(hidden),
        "bias": 0.1 * normal(vocabulary),
        "targets": torch.randint(vocabulary, (rows,)),
    }


def near_logp(inputs: Tensors) -> Tensor:
    """[N] log-probabilities within about .1 of the true ones, without a product: weights are Gaussian, so a row's
    log-sum-exp is near log V + |h|² var(w) / 2."""
    hidden, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"].to(inputs["weight"].device)
    logit = (hidden * weight[targets]).sum(-1) + inputs["bias"][targets]
    lse = math.log(weight.shape[0]) + hidden.square().sum(-1) * 1.5**2 / hidden.shape[1] / 2
    return logit - lse


def half_kept(targets: Tensor, vocabulary: int) -> Tensor:
    """[N, ceil(V/32)] int32: the even ids and each row's target."""
    words = torch.full((targets.shape[0], -(-vocabulary // 32)), 0x55555555, dtype=torch.int32, device=targets.device)
    at = (targets // 32).unsqueeze(1)
    return words.scatter(1, at, words.gather(1, at) | (1 << (targets % 32)).int().unsqueeze(1))


def linear_scores(pretend: bool) -> list[Problem]:
    """`linear_logp` with a bias, over all ids and over a set of each row's own."""

    def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
        leaves = leaves_of(inputs, "hidden", "weight", "bias")
        logp, entropy = linear_logp(*list(leaves.values())[:2], inputs["targets"], bias=leaves["bias"],
                                    temperature=0.9, backend=backend)  # fmt: skip
        kept, uncertain = linear_logp(*list(leaves.values())[:2], inputs["targets"], bias=leaves["bias"],
                                      temperature=0.9, backend=backend,
                                      support=half_kept(inputs["targets"], inputs["weight"].shape[0]))  # fmt: skip
        found = {"logp": logp.detach(), "entropy": entropy.detach(), "kept/logp": kept.detach()}
        found["kept/entropy"] = uncertain.detach()
        total = logp.mean() + kept.mean() + 0.1 * (entropy.mean() + uncertain.mean())
        return found | with_gradients(total, leaves)

    return [
        Problem(f"{n} x {d} x {v}", head_inputs(n, d, v), call, graph=False, strided=("hidden", "weight", "bias"))
        for n, d, v in head_sizes(pretend)
    ]


def head_losses(
    inputs: Tensors, backend: str | None, ratios: Sequence[str] = ("token", "sequence")
) -> dict[str, Tensor]:
    """`linear_grpo_loss` and its gradients by kind of ratio."""
    found: dict[str, Tensor] = {}
    for ratio in ratios:
        leaves = leaves_of(inputs, "hidden", "weight", "bias")
        stream = TokenStream(leaves["hidden"], leaves["weight"], inputs["targets"], inputs["rows"], leaves["bias"])
        out = linear_grpo_loss(
            [stream], inputs["rewards"], inputs["cu_seqlens"], inputs["group_offsets"], old_logp=inputs["old_logp"],
            loss_mask=inputs["loss_mask"], num_items=64.0, ratio=ratio, backend=backend,
        )  # fmt: skip
        found |= {f"{ratio}/loss": out.loss.detach(), f"{ratio}/logp": out.logp}
        found |= {f"{ratio}/{name}": grad for name, grad in with_gradients(out.loss, leaves).items()}
    return found


def linear_losses(pretend: bool) -> list[Problem]:
    """`linear_grpo_loss`, one head with a bias, a mask and an old policy; and sequence ratios, which take a product
    more."""

    def problem(rows: int, hidden: int, vocabulary: int) -> Problem:
        group, length = 4, max(rows // 8, 1)
        inputs = packed(8, length, group)
        total = int(inputs["cu_seqlens"][-1])
        inputs |= head_inputs(total, hidden, vocabulary)
        inputs |= {"rows": torch.arange(total), "loss_mask": torch.rand(total) < 0.8}
        inputs["old_logp"] = near_logp(inputs) + 0.1 * normal(total)
        return Problem(f"{total} x {hidden} x {vocabulary}", inputs, head_losses, ("rewards", "old_logp"), graph=False,
                       strided=("hidden", "weight", "bias"))  # fmt: skip

    return [problem(*size) for size in head_sizes(pretend)]


def scores(pretend: bool) -> list[Problem]:
    """`selective_logp` and its gradient."""

    def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
        leaf = leaves_of(inputs, "logits")
        logp, entropy = selective_logp(leaf["logits"], inputs["targets"], temperature=1.1, backend=backend)
        return {"logp": logp.detach(), "entropy": entropy.detach()} | with_gradients(logp.mean() + entropy.mean(), leaf)

    return [
        Problem(f"{n} x {v}", {"logits": 1.5 * normal(n, v), "targets": torch.randint(v, (n,))}, call,
                strided=("logits",))
        for n, _, v in head_sizes(pretend)
    ]  # fmt: skip


# Sampling and attention -----------------------------------------------------------------------------------------------

DRAWS: dict[str, dict[str, Any]] = {
    "plain": {}, "top-k": {"top_k": 50}, "top-p": {"top_p": 0.9}, "both": {"top_k": 50, "top_p": 0.9},
    "min-p": {"min_p": 0.05}, "kept": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "with_support": True},
    "greedy": {"temperature": 0.0},
}  # fmt: skip


def samples(pretend: bool) -> list[Problem]:
    """`cfg_sample` under guidance, seven ways to draw; log-probabilities are compared where the token is the same."""

    def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, options in DRAWS.items():
            drawn = cfg_sample(
                inputs["cond"], inputs["uncond"], cfg_weight=3.0, seed=inputs["seed"], offset=inputs["offset"],
                backend=backend, **options,
            )  # fmt: skip
            found |= {f"{name}/token": drawn.token, f"{name}/entropy": drawn.entropy}
            found[f"{name}/logp of its token"] = drawn.logp
        return found

    def problem(rows: int, vocabulary: int) -> Problem:
        cond = 1.5 * normal(rows, vocabulary)
        inputs = {"cond": cond, "uncond": cond + 0.3 * normal(rows, vocabulary),
                  "seed": torch.full((rows,), 7), "offset": torch.arange(rows)}  # fmt: skip
        return Problem(f"{rows} x {vocabulary}", inputs, call, strided=("cond", "uncond"))

    sizes = [(3, 97), (4, 200), (2, 500)] if pretend else [(67, 1003), (64, 16384), (64, 102400)]
    return [problem(*size) for size in sizes]


def decode_steps(pretend: bool) -> list[Problem]:
    """`prefix_decode_attention`: groups that share a prefix, each row with its own tokens."""

    def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
        own = [inputs["own_keys"].clone(), inputs["own_values"].clone()]
        names = ("query", "key", "value", "prefix_keys", "prefix_values")
        with torch.no_grad():
            out = prefix_decode_attention(*(inputs[n] for n in names), *own, inputs["spans"], backend=backend)
        return {"output": out, "own_keys": own[0], "own_values": own[1]}

    def problem(prompts: int, group: int, prefix: int, done: int, heads: tuple[int, int], width: int) -> Problem:
        rows, (query_heads, kv_heads) = prompts * group, heads
        member = torch.arange(rows)
        spans = torch.stack([member // group * prefix, torch.full((rows,), prefix), member * (done + 1),
                             torch.randint(0, done + 1, (rows,))], 1)  # fmt: skip
        inputs = {"query": normal(rows, query_heads, width), "spans": spans}
        inputs |= {name: normal(rows, kv_heads, width) for name in ("key", "value")}
        inputs |= {f"prefix_{n}": normal(kv_heads, prompts * prefix, width) for n in ("keys", "values")}
        inputs |= {f"own_{n}": normal(kv_heads, rows * (done + 1), width) for n in ("keys", "values")}
        shape = f"{prompts} x {group} rows, prefix {prefix}, {done} own, heads {heads}, width {width}"
        return Problem(shape, inputs, call, strided=("query", "key", "value"))

    if pretend:
        sizes = [(2, 2, 5, 3, (2, 2), 16), (1, 3, 33, 4, (4, 2), 16), (3, 1, 0, 6, (2, 1), 8)]
    else:
        sizes = [(3, 5, 70, 33, (4, 2), 80), (8, 8, 676, 128, (16, 16), 128), (4, 8, 300, 64, (32, 8), 128)]
    return [problem(*size) for size in sizes]  # type: ignore[arg-type]


def prefixes(pretend: bool) -> list[Problem]:
    """`shared_prefix_attention` and its gradients; what serves it by default against plain PyTorch."""

    def problem(layout: SharedPrefixLayout, heads: tuple[int, int], width: int, name: str) -> Problem:
        total, (query_heads, kv_heads) = layout.num_tokens, heads
        moved: dict[torch.device, SharedPrefixLayout] = {}

        def call(inputs: Tensors, backend: str | None) -> dict[str, Tensor]:
            leaves = leaves_of(inputs, "q", "k", "v")
            there = moved.setdefault(inputs["q"].device, layout.to(inputs["q"].device))
            chosen = "reference" if backend == "reference" else None
            out = shared_prefix_attention(*leaves.values(), there, backend=chosen)
            return {"output": out.detach()} | with_gradients((out * inputs["probe"]).sum(), leaves)

        inputs = {"q": torch.randn(total, query_heads, width), "probe": torch.randn(total, query_heads, width)}
        inputs |= {name: torch.randn(total, kv_heads, width) for name in ("k", "v")}
        return Problem(f"{name}, heads {heads}, width {width}", inputs, call, strided=("q", "k", "v"))

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

    scale = 4 if pretend else 60
    ragged = [scale, 2 * scale, 0, 3 * scale, 1, scale]
    layouts = {
        "ragged": SharedPrefixLayout(offsets([2 * scale, 0, scale]), offsets(ragged), torch.tensor([0, 3, 4, 6]).int()),
        "equal": SharedPrefixLayout(offsets([3 * scale] * 2), offsets([scale] * 8), torch.tensor([0, 4, 8]).int()),
        "one group": SharedPrefixLayout(offsets([9 * scale]), offsets([2 * scale] * 8), torch.tensor([0, 8]).int()),
        "whole": SharedPrefixLayout(
            offsets([3 * scale, scale]),
            offsets([scale + 2] * 6),
            torch.tensor([0, 4, 6]).int(),
            torch.tensor([2 * scale, 0]).int(),
            torch.tensor([scale + 2] * 5 + [scale]).int(),
        ),
    }
    sizes = [((2, 1), 16)] * 4 if pretend else [((4, 2), 64), *[((16, 16), 128)] * 3]
    return [problem(made, *size, name) for (name, made), size in zip(layouts.items(), sizes, strict=True)]


PROBLEMS: dict[str, Callable[[bool], list[Problem]]] = {
    "linear_grpo_loss": linear_losses,
    "linear_logp": linear_scores,
    "cfg_sample": samples,
    "prefix_decode_attention": decode_steps,
    "grpo_loss": tokens,
    "selective_logp": scores,
    "shared_prefix_attention": prefixes,
    "groups": groups,
}
"""By op, in the order of what depends on them."""
