"""The cases: what is compared with what, on which inputs.

Every provider of a case returns the tensors that it computed, by name; those of one `values` compute the same ones,
which test_bench.py checks. A floor is what any implementation must do: the bare products of the vendor's library
with preallocated outputs, or the bytes that must move at the speed of a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import peers
import shapes
import torch
from formulas import draw_token, draw_with_logp, padded_grpo_loss, row_logp
from interleaved import Run, Unavailable
from problems import (
    BETA,
    HeadProblem,
    LogitProblem,
    TokenProblem,
    concatenated,
    head_problem,
    logit_problem,
    token_problem,
)
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.api import cfg_sample, grpo_loss, linear_grpo_loss, selective_logp

FLOOR = "floor"
BACKENDS = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
CFG_WEIGHT = 5.0


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation. `prepare` returns the call to be timed, or raises `Unavailable`."""

    name: str
    prepare: Callable[[], Run]
    values: str = "same"
    """Providers of one `values` compute the same tensors; "" = nothing to compare."""


@dataclass(frozen=True, slots=True)
class Case:
    """A comparison of providers on one set of inputs."""

    title: str
    build: Callable[[Any], list[Provider]]
    timed: bool = True
    memory: bool = False
    """Peak extra memory is measured, too; on a CPU each provider takes a process of its own."""
    library: Callable[[Any], Run] | None = None
    """Calls of the vendor's library alone, after which it has the scratch memory that it keeps."""
    graph: bool = False
    """On CUDA also as a replayed graph: the op is bound by its launches."""


def ours(device: str, make: Callable[[str], Run], suffix: str = "", values: str = "same") -> list[Provider]:
    """Our op on each backend that could serve the device."""

    def prepare(backend: str) -> Run:
        state = dispatch.available()[backend]
        if state != "ok":
            raise Unavailable(state)
        return make(backend)

    return [Provider(f"ours {name}{suffix}", partial(prepare, name), values) for name in BACKENDS[device]]


# Floors ---------------------------------------------------------------------------------------------------------------


def bare_products(problem: HeadProblem) -> Run:
    """z = h Wᵀ, dh = z W, dW = zᵀ h for each head, into preallocated outputs."""
    parts = []
    for head in problem.heads:
        hidden, weight = head.hidden.detach(), head.weight.detach()
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        parts.append((hidden, weight, logits, torch.empty_like(hidden), torch.empty_like(weight)))

    def run() -> None:
        for hidden, weight, logits, grad_hidden, grad_weight in parts:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def library_products(shape: shapes.HeadShape) -> Run:
    """The floor on some of the rows: enough for the library to allocate what it keeps between calls."""
    return bare_products(head_problem(replace(shape, rows=min(shape.rows, 2048))))


