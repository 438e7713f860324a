"""LoRA on a policy's decoder, through peft: its layers, its files, and plain weights where somebody needs them.

    y = x W^T + (alpha / r) (x A^T) B^T        W stays, A and B are trained

Adapters sit in the modules that `Policy.trunk` runs, so rollouts, packing and losses need to know nothing of them. What
does need plain weights takes one of three views of the same policy:

    adapter_disabled   the base, for as long as the context lasts: the reference of a KL term, under any ZeRO stage
    base_of            the base as a policy of its own that shares the frozen weights: references and judges at no cost
    merged             W + (alpha / r) B A: what `Policy.save` writes, so that a checkpoint is transformers' own

Source: LoRA (arXiv 2106.09685); peft's file format.

Dims: K inputs, N outputs, r rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import syncr1.engine.compat  # noqa: F401  (before transformers and peft: see there)

import torch
from torch import Tensor, nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import Policy

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of names in peft's files."""
ADAPTER = ".default"
"""peft's name of the only adapter, which its files leave out."""


def add_lora(
    policy: Policy,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    *,
    train_heads: bool = False,
    seed: int = 0,
) -> None:
    """Adds adapters to linear layers of the decoder, in place; they change nothing until they are trained (B = 0).

    Everything else is frozen, so an optimizer made of `requires_grad` parameters holds adapters alone.

    Args:
        policy: before it is handed to `Learner`.
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
        dropout: 0; see below.
        target_modules: last parts of names, e.g. ("q_proj", "v_proj"); None: every nn.Linear of the decoder.
        train_heads: what was trainable outside of the decoder (heads, generation embeddings) stays so.
        seed: of A, so that all ranks start alike.

    Raises:
        ValueError: a bad rank, dropout, or a policy that has adapters.
        ConfigError: the decoder has no layers of such names.
    """
    if dropout:
        raise ValueError(
            f"add_lora: expected dropout 0, got {dropout}: the sampler runs without it, so the trainer's "
            "log-probabilities would be another network's and every ratio random; use beta or a smaller rank instead"
        )
    if rank < 1:
        raise ValueError(f"add_lora: expected rank >= 1, got {rank}; without LoRA do not call it")
    from peft import LoraConfig, inject_adapter_in_model

    if has_lora(policy):
        raise ValueError("lora: the policy has adapters already; start from the base")
    container, prefix = _container(policy)
    known = {name.rpartition(".")[2] for name, m in policy.decoder().named_modules() if type(m) is nn.Linear}
    chosen = sorted(known if target_modules is None else set(target_modules))
    if not chosen or set(chosen) - known:
        raise ConfigError(
            f"lora_target_modules: expected some of {', '.join(sorted(known))}, got {', '.join(chosen) or 'none'}; "
            "take ends of the decoder's linear layers, or leave it out for all"
        )
    places = rf"{re.escape(prefix)}(.*\.)?({'|'.join(map(re.escape, chosen))})"
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=0.0, target_modules=places)
    config.base_model_name_or_path = getattr(container, "name_or_path", None) or None
    heads = _heads(policy)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(config, container)
    policy.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name or (train_heads and id(parameter) in heads))


def _heads(policy: Policy) -> set[int]:
    """Ids of what is trained outside of the decoder; a head that is tied to its embeddings lies inside."""
    inside = {id(parameter) for parameter in policy.decoder().parameters()}
    return {id(p) for p in policy.parameters() if p.requires_grad and id(p) not in inside}


def _container(policy: Policy) -> tuple[nn.Module, str]:
    """transformers' model that holds the decoder, and the decoder's name in it with a dot: what peft would be given."""
    for child in policy.children():
        for name, module in child.named_modules():
            if module is policy.decoder():
                return child, f"{name}." if name else ""
    raise ValueError(f"lora: expected {type(policy).__name__} to hold its decoder in a module of its own")


