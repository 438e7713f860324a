"""Contact sheets: sampled pictures with their prompt, text and reward, drawn with Pillow so that a glance tells a step.

`sample_sheet` has a row per prompt and a column per group member; `before_after_sheet` puts two models side by side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import PictureError
from ..pictures import ImageRef, open_picture
from ..records import Prompt, Rollout
from .names import PHOTOS, task_words, training_task_words

Rewards = Mapping[str, Sequence[float | None] | Tensor]
"""Reward name -> one value per rollout; None or NaN: it did not apply.  `reward`, if there, is the total."""

MARGIN, GAP, HEADER = 20, 14, 210
SMALLEST, LARGEST = 128, 256
"""Sides between which a picture is shown: a 24-pixel image is enlarged without smoothing, a large one reduced."""
MAX_COLUMNS, MAX_ROWS = 8, 24
FONTS = (
    ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf"),
    ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
    ("Arial.ttf", "Arial Bold.ttf"),
)
"""Regular and bold, those that know most letters first."""
BACKGROUND, INK, MUTED, FRAME, GOOD, BAD = "#ffffff", "#1b1f24", "#636c76", "#d0d7de", "#1a7f37", "#cf222e"


def as_rewards(rewards: Rewards | Tensor, num_rollouts: int) -> dict[str, list[float | None]]:
    """`rewards` by name, one number or None per rollout; a tensor [S] is the total alone."""
    named = {"reward": rewards} if isinstance(rewards, Tensor) else rewards
    plain: dict[str, list[float | None]] = {}
    for name, values in named.items():
        numbers = [None if value is None else float(value) for value in values]
        plain[name] = [None if value is None or not math.isfinite(value) else value for value in numbers]
        if len(numbers) != num_rollouts:
            raise ValueError(f"samples: expected {num_rollouts} values of {name}, one per rollout, got {len(numbers)}")
    return plain


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The first of `FONTS` that the system has; else Pillow's own, which knows little more than English."""
    for names in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(names[bold], size)
    return ImageFont.load_default(size)


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] floats in [0, 1] (others are clamped, NaN is black) as an RGB picture."""
    values = torch.nan_to_num(image.detach().float().cpu()).clamp(0, 1)
    return Image.fromarray((values * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def shown_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a picture is drawn: whole multiples upwards, so that every pixel stays a square."""
    smaller, larger = min(width, height), max(width, height)
    if smaller < SMALLEST:
        factor = math.ceil(SMALLEST / smaller)
        return width * factor, height * factor
    scale = min(1.0, LARGEST / larger)
    return round(width * scale), round(height * scale)


def enlarge(picture: Image.Image) -> Image.Image:
    size = shown_size(*picture.size)
    grows = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def wrap(text: str, width: float, size: int, *, max_lines: int, bold: bool = False) -> list[str]:
    """`text` in lines of at most `width` pixels; words longer than a line are cut, and `…` marks what did not fit."""
    face = font(size, bold)
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if face.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if face.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


@dataclass(slots=True)
class Block:
    """Things stacked from top to bottom in a column of a given width: pictures and lines of text."""

    width: int
    items: list[tuple[Image.Image | str, int, bool, str]] = field(default_factory=list)

    def text(self, text: str, size: int = 13, *, bold: bool = False, colour: str = INK, max_lines: int = 4) -> Block:
        if text.strip():
            lines = wrap(text, self.width, size, max_lines=max_lines, bold=bold)
            self.items += [(line, size, bold, colour) for line in lines]
        return self

    def picture(self, picture: Image.Image) -> Block:
        self.items.append((picture, 0, False, INK))
        return self

    @staticmethod
    def _step(item: Image.Image | str, size: int) -> int:
        return item.height + 6 if isinstance(item, Image.Image) else round(size * 1.35)

    @property
    def height(self) -> int:
        return sum(self._step(item, size) for item, size, _, _ in self.items)

    def draw(self, sheet: Image.Image, x: int, y: int) -> None:
        pen = ImageDraw.Draw(sheet)
        for item, size, bold, colour in self.items:
            if isinstance(item, Image.Image):
                sheet.paste(item, (x, y))
                pen.rectangle((x - 1, y - 1, x + item.width, y + item.height), outline=FRAME)
            else:
                pen.text((x, y), item, fill=colour, font=font(size, bold))
            y += self._step(item, size)


def sample_sheet(step: int, rollouts: Sequence[Rollout], rewards: Rewards | Tensor) -> Image.Image:
    """A row per prompt (its photo, task and words on the left), a cell per trajectory, best reward first.

    Args:
        step: counted from 0.
        rollouts: whole groups.
        rewards: by name, one value per rollout.
    """
    known = as_rewards(rewards, len(rollouts))
    by_prompt: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        by_prompt.setdefault(rollout.prompt.id, []).append(index)
    width = _cell_width([rollout.image for rollout in rollouts])
    totals = [-math.inf if total is None else total for total in known.get("reward", ())]
    rows = []
    for members in list(by_prompt.values())[:MAX_ROWS]:
        if totals:
            members = sorted(members, key=lambda index: -totals[index])
        cells = [_cell(rollouts[index], index, known, width) for index in members[:MAX_COLUMNS]]
        prompt = rollouts[members[0]].prompt
        drawn = "image" in prompt.segments
        rows.append([_header(prompt, training_task_words(prompt.task, drawn=drawn, rewarded=prompt.rewarded)), *cells])
    hidden = len(by_prompt) - len(rows)
    note = f", {hidden} more prompts not shown" if hidden else ""
    return _compose(f"Step {step}: {len(rollouts)} trajectories of {len(by_prompt)} prompts{note}", rows)


