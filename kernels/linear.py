"""Linear heads without `[rows, vocabulary]`: products by the vendor's library, row sweeps by a backend's kernels.

Rows go through a workspace of one chunk. Where the loss of a row is known from that row alone, dL/dz is formed in the
forward and three products per chunk are all:

    z = h Wᵀ   (product 1)      z ← dL/dz in place      dh = dz W   (2)      dW += dzᵀ h   (3, float32)

Where it needs other rows first (sequence ratios, vespo, entropy quantiles, or log-probabilities handed to the caller),
z is formed again for the second sweep: four products.

dW is read and written once per chunk: with M rows a chunk that is 8VD bytes beside 6MVD operations, a few percent from
about 1000 rows on a CPU and 4000 on a GPU.

Dims: `N` rows of a stream, `C` rows of a chunk, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import Backend, Head, RowSettings, RowTerms, padded

WORKSPACE_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
"""Largest workspace; on a CPU pages of a fresh allocation cost as much as sweeping over them."""
CHUNK_ROWS = (256, 4096)
"""Fewest and most rows of a chunk: below, dW's read-modify-write shows; above, nothing is gained."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """The rows of one vocabulary that take part."""

    hidden: Tensor
    """[N, D]."""
    weight: Tensor
    """[V, D]."""
    targets: Tensor
    """[n] int64, of the rows that take part."""
    head: Head
    index: Tensor | None = None
    """[n] int64 positions of those rows in `hidden`; None = all."""

    @property
    def num_rows(self) -> int:
        return self.targets.shape[0]

    def chunk(self, rows: slice) -> Tensor:
        """[C, D]: their hidden states."""
        return self.hidden[rows] if self.index is None else self.hidden.index_select(0, self.index[rows])

    def subset(self, chosen: Tensor) -> HeadRows:
        """Those of the rows that take part."""
        index = chosen if self.index is None else self.index[chosen]
        return HeadRows(self.hidden, self.weight, self.targets[chosen], self.head.of(chosen), index)


def chosen_rows(masks: Sequence[Tensor]) -> list[Tensor | None]:
    """Where each [n] bool mask is True: [count] int64 in rising order, None where it is everywhere.

    How many there are is read back once for all masks: the one time that a GPU is waited for.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [_places(mask, count) for mask, count in zip(masks, counts, strict=True)]


def _places(mask: Tensor, count: int) -> Tensor | None:
    if count == mask.numel():
        return None
    return mask.nonzero().squeeze(1) if mask.device.type == "cpu" else first_true(mask, count)


def first_true(mask: Tensor, count: int) -> Tensor:
    """Where the [n] mask is True, by a stable sort: `nonzero` would read the count once more from a GPU."""
    return mask.byte().argsort(descending=True, stable=True)[:count]


class Workspace:
    """One buffer for the products of one chunk at a time, shared by all heads of a call."""

    def __init__(self, heads: Sequence[HeadRows]) -> None:
        like = heads[0].hidden
        self.limit = WORKSPACE_BYTES.get(like.device.type, WORKSPACE_BYTES["cuda"]) // like.element_size()
        sizes = [self._chunk_rows(rows) * padded(rows.weight.shape[0]) for rows in heads]
        self.limit = max(sizes, default=0)
        self.buffer = _take(self.limit, like)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: object) -> None:
        _give_back(self.buffer)

    def _chunk_rows(self, rows: HeadRows) -> int:
        """Rows of a chunk: as many as fit, evened out so that no short chunk is left over."""
        fewest, most = CHUNK_ROWS
        at_most = min(max(self.limit // max(padded(rows.weight.shape[0]), 1), fewest), most)
        num_chunks = max(-(-rows.num_rows // at_most), 1)
        return -(-rows.num_rows // num_chunks)

    def chunks(self, rows: HeadRows) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their hidden states [C, D], their products [C, V]); the products of the chunk before are gone."""
        vocabulary = rows.weight.shape[0]
        stride = padded(vocabulary)
        size = max(min(self._chunk_rows(rows), self.limit // max(stride, 1)), 1)
        for start in range(0, rows.num_rows, size):
            part = slice(start, min(start + size, rows.num_rows))
            hidden_CD = rows.chunk(part)
            products_CV = self.buffer[: hidden_CD.shape[0] * stride].view(-1, stride)[:, :vocabulary]
            yield part, hidden_CD, torch.mm(hidden_CD, rows.weight.t(), out=products_CV)


_kept: dict[torch.dtype, Tensor] = {}
"""The last CPU workspace of each dtype, of at most WORKSPACE_BYTES: its pages need not be made again at every call."""


def _take(size: int, like: Tensor) -> Tensor:
    """[≥ size], uninitialised. Popped from what is kept: two threads never get the same."""
    kept = _kept.pop(like.dtype, None) if like.device.type == "cpu" else None
    if kept is not None and kept.numel() >= size:
        return kept
    # Never an inference tensor: kept from a call that only scores, it would refuse every training step after it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=like.dtype, device=like.device)


def _give_back(buffer: Tensor) -> None:
    if buffer.device.type == "cpu" and buffer.numel() * buffer.element_size() <= WORKSPACE_BYTES["cpu"]:
        _kept[buffer.dtype] = buffer


class HeadGradients:
    """dL/d(hidden, weight, bias) of one head, collected chunk by chunk in a fixed order."""

    def __init__(self, rows: HeadRows, needs: Sequence[bool]) -> None:
        self.rows = rows
        need_hidden, need_weight, need_bias = needs
        like, weight = rows.hidden, rows.weight
        self.hidden, self.weight, self.bias = (like.new_empty(0) for _ in range(3))
        self.needs = (need_hidden, need_weight, need_bias and rows.head.bias is not None)
        if need_hidden:
            # rows that take no part have gradient 0; where all take part every entry is written
            self.hidden = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            if rows.index is not None or not rows.num_rows:
                self.hidden.zero_()
        if need_weight:
            self.weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            if not rows.num_rows:
                self.weight.zero_()
        if self.needs[2]:
            self.bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)

    def add(self, part: slice, hidden_CD: Tensor, grad_CV: Tensor) -> None:
        """`grad_CV` is d loss / d products of the rows `part`."""
        need_hidden, need_weight, need_bias = self.needs
        if need_hidden and self.rows.index is None:
            torch.mm(grad_CV, self.rows.weight, out=self.hidden[part])
        elif need_hidden:
            self.hidden.index_copy_(0, self.rows.index[part], grad_CV @ self.rows.weight)  # type: ignore[index]
        if need_weight:
            accumulate_product(self.weight, grad_CV.t(), hidden_CD, first=part.start == 0)
        if need_bias:
            self.bias += grad_CV.sum(dim=0, dtype=torch.float32)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) in the dtypes of the inputs; empty where not needed."""
        bias = self.rows.head.bias
        bias_grad = self.bias if bias is None or not self.needs[2] else self.bias.to(bias.dtype)
        return self.hidden, self.weight.to(self.rows.weight.dtype), bias_grad


def accumulate_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total (+)= left @ right for a float32 `total`, without rounding the sum to the operands' dtype."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif left.is_cuda and first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # the CPU's product has no wider output; it accumulates in float32 inside
        product = left @ right
        total.copy_(product) if first else total.add_(product)


def score_hidden(
    kernels: Backend, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [N] float32, entropy [N] float32, logsumexp [N] float64): one product per chunk."""
    rows = HeadRows(hidden, weight, targets, head)
    with Workspace([rows]) as workspace:
        return score_rows(kernels, rows, workspace)


