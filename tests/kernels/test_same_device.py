"""Every tensor of every op must be on one device: device "meta" beside "cpu" shows it without a GPU."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from syncr1.kernels import api, dispatch
from syncr1.kernels.liger import fused_selective_log_softmax, triton_grpo_loss

T, V, D = 6, 5, 4
NOT_TENSORS = {"backend", "temperature", "scale", "eps", "aggregate", "rule", "mass", "keep", "min_keep", "options"}
NOT_TENSORS |= {"cfg_weight", "top_k", "top_p", "min_p", "with_support", "layout"}
# The layout's offsets are read on the host, wherever they are, and put beside the queries.


def offsets(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def stream(rows: list[int], modality: Any) -> api.TokenStream:
    size = len(rows)
    return api.TokenStream(
        torch.randn(size, D),
        torch.randn(V, D),
        torch.ones(size, dtype=torch.int64),
        torch.tensor(rows),
        bias=torch.randn(V),
        modality=modality,
        forbidden=torch.tensor([4]),
        support=torch.full((size, 1), -1, dtype=torch.int32),
    )


def loss_arguments() -> dict[str, Any]:
    per_token = {name: torch.randn(T) for name in ("old_logp", "ref_logp")}
    return per_token | {
        "rewards": torch.randn(3, 2),
        "cu_seqlens": offsets(2, 4, 6),
        "group_offsets": offsets(3),
        "loss_mask": torch.ones(T, dtype=torch.bool),
        "is_ratio": torch.ones(T),
        "weights": torch.ones(2),
        "modality": torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.uint8),
        "num_items": torch.tensor(6.0),
    }


def given_advantages(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"rewards": None, "weights": None, "advantages": torch.randn(3)}


def head() -> dict[str, Any]:
    support = torch.full((T, 1), -1, dtype=torch.int32)
    return {"targets": torch.ones(T, dtype=torch.int64), "forbidden": torch.tensor([4]), "support": support}


def cases() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """One or more calls per op that are right as they are."""
    loss = {"logp": torch.randn(T), "entropy": torch.rand(T)} | loss_arguments()
    linear = {"streams": [stream([0, 1, 2, 3], "text"), stream([4, 5], "image")]} | loss_arguments()
    by_modality = {"text": torch.randn(3), "image": torch.randn(3)}
    items = {"text": torch.tensor(4.0), "image": torch.tensor(2.0)}
    select = {"rewards": torch.randn(3, 2), "group_offsets": offsets(3), "weights": torch.ones(2)}
    logits = torch.randn(2, V)
    seeds = {"seed": torch.tensor([1, 2]), "offset": torch.tensor([0, 0]), "forbidden": torch.tensor([4])}
    decode = {name: torch.randn(1, 2, D) for name in ("query", "key", "value")}
    caches = {name: torch.randn(2, 3, D) for name in ("prefix_keys", "prefix_values", "own_keys", "own_values")}
    return {
        "group_advantages": (api.group_advantages, select),
        "dgs_select": (api.dgs_select, select),
        "grpo_plan": (api.grpo_plan, select),
        "grpo_loss": (api.grpo_loss, loss),
        "grpo_loss, advantages": (api.grpo_loss, given_advantages(loss)),
        "grpo_loss, by modality": (api.grpo_loss, loss | {"rewards": by_modality, "weights": None, "num_items": items}),
        "linear_grpo_loss": (api.linear_grpo_loss, linear),
        "linear_grpo_loss, advantages": (api.linear_grpo_loss, given_advantages(linear)),
        "linear_logp": (
            api.linear_logp,
            {"hidden": torch.randn(T, D), "weight": torch.randn(V, D), "bias": torch.randn(V)} | head(),
        ),
        "selective_logp": (api.selective_logp, {"logits": torch.randn(T, V)} | head()),
        "cfg_sample": (api.cfg_sample, {"cond": logits, "uncond": logits + 1, "cfg_weight": 2.0} | seeds),
        "prefix_decode_attention": (
            api.prefix_decode_attention,
            decode | caches | {"spans": torch.tensor([[0, 2, 0, 1]])},
        ),
        "shared_prefix_attention": (
            api.shared_prefix_attention,
            {name: torch.randn(T, 2, D) for name in "qkv"}
            | {"layout": api.SharedPrefixLayout(offsets(2), offsets(4), offsets(1))},
        ),
        "cached_prefix_attention": (
            api.cached_prefix_attention,
            {name: torch.randn(4, 2, D) for name in "qkv"}
            | {name: torch.randn(2, 3, D) for name in ("prefix_keys", "prefix_values")}
            | {"layout": api.SharedPrefixLayout(offsets(2), offsets(4), offsets(1))},
        ),
    }


CASES = cases()


def places(arguments: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Where tensors are: ("logp",), ("rewards", "text"), ("streams", "1", "bias")."""
    found: list[tuple[str, ...]] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name,))
        elif isinstance(value, Mapping):
            found += [(name, key) for key in value]
        elif isinstance(value, list):
            found += [
                (name, str(i), field.name)
                for i, part in enumerate(value)
                for field in fields(part)
                if isinstance(getattr(part, field.name), Tensor)
            ]
    return found


