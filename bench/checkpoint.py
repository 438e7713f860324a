"""What a checkpoint costs: a training step with a save beside it, and writing one beside the machine's own rates.

    python bench/checkpoint.py                       both cases, some minutes on two cores
    python bench/checkpoint.py --only writing        one of them, the others stay in the file
    python bench/checkpoint.py --quick --out /tmp/x  tiny sizes: shows that everything runs

`step`: the default run's model, prompts and rewards, the same step over and over (the learning rate is next to 0, so
that the same tokens are sampled): alone, with a save that is begun before it and awaited after it, and with a save that
is awaited before the step begins.  A save is due every 20 steps (`checkpointing_steps`), so a step bears a twentieth of
the difference.  Awaiting the end counts all that the save costs, also what a longer save would take of later steps.

`writing`: `engine.checkpoint.save` of plain tensors, and what cannot be had for less: a copy of the state, its SHA-256,
and the same bytes written and fsynced.  Hash and disk take turns, so the floor of a save is their sum.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import rates
import torch
from comparison import OURS, Case, Comparison, Goal, Provider, Told, parser_of, run_cases
from step import Given

from syncr1.engine.checkpoints.optimizer_state import optimizer_tensors
from syncr1.engine.checkpoints.sharded import save
from syncr1.engine.data.prompts import load_anchors, load_training_prompts
from syncr1.engine.learn.from_settings import objective_of, sampler_of, settings_of
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.trainer import Trainer
from syncr1.engine.methods.resume import Checkpoints
from syncr1.engine.methods.starting import add_adapters
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import build_reward_set, prepare_data, prepare_model, stream_of
from syncr1.engine.policies.auto import load_policy
from syncr1.engine.processes.group import local_device
from syncr1.engine.rewards.preview_scorer import build_preview
from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.base_model import corpus
from syncr1.engine.world.tiny_janus import build_policy

CASES = ("step", "writing")
NO_SAVE, AWAITED = "no save", "save awaited before the step"
INTERVAL = SyncR1Config().checkpointing_steps
SHARE = 0.05
"""Of a step, at most, for its part of a checkpoint."""
BYTES, QUICK_BYTES = 1 << 29, 1 << 20
BLOCK = 16 << 20


class Training:
    """The default run's training, and one step of it.

    Args:
        folder: of the checkpoints.
        quick: an untrained model and few prompts.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        few: dict[str, Any] = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4} if quick else {}
        config = SyncR1Config(warmup_steps=0, learning_rate=1e-12, save_total_limit=1, **few)
        names = [concept.name for concept in CONCEPTS]
        policy = (
            build_policy(corpus(), names, seed=0, freeze_vision=True) if quick else load_policy(prepare_model(config))
        )
        frozen = add_adapters(config, policy.to(local_device()))
        root = prepare_data(config)
        prompts, anchors = load_training_prompts(root), load_anchors(root)
        stream = stream_of(config, prompts, anchors)
        rewards = build_reward_set(config, frozen, prompts)
        objective = objective_of(config, policy.num_image_tokens, config.anchor_beta)
        learner = Learner(policy, objective, settings_of(config), frozen)
        given: Any = Given(stream.next_step())
        sampler, preview = sampler_of(config, policy), build_preview(config, rewards)
        self.trainer = Trainer(config, learner, sampler, given, rewards, preview)
        self.checkpoints = Checkpoints(replace(config, zero_stage=0), folder, learner, stream)
        self.step()  # makes the optimizer's state
        self.bytes = sum(tensor.nbytes for tensor in optimizer_tensors(learner.optimizer, policy).values())
        self.saves = 0

    def step(self) -> float:
        """Seconds of the same step."""
        self.trainer.step = 0
        start = time.perf_counter()
        self.trainer.train_step()
        return time.perf_counter() - start

    def save(self) -> float:
        """Seconds until the training may go on."""
        self.saves += 1
        self.trainer.step = self.saves
        start = time.perf_counter()
        self.checkpoints.save(self.trainer)
        return time.perf_counter() - start

    def wait(self) -> float:
        """Seconds until everything is saved."""
        start = time.perf_counter()
        self.checkpoints.wait()
        return time.perf_counter() - start


