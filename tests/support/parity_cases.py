"""Small models of the real classes over a grid of configurations, and transformers' `generate` with our random numbers.

`OurDraws` stands at the end of transformers' logits processors: it draws from the logits that transformers has made by
the sampler's own op, seed and offset, so that both sides must give the same tokens wherever their logits agree. Where a
draw hangs on less than NEAR, either token is right, and what follows is another text.

Dims: V vocabulary, K ids that may be drawn, n tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from helpers import sharp_policy
from small_emu3 import IMAGE_SIZE, sharp_emu3
from torch import Tensor
from transformers import (
    CohereConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    GemmaConfig,
    GraniteConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Rollout
from syncr1.engine.rollout.sampling import Sampling, trajectory_key
from syncr1.kernels.api import cfg_sample

NEAR = 1e-4
POSITIONS = 160
WINDOW = 12
Cell = tuple[type[PreTrainedConfig], dict[str, Any]]


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CELLS: dict[str, Cell] = {
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "one key head": (LlamaConfig, {"num_key_value_heads": 1}),
    "as many key heads": (LlamaConfig, {"num_key_value_heads": 4}),
    "wide heads and biases": (LlamaConfig, {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "padded vocabulary": (LlamaConfig, {"padding": 77, "tie_word_embeddings": True}),
    "linear rope": (LlamaConfig, rope("linear", factor=2.0)),
    "dynamic rope": (LlamaConfig, rope("dynamic", factor=2.0)),
    "llama3 rope": (LlamaConfig, rope("llama3", **LLAMA3)),
    "yarn rope": (LlamaConfig, rope("yarn", factor=4.0, original_max_position_embeddings=40)),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "no window": (MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "a window that hides nothing": (MistralConfig, {"sliding_window": POSITIONS, "head_dim": 16}),
    "gelu and a large epsilon": (LlamaConfig, {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2}),
}
"""Decoders that go into each model."""
TEXT_ONLY: dict[str, Cell] = {
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.0625, "use_qk_norm": False}),
}
HIDING: dict[str, Cell] = {
    "a window": (MistralConfig, {"sliding_window": WINDOW, "head_dim": 8}),
    "layers with a window": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
}
"""Decoders that hide keys, which no policy may take."""


def random_cell(seed: int) -> Cell:
    """Any of the cells, with other numbers."""
    draw = random.Random(seed)
    kind, own = draw.choice(list(CELLS.values()))
    heads = draw.choice([2, 4, 8])
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "intermediate_size": draw.choice([48, 96, 130]),
        "initializer_range": draw.choice([0.1, 0.2]),
    }
    return kind, sizes | own if heads != 2 else own


def config_of(cell: Cell, hidden: int, vocabulary: int, **fixed: Any) -> PreTrainedConfig:
    kind, own = cell
    own = dict(own)
    sizes = {
        "vocab_size": vocabulary + own.pop("padding", 0),
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return kind(**sizes | own | fixed)


def seeded(make: Any, seed: int) -> Any:
    """A model whose norms and biases count, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "vqmodel" not in name:
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model.eval()