def moved_bytes(num_bytes: int, device: str) -> Run:
    """A copy that reads half of the bytes and writes the other half."""
    source = torch.ones(max(num_bytes // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# Losses from hidden states --------------------------------------------------------------------------------------------


def our_head(problem: HeadProblem, backend: str, **options: Any) -> Run:
    """`linear_grpo_loss` and its gradients."""
    shape = problem.shape

    def run() -> dict[str, Tensor]:
        output = linear_grpo_loss(
            [head.stream() for head in problem.heads], problem.rewards, problem.cu_seqlens, problem.group_offsets,
            old_logp=problem.old_logp, num_items=float(shape.rows), backend=backend, **options,
        )  # fmt: skip
        values = peers.outcome(problem, output.loss)
        if len(problem.heads) == 1:
            values |= {name: output.metrics[f"{name}/text"] for name in ("entropy", "clip_low", "clip_high")}
        return values

    return run


def eager_head(problem: HeadProblem, compiled: bool = False) -> Run:
    """Logits of all rows, log-softmax, the padded loss."""
    (head,) = problem.heads
    mask_SL = torch.ones_like(problem.padded(head.targets), dtype=torch.bool)
    old_SL = problem.padded(problem.old_logp)

    def loss_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp_T, entropy_T = row_logp(hidden @ weight.t(), head.targets)
        return padded_grpo_loss(
            problem.padded(logp_T), old_SL, problem.advantages, mask_SL, float(problem.shape.rows),
            entropy_SL=problem.padded(entropy_T),
        )  # fmt: skip

    function = peers.compile_function(loss_of, problem.shape.device) if compiled else loss_of

    def run() -> dict[str, Tensor]:
        loss, metrics = function(head.hidden, head.weight)
        return peers.outcome(problem, loss) | metrics

    return run


def liger_providers(problem: Callable[[], HeadProblem], length: int, device: str, **keys: Any) -> list[Provider]:
    """Its chunked loss at its default of one sequence a chunk and at chunks of 2048 rows, plain and compiled."""
    large = max(1, peers.LIGER_ROWS // length)
    settings = [("", False, 1), (", compiled", True, 1), (", 2048 rows", False, large),
                (", 2048 rows, compiled", True, large)]  # fmt: skip
    found = [
        Provider(f"Liger chunked{suffix}", lambda c=compiled, n=size: peers.liger_chunked(problem(), c, n), **keys)
        for suffix, compiled, size in settings
    ]
    if device == "cuda":
        found.append(Provider("Liger Triton", lambda: peers.liger_triton(problem()), **keys))
    return found


def other_heads(problem: Callable[[], HeadProblem], device: str) -> list[Provider]:
    """Peers whose log-probabilities, with their gradients, take the padded loss; on a GPU."""
    if device == "cpu":
        return []
    return [
        Provider("Liger scaled CE", lambda: peers.liger_scaled(problem(), fallback=False)),
        Provider("Liger scaled CE, its fallback", lambda: peers.liger_scaled(problem(), fallback=True)),
        Provider("ml-cross-entropy", lambda: peers.cut_cross_entropy(problem())),
    ]


def linear(shape: shapes.HeadShape, few: bool = False) -> list[Provider]:
    """One head; `few` leaves out on a CPU what a smaller case shows."""
    problem = cache(lambda: head_problem(shape))
    liger = liger_providers(problem, shape.length, shape.device)
    found = [
        *ours(shape.device, lambda backend: our_head(problem(), backend)),
        *(liger[2:] if few and shape.device == "cpu" else liger),
        Provider("TRL chunked", lambda: peers.trl_head(problem())),
        *other_heads(problem, shape.device),
    ]
    if few and shape.device == "cpu":
        accelerated = dispatch.available()[BACKENDS[shape.device][0]] == "ok"
        found = [p for p in found if p.name != "TRL chunked" and not (accelerated and p.name == "ours reference")]
    else:
        found.append(Provider("eager", lambda: eager_head(problem())))
        found.append(Provider("torch.compile", lambda: eager_head(problem(), compiled=True)))
    return [*found, Provider(FLOOR, lambda: bare_products(problem()), "")]


def linear_memory(shape: shapes.HeadShape, names: Sequence[str] | None = None) -> list[Provider]:
    """As `linear`, only for the providers whose memory is of interest."""
    return [p for p in linear(shape) if p.name != FLOOR and (names is None or p.name in names)]


def on_policy(shape: shapes.HeadShape) -> list[Provider]:
    """Every advantage 1 and no old policy: the gradient of a cross entropy."""
    problem = cache(lambda: head_problem(shape))

    def our_run(backend: str) -> Run:
        given = problem()
        ones_S = torch.ones_like(given.rewards)

        def run() -> dict[str, Tensor]:
            output = linear_grpo_loss(
                [given.heads[0].stream()], None, given.cu_seqlens, given.group_offsets, advantages=ones_S,
                num_items=float(shape.rows), backend=backend,
            )  # fmt: skip
            found = peers.outcome(given, output.loss)
            del found["loss"]  # -Σ ratio · 1: not that of the cross entropy, whose gradient is the same
            return found

        return run

    return [
        *ours(shape.device, our_run),
        Provider("F.linear_cross_entropy", lambda: peers.linear_cross_entropy(problem().heads[0], False)),
        Provider("F.linear_cross_entropy, chunked", lambda: peers.linear_cross_entropy(problem().heads[0], True)),
        *([Provider("QuACK", lambda: peers.quack(problem()))] if shape.device == "cuda" else []),
        Provider(FLOOR, lambda: bare_products(problem()), ""),
    ]


def mixed(shape: shapes.HeadShape) -> list[Provider]:
    """Text and image rows, each against its own vocabulary, or all against both, as peers with one vocabulary must."""
    problem = cache(lambda: head_problem(shape))
    joined = cache(lambda: concatenated(problem()))
    backend = BACKENDS[shape.device][0]
    return [
        *ours(shape.device, lambda name: our_head(problem(), name), values="two vocabularies"),
        *[
            p
            for p in ours(shape.device, lambda name: our_head(joined(), name), ", one vocabulary")
            if backend in p.name
        ],
        *liger_providers(joined, shape.length, shape.device)[2:],
        Provider(FLOOR, lambda: bare_products(problem()), ""),
    ]


def pruned(shape: shapes.HeadShape) -> list[Provider]:
    """Half of every group dropped by its rewards, against nothing dropped."""
    problem = cache(lambda: head_problem(shape))
    half: dict[str, Any] = {"dgs": "top_k", "dgs_keep": shapes.GROUP // 2}
    return [
        *ours(shape.device, lambda backend: our_head(problem(), backend)),
        *ours(shape.device, lambda backend: our_head(problem(), backend, **half), ", half pruned", "pruned"),
        Provider(FLOOR, lambda: bare_products(problem()), ""),
    ]


# Losses from log-probabilities ----------------------------------------------------------------------------------------


def our_tokens(problem: TokenProblem, backend: str) -> Run:
    """`grpo_loss` and its gradient; advantages are computed from rewards inside."""

    def run() -> dict[str, Tensor]:
        output = grpo_loss(
            problem.logp, problem.old_logp, problem.rewards, problem.cu_seqlens, problem.group_offsets,
            loss_mask=problem.loss_mask, ref_logp=problem.ref_logp, entropy=problem.entropy, beta=BETA, backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(output.loss, problem.logp)
        names = ("kl", "entropy", "clip_low", "clip_high")
        return {"loss": output.loss.detach(), "dlogp": grad} | {n: output.metrics[f"{n}/text"] for n in names}

    return run


def eager_tokens(problem: TokenProblem, compiled: bool) -> Run:
    """The padded formula."""
    padded = problem.padded
    old_SL, mask_SL = padded(problem.old_logp), padded(problem.loss_mask)
    ref_SL, entropy_SL = padded(problem.ref_logp), padded(problem.entropy)

    def loss_of(logp_T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        count = mask_SL.sum()
        return padded_grpo_loss(
            padded(logp_T), old_SL, problem.advantages, mask_SL, count, ref_SL, entropy_SL, BETA
        )  # fmt: skip

    function = peers.compile_function(loss_of, problem.shape.device) if compiled else loss_of

    def run() -> dict[str, Tensor]:
        loss, metrics = function(problem.logp)
        return {"loss": loss.detach(), "dlogp": torch.autograd.grad(loss, problem.logp)[0]} | metrics

    return run


def tokens(shape: shapes.TokenShape) -> list[Provider]:
    """Mask, old and reference log-probabilities, KL and entropy: what a step of GRPO with a reference policy has."""
    problem = cache(lambda: token_problem(shape))
    # Read: logp, old, ref and entropy (float32), mask (1 byte). Written: the gradient.
    num_bytes = shape.sequences * shape.length * (5 * 4 + 1)
    return [
        *ours(shape.device, lambda backend: our_tokens(problem(), backend)),
        Provider("TRL eager", lambda: peers.trl_tokens(problem(), BETA)),
        Provider("eager", lambda: eager_tokens(problem(), False)),
        Provider("torch.compile", lambda: eager_tokens(problem(), True)),
        Provider(FLOOR, lambda: moved_bytes(num_bytes, shape.device), ""),
    ]


# Logits ---------------------------------------------------------------------------------------------------------------


def selective(shape: shapes.LogitShape) -> list[Provider]:
    """Log-probability and entropy from logits, forward only."""
    problem = cache(lambda: logit_problem(shape))

    def our_run(backend: str) -> Run:
        given = problem()
        return lambda: dict(
            zip(("logp", "entropy"), selective_logp(given.logits, given.targets, backend=backend), strict=True)
        )

    def eager(compiled: bool) -> Run:
        given = problem()
        function = peers.compile_function(row_logp, shape.device) if compiled else row_logp
        return lambda: dict(zip(("logp", "entropy"), function(given.logits, given.targets), strict=True))

    def without_entropy() -> Run:
        given = problem()
        return lambda: {"logp": given.logits.float().log_softmax(-1).gather(1, given.targets[:, None])[:, 0]}

    return [
        *ours(shape.device, our_run),
        Provider("log_softmax + gather, no entropy", without_entropy),
        Provider("eager", lambda: eager(False)),
        Provider("torch.compile", lambda: eager(True)),
        Provider("TRL", lambda: peers.trl_selective(problem().logits, problem().targets)),
        Provider("TRL, one pass", lambda: peers.trl_one_pass(problem().logits, problem().targets)),
        Provider(FLOOR, lambda: moved_bytes(problem().logits.nbytes, shape.device), ""),
    ]


def sampling(shape: shapes.LogitShape) -> list[Provider]:
    """Guidance, truncation, the draw, and the log-probabilities of what was drawn."""
    problem = cache(lambda: logit_problem(shape))

    def our_run(backend: str) -> Run:
        given: LogitProblem = problem()

        def run() -> dict[str, Tensor]:
            drawn = cfg_sample(
                given.logits, given.uncond, cfg_weight=CFG_WEIGHT, top_k=shape.top_k, top_p=shape.top_p,
                seed=given.seed, offset=given.offset, backend=backend,
            )  # fmt: skip
            names = ("token", "logp", "logp_mixed", "entropy")
            return {name: getattr(drawn, name) for name in names}

        return run

    def eager(function: Callable[..., dict[str, Tensor]], compiled: bool = False) -> Run:
        given = problem()
        chosen = peers.compile_function(function, shape.device) if compiled else function
        return lambda: chosen(given.logits, given.uncond, CFG_WEIGHT, shape.top_k, shape.top_p)

    return [
        *ours(shape.device, our_run, values="draw"),
        Provider("eager", lambda: eager(draw_with_logp), "draw"),
        Provider("token only, eager", lambda: eager(draw_token), "draw"),
        Provider("torch.compile", lambda: eager(draw_with_logp, True), "draw"),
        Provider(FLOOR, lambda: moved_bytes(2 * problem().logits.nbytes, shape.device), ""),
    ]


CASES: dict[str, Case] = {
    "linear_small": Case("linear_grpo_loss, forward and backward", linear),
    "linear_large": Case("linear_grpo_loss, forward and backward", partial(linear, few=True)),
    "on_policy": Case("linear_grpo_loss on policy, advantages 1, forward and backward", on_policy),
    "memory_4k": Case(
        "linear_grpo_loss, peak memory", linear_memory, timed=False, memory=True, library=library_products
    ),
    "memory_16k": Case(
        "linear_grpo_loss, peak memory",
        partial(linear_memory, names=("ours native", "ours triton", "Liger chunked, 2048 rows")),
        timed=False,
        memory=True,
        library=library_products,
    ),
    "mixed": Case("linear_grpo_loss, text and image rows", mixed),
    "pruned": Case("linear_grpo_loss, half of the trajectories pruned", pruned),
    "grpo_loss": Case("grpo_loss with reference policy and metrics, forward and backward", tokens, graph=True),
    "selective_logp": Case("selective_logp with entropy, forward", selective),
    "cfg_sample": Case("cfg_sample, guidance 5", sampling, graph=True),
    "cfg_sample_top_p": Case("cfg_sample, guidance 5", sampling, graph=True),
}


def cases_of(device: str, quick: bool = False) -> dict[str, tuple[Case, shapes.Shape]]:
    """The cases that a device has, with their sizes."""
    sizes = shapes.CPU if device == "cpu" else shapes.CUDA
    return {name: (CASES[name], shapes.quick(shape) if quick else shape) for name, shape in sizes.items()}
