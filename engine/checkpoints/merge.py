"""Merges fine-tuned checkpoints into one, tensor by tensor on disk, without training or loading a model.

W0 is the base that the models were trained from, δ_i = W_i − W0 what model i learnt, µ_i and σ_i the mean and unbiased
standard deviation of a tensor's δ_i.

    gaussian   µ = mean_i µ_i, σ = min_i σ_i, in_i = |δ_i − µ| < width · σ, element by element
               W = W0 + Σ_i δ_i · ¬in_i + (1/n) Σ_i δ_i · in_i
    fnorm      W = W0 + Σ_i s_i δ_i / Σ_i s_i, s_i = 1/‖δ_i‖
    mean       W = W0 + (1/n) Σ_i δ_i

What follows from the formulas, and where they say nothing:

- gaussian averages ordinary moves and adds large ones in full. Where two models make the same large move, it counts
  twice: merging a model with itself doubles its outliers. A tensor that one model did not move has σ = 0, so the
  other's move is taken whole; so is a tensor of a single element, which has no σ.
- fnorm divides by ‖δ_i‖. Taken to ‖δ_i‖ → 0 the formula lets the tensor stay at W0, so a model that was frozen there
  would undo what the others learnt; and the released code gives NaN. Here a model that did not move a tensor has no
  say in it (as under gaussian): the weights are shared among those that did.

Statistics and the merge are computed in float64, in pieces of `PIECE` elements: memory does not grow with the tensors.

Source: `gaussian` and `fnorm` are ULM-R1's (CoRL, arXiv 2505.17534), there for two models.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..policies.kinds import SAFE_INDEX
from ..whole_files import whole_folder
from .deepseek_files import RECORD as CONVERSION
from .model_card import is_hub_name, model_name
from .published import local_checkpoint
from .safetensors_stream import MAX_SHARD_BYTES, MappedCheckpoint, SafetensorsWriter, TensorInfo

MergeMethod = Literal["gaussian", "fnorm", "mean"]

PIECE = 1 << 18
"""Elements at a time: two megabytes in float64, which the processor's cache holds."""
RECORD = "merge.json"
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
NOT_COPIED = (SAFE_INDEX, RECORD, CONVERSION, "trainer_state.json", "best.json")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint that went into a merge."""

    name: str
    """Its folder, without the path that leads there."""
    sha256: dict[str, str]
    """Weight file -> hash, which identifies it wherever it is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did; `merge.json` in its folder holds the same."""

    method: MergeMethod
    width: float | None
    """Of the gaussian band, in standard deviations; None for the other methods."""
    base: Source
    models: tuple[Source, ...]
    num_tensors: int
    num_elements: int
    """Merged ones; copied tensors are not counted."""
    moved: tuple[float, ...]
    """Per model: ‖δ_i‖ over all merged tensors."""
    outside: tuple[float, ...] | None
    """Per model: share of elements outside the band, taken in full; None for the other methods."""
    unmoved: tuple[int, ...]
    """Per model: tensors that are the base's."""
    not_in_base: tuple[str, ...]
    """Tensors that the base lacks: model 1's."""
    not_float: tuple[str, ...]
    """Tensors that are not real floating-point numbers: model 1's."""
    seconds: float


class Moments:
    """Mean, unbiased standard deviation and norm of numbers that come in pieces.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, piece: Tensor) -> None:
        """[n] float64, n ≥ 1."""
        number, mean = piece.numel(), float(piece.mean())
        centred = piece - mean
        shift, total = mean - self.mean, self.count + number
        self._squares += float(centred.dot(centred)) + shift * shift * self.count * number / total
        self.mean += shift * number / total
        self.count = total

    @property
    def std(self) -> float:
        """NaN for fewer than two numbers, as in torch."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares + self.count * self.mean * self.mean)