def janus_of(cell: Cell, seed: int, *, image_size: int = 32) -> tuple[Any, Any]:
    """(a tiny Janus with the cell's decoder inside, its processor); pictures seen and drawn of `image_size` pixels."""
    known = sharp_policy()
    old, processor = known.model.config, copy.deepcopy(known.processor)
    named = {name: getattr(old.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision, vq = copy.deepcopy(old.vision_config), copy.deepcopy(old.vq_config)
    vision.image_size, slots = image_size, (image_size // vision.patch_size) ** 2
    vision.num_image_tokens, vq.num_patches = slots, image_size // vision.patch_size
    text = config_of(cell, old.text_config.hidden_size, old.text_config.vocab_size, **named)
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=old.image_token_id,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    model = seeded(lambda: JanusForConditionalGeneration(config), seed)
    model.model.vqmodel.load_state_dict(known.model.model.vqmodel.state_dict())
    model.model.generation_head.vision_head.weight.data.mul_(4)
    model.generation_config = copy.deepcopy(known.model.generation_config)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    processor.num_image_tokens = slots
    return model, processor


def janus_policy(model: Any, processor: Any) -> JanusPolicy:
    return JanusPolicy(copy.deepcopy(model), processor).eval()


def emu3_of(seed: int, **sizes: Any) -> tuple[Any, Any]:
    """(a small Emu3 with another decoder inside, its processor)."""
    known = sharp_emu3()
    old, processor = known.model.config, copy.deepcopy(known.processor)
    text = copy.deepcopy(old.text_config)
    text.vocab_size += sizes.pop("padding", 0)
    for name, value in sizes.items():
        setattr(text, name, value)
    text.head_dim = text.hidden_size // text.num_attention_heads
    config = Emu3Config(
        text_config=text, vq_config=old.vq_config, vocabulary_map=old.vocabulary_map, image_area=IMAGE_SIZE**2
    )
    model = seeded(lambda: Emu3ForConditionalGeneration(config), seed)
    model.generation_config = copy.deepcopy(known.model.generation_config)
    return model, processor


def emu3_policy(model: Any, processor: Any) -> Emu3Policy:
    return Emu3Policy(copy.deepcopy(model), processor).eval()


class OurDraws(LogitsProcessor):
    """Makes transformers' greedy search take what our sampler would have drawn from its logits.

    Args:
        rollout: ours, for the key of its random numbers.
        sampling: that it was made with.
        offset: of the segment's first token.
        allowed: [K] ids of the text vocabulary that may be drawn, in the order of ours; None: all, but `forbidden`.
        forbidden: [F] ids that are not drawn.
        weight: guidance, of scores that have both branches; None: they are mixed already, or there is one.
        forced: [n] ids that stand there and are not drawn, -1 elsewhere; None: none.
    """

    def __init__(
        self,
        rollout: Rollout,
        sampling: Sampling,
        offset: int,
        *,
        allowed: Tensor | None = None,
        forbidden: Tensor | None = None,
        weight: float | None = None,
        forced: Tensor | None = None,
    ) -> None:
        self.key = torch.tensor([trajectory_key(sampling, rollout.prompt, rollout.member)])
        self.sampling, self.step, self.offset = sampling, 0, offset
        self.allowed, self.forbidden, self.weight, self.forced = allowed, forbidden, weight, forced
        self.seen: list[tuple[Tensor, Tensor | None]] = []
        """Logits of each draw."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cond, free = (scores, None) if self.weight is None else scores.chunk(2)
        if self.allowed is not None:
            cond = cond[:, self.allowed]
        given = -1 if self.forced is None else int(self.forced[self.step])
        self.seen.append((cond.float(), None if free is None else free.float()))
        token = given if given >= 0 else self._draw(self.step, *self.seen[-1])
        self.step += 1
        return torch.full((1, scores.shape[-1]), -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    def _draw(self, step: int, cond: Tensor, free: Tensor | None) -> int:
        token = cfg_sample(
            cond,
            free,
            cfg_weight=1.0 if self.weight is None else self.weight,
            temperature=self.sampling.temperature,
            seed=self.key,
            offset=torch.tensor([self.offset + step]),
            forbidden=self.forbidden,
        ).token
        return int(token if self.allowed is None else self.allowed[token])

    def near(self, step: int) -> bool:
        """Whether another rounding of the logits might give another token."""
        cond, free = self.seen[step]
        noise = torch.Generator().manual_seed(step)
        shifts = [NEAR * torch.randn(cond.shape, generator=noise) for _ in range(8)]
        return len({self._draw(step, cond + shift, free) for shift in shifts}) > 1


def same_tokens(mine: Sequence[int], theirs: Sequence[int], near: Callable[[int], bool]) -> bool:
    """Whether all are equal; AssertionError where they part at a place that is not `near`."""
    for place, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            assert near(place), (place, list(mine), list(theirs))
            return False
    assert len(mine) == len(theirs), (list(mine), list(theirs))
    return True


def plain(policy: Policy, attention: str = "eager") -> Any:
    """The same weights with transformers' own attention."""
    model = copy.deepcopy(policy.model).eval()
    model.set_attn_implementation(attention)
    return model
