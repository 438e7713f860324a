"""prefix_decode_attention on every backend: meaning, errors, and the op as torch sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, DEVICE, FEW, KERNELS, NATIVE, ON_TRITON
from decode_cases import Step, assert_close_to_truth, assert_written, attention, make_step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.api import prefix_decode_attention
from syncr1.kernels.dispatch import BackendError
from syncr1.kernels.reference import decode_attention as reference


def example(dtype: torch.dtype = torch.float32) -> Step:
    """Two groups that share prefixes and a row without one."""
    return make_step([(3, 70), (1, 0), (2, 5)], [4, 0, 66, 1, 0, 9], dtype=dtype)


CPU = ["reference", pytest.param("native", marks=NATIVE)]
DTYPES = {
    "reference": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "native": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
}


def attend(step: Step, backend: str, scale: float | None = None) -> Tensor:
    """On the device of the backend; the step's own caches receive the new token."""
    there = step.map(lambda t: t.to(DEVICE))
    output = prefix_decode_attention(*there.tensors(), scale=scale, backend=backend).cpu()
    step.own_keys.copy_(there.own_keys)
    step.own_values.copy_(there.own_values)
    return output


def assert_close(step: Step, output: Tensor, scale: float | None = None) -> None:
    """Triton's interpreter truncates where a GPU rounds: one unit in the last place of a bfloat16."""
    if ON_TRITON and DEVICE == "cpu" and output.dtype == torch.bfloat16:
        torch.testing.assert_close(output.double(), attention(step, scale), rtol=2.0**-7, atol=1e-5)
    else:
        assert_close_to_truth(step, output, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(
    prefixes=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 17, 70])), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 2), (6, 2), (5, 1)]),
    width=st.sampled_from([1, 2, 8, 13, 64]),
    data=st.data(),
    scale=st.sampled_from([None, 0.01, 0.7]),
    seed=st.integers(0, 1 << 30),
)
def test_attention(
    backend: str,
    prefixes: list[tuple[int, int]],
    heads: tuple[int, int],
    width: int,
    data: st.DataObject,
    scale: float | None,
    seed: int,
) -> None:
    num_rows, dtype = sum(rows for rows, _ in prefixes), data.draw(st.sampled_from(DTYPES[backend]))
    lengths = torch.tensor([0, 1, 2, 5, 31, 33, 64])[torch.randint(7, (num_rows,))].tolist()
    step = make_step(prefixes, lengths, heads, width, dtype=dtype, seed=seed)
    after = step.to(dtype)
    output = attend(after, backend, scale)
    assert output.shape == step.query.shape and output.dtype == dtype and output.is_contiguous()
    assert_close(step, output, scale)
    assert_written(step, after)


