"""`cfg_sample`: one token per row under classifier-free guidance. No gradient, every backend.

Dims: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ranges
from ..checks import INTEGER_DTYPES, check_drawn, check_float, check_forbidden, check_vector, refuse
from ..dispatch import choose, module_of, same_device
from ..outputs import CFGSample
from ..register import fakes, implements, registered
from ..support import num_words
from ..terms import SampleInputs

OP = "cfg_sample"
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def cfg_sample(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    cfg_weight: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    offset: int | Tensor,
    forbidden: Tensor | None = None,
    with_support: bool = False,
    backend: str | None = None,
) -> CFGSample:
    """Samples one token per row under classifier-free guidance, with its log-probabilities.

    Equivalent PyTorch, up to the random numbers:
        z = uncond + cfg_weight * (cond - uncond)
        token = torch.multinomial((z / temperature).softmax(-1), 1)[:, 0]
        logp = (cond / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]

    Args:
        cond: [B, V] float; conditional logits.
        uncond: [B, V] float or None (no guidance).
        cfg_weight: any finite number; 1 = conditional, 5 = Janus's usual guidance.
        temperature: finite, ≥ 0; 0 is greedy, whose log-probabilities are reported at temperature 1.
        top_k: ≥ 0 most likely ids of z; 0 = all.
        top_p: in (0, 1]; the smallest set of ids holding that much of what top_k left, met to a relative 1e-6, ties to
            the lower id; 1 = all.
        min_p: in [0, 1]; of those the ids whose probability is at least min_p times the greatest, met to a relative
            1e-6; 0 = all. The order (top_k, top_p, min_p) is transformers'; vLLM has min_p first, so that its top_p is
            a share of what min_p left: the two differ only where both are on.
        seed: int or [B] int64.
        offset: int or [B] int64; counter of the draw. A row's token depends on its logits, seed and offset alone, so
            give each sequence and step its own offset (sequence_id * max_steps + step). One number for all rows counts
            on from row to row (row b draws at offset + b, and the next call starts at offset + B); rows draw with equal
            numbers only where seeds and offsets are given per row and are equal.
        forbidden: [F] int64 vocabulary ids that are never sampled; both distributions exclude them.
        with_support: returns the set of ids that could be drawn, for `linear_logp(support=…)`; the drawn one is always
            among them. Log-probabilities and entropy are then those of the distributions renormalised over it. Greedy
            decoding leaves nothing out.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        CFGSample(token, logp, logp_mixed, entropy, support); without support `logp_mixed` is that of z before top_k,
        top_p and min_p.

    Raises:
        ValueError: a shape, dtype or value is out of place, or a row of logits has no distribution (NonFiniteError).

    Source: Philox4x32-10 (Salmon et al., SC 2011); guidance as in Janus's `generation_inference.py`.
    """
    given = {"cfg_weight": cfg_weight, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, allowed in ranges.SAMPLING.items():
        allowed.check(OP, name, given[name])
    ranges.check_switch(OP, "with_support", with_support)
    _check_shapes(cond, uncond, cfg_weight)
    for name, counter in (("seed", seed), ("offset", offset)):
        _check_counter(name, counter, cond.shape[0])
    same_device(OP, cond=cond, uncond=uncond, seed=seed, offset=offset, forbidden=forbidden)
    seed_B, offset_B = (_on_device(counter, cond) for counter in (seed, offset))
    if offset_B.dim() == 0:  # rows of one call are independent
        offset_B = offset_B + torch.arange(cond.shape[0], device=cond.device)
    inputs = SampleInputs(
        cond.detach(),
        None if uncond is None else uncond.detach(),
        float(cfg_weight),
        float(temperature),
        int(top_k),
        float(top_p),
        float(min_p),
        seed_B.expand(cond.shape[0]),
        offset_B,
        forbidden,
        with_support,
        choose(OP, backend, cond, uncond),
    )
    token, logp, logp_mixed, entropy, kept = registered.cfg_sample(*inputs)
    return CFGSample(token, logp, logp_mixed, entropy, kept if with_support else None)


def _check_shapes(cond: Tensor, uncond: Tensor | None, cfg_weight: float) -> None:
    check_float(OP, "cond", cond)
    if cond.dim() != 2:
        refuse(OP, "cond", "[B, V]", list(cond.shape), "pass the logits of the last position")
    if uncond is not None and uncond.shape != cond.shape:
        refuse(OP, "uncond", list(cond.shape), list(uncond.shape), "expand it to one row per conditional row")
    if uncond is None and cfg_weight != 1.0:
        refuse(OP, "cfg_weight", "1 without uncond", cfg_weight, "pass the unconditional logits")


def _check_counter(name: str, value: int | Tensor, num_rows: int) -> None:
    if not isinstance(value, Tensor):
        ranges.SEED.check(OP, name, value)
        return
    if value.dtype not in INTEGER_DTYPES:
        refuse(OP, name, "int64", value.dtype, "convert it with .long()")
    if value.dim() > 0:
        check_vector(OP, name, value, num_rows, "one per row")


def _on_device(counter: int | Tensor, like: Tensor) -> Tensor:
    """Filled on the device: a Python number copied there makes the host wait for it."""
    return counter.long() if isinstance(counter, Tensor) else like.new_full((), counter, dtype=torch.int64)


@implements(OP, SampleInputs, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
def draw(inputs: SampleInputs) -> Five:
    """(token [B] int64, logp [B], logp_mixed [B], entropy [B], support [B, ceil(V/32)] int32 or empty)."""
    check_forbidden(OP, inputs.forbidden, inputs.cond.shape[1])
    drawn = module_of(inputs.backend).sample(inputs)
    check_drawn(OP, drawn.logp_mixed)
    support = drawn.token.new_empty(0, dtype=torch.int32) if drawn.support is None else drawn.support
    return drawn.token, drawn.logp, drawn.logp_mixed, drawn.entropy, support


@fakes(OP, SampleInputs)
def _(inputs: SampleInputs) -> Five:
    cond = inputs.cond
    dtype = torch.float64 if cond.dtype == torch.float64 else torch.float32
    logp, mixed, entropy = (cond.new_empty(cond.shape[:1], dtype=dtype) for _ in range(3))
    shape = (cond.shape[0], num_words(cond.shape[1])) if inputs.with_support else (0,)
    support = cond.new_empty(shape, dtype=torch.int32)
    return cond.new_empty(cond.shape[:1], dtype=torch.int64), logp, mixed, entropy, support
