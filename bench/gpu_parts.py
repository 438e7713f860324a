"""What `bench/gpu.py` does, in the order of its worth, with the seconds that each step may take.

A part takes at most its own time and leaves the parts behind it their least.  Limits are from the moment a step has its
turn; imports before that are not counted.  Nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_process import Part, Step

CHILD = str(Path(__file__).resolve().parent / "gpu_child.py")
OPS = (
    "cfg_sample",
    "linear_grpo_loss",
    "linear_logp",
    "prefix_decode_attention",
    "grpo_loss",
    "selective_logp",
    "shared_prefix_attention",
    "groups",
)
TESTS = (
    "triton_ops",
    "rows",
    "sample",
    "token_loss",
    "prefix_decode_attention",
    "triton_rows",
    "triton_sample",
    "triton_decode_attention",
    "group_advantages",
    "dgs_select",
    "grpo_plan",
    "shared_prefix_attention",
    "stepping",
    "devices",
    "attention_cuda_bookkeeping",
    "fused_trunk",
    "lora",
)
"""Files with tests that need a GPU, by worth."""
PRETENDED_TESTS = ("rows", "stepping")
TABLE = {
    "linear_large": 50.0,
    "cfg_sample": 20.0,
    "cfg_sample_top_p": 20.0,
    "grpo_loss": 20.0,
    "selective_logp": 25.0,
    "mixed": 35.0,
    "pruned": 25.0,
    "on_policy": 25.0,
    "compiled": 60.0,
}
DTYPES = ("bfloat16", "float32")
INTERPRETED = {"TRITON_INTERPRET": "1"}


def child(what: str, seconds: float, pretend: bool, *, interpreted: bool = False, waits: bool = True) -> Step:
    """A step of gpu_child.py; in pretence a part of them runs Triton's interpreter."""
    command = (sys.executable, CHILD, what, *(("--pretend",) if pretend else ()))
    return Step(
        what.partition("/")[2] or what,
        command,
        90.0 if pretend else seconds,
        INTERPRETED if pretend and interpreted else {},
        waits,
    )


def all_parts(pretend: bool, processes: int) -> list[Part]:
    """Every part.

    Args:
        pretend: tiny sizes on the CPU; what needs a GPU says so.
        processes: steps that only check and may run at once.
    """

    def steps(kind: str, limits: dict[str, float], interpreted: bool = False, waits: bool = True) -> tuple[Step, ...]:
        made = (child(f"{kind}/{n}", s, pretend, interpreted=interpreted, waits=waits) for n, s in limits.items())
        return tuple(made)

    only_gpu = ("groups",) if pretend else ("large addresses", *OPS)
    # The interpreter cannot compute in bfloat16; groups have no dtype but that of rewards.
    checks = [f"{op}/{kind}" for op in OPS for kind in (("float32",) if pretend or op == "groups" else DTYPES)]
    values = steps("checks", dict.fromkeys(checks, 75.0), interpreted=True, waits=False)
    on_gpu = steps("cuda", dict.fromkeys(only_gpu, 60.0), waits=False)
    # These two are slow and nothing is timed beside them.
    sanitizer = steps("sanitizer", {"racecheck": 150.0, "memcheck": 150.0}, waits=False)
    tests = steps("tests", dict.fromkeys(PRETENDED_TESTS if pretend else TESTS, 180.0), interpreted=True, waits=False)
    ops = steps("ops", {n: s for n, s in TABLE.items() if not (pretend and n == "compiled")})
    rollouts = steps("rollout", {"drawing": 65.0, "understanding": 60.0})
    profiles = {"linear_grpo_loss": 20.0, "cfg_sample": 12.0, "cfg_sample_top_p": 12.0, "decode_step": 40.0}
    return [
        Part("machine", "The machine", (child("machine", 30, pretend),), 45),
        Part("checks", "Values of every op", values, 240 if pretend else 75, together=processes),
        Part("cuda", "Graphs, streams, read-backs, large addresses", on_gpu, 60, together=processes),
        Part("ops", "The ops beside floors and peers", ops, 150, 60),
        Part("rollout", "Rollouts beside transformers", rollouts, 110, 40),
        Part("step", "Training beside padded rows", steps("step", {"training": 60, "our_step": 50}), 95, 30),
        Part(
            "tests", "Tests that need a GPU, and compute-sanitizer", (*sanitizer, *tests), 200, 40, together=processes
        ),
        Part("profile", "Where the time goes", steps("profile", profiles), 80, 45),
    ]


def chosen(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """Parts by name, or single steps as part/step; all where nothing is named.

    Raises:
        ValueError: a name that is none.
    """
    known = {part.name for part in parts} | {f"{part.name}/{step.name}" for part in parts for step in part.steps}
    unknown = sorted(set(only) - known)
    if unknown:
        raise ValueError(f"no part or step {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if not only:
        return list(parts)
    kept = []
    for part in parts:
        steps = tuple(s for s in part.steps if part.name in only or f"{part.name}/{s.name}" in only)
        if steps:
            kept.append(Part(part.name, part.title, steps, part.seconds, part.least, part.together))
    return kept
