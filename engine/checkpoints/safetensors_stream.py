"""Checkpoints larger than memory: safetensors read through a memory map and written piece by piece.

A file is eight bytes of header length, a JSON header (name -> dtype, shape, byte range) and the tensors' bytes without
gaps.  The sizes are known from dtypes and shapes, so the header goes out first and the data follows in any pieces.
Within the file, tensors with larger elements come first: every one then starts at a multiple of its element's size,
which a memory map needs.  Little-endian machines, as the format is.

Source: the format's description in the safetensors repository; index files as transformers' `save_pretrained` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..policies.kinds import SAFE, SAFE_INDEX

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 100_000_000
"""Readers refuse longer headers."""


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


class MappedCheckpoint:
    """A folder in transformers' format, opened through a memory map: nothing is read until a tensor is used.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.  Other weight files are never
            opened: a pickle can run code.

    Raises:
        CheckpointError: not such a folder, a damaged file, or an index that does not fit its shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_files(self.folder)
        self.tensors: dict[str, TensorInfo] = {}
        """In their order on disk."""
        self._opened: dict[str, Any] = {}
        for file, expected in self.files.items():
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:  # a name that no file could have
                raise CheckpointError(f"{file}: not a complete safetensors file ({error}); copy it again") from error
            names = opened.offset_keys()
            if expected is not None and set(names) != expected:
                odd = _some(set(names) ^ expected)
                raise CheckpointError(
                    f"{file}: its tensors are not those that {SAFE_INDEX} lists ({odd}); copy it again"
                )
            for name in names:
                self.tensors[name] = _info(name, opened.get_slice(name), file)
                self._opened[name] = opened

    def flat(self, name: str) -> Tensor:
        """[n]: the tensor's elements, in the file's own pages; do not write to it."""
        return self._opened[name].get_tensor(name).reshape(-1)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the names that the index says it holds, None without an index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder in transformers' format, got no folder")
    single, index = folder / SAFE, folder / SAFE_INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(f"{folder}: has both {SAFE} and {SAFE_INDEX}; remove the one that is out of date")
    if single.is_file():
        return {single: None}
    if index.is_file():
        return _shards(index)
    if (folder / "adapter_model.safetensors").is_file():
        remedy = "it holds an adapter alone; merge it into its base with peft's `merge_and_unload` and save that"
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        remedy = (
            "it holds pickled weights, which can run code and are not read; where you trust them, load them with "
            "transformers and write them again with save_pretrained"
        )
    else:
        remedy = "save the model with save_pretrained"
    raise CheckpointError(f"{folder}: expected {SAFE} or {SAFE_INDEX}, got neither; {remedy}")


