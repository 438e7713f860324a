"""GPUs by their data sheets, and how long counted work takes on one: plain arithmetic, without torch.

    seconds of a pass of many tokens   2 M / (COMPUTE_SHARE * flops)
    seconds of a decoding step         max(the same, bytes / (READ_SHARE * bandwidth))

`--dry_run` counts multiply-adds M and bytes on the model itself (cost.py); bench/scaling_model.py has them on paper,
for sizes that nobody here has.  The two shares are assumed, not measured: the whole estimate goes with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..settings.train_config import GpuName

COMPUTE_SHARE = 0.4
"""Of the peak that scoring and updates reach; usual for models of 1 to 7 billion parameters, assumed."""
READ_SHARE = 0.45
"""Of the bandwidth that a decoding step reaches: 90 % is what a kernel can get, and half of that; assumed."""
NVLINK = 350e9
"""Bus bandwidth of a large all-reduce in a node, bytes/s; NVLink's 450e9 each way, less protocol; assumed."""
NETWORK = 320e9
"""The same between nodes: eight ports of 50e9, 80 % of them; assumed. One port per node makes it 40e9."""
LATENCY = 20e-6
"""Seconds of a small collective beside 10e-6 per doubling of ranks; assumed."""
PER_NODE = 8
STATE_BYTES = 12
"""Of a trained parameter in a checkpoint, and in the optimizer: float32 weight and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One of NVIDIA's data sheets."""

    name: str
    words: tuple[str, ...]
    """Of the name that its driver tells, small letters; all of them."""
    flops: float
    """Dense bfloat16, operations/s; a multiply-add is two."""
    float32: float
    """Without tensor cores: how PyTorch multiplies float32 unless TF32 is allowed, which nothing here does."""
    bandwidth: float
    """Bytes/s."""
    memory: float
    """Bytes."""

    def compute_seconds(self, multiply_adds: float, bf16: bool = True) -> float:
        """Of passes over many tokens."""
        return 2 * multiply_adds / (COMPUTE_SHARE * (self.flops if bf16 else self.float32))

    def read_seconds(self, num_bytes: float) -> float:
        """Of what is read once for each token or step."""
        return num_bytes / (READ_SHARE * self.bandwidth)

    def decode_seconds(self, multiply_adds: float, num_bytes: float, bf16: bool = True) -> float:
        """Of decoding steps, whichever bound is higher."""
        return max(self.compute_seconds(multiply_adds, bf16), self.read_seconds(num_bytes))


GPUS: dict[GpuName, Gpu] = {
    "b200": Gpu("B200", ("b200",), 2250e12, 75e12, 8.0e12, 180e9),
    "h200": Gpu("H200", ("h200",), 989e12, 67e12, 4.8e12, 141e9),
    "h100-pcie": Gpu("H100 PCIe", ("h100", "pcie"), 756e12, 51e12, 2.0e12, 80e9),
    "h100": Gpu("H100 SXM", ("h100",), 989e12, 67e12, 3.35e12, 80e9),
    "h800": Gpu("H800 SXM", ("h800",), 989e12, 67e12, 3.35e12, 80e9),
    "h20": Gpu("H20", ("h20",), 148e12, 44e12, 4.0e12, 96e9),
    "a100-40gb": Gpu("A100 SXM 40 GB", ("a100", "40gb"), 312e12, 19.5e12, 1.555e12, 40e9),
    "a100": Gpu("A100 SXM 80 GB", ("a100",), 312e12, 19.5e12, 2.039e12, 80e9),
    "a800": Gpu("A800 SXM 80 GB", ("a800",), 312e12, 19.5e12, 2.039e12, 80e9),
    "l40s": Gpu("L40S", ("l40s",), 362e12, 91.6e12, 0.864e12, 48e9),
    "rtx4090": Gpu("RTX 4090", ("4090",), 165e12, 82.6e12, 1.008e12, 24e9),
}
"""The more special before the more general, as `gpu_called` looks for them."""
USUAL: GpuName = "h100"


def gpu_called(told: str) -> Gpu | None:
    """The data sheet of a GPU by the name that its driver tells, "NVIDIA H100 80GB HBM3"; None for another one."""
    words = told.lower().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if all(any(part in w for w in words) for part in gpu.words)), None)


def update_bytes(trained: float, zero_stage: int, num_microbatches: int, item: int = 2) -> tuple[float, float]:
    """(bytes all-reduced, bytes gathered or scattered) of a step as DeepSpeed 0.19 does it: ZeRO 0 and 1 reduce once,
    ZeRO 2 after every micro-batch, ZeRO 3 gathers twice and scatters once in each, and gathers for the rollout.

    Args:
        trained: parameters that have a gradient.
        zero_stage: 0 to 3.
        num_microbatches: forward and backward passes of the step.
        item: bytes of an element.
    """
    whole = float(item * trained)
    return {
        0: (whole, 0.0),
        1: (whole, whole),
        2: (num_microbatches * whole, whole),
        3: (0.0, (3 * num_microbatches + 1) * whole),
    }[zero_stage]


def collective_seconds(
    reduced: float, gathered: float, num_ranks: int, *, rate: float | None = None, latency: float = LATENCY
) -> float:
    """Not overlapped with anything. A ring moves (N - 1) / N of the bytes, twice for an all-reduce.

    Args:
        reduced, gathered: bytes, as `update_bytes`.
        num_ranks: one for each GPU.
        rate: bytes/s; None: within a node or between nodes, by the number of ranks.
        latency: of a small collective, of which a step has eight.
    """
    if num_ranks == 1:
        return 0.0
    rate = rate or (NVLINK if num_ranks <= PER_NODE else NETWORK)
    moved = (2 * reduced + gathered) * (num_ranks - 1) / num_ranks
    return moved / rate + 8 * (latency + 10e-6 * math.log2(num_ranks))
