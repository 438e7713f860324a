"""Train an embedded world's image tokenizer; writes `vq.safetensors` and `vq_config.json` into `engine/world/`.

    OMP_NUM_THREADS=1 python recipes/tiny_vq.py
    OMP_NUM_THREADS=1 python recipes/tiny_vq.py --world digits --steps 1600       into `engine/world/digits/`
    OMP_NUM_THREADS=1 python recipes/tiny_vq.py --kind magvit      of both worlds, into `engine/world/filled/`
    OMP_NUM_THREADS=1 python recipes/tiny_vq.py --kind magvit --start engine/world/filled --decoder_alone \\
        --warm_steps 0 --learning_rate 3e-3 --seed 1      its second round, which changes no code

One thread, no data: renders are drawn on the fly, held-out looks never. The seed fixes everything on one kind of
machine. 23 minutes beside other work on a shared core (0.35 s a step when it is free); 1.1 M parameters, 2.2 MB in half
precision. Canonical renders come back at 32.1 dB (held-out looks 30.6 dB) with every attribute readable.

transformers' `JanusVQVAE.forward()` decodes from indices, so no gradient reaches the encoder through it. Here the
pieces are called one by one: z = normalise(quant_conv(encoder(x))) on the unit sphere, e = nearest codebook row,
decoder(post_quant_conv(z + stop_gradient(e - z))). Codebook rows stay on the sphere too and follow an exponential
moving average of the encodings.

    loss = mean w (|y - x| + 2 (y - x)^2) + 0.1 |z - stop_gradient(e)|^2 + local * far / spread

`far` compares two pictures that differ in one attribute: their encodings should agree wherever the 8x8 patches agree.
Without it normalisation and attention carry every attribute into every token, which a small language model then has to
learn. After 400 steps: 57 codes in use per position without, 35 with it; a linear map from attributes to tokens names
64 % of held-out looks' tokens right without, 74 % with it.

The tiny Show-o has a MAGVIT-v2, whose codes are signs: e = sign(z), no codebook. Its loss has beside commitment an
entropy term, `entropy * (that of a place's own bits - that of all codes used)`: bits are to be sure, codes all in use.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine 30-fold
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncr1.engine.policies.magvit import Magvit, MagvitConfig
from syncr1.engine.world import vq as world_vq
from syncr1.engine.world.digits import handwriting
from syncr1.engine.world.filled import sign_vq
from syncr1.engine.world.filled.tokenizer_pictures import Both, Digits, Rendered

if TYPE_CHECKING:
    from transformers.models.janus.modeling_janus import JanusVQVAE

PATCH = 8


@dataclass(frozen=True)
class Settings:
    """What the shipped weights were trained with."""

    kind: str = "janus"
    """`janus`, a JanusVQVAE, or `magvit`."""
    world: str = "rendered"
    """`rendered`, `digits` or `both`: whose pictures it is for."""
    steps: int = 2400
    """Optimiser steps."""
    batch: int = 32
    """Renders per step; an even number, since they come in pairs."""
    warm_steps: int = 100
    """Steps without quantisation before k-means places the codebook."""
    learning_rate: float = 1.5e-3
    """Peak of AdamW's learning rate: 50 steps of warm-up, then a cosine down to 2 %."""
    canonical_share: float = 0.5
    """Share of pairs without variation."""
    codes: int = 256
    """Codebook rows."""
    decay: float = 0.97
    """Of the codebook's moving average."""
    local: float = 0.1
    """Weight of the locality term."""
    decoder_alone: bool = False
    """Magvit's encoder stays as it is, and with it all codes."""
    entropy: float = 0.02
    """Weight of magvit's entropy term."""
    seed: int = 0
    """Of the weights, the renders and the restarts of dead rows."""


MAGVIT = Settings(kind="magvit", world="both", steps=1500, batch=16, warm_steps=150, learning_rate=2.5e-3)
"""What the shipped MAGVIT-v2 was trained with."""


