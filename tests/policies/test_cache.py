"""The cache against plain transformers: prefill, steps and follow-up turns are the full forward, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from test_attention import LAYERS, WIDTH, make_models, run_alone
from torch import Tensor
from transformers import LlamaModel

from syncr1.engine.policies.attention_interface import AttentionLayout
from syncr1.engine.policies.cache import CacheShape, Extend, Prefill, Rows, Store
from syncr1.engine.rollout.decode import advance

PROMPTS = (5, 1, 17)
OWNERS = (0, 0, 0, 1, 2, 2)
"""The prompt of each row."""
STEPS = 7


def shape_of(kv_heads: int, dtype: torch.dtype) -> CacheShape:
    return CacheShape(
        num_layers=LAYERS, num_heads=kv_heads, head_dim=WIDTH // 4, dtype=dtype, device=torch.device("cpu")
    )


class Batch:
    """Prompts run once, rows behind them."""

    def __init__(self, model: LlamaModel, kv_heads: int, dtype: torch.dtype, capacity: int = 40) -> None:
        self.model = model
        self.embeddings = [torch.randn(n, WIDTH, dtype=dtype) for n in PROMPTS]
        shape = shape_of(kv_heads, dtype)
        self.prompts, self.own = Store(shape, PROMPTS), Store(shape, [capacity] * len(OWNERS))
        for store in (self.prompts, self.own):  # what was never written must never count
            store.keys.fill_(float("nan"))
            store.values.fill_(float("nan"))
        layout = Prefill(self.prompts)
        self.hidden = self.trunk(torch.cat(self.embeddings)[None], layout.position_ids[None], layout)[0]
        starts = [0, PROMPTS[0], sum(PROMPTS[:2])]
        spans = [[starts[p], PROMPTS[p], self.own.starts[row], 0] for row, p in enumerate(OWNERS)]
        ends = torch.tensor([starts[p] + PROMPTS[p] - 1 for p in OWNERS])
        self.rows = Rows(torch.tensor(spans), torch.tensor([PROMPTS[p] for p in OWNERS]), self.hidden[ends])
        self.history: list[list[Tensor]] = [[self.embeddings[p]] for p in OWNERS]

    def trunk(self, embeddings: Tensor, positions: Tensor, layout: AttentionLayout) -> Tensor:
        return self.model(inputs_embeds=embeddings, position_ids=positions, layout=layout, use_cache=False)[0]

    def feed(self, tokens: Tensor, alive: Sequence[bool] | None = None) -> None:
        mask = None if alive is None else torch.tensor(alive)
        advance(self.trunk, self.prompts, self.own, self.rows, tokens, mask)
        for row, token in enumerate(tokens):
            if alive is None or alive[row]:
                self.history[row].append(token[None])

    def expected(self, plain: LlamaModel) -> Tensor:
        """[R, D]: each row's whole history without a cache."""
        histories = [torch.cat(history) for history in self.history]
        return torch.stack([run_alone(plain, history, (len(history),))[-1] for history in histories])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_steps_equal_the_full_forward(kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    """Rows of ragged prompts, some of which stand still for a while; transformers' RoPE and norms round to float32."""
    ours, plain = make_models(kv_heads, dtype)
    batch = Batch(ours, kv_heads, dtype)
    torch.testing.assert_close(
        batch.hidden, run_alone(plain, torch.cat(batch.embeddings), PROMPTS), rtol=0, atol=tolerance
    )
    for step in range(STEPS):
        alive = [not (row == 1 and step > 2) and not (row == 4 and step in (0, 3)) for row in range(len(OWNERS))]
        batch.feed(torch.randn(len(OWNERS), WIDTH, dtype=dtype), None if step == 1 else alive)
        torch.testing.assert_close(batch.rows.hidden, batch.expected(plain), rtol=0, atol=tolerance)
    assert batch.rows.own_length.tolist() == [sum(len(h) for h in history[1:]) for history in batch.history]
    assert batch.rows.position.tolist() == [sum(len(h) for h in history) for history in batch.history]


@torch.no_grad()
def test_a_follow_up_turn_equals_the_full_forward() -> None:
    """Given tokens of different number per row at once, behind ragged histories; then steps go on."""
    ours, plain = make_models(2, torch.float64)
    batch = Batch(ours, 2, torch.float64)
    for step in range(3):
        batch.feed(torch.randn(len(OWNERS), WIDTH, dtype=torch.float64), [row != 2 or step > 1 for row in range(6)])
    lengths = [4, 1, 9, 2, 9, 5]
    turns = torch.randn(len(OWNERS), max(lengths), WIDTH, dtype=torch.float64)
    positions = batch.rows.position[:, None] + torch.arange(max(lengths))
    layout = Extend(batch.prompts, batch.own, batch.rows.spans, lengths)
    hidden = batch.trunk(turns, positions, layout)
    for row, n in enumerate(lengths):
        batch.history[row].append(turns[row, :n])
    last = torch.stack([hidden[row, n - 1] for row, n in enumerate(lengths)])
    batch.rows.advance(last, torch.tensor(lengths))
    torch.testing.assert_close(batch.rows.hidden, batch.expected(plain), rtol=0, atol=1e-6)
    batch.feed(torch.randn(len(OWNERS), WIDTH, dtype=torch.float64))
    torch.testing.assert_close(batch.rows.hidden, batch.expected(plain), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_copied_span_goes_on_apart() -> None:
    """Protects restarts: a try continues from a copy of the fork and leaves the original alone."""
    ours, plain = make_models(2, torch.float64)
    batch = Batch(ours, 2, torch.float64)
    batch.feed(torch.randn(6, WIDTH, dtype=torch.float64))
    fork, before = batch.rows.take(torch.tensor([2, 4])), [list(history) for history in batch.history]
    batch.feed(torch.randn(6, WIDTH, dtype=torch.float64))
    scratch = Store(shape_of(2, torch.float64), [3, 3])
    for place, row in enumerate((2, 4)):
        scratch.copy_span(scratch.starts[place], batch.own, batch.own.starts[row], 1)
    fork.own_start.copy_(torch.tensor(scratch.starts[:2]))
    other = torch.randn(2, WIDTH, dtype=torch.float64)
    advance(batch.trunk, batch.prompts, scratch, fork, other)
    for place, row in enumerate((2, 4)):
        tried = torch.cat([*before[row], other[place][None]])
        torch.testing.assert_close(fork.hidden[place], run_alone(plain, tried, (len(tried),))[-1], rtol=0, atol=1e-6)
    batch.feed(torch.randn(6, WIDTH, dtype=torch.float64))
    torch.testing.assert_close(batch.rows.hidden, batch.expected(plain), rtol=0, atol=1e-6)


def test_rows_take_put_and_cat() -> None:
    def numbered(numbers: list[int]) -> Rows:
        x = torch.tensor(numbers)
        return Rows(x[:, None].expand(-1, 4).clone(), x.clone(), x[:, None].float())

    rows = numbered([0, 1, 2, 3])
    taken = rows.take(torch.tensor([3, 1]))
    taken.position += 10
    assert rows.position.tolist() == [0, 1, 2, 3] and taken.position.tolist() == [13, 11]
    rows.put(torch.tensor([0, 2]), numbered([7, 8]))
    assert rows.position.tolist() == [7, 1, 8, 3] and rows.hidden[:, 0].tolist() == [7, 1, 8, 3]
    assert rows.own_start.tolist() == rows.own_length.tolist() == [7, 1, 8, 3]
    assert len(Rows.cat([rows, taken])) == 6


def test_rows_advance_in_place_and_their_columns_are_views() -> None:
    """A graph holds the tables' addresses; named columns must be of the same memory."""
    ints = torch.tensor([5, 6])
    rows = Rows.behind(ints, ints + 1, ints + 2, torch.zeros(2, 3))
    assert rows.spans.tolist() == [[5, 6, 7, 0], [6, 7, 8, 0]] and rows.position.tolist() == [6, 7]
    places = [column.data_ptr() for column in rows.columns()]
    rows.own_start.copy_(torch.tensor([30, 40]))
    rows.advance(torch.ones(2, 3), torch.tensor([2, 0]))
    rows.advance(torch.ones(2, 3), torch.tensor([True, False]))
    rows.advance(torch.full((2, 3), 4.0), 1)
    assert rows.spans.tolist() == [[5, 6, 30, 4], [6, 7, 40, 1]] and rows.own_spans() == [(30, 4), (40, 1)]
    assert rows.position.tolist() == [10, 8] and bool((rows.hidden == 4).all())
    rows.part(slice(1, 2)).copy_(rows.part(slice(0, 1)))
    assert rows.own_start.tolist() == [30, 30]
    assert [column.data_ptr() for column in rows.columns()] == places


def test_a_store_is_divided_anew_in_the_same_memory() -> None:
    store = Store(shape_of(2, torch.float32), [5, 0, 3])
    assert store.starts == [0, 5, 5, 8] and store.capacity == 9 and store.spare == 8
    place = store.keys.data_ptr()
    assert store.fits([4, 4]) and not store.fits([4, 5])
    store.divide([4, 2])
    assert store.starts == [0, 4, 6] and store.spare == 8 and store.keys.data_ptr() == place
