"""LPIPS, captions and text-image matching of a step's drawings: batched, and one image at a time.

    python bench/rewards.py                       about two minutes on two cores
    python bench/rewards.py --only base           LPIPS over VGG and BLIP-base's sizes, what ULM-R1 runs: for a GPU
    python bench/rewards.py --quick --out /tmp/x  tiny models: shows that everything runs

32 drawings of 384 x 384 pixels, G = 8 for each of 4 prompts and their 4 photographs; random weights, so every caption
has as many tokens as are allowed. The released code takes LPIPS image by image, the photograph's features again each
time, and captions and matches the drawings of one prompt at a time; `per image` does all three image by image.

Floor. Of the products that nobody can leave out, batching saves two things. The photographs' features once instead of
G times: LPIPS needs 32 + 4 passes instead of 64, 1.8 x. And decoding a caption reads every weight for each token: at
one row a product takes as long as the reading, at 32 rows about as long again, so words come up to 32 x cheaper. The
pictures' own passes (LPIPS' trunk, BLIP's and Janus's vision towers, the decoder over 576 placeholders) are the same
products in any batch, and on a CPU hundreds of rows fill it already: there batching saves calls alone. On a GPU one
picture leaves most of the machine idle, so there it saves more. `floor_seconds` beside each provider is the least
time of its own products on this machine.

Dims: n images, G members, L tokens of a sequence, J image places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import models
import rates
import torch
import torch.nn.functional as F
from comparison import OURS, Case, Comparison, Goal, Provider, Told, only_probe, parser_of, run_cases
from models import Size
from PIL import Image
from released import one_copy
from sides import photo_folder
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)

from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.captioner import BlipCaptioner
from syncr1.engine.rewards.builtin.clip import Preparation
from syncr1.engine.rewards.builtin.perceptual import LpipsSimilarity, stretched
from syncr1.engine.rewards.builtin.tim import TextImageMatching
from syncr1.engine.stopwatch import Stopwatch

PER_IMAGE, RELEASED = "per image", "as released"
GROUP = 8
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Work:
    """What is scored, by what."""

    prompts: int
    net: Literal["vgg", "alex", "squeeze"]
    lpips_size: int
    width: int
    """Of BLIP, both towers."""
    layers: int
    """Of each of BLIP's towers."""
    vocabulary: int
    """BLIP's."""
    caption_tokens: int
    janus: Size

    @property
    def pixels(self) -> int:
        """Of a drawing's side: those that Janus reads."""
        return self.janus.photo

    def __str__(self) -> str:
        return (
            f"{self.prompts * GROUP} x {self.pixels}^2; LPIPS {self.net} {self.lpips_size}^2; BLIP {self.layers} x "
            f"{self.width}, {self.caption_tokens} tokens; Janus {self.janus}"
        )


SMALL = Work(4, "alex", 224, 384, 4, 30524, 20, replace(models.CPU, layers=4, vocabulary=4096))
BASE = Work(4, "vgg", 224, 768, 12, 30524, 50, models.CPU)
BASE_ON_GPU = replace(BASE, janus=models.JANUS_PRO_1B)
QUICK = Work(1, "squeeze", 64, 32, 2, 100, 4, models.QUICK)
CASES, ON_REQUEST = ("small",), ("base",)


def work_of(name: str, device: str, quick: bool) -> Work:
    """What a case of this name does."""
    if quick:
        return QUICK
    return SMALL if name == "small" else BASE_ON_GPU if device == "cuda" else BASE


