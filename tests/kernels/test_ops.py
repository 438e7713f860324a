"""The registered ops as torch sees them, on the C++ backend: opcheck, torch.compile, autograd's corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import NIGHTLY
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.api import (
    SharedPrefixLayout,
    TokenStream,
    cfg_sample,
    dgs_select,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logp,
    selective_logp,
)
from syncr1.kernels.options import encode

BACKEND = "native"
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(dispatch.available()[BACKEND] != "ok", reason=dispatch.available()[BACKEND]),
]
LENGTHS = [3, 5, 0, 4, 1, 6]
T = sum(LENGTHS)
CU_SEQLENS = torch.tensor([0, 3, 8, 8, 12, 13, 19], dtype=torch.int32)
GROUPS = torch.tensor([0, 4, 6], dtype=torch.int32)
REWARDS = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.0, 1.0])


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two heads with 7 and 5 entries; the second has a bias."""
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    return {"hidden": leaf(T, 4), "text": leaf(7, 4), "image": leaf(5, 4), "bias": leaf(5)}


def packed(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "targets": torch.randint(0, 5, (T,), generator=random),
        "modality": (torch.rand(T, generator=random) > 0.5).to(torch.uint8),
        "loss_mask": torch.rand(T, generator=random) > 0.2,
        "old_logp": -2 * torch.rand(T, generator=random),
        "ref_logp": -2 * torch.rand(T, generator=random),
    }


def loss_of(o: dict[str, Any], p: dict[str, Tensor], backend: str = BACKEND, **settings: Any) -> Any:
    rows = [(p["modality"] == code).nonzero()[:, 0] for code in (0, 1)]
    streams = [
        TokenStream(o["hidden"][rows[0]], o["text"], p["targets"][rows[0]], rows[0], forbidden=torch.tensor([6])),
        TokenStream(o["hidden"][rows[1]], o["image"], p["targets"][rows[1]], rows[1], o["bias"], 1.5, "image"),
    ]
    given = {name: p[name] for name in ("old_logp", "ref_logp", "loss_mask")}
    return linear_grpo_loss(streams, REWARDS, CU_SEQLENS, GROUPS, backend=backend, **given, **settings)


def test_opcheck() -> None:
    """Schema, autograd registration, fake kernels and AOT dispatch, static and dynamic."""
    o, p = operands(), packed()
    logits = torch.randn(T, 9, requires_grad=True)
    forbidden, settings = torch.tensor([8]), encode("grpo_loss", {"beta": 0.1})
    logp = (-torch.rand(T)).requires_grad_()
    ops = torch.ops.syncr1
    how = (GROUPS, None, "group", 1e-4, "sum_then_normalize")
    torch.library.opcheck(ops.group_advantages.default, (REWARDS, *how, BACKEND))
    torch.library.opcheck(ops.dgs_select.default, ([REWARDS], *how, "variance_mass", 0.9, None, 2, 0, BACKEND))
    torch.library.opcheck(ops.grpo_plan.default, ([REWARDS] * 2, *how, "variance_mass", 0.9, None, 2, 0, BACKEND))
    seeds = torch.arange(T)
    logits_pair = (logits.detach(), logits.detach() / 2)
    support = torch.full((T, 1), -1, dtype=torch.int32)
    for kept in (False, True):
        drawn = (*logits_pair, 2.0, 1.0, 5, 0.9, 0.1, seeds, seeds, forbidden, kept, BACKEND)
        torch.library.opcheck(ops.cfg_sample.default, drawn)
    head = (o["hidden"], o["image"], o["bias"], p["targets"])
    for words in (None, support):
        torch.library.opcheck(ops.selective_logp.default, (logits, p["targets"], 0.7, forbidden, words, BACKEND))
        torch.library.opcheck(ops.linear_logp.default, (*head, 0.7, None, words, BACKEND))
    torch.library.opcheck(
        ops.grpo_loss.default,
        (logp, p["old_logp"], [REWARDS], [], CU_SEQLENS, GROUPS, p["loss_mask"], p["modality"], p["ref_logp"],
         None, None, None, None, settings, BACKEND),
    )  # fmt: skip
    empty, nowhere, rows = torch.empty(0), torch.empty(0, dtype=torch.int64), torch.arange(T)
    torch.library.opcheck(
        ops.linear_grpo_loss.default,
        ([o["hidden"]], [o["text"]], [empty], [p["targets"]], [rows], [nowhere], [support], [1.0], [0],
         p["old_logp"],
         [REWARDS], [], CU_SEQLENS, GROUPS, p["loss_mask"], None, p["ref_logp"], None, None, None, None, settings,
         BACKEND, T, [True, True, False]),
    )  # fmt: skip


