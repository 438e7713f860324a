"""Generated batches for the kernel tests: hypothesis strategies, calls of the public ops, comparisons.

Dims: `T` packed tokens, `S` sequences, `P` groups, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from syncr1.kernels.api import TokenStream, grpo_loss, linear_grpo_loss, linear_logp
from syncr1.kernels.options import LOSS_TYPES, RATIOS, RULES, SCALES
from syncr1.kernels.outputs import GRPOOutput
from syncr1.kernels.streams import MODALITIES, Modality

FLOATS = ("logp", "old_logp", "ref_logp", "entropy", "is_ratio")
RESOLUTION = 3e-7
"""About 5 units in the last place of float32: the floor of every comparison, times the size of what is summed."""
MAX_LOG_RATIO = 20.0
POISON = (torch.nan, torch.inf, -torch.inf)
Values = dict[str, Tensor]


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def sequence_of_token(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


@dataclass(frozen=True)
class LossCase:
    """A batch for `grpo_loss`, in float32."""

    lengths: list[int]
    groups: list[int]
    tokens: Values
    """[T] each, by the names of the arguments."""
    members: Values
    """[S, …] each: `rewards` or `advantages`, or both of `rewards/text` and `rewards/image`; `is_ratio` as [S, 1]."""
    options: dict[str, Any]
    flat: bool = False
    """`is_ratio` is handed over as [S] where that can be told from [T]."""

    @property
    def mask(self) -> Tensor:
        """[T] bool."""
        return self.tokens.get("loss_mask", torch.ones(sum(self.lengths), dtype=torch.bool))

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keywords of `grpo_loss`."""
        given: dict[str, Any] = {"old_logp": None, "rewards": None, **self.tokens}
        for name, values in self.members.items():
            key, _, modality = name.partition("/")
            given[key] = {**(given.get(key) or {}), modality: values} if modality else values
        if "is_ratio" in self.members and self.flat and len(self.lengths) != sum(self.lengths):
            given["is_ratio"] = given["is_ratio"][:, 0]
        given |= {name: given[name].to(dtype) for name in FLOATS if given.get(name) is not None}
        offsets = {"cu_seqlens": offsets_of(self.lengths), "group_offsets": offsets_of(self.groups)}
        return {**given, **offsets, **self.options}

    def take(self, order: Sequence[int], groups: list[int], emptied: Sequence[int] = ()) -> tuple[LossCase, Tensor]:
        """The sequences `order` in that order, those `emptied` without their tokens; and which tokens those are."""
        starts = [0, *accumulate(self.lengths)]
        kept = [range(0) if s in emptied else range(starts[s], starts[s + 1]) for s in order]
        tokens_T = torch.tensor([t for part in kept for t in part], dtype=torch.int64)
        order_S = torch.tensor(list(order), dtype=torch.int64)
        tokens = {name: values[tokens_T] for name, values in self.tokens.items()}
        members = {name: values[order_S] for name, values in self.members.items()}
        taken = LossCase([len(part) for part in kept], groups, tokens, members, self.options)
        return taken, tokens_T

    def poisoned(self) -> LossCase:
        """NaN and infinity wherever the mask says that nothing may look."""
        tokens, members, mask_T = dict(self.tokens), dict(self.members), self.mask
        for name in FLOATS:
            if name in tokens:
                tokens[name] = poison(tokens[name], ~mask_T)
        if "is_ratio" in members:
            used_S = torch.bincount(sequence_of_token(self.lengths)[mask_T], minlength=len(self.lengths)) > 0
            members["is_ratio"] = poison(members["is_ratio"], ~used_S)
        return replace(self, tokens=tokens, members=members)


