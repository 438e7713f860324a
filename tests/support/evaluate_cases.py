"""What the tests of stage 1 and stage 2 share: an untrained tiny Janus, a few items, folders compared byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from made import world_folder
from torch import Tensor

from syncr1.engine.data.prompts import load_benchmark
from syncr1.engine.evaluate.generate import generate_items, select
from syncr1.engine.evaluate.manifest import Settings
from syncr1.engine.evaluate.store import Item, Store
from syncr1.engine.pictures import ImageRef, open_picture, to_tensor
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt
from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.texts import VOCABULARY
from syncr1.engine.world.tiny_janus import build_policy

SETTINGS = Settings(max_text_tokens=6, images_per_prompt=2, batch_size=2)


@lru_cache(maxsize=2)
def policy(seed: int = 0) -> JanusPolicy:
    return build_policy(VOCABULARY, [concept.name for concept in CONCEPTS], seed=seed).eval()


def few_items() -> dict[str, list[Prompt]]:
    """Six prompts, ten trajectories with SETTINGS: answers, chains and drawings."""
    chosen = select(load_benchmark(world_folder()), ("rec", "rea", "pure_gen"), 2)
    return {
        **chosen,
        "rec": chosen["rec"][:1],
        "qa": [Prompt(id="qa/0", task="qa", text="what is it?", segments=("text",), answer="red")],
    }


def generated(items: dict[str, list[Prompt]], folder: Path, settings: Settings = SETTINGS) -> Path:
    generate_items(policy(), items, folder, settings, model_name="tiny", source="world")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Colours:
    """A CLIP of three dimensions: an image's mean colour, and how often a text says red, green and blue."""

    def __init__(self) -> None:
        self.num_texts = self.num_images = 0

    def clip_t(self, images: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        self.num_texts += len(texts)
        said = [torch.tensor([float(text.split().count(c)) for c in ("red", "green", "blue")]) for text in texts]
        return [self._cosine(image.mean((1, 2)), words) for image, words in zip(images, said, strict=True)]

    def clip_i(self, images: Sequence[Tensor], references: Sequence[Sequence[ImageRef]]) -> list[float | None]:
        self.num_images += len(images)
        shown = [[to_tensor(open_picture(ref), 4).mean((1, 2)) for ref in refs] for refs in references]
        return [
            sum(self._cosine(image.mean((1, 2)), photo) for photo in photos) / len(photos)
            for image, photos in zip(images, shown, strict=True)
        ]

    def _cosine(self, a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def plain(colour: tuple[float, float, float], size: int = 4) -> Tensor:
    """[3, size, size] of one colour."""
    return torch.tensor(colour)[:, None, None].expand(3, size, size).clone()


def written(folder: Path, rows: Sequence[tuple[Item, Tensor | None]]) -> list[Item]:
    """The items as stage 1 would have left them, with a manifest."""
    from syncr1.engine.evaluate.manifest import claim

    tasks: dict[str, set[str]] = {}
    for item, _ in rows:
        tasks.setdefault(item.prompt.task, set()).add(item.prompt.id)
    members = max(item.member for item, _ in rows) + 1
    counts = {task: len(ids) for task, ids in tasks.items()}
    claim(
        folder,
        {
            "format": 1,
            "model": {"name": "by/hand"},
            "data": {"items": counts},
            "sampling": {"images_per_prompt": members},
        },
    )
    store = Store(folder)
    for item, image in rows:
        store.append(item, image)
    store.close()
    return store.settle([item.key for item, _ in rows])
