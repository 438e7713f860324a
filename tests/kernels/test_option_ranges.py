"""Every option of every op: what is out of range is refused alike by all backends, before anything is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS
from op_calls import OPS

from syncr1.kernels import api, attention, dispatch
from syncr1.kernels.api import LossOptions, TokenStream, linear_grpo_loss
from syncr1.kernels.options import AGGREGATES, LOSS_TYPES, RATIOS, RULES, SCALES
from syncr1.kernels.ranges import BY_MODALITY

NOT_A_NUMBER: tuple[Any, ...] = (True, "0.5", [0.5], torch.tensor(0.5), np.bool_(True), 1j)
NOT_FINITE = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Kind:
    """Values of an option that are taken, and values that are not."""

    good: tuple[Any, ...]
    bad: tuple[Any, ...]


def number(good: tuple[Any, ...], *bad: Any, none: bool = False) -> Kind:
    more = (np.float32(good[0]), np.float64(good[0]), Fraction(good[0]).limit_denominator(64))
    return _kind((*good, *more), (*bad, *NOT_FINITE, *NOT_A_NUMBER), none)


def whole(good: tuple[Any, ...], *bad: Any, none: bool = False) -> Kind:
    more = (np.int64(good[0]), np.int32(good[0]))
    return _kind((*good, *more), (*bad, 1.5, 1.0, *NOT_FINITE, *NOT_A_NUMBER), none)


def _kind(good: tuple[Any, ...], bad: tuple[Any, ...], none: bool) -> Kind:
    return Kind((*good, None), bad) if none else Kind(good, (*bad, None))


def choice(names: tuple[str, ...]) -> Kind:
    return Kind(names, ("best", "", names[0].upper(), None, 0, [names[0]], math.nan))


def by_modality(kind: Kind) -> Kind:
    """The same for one number per modality, and dicts that are not that."""
    pairs = tuple({"text": kind.good[0], "image": value} for value in kind.good if value is not None)
    wrong = tuple({"text": kind.good[0], "image": value} for value in kind.bad if value is not None)
    return Kind(kind.good + pairs, (*kind.bad, *wrong, {"text": kind.good[0]}, {"text": 1.0, "audio": 1.0}, {}))


AT_LEAST_0 = number((0.5, 0, 0.0, 1e9), -1e-9, -1.0, -1)
ABOVE_0 = number((0.5, 1, 1e-6, 7.0), 0, 0.0, -0.5)
FRACTION = number((0.5, 1, 1.0, 1e-6), 0, 0.0, -0.1, 1.0001, 2)
SEED = whole((0, 7, -3, (1 << 63) - 1, -(1 << 63)), 1 << 63, -(1 << 63) - 1)
STATISTICS = {"scale": choice(SCALES), "eps": AT_LEAST_0, "aggregate": choice(AGGREGATES)}
SWITCH = Kind((True, False), (0, 1, None, "yes", math.nan))
LOSS: dict[str, Kind] = {
    "loss_type": choice(LOSS_TYPES),
    "ratio": choice(RATIOS),
    "clip_low": by_modality(AT_LEAST_0),
    "clip_high": by_modality(AT_LEAST_0),
    "delta": by_modality(number((1.5, 3, 0.5), 0, 0.0, -1.0, none=True)),
    "beta": by_modality(AT_LEAST_0),
    "bias_corrected_kl": SWITCH,
    "weight": by_modality(AT_LEAST_0),
    **STATISTICS,
    "dgs": choice(RULES),
    "dgs_mass": FRACTION,
    "dgs_keep": whole((1, 5), 0, -1, none=True),
    "dgs_min_keep": whole((0, 3), -1),
    "dgs_seed": SEED,
    "num_items": by_modality(Kind((5.0, 0, 0.25, torch.tensor(4.0), None), (-1.0, *NOT_FINITE, True, "5", [5.0]))),
    "num_sequences": number((3, 0, 0.5), -1.0, none=True),
    "max_length": whole((9, 1), 0, -1, none=True),
    "score_all": SWITCH,
    "top_entropy_quantile": FRACTION,
    "sapo_temperature_pos": ABOVE_0,
    "sapo_temperature_neg": ABOVE_0,
    "vespo_k_pos": AT_LEAST_0,
    "vespo_lambda_pos": AT_LEAST_0,
    "vespo_k_neg": AT_LEAST_0,
    "vespo_lambda_neg": AT_LEAST_0,
}
SCALE = number((0.5, 2), 0, 0.0, -1.0, none=True)
OPTIONS: dict[str, dict[str, Kind]] = {
    "group_advantages": STATISTICS,
    "dgs_select": {
        "rule": choice(RULES),
        "mass": FRACTION,
        "keep": LOSS["dgs_keep"],
        "min_keep": LOSS["dgs_min_keep"],
        "seed": SEED,
        **STATISTICS,
    },
    "grpo_plan": {name: kind for name, kind in LOSS.items() if name.startswith("dgs") or name in STATISTICS},
    "grpo_loss": LOSS,
    "linear_grpo_loss": LOSS,
    "linear_logp": {"temperature": ABOVE_0},
    "selective_logp": {"temperature": ABOVE_0},
    "cfg_sample": {
        "cfg_weight": number((2.0, 0, -3.5, 1e4)),
        "temperature": number((0.5, 0, 0.0, 1), -0.1),
        "top_k": whole((0, 3, 1000), -1),
        "top_p": FRACTION,
        "min_p": number((0.5, 0, 0.0, 1.0, 1), -1e-9, 1.0001, 2),
        "with_support": SWITCH,
        "seed": Kind(SEED.good, (*SEED.bad, torch.tensor(True))),
        "offset": Kind(SEED.good, (*SEED.bad, torch.tensor(True))),
    },
    "shared_prefix_attention": {"scale": SCALE},
    "cached_prefix_attention": {"scale": SCALE},
    "prefix_decode_attention": {"scale": SCALE},
}
TABLE = [(op, option) for op, options in OPTIONS.items() for option in options]


def test_the_table_holds_every_option() -> None:
    """Keyword arguments with a plain default, and all fields of LossOptions."""
    assert list(OPTIONS) == list(OPS)
    assert set(LOSS) == {field.name for field in fields(LossOptions)}
    plain = (bool, int, float, str)
    for op, options in OPTIONS.items():
        signature = inspect.signature(getattr(api, op))
        named = {
            name
            for name, p in signature.parameters.items()
            if p.kind is p.KEYWORD_ONLY and name != "backend" and any(k.__name__ in str(p.annotation) for k in plain)
        }
        assert named - {"num_items"} <= set(options), (op, named - set(options))


def run(op: str, option: str, value: Any, backend: str | None) -> Any:
    """The op with one option set, and whatever that option asks for beside it."""
    given: dict[str, Any] = {option: value}
    if value == "dr_grpo" and option == "loss_type":
        given["max_length"] = 9
    if option == "top_entropy_quantile" and op == "grpo_loss":
        given["entropy"] = torch.linspace(0.1, 1, 18)
    return OPS[op].values(
        OPS[op].inputs(8 if op in ("shared_prefix_attention", "cached_prefix_attention") else 6), backend, **given
    )


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a backend would be chosen, the test fails: no work has begun before that."""

    def reached(*arguments: object) -> None:
        raise AssertionError("a backend was chosen for a call that should have been refused")

    for module in (dispatch, attention):
        monkeypatch.setattr(module, "_choose", reached)


