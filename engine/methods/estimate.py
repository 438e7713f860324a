"""The money question, answered before a run: GPU-hours, memory of a GPU, disk; and what the answer takes for granted.

Work is counted (cost.py, memory.py), seconds follow from a GPU's data sheet (gpus.py).  Nothing of it was measured on a
GPU: the shares of the peaks that are reached are assumed, and said.  Rewards' own work, reading and writing, waiting
for the rank with the longest texts and idle GPUs are not in the hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..evaluate.drawing import texts_alone
from ..forward.masked_states import MaskedPlan
from ..learn.from_settings import held_out_sampling, objective_of
from ..learn.trajectories import sampling_of
from ..policies.base import Policy
from ..records import Prompt
from ..settings.train_config import TrainConfig
from ..show.pulse import duration
from .cost import Assumed, Layout, StepWork, Unit, add_rollout
from .gpus import COMPUTE_SHARE, GPUS, READ_SHARE, STATE_BYTES, USUAL, Gpu, collective_seconds, gpu_called, update_bytes
from .masked_cost import Filling
from .memory import DRAWING_STEP, Memory
from .training_cost import add_training

GIB, GB = 1 << 30, 1e9
OVERHEAD = 1.5 * GIB
"""CUDA's context, NCCL's buffers and what the allocator cannot use, about; no part of `Memory`."""
STEP_BYTES = STATE_BYTES * 2 + 4 + 2
"""Of a trained parameter that AdamW's step reads and writes: state, gradient, and the bfloat16 weight."""
SAMPLED_ITEMS = 48
"""Held-out items whose work stands for all."""
LEARNING = ("score", "update", "optimizer", "between ranks")
"""Parts of a step that the process that trains has."""
SHORTER = 4
"""The estimate is made with texts of a quarter of their limit, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes that a training leaves; reports, pictures and logs beside them are small."""

    checkpoint: int
    """To resume from, all ranks' files."""
    kept: int
    """Of these."""
    model: int
    """In transformers' format: `checkpoints/last`."""
    best: bool
    """`checkpoints/best` as well."""

    @classmethod
    def of(cls, config: TrainConfig, policy: Policy) -> Disk:
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        own = {id(p): p for name, p in policy.model.named_parameters() if "lora_" not in name}
        saved = sum(p.numel() * p.dtype.itemsize for p in own.values())
        every = config.checkpointing_steps
        written = 1 if not every else math.ceil(config.max_steps / every)
        kept = written if config.save_total_limit is None else min(written, config.save_total_limit)
        return cls(checkpoint=STATE_BYTES * trained, kept=kept, model=saved, best=config.eval_steps > 0)

    @property
    def total(self) -> int:
        """At the end of the training."""
        return self.kept * self.checkpoint + (1 + self.best) * self.model

    @property
    def peak(self) -> int:
        """While one more is written, before an old one is removed."""
        return self.total + max(self.checkpoint, self.model)

    def words(self) -> str:
        """For people."""
        return (
            f"disk: {self.kept} checkpoint{'s' * (self.kept != 1)} of {size_words(self.checkpoint)} to resume from, "
            f"one more while it is written, and the model of {size_words(self.model)}"
            f"{', the last and the best one' if self.best else ''}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Seconds of one training on one rank of a GPU, all ranks working alike."""

    step: dict[str, float]
    """By part."""
    num_steps: int
    scoring: float
    """Of held-out items, all times together."""
    ahead: bool = False
    """Another GPU draws the next step meanwhile."""

    @property
    def of_step(self) -> float:
        """Of one step: of all its parts, or of the half that takes longer."""
        learning = sum(self.step[name] for name in LEARNING)
        drawing = sum(self.step.values()) - learning
        return max(drawing, learning) if self.ahead else drawing + learning

    @property
    def seconds(self) -> float:
        return self.num_steps * self.of_step + self.scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a training will take."""

    config: TrainConfig
    gpu: Gpu
    named: str
    """Why this GPU."""
    num_ranks: int
    prompts: int
    """Of a rank's step."""
    work: StepWork
    hours: Hours
    shorter: Hours
    """With texts of a quarter of their limit."""
    memory: Memory
    disk: Disk
    items: int
    """Held out, each time that they are scored."""
    times: int
    """They are."""

    @property
    def num_gpus(self) -> int:
        """One for each rank, and one for the process that samples ahead."""
        return self.num_ranks * (1 + self.hours.ahead)

    @property
    def gpus(self) -> str:
        return f"{self.num_gpus} x {self.gpu.name}" if self.num_gpus > 1 else f"one {self.gpu.name}"

    @property
    def gpu_hours(self) -> float:
        return self.hours.seconds * self.num_gpus / 3600

    def headline(self) -> str:
        """The total."""
        fits = self.memory.peak() + OVERHEAD <= self.gpu.memory
        return (
            f"{hours_words(self.gpu_hours)} on {self.gpus} ({duration(self.hours.seconds)}), "
            f"{self.memory.peak() / GIB:.1f} GiB of a GPU's {self.gpu.memory / GIB:.0f}"
            f"{'' if fits else ', WHICH DOES NOT FIT'}, {size_words(self.disk.peak)} of disk"
        )

    def lines(self) -> list[str]:
        """For people, the total first."""
        config, work, step = self.config, self.work, self.hours.step
        counts = {name: part.multiply_adds for name, part in work.rollout}
        learnt = work.score.multiply_adds + work.update.multiply_adds
        trained = work.update.tokens / max(1, config.num_iterations)
        text = config.max_completion_length
        told = [
            f"it will take about {self.headline()}",
            f"  a step {seconds_words(self.hours.of_step)}: {work.sampled['text']:,.0f} tokens of text and "
            f"{work.drawn[0]:,.0f} of images sampled behind a rank's {self.prompts} prompts, {trained:,.0f} trained on",
            f"    rollout {_parts(step, ('see', 'prefill', 'text', 'image', 'draw'))}; "
            f"{tera_words(sum(counts.values()))} multiply-adds, images {tera_words(counts['image'])}",
            f"    update {_parts(step, LEARNING)}; {tera_words(learnt)} multiply-adds",
            f"  {config.max_steps:,} steps {duration(config.max_steps * self.hours.of_step)}; {self._scores()}",
            *(f"  {line}" for line in self.memory.lines()),
            f"  {self.disk.words()}",
            f"  assumed: every text has its {text} tokens (at {max(1, text // SHORTER)} it is "
            f"{hours_words(self._shorter_hours())}), nothing is pruned; {self.gpu.name}{self.named}",
            f"    decodes at {READ_SHARE:.0%} of {self.gpu.bandwidth / 1e12:.3g} TB/s and computes at "
            f"{COMPUTE_SHARE:.0%} of {self._flops() / 1e12:.3g} TFLOP/s; what rewards compute is not in it"
            f"{'' if self.memory.cache_stays else ', and without CUDA graphs decoding takes longer'}",
        ]
        if self.hours.ahead:
            told.insert(
                4, "    one GPU draws while the other trains: a step is the longer of the two, and neither holds more"
            )
        if self.memory.peak() + OVERHEAD > self.gpu.memory:
            told.insert(1, f"  it does not fit beside CUDA's own {OVERHEAD / GIB:.1f} GiB: {self._remedy()}")
        return told

    def _flops(self) -> float:
        return self.gpu.flops if self.config.bf16 else self.gpu.float32

    def _shorter_hours(self) -> float:
        return self.shorter.seconds * self.num_gpus / 3600

    def _scores(self) -> str:
        if not self.items or not self.times:
            return "no scores"
        return f"scores of {self.items:,} held-out items, {self.times} times: {duration(self.hours.scoring)}"

    def _remedy(self) -> str:
        """Against the part that is largest among those that a flag makes smaller."""
        config, memory = self.config, self.memory
        activations = memory.backward["activations"] + memory.backward["logits or the backward's own"]
        states = sum(memory.lasting.values()) - memory.lasting["weights"]
        # All states of a group that are trained are one pass.
        tokens = "--masked_steps" if DRAWING_STEP in memory.rollout else "--max_tokens_per_microbatch"
        parts = {
            memory.rollout["keys and values"]: "lower --prompts_per_step or --num_generations"
            if config.prompts_per_step > self.num_ranks
            else "lower --num_generations or --max_completion_length",
            activations: f"lower {tokens}"
            if config.gradient_checkpointing
            else f"--gradient_checkpointing, or lower {tokens}",
            memory.rollout.get(DRAWING_STEP, 0): "lower --prompts_per_step or --num_generations",
            states: "--bf16"
            if not config.bf16
            else "--zero_stage 2"
            if config.zero_stage < 2 and self.num_ranks > 1
            else "more GPUs with --zero_stage 2, or --lora_rank 16",
        }
        return parts[max(parts)]


def hours_words(hours: float) -> str:
    if hours < 0.005:
        return "less than 0.01 GPU-hours"
    digits = 0 if hours >= 99.5 else 1 if hours >= 9.95 else 2
    return f"{hours:,.{digits}f} GPU-hours"


def size_words(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.3g} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / 1e6:,.3g} MB"


