"""A small training begun on some ranks under every ZeRO stage, and gone on with on others; as a script, one rank.

elastic_cases.py FOLDER --make              trains to the end, with a checkpoint on the way
elastic_cases.py FOLDER --load 2 --to 0 3   goes on from what 2 ranks have made, under these stages
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from helpers import everything_partitioned, sharp_policy
from resume_cases import Training, config_of, leave

from syncr1.engine.data.prompts import load_training_prompts
from syncr1.engine.methods.sync_r1_parts import build_reward_set
from syncr1.engine.processes.group import init_distributed, place

SAVED, STEPS = 2, 6
"""Steps before the checkpoint, and at the end."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--load", type=int)
    parser.add_argument("--to", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    world, (_, ranks) = asked.folder / "world", place()
    rewards = build_reward_set(config_of(), sharp_policy(), load_training_prompts(world))

    def training(stage: int, root: Path) -> Training:
        config: Any = config_of(zero_stage=stage, max_steps=STEPS, bf16=asked.bf16)
        return Training(config, world, root, rewards)

    with everything_partitioned():
        for stage in range(4):
            if asked.make:
                made = asked.folder / f"{ranks}_{stage}"
                begun = training(stage, made).to(SAVED, saving=True)
                leave(begun, made.with_name(f"{made.name}_saved"))
                leave(begun.to(STEPS), made)
            for other in asked.to if asked.load else ():
                made = asked.folder / f"{asked.load}_{stage}"
                resumed = training(other, made).resume(SAVED)
                leave(resumed.to(STEPS), made.with_name(f"{made.name}_on_{ranks}_{other}"))


if __name__ == "__main__":
    main()