def test_opcheck_of_backward_ops() -> None:
    """Their inputs may require a gradient; what they return has none, and says so."""
    o, p, ops = operands(), packed(), torch.ops.syncr1
    logits, upstream = torch.randn(T, 9, requires_grad=True), torch.ones(T)
    _, entropy, lse = (x.detach() for x in ops.selective_logp(logits, p["targets"], 0.7, None, None, BACKEND))
    for grads in ((upstream, upstream), (None, upstream)):
        given = (logits, p["targets"], 0.7, None, None, BACKEND, lse, entropy, *grads)
        torch.library.opcheck(ops.selective_logp_backward.default, given)
        assert not ops.selective_logp_backward(*given).requires_grad
    head = (o["hidden"], o["image"], o["bias"], p["targets"])
    support = torch.full((T, 1), -1, dtype=torch.int32)
    _, entropy, lse = (x.detach() for x in ops.linear_logp(*head, 0.7, None, support, BACKEND))
    for needs in ([True, True, True], [True, False, False]):
        given = (*head, 0.7, None, support, BACKEND, lse, entropy, upstream, None, needs)
        torch.library.opcheck(ops.linear_logp_backward.default, given)
        assert not any(x.requires_grad for x in ops.linear_logp_backward(*given))
    empty, nowhere, rows = torch.empty(0), torch.empty(0, dtype=torch.int64), torch.arange(T)
    streams = ([o["hidden"]] * 2, [o["image"]] * 2, [o["bias"], empty], [p["targets"]] * 2, [rows, T + rows])
    scored = [torch.cat([values, values]) for values in (upstream * (rows > 1), lse, entropy)]
    lists = (*streams, [nowhere] * 2, [support, nowhere.int()], [0.7, 0.7], [0, 0])
    given = (*lists, *scored, [True, True, True, False, True, False], BACKEND)
    torch.library.opcheck(ops.linear_grpo_loss_backward.default, given)
    assert not any(x.requires_grad for x in ops.linear_grpo_loss_backward(*given))
    layout = SharedPrefixLayout(torch.tensor([0, 3, 5]), torch.tensor([0, 2, 4, 7, 10]), torch.tensor([0, 2, 4]))
    qkv = [torch.randn(15, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    out, lse = (x.detach() for x in ops.shared_prefix_attention(*qkv, *layout.host_offsets, 0.3))
    torch.library.opcheck(ops.shared_prefix_attention.default, (*qkv, *layout.host_offsets, 0.3))
    given = (*qkv, *layout.host_offsets, 0.3, out, lse, torch.ones_like(out))
    torch.library.opcheck(ops.shared_prefix_attention_backward.default, given)
    assert not any(x.requires_grad for x in ops.shared_prefix_attention_backward(*given))


def assert_same_gradients(loss: Any, compiled: Any, inputs: list[Tensor]) -> None:
    expected, found = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, inputs)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
def test_compile_without_graph_breaks() -> None:
    p, o = packed(), operands()

    def from_hidden(hidden: Tensor, text: Tensor, image: Tensor, bias: Tensor) -> Tensor:
        heads = {"hidden": hidden * 2, "text": text, "image": image, "bias": bias}
        out = loss_of(heads, p, beta=0.1, num_items={"text": 4.0, "image": 6.0}, dgs="variance_mass")
        return out.loss * 3 + out.metrics["kl/text"]

    # nonzero() picks the rows of each modality: its size depends on values
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(from_hidden, fullgraph=True, backend="aot_eager")
        assert_same_gradients(from_hidden, compiled, list(o.values()))

    def from_logits(logits: Tensor, hidden: Tensor, image: Tensor) -> Tensor:
        logp, entropy = selective_logp(logits, p["targets"], temperature=0.9, backend=BACKEND)
        more, _ = linear_logp(hidden, image, p["targets"], backend=BACKEND)
        advantages = group_advantages(REWARDS, GROUPS, backend=BACKEND)
        keep = dgs_select(REWARDS, GROUPS, backend=BACKEND)
        out = grpo_loss(
            logp + more, p["old_logp"], REWARDS, CU_SEQLENS, GROUPS, entropy=entropy.detach(), backend=BACKEND
        )
        drawn = cfg_sample(logits, seed=1, offset=2, backend=BACKEND)
        return out.loss - 0.01 * entropy.mean() + advantages.sum() + keep.sum() + drawn.token.sum()

    # inductor's C++ takes a minute where its cache is empty
    compiled = torch.compile(from_logits, fullgraph=True, backend="inductor" if NIGHTLY else "aot_eager")
    inputs = [torch.randn(T, 9, requires_grad=True), o["hidden"], o["image"]]
    assert_same_gradients(from_logits, compiled, inputs)


@pytest.mark.slow
def test_compile_with_a_changing_number_of_tokens_and_items() -> None:
    """num_items as a tensor is no reason to compile again; neither is another T once T is dynamic."""
    frames = torch._dynamo.utils.counters["frames"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logp: Tensor, cu_seqlens: Tensor, num_items: Tensor) -> Tensor:
        offsets = torch.tensor([0, 2], dtype=torch.int32)
        return grpo_loss(logp, None, REWARDS[:2], cu_seqlens, offsets, num_items=num_items, backend=BACKEND).loss

    counts = []
    for total in (5, 7, 9, 12):
        logp = (-torch.rand(total)).requires_grad_()
        step(logp, torch.tensor([0, 2, total], dtype=torch.int32), torch.tensor(float(total))).backward()
        counts.append(frames["ok"])
        assert logp.grad is not None and torch.isfinite(logp.grad).all()
    assert counts[3] == counts[2]


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_backward_twice_and_upstream_gradients(loss_type: str) -> None:
    """The gradients kept from the forward are neither consumed nor scaled in place."""
    o, p = operands(), packed()
    leaves = list(o.values())
    out = loss_of(o, p, loss_type=loss_type, beta=0.1)
    once = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(out.loss, leaves, torch.tensor(-2.5), retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves)
    for a, b, c in zip(once, scaled, again, strict=True):
        assert a.equal(c)
        torch.testing.assert_close(b, -2.5 * a)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    loss_of(o, p, loss_type=loss_type, beta=0.1).loss.backward()
    for leaf, grad in zip(leaves, once, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, grad + 1)


def test_two_calls_add_up_to_one() -> None:
    """Gradients of micro-batches accumulate to those of the whole batch."""
    p = packed()
    whole, parts = operands(), operands()
    loss_of(whole, p, beta=0.1, num_items=10.0).loss.backward()
    for text in (True, False):
        mask = p["loss_mask"] & (p["modality"] == (0 if text else 1))
        loss_of(parts, p | {"loss_mask": mask}, beta=0.1, num_items=10.0).loss.backward()
    for name in whole:
        torch.testing.assert_close(whole[name].grad, parts[name].grad)


def test_frozen_heads_and_no_grad() -> None:
    o, p = operands(), packed()
    everything = torch.autograd.grad(loss_of(o, p).loss, list(o.values()))
    for name in ("text", "image", "bias"):
        o[name].requires_grad_(False)
    out = loss_of(o, p)
    (hidden_grad,) = torch.autograd.grad(out.loss, [o["hidden"]])
    assert hidden_grad.equal(everything[0])
    with torch.no_grad():
        silent = loss_of(o, p)
    assert silent.loss.equal(out.loss.detach()) and not silent.loss.requires_grad
    assert not any(value.requires_grad for value in out.metrics.values())
    assert not out.logp.requires_grad and not out.entropy.requires_grad
    o["hidden"].requires_grad_(False)
    assert not loss_of(o, p).loss.requires_grad
    o["text"].requires_grad_()
    (text_grad,) = torch.autograd.grad(loss_of(o, p).loss, [o["text"]])
    torch.testing.assert_close(text_grad, everything[1])


def test_a_gradient_that_would_be_differentiated_again_is_refused() -> None:
    o, p = operands(), packed()
    with pytest.raises(NotImplementedError, match="linear_grpo_loss: its gradient cannot be differentiated again"):
        torch.autograd.grad(loss_of(o, p).loss, [o["hidden"]], create_graph=True)
    logits = torch.randn(T, 9, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(selective_logp(logits, p["targets"], backend=BACKEND)[0].sum(), [logits], create_graph=True)


def test_views_give_what_copies_give() -> None:
    """Strided, expanded and offset inputs; the values themselves are never written."""
    o, p = operands(), packed()
    wide = torch.randn(T, 18)[:, ::2]
    logits = wide.clone().requires_grad_()
    strided = torch.randn(T, 18)
    strided[:, ::2] = wide
    view = strided.requires_grad_()
    a, b = (
        selective_logp(logits, p["targets"], backend=BACKEND),
        selective_logp(view[:, ::2], p["targets"], backend=BACKEND),
    )
    assert a[0].equal(b[0]) and a[1].equal(b[1])
    (a[0] + a[1]).sum().backward()
    (b[0] + b[1]).sum().backward()
    assert view.grad is not None and logits.grad is not None and view.grad[:, ::2].equal(logits.grad)
    before = {name: value.detach().clone() for name, value in o.items()}
    transposed = {**o, "text": o["text"].detach().t().contiguous().t().requires_grad_()}
    same = loss_of(transposed, p | {"old_logp": p["old_logp"].double()}, beta=0.1)
    torch.testing.assert_close(same.loss, loss_of(o, p, beta=0.1).loss)
    same.loss.backward()
    torch.testing.assert_close(
        transposed["text"].grad, torch.autograd.grad(loss_of(o, p, beta=0.1).loss, [o["text"]])[0]
    )
    assert all(value.equal(o[name]) for name, value in before.items())
    expanded = -torch.ones(1).expand(T)
    out = grpo_loss(expanded, None, REWARDS, CU_SEQLENS, GROUPS, backend=BACKEND)
    assert torch.isfinite(out.loss)


def test_autocast_runs_the_head_in_its_dtype() -> None:
    o, p = operands(), packed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss_of(o, p, beta=0.1)
        logp, _ = linear_logp(o["hidden"], o["image"], p["targets"], bias=o["bias"], backend=BACKEND)
    out.loss.backward()
    assert o["hidden"].grad is not None and o["hidden"].grad.dtype == torch.float32
    full, _ = linear_logp(o["hidden"], o["image"], p["targets"], bias=o["bias"], backend=BACKEND)
    assert 0 < (logp - full).abs().max() < 0.1
    torch.testing.assert_close(out.loss, loss_of(operands(), p, beta=0.1).loss, rtol=0.1, atol=0.05)


def test_bfloat16_from_end_to_end() -> None:
    """Error against float64 at most twice that of the same call in plain bfloat16 PyTorch, plus a rounding."""
    p, names = packed(), ("hidden", "text", "image", "bias")
    results = {}
    for name, backend, dtype in (
        ("mine", BACKEND, torch.bfloat16),
        ("plain", "reference", torch.bfloat16),
        ("truth", "reference", torch.float64),
    ):
        o = {key: value.detach().to(dtype).requires_grad_() for key, value in operands(torch.bfloat16).items()}
        out = loss_of(o, p, backend=backend, beta=0.1)
        results[name] = [out.loss, *torch.autograd.grad(out.loss, [o[n] for n in names])]
    for mine, plain, truth in zip(*results.values(), strict=True):
        error, allowed = (mine.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 2 * allowed + 2**-8 * truth.abs().max()
