"""Settings of `recipes/sample.py`.  Nothing heavy is imported: a mistyped flag is refused before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..errors import kind_of
from ..settings.rules import path_problems
from ..settings.schema import Range, Rule, Settings
from ..settings.template_kwargs import template_kwargs_problems
from ..settings.train_config import (
    Guidance,
    ImageMinP,
    ImageNoiseOrRuns,
    ImageStepsOrRuns,
    ImageTopK,
    ImageTopP,
    MaxTokens,
    MinP,
    PictureFit,
    Seed,
    TopK,
    TopP,
    Unconditional,
)
from ..settings.turn_templates import drawing_problems

MOST_PROMPTS_BYTES = 1 << 20
"""Of a file of prompts; anything larger is a table, for `data`."""


def sampling_problems(c: Any) -> list[str]:
    """What `recipes/sample.py` cannot do, in words."""
    problems = []
    if c.compare and c.model is not None:
        problems.append(f"model, compare: both name checkpoints ({c.model}; {' '.join(c.compare)}); put all in compare")
    if len(c.compare) == 1:
        problems.append(f"compare: expected at least 2 checkpoints, got {c.compare[0]} alone; pass it as --model")
    for name in sorted({name for name in c.compare if c.compare.count(name) > 1}):
        problems.append(f"compare: {name} is given twice; name it once")
    asked = [name for name, value in (("prompt", c.prompt), ("prompts_file", c.prompts_file)) if value]
    if asked and c.data is not None:
        problems.append(f"data, {asked[0]}: both say what is asked; give one of them")
    if c.prompts_file is not None and not c.prompts_file.is_file():
        problems.append(
            f"prompts_file: expected a text file with a prompt a line, got {c.prompts_file}, "
            f"{kind_of(c.prompts_file)}; correct the path"
        )
    elif c.prompts_file is not None and c.prompts_file.stat().st_size > MOST_PROMPTS_BYTES:
        problems.append(f"prompts_file: {c.prompts_file} is over {MOST_PROMPTS_BYTES} bytes; pass a table with --data")
    for image in c.image:
        if not image.is_file():
            problems.append(f"image: expected a picture's file, got {image}, {kind_of(image)}; correct the path")
    if c.image and not asked:
        problems.append("image: expected a prompt to show it with, got none; pass --prompt")
    if c.produce and not asked:
        problems.append("produce: items of data say themselves what is made of them; pass --prompt, or leave it out")
    if any(a == b for a, b in zip(c.produce, c.produce[1:], strict=False)) or len(c.produce) > 2:
        problems.append(f"produce: expected text, image, or text image, got {' '.join(c.produce)}")
    return problems


def compared_problems(c: Any) -> list[str]:
    """Each of the compared checkpoints as `model` would be checked."""
    found = []
    for name in c.compare:
        one = _Model(model=name, output_dir=c.output_dir)
        found += [p.replace("model:", "compare:") for p in path_problems(one) if p.startswith("model")]
    return found


@dataclass(frozen=True)
class _Model:
    model: str
    output_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig(Settings):
    """Settings of `recipes/sample.py`. Without any, the tiny base is asked items of the rendered world."""

    # --- who is asked ---
    model: str | None = None
    """Checkpoint in transformers' format or DeepSeek's (Janus, Emu3, Chameleon, Liquid, Show-o, a text decoder): a
    folder or hub name. None: the tiny base."""
    compare: tuple[str, ...] = ()
    """Two or more checkpoints side by side, drawn with the same random numbers; instead of model."""
    picture_fit: PictureFit | None = None
    """How a photo comes to the size that the model sees: as the checkpoint's own image processor does it (processor),
    cut at the centre to a square (crop), or whole on the mean colour (pad). None: as the run did in whose folder the
    checkpoint lies, else processor."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the checkpoint's chat template, NAME=VALUE. None given: as in that run."""

    # --- what is asked ---
    prompt: tuple[str, ...] = ()
    """What the user says; each one is a prompt of its own."""
    prompts_file: Path | None = None
    """Text file with a prompt on each line, asked behind those of prompt."""
    image: tuple[Path, ...] = ()
    """Photo that the user shows with every prompt; of several each goes where a prompt says <image>, in order."""
    produce: tuple[Literal["text", "image"], ...] = ()
    """What is made of a prompt, in order; `text image` reasons first and then draws. None given: text where a photo is
    shown or the model draws nothing, else image."""
    data: str | None = None
    """Instead of prompts: items of a UnifyBench++ folder, of GenEval's or DPG-Bench's prompts, or of a table (JSONL,
    parquet, saved data set, hub name). None, and no prompt: the rendered world's."""
    split: str | None = None
    """Of a table that has splits. None: test."""
    concept_info: bool | None = None
    """Whether the model is told what info.json of a UnifyBench++ folder has of a concept. None: as in the run in whose
    folder the checkpoint lies; else of data that are given, to a model that is given."""
    tasks: tuple[str, ...] = ()
    """Only these tasks of the data, by name; none given: all."""
    num_items: Annotated[int | None, Range("leave it out for all", ge=1)] = 2
    """At most this many items of each task, always the same ones. None: all."""

    # --- sampling ---
    num_generations: Annotated[int, Range("4 is usual", ge=1)] = 4
    """Samples of each prompt."""
    temperature: Annotated[float, Range("1 samples the model's own distribution, 0 is greedy", ge=0)] = 1.0
    """Of texts and images; 0 is greedy."""
    max_completion_length: MaxTokens = 32
    """Text tokens at most."""
    top_k: TopK = 0
    """Draw from the k most likely ids alone; 0: from all."""
    top_p: TopP = 1.0
    """Draw from the smallest set of ids that holds this share of what top_k left; 1: from all."""
    min_p: MinP = 0.0
    """Draw from ids with at least this share of the greatest probability alone; 0: from all."""
    image_top_k: ImageTopK = None
    """top_k of image tokens. None: as top_k."""
    image_top_p: ImageTopP = None
    """top_p of image tokens. None: as top_p."""
    image_min_p: ImageMinP = None
    """min_p of image tokens. None: as min_p."""
    cfg_weight: Guidance = 1.5
    """Classifier-free guidance w of image tokens: u + w (c - u); 1 is without. Janus-Pro draws at 5."""
    unconditional: Unconditional | None = None
    """The prompt that u is computed behind: the model's own, one for all (fixed), or padding in the place of every
    token of the prompt, as Janus-Pro draws (pads). None: as the run did in whose folder the checkpoint lies, else
    fixed."""
    drawing_turn: str | None = None
    """How an image is asked for behind the model's own text: none, sync_r1, t2i_r1 or a template, as in training. None:
    as the run did in whose folder the checkpoint lies, else none."""
    image_steps: ImageStepsOrRuns = None
    """Steps in which a model that draws in masked order (Show-o) fills in an image. None: as the run did in whose
    folder the checkpoint lies, else 16."""
    image_noise: ImageNoiseOrRuns = None
    """How much chance decides, at first, which places such a step keeps. None: as in that run, else 1."""
    seed: Seed = 0
    """With a prompt's place, what its random numbers come from."""
    batch_size: Annotated[int, Range("8 is the default", ge=1)] = 8
    """Prompts that are sampled together; lower it when memory runs out."""
    bf16: bool = False
    """Compute in bfloat16."""

    # --- what is written ---
    output_dir: Path = Path("runs/sample")
    """Folder for samples.jsonl, grid.png and pictures/; a number is appended when it already holds samples."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        path_problems,
        drawing_problems,
        sampling_problems,
        compared_problems,
        template_kwargs_problems,
    )
    RENAMED: ClassVar[dict[str, str]] = {
        "model_name_or_path": "set model",
        "pretrained_model_name_or_path": "set model",
        "prompts": "set prompt, or prompts_file",
        "guidance_scale": "set cfg_weight",
        "num_images_per_prompt": "set num_generations",
        "num_samples": "set num_generations",
        "max_new_tokens": "set max_completion_length",
        "dataset_name": "set data",
    }
