"""What the numbers should be: each goal is one line `goal | measured | met`. Nothing here fails a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gpu_goals
import shapes
from cases import FLOOR
from interleaved import Measured, fastest

MIB = 1 << 20
TOKEN_BYTES = 64
"""Sixteen float32 a token: log-probability, entropy, advantage, weight, masks and the like."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case as it was measured."""

    shape: shapes.Shape
    times: dict[str, Measured]
    """By mode: hot, cold, graph."""
    memory: dict[str, int]
    """Peak extra bytes by provider."""

    @property
    def hot(self) -> Measured:
        """The mode that every device has."""
        return self.times.get("hot", Measured())

    def ours(self, suffix: str = "", mode: str = "hot") -> str | None:
        """Our fastest backend that ran."""
        names = [f"ours {backend}{suffix}" for backend in ("native", "triton", "reference")]
        return fastest(self.times.get(mode, Measured()), names)

    def times_slower(self, others: str, suffix: str = "") -> float | None:
        """How much longer the fastest provider whose name starts with `others` takes than ours."""
        mine = self.ours(suffix)
        other = fastest(self.hot, [name for name in self.hot.samples if name.startswith(others)])
        return self.hot.ratio(other, mine) if mine and other else None

    def of_floor(self) -> float | None:
        """Our time over the floor's."""
        mine = self.ours()
        return self.hot.ratio(mine, FLOOR) if mine and FLOOR in self.hot.samples else None

    def our_memory(self) -> int | None:
        """Of the accelerated backend."""
        return next((self.memory[name] for name in ("ours native", "ours triton") if name in self.memory), None)