def build_vq(settings: Settings) -> JanusVQVAE:
    """A fresh tokenizer, trainable: 32x32 pixels to 4x4 tokens."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=settings.codes,
        latent_channels=32,
        num_patches=4,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 2],
        num_res_blocks=1,
        projection_dim=128,
        image_token_embed_dim=128,
        num_hidden_layers=2,
    )
    vq = JanusVQVAE(config)
    for module in vq.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # transformers' normal(0.02) is far too small for a net that trains for minutes
    return vq.requires_grad_(True).train()


WORLDS: dict[str, type[Rendered] | type[Digits] | type[Both]] = {"rendered": Rendered, "digits": Digits, "both": Both}


def folder_of(settings: Settings) -> Path:
    """Where its weights are shipped."""
    if settings.kind == "magvit":
        return sign_vq.FOLDER
    return handwriting.FILE.parent if settings.world == "digits" else world_vq.FOLDER


class Codebook:
    """Unit rows `[K, C]` moved in place by a moving average; rows that nothing uses restart at an encoding."""

    def __init__(self, rows: Tensor, settings: Settings) -> None:
        self.rows = rows
        self.decay = settings.decay
        self.count = torch.ones(rows.shape[0])
        self.total = rows.clone()
        self.generator = torch.Generator().manual_seed(settings.seed)

    def place(self, z: Tensor, rounds: int = 15) -> None:
        """Spherical k-means on encodings z `[N, C]`, from random ones among them."""
        self.rows.copy_(z[torch.randperm(z.shape[0], generator=self.generator)[: self.rows.shape[0]]])
        for _ in range(rounds):
            self.update(z, decay=0.0)
        self.count.clamp_(min=1.0)

    def nearest(self, z: Tensor) -> Tensor:
        """Row numbers `[N]`; on the sphere the largest inner product is the smallest distance, HF's criterion."""
        return (z @ self.rows.T).argmax(-1)

    def update(self, z: Tensor, decay: float | None = None) -> None:
        """One step of the average towards encodings z `[N, C]`."""
        decay = self.decay if decay is None else decay
        hits = F.one_hot(self.nearest(z), self.rows.shape[0]).to(z.dtype)
        self.count.mul_(decay).add_(hits.sum(0), alpha=1.0 - decay)
        self.total.mul_(decay).add_(hits.T @ z, alpha=1.0 - decay)
        dead = self.count < 0.05
        if dead.any():
            self.total[dead] = z[torch.randint(z.shape[0], (int(dead.sum()),), generator=self.generator)]
            self.count[dead] = 1.0
        self.rows.copy_(F.normalize(self.total, dim=-1))


