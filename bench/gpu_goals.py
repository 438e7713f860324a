"""What is wanted of a GPU of the H200's kind: each bound once, for the tables and for the page of `bench/gpu.py`.

Nothing here imports torch, so that the page can be written where torch cannot be imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageGoal:
    """A bound on one number that one step measures."""

    key: str
    text: str
    bound: float
    at_most: bool
    unit: str
    step: str
    """Which measures it: part/step."""

    def met(self, measured: float) -> bool:
        """Whether the number is within the bound; NaN is not."""
        return measured <= self.bound if self.at_most else measured >= self.bound


GOALS = (
    PageGoal("linear", "linear_grpo_loss / three bare products", 1.15, True, "x", "ops/linear_large"),
    PageGoal(
        "linear_memory", "linear_grpo_loss, peak extra memory without dX", 1.2 * 1024, True, "MiB", "ops/linear_large"
    ),
    PageGoal(
        "mixed_chunked", "mixed batch, faster than Liger chunked over one vocabulary", 2.8, False, "x", "ops/mixed"
    ),
    PageGoal("mixed_triton", "mixed batch, faster than Liger Triton over one vocabulary", 2.8, False, "x", "ops/mixed"),
    PageGoal("pruned", "half pruned / none pruned", 0.55, True, "x", "ops/pruned"),
    PageGoal("grpo_loss", "grpo_loss of 65,536 tokens, graph replay", 10.0, True, "us", "ops/grpo_loss"),
    PageGoal("cfg_sample", "cfg_sample, graph replay", 15.0, True, "us", "ops/cfg_sample"),
    PageGoal(
        "cfg_sample_top_p", "cfg_sample with top-k and top-p, graph replay", 45.0, True, "us", "ops/cfg_sample_top_p"
    ),
    PageGoal("image_step", "image tokens, all steps / their floor", 1.5, True, "x", "rollout/drawing"),
    PageGoal("image_rollout", "image rollout, faster than the HF loop", 1.5, False, "x", "rollout/drawing"),
    PageGoal(
        "text_rollout", "understanding rollout, faster than HF generate", 2.5, False, "x", "rollout/understanding"
    ),
    PageGoal(
        "shared_prefix",
        "shared prefix, times faster than padded rows / ratio of tokens",
        0.85,
        False,
        "x",
        "step/training",
    ),
    PageGoal("training_memory", "training, peak extra memory / padded rows", 0.5, True, "x", "step/training"),
    PageGoal(
        "read_backs/linear_grpo_loss",
        "linear_grpo_loss, read-backs of the host per call",
        1,
        True,
        "",
        "cuda/linear_grpo_loss",
    ),
    PageGoal("read_backs/grpo_loss", "grpo_loss, read-backs of the host per call", 0, True, "", "cuda/grpo_loss"),
    PageGoal("read_backs/cfg_sample", "token step: cfg_sample, read-backs per call", 0, True, "", "cuda/cfg_sample"),
    PageGoal(
        "read_backs/prefix_decode_attention",
        "token step: prefix_decode_attention, read-backs per call",
        0,
        True,
        "",
        "cuda/prefix_decode_attention",
    ),
)
BY_KEY = {goal.key: goal for goal in GOALS}