class Models:
    """The three networks, of real classes with random weights, and what they look at.

    Args:
        work: sizes.
        device: of all of them.
        folder: where the photographs are written.
    """

    def __init__(self, work: Work, device: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.work, self.device = work, device
        self.policy = models.build_policy(replace(work.janus, device=device))
        self.peer = one_copy(self.policy).eval()
        self.tim = TextImageMatching(self.policy)
        # Nothing is kept between runs: each would look at pictures that it has seen.
        self.lpips = LpipsSimilarity(work.net, size=work.lpips_size, weights="random", device=device, max_bytes=0)
        self.captioner = BlipCaptioner(*build_blip(work, device), max_new_tokens=work.caption_tokens)
        self.photos = [models.photo(folder, i, work.janus) for i in range(work.prompts)]
        n = work.prompts * GROUP
        coarse = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        self.images = F.interpolate(coarse, work.pixels, mode="bicubic").clamp(0, 1).to(device)
        self.texts = [models.words(10 + 9 * i, i, work.janus.vocabulary) for i in range(work.prompts)]

    def of(self, i: int) -> int:
        """The prompt of image i."""
        return i // GROUP

    def match(self, chosen: Sequence[int]) -> list[float]:
        """TIM of images of prompts of one length through transformers' model, and a loop over images."""
        policy, device = self.policy, self.device
        images = (self.photos[0],)
        prompts = [Prompt(id="x", task="caption", text=self.texts[self.of(i)], images=images) for i in chosen]
        ids = torch.stack([policy.prompt_tokens(prompt) for prompt in prompts]).to(device)
        pixels = ((self.images[list(chosen)] - 0.5) / 0.5).to(self.peer.lm_head.weight.dtype)
        embeddings = self.peer.get_input_embeddings()(ids)
        seen = self.peer.model.get_image_features(pixels, return_dict=True).pooler_output
        slots = ids == policy.image_slot
        embeddings = embeddings.masked_scatter(slots[..., None].expand_as(embeddings), seen.to(embeddings.dtype))
        hidden = self.peer.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        last = int(slots[0].nonzero()[-1]) + 2  # behind it the image's end; the last token opens the answer
        values = []
        for states, places in zip(F.normalize(hidden.float(), dim=-1), slots, strict=True):
            cosines = states[places] @ states[last:-1].T
            values.append(0.5 * float(cosines.amax(1).mean() + cosines.amax(0).mean()))
        return values


def build_blip(work: Work, device: str) -> tuple[BlipForConditionalGeneration, Any, Preparation]:
    """A captioner whose captions never end early, its tokenizer and the preparation of pictures."""
    control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {word: i for i, word in enumerate([*control, *(f"w{i}" for i in range(work.vocabulary - 6))])}
    tokenizer = BertTokenizerFast(vocab=vocabulary)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    heads = max(1, work.width // 64)
    shared = {
        "hidden_size": work.width,
        "intermediate_size": 4 * work.width,
        "num_hidden_layers": work.layers,
        "num_attention_heads": heads,
        "projection_dim": work.width,
        "initializer_range": 0.1,
    }
    text = BlipTextConfig(
        **shared,
        vocab_size=work.vocabulary,
        encoder_hidden_size=work.width,
        bos_token_id=5,
        eos_token_id=3,
        sep_token_id=3,
        pad_token_id=0,
        max_position_embeddings=512,
    )
    vision = BlipVisionConfig(**shared, image_size=work.pixels, patch_size=16)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=work.width)
    model = BlipForConditionalGeneration(config).to(device)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[3] = -1e4
    processor = BlipImageProcessor(size={"height": work.pixels, "width": work.pixels})
    return model, tokenizer, Preparation.of(processor)


def ours(made: Models, chosen: range, time: Stopwatch) -> list[tuple[float, str, float | None]]:
    """All of them at once."""
    images = [made.images[i] for i in chosen]
    texts = [made.texts[made.of(i)] for i in chosen]
    with time("lpips"):
        likeness = made.lpips(images, [made.photos[made.of(i)] for i in chosen])
    with time("captions"):
        captions = made.captioner(torch.stack(images))
    with time("matching"):
        matches = made.tim(prompts=texts, images=images, target=texts)
    return list(zip(likeness, captions, matches, strict=True))


@torch.no_grad()
def looped(made: Models, chosen: range, time: Stopwatch, at_once: int) -> list[tuple[float, str, float]]:
    """LPIPS image by image through the lpips package; captions and matches `at_once` images of a prompt at a time."""
    size = (made.work.lpips_size,) * 2
    likeness, captions, matches = [], [], []
    parts = [list(chosen)[k : k + at_once] for k in range(0, len(chosen), at_once)]
    with time("lpips"):
        photos = [Image.open(path).convert("RGB") for path in made.photos]
        given = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in photos]
        for i in chosen:
            real = given[made.of(i)].to(made.device).permute(2, 0, 1)[None] / 255.0
            pair = (stretched(picture, size) for picture in (made.images[i][None], real))
            likeness.append(1.0 - float(made.lpips.model(*pair, normalize=True)))
    with time("captions"):
        for part in parts:
            captions += made.captioner(made.images[part])
    with time("matching"):
        for part in parts:
            matches += made.match(part)
    return list(zip(likeness, captions, matches, strict=True))


