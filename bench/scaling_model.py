"""A paper model of a step on many GPUs: the tables of docs/scaling.md, which says what it leaves out.

    python bench/scaling_model.py                           prints the tables
    python bench/scaling_model.py --write docs/scaling.md   puts them into the page, between its marks

Decoding reads the weights and the keys and values once a step of tokens; an update is arithmetic; what is reduced and
gathered crosses NVLink inside a node and the network between nodes; all ranks wait for the fullest and the slowest;
interruptions come per GPU hour.  Every number that was not measured here is a field with its source beside it.

Dims: N ranks (one per GPU), G members of a group, P parameters.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from syncr1.engine.methods.gpus import (
    COMPUTE_SHARE,
    GPUS,
    LATENCY,
    NETWORK,
    NVLINK,
    PER_NODE,
    READ_SHARE,
    STATE_BYTES,
    collective_seconds,
    update_bytes,
)

SIZES = (8, 64, 1024)
IN_TURN = {8: 7, 64: 8, 1024: 7}
"""Drawings of the fullest rank, 8 prompts each, dealt out as they are drawn from the mix: counted with the stream."""
GB = 1e9


@dataclass(frozen=True, slots=True)
class Model:
    """A Janus: decoder, text head, image head. Vision tower and VQ decoder are small beside them."""

    name: str
    hidden: int
    layers: int
    mlp: int
    vocabulary: int = 102_400
    image_vocabulary: int = 16_384
    image_tokens: int = 576

    @property
    def blocks(self) -> int:
        """Parameters of the decoder's layers; keys and values have all heads (no grouped queries)."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.mlp)

    @property
    def text_head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def image_head(self) -> int:
        return self.hidden**2 + self.image_vocabulary * self.hidden

    @property
    def trained(self) -> int:
        """With the embedding, which is not tied to the head."""
        return self.blocks + 2 * self.text_head + self.image_head

    @property
    def kv_bytes(self) -> int:
        """Of a token in all layers, bfloat16."""
        return 2 * self.layers * self.hidden * 2


JANUS_1B = Model("Janus-Pro-1B", 2048, 24, 5632)
JANUS_7B = Model("Janus-Pro-7B", 4096, 30, 11008)


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes of eight H200 with a 400 Gb/s port per GPU."""

    memory_rate: float = GPUS["h200"].bandwidth
    """Bytes/s (data sheet). Here and below: what the fields are is said in engine/methods/gpus.py."""
    decode_share: float = READ_SHARE
    """Of it that decoding reaches. A faster decoder makes the shares of all else larger."""
    flops: float = GPUS["h200"].flops
    update_share: float = COMPUTE_SHARE
    nvlink: float = NVLINK
    network: float = NETWORK
    """One port per node makes it an eighth."""
    latency: float = LATENCY
    jitter: float = 0.01
    """Standard deviation of equal ranks' times, as a share (clocks, caches, the host); assumed."""
    host_copy: float = 20e9
    """Bytes/s from a GPU to page-locked memory, PCIe 5 shared by pairs; assumed."""
    writer: float = 1e9
    """Bytes/s that one rank hashes and writes; SHA-256 alone is 0.3e9 to 2e9 on one core; assumed."""
    file_system: float = 20e9
    """Bytes/s of the shared file system, over all ranks, either way; assumed. Llama 3's had 2e12."""
    gpu_hours: float = 54 * 24 * 16384 / 419
    """Between unexpected interruptions: 419 in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4)."""
    notice: float = 64.0
    """Seconds until a rank that vanished is given up, at most (watchdog.py); a killed process shows at once."""
    start: float = 60.0
    """Seconds to start processes, imports and communicators; 30 to 60 on two cores here, assumed for all sizes."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a step does per GPU: Sync-R1's mix of reasoning, drawing, understanding and anchors."""

    prompts: int = 8
    """Groups per GPU."""
    group: int = 8
    prompt_tokens: int = 100
    """On average, photos included."""
    text_mean: float = 48.0
    """Tokens of an answer; lengths are taken as geometric, cut at `text_cap`. Assumed."""
    text_cap: int = 128
    image_share: float = 0.63
    """Of prompts that draw: engine/data/mixture.py's shares with 18.75 % anchors."""
    text_share: float = 0.70
    """Of prompts that write."""
    retries: float = 0.25
    """Of drawings that a preview sends back once, after a quarter of their tokens."""
    zero_stage: int = 2
    microbatch: int = 16384
    """max_tokens_per_microbatch."""
    fullest: int | None = None
    """Drawing prompts of the rank that has most; None: prompts are dealt out by kind, at most one more than others."""


