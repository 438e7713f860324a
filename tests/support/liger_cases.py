"""The grid of the drop-in for Liger, and both implementations on one of its cases.

As a script, `python liger_cases.py OUT COUNT`, it computes Liger's Triton losses under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels import liger as ours

Case = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
SHARED: dict[str, tuple[Any, ...]] = {
    "loss_type": LOSS_TYPES,
    "level": ("token", "sequence"),
    "beta": (0.04, 0.0),
    "corrected": (False, True),
    "is_ratio": (None, "B", "B1", "BT"),
    "old": (True, False),
    "temperature": (0.7, 1.0),
    "num_items": (None, 7, "tensor"),
    "mask": ("full", "ragged", "row", "nothing"),
    "mask_dtype": (torch.bool, torch.int64, torch.float32),
    "max_length": (9, None),
    "shapes": ("default", "custom"),
}
CHUNKED = SHARED | {
    "delta": (None, 1.1, 1.6),  # below and above 1 + epsilon_high
    "ref": ("logps", "input", "none"),
    "bias": (True, False),
    "frozen": (False, True),
}
TRITON = SHARED | {
    "delta": (None, 1.1, 1.6),  # below and above 1 + eps_high
    "mask": (None, *SHARED["mask"]),
    "inplace": (True, False),
    "reduce": (True, False),
    "strided": (False, True),
}
CUSTOM = {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5,
          "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.2}  # fmt: skip
BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 5, 8, 11


def chunked_is_valid(case: Case) -> bool:
    """What Liger does not refuse."""
    if case["level"] == "sequence" and case["loss_type"] in TOKEN_LEVEL_ONLY:
        return False
    return case["loss_type"] != "dr_grpo" or case["max_length"] is not None


def triton_is_valid(case: Case) -> bool:
    alone = case["level"] == "sequence" or case["delta"] is not None
    return not (alone and case["loss_type"] in TOKEN_LEVEL_ONLY)


def pairwise(grid: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool], seed: int = 0) -> list[Case]:
    """Cases in which every two values of two parameters meet, wherever that is valid."""
    rng, names = random.Random(seed), list(grid)

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations([(name, str(case[name])) for name in names], 2))

    cases: list[Case] = []
    covered: set[Any] = set()
    for first, second in itertools.combinations(names, 2):
        for one, other in itertools.product(grid[first], grid[second]):
            if ((first, str(one)), (second, str(other))) in covered:
                continue
            drawn = ({name: rng.choice(grid[name]) for name in names} | {first: one, second: other} for _ in range(99))
            possible = list(itertools.islice(filter(valid, drawn), 8))
            if possible:
                cases.append(max(possible, key=lambda case: len(pairs(case) - covered)))
                covered |= pairs(cases[-1])
    return cases


# Liger takes contiguous logits only, and a bound below 1 + eps_high takes a gradient away that the loss has
INTERPRETED_CASES = pairwise(TRITON | {"strided": (False,), "delta": (None, 1.6)}, triton_is_valid, seed=9)


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if dispatch.load(name)[0] is None:
        pytest.skip(f"backend {name}: {dispatch.available()[name]}")
    monkeypatch.setenv("SYNCR1_BACKEND", name)
    return name


def make_mask(kind: str | None, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    lengths = {"full": (5, 5, 5), "ragged": (2, 5, 4), "row": (3, 0, 5), "nothing": (0, 0, 0)}[kind]
    fifths = torch.tensor(lengths).repeat(-(-BATCH // 3))[:BATCH]
    mask = torch.arange(LENGTH) < (fifths * LENGTH // 5).unsqueeze(1)
    if kind == "ragged":
        mask[1, 1] = False  # a hole: not every mask is padding
    return mask.to(dtype)


def logp_of(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


class Inputs:
    """What a case stands for: the same numbers for both implementations."""

    def __init__(self, case: Case) -> None:
        g = torch.Generator().manual_seed(zlib.crc32(repr(sorted(case.items(), key=str)).encode()))
        self.case, normal = case, lambda *shape: torch.randn(*shape, generator=g)
        self.hidden, self.weight = normal(BATCH, LENGTH, HIDDEN), normal(VOCABULARY, HIDDEN) * 0.5
        self.bias = normal(VOCABULARY) if case.get("bias") else None
        self.ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=g)
        self.logits = normal(BATCH, LENGTH + 1, VOCABULARY)
        if "bias" in case:
            exact = self.hidden.double() @ self.weight.double().T + (0 if self.bias is None else self.bias.double())
        else:
            exact = self.logits[:, :-1]
        logp = logp_of(exact, self.ids, case["temperature"])
        self.advantages = torch.tensor([1.3, -0.7, 0.0])[torch.randperm(BATCH, generator=g) % 3] * (
            1 + torch.rand(1, generator=g)
        )
        self.old = (logp + 0.35 * normal(BATCH, LENGTH)).float() if case["old"] else None
        self.ref_logps = (logp + 0.5 * normal(BATCH, LENGTH)).float()
        self.ref_hidden = self.hidden + 0.2 * normal(BATCH, LENGTH, HIDDEN)
        self.ref_weight = self.weight + 0.1 * normal(VOCABULARY, HIDDEN)
        self.ref_bias = None if self.bias is None else self.bias + 0.2 * normal(VOCABULARY)
        shape = {None: None, "B": (BATCH,), "B1": (BATCH, 1), "BT": (BATCH, LENGTH)}[case["is_ratio"]]
        self.is_ratio = None if shape is None else (0.4 * normal(*shape)).exp()
        self.mask = make_mask(case["mask"], case["mask_dtype"])
        self.num_items = torch.tensor(11) if case["num_items"] == "tensor" else case["num_items"]
        self.upstream = normal(BATCH, LENGTH)
        self.shapes = CUSTOM if case["shapes"] == "custom" else {}


def compare(actual: Any, expected: Any, what: str, factor: float = 1.0) -> None:
    """Relative 1e-5, beside the largest entry for tensors: sums of opposite signs leave no more of float32."""
    actual, expected = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-5 * factor, atol=(1e-5 * size + 1e-6) * factor,
                               msg=lambda text: f"{what}: {text}")  # fmt: skip


def chunked_loss(module: Any, case: Case, inputs: Inputs, **settings: Any) -> Any:
    named = {
        "beta": case["beta"], "use_ref_model": case["ref"] != "none", "loss_type": case["loss_type"],
        "max_completion_length": case["max_length"], "importance_sampling_level": case["level"],
        "temperature": case["temperature"], "delta": case["delta"], "use_bias_correction_kl": case["corrected"],
    }  # fmt: skip
    if case["loss_type"] == "cispo":
        named["epsilon_high"] = 1.1
    return module.LigerFusedLinearGRPOLoss(compiled=False, **(named | inputs.shapes | settings))


def chunked_call(loss: Any, inputs: Inputs, leaves: Sequence[Tensor | None], row: int | None = None) -> Any:
    """The loss of the whole batch, or of one of its sequences."""
    part = slice(None) if row is None else slice(row, row + 1)
    hidden, weight, bias = leaves
    assert hidden is not None and inputs.mask is not None
    by_input = inputs.case["ref"] == "input"
    return loss(
        hidden[part], weight, inputs.ids[part], inputs.mask[part], inputs.advantages[part], bias,
        ref_per_token_logps=inputs.ref_logps[part] if inputs.case["ref"] == "logps" else None,
        old_per_token_logps=None if inputs.old is None else inputs.old[part],
        ref_input=inputs.ref_hidden[part] if by_input else None, ref_weight=inputs.ref_weight if by_input else None,
        ref_bias=inputs.ref_bias if by_input else None,
        vllm_is_ratio=None if inputs.is_ratio is None else inputs.is_ratio[part],
        num_items_in_batch=inputs.num_items,
    )  # fmt: skip


def chunked_result(call: Callable[[Sequence[Tensor | None]], Any], inputs: Inputs) -> dict[str, Any]:
    leaves = [None if part is None else part.clone() for part in (inputs.hidden, inputs.weight, inputs.bias)]
    for index, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.requires_grad_(index == 0 or not inputs.case["frozen"])
    loss, metrics = call(leaves)
    (loss * 3).backward()
    return {"loss": loss, "metrics": metrics, "grads": [None if leaf is None else leaf.grad for leaf in leaves]}


def counts_padding(case: Case) -> bool:
    """Liger's luspo adds what lies at masked positions: the loss, with sequence-level ratios the KL and `is_ratio`."""
    per_token = case["level"] == "token" or case["is_ratio"] == "BT" or (case["beta"] != 0 and case["ref"] != "none")
    return case["loss_type"] == "luspo" and case["mask"] != "full" and per_token


