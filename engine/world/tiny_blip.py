"""A tiny BLIP that captions the rendered world: transformers' classes and files, only the sizes differ from BLIP-base.

The cycle reward captions a drawing and compares the caption with the prompt. A captioner that has seen only clean
renders would be fooled by what a policy draws, so this one also learns from tokenizer round trips, among them some
with damaged image tokens (the caption stays that of the undamaged look). Held-out looks are never shown; of them it
names every attribute of renders and photos, and .997 of their round trips'.

Dims: n pictures [n, 3, 32, 32] in [0, 1]; L caption tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

from .attributes import LOOK_INDEX, LOOKS, TRAIN_LOOKS, VALUES, Look
from .kept import Kept
from .render import SIZE, canonical_table
from .supervised import one_thread
from .texts import fill, split_words
from .tiny_janus import INITIALIZER_RANGE
from .vq import decode, encode, load_vq, to_pixels
from .x2x import photograph

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[DEC]", "[SEP]"
WORDING: Final = "a {shape} {colour} {pattern} creature with {a_hat} at the {place}."
HIDDEN, LAYERS, HEADS, MLP, PATCH = 96, 2, 4, 192, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BlipSettings:
    """How the captioner is made; its cache is keyed by all of this."""

    seed: int = 0
    steps: int = 240
    batch: int = 48
    learning_rate: float = 3e-3
    photos: int = 6
    """Photos of each look."""
    drawings: int = 3
    """Round trips of each look's render and of one photo, all but the first with damaged tokens."""
    probe_weight: float = 0.5
    """Of a linear map that reads the attributes off the vision tower in training: shapes are learnt far sooner."""
    damage: float = 0.06
    """Share of image tokens replaced, in those, by another look's."""


def caption(look: Look) -> str:
    """The caption of a look, e.g. `a round red plain creature with a crown at the beach.`"""
    return fill(WORDING, look=look)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions, in BERT's frame `[DEC] … [SEP]`, which is BLIP's."""
    words = sorted({word for look in LOOKS for word in split_words(caption(look))})
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([PAD, UNKNOWN, START, END, *words])}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=START, sep_token=END, eos_token=END
    )


def build_blip(seed: int = 0) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """An untrained tiny BLIP and its processor; a seed gives the same weights."""
    tokenizer = build_tokenizer()
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    sizes |= {"initializer_range": INITIALIZER_RANGE}
    config = BlipConfig(
        text_config=sizes
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "encoder_hidden_size": HIDDEN,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=sizes | {"image_size": SIZE, "patch_size": PATCH},
        projection_dim=HIDDEN,
        image_text_hidden_size=HIDDEN,
        initializer_range=INITIALIZER_RANGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
    half = [0.5, 0.5, 0.5]
    pictures = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half)
    return model, BlipProcessor(pictures, tokenizer)


class _Pictures:
    """What the captioner is shown: photos, canonical renders, and round trips of both with damaged tokens."""

    def __init__(self, settings: BlipSettings) -> None:
        rng = np.random.default_rng([settings.seed, 3])
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.rows = [LOOK_INDEX[look] for look in TRAIN_LOOKS]
        photos = [to_pixels(np.stack([photograph(rng, look) for look in TRAIN_LOOKS])) for _ in range(settings.photos)]
        plain = to_pixels(canonical_table()[self.rows])
        vq = load_vq()
        self.own = torch.cat([plain, *photos])
        codes = torch.cat([encode(vq, part) for part in (plain, photos[0])])
        copies = [codes] + [self._damaged(codes) for _ in range(settings.drawings - 1)]
        self.drawn = torch.cat([decode(vq, part) for copy in copies for part in copy.split(96)])

    def _damaged(self, codes: Tensor) -> Tensor:
        wrong = torch.rand(codes.shape, generator=self.generator) < self.settings.damage
        # A replacement is another look's code at the same place, as a policy's mistake would be.
        other = torch.randint(codes.shape[0], codes.shape, generator=self.generator)
        return torch.where(wrong, codes.gather(0, other), codes)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Pixels [n, 3, 32, 32] in [-1, 1] and rows of TRAIN_LOOKS [n]: half photos and renders, half drawings."""
        size = self.settings.batch // 2
        picks = [torch.randint(len(table), (size,), generator=self.generator) for table in (self.own, self.drawn)]
        pixels = torch.cat([self.own[picks[0]], self.drawn[picks[1]]])
        noise = torch.randn(pixels.shape, generator=self.generator)
        amount = 0.1 * torch.rand(len(pixels), 1, 1, 1, generator=self.generator)
        return (pixels + amount * noise).clamp(-1, 1), torch.cat(picks) % len(self.rows)


@one_thread()
def train_blip(
    settings: BlipSettings, report: Callable[[int, float], None] | None = None, kept: Kept | None = None
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """Trains the captioner from scratch; the same settings give the same weights on the same machine.

    Args:
        settings: see BlipSettings.
        report: called with (step, loss) after every step.
        kept: where it goes on after it was cut off, to the same weights.
    """
    model, processor = build_blip(settings.seed)
    tokens = processor.tokenizer([caption(look) for look in TRAIN_LOOKS], padding=True, return_tensors="pt")
    pictures = _Pictures(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probe = nn.Linear(HIDDEN * (1 + (SIZE // PATCH) ** 2), sum(map(len, VALUES.values())))
    labels_LA = torch.tensor([look.indices() for look in TRAIN_LOOKS])
    trained = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if kept is not None:
        kept.watch(pictures.generator)
        first = kept.restore(trained, optimizer)
    model.train()
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 20, 1.02 - step / settings.steps)
            group["lr"] = settings.learning_rate * warm
        pixels, rows = pictures.batch()
        ids, mask = tokens.input_ids[rows], tokens.attention_mask[rows]
        labels = ids.masked_fill(mask == 0, -100)
        out = model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels)
        loss = out.loss + settings.probe_weight * _probe_loss(probe, out.image_embeds, labels_LA[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if kept is not None:
            kept.save(step + 1, trained, optimizer)
        if report is not None:
            report(step, out.loss.item())
    return model.eval(), processor


def _probe_loss(probe: nn.Linear, features: Tensor, labels_nA: Tensor) -> Tensor:
    """Mean cross-entropy of the attributes, read off the vision tower by one linear map."""
    logits = probe(features.flatten(1)).split([len(values) for values in VALUES.values()], dim=1)
    return sum((F.cross_entropy(x, labels_nA[:, i]) for i, x in enumerate(logits)), features.new_zeros(())) / len(
        VALUES
    )


def save_blip(folder: Path, model: Any, processor: Any) -> None:
    """Writes both as transformers does, so that `from_pretrained` finds an ordinary BLIP."""
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
