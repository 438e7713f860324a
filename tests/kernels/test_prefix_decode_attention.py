"""prefix_decode_attention: meaning, errors, and the op as torch sees it. C++ and Triton have tests of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import BACKENDS
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


@given(
    prefixes=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 17])), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 2), (6, 2), (5, 1)]),
    width=st.sampled_from([1, 2, 8, 13]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([None, 0.01, 0.7]),
    seed=st.integers(0, 1 << 30),
)
def test_reference_is_attention(
    prefixes: list[tuple[int, int]],
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    scale: float | None,
    seed: int,
) -> None:
    num_rows = sum(rows for rows, _ in prefixes)
    lengths = torch.randint(0, 6, (num_rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    step = make_step(prefixes, lengths, heads, width, dtype=dtype, seed=seed)
    after = step.to(dtype)
    output = prefix_decode_attention(*after.tensors(), scale=scale, backend="reference")
    assert output.shape == step.query.shape and output.dtype == dtype and output.is_contiguous()
    assert_close_to_truth(step, output, scale)
    assert_written(step, after)


def test_reference_without_reading_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for other devices, which masks all columns instead of cutting some out, NaN of other rows included."""
    step = example(torch.float64)
    read = prefix_decode_attention(*step.to(torch.float64).tensors(), backend="reference")
    monkeypatch.setattr(reference, "_cut_out", reference._masked)
    masked = prefix_decode_attention(*step.tensors(), backend="reference")
    torch.testing.assert_close(masked, read, rtol=1e-14, atol=1e-14)
    assert bool(torch.isfinite(masked).all())


@pytest.mark.parametrize("backend", BACKENDS)
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
    alone = prefix_decode_attention(*step.to(torch.float32).tensors(), backend=backend)
    dummy = step.own_keys.shape[1] - 1
    dead = torch.tensor([[0, 0, dummy, 0]]).expand(5, -1)
    padded = replace(
        step.to(torch.float32),
        **{
            name: torch.cat([getattr(step, name), torch.full_like(getattr(step, name)[:5], poison)])
            for name in ("query", "key", "value")
        },
        spans=torch.cat([step.spans, dead]),
    )
    assert prefix_decode_attention(*padded.tensors(), backend=backend)[:6].equal(alone)


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    """Schema with its two mutations, fake kernel and tracing."""
    op = torch.ops.syncr1.prefix_decode_attention.default
    step = example().map(lambda t: t.nan_to_num() if t.is_floating_point() else t)
    torch.library.opcheck(op, (*step.tensors(), 0.25, backend))
    mutated = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == ["own_keys", "own_values"]


@pytest.mark.parametrize("backend", BACKENDS)
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