# Statistics -----------------------------------------------------------------------------------------------------------


def expected_longest(num_texts: int, mean: float, cap: int) -> float:
    """Expected greatest length of independent geometric texts of `mean` tokens cut at `cap`: sum of P(longest > k)."""
    going_on = 1.0 - 1.0 / mean
    return sum(1.0 - (1.0 - going_on**k) ** num_texts for k in range(cap))


def mean_length(mean: float, cap: int) -> float:
    """Of one text that is cut."""
    return expected_longest(1, mean, cap)


@cache
def expected_slowest(num_ranks: int) -> float:
    """Expected maximum of N standard normals."""
    step, total = 1e-3, 0.0
    for index in range(-8000, 8000):
        below = 0.5 * math.erfc(-(index + 0.5) * step / math.sqrt(2))
        total += step * ((index >= 0) - below**num_ranks)
    return total


def young(cost: float, between: float) -> float:
    """Seconds between checkpoints that lose least (Young 1974): sqrt(2 cost M), M the mean time between failures."""
    return math.sqrt(2 * cost * between)


# A step ---------------------------------------------------------------------------------------------------------------


def rollout_seconds(model: Model, machine: Machine, job: Job, images: float, texts: float, text_steps: float) -> float:
    """Sampling on one GPU: every step of tokens reads the weights, and the keys and values of its rows. `images` and
    `texts` are prompts that draw and that write, `text_steps` the tokens of the longest text."""
    mean = mean_length(job.text_mean, job.text_cap)
    text_reads = texts * job.group * mean * (job.prompt_tokens + mean / 2) * model.kv_bytes
    text = text_steps * 2 * (model.blocks + model.text_head) + text_reads if texts else 0.0
    rows = images * job.group * 2  # guidance

    def image_bytes(rows: float, steps: float) -> float:
        return steps * (2 * (model.blocks + model.image_head) + rows * (job.prompt_tokens + steps / 2) * model.kv_bytes)

    drawn, again = model.image_tokens, model.image_tokens / 4
    image = image_bytes(rows, drawn) + image_bytes(rows * job.retries, again) * (job.retries > 0) if images else 0.0
    return (text + image) / (machine.memory_rate * machine.decode_share)


def update_tokens(model: Model, job: Job, images: float, texts: float) -> tuple[float, float]:
    """(tokens through the decoder, those of images) of one GPU's update; a prompt is computed once for its group."""
    drawn = images * job.group * model.image_tokens
    return drawn + texts * job.group * mean_length(job.text_mean, job.text_cap) + job.prompts * job.prompt_tokens, drawn


def update_seconds(model: Model, machine: Machine, job: Job, images: float, texts: float) -> float:
    """Forward and backward are 6 operations per weight and token, the frozen reference's forward 2 more."""
    tokens, drawn = update_tokens(model, job, images, texts)
    heads = drawn * model.image_head + (tokens - drawn) * model.text_head
    return 8 * (tokens * model.blocks + heads) / (machine.flops * machine.update_share)