def stepping(folder: Path, quick: bool) -> Case:
    """A step with and without a save."""
    made = Training(folder, quick)

    def beside(short: bool) -> Told:
        seconds = {"copy": made.save(), "step": made.step(), "rest of the save": made.wait()}
        return Told(seconds, {"bytes": made.bytes})

    def awaited(short: bool) -> Told:
        return Told({"copy": made.save(), "rest of the save": made.wait(), "step": made.step()}, {"bytes": made.bytes})

    def goals(found: Comparison) -> list[Goal]:
        def share(name: str) -> float | None:
            ratio = found.ratio(name, NO_SAVE)
            return None if ratio is None else (ratio - 1) / INTERVAL

        text = f"checkpoint every {INTERVAL} steps, share of a step"
        return [
            Goal(text, share(OURS), SHARE, at_most=True, unit="of a step"),
            Goal(f"{text}, awaited", share(AWAITED), SHARE, at_most=True, unit="of a step"),
        ]

    providers = [
        Provider(NO_SAVE, lambda short: Told({"step": made.step()}), memory=False),
        Provider(OURS, beside, memory=False),
        Provider(AWAITED, awaited, memory=False),
    ]
    shape = f"{made.bytes / 2**20:.1f} MiB of state, {made.trainer.config.prompts_per_step} prompts a step"
    return Case("A step and a checkpoint", shape, providers, goals)


def writing(folder: Path, quick: bool) -> Case:
    """A checkpoint of so many bytes, and what it is made of."""
    size = QUICK_BYTES if quick else BYTES
    state = torch.randint(-100, 100, (size,), dtype=torch.int8)
    parts, kept = dict(enumerate(state.chunk(16))), torch.empty_like(state)
    content = memoryview(state.numpy().data)
    blocks = [content[start : start + BLOCK] for start in range(0, size, BLOCK)]
    steps = iter(range(1, 1 << 30))

    def ours() -> None:
        save(folder, next(steps), {f"t{i}": part for i, part in parts.items()}, {}, keep=1)

    def hashed() -> None:
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(block)

    def written() -> None:
        file = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for block in blocks:
                while block:
                    block = block[os.write(file, block) :]
            os.fsync(file)
        finally:
            os.close(file)

    def provider(name: str, run: Callable[[], Any]) -> Provider:
        def work(short: bool) -> Told:
            start = time.perf_counter()
            run()
            return Told(numbers={"bytes_per_second": size / (time.perf_counter() - start)})

        return Provider(name, work, memory=False)

    def floor() -> dict[str, float]:
        return {"SHA-256": rates.seconds_of(hashed), "disk": rates.seconds_of(written)}

    def goals(found: Comparison) -> list[Goal]:
        share = found.times.median(OURS) / sum(found.floor.values())
        return [Goal("writing a checkpoint, of hashing and writing", share, 1.25, at_most=True)]

    providers = [
        provider(OURS, ours),
        provider("copy alone", lambda: kept.copy_(state)),
        provider("SHA-256 alone", hashed),
        provider("write and fsync alone", written),
        provider("torch.save, neither hashed nor fsynced", lambda: torch.save(parts, folder / "peer.pt")),
    ]
    return Case("Writing a checkpoint", f"{size / 2**20:.0f} MiB", providers, goals, floor)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = parser_of(__doc__)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only or ()) - set(CASES))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    folder = Path(tempfile.mkdtemp(prefix="syncr1-checkpoint-", dir=given.out if given.out.is_dir() else None))
    try:

        def build(name: str) -> Case:
            (folder / name).mkdir()
            return (stepping if name == "step" else writing)(folder / name, given.quick)

        return run_cases(given, CASES, build, __file__, "checkpoint")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