def locality(z: Tensor, x: Tensor) -> Tensor:
    """How far apart the encodings of equal patches in a pair lie, relative to the spread of all; z `[B, C, 4, 4]`."""
    gap = (x[0::2] - x[1::2]).abs().amax(1)
    equal = (gap.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).amax((-1, -2)) < 0.02).float()
    apart = (z[0::2] - z[1::2]).square().sum(1)
    spread = (z - z.mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
    return (apart * equal).sum() / equal.sum().clamp_min(1.0) / spread.clamp_min(0.05)


def learning_rate(step: int, settings: Settings) -> float:
    """Warm-up, then cosine."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * cosine)


def quantise(z: Tensor, codebook: Codebook) -> Tensor:
    """The nearest codebook row of every encoding, `[B, C, 4, 4]` like z, without gradient; moves the codebook."""
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    e = codebook.rows[codebook.nearest(flat)].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    codebook.update(flat)
    return e


class Learned:
    """A JanusVQVAE while it is trained: its codebook follows the encodings."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.vq = settings, build_vq(settings)
        self.codebook = Codebook(self.vq.quantize.embedding.weight.requires_grad_(False).data, settings)
        self._warm: list[Tensor] = []

    def step(self, x: Tensor, step: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Pixels -> what is decoded, the encodings that neighbours should share, and terms of the loss."""
        vq, warm_steps = self.vq, self.settings.warm_steps
        z = F.normalize(vq.quant_conv(vq.encoder(x)), dim=1)
        if step < warm_steps:
            self._warm = [*self._warm[-11:], z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])]
        elif step == warm_steps:
            self.codebook.place(torch.cat(self._warm))
        e = z.detach() if step < warm_steps else quantise(z, self.codebook)
        decoded = vq.decoder(vq.post_quant_conv(z + (e - z).detach()))
        return decoded, z, [0.1 * (z - e).square().sum(1).mean()]

    def round_trip(self, pictures: Tensor) -> Tensor:
        return world_vq.round_trip(self.vq, pictures)

    def codes(self, pictures: Tensor) -> Tensor:
        return world_vq.encode(self.vq, pictures * 2.0 - 1.0)

    def saved(self, folder: Path) -> Learned:
        """Writes it, and gives what was written."""
        world_vq.save_vq(self.vq.eval(), folder)
        back = copy.copy(self)
        back.vq = world_vq.load_vq(folder)
        return back


class Signs:
    """A MAGVIT-v2 while it is trained."""

    def __init__(self, settings: Settings, start: Path | None) -> None:
        config = MagvitConfig(
            bits=settings.codes.bit_length() - 1,
            channels=32,
            encoder_multipliers=(1, 1, 1, 2),
            encoder_blocks=(1, 1, 1, 1),
            decoder_multipliers=(1, 1, 1, 2),
            decoder_blocks=(1, 1, 1, 1),
        )
        self.settings, self.vq = settings, Magvit(config)
        if start is not None:
            self.vq.load_state_dict(sign_vq.load_sign_vq(start).state_dict())

    def step(self, x: Tensor, step: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As of `Learned`."""
        with torch.set_grad_enabled(not self.settings.decoder_alone):
            z = self.vq.encoder(x)
        e = torch.where(z > 0, 1.0, -1.0)
        given = z.tanh() if step < self.settings.warm_steps else z + (e - z).detach()
        terms = [0.1 * (z - e).square().mean(), self.settings.entropy * entropies(z)]
        return self.vq.decoder(given), z.tanh(), terms

    def round_trip(self, pictures: Tensor) -> Tensor:
        return sign_vq.round_trip(self.vq, pictures)

    def codes(self, pictures: Tensor) -> Tensor:
        return self.vq.encode(pictures * 2.0 - 1.0)

    def saved(self, folder: Path) -> Signs:
        sign_vq.save_sign_vq(self.vq, folder)
        back = copy.copy(self)
        back.vq = sign_vq.load_sign_vq(folder)
        return back


Trained = Learned | Signs


def entropies(z: Tensor) -> Tensor:
    """Entropy of a place's code minus that of the codes of all places, nats; z `[B, bits, 4, 4]`. p(bit) = sigmoid(4 z)
    is softmax over the codes of minus their distance squared."""
    p = torch.sigmoid(4 * z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
    own = -(p * (p + 1e-9).log() + (1 - p) * (1 - p + 1e-9).log())
    joint = torch.ones(len(p), 1)
    for bit in p.split(1, dim=1):
        joint = torch.cat([joint * (1 - bit), joint * bit], 1)
    used = joint.mean(0)
    return own.sum(1).mean() + (used * (used + 1e-9).log()).sum()


def train(settings: Settings, *, report_every: int = 200, start: Path | None = None) -> Trained:
    """Train from scratch, or on from the MAGVIT-v2 in folder `start`, and return the tokenizer."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    model: Trained = Signs(settings, start) if settings.kind == "magvit" else Learned(settings)
    net = model.vq.decoder if settings.decoder_alone else model.vq
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=1e-3)
    material = WORLDS[settings.world]()
    weight, begin = material.weight(settings.batch), time.perf_counter()
    for step in range(settings.steps):
        x = material.pairs(settings.batch, settings.canonical_share, rng)
        decoded, z, terms = model.step(x, step)
        error, far = decoded - x, locality(z, x)
        terms = [(weight * (error.abs() + 2.0 * error.square())).mean(), *terms, settings.local * far]
        loss = sum(terms[1:], start=terms[0])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimiser.step()
        if (step + 1) % report_every == 0:
            print(f"step {step + 1}  {time.perf_counter() - begin:.0f} s  loss {loss.item():.4f}  far {far.item():.4f}")
            print(measure(model, material), flush=True)
    return model


@torch.no_grad()
def measure(model: Trained, material: Rendered | Digits | Both) -> str:
    """What is left of pictures after the round trip, in words."""
    was_training = model.vq.training
    model.vq.eval()
    lines = material.measure(model)
    model.vq.train(was_training)
    return "\n".join(lines)


def main() -> None:
    """Parse flags named after `Settings`' fields, train, save, measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        how = {"action": "store_true", "default": None} if field.default is False else {"type": type(field.default)}
        parser.add_argument(f"--{field.name}", **how)
    parser.add_argument("--out", type=Path, help="folder for the two files; without it, where they are shipped")
    parser.add_argument("--start", type=Path, help="folder of a MAGVIT-v2 to go on from")
    flags = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, start = flags.pop("out", None), flags.pop("start", None)
    torch.set_num_threads(1)  # a second thread buys little here, and one thread makes runs repeat
    settings = replace(MAGVIT if flags.get("kind") == "magvit" else Settings(), **flags)
    print(settings, flush=True)
    out = out or folder_of(settings)
    out.mkdir(parents=True, exist_ok=True)
    print("as saved:\n" + measure(train(settings, start=start).saved(out), WORLDS[settings.world]()))


if __name__ == "__main__":
    main()