@pytest.mark.parametrize("backend", [None, *dispatch.MODULES])
@pytest.mark.parametrize(("op", "option"), TABLE)
@pytest.mark.usefixtures("nothing_runs")
def test_out_of_range_is_refused_by_name(op: str, option: str, backend: str | None) -> None:
    for value in OPTIONS[op][option].bad:
        with pytest.raises(ValueError, match=rf"^{op}: {option}.* must be .*, got .*; .+"):
            run(op, option, value, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_values_of_a_tensor_are_checked_where_values_are(op: str, backend: str) -> None:
    for value in (math.nan, math.inf, -1.0):
        for given in (torch.tensor(value), torch.tensor([5.0, value]), {"text": torch.tensor(value), "image": 1.0}):
            with pytest.raises(ValueError, match=f"{op}: num_items must be finite and ≥ 0, got"):
                run(op, "num_items", given, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "option"), TABLE)
def test_in_range_is_taken_and_finite(op: str, option: str, backend: str) -> None:
    for value in OPTIONS[op][option].good:
        assert all(bool(torch.isfinite(x.float()).all()) for x in run(op, option, value, backend)), value


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_equals_another_type_is_not_found_in_a_cache(backend: str) -> None:
    """To Python's caches True is 1."""
    for option in ("beta", "clip_low", "num_items"):
        run("grpo_loss", option, 1, backend)
        run("grpo_loss", option, {"text": 1, "image": 1}, backend)
        for value in (True, {"text": 1, "image": True}):
            with pytest.raises(ValueError, match=option):
                run("grpo_loss", option, value, backend)
    run("grpo_loss", "score_all", True, backend)
    with pytest.raises(ValueError, match="score_all"):
        run("grpo_loss", "score_all", 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_streams_temperature_and_the_weights_of_rewards(backend: str) -> None:
    x = OPS["linear_grpo_loss"].inputs()
    for temperature in ABOVE_0.bad:
        stream = TokenStream(x["hidden"], x["weight"], x["targets"], torch.arange(18), temperature=temperature)
        with pytest.raises(ValueError, match=r"linear_grpo_loss: stream.temperature must be a finite number > 0"):
            linear_grpo_loss([stream], x["rewards"], x["cu_seqlens"], x["groups"], backend=backend)
    for name in ("group_advantages", "dgs_select", "grpo_plan"):
        two = {"rewards": torch.rand(6, 2), "groups": x["groups"]}
        for weights in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])):
            with pytest.raises(ValueError, match=f"{name}: weights must be finite"):
                OPS[name].call(two, weights=weights, backend=backend)


def test_loss_options_made_by_hand_are_checked_too() -> None:
    build: Callable[..., LossOptions] = LossOptions
    for option, kind in LOSS.items():
        for value in kind.bad:
            with pytest.raises(ValueError, match=rf"grpo_loss: {option}"):
                build(**{option: value})
    for mapping in (dict, MappingProxyType):
        both = mapping({"text": 0.1, "image": 0.2})
        assert build(clip_low=both).clip_low == {"text": 0.1, "image": 0.2}
        with pytest.raises(ValueError, match=r"clip_low\['image'\] must be"):
            build(clip_low=mapping({"text": 0.1, "image": -0.2}))
    assert set(BY_MODALITY) <= set(LOSS)
