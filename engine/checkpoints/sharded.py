"""Checkpoints of a training that survive a crash at any moment: all of one is there under its name, or nothing is.

    checkpoints/
      step_000020/
        rank_0000.safetensors   this rank's tensors: optimizer, random states
        state.json              plain numbers and texts, the same for all ranks
        manifest.json           size and SHA-256 of both, and of itself
      latest                    the newest one's name, for people and scripts; nothing here depends on it

A save goes to a draft folder first: every file is written and fsynced, the manifest last, the draft fsynced, renamed
in one step, and the parent fsynced; only then does `latest` change, the same way, and only then are old ones removed.
Whatever is read was checked against its SHA-256 first.  A damaged checkpoint is passed over with a warning for the
newest whole one.  No file holds a pickle: reading one runs no code.

Every function that says "collective" must be called by all ranks; an error on one is then the same error on all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..processes.group import place
from .safetensors_stream import TensorInfo, header_of

Result = TypeVar("Result")
Warn = Callable[[str], None]
Group = dist.ProcessGroup | None

FORMAT = 2
"""Of what is written. In format 1 an optimizer's tensors have numbers, in 2 the names of parameters."""
READABLE = (1, FORMAT)
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
MAX_JSON_BYTES = 64 << 20
_NAME = re.compile(r"step_(\d{6,12})")
_DRAFT = ".draft-"
_BLOCK = 16 << 20
"""Bytes hashed and written at a time."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were all found as they were written."""

    folder: Path
    step: int
    world_size: int
    format: int

    def state(self) -> dict[str, Any]:
        """The plain part."""
        return _read_json(self.folder / STATE)

    def tensors(self, rank: int, prefix: str = "") -> dict[str, Tensor]:
        """What `rank` saved under names that begin with `prefix`, on the CPU, without the prefix."""
        with self.shard(rank) as shard:
            names = [name for name in shard.keys() if name.startswith(prefix)]  # noqa: SIM118  # not a dict
            return {name.removeprefix(prefix): shard.get_tensor(name) for name in names}

    @contextmanager
    def shard(self, rank: int) -> Iterator[Any]:
        """What `rank` saved, read when it is asked for: safetensors' own `keys`, `get_slice` and `get_tensor`."""
        try:
            with safe_open(self.folder / shard_name(rank), framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / shard_name(rank)}: not a complete safetensors file ({error})"
            ) from error