def luspo_without_padding(loss: Any, case: Case, inputs: Inputs, leaves: Sequence[Tensor | None]) -> Any:
    """luspo from Liger's dr_grpo of one sequence at a time, which is the plain sum of the same token losses."""
    _, metrics = chunked_call(loss, inputs, leaves)
    whole, policy = (
        chunked_loss(liger_chunked(), case, inputs, loss_type="dr_grpo", max_completion_length=1, beta=beta)
        for beta in (case["beta"], 0.0)
    )
    total: Any = 0.0
    for row in range(BATCH):
        assert inputs.mask is not None
        by_length = float((inputs.mask[row] != 0).sum()) / LENGTH / BATCH
        policy_row, whole_row = (chunked_call(part, inputs, leaves, row)[0] for part in (policy, whole))
        total = total + policy_row * (1 / BATCH if case["level"] == "sequence" else by_length)
        total = total + (whole_row - policy_row) * by_length
    return total, metrics


def liger_chunked() -> Any:
    return pytest.importorskip("liger_kernel.chunked_loss")


def check_chunked(case: Case) -> None:
    inputs = Inputs(case)
    theirs = chunked_loss(liger_chunked(), case, inputs)
    mine = chunked_loss(ours, case, inputs)
    if counts_padding(case):
        expected = chunked_result(lambda leaves: luspo_without_padding(theirs, case, inputs, leaves), inputs)
    else:
        expected = chunked_result(lambda leaves: chunked_call(theirs, inputs, leaves), inputs)
    actual = chunked_result(lambda leaves: chunked_call(mine, inputs, leaves), inputs)
    # vespo's weight multiplies the rounding of log w by k - λw, about 50 where w is 20
    compare(actual["loss"], expected["loss"], "loss", factor=5 if case["loss_type"] == "vespo" else 1)
    assert actual["loss"].dtype == expected["loss"].dtype and actual["loss"].shape == ()
    assert isinstance(actual["metrics"], tuple) and len(actual["metrics"]) == len(expected["metrics"])
    for index, (metric, other) in enumerate(zip(actual["metrics"], expected["metrics"], strict=True)):
        compare(metric, other, f"metric {index}")
        assert metric.shape == () and metric.dtype == other.dtype and not metric.requires_grad
    for name, grad, other in zip(("hidden", "weight", "bias"), actual["grads"], expected["grads"], strict=True):
        assert (grad is None) == (other is None), name
        if other is not None:
            compare(grad, other, name, factor=3 if counts_padding(case) else 1)
    padding = inputs.mask == 0 if inputs.mask is not None else torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    assert not actual["grads"][0][padding].any()