def moved(arguments: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """The arguments with the tensor at a place on device "meta"."""
    name, value = place[0], arguments[place[0]]
    if len(place) == 1:
        value = value.to("meta")
    elif len(place) == 2:
        value = value | {place[1]: value[place[1]].to("meta")}
    else:
        index, field = int(place[1]), place[2]
        value = [*value]
        value[index] = replace(value[index], **{field: getattr(value[index], field).to("meta")})
    return {**arguments, name: value}


@pytest.mark.parametrize("case", CASES)
def test_the_calls_are_right_and_name_every_argument(case: str) -> None:
    """The control; and an argument that an op gets later must come into a case above."""
    op, arguments = CASES[case]
    op(**arguments)
    mine = {name for other, given in CASES.values() if other is op for name in given}
    mine |= {"seed"} if op is api.dgs_select else set()  # an int there
    listed = inspect.signature(op).parameters
    options = {field.name for field in fields(api.LossOptions)} - {"num_items"}
    assert set(listed) - NOT_TENSORS - options <= mine, case


@pytest.mark.parametrize(("case", "place"), [(c, p) for c, (_, given) in CASES.items() for p in places(given)])
def test_a_tensor_elsewhere_is_refused_by_name(case: str, place: tuple[str, ...]) -> None:
    op, arguments = CASES[case]
    with pytest.raises(ValueError) as caught:
        op(**moved(arguments, place))
    message, first = str(caught.value), next(iter(places(arguments)))
    assert message.startswith(f"{op.__name__}: ") and "cpu" in message and "meta" in message and ".to(" in message
    if place != first:  # where the first is the odd one, all others are
        assert all(part in message for part in (place if len(place) < 3 else (f"streams[{place[1]}].{place[2]}",)))


def test_dtypes_are_judged_by_the_float_operands_alone() -> None:
    """Integer offsets, masks and targets make no backend unsupported; a float64 operand does, wherever it is."""
    if dispatch.available()["native"] != "ok":
        pytest.skip(dispatch.available()["native"])
    names = ("grpo_loss", "linear_grpo_loss", "linear_logp", "selective_logp", "cfg_sample", "dgs_select", "grpo_plan")
    for name in names:
        op, arguments = CASES[name]
        op(**arguments, backend="native")
    op, arguments = CASES["grpo_loss"]
    with pytest.raises(api.BackendError, match="float32"):
        op(**(arguments | {"old_logp": arguments["old_logp"].double()}), backend="native")


def test_ligers_drop_ins_look_too() -> None:
    logits, ids = torch.randn(2, 4, V), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"selective_logp: completion_ids must be on cpu as logits is, got meta"):
        fused_selective_log_softmax(logits, ids.to("meta"))
    arguments = (logits, None, None, ids, torch.randn(2))
    triton_grpo_loss(*arguments, beta=0.0)
    with pytest.raises(ValueError, match=r"completion_ids must be on meta as logits is, got cpu"):
        triton_grpo_loss(logits.to("meta"), *arguments[1:], beta=0.0)


def test_what_is_no_tensor_is_left_to_other_checks() -> None:
    dispatch.same_device("op", a=None, b=3, c=[1.0, "x"], d={"text": 1.0}, e=iter([torch.zeros(1, device="meta")]))
    with pytest.raises(ValueError, match=r"op: b\['x'\]\[1\] must be on cpu as a is, got meta"):
        dispatch.same_device("op", a=torch.zeros(1), b={"x": (torch.zeros(1), torch.zeros(1, device="meta"))})


def test_looking_costs_next_to_nothing() -> None:
    """2 µs for the thirteen arguments of grpo_loss; a bound that holds on a busy machine."""
    _, arguments = CASES["grpo_loss"]
    best = 1.0
    for _ in range(200):
        start = time.perf_counter()
        dispatch.same_device("grpo_loss", **arguments)
        best = min(best, time.perf_counter() - start)
    assert best < 50e-6
