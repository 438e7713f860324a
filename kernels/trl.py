"""TRL's GRPOTrainer on these kernels: `patch_grpo_trainer()`, then train as before.

A step of TRL 1.16, outermost first, and what becomes of each layer:

    GRPOTrainer._compute_loss                         formulas and metrics on [B, C]        runs; its loss is swapped
    GRPOTrainer._get_per_token_logps_and_entropies    calls the model                       runs
    model.forward (from `add_fused_lm_head`)          backbone, picks completion tokens     runs
    ChunkedLogProbFunction.apply                      hidden states and head -> logp        replaced

The replaced layer is all that touches the vocabulary. It answers one of two requests: `LossRequest` has
`linear_grpo_loss` compute log-probabilities, loss and gradients in one sweep (three matrix products), `ScoreRequest`
has `linear_logp` compute differentiable log-probabilities and entropies, from which TRL's formulas take the loss.
Because TRL's formulas run either way, every metric is TRL's own, under its own name.

The loss leaves the model in the `loss` field of its output, so that autograd hooks of DDP and FSDP see it.

Dims: `B` sequences, `C` completion length, `N` completion tokens (packed), `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .api import TokenStream, linear_grpo_loss, linear_logp
from .options import LOSS_TYPES

__all__ = ["patch_grpo_trainer", "Patch"]

SUPPORTED = "1.16."
DIVIDED_BY_ITEMS = ("cispo", "dapo", "vespo")
"""Loss types that TRL divides by the tokens of the whole generation batch."""
LOSS_LEFT = "TRL's own formulas take the loss, from log-probabilities of linear_logp"
HEAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class HeadCall:
    """The arguments of `ChunkedLogProbFunction.apply`, in its order."""

    hidden: Tensor
    """[N, D]."""
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    targets: Tensor
    """[N] int64."""
    temperature: float
    chunk_size: int
    final_logit_softcapping: float | None
    logit_scale: float
    outputs: tuple[str, ...]

    def unserved_reason(self) -> str | None:
        """Why TRL's own head has to answer this call; None where ours can."""
        if self.final_logit_softcapping is not None:
            return "the model caps its logits (final_logit_softcapping)"
        if self.logit_scale != 1.0:
            return f"the model multiplies its logits by {self.logit_scale} (logit_scale)"
        if not {"log_probs", "entropy"}.issuperset(self.outputs):
            return f"the head was asked for {', '.join(self.outputs)}, not just log_probs and entropy"
        if self.weight.dtype not in HEAD_DTYPES:
            return f"the head's weight is {self.weight.dtype} (quantized)"
        if hasattr(self.weight, "ds_id"):
            return "DeepSpeed ZeRO-3 partitions the head"
        return None

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the products run in: as in TRL, the autocast dtype or that of the hidden states."""
        device = self.hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.hidden.dtype

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias in `compute_dtype`."""
        dtype = self.compute_dtype
        return self.hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class ScoreRequest:
    """Differentiable log-probabilities and entropies; TRL's formulas do the rest."""

    op = "linear_logp"
    loss: Tensor | None = None
    """What the model's output shall carry as its loss."""
    left_to_trl: str | None = None
    """Why TRL's formulas take a loss that was asked for here."""

    def serve(self, call: HeadCall) -> tuple[Tensor, Tensor]:
        """(logp, entropy), [N] each."""
        hidden, weight, bias = call.operands()
        return linear_logp(hidden, weight, call.targets, bias=bias, temperature=call.temperature)


