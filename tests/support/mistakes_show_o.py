"""Rows of `mistakes.py` about Show-o as showlab publishes it, and its conversion."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mistake import Mistake

CONVERTED = "--model m --vq showlab/magvitv2 --tokenizer microsoft/phi-1_5 --output show-o"


def show_o(*, cut: str = "", **settings: Any) -> Callable[[Path], object]:
    """A published folder `m`; `cut` names a file whose end is missing, the rest is as in `publish`."""

    def write(folder: Path) -> None:
        from small_show_o import publish

        publish(folder / "m", **settings)
        if cut:
            os.truncate(folder / "m" / cut, 50_000)

    return write


def ours(folder: Path) -> None:
    """A converted one."""
    from small_show_o import sharp_show_o

    sharp_show_o().save(folder / "m")


SHOW_O = [
    Mistake("Show-o without its tokenizers", "sync_r1.py --model m", CONVERTED, show_o(beside=False)),
    Mistake("the same, to be converted", "convert.py --model m --output out", CONVERTED, show_o(beside=False)),
    Mistake("two steps of a mean", "sync_r1.py --masked_steps 2 --loss_type grpo", "expected one of dapo, bnpo"),
    Mistake("a mean over tokens of steps", "sync_r1.py --masked_logp step", "set --loss_type grpo"),
    Mistake("steps of a model without", "sync_r1.py --image_steps 8", "the tiny model, a janus, which draws one token"),
    Mistake("padding that nobody sees", "sync_r1.py --model m --unconditional pads", "expected fixed for m", ours),
    Mistake("Show-o with CLIP", "sample.py --model m", "CLIP's tower (w_clip_vit)", show_o(w_clip_vit=True)),
    Mistake("a kind beside a model", "sync_r1.py --model m --policy show_o", "policy: expected none beside model"),
    Mistake("Show-o, cut off", "evaluate.py --model m", "which is cut off", show_o(cut="pytorch_model.bin")),
    Mistake(
        "Show-o's tokenizer, cut off",
        "convert.py --model m --vq m/magvitv2 --output out",
        "vq: expected whole weights, got",
        show_o(cut="magvitv2/pytorch_model.safetensors", weights="safetensors"),
    ),
    Mistake(
        "another model's layout",
        "convert.py --model m --to deepseek --output out",
        "to: expected transformers, got deepseek, another model's than m",
        show_o(),
    ),
]
