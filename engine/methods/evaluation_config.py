"""Settings of `recipes/evaluate.py`.  Nothing heavy is imported: a mistyped flag is refused before torch is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..errors import ConfigError
from ..settings.rules import (
    AT_LEAST_0,
    AT_LEAST_1,
    RANGES,
    Range,
    judge_problems,
    path_problems,
    range_problems,
)
from ..settings.schema import normalise


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Settings of `recipes/evaluate.py`. Without any, the tiny base is evaluated on the rendered world."""

    # --- what is evaluated ---
    model: str | None = None
    """Checkpoint in transformers' format (Janus, Emu3, a text decoder): a folder or a hub name. None: the tiny base."""
    data: str | None = None
    """UnifyBench++ folder, GenEval's evaluation_metadata.jsonl, DPG-Bench's folder of prompts, or a table (JSONL,
    parquet, saved data set, hub name). None: the rendered world."""
    data_form: Literal["unifybench", "geneval", "dpg", "table"] | None = None
    """How to read data. None: by what lies in it."""
    split: str = "test"
    """Of a table."""
    think: bool = True
    """A table's questions ask to think in <think> tags and to answer in <answer> tags, as CoRL trains it."""
    tasks: tuple[str, ...] = ()
    """Only these tasks of the data, by name; none given: all."""
    num_items: int | None = None
    """At most this many items per task, always the same ones. None: all."""
    output_dir: Path = Path("runs/evaluate")
    """Folder for what is generated and scored. One that an interrupted run left goes on, with the same settings."""
    stage: Literal["generate", "score", "all"] = "all"
    """generate answers and draws; score needs the folder alone, and no model."""

    # --- sampling ---
    seed: int = 3407
    """With an item's id, what its random numbers come from. UnifyBench++ has 3407."""
    temperature: float = 1.0
    """Of sampled texts and images; 0 is greedy."""
    max_completion_length: int = 32
    """Text tokens at most. Raise it for answers that think first."""
    cfg_weight: float = 1.5
    """Classifier-free guidance w of image tokens: u + w (c - u); 1 is without. Janus-Pro draws at 5."""
    images_per_prompt: int = 1
    """Trajectories of each prompt that draws. GenEval and DPG-Bench report 4."""
    greedy_texts: bool = True
    """Answer every question greedily; what judges and exports read."""
    sampled_texts: bool = True
    """Answer by sampling as well: what a model says at random shows what RL has to sharpen."""
    batch_size: int = 32
    """Prompts that are generated together; lower it when memory runs out."""
    bf16: bool = False
    """Compute in bfloat16."""

    # --- scoring ---
    clip: str | None = None
    """CLIP checkpoint in transformers' format for CLIP-T and CLIP-I: a folder or a hub name; UnifyBench++ has
    openai/clip-vit-base-patch32. None: both are left out."""
    clip_references: int = 1
    """Held-out photos that CLIP-I compares with. UnifyBench++ takes 1; 0: all."""
    judge_url: str | None = None
    """OpenAI-compatible server of the judge, up to and with /v1. None: judged metrics are left out."""
    judge_model: str | None = None
    """The judge's name on that server. UnifyBench++ has gpt-4.1-mini."""
    judge_key_env: str | None = None
    """Environment variable with the server's key. None: no key is sent."""

    # --- export ---
    export: tuple[Literal["geneval", "dpg", "lmms_eval", "vlmevalkit"], ...] = ()
    """Also write what other benchmarks' scorers read, into export/<name> of output_dir."""
    export_name: str | None = None
    """What lmms-eval or VLMEvalKit calls the task or data set. None: the tasks' names here."""

    RENAMED: ClassVar[dict[str, str]] = {
        "model_name_or_path": "set model",
        "dataset_name": "set data",
        "limit": "set num_items",
        "eval_samples": "set num_items",
        "eval_cfg_weight": "set cfg_weight",
    }
    """Names that people bring from elsewhere, and what to set instead."""

    def __post_init__(self) -> None:
        problems = normalise(self)
        if not problems:  # the rules below compare values, so types come first
            problems = [*range_problems(self, _RANGES), *path_problems(self), *_problems(self)]
        if problems:
            raise ConfigError.of(problems)


_RANGES: dict[str, tuple[Range, str]] = {
    **{name: RANGES[name] for name in ("seed", "max_completion_length", "cfg_weight")},
    "temperature": (AT_LEAST_0, "1 samples the model's own distribution, 0 is greedy"),
    "num_items": (AT_LEAST_1, "leave it out for all"),
    "images_per_prompt": (AT_LEAST_1, "4 is usual"),
    "batch_size": (AT_LEAST_1, "32 is the default"),
    "clip_references": (AT_LEAST_0, "0 takes all"),
}


def _problems(c: EvaluateConfig) -> list[str]:
    problems = judge_problems(c)
    if (
        c.data is not None
        and c.data_form in ("unifybench", "geneval", "dpg")
        and not os.path.exists(os.path.expanduser(c.data))
    ):
        problems.append(f"data: expected a folder or file in the form {c.data_form}, got {c.data}, which is not there")
    if c.stage == "score" and not (c.output_dir / "manifest.json").is_file():
        problems.append(
            f"output_dir: {c.output_dir} holds nothing generated (no manifest.json); run --stage generate first"
        )
    if not (c.greedy_texts or c.sampled_texts):
        problems.append("greedy_texts, sampled_texts: both are off, so nothing would be answered; leave one on")
    if "dpg" in c.export and c.images_per_prompt > 4:
        problems.append(f"images_per_prompt: DPG-Bench's grid holds 4 images, got {c.images_per_prompt}; lower it")
    for kind in sorted(set(c.export)):
        if c.export.count(kind) > 1:
            problems.append(f"export: {kind} is given twice; name it once")
    return problems
