"""The chunk loop: borders, a shared workspace, several threads, sums in float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from syncr1.kernels import dispatch, linear
from syncr1.kernels.api import TokenStream, linear_grpo_loss, linear_logp
from syncr1.kernels.ops import linear_sweeps
from syncr1.kernels.terms import padded

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(dispatch.available()["native"] != "ok", reason=dispatch.available()["native"]),
]
ROWS, WIDTH, VOCABULARY = 37, 8, 101


@pytest.fixture(autouse=True)
def _no_workspace_is_kept() -> Iterator[None]:
    linear._kept.clear()
    yield
    linear._kept.clear()


def operands(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, WIDTH, generator=random).to(dtype).requires_grad_() for n in (ROWS, VOCABULARY))
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=random)


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, **settings: Any) -> list[Tensor]:
    stream = TokenStream(hidden, weight, targets, torch.arange(ROWS))
    cu_seqlens, groups = torch.tensor([0, 10, 20, ROWS]), torch.tensor([0, 3])
    rewards = None if "advantages" in settings else torch.tensor([0.0, 1.0, 0.4])
    out = linear_grpo_loss([stream], rewards, cu_seqlens, groups, **settings)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight])]


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
@pytest.mark.parametrize("most", [1, 2, 7, 36, 37])
def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, most: int, loss_type: str) -> None:
    expected = loss_and_gradients(*operands(), loss_type=loss_type)
    linear._kept.clear()
    monkeypatch.setattr(linear, "CHUNK_ROWS", (1, most))
    for mine, whole in zip(loss_and_gradients(*operands(), loss_type=loss_type), expected, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)


def test_the_workspace_is_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_and_gradients(*operands())
    (kept,) = linear._kept.values()
    assert kept.numel() == ROWS * padded(VOCABULARY)
    loss_and_gradients(*operands(1))
    assert linear._kept[torch.float32] is kept
    linear._kept.clear()
    monkeypatch.setitem(linear.WORKSPACE_BYTES, "cpu", 64)  # the fewest rows of a chunk need more than may be kept
    loss_and_gradients(*operands())
    assert not linear._kept


def test_an_error_inside_leaves_a_workspace_that_works() -> None:
    expected = loss_and_gradients(*operands())
    hidden, weight, targets = operands()
    with torch.no_grad():
        hidden[3] = torch.nan
    with pytest.raises(ValueError, match="logp must be finite"):
        loss_and_gradients(hidden, weight, targets)
    for mine, whole in zip(loss_and_gradients(*operands()), expected, strict=True):
        assert mine.equal(whole)


def test_threads_do_not_share_a_workspace() -> None:
    expected = [loss_and_gradients(*operands(seed)) for seed in range(8)]
    torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: loss_and_gradients(*operands(seed % 8)), range(64)))
    for index, values in enumerate(found):
        assert all(mine.equal(theirs) for mine, theirs in zip(values, expected[index % 8], strict=True))


def test_bfloat16_gradients_of_many_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk rounds once; a running sum in bfloat16 would lose the small chunks beside the large total."""
    monkeypatch.setattr(linear, "CHUNK_ROWS", (1, 1))
    hidden = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
    weight, targets = torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=True), torch.zeros(ROWS).long()
    linear_logp(hidden, weight, targets)[0].sum().backward()
    assert weight.grad is not None
    share = torch.tensor(1 / VOCABULARY).bfloat16().float()
    torch.testing.assert_close(weight.grad[1].float(), (-ROWS * share).expand(WIDTH), rtol=2**-8, atol=0)


def test_rows_of_a_second_sweep_fit_into_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 rows in chunks of 200; of the 256 that are left, one chunk would be 256."""
    monkeypatch.setitem(linear.WORKSPACE_BYTES, "cpu", 1)
    hidden, weight = torch.randn(600, 3), torch.randn(5, 3)
    rows = linear.HeadRows(hidden, weight, torch.zeros(600, dtype=torch.int64), linear.Head())
    left = torch.arange(256) * 2
    with linear.Workspace([rows]) as workspace:
        parts = [(part.clone(), part.stride(0)) for _, _, part in workspace.chunks(rows.subset(left))]
    assert {stride for _, stride in parts} == {padded(5)} and workspace.buffer.numel() == 200 * padded(5)
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), hidden[left] @ weight.t())


def test_clipped_sequences_take_no_part_in_the_second_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do tokens that an entropy quantile leaves out."""
    swept: list[int] = []

    def second(kernels: Any, rows: linear.HeadRows, *others: Any) -> Any:
        swept.append(rows.num_rows)
        return linear.gradient_pass(kernels, rows, *others)

    monkeypatch.setattr(linear_sweeps, "gradient_pass", second)
    hidden, weight, targets = operands()
    with torch.no_grad():
        old_logp, _ = linear_logp(hidden, weight, targets)
    advantages = torch.tensor([1.0, -1.0, 1.0])
    # At twice the old probability the first sequence has gained enough.
    old_logp[:10] -= 0.7
    for ratio in ("sequence", "product"):
        loss_and_gradients(hidden, weight, targets, ratio=ratio, old_logp=old_logp, advantages=advantages)
    loss_and_gradients(hidden, weight, targets, top_entropy_quantile=0.2, advantages=advantages)
    assert swept == [ROWS - 10, ROWS - 10, ROWS - int(0.8 * ROWS)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_are_found_by_sorting_as_by_looking(share: float) -> None:
    """What a GPU takes in place of `nonzero`."""
    mask = torch.rand(1000) < share
    found = linear.first_true(mask, int(mask.sum()))
    assert torch.equal(found, mask.nonzero().squeeze(1))
    chosen = linear.chosen_rows([mask, torch.ones(3, dtype=torch.bool)])
    assert chosen[1] is None and (chosen[0] is None if share == 1 else torch.equal(chosen[0], found))
