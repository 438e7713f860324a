"""Chunks of logits for a backend's row functions, and the formulas in any dtype.

Dims: `C` rows of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from backends import DEVICE, ON_TRITON
from hypothesis import strategies as st
from torch import Tensor

from syncr1.kernels.support import pack, unpack
from syncr1.kernels.terms import Head, RowLoss, RowSettings, RowTerms

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 1023, 1024, 1025, 2049]) | st.integers(1, 3000)


def is_fused() -> bool:
    """`tl.fma` rounds once: on GPUs, and in the interpreter from Triton 3.9 on. Below, an exponent errs by the rounding
    of a product as large as the logits."""
    if not ON_TRITON or DEVICE == "cuda":
        return True
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


RESOLUTION = 2e-7 if is_fused() else 1e-6
"""Of float32, twice: the floor of every comparison, times the greatest logit."""
TRUNCATED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11} if ON_TRITON and DEVICE == "cpu" else {}
"""The interpreter truncates float32 where a GPU rounds: half a unit in the last place more."""
PLAIN = RowSettings("clip", 0.2, 0.2, None, 0.0, False, 1.0, 1.05)


@dataclass(frozen=True)
class Chunk:
    products: Tensor
    targets: Tensor
    head: Head

    def there(self) -> Chunk:
        """On the device of the backend."""
        head = Head(*(v.to(DEVICE) if isinstance(v, Tensor) else v for v in vars_of(self.head)))
        return Chunk(self.products.to(DEVICE), self.targets.to(DEVICE), head)


def vars_of(record: Head) -> list[object]:
    return [getattr(record, field.name) for field in fields(record)]


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    num_rows, width = draw(st.integers(1, 5)), draw(WIDTHS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    products = torch.randn(num_rows, width, generator=generator) * draw(st.sampled_from([0.01, 1.0, 9.0]))
    if width > 1 and draw(st.booleans()):  # a masked vocabulary
        products[:, torch.randperm(width, generator=generator)[: width // 2]] = -torch.inf
    bias = torch.randn(width, generator=generator) if draw(st.booleans()) else None
    order = torch.randperm(width, generator=generator)
    forbidden = order[: draw(st.integers(0, min(3, width - 1)))] if draw(st.booleans()) else None
    products[:, order[-1]] = products[:, order[-1]].clamp_min(-9)  # something is left
    support = None
    if draw(st.booleans()):  # of any share of the ids; bits behind the last one mean nothing
        kept = torch.rand(num_rows, width, generator=generator) < draw(st.sampled_from([0.02, 0.5, 1.0]))
        kept[:, order[-1]] = True
        support = pack(torch.nn.functional.pad(kept, (0, -width % 32), value=True))
    head = Head(bias, draw(st.sampled_from([1.0, 0.3, 1.7])), forbidden, support)
    targets = torch.randint(width, (num_rows,), generator=generator)
    return Chunk(products.to(draw(st.sampled_from(DTYPES))), targets, head)


def a_chunk(num_rows: int = 6, width: int = 3001, dtype: torch.dtype = torch.float32) -> Chunk:
    products = (torch.randn(num_rows, width) * 4).to(dtype)
    return Chunk(products, torch.randint(width, (num_rows,)), Head(torch.randn(width), 0.9, torch.tensor([1500, 3, 4])))


def log_probabilities(chunk: Chunk, products: Tensor) -> Tensor:
    """[C, V] in the dtype of `products`, the way the reference forms them."""
    bias = 0.0 if chunk.head.bias is None else chunk.head.bias.to(products.dtype)
    logits = (products + bias) / chunk.head.temperature
    if chunk.head.forbidden is not None:
        logits = logits.index_fill(1, chunk.head.forbidden, -torch.inf)
    if chunk.head.support is not None:
        logits = logits.masked_fill(~unpack(chunk.head.support, logits.shape[1]), -torch.inf)
    return logits - logits.logsumexp(dim=1, keepdim=True)


def scores(chunk: Chunk, products: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, [C]."""
    logp_CV = log_probabilities(chunk, products)
    entropy_C = -(logp_CV.exp() * logp_CV.clamp_min(-1e4)).sum(dim=1)
    return logp_CV.gather(1, chunk.targets.unsqueeze(1)).squeeze(1), entropy_C


def floor(chunk: Chunk) -> float:
    logits = chunk.products.detach().double() + (0.0 if chunk.head.bias is None else chunk.head.bias.double())
    return RESOLUTION * (1 + float(logits[logits.isfinite()].abs().max())) / min(chunk.head.temperature, 1.0)


def assert_close(actual: Tensor, exact: Tensor, peer: Tensor, floor: float) -> None:
    """Not further from float64 than twice what plain PyTorch is in the same dtype."""
    actual = actual.cpu()
    assert actual.isnan().equal(exact.isnan())
    finite = exact.isfinite()
    assert actual[~finite].nan_to_num().equal(exact[~finite].to(actual.dtype).nan_to_num())
    error, allowed = ((t.double() - exact)[finite].abs() for t in (actual, peer))
    if error.numel():
        truncated = TRUNCATED.get(actual.dtype, 0.0) * float(exact[finite].abs().max())
        assert float(error.max()) <= 2 * float(allowed.max()) + floor + truncated


def token_loss(logp: Tensor, terms: RowTerms, settings: RowSettings) -> Tensor:
    """[C]; the formulas of kernels/reference/loss.py."""
    values = (terms.advantage, terms.weight, terms.old_logp, terms.ref_logp, terms.is_ratio)
    advantage, weight, old, ref, sampler = (None if t is None else t.to(logp.dtype) for t in values)
    assert advantage is not None and weight is not None
    ratio = (logp - (logp.detach() if old is None else old)).clamp(-20, 20).exp()
    if settings.loss == "cispo":
        loss = -ratio.clamp(max=settings.clip_high).detach() * advantage * logp
    elif settings.loss == "sapo":
        tau = torch.where(advantage > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    else:
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        loss = -torch.minimum(bounded * advantage, clipped * advantage)
    if sampler is not None:
        loss = loss * sampler
    if ref is not None:
        difference = (ref - logp).clamp(-20, 20)
        kl = difference.exp() - difference - 1
        loss = loss + settings.beta * (kl * ratio if settings.bias_corrected_kl else kl)
    return loss * weight


@st.composite
def losses(draw: st.DrawFn) -> tuple[Chunk, RowTerms, RowSettings]:
    chunk = draw(chunks())
    logp = scores(chunk, chunk.products.double())[0].float().clamp_min(-30)
    advantage, weight, noise, reference, ratio = torch.randn(5, len(logp), generator=torch.Generator().manual_seed(1))
    parts = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    terms = RowTerms(
        advantage,
        weight.exp() / 4,
        logp + 0.3 * noise if parts[0] else None,
        logp + 0.5 * reference if parts[1] else None,
        ratio.exp() if parts[2] else None,
    )
    kind: RowLoss = draw(st.sampled_from(["clip", "cispo", "sapo"]))
    settings = replace(PLAIN, loss=kind, clip_high=1.5 if kind == "cispo" else 0.28, beta=0.1 if parts[1] else 0.0)
    return (
        chunk,
        terms,
        replace(settings, delta=draw(st.sampled_from([None, 1.4])), bias_corrected_kl=draw(st.booleans())),
    )
