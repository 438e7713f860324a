"""Where the tensors of Chameleon's VQGAN are, and how they are read: among a checkpoint's own, or in a file beside it.

transformers' Chameleon keeps the half that turns images into codes, and Liquid's checkpoint none of it. What is looked
for, in this order:

1. the checkpoint's safetensors: what a policy here has saved, and Anole as it was converted with its decoder
2. `vqgan.safetensors`, `vqgan.ckpt`, `tokenizer/vqgan.ckpt` (the published release), `chameleon/vqgan.ckpt` (Liquid's)

A `.ckpt` is read as tensors alone (`weights_only`): no code of it is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..errors import ConfigError, one_line
from ..reasons import reading
from .kinds import SAFE, SAFE_INDEX

BESIDE = ("vqgan.safetensors", "vqgan.ckpt", "tokenizer/vqgan.ckpt", "chameleon/vqgan.ckpt")
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
"""Of a published file, which may hold its discriminator, too."""
ADVICE = (
    "copy Chameleon's vqgan.ckpt (in tokenizer/ of facebook's release and of GAIR/Anole-7b-v0.1, in chameleon/ of "
    "Liquid's demo) or its tensors as vqgan.safetensors beside the weights"
)

Tensors = dict[str, Tensor]


def own_tensors(name: str | Path, prefix: str, *, shapes_alone: bool = False) -> Tensors | None:
    """A checkpoint's tensors whose names begin with `prefix`, without it; empty where it has none.

    Args:
        name: folder, or name on the hub.
        prefix: with its dot.
        shapes_alone: on the device `meta`; nothing is fetched for that.

    Returns:
        None where its weights are not at hand.

    Raises:
        ConfigError: an index that names no shards.
    """
    index = _file(name, SAFE_INDEX, fetch=not shapes_alone)
    shards = [SAFE] if index is None else _shards(index, prefix)
    paths = [_file(name, shard, fetch=not shapes_alone) for shard in shards]
    found: Tensors = {}
    for path in paths:
        if path is None:
            return None
        found |= _safetensors(path, lambda key: key.startswith(prefix), shapes_alone)
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def _shards(index: Path, prefix: str) -> list[str]:
    """The files that hold tensors whose names begin with `prefix`, by an index of shards."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].items()
        return sorted({str(shard) for key, shard in files if key.startswith(prefix)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"model: expected JSON with a weight_map, got {index} ({type(error).__name__}: {one_line(error)}); "
            "download it again"
        ) from error


def published_tensors(name: str | Path, *, shapes_alone: bool = False) -> tuple[Tensors, Path] | None:
    """A VQGAN's tensors in a file beside a checkpoint, and which file that is; None where there is none.

    Raises:
        ConfigError: it cannot be read, or holds more than tensors.
    """
    for place in BESIDE:
        path = _file(name, place, fetch=True)
        if path is None:
            continue
        with reading("model", path):
            if path.suffix == ".safetensors":
                return _safetensors(path, lambda key: key.startswith(PARTS), shapes_alone), path
            held = _pickled(path, shapes_alone)
        return {key: tensor for key, tensor in held.items() if key.startswith(PARTS)}, path
    return None


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """A module's parameters from tensors of its own names, in its dtype; those of other names are left.

    Raises:
        ConfigError: one is missing, or has another shape.
    """
    wanted = module.state_dict()
    for key, own in wanted.items():
        got = tensors.get(key)
        if got is None or got.shape != own.shape:
            has = "none" if got is None else f"one of {list(got.shape)}"
            raise ConfigError(
                f"model: {where}: expected a VQGAN's {key} of shape {list(own.shape)}, as the configuration has it, "
                f"got {has}; take the file of this very model"
            )
    if not any(tensor.is_meta for tensor in wanted.values()):
        module.load_state_dict({key: tensors[key] for key in wanted})


def _file(name: str | Path, file: str, *, fetch: bool) -> Path | None:
    folder, _, last = file.rpartition("/")
    found = cached_file(
        str(name),
        last,
        subfolder=folder,
        local_files_only=not fetch,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def _safetensors(path: Path, wanted: Callable[[str], bool], shapes_alone: bool) -> Tensors:
    with safe_open(path, "pt") as file:
        return dict(_read(file, wanted, shapes_alone))


def _read(file: Any, wanted: Callable[[str], bool], shapes_alone: bool) -> Iterator[tuple[str, Tensor]]:
    for key in filter(wanted, file.keys()):
        shape = torch.Size(file.get_slice(key).get_shape())
        yield key, torch.empty(shape, device="meta") if shapes_alone else file.get_tensor(key)


def _pickled(path: Path, shapes_alone: bool) -> Tensors:
    try:
        held = torch.load(path, map_location="meta" if shapes_alone else "cpu", weights_only=True)
    except Exception as error:  # pickle's, which is not imported anywhere here
        if type(error).__name__ != "UnpicklingError" or "GLOBAL" not in str(error):
            raise
        raise ConfigError(
            f"model: {path}: expected tensors alone, got a file whose loading would run code; where you trust it, "
            "write its state_dict anew: python -c \"import torch; torch.save({'state_dict': torch.load('vqgan.ckpt', "
            "weights_only=False)['state_dict']}, 'vqgan.ckpt')\""
        ) from error
    tensors = held.get("state_dict", held) if isinstance(held, dict) else {}
    return {str(key): tensor for key, tensor in tensors.items() if isinstance(tensor, Tensor)}