def merge_checkpoints(
    base: str | Path,
    models: Sequence[str | Path],
    output: str | Path,
    method: MergeMethod = "gaussian",
    width: float = 2.0,
    report: Progress | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], object] = lambda line: None,
) -> MergeReport:
    """Writes the merge of `models`, all trained from `base`, as a checkpoint folder in transformers' format.

    Args:
        base: folder, or hub name, of the checkpoint that every model started from, in either layout of Janus.
            There is no default: another base gives another merge, and nothing in the models tells.
        models: two or more of them with the same tensors, shapes and dtypes; the base's dtype may be another.
            Configuration, tokenizer, processor, and tensors that cannot be merged are those of the first.
        output: folder to make; it may exist if it is empty.  It appears whole, under its name, or not at all.
        width: of the gaussian band, in standard deviations.
        report: called with (tensors done, tensors in all, name) after every tensor.
        say: takes lines about what is fetched or converted first.

    Raises:
        CheckpointError: folders that cannot be merged (before anything is written), or weights that are not finite.
        ConfigError: a hub name that cannot be had.
        FileExistsError: `output` has files.
    """
    started = time.perf_counter()
    _check_arguments(models, method, width)
    output = Path(output)
    _check_output(output)
    names = [model_name(source) for source in (base, *models)]
    opened = MappedCheckpoint(_folder(base, say)), [MappedCheckpoint(_folder(model, say)) for model in models]
    plan = _plan(*opened)
    _check_space(output, plan)
    with whole_folder(output) as draft:
        draft.mkdir()
        metadata = {"merge_method": method, "merge_base": names[0]}
        with SafetensorsWriter(draft, plan, max_shard_bytes=max_shard_bytes, metadata=metadata) as writer:
            totals = _write(writer, *opened, plan, method, width, report)
        _copy_files(opened[1][0].folder, draft)
        done = MergeReport(
            method=method,
            width=width if method == "gaussian" else None,
            base=_source(names[0], opened[0]),
            models=tuple(_source(name, model) for name, model in zip(names[1:], opened[1], strict=True)),
            num_tensors=sum(plan.values()),
            num_elements=totals.num_elements,
            moved=tuple(math.sqrt(square) for square in totals.squares),
            outside=tuple(n / max(1, totals.num_elements) for n in totals.outside) if method == "gaussian" else None,
            unmoved=tuple(totals.unmoved),
            not_in_base=tuple(info.name for info in plan if info.name not in opened[0].tensors),
            not_float=tuple(info.name for info in plan if not info.dtype.is_floating_point),
            seconds=round(time.perf_counter() - started, 3),
        )
        (draft / RECORD).write_text(json.dumps(asdict(done), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return done


def _check_arguments(models: Sequence[str | Path], method: str, width: float) -> None:
    if isinstance(models, str | Path) or len(models) < 2:
        raise ValueError(f"merge: expected two or more models, got {models!r}; one model needs no merging")
    if method not in get_args(MergeMethod):
        raise ValueError(f"merge: expected method {', '.join(get_args(MergeMethod))}, got {method!r}")
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"merge: expected a positive width, got {width}; 2 is usual")


def _folder(source: str | Path, say: Callable[[str], object]) -> Path:
    """The folder of a checkpoint in transformers' format: a hub name is fetched, DeepSeek's layout is converted, as
    where a training starts from it."""
    there = Path(source).expanduser().is_dir() or is_hub_name(str(source).partition("@")[0])
    return local_checkpoint(source, say) if there else Path(source)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"merge: {output} exists and is not an empty folder; choose another name")


def _check_space(output: Path, plan: dict[TensorInfo, bool]) -> None:
    needed = sum(info.num_bytes for info in plan)
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"merge: expected {needed / 1e9:.1f} GB free for {output}, got {free / 1e9:.1f}; make room")


def _plan(base: MappedCheckpoint, models: Sequence[MappedCheckpoint]) -> dict[TensorInfo, bool]:
    """Model 1's tensors -> whether they are merged (else copied); CheckpointError with all that does not fit."""
    first = models[0]
    problems = []
    for other in (*models[1:], base):
        # A tensor that only the models have is copied; one that only some of them have leaves no rule to follow.
        missing = sorted(other.tensors.keys() - first.tensors.keys())
        missing_there = [] if other is base else sorted(first.tensors.keys() - other.tensors.keys())
        problems += [f"{name}: in {other.folder}, but not in {first.folder}" for name in missing]
        problems += [f"{name}: in {first.folder}, but not in {other.folder}" for name in missing_there]
        for name in first.tensors.keys() & other.tensors.keys():
            mine, theirs = first.tensors[name], other.tensors[name]
            same = mine.dtype == theirs.dtype
            if other is base:
                same |= mine.dtype.is_floating_point and theirs.dtype.is_floating_point
            if mine.shape != theirs.shape or not same:
                problems.append(f"{name}: {_words(mine)} in {first.folder}, but {_words(theirs)} in {other.folder}")
    if problems:
        shown = problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])
        remedy = "expected models trained from this base, with their vocabularies unchanged; check --base and --models"
        raise CheckpointError("\n  ".join(["these checkpoints cannot be merged:", *shown, remedy]))
    return {info: info.dtype.is_floating_point and name in base.tensors for name, info in first.tensors.items()}