def is_lora(module: Any) -> bool:
    """A linear layer with adapters, of the plain kind."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def has_lora(policy: Policy) -> bool:
    """Whether `add_lora` was called."""
    return any(is_lora(module) for module in policy.modules())


# Views ----------------------------------------------------------------------------------------------------------------


def delta(layer: Any) -> Tensor:
    """[N, K] float32: (alpha / r) B A."""
    (name,) = layer.lora_A
    a, b = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
    return cast(Tensor, layer.scaling[name] * (b @ a))


def _base(layer: Any) -> nn.Module:
    return cast(nn.Module, layer.base_layer)


def _merged(layer: Any) -> nn.Module:
    base = layer.base_layer
    plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    whole = base.weight.detach().float() + delta(layer)
    plain.weight, plain.bias = nn.Parameter(whole.to(base.weight.dtype), requires_grad=False), base.bias
    return plain.train(layer.training)


def _replace(policy: Policy, make: Callable[[Any], nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Puts `make(layer)` in the place of every layer with adapters; (parent, name, layer) of each."""
    places = [(parent, name, child) for parent in policy.modules() for name, child in parent.named_children()]
    replaced = [place for place in places if is_lora(place[2])]
    for parent, name, layer in replaced:
        setattr(parent, name, make(layer))
    return replaced


@contextmanager
def _viewed(policy: Policy, make: Callable[[Any], nn.Module]) -> Iterator[Policy]:
    replaced = _replace(policy, make)
    try:
        yield policy
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


@contextmanager
def adapter_disabled(policy: Policy) -> Iterator[Policy]:
    """The base inside, without a copy; heads that are trained stay as trained. A policy without adapters stays as is.

    It changes the policy for all threads: what runs beside training or sampling wants `base_of`.
    """
    with _viewed(policy, _base):
        yield policy


@contextmanager
def merged(policy: Policy) -> Iterator[Policy]:
    """Plain linear layers inside, with adapters added to their weights: for `policy.save`, and for fast inference.

    Takes as much memory as the decoder's weights. The base is put back as it was: subtracting what was added would not
    give it back. Under ZeRO-3 weights must be whole, see `Learner.sampling`.
    """
    with _viewed(policy, _merged):
        yield policy


def base_of(policy: Policy) -> Policy:
    """A frozen policy without the adapters that shares every frozen weight with this one, and copies trained heads.

    For references and judges; it does not follow the training, and each may run in its own thread. Call it before the
    policy is handed to `Learner`; ZeRO-3 splits shared weights, there `Policy.frozen_copy` or `adapter_disabled` serve.
    """
    with adapter_disabled(policy):
        shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
        return copy.deepcopy(policy, cast(dict[int, Any], shared)).requires_grad_(False).eval()


# Files ----------------------------------------------------------------------------------------------------------------


def save_adapter(policy: Policy, folder: Path) -> None:
    """Writes peft's `adapter_config.json` and `adapter_model.safetensors`; trained heads are in it.

    `PeftModel.from_pretrained(base, folder)` loads it onto transformers' model.

    Raises:
        ValueError: there are no adapters.
    """
    from safetensors.torch import save_file

    if not has_lora(policy):
        raise ValueError("save_adapter: expected a policy with adapters; Policy.save writes one without")
    container, _ = _container(policy)
    trained = {name: p for name, p in container.named_parameters() if ".lora_" in name or p.requires_grad}
    heads = {name.rpartition(".")[0] for name in trained if ".lora_" not in name}
    config = copy.deepcopy(cast(Any, container).peft_config["default"])
    config.modules_to_save, config.inference_mode = sorted(heads) or None, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    state = {PREFIX + _in_file(name): p.detach().cpu().contiguous() for name, p in trained.items()}
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})


def _in_file(name: str) -> str:
    """peft's name of a parameter in files, but for the prefix."""
    return name.replace(f"{ADAPTER}.weight", ".weight") if ".lora_" in name else name
