"""How TRL's trainer is made to ask: the five names of TRL that are replaced, and put back."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .requests import HeadCall, LossRequest, ScoreRequest, unfused_reason

SUPPORTED = "1.16."
LOSS_LEFT = "TRL's own formulas take the loss, from log-probabilities of linear_logp"


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