def check(made: Models) -> None:
    """Both sides say the same of the first drawings."""
    chosen = range(2)
    for mine, theirs in zip(ours(made, chosen, Stopwatch()), looped(made, chosen, Stopwatch(), 1), strict=True):
        near = abs(mine[0] - theirs[0]) < TOLERANCE and abs((mine[2] or 0.0) - theirs[2]) < 10 * TOLERANCE
        if not near or (made.device == "cpu" and mine[1] != theirs[1]):
            raise RuntimeError(f"the sides disagree: {mine} and {theirs}")


def flops(run: Callable[[], Any]) -> int:
    """Of the products of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@cache
def peak_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of one large product."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    return 2 * 2048**3 / rates.seconds_of(lambda: a @ b)


bandwidth = cache(rates.bandwidth)


def floor(made: Models, *, photo_passes: int, rows: int) -> dict[str, float]:
    """Seconds by part: pictures at the rate of a large product, words at the rate of their own products or of reading.

    Args:
        made: the models.
        photo_passes: of LPIPS' trunk over photographs.
        rows: of a decoding step.
    """
    work, image, blip, device = made.work, made.images[:1], made.captioner.model, made.device
    n, text = len(made.images), made.work.janus
    trunk = torch.zeros(1, 3, work.lpips_size, work.lpips_size, device=device)
    looks = flops(lambda: made.lpips.model.net(trunk))
    sees = flops(lambda: blip.vision_model(pixel_values=made.captioner.preparation(image)))
    reads = n * flops(lambda: made.match([0])) if n else 0
    step = rates.linears(blip.text_decoder)
    per_step = max(rates.products(step, rows), rates.num_bytes(step) / bandwidth(device))
    rate = peak_rate(device, torch.float32)
    return {
        "lpips": (n + photo_passes) * looks / rate,
        "captions' pictures": n * sees / rate,
        "captions' words": n / rows * work.caption_tokens * per_step,
        "matching": reads / peak_rate(device, text.dtype),
    }


def scoring(made: Models) -> Case:
    """All three rewards of all drawings."""
    n, check_done = len(made.images), False
    floors: dict[str, float] = {}

    def provider(name: str, run: Callable[[range, Stopwatch], Any], *, photo_passes: int, rows: int) -> Provider:
        def work(short: bool) -> Told:
            nonlocal check_done
            if not check_done:
                check(made)
                check_done = True
            if name not in floors:
                floors[name] = sum(floor(made, photo_passes=photo_passes, rows=rows).values())
            time = Stopwatch()
            run(range(2) if short else range(n), time)
            return Told(time.seconds, {"floor_seconds": floors[name]})

        return Provider(name, work)

    def goals(found: Comparison) -> list[Goal]:
        stages = {p.name: p.stages() for p in found.case.providers}
        lines = [Goal("scoring drawings, faster than one at a time", found.ratio(PER_IMAGE), 4.0)]
        for stage in stages[OURS]:
            mine, theirs = stages[OURS][stage], stages[PER_IMAGE].get(stage)
            lines.append(Goal(f"{stage} of drawings, faster than one at a time", theirs and theirs / mine, 4.0))
        return [*lines, Goal("scoring drawings, faster than the released batches", found.ratio(RELEASED), 1.5)]

    providers = [
        provider(OURS, lambda chosen, time: ours(made, chosen, time), photo_passes=made.work.prompts, rows=n),
        provider(RELEASED, lambda chosen, time: looped(made, chosen, time, GROUP), photo_passes=n, rows=GROUP),
        provider(PER_IMAGE, lambda chosen, time: looped(made, chosen, time, 1), photo_passes=n, rows=1),
    ]
    return Case(
        "Rewards of drawings",
        str(made.work),
        providers,
        goals,
        lambda: floor(made, photo_passes=made.work.prompts, rows=n),
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = parser_of(__doc__)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only or ()) - {*CASES, *ON_REQUEST})
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join((*CASES, *ON_REQUEST))}")
    with photo_folder() as folder:

        def build(name: str) -> Case:
            return scoring(Models(work_of(name, given.device, given.quick), given.device, folder))

        if given.probe:
            only_probe(given, build)
            return {}
        return run_cases(given, CASES, build, __file__, "rewards")


if __name__ == "__main__":
    main()