def tera_words(count: float) -> str:
    return f"{1e-12 * count:,.0f} T" if count >= 1e14 else f"{1e-12 * count:.3g} T"


def seconds_words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"


WORDS = {
    "see": "photos seen",
    "prefill": "prompts",
    "image": "images",
    "draw": "VQ decode",
    "score": "scoring",
    "update": "forward and backward",
}
"""Of parts whose names do not say it."""


def _parts(step: dict[str, float], names: Sequence[str]) -> str:
    """`1.2 s: text .3, images .9`, what takes nothing left out."""
    total = sum(step[name] for name in names)
    each = (f"{WORDS.get(name, name)} {seconds_words(step[name])}" for name in names if step[name] > 0.005 * total)
    return f"{seconds_words(total)}: {', '.join(each)}"


def the_gpu(config: TrainConfig) -> tuple[Gpu, str]:
    """The GPU that the estimate is for, and why it is this one."""
    if config.gpu is not None:
        return GPUS[config.gpu], ""
    if torch.cuda.is_available():
        told = torch.cuda.get_device_name(0)
        here = gpu_called(told)
        if here is not None:
            return here, ""
        return GPUS[USUAL], f" (of {told} no data sheet is here; --gpu names another)"
    return GPUS[USUAL], " (no GPU is here; --gpu names another)"


