"""Stage 1: a policy answers and draws every item of a benchmark, into a folder that outlives any interruption.

What an item becomes depends on the seed, its id and its fixed batch alone: a run that was killed anywhere and started
again leaves the same texts and the same PNG files, bit by bit, as one that was not.  Texts are drawn greedily and at
the sampling temperature, images by sampling; a chained prompt (rea, dense_rea) is drawn from the text that the model
itself has just written, so rea always precedes rea_gen.

Several ranks (torch.distributed) share out the batches; rank 0 then joins their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..errors import EvaluationError
from ..policies.base import Policy
from ..processes.group import barrier, place
from ..records import Prompt
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling
from .drawing import choose, drawer, texts_alone
from .manifest import Settings, claim, describe
from .store import Item, Key, Store

Progress = Callable[[int, int], None]
"""Called after every batch with the number of trajectories that are on disk, and of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts of one task that are always generated together."""

    prompts: tuple[Prompt, ...]
    members: int
    """Trajectories of each prompt."""

    @property
    def keys(self) -> list[Key]:
        return [(prompt.id, member) for prompt in self.prompts for member in range(self.members)]


def plan(items: Mapping[str, Sequence[Prompt]], settings: Settings) -> list[Batch]:
    """The fixed batches of a run, task by task.

    Raises:
        EvaluationError: two items have the same id, or there is none at all.
    """
    seen: set[str] = set()
    for prompt in (prompt for prompts in items.values() for prompt in prompts):
        if prompt.id in seen:
            raise EvaluationError(f"two items have the id {prompt.id!r}; ids name files, so give each its own")
        seen.add(prompt.id)
    if not seen:
        raise EvaluationError("there is no item to evaluate; check data, split and tasks")
    size = settings.batch_size
    return [
        Batch(prompts=tuple(group[start : start + size]), members=settings.images_per_prompt if draws else 1)
        for prompts in items.values()
        for draws in (False, True)
        if (group := [prompt for prompt in prompts if ("image" in prompt.segments) is draws])
        for start in range(0, len(group), size)
    ]


def select(
    items: Mapping[str, Sequence[Prompt]], tasks: Sequence[str] = (), num_items: int | None = None
) -> dict[str, list[Prompt]]:
    """The wanted tasks, at most `num_items` of each: always the same ones, spread over a benchmark's categories.

    Prompts of one sample count as one.

    Raises:
        EvaluationError: a task that the data does not have.
    """
    unknown = [task for task in tasks if task not in items]
    if unknown:
        raise EvaluationError(f"tasks: the data has no {', '.join(unknown)}; it has {', '.join(items)}")
    wanted = {task: items[task] for task in (tasks or items)}
    return {task: list(all_) if num_items is None else _some(all_, num_items) for task, all_ in wanted.items()}


def _some(prompts: Sequence[Prompt], num_items: int) -> list[Prompt]:
    """At most `num_items` samples, whole, spread evenly over the published categories where the prompts have any.

    A sample is whole because MMBench asks a question several times, and all of them count together.
    """
    first = {prompt.sample or prompt.id: prompt for prompt in reversed(prompts)}
    groups: dict[str, list[Prompt]] = {}
    for name in dict.fromkeys(prompt.sample or prompt.id for prompt in prompts):
        groups.setdefault(_category(first[name]), []).append(first[name])
    taken = dict.fromkeys(groups, 0)
    while sum(taken.values()) < min(num_items, len(first)):
        open_ = [group for group in groups if taken[group] < len(groups[group])]
        for group in open_[: num_items - sum(taken.values())]:
            taken[group] += 1
    chosen = {prompt.sample or prompt.id for group, some in groups.items() for prompt in choose(some, taken[group], 0)}
    return [prompt for prompt in prompts if (prompt.sample or prompt.id) in chosen]


def _category(prompt: Prompt) -> str:
    """Of a benchmark's prompt its published one, and GenEval's tag; "" for any other prompt."""
    metadata = prompt.extra.get("geneval_metadata")
    tag = metadata.get("tag") if isinstance(metadata, Mapping) else None
    return str(tag or (prompt.extra.get("group") if "benchmark" in prompt.extra else ""))


def generate_items(
    policy: Policy,
    items: Mapping[str, Sequence[Prompt]],
    folder: Path,
    settings: Settings,
    *,
    model_name: str = "",
    source: str = "",
    progress: Progress | None = None,
) -> list[Item]:
    """Generates what the folder lacks, and returns everything that it then has, in order (on rank 0; [] elsewhere).

    Args:
        policy: in eval mode, on its device.
        items: task -> prompts.
        folder: new, or of an interrupted run with the same settings.
        settings: of the sampling.
        model_name: how the manifest calls the model.
        source: how the manifest calls the data.
        progress: told about every batch.

    Raises:
        EvaluationError: the folder was made with another model, other data or settings, or does not hold items.
        PictureError: an item's picture cannot be read.
    """
    rank, world_size = place()
    batches = plan(items, settings)
    order = [key for batch in batches for key in batch.keys]
    manifest = describe(policy, model_name, items, source, settings)
    if rank == 0:
        claim(folder, manifest)
        Store(folder).settle(order)
    barrier()
    store = Store(folder, rank)
    done = {item.key for item in store.read()}
    barrier()
    engine = RolloutEngine(policy)
    try:
        for batch in batches[rank::world_size]:
            missing = [key for key in batch.keys if key not in done]
            if missing:
                for item, image in draw_batch(engine, batch, settings):
                    if item.key not in done:
                        store.append(item, image)
                        done.add(item.key)
                store.commit()
            if progress is not None:
                progress(len(done), len(order))
    finally:
        store.close()
        engine.release()
    barrier()
    return store.settle(order) if rank == 0 else []


def draw_batch(engine: RolloutEngine, batch: Batch, settings: Settings) -> Iterator[tuple[Item, Tensor | None]]:
    """Every trajectory of a batch, with its image [3, H, W] in [0, 1] where it draws one."""
    sampling = Sampling(
        num_generations=1,
        max_text_tokens=settings.max_text_tokens,
        cfg_weight=settings.cfg_weight,
        unconditional=settings.unconditional,
        drawing_turn=settings.drawing_turn,
        image_steps=settings.image_steps,
        image_noise=settings.image_noise,
        seed=settings.seed,
    )
    asked = [prompt for prompt in batch.prompts if "text" in prompt.segments]
    greedy: dict[str, str] = {}
    if settings.greedy_texts and asked:
        greedy = {rollout.prompt.id: rollout.text for rollout in drawer(engine, sampling)(texts_alone(asked), 0.0)}
    draws = any("image" in prompt.segments for prompt in batch.prompts)
    if draws or settings.sampled_texts:
        draw = drawer(engine, replace(sampling, num_generations=batch.members))
        for rollout in draw(batch.prompts, settings.temperature):
            item = Item(
                prompt=rollout.prompt,
                member=rollout.member,
                greedy=greedy.get(rollout.prompt.id) if rollout.member == 0 else None,
                sampled=rollout.text if "text" in rollout.prompt.segments else None,
                follow_up_text=rollout.follow_up_text,
            )
            yield item, rollout.image
        return
    for prompt in batch.prompts:
        yield Item(prompt=prompt, greedy=greedy.get(prompt.id)), None