def score_rows(kernels: Backend, rows: HeadRows, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """As `score_hidden`, in a workspace that several heads share."""
    kinds = (torch.float32, torch.float32, torch.float64)
    out = [torch.empty(rows.num_rows, dtype=kind, device=rows.hidden.device) for kind in kinds]
    for part, _, products_CV in workspace.chunks(rows):
        scored = kernels.score_rows(products_CV, rows.targets[part], rows.head.of(part))
        for into, values in zip(out, scored, strict=True):
            into[part].copy_(values)
    return out[0], out[1], out[2]


def backward_rows(
    kernels: Backend,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    lse_N: Tensor,
    entropy_N: Tensor,
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from those of logp and entropy: the product again, then two more."""
    rows = HeadRows(hidden, weight, targets, head)
    with Workspace([rows]) as workspace:
        return gradient_pass(kernels, rows, workspace, lse_N, entropy_N, grad_logp_N, grad_entropy_N, needs)


def gradient_pass(
    kernels: Backend,
    rows: HeadRows,
    workspace: Workspace,
    lse_N: Tensor,
    entropy_N: Tensor,
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward_rows`, in a workspace that several heads share."""
    gradients = HeadGradients(rows, needs)
    for part, hidden_CD, products_CV in workspace.chunks(rows):
        kernels.gradient_rows(
            products_CV,
            rows.targets[part],
            rows.head.of(part),
            lse_N[part],
            entropy_N[part],
            None if grad_logp_N is None else grad_logp_N[part],
            None if grad_entropy_N is None else grad_entropy_N[part],
            products_CV,
        )
        gradients.add(part, hidden_CD, products_CV)
    return gradients.finish()


def loss_pass(
    kernels: Backend,
    rows: HeadRows,
    workspace: Workspace,
    terms: RowTerms,
    settings: RowSettings,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(logp, entropy, gradients) of a loss that each row knows alone: three products per chunk."""
    logp_N, entropy_N = torch.empty(2, rows.num_rows, dtype=torch.float32, device=rows.hidden.device)
    gradients = HeadGradients(rows, needs)
    for part, hidden_CD, products_CV in workspace.chunks(rows):
        head = rows.head.of(part)
        logp_C, entropy_C = kernels.loss_rows(products_CV, rows.targets[part], head, terms[part], settings)
        logp_N[part].copy_(logp_C)
        entropy_N[part].copy_(entropy_C)
        gradients.add(part, hidden_CD, products_CV)
    return logp_N, entropy_N, gradients.finish()