def prompt_sheet(title: str, prompts: Sequence[Prompt]) -> Image.Image:
    """A row per prompt: what is asked, with its photo, and what is right or is to be drawn."""
    rows = []
    for prompt in prompts:
        block = _header(prompt, training_task_words(prompt.task, drawn="image" in prompt.segments, rewarded=True))
        wanted = Block(2 * HEADER).text(prompt.id, 11, colour=MUTED)
        if prompt.options:
            wanted.text("options: " + " · ".join(prompt.options), 12)
        if "image" in prompt.segments:
            wanted.text(f"to be drawn: {prompt.target or prompt.text}", 12, max_lines=6)
        rows.append([block, wanted])
    return _compose(title, rows)


def before_after_sheet(before: Sequence[Rollout], after: Sequence[Rollout]) -> Image.Image:
    """A row per example: what was asked, what the model made of it before training, and after."""
    return sheet_of_models("The same prompts before and after training", {"before": before, "after": after})


def sheet_of_models(title: str, models: Mapping[str, Sequence[Rollout]]) -> Image.Image:
    """A row per prompt (its photo, task and words on the left), in it what each model made of it, under its name.

    Args:
        title: of the sheet.
        models: name -> trajectories; all models' are of the same prompts.

    Raises:
        ValueError: the models were asked different things.
    """
    groups = {name: grouped_by_prompt(rollouts) for name, rollouts in models.items()}
    asked = [list(group) for group in groups.values()]
    if any(ids != asked[0] for ids in asked):
        raise ValueError(f"sheet_of_models: expected the same prompts of {', '.join(models)}, got different ones")
    width = _cell_width([rollout.image for rollouts in models.values() for rollout in rollouts])
    rows = []
    for prompt_id in asked[0][:MAX_ROWS]:
        cells = [
            _draw_rollout(_titled(width, name if len(models) > 1 else ""), rollout)
            for name, group in groups.items()
            for rollout in group[prompt_id][:MAX_COLUMNS]
        ]
        first = next(iter(groups.values()))[prompt_id][0]
        rows.append([_header(first.prompt, task_words(first.prompt.task, drawn=first.image is not None)), *cells])
    return _compose(title, rows)


def grouped_by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """Prompt id -> its trajectories, in their order."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    return groups


def _titled(width: int, title: str) -> Block:
    return Block(width).text(title, 12, bold=True, colour=MUTED, max_lines=2)


def _cell_width(images: Sequence[Tensor | None]) -> int:
    widths = [shown_size(image.shape[-1], image.shape[-2])[0] for image in images if image is not None]
    return max([*widths, 150])


def photo_beside(prompt: Prompt) -> tuple[ImageRef | None, str]:
    """The photo to show beside a request, and what it is, a key of PHOTOS: the first that the model sees, else one of
    the concept that the request names, else the picture that drawings are compared with."""
    if prompt.images:
        return prompt.images[0], "shown"
    if prompt.references:
        return prompt.references[0], "concept"
    return prompt.real_image, "real"


def _header(prompt: Prompt, task: str) -> Block:
    block = Block(HEADER).text(task, 12, bold=True, colour=MUTED)
    ref, kind = photo_beside(prompt)
    if ref is not None:
        try:
            photo = enlarge(open_picture(ref))
            photo.thumbnail((96, 96), Image.Resampling.BOX)
            block.picture(photo)
        except PictureError:
            block.text("(photo cannot be read)", 12, colour=BAD)
        block.text(PHOTOS[kind], 11, colour=MUTED)
    block.text(prompt.text, 14, max_lines=6)
    if prompt.answer:
        block.text(f"right answer: {prompt.answer}", 12, colour=MUTED, max_lines=2)
    return block


def _cell(rollout: Rollout, index: int, rewards: Mapping[str, list[float | None]], width: int) -> Block:
    block = _draw_rollout(Block(width), rollout)
    known = {name: value for name, values in rewards.items() if (value := values[index]) is not None}
    if "reward" in known:
        block.text(f"reward {known.pop('reward'):.2f}", bold=True)
    block.text(" · ".join(f"{name} {value:.2f}" for name, value in known.items()), 11, colour=MUTED)
    if rollout.attempts > 1:
        block.text(f"{rollout.attempts} tries", 11, colour=MUTED)
    return block


def _draw_rollout(block: Block, rollout: Rollout) -> Block:
    if rollout.image is not None:
        block.picture(enlarge(to_picture(rollout.image)))
    answer = rollout.prompt.answer
    # By a word as well as by colour, and no sign that some font lacks.
    right = answer is not None and rollout.text.strip().casefold() == answer.strip().casefold()
    return block.text(rollout.text + (" (right)" if right else ""), colour=GOOD if right else INK)


def _compose(title: str, rows: list[list[Block]]) -> Image.Image:
    """The rows of blocks under a title, a thin line between rows."""
    face = font(18, True)
    heights = [max(block.height for block in row) for row in rows]
    widths = [sum(block.width + GAP for block in row) for row in rows]
    width = round(max([*widths, face.getlength(title)])) + 2 * MARGIN
    sheet = Image.new("RGB", (width, MARGIN + 36 + sum(height + 2 * GAP for height in heights) + MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=face)
    y = MARGIN + 36
    for row, height in zip(rows, heights, strict=True):
        pen.line((MARGIN, y, width - MARGIN, y), fill=FRAME)
        x = MARGIN
        for block in row:
            block.draw(sheet, x, y + GAP)
            x += block.width + GAP
        y += height + 2 * GAP
    return sheet