def triton_call(module: Any, case: Case, inputs: Inputs, logits: Tensor) -> Any:
    clip = {"eps_high": 1.1} if case["loss_type"] == "cispo" else {}
    return module.triton_grpo_loss(
        logits, inputs.old, inputs.ref_logps, inputs.ids, inputs.advantages, inputs.mask, case["temperature"],
        case["beta"], inplace=case["inplace"], loss_type=case["loss_type"], max_completion_length=case["max_length"],
        importance_sampling_level=case["level"], reduce=case["reduce"], vllm_is_ratio=inputs.is_ratio,
        delta=case["delta"], use_bias_correction_kl=case["corrected"], num_items_in_batch=inputs.num_items,
        **clip, **inputs.shapes,
    )  # fmt: skip


def triton_result(module: Any, case: Case, inputs: Inputs) -> dict[str, Any]:
    leaf = inputs.logits.clone().requires_grad_()
    logits = leaf * 1  # a leaf's gradient may be copied: look at what its producer is given
    if case["strided"]:  # as logits[:, -T-1:] is
        logits = torch.cat([leaf, leaf.detach()], dim=1)[:, : LENGTH + 1]
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    loss, *rest = triton_call(module, case, inputs, logits)
    (loss * 3 if case["reduce"] else loss * inputs.upstream).sum().backward()
    others = list(rest[0]) if case["reduce"] else rest
    others = [None if other is None else other.detach() for other in others]
    result = {"loss": loss.detach(), "others": others, "grad": leaf.grad}
    return result | {"inplace": seen[0].data_ptr() == logits.data_ptr(), "logits": logits.detach()}


