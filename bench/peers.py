"""The peers' own code, called as they call it. Imported when a provider is prepared; absent ones give their reason.

TRL's loss is `GRPOTrainer._compute_loss` itself, on a stand-in for the trainer that has one process, no accumulation,
and log-probabilities already computed; its metrics, with their transfers to Python floats, are part of it.

Dims: `T` tokens, `S` sequences, `L` length, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from formulas import CLIP, padded_grpo_loss
from interleaved import Run, Unavailable
from problems import Head, HeadProblem, TokenProblem
from torch import Tensor

LIGER_ROWS = 2048
"""Rows that Liger's chunked loss takes at a time inside; chunks of as many rows are its fastest setting."""


def load(name: str) -> Any:
    """A module, or the reason why there is none."""
    try:
        import syncr1.engine.compat  # noqa: F401  # lets transformers and torchvision's wheel live together

        return importlib.import_module(name)
    except Exception as error:  # a peer's module may raise anything where it was made for other versions
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"{name.split('.')[0]}: {first[:120]}") from error


def need_compiler(device: str) -> None:
    """`torch.compile` generates C++ for a CPU."""
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise Unavailable("torch.compile needs a C++ compiler on a CPU")


def compile_function(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`torch.compile`, where its code generator has what it needs."""
    need_compiler(device)
    return torch.compile(function)


# TRL ------------------------------------------------------------------------------------------------------------------


def trl_trainer(beta: float, score: Callable[[], tuple[Tensor, Tensor]]) -> Any:
    """What `_compute_loss` reads of a trainer; `score` gives (logp, entropy), both [S, L]."""
    same = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    return SimpleNamespace(
        beta=beta,
        loss_type="dapo",
        importance_sampling_level="token",
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        accelerator=same,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (*score(), None),
    )


def trl_loss(
    problem: HeadProblem | TokenProblem, mask_SL: Tensor, beta: float, score: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """(loss, metrics) of `GRPOTrainer._compute_loss`."""
    compute = load("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss
    trainer = trl_trainer(beta, score)
    nothing = mask_SL.new_zeros(mask_SL.shape[0], 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(mask_SL, dtype=torch.int64),
        "completion_mask": mask_SL.long(),
        "advantages": problem.advantages,
        "old_per_token_logps": problem.padded(problem.old_logp),
        "num_items_in_batch": mask_SL.sum(),
    }
    if isinstance(problem, TokenProblem):
        inputs["ref_per_token_logps"] = problem.padded(problem.ref_logp)
    names = {"kl": "kl", "entropy": "entropy", "clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high"}

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        trainer._metrics["train"].clear()
        loss = compute(trainer, None, inputs)
        found = trainer._metrics["train"]
        return loss, {ours: torch.tensor(found[name][0]) for name, ours in names.items() if name in found}

    return run


def trl_head(problem: HeadProblem) -> Callable[[], dict[str, Tensor]]:
    """`ChunkedLogProbFunction` (four products), then the loss with its metrics."""
    function = load("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    load("trl.trainer.utils")  # its backward imports it
    (head,) = problem.heads
    chunk = min(32768, head.weight.shape[0])
    arguments = (head.hidden, head.weight, None, head.targets, 1.0, chunk, None, 1.0, ("entropy",))

    def score() -> tuple[Tensor, Tensor]:
        logp_T, entropy_T, *_ = function.apply(*arguments)
        return problem.padded(logp_T), problem.padded(entropy_T.detach())

    mask_SL = torch.ones_like(problem.padded(problem.old_logp), dtype=torch.bool)
    loss_of = trl_loss(problem, mask_SL, 0.0, score)

    def run() -> dict[str, Tensor]:
        loss, metrics = loss_of()
        return outcome(problem, loss) | metrics

    return run


def trl_tokens(problem: TokenProblem, beta: float) -> Callable[[], dict[str, Tensor]]:
    """The eager loss with its metrics, from log-probabilities."""
    entropy_SL = problem.padded(problem.entropy)
    mask_SL = problem.padded(problem.loss_mask)
    loss_of = trl_loss(problem, mask_SL, beta, lambda: (problem.padded(problem.logp), entropy_SL))

    def run() -> dict[str, Tensor]:
        loss, metrics = loss_of()
        return {"loss": loss, "dlogp": torch.autograd.grad(loss, problem.logp)[0]} | metrics

    return run


def trl_selective(logits: Tensor, targets: Tensor) -> Callable[[], dict[str, Tensor]]:
    """`selective_log_softmax` and `entropy_from_logits`."""
    utils = load("trl.trainer.utils")
    return lambda: {"logp": utils.selective_log_softmax(logits, targets), "entropy": utils.entropy_from_logits(logits)}


def trl_one_pass(logits: Tensor, targets: Tensor) -> Callable[[], dict[str, Tensor]]:
    """`selective_log_softmax_and_entropy`: since 1.16 one Triton kernel on a GPU."""
    function = load("trl.trainer.utils").selective_log_softmax_and_entropy
    return lambda: dict(zip(("logp", "entropy"), function(logits, targets, entropy_requires_grad=False), strict=True))


# Liger ----------------------------------------------------------------------------------------------------------------


def liger_chunked(problem: HeadProblem, compiled: bool, chunk_size: int) -> Callable[[], dict[str, Tensor]]:
    """`LigerFusedLinearGRPOLoss`; `chunk_size` counts sequences."""
    module = load("liger_kernel.chunked_loss.grpo_loss")
    if compiled:
        need_compiler(problem.shape.device)
    (head,) = problem.heads
    loss_of = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=compiled,
        use_ref_model=False,
        chunk_size=chunk_size,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="dapo",
    )
    padded = problem.padded
    mask_SL = torch.ones_like(padded(head.targets))

    def run() -> dict[str, Tensor]:
        loss, _ = loss_of(
            padded(head.hidden),
            head.weight,
            padded(head.targets),
            mask_SL,
            problem.advantages,
            old_per_token_logps=padded(problem.old_logp),
        )
        return outcome(problem, loss)

    return run


def liger_triton(problem: HeadProblem) -> Callable[[], dict[str, Tensor]]:
    """The head's product, then `triton_grpo_loss`; CUDA only. It wants one position more than there are targets."""
    if problem.shape.device == "cpu":
        raise Unavailable("needs a GPU")
    function = load("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    (head,) = problem.heads
    padded = problem.padded

    def run() -> dict[str, Tensor]:
        logits = torch.nn.functional.pad(padded(head.hidden), (0, 0, 0, 1)) @ head.weight.t()
        loss, _ = function(
            logits,
            padded(problem.old_logp),
            None,
            padded(head.targets),
            problem.advantages,
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            loss_type="dapo",
            reduce=True,
        )
        return outcome(problem, loss)

    return run


def per_token(problem: HeadProblem, score: Callable[[Head], tuple[Tensor, Tensor | None]]) -> Run:
    """The padded loss on top of another library's log-probabilities [T], and its entropies where it has them."""
    (head,) = problem.heads
    mask_SL = torch.ones_like(problem.padded(head.targets), dtype=torch.bool)
    old_SL = problem.padded(problem.old_logp)

    def run() -> dict[str, Tensor]:
        logp_T, entropy_T = score(head)
        loss, metrics = padded_grpo_loss(
            problem.padded(logp_T),
            old_SL,
            problem.advantages,
            mask_SL,
            float(problem.shape.rows),
            entropy_SL=None if entropy_T is None else problem.padded(entropy_T.detach()),
        )
        return outcome(problem, loss) | metrics

    return run


def liger_scaled(problem: HeadProblem, fallback: bool) -> Run:
    """`LigerFusedLinearScaledCrossEntropyFunction`: log-probability and entropy. On an H100 or H200 it is written in
    CUTLASS's Python, which must be installed; the chunked PyTorch that it takes elsewhere is its `fallback`."""
    module = load("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    if fallback:
        apply = module._FusedLinearPPOFallbackFunction.apply
        return per_token(problem, lambda h: _minus_first(*apply(h.hidden, h.weight, h.targets, 1.0, -100, True)))
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return per_token(problem, lambda h: _minus_first(*apply(h.hidden, h.weight, h.targets, 1.0, return_entropy=True)))


def _minus_first(nll_T: Tensor, entropy_T: Tensor) -> tuple[Tensor, Tensor]:
    return -nll_T.float(), entropy_T


# Others ---------------------------------------------------------------------------------------------------------------


def cut_cross_entropy(problem: HeadProblem) -> Run:
    """ml-cross-entropy: log-probabilities without logits, which its backward computes again; no entropy."""
    if problem.shape.device == "cpu":
        raise Unavailable("needs a GPU")
    function = load("cut_cross_entropy").linear_cross_entropy
    return per_token(problem, lambda h: (-function(h.hidden, h.weight, h.targets, reduction="none").float(), None))


def quack(problem: HeadProblem) -> Run:
    """QuACK's chunked cross entropy: the gradient of the on-policy loss where every advantage is 1."""
    if problem.shape.device == "cpu":
        raise Unavailable("needs a GPU")
    function = load("quack.linear_cross_entropy").chunked_linear_cross_entropy
    (head,) = problem.heads

    def run() -> dict[str, Tensor]:
        grads = torch.autograd.grad(function(head.hidden, head.weight, head.targets), [head.hidden, head.weight])
        return dict(zip(("dhidden/text", "dweight/text"), grads, strict=True))

    return run


# PyTorch --------------------------------------------------------------------------------------------------------------


def linear_cross_entropy(head: Head, chunked: bool) -> Callable[[], dict[str, Tensor]]:
    """`torch.nn.functional.linear_cross_entropy`: the gradient of the on-policy loss where every advantage is 1."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def run() -> dict[str, Tensor]:
        loss = function(head.hidden, head.weight, head.targets, options=options)
        grads = torch.autograd.grad(loss, [head.hidden, head.weight])
        return dict(zip(("dhidden/text", "dweight/text"), grads, strict=True))

    return run


def outcome(problem: HeadProblem, loss: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients by name; taking gradients is part of every provider."""
    grads = torch.autograd.grad(loss, problem.leaves)
    return {"loss": loss.detach()} | dict(zip(problem.names, grads, strict=True))
