"""linear_logp and selective_logp against log_softmax of the whole logits, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncr1.kernels.api import linear_logp, selective_logp
from syncr1.kernels.reference import logp as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def whole_logits(
    logits: Tensor, targets: Tensor, temperature: float, forbidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    allowed = torch.ones(logits.shape[1], dtype=torch.bool)
    if forbidden is not None:
        allowed[forbidden] = False
    position = (allowed.cumsum(0) - 1)[targets]
    distribution = torch.distributions.Categorical(logits=logits[:, allowed] / temperature, validate_args=False)
    return distribution.log_prob(position), distribution.entropy()


def operands(rows: int, vocabulary: int, dtype: torch.dtype, hidden: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, w, b = torch.randn(rows, hidden), torch.randn(vocabulary, hidden), torch.randn(vocabulary)
    targets = torch.randint(0, vocabulary - 2, (rows,))
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("rows", [0, 1, 7, 63])
@pytest.mark.parametrize("forbidden", [None, [3], [11, 12]], ids=["all", "one", "two"])
@pytest.mark.parametrize("chunk_rows", [4096, 5], ids=["whole", "chunked"])
def test_linear_logp_in_float64(rows: int, forbidden: list[int] | None, chunk_rows: int) -> None:
    hidden, weight, bias, targets = operands(rows, 13, torch.float64)
    ids = None if forbidden is None else torch.tensor(forbidden)
    targets = torch.where(targets == 3, 2, targets)
    logp, entropy = reference.linear_logp(
        hidden, weight, targets, bias=bias, temperature=0.7, forbidden=ids, chunk_rows=chunk_rows
    )
    expected_logp, expected_entropy = whole_logits(F.linear(hidden, weight, bias), targets, 0.7, ids)
    torch.testing.assert_close(logp, expected_logp)
    torch.testing.assert_close(entropy, expected_entropy)
    mix = torch.randn(2, rows, dtype=torch.float64)
    grads = torch.autograd.grad((mix[0] * logp + mix[1] * entropy).sum(), (hidden, weight, bias))
    expected = torch.autograd.grad((mix[0] * expected_logp + mix[1] * expected_entropy).sum(), (hidden, weight, bias))
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth)


def test_linear_logp_gradcheck() -> None:
    hidden, weight, bias, targets = operands(4, 6, torch.float64, hidden=3)

    def op(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logp(h, w, targets, bias=b, temperature=1.3, forbidden=torch.tensor([5]))

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


def test_selective_logp_gradcheck() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: selective_logp(z, targets, temperature=0.5), (logits,))
    assert torch.autograd.gradcheck(lambda z: selective_logp(z, targets, forbidden=torch.tensor([5])), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = operands(257, 507, dtype, hidden=64)
    truth = whole_logits(F.linear(hidden.double(), weight.double(), bias.double()), targets, 1.0, None)
    plain = (F.linear(hidden, weight, bias).float()).log_softmax(-1)
    plain_logp = plain.gather(1, targets[:, None])[:, 0]
    plain_entropy = -(plain.exp() * plain).sum(-1)
    logp, entropy = linear_logp(hidden, weight, targets, bias=bias)
    assert logp.dtype == entropy.dtype == torch.float32
    for mine, theirs, exact in ((logp, plain_logp, truth[0]), (entropy, plain_entropy, truth[1])):
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6
    grads = torch.autograd.grad(logp.sum(), (hidden, weight, bias))
    plain_grads = torch.autograd.grad(plain_logp.sum(), (hidden, weight, bias))
    true_grads = torch.autograd.grad(truth[0].sum(), (hidden, weight, bias))
    for mine, theirs, exact in zip(grads, plain_grads, true_grads, strict=True):
        exact = exact.double()
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-5


def test_rows_do_not_depend_on_each_other_and_inputs_stay() -> None:
    hidden, weight, bias, targets = operands(40, 31, torch.float32)
    copies = [t.detach().clone() for t in (hidden, weight, bias)]
    logp, entropy = linear_logp(hidden, weight, targets, bias=bias)
    order = torch.randperm(40)
    moved_logp, moved_entropy = linear_logp(hidden[order], weight, targets[order], bias=bias)
    torch.testing.assert_close(moved_logp, logp[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved_entropy, entropy[order], rtol=0, atol=1e-6)
    (3 * logp).sum().backward()
    assert all(t.equal(c) for t, c in zip((hidden, weight, bias), copies, strict=True))


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = operands(6, 9, torch.float32)
    logp, _ = linear_logp(hidden, weight.detach(), targets)
    (grad,) = torch.autograd.grad(logp.sum(), (hidden,))
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_infinite_logits_leave_the_entropy_finite() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    logp, entropy = selective_logp(logits, torch.tensor([1]))
    (logp + 1000 * entropy).sum().backward()
    torch.testing.assert_close(entropy.detach(), torch.tensor([2.0]).log())
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = reference._chunk_logits

    def spy(*arguments: object) -> Tensor:
        logits = plain(*arguments)  # type: ignore[arg-type]
        sizes.append(logits.shape[0])
        return logits

    monkeypatch.setattr(reference, "_chunk_logits", spy)
    hidden, weight, _, targets = operands(9000, 5, torch.float32)
    reference.linear_logp(hidden, weight, targets)[0].sum().backward()
    assert sizes == [4096, 4096, 808] * 2
