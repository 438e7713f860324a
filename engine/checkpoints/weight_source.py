"""The tensors of a checkpoint, a few megabytes at a time: safetensors, or pickles that hold tensors alone.

Both are read through a memory map, whose pages count as this process's memory once they are touched; after `HELD` bytes
the files are opened anew, which gives them back. Pickles are read by `torch.load(weights_only=True)`, which builds
tensors and plain containers and calls nothing else: a file that asks for more is refused, by the name of what it asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, one_line
from .deepseek_files import PICKLED, PICKLED_INDEX
from .safetensors_stream import MappedCheckpoint, TensorInfo

HELD = 1 << 28
"""Bytes that are read before the files are opened anew."""
_CALLED = re.compile(r"(?:GLOBAL|global:?|class|function)\s+`?([A-Za-z_][\w.]*\.\w+)`?")


class Weights(Protocol):
    """Tensors by name, and the files that hold them."""

    tensors: dict[str, TensorInfo]
    files: list[Path]

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start]: a copy of elements of a tensor, in row-major order."""


def weights_in(folder: Path) -> Weights:
    """The weights of a folder: safetensors where there are any, else pickles.

    Raises:
        CheckpointError: there are none, a shard is missing or damaged, or a pickle holds more than tensors.
    """
    pickled = (folder / PICKLED_INDEX).is_file() or (folder / PICKLED).is_file()
    if pickled and not any(folder.glob("model*.safetensors")):
        return PickledWeights(folder)
    return MappedWeights(folder)


class MappedWeights:
    """Of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._read = folder, 0
        self._opened = MappedCheckpoint(folder)
        self.tensors, self.files = self._opened.tensors, list(self._opened.files)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        if self._read > HELD:
            self._opened, self._read = MappedCheckpoint(self._folder), 0
        self._read += (stop - start) * self.tensors[name].dtype.itemsize
        return self._opened.flat(name)[start:stop].clone()


class PickledWeights:
    """Of `pytorch_model*.bin` files, one of which is open at a time."""

    def __init__(self, folder: Path) -> None:
        self._home: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.files = _pickled_files(folder)
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        self._read = 0
        for file in self.files:
            for name, tensor in load_pickled(file).items():
                if name in self._home:
                    raise CheckpointError(f"{file}: {name} is in {self._home[name].name}, too; download both again")
                self._home[name] = file
                self.tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        file = self._home[name]
        if self._open is None or self._open[0] != file or self._read > HELD:
            self._open = None  # its pages are given back before others are taken
            self._open, self._read = (file, load_pickled(file)), 0
        self._read += (stop - start) * self.tensors[name].dtype.itemsize
        return self._open[1][name].reshape(-1)[start:stop].clone()


def _pickled_files(folder: Path) -> list[Path]:
    """Of a folder, or the one file that is named itself."""
    if folder.is_file():
        return [folder]
    index = folder / PICKLED_INDEX
    if not index.is_file():
        return [folder / PICKLED]
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: expected JSON with a weight_map ({error}); download it again") from error
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".bin"):
            raise CheckpointError(
                f"{index}: expected names of .bin files in its own folder, got {name!r}; do not use it"
            )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: expected {len(names)} shards, got {len(names) - len(absent)} ({absent[0]} is missing); "
            "download the rest"
        )
    return [folder / name for name in names]


def load_pickled(file: Path) -> dict[str, Tensor]:
    """Tensors by name, their numbers in the file's own pages where its form allows that.

    Raises:
        CheckpointError: a damaged file, or one that holds anything but tensors by name.
    """
    try:
        try:
            held: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            held = torch.load(file, map_location="cpu", weights_only=True)  # of torch before 1.6: whole in memory
    except MemoryError:
        raise
    except Exception as error:  # of a stranger's file, through an unpickler: anything
        raise CheckpointError(f"{file}: {_why(error)}") from error
    if not isinstance(held, Mapping) or not held:
        raise CheckpointError(f"{file}: expected tensors by name, got {type(held).__name__}; take the publisher's file")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: expected tensors by name, got {type(tensor).__name__} under {str(name)[:80]!r}; if it is a "
                "training's state, save its model alone"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{file}: expected plain numbers, got {name} {tensor.layout}; take another form of it"
            )
    return dict(held)


def _why(error: Exception) -> str:
    words = str(error)
    if "weights_only" in words or type(error).__name__ == "UnpicklingError":
        called = _CALLED.search(words)
        what = f"a pickle that would call {called[1]}" if called else "a pickle of something else"
        return f"expected tensors alone, got {what}; nothing of it was run: do not use it, take the publisher's file"
    return (
        f"expected a whole file of torch.save, got one that cannot be read ({one_line(error)[:200]}); download it again"
    )