def poison(values: Tensor, where: Tensor) -> Tensor:
    out = values.clone()
    pattern = torch.tensor(POISON).repeat(where.numel() // 3 + 1)[: where.numel()].view(-1, *[1] * (values.dim() - 1))
    out[where] = pattern.expand(values.shape)[where].to(values.dtype)
    return out


def per_modality(values: Sequence[float]) -> st.SearchStrategy[Any]:
    one = st.sampled_from(values)
    return one | st.fixed_dictionaries({"text": one, "image": one})


NUM_ITEMS: tuple[Any, ...] = (
    None, 11.0, {"text": 5.0, "image": 0.25}, torch.tensor(7.0), torch.tensor([7.0]), torch.tensor([5.0, 8.0]),
    {"text": torch.tensor(4.0), "image": torch.tensor([9.0])},
)  # fmt: skip


@st.composite
def loss_options(draw: st.DrawFn, *, reference: bool, entropy: bool) -> dict[str, Any]:
    """Keywords of LossOptions; `reference` and `entropy` say what the batch holds."""
    loss_type = draw(st.sampled_from(LOSS_TYPES))
    optional: dict[str, st.SearchStrategy[Any]] = {
        "ratio": st.sampled_from(RATIOS),
        "clip_low": per_modality([0.0, 0.1, 0.2, 0.3]),
        "delta": per_modality([1.5, 3.0]),
        "bias_corrected_kl": st.booleans(),
        "weight": per_modality([0.5, 1.0, 2.0, 3.0, 0.0]),
        "scale": st.sampled_from(SCALES),
        "eps": st.sampled_from([0.0, 1e-4, 0.1]),
        "aggregate": st.sampled_from(["sum_then_normalize", "normalize_then_sum"]),
        "dgs": st.sampled_from(RULES),
        "dgs_mass": st.sampled_from([0.9, 0.1, 0.5, 1.0]),
        "dgs_keep": st.sampled_from([None, 1, 2, 5]),
        "dgs_min_keep": st.sampled_from([0, 1, 2, 20]),
        "dgs_seed": st.sampled_from([0, 7, 1 << 40]),
        "num_items": st.sampled_from(NUM_ITEMS),
        "num_sequences": st.sampled_from([0.5, 3.0, 7.5]),
        "score_all": st.booleans(),
        "sapo_temperature_pos": st.sampled_from([0.5, 2.0]),
        "sapo_temperature_neg": st.sampled_from([0.5, 2.0]),
        "vespo_k_pos": st.sampled_from([0.0, 1.0, 3.0]),
        "vespo_lambda_neg": st.sampled_from([0.0, 1.0, 3.0]),
    }
    optional["clip_high"] = per_modality([0.5, 1.2, 5.0] if loss_type == "cispo" else [0.0, 0.2, 0.28])
    if reference:
        optional["beta"] = per_modality([0.0, 0.1, 0.7])
    if entropy:
        optional["top_entropy_quantile"] = st.sampled_from([0.1, 0.37, 0.8])
    drawn = draw(st.fixed_dictionaries({}, optional=optional))
    return {"loss_type": loss_type, "max_length": 9, **drawn}


def grid_values(draw: st.DrawFn, *shape: int, missing: bool) -> Tensor:
    """Binary fractions, NaN among them: sums are exact in any order, so what is tied is so for every backend."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    levels, share = draw(st.sampled_from([49, 9, 2, 1])), draw(st.sampled_from([0.0, 0.3, 1.0])) if missing else 0.0
    values = (torch.randint(levels, shape, generator=random) - levels // 2) / 8
    return torch.where(torch.rand(shape, generator=random) < share, torch.nan, values)


@st.composite
def credit(draw: st.DrawFn, size: int, *, given: bool = True) -> tuple[Values, Tensor | None]:
    """Rewards [S], [S, K] or per modality, or (`given`) advantages; and weights [K]."""
    kinds = ["one", "several", "per modality", "advantages", "advantages per modality"]
    kind = draw(st.sampled_from(kinds if given else kinds[:3]))
    if kind == "several":
        count = draw(st.integers(1, 3))
        columns = grid_values(draw, size, count, missing=True)
        return {"rewards": columns}, draw(st.none() | st.just(torch.tensor([1.0, 0.5, -2.0][:count])))
    name = "advantages" if kind.startswith("advantages") else "rewards"
    keys = [f"{name}/{m}" for m in MODALITIES] if kind.endswith("modality") else [name]
    return {key: grid_values(draw, size, missing=name == "rewards") for key in keys}, None


@dataclass(frozen=True)
class Layout:
    lengths: list[int]
    groups: list[int]
    seed: int


@st.composite
def layouts(draw: st.DrawFn, longest: int = 130) -> Layout:
    """Groups of any size, 0 and 1 included; sequences of any length, 0 included."""
    groups = draw(st.lists(st.sampled_from([4, 2, 3, 0, 1, 5, 9]), min_size=draw(st.sampled_from([2, 0])), max_size=4))
    length = st.sampled_from([3, 0, 1, 2, 5, 7, 16, 33, longest])
    lengths = draw(st.lists(length, min_size=sum(groups), max_size=sum(groups)))
    return Layout(lengths, groups, draw(st.integers(0, 1 << 30)))


def _gap(draw: st.DrawFn, size: int, random: torch.Generator) -> Tensor:
    """Differences of log-probabilities: 0, moderate, or far beyond the clamp here and there."""
    kind = draw(st.sampled_from(["moderate", "moderate", "zero", "wild"]))
    gap_T = 0.3 * torch.randn(size, generator=random)
    if kind == "wild":
        far = torch.tensor([100.0, -100.0, 15.0, -15.0])[torch.randint(4, (size,), generator=random)]
        gap_T = torch.where(torch.rand(size, generator=random) < 0.2, far + gap_T, gap_T)
    return torch.zeros(size) if kind == "zero" else gap_T


@st.composite
def loss_cases(draw: st.DrawFn, layout: Layout | None = None, logp_T: Tensor | None = None) -> LossCase:
    """Every shape, mask, credit and option of `grpo_loss`; no ratio so near a bound that rounding decides."""
    layout = layout or draw(layouts())
    total, num_sequences = sum(layout.lengths), len(layout.lengths)
    random = torch.Generator().manual_seed(layout.seed)
    linear = logp_T is not None
    logp_T = -3 * torch.rand(total, generator=random) if logp_T is None else logp_T
    tokens, options_of = {"logp": logp_T}, {"reference": draw(st.booleans()), "entropy": linear}
    if draw(st.booleans()):
        tokens["old_logp"] = logp_T - _gap(draw, total, random)
    if options_of["reference"]:
        tokens["ref_logp"] = logp_T + _gap(draw, total, random)
    if not linear and draw(st.booleans()):
        tokens["entropy"], options_of["entropy"] = 3 * torch.rand(total, generator=random), True
    if not linear and draw(st.booleans()):
        tokens["modality"] = (torch.rand(total, generator=random) < 0.4).to(torch.uint8)
    density = draw(st.sampled_from([None, 0.8, 0.8, 0.3, 0.0]))
    if density is not None:
        tokens["loss_mask"] = torch.rand(total, generator=random) < density
    members, weights = draw(credit(num_sequences))
    sampler = draw(st.sampled_from([None, "token", "sequence", "flat"]))
    if sampler == "token":
        tokens["is_ratio"] = (0.3 * torch.randn(total, generator=random)).exp()
    elif sampler is not None:
        members["is_ratio"] = torch.randn(num_sequences, 1, generator=random).exp()
    options = draw(loss_options(**options_of))
    if weights is not None:
        options["weights"] = weights
    case = LossCase(layout.lengths, layout.groups, tokens, members, options, flat=sampler == "flat")
    hypothesis.assume(not near_a_bound(case, linear=linear))
    return case


def near_a_bound(case: LossCase, *, linear: bool = False) -> bool:
    """Some ratio lies so near a bound of the loss that float32 may fall on its other side."""
    tokens, options, mask_T = case.tokens, case.options, case.mask
    log_ratio_T = torch.zeros(len(mask_T), dtype=torch.float64)
    if "old_logp" in tokens:
        raw_T = torch.where(mask_T, tokens["logp"].double() - tokens["old_logp"].double(), 0.0)
        if bool(((raw_T.abs() - MAX_LOG_RATIO).abs() < 1e-3).any()):
            return True
        log_ratio_T = raw_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if (ratio := options.get("ratio", "token")) != "token":
            sequence_T = sequence_of_token(case.lengths)
            sums, counts = (
                torch.zeros(len(case.lengths), dtype=torch.float64).index_add_(0, sequence_T, values)
                for values in (log_ratio_T, mask_T.double())
            )
            sums = sums / counts.clamp_min(1) if ratio == "sequence" else sums
            if ratio == "product" and bool(((sums.abs() - MAX_LOG_RATIO).abs() < 1e-3).any()):
                return True
            log_ratio_T = sums.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[sequence_T]
    ratio_T = log_ratio_T.exp()[mask_T]
    cispo = options["loss_type"] == "cispo"
    bounds = [1 - b for b in _numbers(options.get("clip_low", 0.2))] + _numbers(options.get("delta", 3.0))
    bounds += [b if cispo else 1 + b for b in _numbers(options.get("clip_high", 0.2))]
    exactly_one = "old_logp" not in tokens or (not linear and not bool(log_ratio_T.any()))
    # A product adds up the errors of its log-ratios.
    margin = (3e-5 if linear else 1e-5) * (max(case.lengths, default=1) if options.get("ratio") == "product" else 1)
    return any(bool(((ratio_T - b).abs() < margin).any()) and not (exactly_one and b == 1) for b in bounds)


def _numbers(value: float | Mapping[str, float]) -> list[float]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


@dataclass(frozen=True)
class LinearCase:
    """A batch for `linear_grpo_loss`: streams in float32, and the rest of its arguments."""

    streams: list[TokenStream]
    case: LossCase
    trained: list[str]
    """Names of the leaves with a gradient: `hidden0`, `weight0`, `bias0`, …"""
    scored: Tensor
    """[2, T] float64: log-probability and entropy, 0 where no stream covers."""
    chunk_rows: int = 4096

    def leaves(self, dtype: torch.dtype = torch.float32) -> Values:
        """Fresh operands of every stream."""
        given = {
            f"{name}{i}": getattr(s, name) for i, s in enumerate(self.streams) for name in ("hidden", "weight", "bias")
        }
        return {
            name: value.detach().to(dtype).clone().requires_grad_(name in self.trained)
            for name, value in given.items()
            if value is not None
        }

    def poisoned(self) -> LinearCase:
        """NaN and infinity in every hidden state outside the mask as well."""
        mask_T = self.case.mask
        streams = [replace(s, hidden=poison(s.hidden, ~mask_T[s.rows])) for s in self.streams]
        return replace(self, streams=streams, case=self.case.poisoned())


@st.composite
def streams_of(draw: st.DrawFn, layout: Layout) -> list[TokenStream]:
    """One to three heads, rows in any order, some tokens covered by none."""
    choices: list[tuple[Modality, ...]] = [("text",), ("image",), ("text", "image"), ("image", "text", "text")]
    modalities = draw(st.sampled_from(choices))
    random = torch.Generator().manual_seed(layout.seed + 1)
    width = draw(st.sampled_from([1, 2, 3, 8]))
    owner_T = torch.randint(len(modalities), (sum(layout.lengths),), generator=random)
    if draw(st.booleans()):
        owner_T[torch.rand(sum(layout.lengths), generator=random) < 0.2] = -1
    streams = []
    for index, modality in enumerate(modalities):
        rows = (owner_T == index).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=random)] if draw(st.booleans()) else rows
        size = draw(st.sampled_from([2, 3, 5, 17, 40]))
        hidden = torch.randn(len(rows), width, generator=random)
        weight, bias = torch.randn(size, width, generator=random), torch.randn(size, generator=random)
        forbidden = torch.randperm(size, generator=random)[: draw(st.integers(0, min(3, size - 2)))]
        allowed = torch.tensor([v for v in range(size) if v not in forbidden.tolist()])
        targets = allowed[torch.randint(len(allowed), (len(rows),), generator=random)]
        temperature, biased = draw(st.sampled_from([1.0, 0.7, 1.5])), draw(st.booleans())
        streams.append(TokenStream(
            hidden, weight, targets, rows, bias if biased else None, temperature, modality,
            forbidden if len(forbidden) or draw(st.booleans()) else None,
        ))  # fmt: skip
    return streams


@st.composite
def linear_cases(draw: st.DrawFn) -> LinearCase:
    """Streams of an arbitrary layout; ratios against the log-probabilities that they have."""
    layout = draw(layouts(longest=40))
    streams = draw(streams_of(layout))
    scored = torch.zeros(2, sum(layout.lengths), dtype=torch.float64)
    for s in streams:
        bias = None if s.bias is None else s.bias.double()
        scored[:, s.rows] = torch.stack(linear_logp(
            s.hidden.double(), s.weight.double(), s.targets, bias=bias, temperature=s.temperature,
            forbidden=s.forbidden, backend="reference",
        ))  # fmt: skip
    case = draw(loss_cases(layout, scored[0].float()))
    if "top_entropy_quantile" in case.options:
        gaps = scored[1].sort().values.diff()
        hypothesis.assume(not bool(((gaps > 0) & (gaps < 1e-5)).any()))
    if not any(name in case.tokens for name in ("old_logp", "ref_logp", "loss_mask")) and draw(st.booleans()):
        case.tokens["loss_mask"] = torch.ones(sum(layout.lengths), dtype=torch.bool)
    names = [f"{name}{i}" for i in range(len(streams)) for name in ("hidden", "weight", "bias")]
    trained = names if draw(st.booleans()) else draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    return LinearCase(streams, case, trained, scored, draw(st.sampled_from([1, 2, 3, 7, 4096])))


def outcome(out: GRPOOutput, leaves: Values) -> Values:
    """Everything that a loss returns, and the gradients, by name."""
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads: Sequence[Tensor | None] = [None] * len(trained)
    if trained and out.loss.requires_grad:
        grads = torch.autograd.grad(out.loss, list(trained.values()), allow_unused=True)
    advantages = out.advantages
    values = {"loss": out.loss.detach(), "keep": out.keep, **{f"metric {k}": v for k, v in out.metrics.items()}}
    values["advantages"] = torch.cat(list(advantages.values())) if isinstance(advantages, dict) else advantages
    for (name, leaf), grad in zip(trained.items(), grads, strict=True):
        values[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return values


def run_loss(case: LossCase, backend: str, dtype: torch.dtype = torch.float32) -> Values:
    given = case.arguments(dtype)
    given["logp"] = given["logp"].clone().requires_grad_()
    return outcome(grpo_loss(**given, backend=backend), {"logp": given["logp"]})


def run_linear(linear: LinearCase, backend: str, dtype: torch.dtype = torch.float32) -> Values:
    given, leaves = linear.case.arguments(dtype), linear.leaves(dtype)
    given.pop("logp")
    streams = [
        replace(s, hidden=leaves[f"hidden{i}"], weight=leaves[f"weight{i}"], bias=leaves.get(f"bias{i}"))
        for i, s in enumerate(linear.streams)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("syncr1.kernels.linear.CHUNK_ROWS", (1, linear.chunk_rows))
        out = linear_grpo_loss(streams, **given, backend=backend)
        values = outcome(out, leaves)
    assert out.entropy is not None
    return values | {"logp": out.logp, "entropy": out.entropy}


def same_bits(left: Values, right: Values) -> None:
    """Bitwise, NaN included."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close({name: value}, {name: right[name]}, rtol=0, atol=0, equal_nan=True)


def as_good(name: str, mine: Tensor, single: Tensor, exact: Tensor, floor: float) -> None:
    """Not further from float64 than twice what plain PyTorch in float32 is, plus `floor`."""
    assert mine.shape == exact.shape, name
    if exact.numel():
        error, allowed = ((values.double() - exact.double()).abs().max().item() for values in (mine, single))
        assert error <= 2 * allowed + floor, f"{name}: error {error}, plain float32 {allowed}, floor {floor}"


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)
