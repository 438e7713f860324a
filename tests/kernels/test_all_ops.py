"""What holds for every public op alike: inference mode, tracing, meta tensors, transforms of torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import BACKENDS
from op_calls import DIFFERENTIABLE, OPS, Leaves, trained_outputs
from torch import Tensor

from syncr1.kernels import dispatch, linear
from syncr1.kernels.api import SharedPrefixLayout, shared_prefix_attention
from syncr1.kernels.attention_ops.cuda import serves_head_size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_scoring_in_inference_mode_leaves_training_as_it_was(name: str, backend: str) -> None:
    """The value in inference mode is that outside, and nothing it keeps breaks the step after it."""
    op, units = OPS[name], 8
    linear._kept.clear()
    expected = op.values(op.inputs(units), backend)
    linear._kept.clear()
    for inside in (op.inputs(units), None):  # tensors of outside, and tensors that are inference tensors themselves
        with torch.inference_mode():
            found = op.values(inside or op.inputs(units), backend)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.equal(theirs)
    for mine, theirs in zip(op.values(op.inputs(units), backend), expected, strict=True):
        assert mine.equal(theirs)
    if name in DIFFERENTIABLE:
        after = trained_outputs(name, op.inputs(units, grad=True), backend)
        linear._kept.clear()
        fresh = trained_outputs(name, op.inputs(units, grad=True), backend)
        for mine, theirs in zip([*after[0], *after[1]], [*fresh[0], *fresh[1]], strict=True):
            assert mine.equal(theirs)


def test_a_layout_first_used_in_inference_mode_trains() -> None:
    """Positions and predicting rows are kept by the layout; a training step saves them for backward."""
    offsets = [torch.tensor(x) for x in ([0, 3, 5], [0, 2, 4, 7, 10], [0, 2, 4])]
    outside = SharedPrefixLayout(*offsets)
    with torch.inference_mode():
        inside = SharedPrefixLayout(*(x.clone() for x in offsets))
        made = [layout.predicting_rows() for layout in (outside, inside)]
        assert made[0].equal(made[1])
        assert outside.position_ids().equal(inside.position_ids())
    for layout in (outside, inside, inside.to("cpu")):
        x = OPS["shared_prefix_attention"].inputs(8, grad=True)
        out = shared_prefix_attention(x["q"], x["k"], x["v"], layout)
        rows = layout.predicting_rows()
        (out[rows] * layout.position_ids()[5:, None, None]).sum().backward()
        assert x["q"].grad is not None and bool(x["q"].grad.any())


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_traced_whole_with_dynamic_shapes(name: str) -> None:
    """torch.compile(fullgraph=True, dynamic=True): equal values and gradients at every size."""
    op = OPS[name]

    def run(inputs: Leaves) -> list[Tensor]:
        return op.values({n: (2 * x if x.is_floating_point() else x) for n, x in inputs.items()})

    torch._dynamo.reset()
    for dynamic, sizes in ((True, (8, 16, 24)), (None, (8, 16))):
        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for units in sizes:
            results = []
            for function in (run, compiled):
                inputs = op.inputs(units, grad=True)
                values = function(inputs)
                kept = [value.detach() for value in values]
                if op.trained:
                    total = torch.stack([value.sum() for value in values if value.requires_grad]).sum()
                    kept += torch.autograd.grad(total, [inputs[n] for n in op.trained])
                results.append(kept)
            for mine, theirs in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("linear_logp", "temperature"),
        ("selective_logp", "temperature"),
        ("cfg_sample", "cfg_weight"),
        ("cfg_sample", "temperature"),
        ("shared_prefix_attention", "scale"),
        ("cached_prefix_attention", "scale"),
        ("group_advantages", "eps"),
    ],
)
def test_options_may_be_symbols_when_traced(name: str, option: str) -> None:
    """A float that a compiled function takes has no value while it is traced."""
    op = OPS[name]

    def run(inputs: Leaves, value: float) -> list[Tensor]:
        return op.values(inputs, **{option: value})

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for value in (0.7, 1.3, 2.5):
        for mine, theirs in zip(compiled(op.inputs(8), value), run(op.inputs(8), value), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_traced_head_size_gives_a_plain_bool() -> None:
    """On CUDA the head size decides who serves; what is constant when traced may not be handed a symbol."""
    found: list[Any] = []

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def choose(q: Tensor) -> Tensor:
        return q + 1 if serves_head_size(q.shape[-1]) else q - 1

    for size in (8, 12, 16, 264):
        found.append(bool((choose(torch.zeros(2, size)) > 0).all()))
    assert found == [True, False, True, False]


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_give_shapes(name: str) -> None:
    op = OPS[name]
    expected = op.values(op.inputs())
    found = op.values({n: x.to("meta") for n, x in op.inputs().items()})
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    assert all(x.device.type == "meta" for x in found)


TRANSFORMS = {
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack([x, x])),
    "grad": lambda call, x: torch.func.grad(call)(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),))[1],
}


def _of_one(name: str, backend: str) -> tuple[Any, Tensor]:
    """A scalar function of the op's first float tensor, and that tensor."""
    op = OPS[name]
    inputs = op.inputs(8)
    leaf = next(n for n in (*op.trained, *inputs) if inputs[n].is_floating_point())

    def call(x: Tensor) -> Tensor:
        first = op.values(inputs | {leaf: x}, backend)[0]
        return (first.float() * torch.linspace(0, 1, first.numel()).view(first.shape)).sum()

    return call, inputs[leaf].clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_transforms_are_refused_by_name_or_right(name: str, transform: str, backend: str) -> None:
    """Never a tangent of 0 in silence, and never an error of somebody else's."""
    call, x = _of_one(name, backend)
    run = TRANSFORMS[transform]
    if name in ("prefix_decode_attention", "cached_prefix_attention") and transform == "grad":
        with pytest.raises(RuntimeError, match=f"{name}: no argument may require a gradient"):
            run(call, x)
        return
    if backend != "reference" or transform not in dispatch.TRANSFORMABLE.get(name, ()):
        with pytest.raises(NotImplementedError, match=rf"{name}: .*got a call inside {transform}; "):
            run(call, x)
        return
    found = run(call, x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(leaf), leaf)
    expected = {"vmap": torch.stack([call(x), call(x)]), "grad": grad, "jvp": grad.sum()}[transform]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_dual_numbers_are_refused_and_batched_gradients_right(name: str) -> None:
    call, x = _of_one(name, "native" if dispatch.available()["native"] == "ok" else "reference")
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name}: .*inside jvp"):
        call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    leaf = x.requires_grad_()
    out, upstream = call(leaf), torch.tensor([1.0, -2.0, 0.5])
    with pytest.raises(NotImplementedError, match=f"{name}: .*inside vmap"):
        torch.func.vmap(lambda v: torch.autograd.grad(out, leaf, v, retain_graph=True)[0])(upstream)
    (once,) = torch.autograd.grad(out, leaf, retain_graph=True)
    (batched,) = torch.autograd.grad(out, leaf, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([once * v for v in upstream]))