# Saving ---------------------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int | None = None,
    group: Group = None,
) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`. Collective.

    Args:
        root: folder of checkpoints, on a file system that all ranks share.
        step: the checkpoint's number, which `root` does not have yet.
        tensors: this rank's, of any dtype and device that safetensors know.
        state: JSON values; rank 0's is written.
        keep: None keeps all.
        group: of all ranks, with CPU collectives; a thread beside the training needs one of its own. None: torch's own.

    Raises:
        CheckpointError: on every rank, where any of them could not write; older checkpoints are as they were.
    """
    rank, _ = place()
    folder, draft = root / step_name(step), root / (_DRAFT + step_name(step))
    doing = f"saving {folder}"
    try:
        agreed(lambda: _begin(root, draft) if rank == 0 else None, doing, group)
        shards = everywhere(lambda: _write_tensors(draft / shard_name(rank), tensors), doing, group)
        files = {shard_name(other): entry for other, entry in enumerate(shards)}
        agreed(lambda: _finish(draft, folder, step, files, state) if rank == 0 else None, doing, group)
        agreed(lambda: _prune(root, keep) if rank == 0 else None, f"removing old checkpoints of {root}", group)
    except BaseException:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def _begin(root: Path, draft: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in ("step_*", LATEST):  # left by a run that was killed while saving
        for left in root.glob(_DRAFT + name):
            _remove(left)
    draft.mkdir()


def _finish(draft: Path, folder: Path, step: int, shards: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    text = json.dumps(state, allow_nan=False).encode()
    files = {**shards, STATE: _write(draft / STATE, [text])}
    manifest = {"format": FORMAT, "step": step, "world_size": len(shards), "files": files}
    _write(draft / MANIFEST, [json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode()])
    _sync_folder(draft)
    os.rename(draft, folder)  # refuses a checkpoint that is there already
    _sync_folder(folder.parent)
    beside = folder.parent / f"{_DRAFT}{LATEST}"
    _write(beside, [f"{folder.name}\n".encode()])
    os.replace(beside, folder.parent / LATEST)
    _sync_folder(folder.parent)


def _prune(root: Path, keep: int | None) -> None:
    for folder in [] if keep is None else folders(root)[keep:]:
        left = root / f"{_DRAFT}{folder.name}"
        os.rename(folder, left)  # half a checkpoint never has a checkpoint's name
        _remove(left)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, one tensor at a time on its way from its device."""
    # Larger elements first, as the format's own writer does: then every tensor starts at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = header_of((TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered), {})
    return _write(path, itertools.chain([header], (_bytes_of(tensor) for _, tensor in ordered)))


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Makes the file, on the disk when this returns; its manifest entry, hashed on the way, not read back."""
    digest, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            for start in range(0, len(piece), _BLOCK):
                block = memoryview(piece)[start : start + _BLOCK]
                digest.update(block)
                size += len(block)
                while block:
                    block = block[os.write(file, block) :]
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its folder is synced."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Syncs all that other code has written below `folder` to the disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


# Finding --------------------------------------------------------------------------------------------------------------


def newest(root: Path, warn: Warn) -> Checkpoint | None:
    """The newest checkpoint of `root` that is whole; None without one. Collective.

    `warn` is told of every newer one that is damaged, and of a `latest` that names none."""
    found = everywhere(lambda: _names(root, warn) if place()[0] == 0 else [], f"reading {root}")[0]
    for name in found:
        try:
            return verified(root / name)
        except CheckpointError as error:
            warn(f"{error}; looking for an older one")
    return None


def verified(folder: Path) -> Checkpoint:
    """The checkpoint, once all its files were found as they were written; the ranks share the reading. Collective.

    Raises:
        CheckpointError: damaged, incomplete, or no checkpoint at all.
    """
    return agreed(lambda: _verify(folder), f"reading {folder}")


def set_aside(root: Path, after: int) -> list[Path]:
    """Renames checkpoints newer than step `after` so that none is mistaken for the newest; returns their new names.

    They are damaged, or belong to steps that the run has left.  For one rank."""
    renamed = []
    for folder in folders(root):
        if int(folder.name.removeprefix("step_")) > after:
            number = next(n for n in itertools.count(1) if not (root / f"aside_{n}-{folder.name}").exists())
            renamed.append(folder.rename(root / f"aside_{number}-{folder.name}"))
    return renamed


def folders(root: Path) -> list[Path]:
    """Checkpoints by name, newest first, whole or not."""
    steps = {path: _NAME.fullmatch(path.name) for path in root.iterdir()} if root.is_dir() else {}
    return sorted((path for path, match in steps.items() if match), key=lambda path: -int(path.name[5:]))


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def shard_name(rank: int) -> str:
    return f"rank_{rank:04d}.safetensors"


def _names(root: Path, warn: Warn) -> list[str]:
    names = [folder.name for folder in folders(root)]
    pointer = root / LATEST
    if names or pointer.exists():
        text = pointer.read_bytes()[:100].decode("utf-8", "replace").strip() if pointer.is_file() else "nothing"
        if text not in names:
            warn(f"{pointer}: names {text or 'nothing'!r}, which is not there; taking the newest whole checkpoint")
    return names


def _verify(folder: Path) -> Checkpoint:
    manifest = _manifest(folder)
    rank, world_size = place()
    for name in sorted(manifest["files"])[rank::world_size]:
        _check_file(folder / name, manifest["files"][name])
    return Checkpoint(folder, manifest["step"], manifest["world_size"], manifest["format"])


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, complete and of the right shape."""
    manifest = _read_json(folder / MANIFEST)
    told = manifest.pop("sha256", None)
    if told != _digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: damaged: its SHA-256 is not what it says")
    if manifest.get("format") not in READABLE:
        raise CheckpointError(
            f"{folder}: expected format {FORMAT} or older, got {manifest.get('format')!r}; use its own version"
        )
    step, world_size, files = (manifest.get(name) for name in ("step", "world_size", "files"))
    if type(step) is not int or folder.name != step_name(step):
        raise CheckpointError(f"{folder}: expected the name of its step, {step!r}; give it back its name")
    if type(world_size) is not int or not 0 < world_size < 10_000 or not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST}: expected a number of ranks and files, got {world_size!r}")
    if set(files) != {STATE, *map(shard_name, range(world_size))}:
        raise CheckpointError(f"{folder / MANIFEST}: expected the files of {world_size} ranks, got {sorted(files)[:9]}")
    return manifest


def _check_file(path: Path, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: the manifest says nothing of it that can be checked")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise CheckpointError(f"{path}: damaged: expected {entry.get('bytes')} bytes, got {size}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
            raise CheckpointError(f"{path}: damaged: its SHA-256 is not the manifest's")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, got {path.stat().st_size}")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not readable ({type(error).__name__}); not a whole checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# Ranks ----------------------------------------------------------------------------------------------------------------


def agreed(action: Callable[[], Result], doing: str, group: Group = None) -> Result:
    """The result of `action`, once it succeeded on every rank of `group`. Collective.

    Raises:
        CheckpointError: on every rank, when the action failed on any of them, for whatever reason: a rank that left
            with an error of its own would keep the others waiting.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        expected = isinstance(error, OSError | CheckpointError)
        problem, cause = str(error) if expected else f"{type(error).__name__}: {error}", error
    failed = [(rank, text) for rank, text in enumerate(_gathered(problem, group)) if text is not None]
    if failed:
        told = (f"rank {rank}: {text}" if place()[1] > 1 else text for rank, text in failed)
        raise CheckpointError(f"{doing}: {'; '.join(told)}") from cause
    return cast(Result, result)


def everywhere(action: Callable[[], Result], doing: str, group: Group = None) -> list[Result]:
    """`agreed`, with every rank's result, which should be small, in order."""
    return _gathered(agreed(action, doing, group), group)


def _gathered(value: Any, group: Group) -> list[Any]:
    _, world_size = place()
    if world_size == 1:
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value, group=group)
    return values