@pytest.mark.parametrize("backend", KERNELS)
def test_widths_and_heads_of_models(backend: str) -> None:
    lengths = [0, 1, 31, 33, 64, 2, 0]
    for place, dtype in enumerate(DTYPES[backend]):
        shapes = [((2, 2), 64, None), ((1, 1), 128, 0.2), ((6, 2), 16, None), ((5, 1), 5, 0.05), ((8, 1), 80, None)]
        for heads, width, scale in shapes[place::2] if ON_TRITON else shapes:
            step = make_step([(3, 70), (1, 0), (2, 1), (1, 32)], lengths, heads, width, dtype=dtype)
            assert_close(step, attend(step.to(dtype), backend, scale), scale)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_depends_on_nothing_but_itself(backend: str) -> None:
    """Bitwise: alone, in any company and order."""
    step = make_step([(3, 40), (2, 0)], [5, 0, 36, 7, 1], (4, 2), 16)
    whole = attend(step.to(torch.float32), backend)
    order = [3, 0, 4, 1, 2]
    for rows in (order, [2], [3, 4]):
        assert attend(step.rows(rows), backend).equal(whole[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_tokens_of_a_sequence_are_a_row_each(backend: str) -> None:
    """Two sequences of one prefix, whose new keys lie in their columns already: as one call after the other."""
    news, seen, starts = (6, 33), (5, 0), (2, 20)
    tokens = [(start, length + i) for start, length, n in zip(starts, seen, news, strict=True) for i in range(n)]
    query, key, value = (torch.randn(len(tokens), heads, 16, device=DEVICE) for heads in (4, 2, 2))
    prefix = [torch.randn(2, 40, 16, device=DEVICE) for _ in range(2)]
    own = [torch.randn(2, 60, 16, device=DEVICE) for _ in range(2)]
    spans = torch.tensor([[3, 30, start, before] for start, before in tokens], device=DEVICE)
    one_by_one = [x.clone() for x in own]
    expected = [
        prefix_decode_attention(q, k, v, *prefix, *one_by_one, span, backend=backend)
        for q, k, v, span in zip(*(x.split(1) for x in (query, key, value, spans)), strict=True)
    ]
    for store, new in zip(own, (key, value), strict=True):
        store[:, spans[:, 2] + spans[:, 3]] = new.transpose(0, 1)
    assert prefix_decode_attention(query, key, value, *prefix, *own, spans, backend=backend).equal(torch.cat(expected))
    assert all(torch.equal(a, b) for a, b in zip(own, one_by_one, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("slope", [5.0, -5.0, 400.0])
def test_scores_that_rise_and_fall(backend: str, slope: float) -> None:
    """The running maximum changes in every tile, in none, or lies far above what exp can hold."""
    step = make_step([(1, 100)], [40], (2, 2), 16)
    ramp = torch.linspace(-1, 1, step.prefix_keys.shape[1])[:, None] * slope
    tall = replace(step, prefix_keys=step.prefix_keys * 0.1 + ramp, query=step.query.abs())
    assert_close(tall, attend(tall.to(torch.float32), backend))


def test_reference_without_reading_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for other devices, which masks all columns instead of cutting some out, NaN of other rows included."""
    step = example(torch.float64)
    read = prefix_decode_attention(*step.to(torch.float64).tensors(), backend="reference")
    monkeypatch.setattr(reference, "_cut_out", reference._masked)
    masked = prefix_decode_attention(*step.tensors(), backend="reference")
    torch.testing.assert_close(masked, read, rtol=1e-14, atol=1e-14)
    assert bool(torch.isfinite(masked).all())


@pytest.mark.parametrize("backend", CPU)
def test_many_steps_are_one_causal_sequence(backend: str) -> None:
    """Token after token through the op gives what one attention over the whole sequence gives."""
    step = make_step([(2, 9), (1, 30)], [0, 0, 0], (4, 2), 16)
    num_steps = 70
    keys, values = torch.randn(2, num_steps, 3, 2, 16).unbind(0)
    queries = torch.randn(num_steps, 3, 4, 16)
    own_keys, own_values = (torch.full((2, 3 * num_steps, 16), torch.nan) for _ in range(2))
    for i in range(num_steps):
        spans = step.spans.clone()
        spans[:, 2], spans[:, 3] = torch.arange(3) * num_steps, i
        prefix = (step.prefix_keys, step.prefix_values)
        now = (queries[i], keys[i], values[i], *prefix, own_keys, own_values, spans)
        output = prefix_decode_attention(*now, backend=backend)
    last = Step(queries[-1], keys[-1], values[-1], *prefix, own_keys, own_values, spans)
    assert_close_to_truth(last, output)
    assert own_keys.equal(keys.permute(2, 1, 0, 3).reshape(2, -1, 16))
    assert own_values.equal(values.permute(2, 1, 0, 3).reshape(2, -1, 16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [0.0, torch.nan])
def test_rows_of_padding_harm_nobody(backend: str, poison: float) -> None:
    """They all write to one dummy column, and NaN in them stays with them."""
    step = example()
    alone = attend(step.to(torch.float32), backend)
    dead = torch.tensor([[0, 0, step.own_keys.shape[1] - 1, 0]]).expand(5, -1)
    new = [torch.cat([t, torch.full_like(t[:5], poison)]) for t in step.tensors()[:3]]
    padded = Step(*new, *step.to(torch.float32).tensors()[3:7], torch.cat([step.spans, dead]))
    assert attend(padded, backend)[:6].equal(alone)


@NATIVE
@pytest.mark.slow
def test_threads_that_write_one_dummy_column() -> None:
    """Under real threads: no fault, and the live rows are what they are without the dead ones."""
    code = """
import torch
from decode_cases import make_step
from syncr1.kernels.native.decode_attention import prefix_decode_attention
from syncr1.kernels.terms import DecodeStep
step = make_step([(8, 300)], [200] * 8, (8, 8), 64)
alone = prefix_decode_attention(DecodeStep(*step.to(torch.float32).tensors(), 0.125, "native"))
dead = torch.tensor([[0, 0, step.own_keys.shape[1] - 1, 0]]).expand(56, -1)
padded = [torch.cat([t, t.repeat(7, 1, 1)]) for t in step.tensors()[:3]]
torch.set_num_threads(4)
for _ in range(20):
    copy = step.to(torch.float32).tensors()
    given = DecodeStep(*padded, *copy[3:7], torch.cat([step.spans, dead]), 0.125, "native")
    output = prefix_decode_attention(given)
    assert output[:8].equal(alone)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "4", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("backend", CPU)
def test_no_rows_and_no_prefixes(backend: str) -> None:
    step = example()
    assert prefix_decode_attention(*step.rows([]).tensors(), backend=backend).shape == (0, 4, 16)
    bare = make_step([(3, 0)], [0, 5, 2])
    without = replace(bare, prefix_keys=bare.prefix_keys[:, :0], prefix_values=bare.prefix_values[:, :0])
    without.spans[:, 0] = 0
    assert_close_to_truth(without, prefix_decode_attention(*without.to(torch.float32).tensors(), backend=backend))


def test_the_default_backend_follows_the_dtype() -> None:
    step = example(torch.float64)
    assert_close_to_truth(step, prefix_decode_attention(*step.to(torch.float64).tensors()))
    if dispatch.available()["native"] == "ok":
        with pytest.raises(BackendError, match="prefix_decode_attention: backend='native' cannot serve this call"):
            prefix_decode_attention(*step.tensors(), backend="native")


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "heads": ({"query": torch.zeros(6, 3, 16)}, "query heads must be a multiple of the key-value heads"),
    "device of key": ({"key": torch.zeros(6, 2, 16, device="meta")}, "key.device must be cpu, got meta"),
    "key rows": ({"key": torch.zeros(5, 2, 16)}, r"key must be \[6, 2, 16\], got \[5, 2, 16\]"),
    "value width": ({"value": torch.zeros(6, 2, 15)}, r"value must be \[6, 2, 16\]"),
    "prefix heads": ({"prefix_values": torch.zeros(3, 90, 16)}, r"prefix_values must be \[2, "),
    "own columns": ({"own_values": torch.zeros(2, 1, 16)}, r"own_values must be \[2, "),
    "dtype": ({"key": torch.zeros(6, 2, 16).double()}, "key.dtype must be torch.float32, got torch.float64"),
    "integers": ({"query": torch.zeros(6, 4, 16).int()}, "query must be a float tensor"),
    "dims": ({"query": torch.zeros(6, 64)}, "query, prefix_keys and own_keys must be"),
    "spans": ({"spans": torch.zeros(6, 3, dtype=torch.int64)}, r"spans must be \[6, 4\] int64"),
    "int32": ({"spans": torch.zeros(6, 4, dtype=torch.int32)}, r"spans must be .* got \[6, 4\] torch.int32"),
    "device": ({"spans": torch.zeros(6, 4, dtype=torch.int64, device="meta")}, "spans.device must be cpu, got meta"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"prefix_decode_attention: {message}"):
        prefix_decode_attention(*replace(example(), **changes).tensors())


@pytest.mark.parametrize("name", ["prefix_keys", "prefix_values", "own_keys", "own_values"])
def test_caches_without_unit_stride_are_refused(name: str) -> None:
    step = example()
    strided = getattr(step, name).mT.contiguous().mT
    with pytest.raises(
        ValueError, match=rf"{name}.stride\(2\) must be 1, got .*store the caches as \[Hkv, columns, E\]"
    ):
        prefix_decode_attention(*replace(step, **{name: strided}).tensors())


@pytest.mark.parametrize("repeat", [1, 100], ids=["few", "many"])
@pytest.mark.parametrize(("column", "value"), [(0, -1), (1, 80), (2, -2), (3, 200), (3, -1)])
def test_spans_out_of_range_are_refused(repeat: int, column: int, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = example()
    step = step.rows(torch.arange(6).repeat(repeat))
    step.spans[-2, column] = value
    row = 6 * repeat - 2
    with pytest.raises(ValueError, match=rf"prefix_decode_attention: spans\[{row}\] must be within .* prefix columns"):
        prefix_decode_attention(*step.tensors(), backend="reference")
    step.spans[-2] = step.spans[-1]
    prefix_decode_attention(*step.tensors(), backend="reference")


def test_checks_of_values_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    step = example()
    step.spans[0, 1] = 10_000  # slices stop where the memory ends
    monkeypatch.setenv("SYNCR1_CHECKS", "never")
    prefix_decode_attention(*step.tensors(), backend="reference")
    monkeypatch.setenv("SYNCR1_CHECKS", "always")
    with pytest.raises(ValueError, match="spans"):
        prefix_decode_attention(*step.tensors(), backend="reference")


@pytest.mark.parametrize("name", ["query", "key", "value", "prefix_keys", "own_values"])
def test_gradients_are_refused(name: str) -> None:
    step = example()
    leaf = replace(step, **{name: getattr(step, name).clone().requires_grad_()})
    with pytest.raises(RuntimeError, match=r"prefix_decode_attention: no argument may require a gradient, .*no_grad"):
        prefix_decode_attention(*leaf.tensors())
    with torch.no_grad():
        assert_close_to_truth(step, prefix_decode_attention(*leaf.tensors()).detach())


def test_writing_is_known_to_autograd() -> None:
    """A graph that holds the cache from before does not use the changed one in silence; inference mode works too."""
    step = example()
    cache, weight = step.own_keys.nan_to_num().clone(), torch.ones((), requires_grad=True)
    product = (weight * cache).sum()
    prefix_decode_attention(*replace(step, own_keys=cache).tensors())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        prefix_decode_attention(*step.to(torch.float32).tensors())


@pytest.mark.parametrize("backend", CPU)
def test_opcheck(backend: str) -> None:
    """Schema with its two mutations, fake kernel and tracing."""
    op = torch.ops.syncr1.prefix_decode_attention.default
    step = example().map(lambda t: t.nan_to_num() if t.is_floating_point() else t)
    torch.library.opcheck(op, (*step.tensors(), 0.25, backend))
    mutated = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == ["own_keys", "own_values"]


@pytest.mark.parametrize("backend", CPU)
def test_compiled_without_graph_breaks(backend: str) -> None:
    step = example()
    compiled, plain = step.to(torch.float32), step.to(torch.float32)

    def twice(step: Step) -> Tensor:
        first = prefix_decode_attention(*step.tensors(), backend=backend)
        spans = step.spans + torch.tensor([0, 0, 0, 1])
        again = (first, step.key + 1, step.value * 2, *step.tensors()[3:7], spans)
        return prefix_decode_attention(*again, scale=0.3, backend=backend) + step.own_keys.nan_to_num().sum()

    found = torch.compile(twice, fullgraph=True, backend="aot_eager")(compiled)
    torch.testing.assert_close(found, twice(plain))
    torch.testing.assert_close(compiled.own_values, plain.own_values, equal_nan=True)


def test_the_truth_is_not_the_reference() -> None:
    """The comparison can fail: another scale, a row too few and another head are seen."""
    step = example()
    output = prefix_decode_attention(*step.to(torch.float32).tensors(), backend="reference")
    assert_close_to_truth(step, output)
    for wrong in (output * 1.00001, output.roll(1, dims=1), attention(step, 0.26).float()):
        with pytest.raises(AssertionError):
            assert_close_to_truth(step, wrong)