def communication_seconds(model: Model, machine: Machine, job: Job, num_ranks: int, num_microbatches: int) -> float:
    """Gradients and weights in bfloat16."""
    rate = machine.nvlink if num_ranks <= PER_NODE else machine.network
    moved = update_bytes(model.trained, job.zero_stage, num_microbatches)
    return collective_seconds(*moved, num_ranks, rate=rate, latency=machine.latency)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step of N ranks."""

    rollout: float
    """Of an average rank, and so on."""
    update: float
    uneven: float
    """Added by waiting for the fullest rank, the longest text and the slowest GPU."""
    communication: float

    @property
    def seconds(self) -> float:
        return self.rollout + self.update + self.uneven + self.communication

    @property
    def efficiency(self) -> float:
        """Of one GPU that has an average rank's work to itself."""
        return (self.rollout + self.update) / self.seconds


def step_of(model: Model, machine: Machine, job: Job, num_ranks: int) -> Step:
    """An average rank's work, and what the step takes beyond it."""
    images, texts = job.prompts * job.image_share, job.prompts * job.text_share
    most_images, most_texts = images, texts
    if num_ranks > 1:
        most_images, most_texts = job.fullest or math.ceil(images), math.ceil(texts)
    alone = expected_longest(max(1, round(texts * job.group)), job.text_mean, job.text_cap)
    longest = expected_longest(max(1, round(num_ranks * texts * job.group)), job.text_mean, job.text_cap)
    rollout = rollout_seconds(model, machine, job, images, texts, alone)
    update = update_seconds(model, machine, job, images, texts)
    fullest = rollout_seconds(model, machine, job, most_images, most_texts, longest)
    fullest += update_seconds(model, machine, job, most_images, most_texts)
    slowest = fullest * (1 + machine.jitter * expected_slowest(num_ranks))
    tokens, _ = update_tokens(model, job, most_images, most_texts)
    # Anchors are packed apart.
    num_microbatches = math.ceil(tokens / job.microbatch) + 1
    moved = communication_seconds(model, machine, job, num_ranks, num_microbatches)
    return Step(rollout, update, slowest - rollout - update, moved)


# Failures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survival:
    """Checkpoints and interruptions of N ranks; seconds."""

    between: float
    """Interruptions."""
    rank_bytes: float
    """That a rank writes."""
    blocked: float
    """That a save stops training."""
    background: float
    """That a save goes on beside it."""
    interval: float
    """Between checkpoints, by Young, but no shorter than a save."""
    restart: float

    def lost(self, interval: float) -> float:
        """Share of time that is not training: saves, half an interval and a restart per interruption."""
        return self.blocked / interval + (interval / 2 + self.restart) / self.between


def survival_of(model: Model, machine: Machine, job: Job, num_ranks: int) -> Survival:
    """A checkpoint is 12 bytes per trained parameter, shared out over ranks by ZeRO; without, rank 0 has all."""
    whole = float(STATE_BYTES * model.trained)
    mine = whole / num_ranks if job.zero_stage else whole
    between = 3600 * machine.gpu_hours / num_ranks
    blocked = mine / machine.host_copy
    background = max(mine / machine.writer, whole / machine.file_system)
    num_nodes = math.ceil(num_ranks / PER_NODE)
    # Ranks of a node share its page cache: the model is read once per node, the checkpoint once in all, and hashed.
    load = (num_nodes * 2 * model.trained + whole) / machine.file_system + mine / machine.writer
    interval = max(young(blocked, between), background)
    return Survival(between, mine, blocked, background, interval, machine.notice + machine.start + load)


# Tables ---------------------------------------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def duration(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= (2 * size if size > 1 else 1):
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{1e3 * seconds:.0f} ms"


def step_table() -> str:
    rows = []
    for model in (JANUS_1B, JANUS_7B):
        for num_ranks in SIZES:
            job, machine = Job(), Machine()
            step = step_of(model, machine, job, num_ranks)
            slow = step_of(model, replace(machine, network=machine.network / 8), job, num_ranks)
            in_turn = step_of(model, machine, replace(job, fullest=IN_TURN[num_ranks]), num_ranks)
            parts = (step.rollout, step.update, step.uneven, step.communication, step.seconds)
            reached = (one.efficiency for one in (step, slow, in_turn))
            rows.append([model.name, f"{num_ranks}", f"{num_ranks * job.prompts}",
                         *(f"{part:.2f} s" for part in parts), *(f"{value:.2f}" for value in reached)])  # fmt: skip
    return table(("model", "GPUs", "prompts per step", "rollout", "update", "uneven ranks", "communication", "step",
                  "efficiency", "one port per node", "dealt in turn"), rows)  # fmt: skip


