"""The public ops on the `triton` backend, in Triton's interpreter: what lies between them and the kernels.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from syncr1.kernels import api

pytest.importorskip("triton")
Layout = Callable[[Tensor], Tensor]


def every_other(values: Tensor) -> Tensor:
    """The same values, every dimension with a stride of its own; what lies between is NaN, or a wrong id."""
    wide = torch.full([2 * n for n in values.shape], 77, device=values.device).to(values.dtype)
    if values.is_floating_point():
        wide.fill_(torch.nan)
    view = wide[tuple(slice(1, None, 2) for _ in values.shape)]
    return view.copy_(values)


def transposed(values: Tensor) -> Tensor:
    """The last dimension lies apart."""
    return values.t().contiguous().t() if values.dim() == 2 else every_other(values)


def shifted(values: Tensor) -> Tensor:
    """Contiguous, and not at a multiple of 16 bytes."""
    buffer = torch.full((values.numel() + 3,), 77, device=values.device).to(values.dtype)
    return buffer[3:].view(values.shape).copy_(values)


LAYOUTS: list[Layout] = [every_other, transposed, shifted]
ROWS, VOCABULARY, WIDTH = 6, 77, 5


def made(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return {
        "logits": 2 * normal(ROWS, VOCABULARY),
        "uncond": normal(ROWS, VOCABULARY),
        "hidden": normal(ROWS, WIDTH),
        "weight": normal(VOCABULARY, WIDTH),
        "bias": normal(VOCABULARY),
        "old_logp": -4 + 0.1 * normal(ROWS),
        "rewards": normal(4),
        "targets": torch.tensor([1, 7, 76, 3, 0, 12]).to(DEVICE),
        "rows": torch.tensor([5, 0, 3, 1, 2, 4]).to(DEVICE),
        "offset": torch.arange(ROWS).to(DEVICE) + 9,
        "cu_seqlens": torch.tensor([0, 2, 3, 5, 6]).to(DEVICE),
        "group_offsets": torch.tensor([0, 2, 4]).to(DEVICE),
        "mask": torch.tensor([True, True, True, False, True, True]).to(DEVICE),
    }


def sampled(given: dict[str, Tensor]) -> list[Tensor]:
    options: dict[str, Any] = {"cfg_weight": 3.0, "top_k": 20, "top_p": 0.8, "seed": 5, "offset": given["offset"]}
    drawn = api.cfg_sample(given["logits"], given["uncond"], backend="triton", **options)
    return [drawn.token, drawn.logp, drawn.logp_mixed, drawn.entropy]


def scored(given: dict[str, Tensor]) -> list[Tensor]:
    leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight", "bias", "logits")]
    hidden, weight, bias, logits = leaves
    logp, entropy = api.linear_logp(hidden, weight, given["targets"], bias=bias, backend="triton")
    more, other = api.selective_logp(logits, given["targets"], backend="triton")
    grads = torch.autograd.grad((logp - 0.3 * entropy + more * other).sum(), leaves)
    return [logp, entropy, more, other, *grads]


def losses(given: dict[str, Tensor]) -> list[Tensor]:
    names = ("hidden", "weight", "bias")
    leaves = [given[name].detach().requires_grad_() for name in names]
    stream = api.TokenStream(*leaves[:2], given["targets"], given["rows"], leaves[2])
    places = (given["cu_seqlens"], given["group_offsets"])
    old, mask = given["old_logp"], given["mask"]
    head = api.linear_grpo_loss([stream], given["rewards"], *places, old_logp=old, loss_mask=mask, backend="triton")
    logp = given["old_logp"].detach().requires_grad_()
    plain = api.grpo_loss(logp, old + 0.1, given["rewards"], *places, loss_mask=mask, backend="triton")
    grads = torch.autograd.grad(head.loss + plain.loss, [*leaves, logp])
    return [head.loss, plain.loss, plain.advantages, head.logp, *grads]  # type: ignore[list-item]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("op", [sampled, scored, losses])
def check_layouts_of_memory(op: Callable[[dict[str, Tensor]], list[Tensor]], layout: Layout) -> None:
    """Where and how an input lies in memory changes no value."""
    want = op(made())
    got = op({name: layout(values) for name, values in made().items()})
    for ours, plain in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-7)


def check_one_bias_for_all_ids() -> None:
    """Expanded: every stride is 0."""
    given = made()
    bias = torch.full((), 0.5, device=DEVICE).expand(VOCABULARY)
    want, _ = api.linear_logp(given["hidden"], given["weight"], given["targets"], backend="triton")
    got, _ = api.linear_logp(given["hidden"], given["weight"], given["targets"], bias=bias, backend="triton")
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num_items", [16384.0, 524288.0])
def check_float16_heads_under_a_loss_scale(num_items: float) -> None:
    """A gradient of a few millionths of a token, which float16 holds once it is scaled: relative error of dH and dW."""
    scale, vocabulary = 65536.0, 300
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, 16, device=DEVICE), 0.3 * torch.randn(vocabulary, 16, device=DEVICE)
    given = made()
    places = (given["rewards"], given["cu_seqlens"], given["group_offsets"])

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [values.to(dtype).requires_grad_() for values in (hidden, weight)]
        stream = api.TokenStream(*leaves, given["targets"], given["rows"])
        output = api.linear_grpo_loss([stream], *places, num_items=num_items, backend=backend)
        (output.loss * scale).backward()
        return [leaf.grad.double() for leaf in leaves]  # type: ignore[union-attr]

    truth = gradients(torch.float64, "reference")
    for ours, plain, exact in zip(
        gradients(torch.float16, "triton"), gradients(torch.float16, "reference"), truth, strict=True
    ):
        error, allowed = ((grad - exact).norm() / exact.norm() for grad in (ours, plain))
        assert error <= 2 * allowed + 1e-4, (float(error), float(allowed))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"score_all": True},
    {"dgs": "variance_mass", "dgs_mass": 0.5},
    {"ratio": "sequence"},
    {"ratio": "product"},
    {"loss_type": "bnpo"},
    {"loss_type": "vespo"},
    {"beta": 0.1},
    {"top_entropy_quantile": 0.5},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def check_float16_heads_mean_what_others_do(options: dict[str, Any]) -> None:
    """Against float32 on `reference`: what is left out, metrics, settings of a stream, and gradients, though the hidden
    state of a token that carries no loss is NaN."""
    given = made()
    given["mask"][:2] = False  # a whole sequence, and of its group one is left
    given["rewards"] = torch.tensor([1.0, 0.0, 0.5, 0.5], device=DEVICE)  # the second group has advantage 0
    places = (given["rewards"], given["cu_seqlens"], given["group_offsets"])
    at = given["rows"]
    masked = ~given["mask"][at]
    ref = given["old_logp"] - 0.2
    sampler = torch.linspace(0.8, 1.2, ROWS, device=DEVICE)
    likely = (given["hidden"] @ given["weight"].t() + given["bias"]).mean(0)
    likely[given["targets"]] = -torch.inf
    forbidden = likely.argmax()[None]

    def everything(dtype: torch.dtype, backend: str) -> list[Tensor]:
        hidden = given["hidden"].masked_fill(masked[:, None], torch.nan)
        leaves = [values.to(dtype).requires_grad_() for values in (hidden, given["weight"], given["bias"])]
        stream = api.TokenStream(*leaves[:2], given["targets"], at, leaves[2], 0.7, "image", forbidden)
        out = api.linear_grpo_loss(
            [stream],
            *places,
            old_logp=given["old_logp"],
            loss_mask=given["mask"],
            ref_logp=ref,
            is_ratio=sampler,
            num_items=1.0,
            backend=backend,
            **options,
        )
        grads = torch.autograd.grad(100 * out.loss, leaves)
        found = [out.loss, out.logp, out.entropy, out.advantages, out.keep, *out.metrics.values(), *grads]
        return [values.detach().double() for values in found]  # type: ignore[union-attr]

    for ours, plain in zip(everything(torch.float16, "triton"), everything(torch.float32, "reference"), strict=True):
        assert float((ours - plain).norm()) <= 4e-3 * float(plain.norm()) + 1e-3