def plain_token_losses(case: Case, inputs: Inputs, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL, is clipped), [B, T] each, of every position: the formulas once more, in float64."""
    kind = case["loss_type"]
    shapes = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
              "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0} | inputs.shapes  # fmt: skip
    mask = torch.ones(BATCH, LENGTH) if inputs.mask is None else inputs.mask.double()
    logp = logp_of(logits[:, :-1], inputs.ids, case["temperature"])
    log_ratio = logp - (logp.detach() if inputs.old is None else inputs.old.double())
    sampler = torch.ones(BATCH, 1) if inputs.is_ratio is None else inputs.is_ratio.double().view(BATCH, -1)
    ratio = log_ratio.exp()
    if case["level"] == "sequence":
        ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None].expand(BATCH, LENGTH)
    low, high = 0.8, 1.1 if kind == "cispo" else 1.4
    losses, clipped = [], []
    for b, gain in enumerate(inputs.advantages.double()):
        sign = "pos" if gain > 0 or (gain == 0 and kind == "vespo") else "neg"
        if kind == "cispo":
            losses.append(-torch.minimum(ratio[b], torch.tensor(high)).detach() * gain * logp[b] * sampler[b])
            clipped.append((ratio[b] > high) & (gain > 0))
        elif kind == "sapo":
            tau = shapes[f"sapo_temperature_{sign}"]
            losses.append(-4 / tau / (1 + (-tau * (ratio[b] - 1)).exp()) * gain * sampler[b])
        elif kind == "vespo":
            k, lam = shapes[f"vespo_k_{sign}"], shapes[f"vespo_lambda_{sign}"]
            log_w = (log_ratio[b].detach().clamp(-20, 20) * mask[b]).sum()
            if inputs.is_ratio is not None:
                log_w = log_w + sampler[b].log().clamp(math.log(1e-8), 20).sum()
            w = log_w.clamp(math.log(1e-8), 20).exp()
            losses.append(-math.exp(lam) * w**k * (-lam * w).exp() * gain * logp[b])
        else:
            bounded = ratio[b] if case["delta"] is None else ratio[b].clamp(max=case["delta"])
            losses.append(-torch.minimum(bounded * gain, ratio[b].clamp(low, high) * gain) * sampler[b])
            clipped.append(((ratio[b] < low) & (gain < 0)) | ((ratio[b] > high) & (gain > 0)))
    kl = (inputs.ref_logps - logp).exp() - (inputs.ref_logps - logp) - 1
    kl = kl * ratio if case["corrected"] else kl
    flags = torch.stack(clipped).double() if clipped else torch.zeros(BATCH, LENGTH)
    return torch.stack(losses) + case["beta"] * kl, kl, flags


def plain_result(case: Case, inputs: Inputs) -> dict[str, Any]:
    leaf = inputs.logits.double().requires_grad_()
    loss, kl, clipped = plain_token_losses(case, inputs, leaf)
    mask = torch.ones(BATCH, LENGTH) if inputs.mask is None else inputs.mask.double()
    loss, kl, clipped = loss * mask, kl * mask, clipped * mask
    if not case["reduce"]:
        (loss * inputs.upstream).sum().backward()
        return {"loss": loss, "others": [kl if case["beta"] else None, clipped], "grad": leaf.grad}
    tokens, lengths = mask.sum().clamp(min=1), mask.sum(1)
    reduced = {
        "grpo": lambda: (loss.sum(1) / lengths.clamp(min=1)).mean(),
        "bnpo": lambda: loss.sum() / tokens,
        "dr_grpo": lambda: loss.sum() / (BATCH * (case["max_length"] or LENGTH)),
        "dapo": lambda: loss.sum() / float(tokens if inputs.num_items is None else inputs.num_items),
        "luspo": lambda: (loss * lengths[:, None]).mean(),
    }
    alike = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo"}
    scalar = reduced[alike.get(case["loss_type"], case["loss_type"])]()
    (scalar * 3).backward()
    metrics = [kl.sum() / tokens] if case["beta"] else []
    return {"loss": scalar, "others": [*metrics, clipped.sum() / tokens], "grad": leaf.grad}


def compare_results(
    actual: dict[str, Any], expected: dict[str, Any], factor: float = 1.0, *, gradient: bool = True
) -> None:
    compare(actual["loss"], expected["loss"], "loss", factor)
    assert len(actual["others"]) == len(expected["others"])
    for index, (value, other) in enumerate(zip(actual["others"], expected["others"], strict=True)):
        assert (value is None) == (other is None)
        if other is not None:
            assert value.dtype == torch.float32 and not value.requires_grad
            compare(value, other, f"output {index + 1}", factor)
    if gradient:
        compare(actual["grad"], expected["grad"], "gradient", factor)


def interpret(out: Path, count: int) -> None:
    """Liger's Triton losses of the first INTERPRETED_CASES, and its log-probabilities; TRITON_INTERPRET must be set."""
    from liger_kernel.transformers import grpo_loss as theirs

    results: dict[str, Any] = {"losses": [], "logps": []}
    for case in INTERPRETED_CASES[:count]:
        inputs = Inputs(case)
        inputs.mask = None if inputs.mask is None else inputs.mask.int()  # its interpreter reads bool as bits
        results["losses"].append(triton_result(theirs, case, inputs))
        mask = make_mask(case["mask"], torch.int64)
        logp = theirs.fused_selective_log_softmax(inputs.logits, inputs.ids, mask=mask)
        results["logps"].append(logp)
    torch.save(results, out)