def batch_table() -> str:
    rows = []
    for model in (JANUS_1B, JANUS_7B):
        for prompts in (1, 2, 4, 8, 16):
            steps = [step_of(model, Machine(), Job(prompts=prompts), num_ranks) for num_ranks in SIZES]
            reached = [step.efficiency for step in steps]
            rate = prompts / steps[-1].seconds * SIZES[-1]
            rows.append([model.name, f"{prompts}", f"{prompts * SIZES[-1]}", *(f"{value:.2f}" for value in reached),
                         f"{steps[-1].seconds:.1f} s", f"{rate:.0f}"])  # fmt: skip
    return table(("model", "prompts per GPU", "per step at 1,024", *(f"efficiency at {size:,}" for size in SIZES),
                  "step at 1,024", "prompts/s at 1,024"), rows)  # fmt: skip


def stage_table() -> str:
    """What is held and moved by ZeRO stage, on 64 GPUs; a frozen reference included, activations and keys not."""
    rows = []
    for model in (JANUS_1B, JANUS_7B):
        for stage in range(4):
            job = Job(zero_stage=stage)
            step = step_of(model, Machine(), job, 64)
            held = held_bytes(model, stage, 64)
            rows.append([model.name, f"{stage}", f"{held_bytes(model, stage, 8) / GB:.0f} GB", f"{held / GB:.0f} GB",
                         f"{step.communication:.2f} s", f"{step.communication / step.seconds:.1%}"])  # fmt: skip
    return table(("model", "ZeRO", "held per GPU of 8", "of 64", "communication at 64", "of the step"), rows)


def held_bytes(model: Model, stage: int, num_ranks: int) -> float:
    """Weights, gradients, masters and moments of a rank, and the frozen reference, which is whole on every rank.

    Under ZeRO 3 sampling gathers whole weights, so they count."""
    share = [1 if stage < least else 1 / num_ranks for least in (1, 2)]
    return model.trained * (2 + 2 + STATE_BYTES * share[0] + 2 * share[1])


def survival_table() -> str:
    rows = []
    for model in (JANUS_1B, JANUS_7B):
        for num_ranks in SIZES:
            job, machine = Job(), Machine()
            step, found = step_of(model, machine, job, num_ranks), survival_of(model, machine, job, num_ranks)
            rows.append([model.name, f"{num_ranks}", duration(found.between), f"{found.rank_bytes / GB:.2g} GB",
                         duration(found.blocked), duration(found.background), duration(found.interval),
                         f"{found.interval / step.seconds:.0f}", duration(found.restart),
                         f"{found.lost(found.interval):.2%}", f"{found.lost(20 * step.seconds):.2%}"])  # fmt: skip
    return table(("model", "GPUs", "between interruptions", "written per rank", "training stops", "in background",
                  "best interval", "in steps", "restart", "lost then", "lost at 20 steps"), rows)  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table, "batch": batch_table, "stage": stage_table, "survival": survival_table,
}  # fmt: skip


def placed(page: str) -> str:
    """The page with each table between its marks."""
    for name, made in TABLES.items():
        page, count = re.subn(f"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", made() + "\n", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"scaling_model: the page has {count} places for the table {name!r}")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, or puts them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    given = parser.parse_args(arguments)
    if given.write is not None:
        given.write.write_text(placed(given.write.read_text()))
        return
    for name, made in TABLES.items():
        print(f"\n### {name}\n\n{made()}")


if __name__ == "__main__":
    main()
