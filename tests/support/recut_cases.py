"""Optimizer states of odd parameters, saved on some ranks and cut again on others; as a script, one of those ranks.

    recut_cases.py FOLDER --make 0_fp32 2_bf16 --load 2_3_fp32:0_fp32

on N ranks saves a state of its own under each kind of optimizer, and loads states of any ranks (here of two, under ZeRO
3) into others, saves them again, and takes a step more.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from syncr1.engine.checkpoints.optimizer_state import optimizer_tensors, spread
from syncr1.engine.checkpoints.recut import OPTIMIZER, check_saved, load_saved
from syncr1.engine.checkpoints.sharded import Checkpoint, save, verified
from syncr1.engine.learn.optimizer import ClippedAdamW, LearnerSettings, clips_here, deepspeed_config
from syncr1.engine.processes.group import init_distributed, place

KINDS = tuple(f"{stage}_{dtype}" for dtype in ("fp32", "bf16") for stage in range(4))
"""ZeRO stage and dtype."""
STEPS = 3
"""Before a state is saved."""
ITEMS = 4
"""What all ranks together learn from in a step."""


class Odd(nn.Module):
    """Parameters across every cut: none of a size that 2 or 4 ranks divide, some smaller than the number of ranks;
    one under two names, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Parameter(torch.randn(1))
        self.scale = nn.Parameter(torch.randn(1, 1))
        self.wide = nn.Parameter(torch.randn(7, 11))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.tall = nn.Parameter(torch.randn(3, 9))
        self.three = nn.Parameter(torch.randn(3))
        self.tied = self.wide

    def forward(self, items: Tensor) -> Tensor:
        """Mean over items [n, 11] of something that every parameter takes part in."""
        hidden = torch.tanh(items @ self.wide.t() * self.scale) @ self.tied
        return ((hidden[:, :9] @ self.tall.t() * self.three + self.one + self.frozen[:1]) ** 2).mean()


class Optimized:
    """An optimizer as a `Learner` makes it, and the model that it trains."""

    def __init__(self, kind: str) -> None:
        self.model, self.stage, bf16 = Odd(), int(kind[0]), kind.endswith("bf16")
        settings = LearnerSettings(learning_rate=1e-2, zero_stage=self.stage, bf16=bf16, weight_decay=0.1)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        adamw = ClippedAdamW if clips_here(settings) else torch.optim.AdamW
        optimizer = adamw(trained, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))
        if isinstance(optimizer, ClippedAdamW):
            optimizer.max_norm = settings.max_grad_norm
        config = deepspeed_config(settings, sum(p.numel() for p in trained))
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
        }
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            model_parameters=trained,
            optimizer=optimizer,
            config=config,
        )

    def step(self, number: int) -> None:
        rank, world_size = place()
        items = torch.randn(ITEMS, 11, generator=torch.Generator().manual_seed(number))[rank::world_size]
        self.engine.backward(self.engine(items.to(self.dtype)))
        self.engine.step()

    def save(self, root: Path) -> None:
        holds = place()[0] == 0 or self.stage > 0
        tensors = {
            OPTIMIZER + name: value.clone() for name, value in optimizer_tensors(self.optimizer, self.model).items()
        }
        save(root, 1, tensors if holds else {}, {})

    def load(self, checkpoint: Checkpoint) -> None:
        check_saved(self.optimizer, self.model, checkpoint)
        load_saved(self.optimizer, self.model, checkpoint)
        spread(self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        """Whole, as this rank sees them."""
        parameters = dict(self.model.named_parameters())
        split = [p for p in parameters.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(split, enabled=bool(split)):
            return {name: p.detach().clone().contiguous() for name, p in parameters.items()}


def whole(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What all ranks saved, put together."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for rank in range(checkpoint.world_size):
        for name, value in checkpoint.tensors(rank, OPTIMIZER).items():
            parts[name].append(value)
    return {name: found[0] if name.startswith("step/") else torch.cat(found) for name, found in parts.items()}


def saved(path: Path) -> Checkpoint:
    return verified(path / "step_000001")


def load_and_go_on(folder: Path, source: str, kind: str, optimized: Optimized) -> None:
    """What `source` saved, as the whole model's weights on every rank; saved again; and after one step more."""
    checkpoint, (rank, ranks) = saved(folder / "made" / source), place()
    optimized.load(checkpoint)
    expected, name = whole(checkpoint), f"{source}-{ranks}_{kind}"
    for parameter, value in optimized.weights().items():
        master = expected.get(f"master/{parameter}")
        assert parameter == "frozen" or torch.equal(value.reshape(-1), master.to(value.dtype)), (name, parameter)
    optimized.save(folder / "again" / name)
    optimized.step(STEPS)
    weights = optimized.weights()
    if rank == 0:
        save_file(weights, folder / "stepped" / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", nargs="*", default=[], metavar="KIND")
    parser.add_argument("--load", nargs="*", default=[], metavar="RANKS_KIND:KIND")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    for name in ("made", "again", "stepped"):
        (asked.folder / name).mkdir(exist_ok=True)
    for kind in KINDS:
        sources = [load.split(":")[0] for load in asked.load if load.endswith(f":{kind}")]
        if kind not in asked.make and not sources:
            continue
        optimized = Optimized(kind)
        if kind in asked.make:
            for number in range(STEPS):
                optimized.step(number)
            optimized.save(asked.folder / "made" / f"{place()[1]}_{kind}")
        for source in sources:
            load_and_go_on(asked.folder, source, kind, optimized)
    dist.barrier()


if __name__ == "__main__":
    main()