def run_interpreted(folder: Path, count: int) -> dict[str, Any]:
    """What `interpret` writes, from a process in which Triton interprets."""
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder / "interpreted.pt"), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded: dict[str, Any] = torch.load(folder / "interpreted.pt")
    return loaded


def check_interpreted_losses(losses: Sequence[dict[str, Any]]) -> None:
    for case, expected in zip(INTERPRETED_CASES, losses, strict=False):
        actual = triton_result(ours, case, Inputs(case))
        # its reduced token-level luspo hands the backward kernel a [B, 1] gradient, read as [B, T]: past its end
        wrong = case["loss_type"] == "luspo" and case["level"] == "token" and case["reduce"]
        compare_results(actual, expected, factor=2, gradient=not wrong)
        assert actual["inplace"] == expected["inplace"]


def check_interpreted_logps(logps: Sequence[Tensor]) -> None:
    for case, expected in zip(INTERPRETED_CASES, logps, strict=False):
        inputs = Inputs(case)
        mask = make_mask(case["mask"], torch.int64)
        prompt = torch.full((BATCH, 2), 99)  # of ids and mask the last T columns count
        wide = None if mask is None else torch.cat([prompt, mask], dim=1)
        logp = ours.fused_selective_log_softmax(inputs.logits, torch.cat([prompt, inputs.ids], dim=1), mask=wide)
        compare(logp, expected, "logp")
        assert logp.dtype == torch.float32 and not logp.requires_grad


if __name__ == "__main__":
    interpret(Path(sys.argv[1]), int(sys.argv[2]))