class LossRequest(ScoreRequest):
    """The loss of one `_compute_loss`: all of it but hidden states and head, with the completion tokens packed."""

    def __init__(self, trainer: Any, inputs: Mapping[str, Any]) -> None:
        completion_BC = inputs["completion_mask"].bool()
        index_N = completion_BC.flatten().nonzero().squeeze(1)
        loss_mask_BC = completion_BC & inputs["tool_mask"].bool() if "tool_mask" in inputs else completion_BC

        def packed(values_BC: Tensor | None) -> Tensor | None:
            return None if values_BC is None else values_BC.flatten()[index_N]

        lengths = completion_BC.sum(dim=1)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.loss_mask_N: Tensor = loss_mask_BC.flatten()[index_N]
        self.advantages_B = inputs["advantages"]
        self.old_logp_N = packed(inputs.get("old_per_token_logps"))
        self.ref_logp_N = packed(inputs["ref_per_token_logps"]) if trainer.beta != 0.0 else None
        ratio = sampler_ratio(trainer, inputs)
        self.is_ratio = packed(ratio) if ratio is not None and ratio.shape == completion_BC.shape else ratio
        self.options = loss_options(trainer, inputs)
        self.loss_scale = loss_scale(trainer)

    def serve(self, call: HeadCall) -> tuple[Tensor, Tensor]:
        """(logp, entropy), [N] each and without gradient; sets `loss`.

        Falls back to scores, and with them to TRL's loss, where the gradients that the fused op forms in forward would
        escape fp16's loss scaling, or where DataParallel handed this replica a part of the batch.
        """
        num_tokens = self.loss_mask_N.shape[0]
        if call.compute_dtype == torch.float16:
            self.left_to_trl = "fp16: gradients formed in the forward would escape its loss scaling"
        elif call.targets.shape[0] != num_tokens:
            self.left_to_trl = "DataParallel: a replica has a part of the batch alone"
        if self.left_to_trl is not None:
            return super().serve(call)
        hidden, weight, bias = call.operands()
        rows = torch.arange(num_tokens, device=hidden.device)
        groups = torch.tensor([0, self.advantages_B.shape[0]], device=hidden.device)
        output = linear_grpo_loss(
            [TokenStream(hidden, weight, call.targets, rows, bias, call.temperature)], None, self.cu_seqlens, groups,
            advantages=self.advantages_B, old_logp=self.old_logp_N, loss_mask=self.loss_mask_N,
            ref_logp=self.ref_logp_N, is_ratio=self.is_ratio, **self.options,
        )  # fmt: skip
        assert output.entropy is not None
        self.loss, self.op = output.loss * self.loss_scale, "linear_grpo_loss"
        # TRL multiplies masked tokens by 0: their ratio has to be finite, and 1 is.
        unscored = 0.0 if self.old_logp_N is None else self.old_logp_N
        return torch.where(self.loss_mask_N, output.logp, unscored), output.entropy


def loss_options(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's settings as options of `linear_grpo_loss`; both use the same names and meanings."""
    args = trainer.args
    options = {
        "loss_type": trainer.loss_type,
        "ratio": trainer.importance_sampling_level,
        "clip_low": trainer.epsilon_low,
        "clip_high": trainer.epsilon_high,
        "delta": args.delta,
        "beta": trainer.beta,
        "bias_corrected_kl": args.use_bias_correction_kl,
        "max_length": trainer.max_completion_length,
        "score_all": True,  # TRL's entropy and clip ratios cover tokens of advantage 0, too
    }
    names = ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
             "vespo_lambda_neg")  # fmt: skip
    options |= {name: getattr(args, name) for name in names}
    if trainer.loss_type in DIVIDED_BY_ITEMS:
        options["num_items"] = inputs["num_items_in_batch"].clamp(min=1)
    return options


def loss_scale(trainer: Any) -> float:
    """What TRL multiplies the reduced loss by: the share of a generation batch, or of an accumulation window."""
    training = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type not in DIVIDED_BY_ITEMS:
        return 1.0 / accumulation
    batches = trainer.args.steps_per_generation if training else 1
    return float(trainer.accelerator.num_processes * batches / accumulation)


