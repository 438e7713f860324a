"""Janus from DeepSeek's layout, Show-o from showlab's, into transformers' and back, on disk, in a few megabytes.

Every tensor arrives bit for bit (`deepseek_janus.py` and `show_o_plans.py` say where). What transformers' Janus has no
place for is kept in
`deepseek/` beside the result, with DeepSeek's own settings files, so that the way back gives them again; of a
checkpoint that was trained meanwhile they come from `base`, or, where there is none, are written as zeros, since
DeepSeek's code wants them there and reads none.

`conversion.json` names every file that went in and came out, with its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..errors import CheckpointError
from ..policies.kinds import SAFE
from ..whole_files import whole_folder
from .convert_plans import Part, Plan, into_deepseek, into_transformers
from .deepseek_config import OURS, THEIRS, refusal
from .deepseek_files import FORMAT, RECORD
from .safetensors_stream import MAX_SHARD_BYTES, SafetensorsWriter, TensorInfo
from .show_o_files import OURS as SHOW_O
from .show_o_files import is_show_o
from .show_o_plans import into_show_o, into_showlab

Direction = Literal["transformers", "deepseek", "showlab"]
PIECE = 1 << 22
"""Elements at a time."""
WORTH_TELLING = 1 << 30
"""Bytes from which on it is told how far a conversion is."""
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did; `conversion.json` in its folder holds the same."""

    format: int
    to: Direction
    source: str
    """Folder or hub name."""
    read: dict[str, str]
    """File -> SHA-256."""
    written: dict[str, tuple[int, str]]
    """Weight file -> bytes and SHA-256."""
    num_tensors: int
    num_bytes: int
    kept: tuple[str, ...]
    """Tensors that stand in a file beside: those without a counterpart, and Show-o's image tokenizer in its layout."""
    zeros: tuple[str, ...]
    """Tensors that DeepSeek's code wants and does not read, for which there was no source."""
    lost: tuple[str, ...]
    """In words, settings without a counterpart."""
    seconds: float


def kind_of_checkpoint(folder: Path) -> Direction:
    """Which layout a folder is to be converted into: the one that it is not in.

    Raises:
        CheckpointError: it is Janus or Show-o in neither.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: expected a checkpoint's config.json, got none; name its folder") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if is_show_o(folder):
        return "transformers"
    if kind == SHOW_O:
        return "showlab"
    if kind == THEIRS:
        if why := refusal(config):
            raise CheckpointError(f"{folder}: expected Janus or Janus-Pro, got {why}")
        return "transformers"
    if kind == OURS:
        return "deepseek"
    raise CheckpointError(
        f"{folder}: expected Janus in DeepSeek's layout (model_type {THEIRS}) or transformers' ({OURS}), or "
        f"Show-o, got model_type {kind!r}; other models need no conversion, or have none"
    )


def convert(
    source: Path,
    output: Path,
    *,
    base: Path | None = None,
    vq: Path | None = None,
    text: Path | None = None,
    name: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Say = lambda line: None,
    read: Mapping[str, str] | None = None,
) -> Conversion:
    """Writes the other layout of a checkpoint.

    Args:
        source: folder in either layout.
        output: folder to make; it may exist if it is empty. It appears whole, under its name, or not at all.
        base: into a published layout: the folder in it that the training started from, for what transformers' has not.
        vq, text: image and text tokenizer of a published Show-o, where they do not lie beside it.
        name: of the source, for the record; its folder's where empty.
        max_shard_bytes: of a weight file.
        say: takes lines about how far it is.
        read: hashes of the files, where they are known already.

    Raises:
        CheckpointError: a checkpoint that cannot be converted, before anything is written.
        OSError: no space, or no permission; FileExistsError: `output` has files.
    """
    started = time.perf_counter()
    to = kind_of_checkpoint(source)
    plan = plan_of(source, base, vq, text)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder")
    needed = sum(info.num_bytes for info in (*plan.tensors, *plan.kept))
    check_space(output, needed)
    hashes = dict(read) if read is not None else hashes_of(plan.files)
    with whole_folder(output) as draft:
        draft.mkdir()
        lost = plan.write_settings(draft)
        written = _written(draft, plan.tensors, needed + 1 if plan.single else max_shard_bytes, say)
        if plan.single:
            (draft / SAFE).rename(draft / plan.single)
            written[plan.single] = written.pop(SAFE)
        if plan.kept:
            beside = draft / plan.beside[0]
            beside.mkdir(exist_ok=True)
            _written(beside, plan.kept, needed + 1, lambda line: None)
            (beside / SAFE).rename(beside / plan.beside[1])
        done = Conversion(
            format=FORMAT,
            to=to,
            source=name or source.name,
            read=hashes,
            written=written,
            num_tensors=len(plan.tensors),
            num_bytes=sum(info.num_bytes for info in plan.tensors),
            kept=tuple(info.name for info in plan.kept),
            zeros=tuple(info.name for info, parts in plan.tensors.items() if not parts),
            lost=tuple(lost),
            seconds=round(time.perf_counter() - started, 3),
        )
        (draft / RECORD).write_text(json.dumps(asdict(done), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return done


def plan_of(source: Path, base: Path | None = None, vq: Path | None = None, text: Path | None = None) -> Plan:
    """What converting a folder would write; CheckpointError where it cannot be. Arguments as of `convert`."""
    to = kind_of_checkpoint(source)
    if to == "showlab":
        return into_showlab(source, base)
    if to == "deepseek":
        return into_deepseek(source, base)
    return into_show_o(source, vq, text) if is_show_o(source) else into_transformers(source)


def _written(
    folder: Path, tensors: Mapping[TensorInfo, Sequence[Part]], max_shard_bytes: int, say: Say
) -> dict[str, tuple[int, str]]:
    """Writes the tensors; returns size and hash by file."""
    total, done, tenth = sum(info.num_bytes for info in tensors), 0, 0
    with SafetensorsWriter(folder, tensors, max_shard_bytes=max_shard_bytes, hashed=True) as writer:
        for info in writer.tensors:
            for piece in _pieces(info, tensors[info]):
                writer.write(info.name, piece)
            done += info.num_bytes
            if total >= WORTH_TELLING and done * 10 // total > tenth:
                tenth = done * 10 // total
                say(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")
    return {name: ((folder / name).stat().st_size, writer.sha256[name]) for name in writer.files}


def _pieces(info: TensorInfo, parts: Sequence[Part]) -> Iterable[torch.Tensor]:
    if not parts:
        for start in range(0, info.num_elements, PIECE):
            yield torch.zeros(min(PIECE, info.num_elements - start), dtype=info.dtype)
    for weights, name, index, count in parts:
        each = weights.tensors[name].num_elements // count
        for start in range(index * each, (index + 1) * each, PIECE):
            yield weights.elements(name, start, min(start + PIECE, (index + 1) * each))


def hashes_of(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by name, and by its folder's as well where another one is called so."""
    found: dict[str, str] = {}
    for path in files:
        name = f"{path.absolute().parent.name}/{path.name}" if path.name in found else path.name
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_space(output: Path, needed: int) -> None:
    """CheckpointError where a folder would not fit onto its disk."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{output}: expected {needed / 1e9:.2f} GB of free space for the converted checkpoint, got "
            f"{free / 1e9:.2f} GB at {there}; free some, or name another disk"
        )