def estimate_of(
    config: TrainConfig,
    policy: Policy,
    unit: Unit,
    prompts: Sequence[Prompt],
    num_ranks: int,
    memory: Memory,
    held_out: Sequence[Prompt] = (),
    times: int = 2,
    anchor_beta: float = 0.0,
) -> Estimate:
    """What a training takes, by its settings and its first step.

    Args:
        config: with the steps that it will make.
        policy: prepared, on `meta`, as `memory_of` takes it.
        unit: what its parts cost.
        prompts: a step's of one rank.
        num_ranks: one for each GPU.
        memory: of a rank.
        held_out: items that are scored.
        times: before and after, beside `eval_steps`.
        anchor_beta: weight of the KL term on prompts without a reward.
    """
    gpu, named = the_gpu(config)
    if config.eval_steps:  # those of the last step are the scores after training
        times += (config.max_steps - 1) // config.eval_steps

    def hours(text_tokens: float) -> tuple[Hours, StepWork]:
        work = step_work(config, policy, unit, prompts, text_tokens, anchor_beta)
        step = _step_seconds(config, policy, gpu, work, num_ranks)
        scoring = times * _scoring_seconds(config, policy, gpu, unit, held_out, text_tokens)
        ahead = config.rollout_staleness > 0
        return Hours(step=step, num_steps=config.max_steps, scoring=scoring, ahead=ahead), work

    most, work = hours(config.max_completion_length)
    shorter, _ = hours(max(1, config.max_completion_length // SHORTER))
    return Estimate(
        config=config,
        gpu=gpu,
        named=named,
        num_ranks=num_ranks,
        prompts=len(prompts),
        work=work,
        hours=most,
        shorter=shorter,
        memory=memory,
        disk=Disk.of(config, policy),
        items=len(held_out),
        times=times,
    )


def step_work(
    config: TrainConfig,
    policy: Policy,
    unit: Unit,
    prompts: Sequence[Prompt],
    text_tokens: float,
    anchor_beta: float = 0.0,
    kept: float = 1.0,
) -> StepWork:
    """A rank's step, with texts of `text_tokens` tokens; the preview accepts as many as it steers to."""
    N, again = policy.num_image_tokens, 1 - config.preview_acceptance
    previews = config.preview_fraction > 0 and N > 0
    assumed = Assumed(
        text_tokens=text_tokens,
        kept=kept,
        tries=sum(again**number for number in range(config.preview_max_attempts)) if previews else 1.0,
        preview_tokens=round(config.preview_fraction * N) if previews else 0,
        likely=config.preview_completion == "likely",
    )
    work, layout = StepWork(), Layout.of(policy, prompts, sampling_of(config, 0), text_tokens)
    add_rollout(work, unit, layout, config.num_generations, assumed)
    add_training(
        work,
        unit,
        layout,
        config.num_generations,
        assumed,
        objective_of(config, N, anchor_beta),
        share_prefix=config.share_prefix,
        num_iterations=config.num_iterations,
        masked=MaskedPlan(config.masked_logp, config.masked_steps),
    )
    return work


def _rollout_seconds(gpu: Gpu, work: StepWork, bf16: bool) -> dict[str, float]:
    return {name: gpu.decode_seconds(part.multiply_adds, part.read_bytes, bf16) for name, part in work.rollout}


def _step_seconds(config: TrainConfig, policy: Policy, gpu: Gpu, work: StepWork, num_ranks: int) -> dict[str, float]:
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    mine = trained / num_ranks if config.zero_stage else trained
    batches = math.ceil(work.update.tokens / config.num_iterations / config.max_tokens_per_microbatch)
    moved = update_bytes(trained, config.zero_stage, batches, 2 if config.bf16 else 4)
    return {
        **_rollout_seconds(gpu, work, config.bf16),
        "score": gpu.compute_seconds(work.score.multiply_adds, config.bf16),
        "update": gpu.compute_seconds(work.update.multiply_adds, config.bf16),
        "optimizer": config.num_iterations * gpu.read_seconds(STEP_BYTES * mine),
        "between ranks": config.num_iterations * collective_seconds(*moved, num_ranks),
    }


def _scoring_seconds(
    config: TrainConfig, policy: Policy, gpu: Gpu, unit: Unit, items: Sequence[Prompt], text_tokens: float
) -> float:
    """Of drawing all items once, and their texts greedily once more; every rank does all of it."""
    if not items:
        return 0.0
    some = items[:: max(1, len(items) // SAMPLED_ITEMS)]
    sampling, assumed = held_out_sampling(config), Assumed(text_tokens=text_tokens)
    work = StepWork()
    texts = texts_alone([prompt for prompt in some if "text" in prompt.segments])
    add_rollout(work, unit, Layout.of(policy, some, sampling, text_tokens), 1, assumed)
    add_rollout(work, unit, Layout.of(policy, texts, replace(sampling, cfg_weight=1.0), text_tokens), 1, assumed)
    # All items are one batch: what is read once a step of tokens is read once for all of them.
    filling = Filling.of(policy, sampling.image_steps)
    once = {"text": 2 * text_tokens, "image": policy.num_image_tokens if filling is None else filling.num_steps}
    share, seconds = len(items) / len(some), 0.0
    for name, part in work.rollout:
        weights = once.get(name, 0) * (unit.trunk_bytes + unit.head_bytes.get(name, 0)) * (part.read_bytes > 0)  # type: ignore[call-overload]
        read = (part.read_bytes - weights) * share + weights
        seconds += gpu.decode_seconds(part.multiply_adds * share, max(0.0, read), config.bf16)
    return seconds
