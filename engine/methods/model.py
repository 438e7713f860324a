"""A checkpoint to talk to from Python: it answers, draws, and reasons before it draws.

    model = Model.load("runs/sync_r1/checkpoints/last")
    model.draw("draw <bobo> at the place it likes.").save("bobo.png")

It samples with the engine that trains: the same templates, the same heads, the same random numbers for a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from ..checkpoints.published import local_checkpoint
from ..errors import ConfigError
from ..pictures import ImageRef, StoredImage
from ..policies.auto import load_policy
from ..policies.base import Policy
from ..policies.inputs import check_fit, checkpoint_notes
from ..processes.group import own_device
from ..records import Prompt, Rollout, SegmentKind
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling
from ..show.sheets import to_picture
from .starting import limit_threads, quieten
from .trained_with import run_of, trained_filling, trained_inputs, trained_unconditional


class Model:
    """A policy in eval mode, ready to be sampled from.

    Args:
        policy: on its device, with whole weights.
        name: how it is called, in messages and tables.
    """

    def __init__(self, policy: Policy, name: str) -> None:
        self.policy, self.name = policy.eval().requires_grad_(False), name
        self._engine = RolloutEngine(self.policy)

    @classmethod
    def load(
        cls, name: str | Path | None = None, *, bf16: bool = False, device: str | torch.device | None = None
    ) -> Self:
        """Loads a checkpoint; photos and prompts are prepared as its run did it, else as its own processor does. What
        is worth knowing of it is printed: half of a task that it was trained for, an argument that nothing reads.

        Args:
            name: folder or hub name, in transformers' format or DeepSeek's; None: the tiny base of the rendered
                world, which is trained on first use (minutes) and kept.
            bf16: weights and computation in bfloat16.
            device: where; None: the first GPU, else the CPU.

        Raises:
            ConfigError: there is no such checkpoint, no policy for it, or no way to give it pictures.
        """
        model = cls.unchecked(name, bf16=bf16, device=device)
        check_fit(model.policy)
        for line in (*checkpoint_notes(model.policy), *model.policy.remarks(())):
            print(f"{model.name}: {line}")
        return model

    @classmethod
    def unchecked(
        cls, name: str | Path | None = None, *, bf16: bool = False, device: str | torch.device | None = None
    ) -> Self:
        """`load` for who prepares its inputs in another way, and checks and tells that by himself."""
        quieten()
        if name is None:
            from ..world.base_model import BaseSettings
            from ..world.embedded import tiny_base

            name = tiny_base(BaseSettings(), print)
        dtype = torch.bfloat16 if bf16 else torch.float32
        policy = trained_inputs(name).given_to(load_policy(local_checkpoint(name, print), dtype=dtype))
        limit_threads(policy)
        return cls(policy.to(own_device() if device is None else device), str(name))

    @property
    def draws(self) -> bool:
        """Whether it has an image vocabulary."""
        return self.policy.num_image_tokens > 0

    def sample(self, prompts: Sequence[Prompt], num: int = 1, **sampling: Any) -> list[Rollout]:
        """`num` trajectories of each prompt, those of a prompt adjacent, in the order of the prompts.

        Args:
            prompts: with unique ids, which key the random numbers.
            num: of each prompt.
            sampling: further fields of `Sampling`: temperature, max_text_tokens, cfg_weight, drawing_turn, seed;
                unconditional, image_steps and image_noise, if they are not given, are as the checkpoint's run has them.

        Raises:
            ConfigError: a prompt that the model cannot take.
            RolloutTooLarge: the keys and values do not fit into memory.
        """
        trained = {"unconditional": trained_unconditional(self.name), **trained_filling(self.name)}
        asked: dict[str, Any] = trained | sampling
        try:
            return self._engine.generate(prompts, Sampling(num_generations=num, **asked))
        except ValueError as error:
            if not str(error).startswith("generate: "):
                raise
            raise ConfigError(str(error)) from error

    def answer(
        self,
        question: str,
        image: ImageRef | Sequence[ImageRef] | None = None,
        *,
        temperature: float = 0.0,
        max_text_tokens: int = 128,
        seed: int = 0,
    ) -> str:
        """What the model says to a question, about `image` where one is shown; of several each goes where the question
        says `<image>`, in order. Greedily but for a `temperature`."""
        images = () if image is None else (image,) if isinstance(image, Path | StoredImage) else tuple(image)
        asked = prompt_of(question, ("text",), images)
        (made,) = self.sample([asked], temperature=temperature, max_text_tokens=max_text_tokens, seed=seed)
        return made.text

    def draw(
        self,
        text: str,
        *,
        cfg_weight: float = 1.5,
        temperature: float = 1.0,
        image_steps: int | None = None,
        seed: int = 0,
    ) -> Image.Image:
        """The picture that the model draws of `text`, with guidance `cfg_weight` (Janus-Pro: 5), and, where it fills
        images in (Show-o), in `image_steps` steps; None: as the checkpoint's run, else 16."""
        asked = prompt_of(text, ("image",))
        steps = {} if image_steps is None else {"image_steps": image_steps}
        (made,) = self.sample([asked], cfg_weight=cfg_weight, temperature=temperature, seed=seed, **steps)
        return picture_of(made)

    def reason_and_draw(
        self,
        text: str,
        *,
        cfg_weight: float = 1.5,
        temperature: float = 1.0,
        max_text_tokens: int = 128,
        drawing_turn: str | None = None,
        seed: int = 0,
    ) -> tuple[str, Image.Image]:
        """Sync-R1's chain, one trajectory: what the model says about the request, and what it then draws, in a
        `drawing_turn` or none; None: as the checkpoint's run has it."""
        if drawing_turn is None:
            run = run_of(self.name)
            drawing_turn = "none" if run is None else run.drawing_turn
        asked = prompt_of(text, ("text", "image"))
        (made,) = self.sample(
            [asked],
            cfg_weight=cfg_weight,
            temperature=temperature,
            max_text_tokens=max_text_tokens,
            drawing_turn=drawing_turn,
            seed=seed,
        )
        return made.text, picture_of(made)


def prompt_of(text: str, segments: tuple[SegmentKind, ...], images: Sequence[ImageRef] = (), number: int = 0) -> Prompt:
    """A prompt that somebody typed; `number` tells those of one session apart."""
    return Prompt(id=f"prompt/{number:04}", task="prompt", text=text, segments=segments, images=tuple(images))


def picture_of(rollout: Rollout) -> Image.Image:
    """The drawn image of a trajectory that has one."""
    assert rollout.image is not None
    return to_picture(rollout.image)