def _words(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


@dataclass(slots=True)
class _Totals:
    """Sums over merged tensors; the lists have one entry per model."""

    num_elements: int
    squares: list[float]
    outside: list[int]
    unmoved: list[int]


def _write(
    writer: SafetensorsWriter,
    base: MappedCheckpoint,
    models: Sequence[MappedCheckpoint],
    plan: dict[TensorInfo, bool],
    method: MergeMethod,
    width: float,
    report: Progress | None,
) -> _Totals:
    zeros = [0] * len(models)
    totals = _Totals(0, [0.0] * len(models), zeros.copy(), zeros.copy())
    for number, info in enumerate(writer.tensors, 1):
        if not plan[info]:
            for piece in models[0].flat(info.name).split(PIECE):
                writer.write(info.name, piece)
        else:
            flat = [checkpoint.flat(info.name) for checkpoint in (base, *models)]
            try:
                for merged in _merged(flat, method, width, totals):
                    rounded = merged.to(info.dtype)
                    if not bool(rounded.double().isfinite().all()):
                        raise CheckpointError(f"merged values do not fit into {info.dtype}; save the models wider")
                    writer.write(info.name, rounded)
            except CheckpointError as error:
                raise CheckpointError(f"{info.name}: {error}") from None
        if report is not None:
            report(number, len(plan), info.name)
    return totals


def _merged(flat: Sequence[Tensor], method: MergeMethod, width: float, totals: _Totals) -> Iterator[Tensor]:
    """float64 pieces of the merge of one tensor; `flat` is W0, W1, …, each [n] of any float dtype."""
    moments = [Moments() for _ in flat[1:]]
    for _, *deltas in _deltas(flat):
        for moment, delta in zip(moments, deltas, strict=True):
            moment.add(delta)
    for index, moment in enumerate(moments):
        if not math.isfinite(moment.norm):
            raise CheckpointError(f"NaN or infinite weights in model {index + 1} or the base; it cannot be merged")
        totals.squares[index] += moment.norm**2
        totals.unmoved[index] += moment.norm == 0
    totals.num_elements += flat[0].numel()
    shares = _shares(moments, method)
    for origin, *deltas in _deltas(flat):
        if method == "gaussian":
            deltas = _weigh_by_band(deltas, moments, width, totals.outside)
        # Adding the changes to each other first makes the order of two models irrelevant to the last bit.
        yield origin + sum(delta * share for delta, share in zip(deltas, shares, strict=True))


def _deltas(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces of [W0, δ_1, …] in float64."""
    for pieces in zip(*(tensor.split(PIECE) for tensor in flat), strict=True):
        if pieces[0].numel():
            origin = pieces[0].double()
            yield [origin, *(piece.double() - origin for piece in pieces[1:])]


def _shares(moments: Sequence[Moments], method: MergeMethod) -> list[float]:
    """The weight of each δ_i; gaussian weighs element by element instead."""
    if method == "gaussian":
        return [1.0] * len(moments)
    weights = [1.0] * len(moments)
    if method == "fnorm":
        weights = [1 / moment.norm if moment.norm > 0 else 0.0 for moment in moments]
    total = sum(weights)
    return [weight / total if total > 0 else 0.0 for weight in weights]


def _weigh_by_band(deltas: list[Tensor], moments: Sequence[Moments], width: float, outside: list[int]) -> list[Tensor]:
    """δ_i outside the band, δ_i / n inside; counts the former.  NaN as σ puts everything outside."""
    centre = sum(moment.mean for moment in moments) / len(moments)
    half = width * min(moment.std for moment in moments)
    weighed = []
    for index, delta in enumerate(deltas):
        inside = (delta - centre).abs() < half
        outside[index] += delta.numel() - int(inside.sum())
        weighed.append(torch.where(inside, delta / len(deltas), delta))
    return weighed


def _copy_files(origin: Path, target: Path) -> None:
    """Configuration, tokenizer, processor and licence; never weights, pickles or code."""
    for path in (*origin.iterdir(), *origin.glob("additional_chat_templates/*.jinja")):
        licence = path.stem.upper() in ("LICENSE", "LICENCE", "NOTICE")
        if path.is_file() and path.name not in NOT_COPIED and (path.suffix in COPIED_SUFFIXES or licence):
            copy = target / path.relative_to(origin)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _source(name: str, checkpoint: MappedCheckpoint) -> Source:
    hashes = {}
    for path in checkpoint.files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(name=name, sha256=hashes)