Results = dict[str, CaseResult]
Value = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on one number; `value` is None where what it needs was not measured."""

    text: str
    needs: tuple[str, ...]
    value: Value
    bound: Callable[[Results], float]
    at_most: bool
    unit: str = "x"
    key: str = ""
    """Of a goal of the GPU page."""

    def line(self, results: Results) -> dict[str, object] | None:
        """Goal, measured, met; None where its case was not run."""
        if any(name not in results for name in self.needs):
            return None
        found, bound = self.value(results), self.bound(results)
        met = None if found is None else (found <= bound if self.at_most else found >= bound)
        sign = "<=" if self.at_most else ">="
        shape = results[self.needs[-1]].shape
        line = {"goal": f"{self.text} ({shape}): {sign} {bound:.3g} {self.unit}", "measured": found, "met": met}
        return line | {"key": self.key} if self.key else line


def faster(text: str, case: str, others: str, by: float, suffix: str = "") -> Goal:
    """Ours takes at most 1 / `by` of the time of the fastest of `others`."""
    return Goal(text, (case,), lambda r: r[case].times_slower(others, suffix), lambda _: by, at_most=False)


def near_floor(text: str, case: str, within: float) -> Goal:
    """Ours takes at most `within` times the floor."""
    return Goal(text, (case,), lambda r: r[case].of_floor(), lambda _: within, at_most=True)


def workspace_bytes(shape: shapes.Shape) -> int:
    """Products of one chunk, as the op cuts them, and the float32 gradient of the weight."""
    from syncr1.kernels import linear

    assert isinstance(shape, shapes.HeadShape)
    row = shape.vocabulary * shape.dtype.itemsize
    fewest, most = linear.CHUNK_ROWS
    at_most = min(max(linear.WORKSPACE_BYTES[shape.device] // row, fewest), most)
    chunks = -(-shape.rows // at_most)
    return -(-shape.rows // chunks) * row + shape.vocabulary * shape.hidden * 4


def hidden_bytes(shape: shapes.Shape) -> int:
    """The gradient of the hidden states, which autograd needs anyway."""
    assert isinstance(shape, shapes.HeadShape)
    return shape.rows * shape.hidden * shape.dtype.itemsize


def without_hidden(result: CaseResult) -> float | None:
    """Peak extra memory besides the gradient of the hidden states, in MiB."""
    found = result.our_memory()
    return None if found is None else (found - hidden_bytes(result.shape)) / MIB


def bounded(case: str) -> Goal:
    """Workspace of a chunk and dW are all that is added to dX, next to a few numbers per token."""

    def bound(results: Results) -> float:
        shape = results[case].shape
        assert isinstance(shape, shapes.HeadShape)
        return (workspace_bytes(shape) + TOKEN_BYTES * shape.rows) / MIB

    text = "linear_grpo_loss, peak extra memory without dX, against one chunk's workspace + dW + 64 bytes a token"
    return Goal(text, (case,), lambda r: without_hidden(r[case]), bound, at_most=True, unit="MiB")


def _growth(results: Results) -> float | None:
    few, many = without_hidden(results["memory_4k"]), without_hidden(results["memory_16k"])
    return many / few if few and many else None


def _half(result: CaseResult) -> float | None:
    """Half of the trajectories pruned, over none pruned."""
    whole, half = result.ours(), result.ours(", half pruned")
    return result.hot.ratio(half, whole) if whole and half else None


CPU_GOALS = (
    near_floor("linear_grpo_loss / three bare products", "linear_small", 1.10),
    near_floor("linear_grpo_loss / three bare products", "linear_large", 1.10),
    faster("linear_grpo_loss, faster than Liger chunked", "linear_small", "Liger chunked", 1.7),
    faster("linear_grpo_loss, faster than Liger chunked", "linear_large", "Liger chunked", 1.7),
    bounded("memory_4k"),
    bounded("memory_16k"),
    Goal("the same, growth from 4096 to 16384 rows", ("memory_4k", "memory_16k"), _growth, lambda _: 1.05, True),
    faster("mixed batch, faster than our op over one vocabulary", "mixed", "ours native, one", 2.2),
    faster("mixed batch, faster than Liger chunked over one vocabulary", "mixed", "Liger chunked", 3.5),
    Goal("half pruned / none pruned", ("pruned",), lambda r: _half(r["pruned"]), lambda _: 0.55, True),
    faster("grpo_loss, faster than TRL's eager formula", "grpo_loss", "TRL eager", 8.0),
    faster(
        "selective_logp with entropy, faster than log_softmax + gather without", "selective_logp", "log_softmax", 4.0
    ),
    faster("cfg_sample with top-k and top-p, faster than the eager chain", "cfg_sample_top_p", "eager", 5.0),
)


def of_page(key: str, case: str, value: Callable[[CaseResult], float | None]) -> Goal:
    """A goal of the GPU page, by its key there."""
    goal = gpu_goals.BY_KEY[key]
    return Goal(goal.text, (case,), lambda r: value(r[case]), lambda _: goal.bound, goal.at_most, goal.unit, key)


def _replay(result: CaseResult) -> float | None:
    """Of a captured graph, in microseconds."""
    name = result.ours(mode="graph")
    return None if name is None else result.times["graph"].median(name) * 1e6


CUDA_GOALS = (
    of_page("linear", "linear_large", CaseResult.of_floor),
    of_page("linear_memory", "linear_large", without_hidden),
    of_page("mixed_chunked", "mixed", lambda r: r.times_slower("Liger chunked")),
    of_page("mixed_triton", "mixed", lambda r: r.times_slower("Liger Triton")),
    of_page("pruned", "pruned", _half),
    of_page("grpo_loss", "grpo_loss", _replay),
    of_page("cfg_sample", "cfg_sample", _replay),
    of_page("cfg_sample_top_p", "cfg_sample_top_p", _replay),
)


def lines(results: Results, device: str) -> list[dict[str, object]]:
    """Every goal of the device whose case was run."""
    found = (goal.line(results) for goal in (CPU_GOALS if device == "cpu" else CUDA_GOALS))
    return [line for line in found if line is not None]