def _shards(index: Path) -> dict[Path, set[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: expected JSON with a weight_map ({error}); copy it again") from error
    shards: dict[Path, set[str] | None] = {}
    for name, file in placed:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: expected names of safetensors files in its own folder, got {file!r}")
        names = shards.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    return shards


def _info(name: str, piece: Any, file: Path) -> TensorInfo:
    if piece.get_dtype() not in DTYPES:
        raise CheckpointError(f"{file}: {name} is {piece.get_dtype()}, expected one of {', '.join(DTYPES)}")
    return TensorInfo(name, DTYPES[piece.get_dtype()], tuple(piece.get_shape()))


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


class SafetensorsWriter:
    """Writes a checkpoint of any size with one piece of one tensor in memory; use it as a context manager.

        with SafetensorsWriter(folder, infos) as writer:
            for info in writer.tensors:      # their order on disk
                for piece in ...:
                    writer.write(info.name, piece)

    Files appear under their names when complete, the index last.  If the block raises, or ends before every tensor is
    whole, what was written is removed.

    Args:
        folder: existing folder, without the files that are to be written.
        tensors: names, dtypes and shapes.
        max_shard_bytes: a file grows beyond it only when a single tensor does; one file is `model.safetensors`.
        metadata: text for the header of every file; `format: pt`, which transformers wants, is added.
        hashed: `sha256` is worked out on the way.

    Raises:
        ValueError: a name that comes twice, a dtype that the format lacks, pieces that do not fit.
        FileExistsError: a file that would be overwritten.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Iterable[TensorInfo],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        hashed: bool = False,
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"SafetensorsWriter: expected max_shard_bytes of at least 1, got {max_shard_bytes}")
        self.folder = Path(folder)
        # sorted() is stable: among equal element sizes the caller's order stays.
        self.tensors = tuple(sorted(tensors, key=lambda info: -info.dtype.itemsize))
        names = [info.name for info in self.tensors]
        if len(set(names)) < len(names) or "__metadata__" in names:
            raise ValueError("SafetensorsWriter: expected names that differ from each other and from __metadata__")
        unknown = {str(info.dtype) for info in self.tensors if info.dtype not in NAMES}
        if unknown:
            raise ValueError(f"SafetensorsWriter: the format has no {_some(unknown)}; convert the tensors first")
        self._shards = _split(self.tensors, max_shard_bytes)
        self.files = _shard_names(len(self._shards))
        taken = [name for name in (*self.files, SAFE_INDEX) if (self.folder / name).exists()]
        if taken:
            raise FileExistsError(f"SafetensorsWriter: {self.folder} already has {_some(taken)}; choose another folder")
        self._headers = [header_of(shard, metadata or {}) for shard in self._shards]
        self._shard, self._tensor, self._elements = 0, 0, 0  # where the next element goes
        self.sha256: dict[str, str] = {}
        """File -> hash, of those that are whole; empty unless `hashed`."""
        self._hash = hashlib.sha256() if hashed else None
        self._file: BinaryIO | None = None
        self._made: list[Path] = []

    def write(self, name: str, piece: Tensor) -> None:
        """Appends the next elements of a tensor, any shape, in row-major order."""
        if self._file is None:
            raise RuntimeError("SafetensorsWriter: not open; use it as a context manager")
        self._skip_finished()
        shard = self._shards[self._shard]
        if piece.numel() == 0:
            return
        info = shard[self._tensor] if self._tensor < len(shard) else None
        if info is None or info.name != name or info.dtype != piece.dtype:
            wanted = "nothing more" if info is None else f"{info.name} in {info.dtype}"
            raise ValueError(f"SafetensorsWriter: expected {wanted}, got {name} in {piece.dtype}")
        if self._elements + piece.numel() > info.num_elements:
            raise ValueError(f"SafetensorsWriter: {name} has {info.num_elements} elements, got more")
        data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        if self._hash is not None:
            self._hash.update(data.data)
        self._elements += piece.numel()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as problem:
            kind = type(problem)
            raise
        finally:
            if kind is not None:
                if self._file is not None:
                    self._file.close()
                for path in self._made:
                    path.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._skip_finished()
        shard = self._shards[self._shard]
        if self._tensor < len(shard):
            info = shard[self._tensor]
            raise ValueError(
                f"SafetensorsWriter: ended at {self._elements} of {info.num_elements} elements of {info.name}"
            )
        self._close()
        if len(self.files) > 1:
            total = sum(info.num_bytes for info in self.tensors)
            placed = {info.name: file for file, shard in zip(self.files, self._shards, strict=True) for info in shard}
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            beside = self.folder / f"{SAFE_INDEX}.partial"
            self._made += [beside, self.folder / SAFE_INDEX]
            beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, self.folder / SAFE_INDEX)

    def _skip_finished(self) -> None:
        """Steps over tensors that are whole, empty ones too, and on to the next file."""
        while True:
            shard = self._shards[self._shard]
            while self._tensor < len(shard) and self._elements == shard[self._tensor].num_elements:
                self._tensor, self._elements = self._tensor + 1, 0
            if self._tensor < len(shard) or self._shard + 1 == len(self._shards):
                return
            self._close()
            self._shard, self._tensor = self._shard + 1, 0
            self._open()

    def _open(self) -> None:
        path = self._path().with_suffix(".partial")
        self._file = path.open("xb")
        self._made.append(path)
        self._file.write(self._headers[self._shard])
        if self._hash is not None:
            self._hash = hashlib.sha256(self._headers[self._shard])

    def _close(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())  # a rename may reach the disk before the data does
        self._file.close()
        self._made.append(self._path())
        os.replace(self._path().with_suffix(".partial"), self._path())
        if self._hash is not None:
            self.sha256[self._path().name] = self._hash.hexdigest()

    def _path(self) -> Path:
        return self.folder / self.files[self._shard]


def _split(tensors: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SAFE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def header_of(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What comes before the data of `tensors`, which follow in this order without gaps; see `SafetensorsWriter`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for info in tensors:
        end = start + info.num_bytes
        header[info.name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data, too, starts at a multiple of eight
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"SafetensorsWriter: expected a header of at most {MAX_HEADER_BYTES} bytes, got {len(text)}")
    return len(text).to_bytes(8, "little") + text