def sampler_ratio(trainer: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """[B, C] or [B, 1] old policy / vLLM's policy, under TRL's conditions: vespo takes it wherever it is."""
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    ratio: Tensor | None = inputs.get("importance_sampling_ratio")
    return ratio if corrects or trainer.loss_type == "vespo" else None


def unfused_reason(trainer: Any, inputs: Mapping[str, Any]) -> str | None:
    """What in the settings needs more than the fused op gives; TRL's formulas then run on `linear_logp`."""
    reasons = {
        "the entropy bonus (entropy_coef) needs the gradient of the entropy": trainer._entropy_bonus_enabled,
        "top_entropy_quantile is taken over all ranks": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold depends on the log-probabilities": trainer.off_policy_mask_threshold is not None,
        "the router's auxiliary loss (router_aux_loss_coef) is added": trainer.aux_loss_enabled,
        "advantages are given per token": inputs["advantages"].dim() != 1,
        f"loss_type={trainer.loss_type!r} is not one of ours": trainer.loss_type not in LOSS_TYPES,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def has_own_loss(trainer_class: type) -> bool:
    """A subclass of GRPOTrainer (GMPO, …) that computes its loss without `GRPOTrainer._compute_loss`."""
    base: Any = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    return any(getattr(trainer_class, name) is not getattr(base, name) for name in ("compute_loss", "_compute_loss"))


class ServedModel:
    """A model whose head answers `request` while it is called; anything else is the model's own."""

    def __init__(self, model: Any, patch: Patch, request: ScoreRequest) -> None:
        self.model, self.patch, self.request = model, patch, request
        self.loss: Tensor | None = None
        """The fused loss as the model's wrappers handed it out; None where the head gave scores alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.patch.serving(self.request):
            outputs = self.model(*args, **kwargs)
        if self.request.loss is not None:
            self.loss = outputs.loss
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Patch:
    """The one patch of this process; call it, or leave its `with` block, to undo it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Calls of the head by who answered: `linear_grpo_loss`, `linear_logp` or `trl`."""
        self.request: ScoreRequest | None = None
        """What the head shall answer; None outside of GRPOTrainer's calls, where everything is TRL's.

        A plain attribute: `torch.compile` guards on it in other trainers, where a ContextVar would break the graph.
        """
        self._reasons: set[str] = set()
        trainer: Any = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
        utils: Any = importlib.import_module("trl.trainer.utils")
        # add_fused_lm_head's forward looks the three names of `utils` up on each call.
        self._originals = [
            (owner, name, getattr(owner, name))
            for owner, name in (
                (trainer, "_compute_loss"),
                (trainer, "_get_per_token_logps_and_entropies"),
                (utils, "_ChunkedLogProbFunction"),
                (utils, "FusedCausalLMOutput"),
                (utils, "_use_triton"),
            )
        ]
        compute_loss, per_token_logps, head, output, compacts = (original for *_, original in self._originals)
        replacements: list[Any] = [
            functools.wraps(compute_loss)(self._compute_loss_of(compute_loss)),
            functools.wraps(per_token_logps)(self._per_token_logps_of(per_token_logps)),
            ServedHead(self, head),
            self._output_of(output),
            self._compacts_of(compacts),
        ]
        for (owner, name, _), replacement in zip(self._originals, replacements, strict=True):
            setattr(owner, name, replacement)

    def __call__(self) -> None:
        """Restores TRL; a second time does nothing."""
        global _patch
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals = []
        if _patch is self:
            _patch = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self()

    @contextmanager
    def serving(self, request: ScoreRequest) -> Iterator[None]:
        """The head answers `request`."""
        before, self.request = self.request, request
        try:
            yield
        finally:
            self.request = before

    def leave_to_trl(self, reason: str, what: str = "TRL's own code computes it") -> None:
        """Warns once per reason."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            warnings.warn(f"patch_grpo_trainer: {reason}; {what}", stacklevel=3)

    def _compute_loss_of(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """TRL's method, with the fused loss handed back in place of its own where there is one.

        TRL's formulas then run on detached log-probabilities, for the metrics: [B, C] values, nothing beside [N, V].
        """

        def _compute_loss(trainer: Any, model: Any, inputs: Mapping[str, Any]) -> Tensor:
            if trainer.args.torch_compile:
                return original(trainer, model, inputs)  # whose scores say so
            reason = unfused_reason(trainer, inputs)
            if reason is not None:
                self.leave_to_trl(reason, LOSS_LEFT)
                return original(trainer, model, inputs)
            served = ServedModel(model, self, LossRequest(trainer, inputs))
            loss = original(trainer, served, inputs)
            return loss if served.loss is None else served.loss

        return _compute_loss

    def _per_token_logps_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """TRL's method, with a model whose head scores: so do old policy and reference."""

        def _get_per_token_logps_and_entropies(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.args.torch_compile:
                self.leave_to_trl("the model is compiled (torch_compile=True)")
            elif has_own_loss(type(trainer)):
                self.leave_to_trl(f"{type(trainer).__name__} has a loss of its own", LOSS_LEFT)
            if not trainer.args.torch_compile and not isinstance(model, ServedModel):
                model = ServedModel(model, self, ScoreRequest())
            return original(trainer, model, *args, **kwargs)

        return _get_per_token_logps_and_entropies

    def _output_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """TRL's output record, with the fused loss as its loss: `GRPOTrainer` does not read the one it replaces."""

        def fused_output(**fields: Any) -> Any:
            if self.request is not None and self.request.loss is not None:
                fields["loss"] = self.request.loss
            return original(**fields)

        return fused_output

    def _compacts_of(self, original: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
        """Whether the forward hands the head completion tokens alone, as TRL does on a GPU: ours always wants that."""
        return lambda device: self.request is not None or original(device)


class ServedHead:
    """Stands in for `ChunkedLogProbFunction`: answers the request, or hands the call on to TRL."""

    def __init__(self, patch: Patch, original: Any) -> None:
        self.patch = patch
        self.trl_apply: Callable[..., tuple[Tensor | None, ...]] = original.apply

    def apply(self, *args: Any) -> tuple[Tensor | None, ...]:
        """(logp, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each; None for what `outputs` leaves out."""
        request = self.patch.request
        if request is None:
            return self.trl_apply(*args)
        call = HeadCall(*args)
        reason = call.unserved_reason()
        if reason is not None:
            self.patch.leave_to_trl(reason)
            self.patch.counts["trl"] += 1
            return self.trl_apply(*args)
        logp_N, entropy_N = request.serve(call)
        if request.left_to_trl is not None:
            self.patch.leave_to_trl(request.left_to_trl, LOSS_LEFT)
        self.patch.counts[request.op] += 1
        return logp_N, entropy_N if "entropy" in call.outputs else None, None, None, None


_patch: Patch | None = None


def patch_grpo_trainer() -> Patch:
    """Runs head and loss of TRL's `GRPOTrainer` on these kernels; the trainer's code and settings stay as they are.

    Losses, gradients and logged metrics are TRL's up to rounding; log-ratios are clamped at ±20. Trainers that exist
    already are served as well. Where a model's head cannot be served (capped or scaled logits, quantized, ZeRO-3,
    torch_compile), TRL's own code computes it; where a feature needs more than the fused loss gives (entropy bonus and
    quantile, off-policy mask, auxiliary losses, advantages per token, a trainer with a loss of its own), TRL's formulas
    run on our log-probabilities. A warning names the reason, once.

    Returns:
        The patch: `patch()` or the end of `with patch_grpo_trainer():` undoes it, `patch.counts` says which op answered
        how often. While one is in place, calling again returns the same.

    Raises:
        ImportError: TRL is absent or not of version 1.16.
    """
    global _patch
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith(SUPPORTED):
        raise ImportError(f"patch_grpo_trainer: trl must be {SUPPORTED}x, got {version}; pip install 'trl>=1.16,<1.17'")
    if _patch is None:
        _patch = Patch()
    return _patch
