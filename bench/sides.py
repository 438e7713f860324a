"""Both sides of the rollout and step benchmarks: one set of weights twice, the same prompts, the same rewards.

Dims: P prompts, G members, S sequences, R text tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import models
import torch
import transformers
from models import Size
from released import Rewards, one_copy
from torch import Tensor

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt


@dataclass(frozen=True, slots=True)
class Work:
    """How much is done."""

    questions: int
    """Prompts with a photo, in the rollout benchmark."""
    drawings: int
    """Prompts without, in the rollout benchmark."""
    pairs: int
    """Of one question and one drawing, in a whole step."""
    group: int
    """G."""
    prompt_tokens: int
    """Text tokens of a prompt, its photo apart."""
    text_tokens: int
    """R: of an answer."""
    cfg_weight: float = 5.0


CPU = Work(4, 2, 2, 8, 64, 64)
QUICK = Work(2, 2, 1, 4, 12, 6)
CUDA = Work(8, 8, 4, 8, 64, 256)


def work_of(device: str, quick: bool) -> Work:
    """What a run does."""
    return QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]


class Sides:
    """The policy, the peer's copy of its weights, and the prompts as each side takes them.

    Args:
        size: of the model.
        work: how much is done.
        folder: where the photos lie.
        num_questions, num_drawings: prompts of each kind.
    """

    def __init__(self, size: Size, work: Work, folder: Path, num_questions: int, num_drawings: int) -> None:
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.size, self.work = size, work
        self.policy: JanusPolicy = models.build_policy(size)
        self.peer = one_copy(self.policy)
        self.questions = [models.question(i, work.prompt_tokens, folder, size) for i in range(num_questions)]
        self.drawings = [models.drawing(i, work.prompt_tokens, size) for i in range(num_drawings)]
        self.forbidden: list[int] = models.forbidden_ids(self.policy.processor).tolist()
        self.pad_id = int(self.policy.tokenizer.pad_token_id)

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token, all layers."""
        return self.policy.cache_shape().num_bytes(1)

    def ids(self, prompts: list[Prompt]) -> Tensor:
        """[P, L] int64, for the peer."""
        return models.peer_ids(self.policy, prompts)

    def pixels(self) -> Tensor:
        """[P, 3, H, W] of the questions' photos, for the peer."""
        return models.peer_pixels(self.policy, self.questions)


@contextmanager
def photo_folder() -> Iterator[Path]:
    """Lasts as long as the benchmark."""
    with tempfile.TemporaryDirectory(prefix="syncr1-bench-") as name:
        yield Path(name)


def text_score(tokens: Tensor) -> Tensor:
    """[S, R] -> [S] in [0, 1]: the share of even ids."""
    return (tokens % 2 == 0).float().mean(-1)


def image_score(images: Tensor) -> Tensor:
    """[S, 3, H, W] in [0, 1] -> [S] in [0, 1]: how red the pictures are."""
    return images[:, 0].float().mean((1, 2)).cpu()


PEER_REWARDS = Rewards(text=lambda tokens: text_score(tokens).cpu(), image=image_score)


def our_text_reward(*, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """The same, with the signature of the engine's rewards."""
    return [float(text_score(torch.tensor(ids))) if ids else None for ids in completion_ids]


def our_image_reward(*, images: list[Tensor | None], **_: Any) -> list[float | None]:
    """The same."""
    return [None if image is None else float(image_score(image[None])[0]) for image in images]
