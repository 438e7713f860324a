"""Settings of `recipes/evaluate.py`.  Nothing heavy is imported: a mistyped flag is refused before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..errors import DataError
from ..evaluate.benchmarks.data_sets import sources_of
from ..settings.renamed import OF_EVALUATION
from ..settings.rules import evaluation_problems, judge_problems, path_problems
from ..settings.schema import Range, Rule, Settings
from ..settings.template_kwargs import template_kwargs_problems
from ..settings.train_config import (
    Guidance,
    ImageNoiseOrRuns,
    ImageStepsOrRuns,
    MaxTokens,
    PictureFit,
    Seed,
    Unconditional,
    WorldName,
)
from ..settings.turn_templates import drawing_problems

BenchmarkName = Literal["geneval", "dpg", "wise", "t2i_compbench", "mmmu", "mmbench", "pope", "mathvista", "unifybench"]


def benchmark_problems(c: Any) -> list[str]:
    """Files of a benchmark that are not there, with the command that fetches them."""
    twice = [name for name in dict.fromkeys(c.benchmark) if c.benchmark.count(name) > 1]
    if twice:
        return [f"benchmark: expected each once, got {twice[0]} twice; name it once"]
    try:
        if c.stage != "score":
            sources_of(c.benchmark, c.data)
    except DataError as error:
        return [str(error)]
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(Settings):
    """Settings of `recipes/evaluate.py`. Without any, the tiny base is evaluated on the rendered world."""

    # --- what is evaluated ---
    model: str | None = None
    """Checkpoint in transformers' format or DeepSeek's (Janus, Emu3, Chameleon, Liquid, Show-o, a text decoder): a
    folder or hub name. None: the tiny base."""
    picture_fit: PictureFit | None = None
    """How a photo comes to the size that the model sees: as the checkpoint's own image processor does it (processor),
    cut at the centre to a square (crop), or whole on the mean colour (pad). None: as the run did in whose folder the
    checkpoint lies, else processor."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the checkpoint's chat template, NAME=VALUE. None given: as in that run."""
    benchmark: tuple[BenchmarkName, ...] = ()
    """Benchmarks that papers report: data are read in their own layout, asked in their own words, scored by their own
    rules and put beside published numbers, in one table. geneval, dpg, wise and t2i_compbench draw; mmmu, mmbench, pope
    and mathvista answer; unifybench does both."""
    world: WorldName | None = None
    """The embedded world whose held-out items are asked without data, and whose tiny base without a model. None: as in
    the run in whose folder the checkpoint lies, else rendered."""
    data: str | None = None
    """UnifyBench++ folder, GenEval's evaluation_metadata.jsonl, DPG-Bench's folder of prompts, a table (JSONL, parquet,
    saved data set, hub name), or the files of the benchmark; of several, a folder with a sub-folder of each one's name.
    None: the benchmark's own name on the hub, or the rendered world."""
    data_form: Literal["unifybench", "geneval", "dpg", "table"] | None = None
    """How to read data without a benchmark. None: told by its contents."""
    split: str | None = None
    """Of a table, or of the benchmark. None: test; of a benchmark the part that papers report (MMMU validation, MMBench
    dev, POPE test, MathVista testmini)."""
    image_folder: Path | None = None
    """Where the pictures lie that data name (POPE's are COCO's val2014). None: beside the data."""
    think: bool | None = None
    """Questions ask to think in <think> tags and to answer in <answer> tags, as CoRL trains it. None: a table's do, a
    benchmark's are asked in its own words."""
    concept_info: bool | None = None
    """Whether the model is told what info.json of a UnifyBench++ folder has of a concept. None: as in the run in whose
    folder the checkpoint lies; else of data that are given, to a model that is given."""
    tasks: tuple[str, ...] = ()
    """Only these tasks of the data, by name; none given: all."""
    limit: Annotated[int | None, Range("leave it out for all", ge=1)] = None
    """At most this many items per task, always the same ones, spread over a benchmark's categories. None: all."""
    output_dir: Path = Path("runs/evaluate")
    """Folder for what is generated and scored. One that an interrupted run left goes on, with the same settings."""
    stage: Literal["generate", "score", "all"] = "all"
    """generate answers and draws; score needs the folder alone, and no model."""

    # --- sampling ---
    seed: Seed = 3407
    """With an item's id, what its random numbers come from. UnifyBench++ has 3407."""
    temperature: Annotated[float, Range("1 samples the model's own distribution, 0 is greedy", ge=0)] = 1.0
    """Of sampled texts and images; 0 is greedy."""
    max_completion_length: MaxTokens = 32
    """Text tokens at most. Raise it for answers that think first."""
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
    images_per_prompt: Annotated[int, Range("4 is usual", ge=1)] = 1
    """Trajectories of each prompt that draws. GenEval and DPG-Bench report 4, T2I-CompBench 10, WISE 1."""
    greedy_texts: bool = True
    """Answer every question greedily; what judges and exports read."""
    sampled_texts: bool = True
    """Answer by sampling as well: what a model says at random shows what RL has to sharpen."""
    batch_size: Annotated[int, Range("32 is the default", ge=1)] = 32
    """Prompts that are generated together; lower it when memory runs out."""
    bf16: bool = False
    """Compute in bfloat16."""

    # --- scoring ---
    clip: str | None = None
    """CLIP checkpoint in transformers' format for CLIP-T and CLIP-I: a folder or a hub name; UnifyBench++ has
    openai/clip-vit-base-patch32. None: both are left out."""
    clip_references: Annotated[int, Range("0 takes all", ge=0)] = 1
    """Held-out photos that CLIP-I compares with. UnifyBench++ takes 1; 0: all."""
    judge_url: str | None = None
    """OpenAI-compatible server of the judge, up to and with /v1. None: judged metrics are left out (DPG-Bench, WISE and
    T2I-CompBench are of a judge wholly, MathVista where rules cannot read an answer)."""
    judge_model: str | None = None
    """The judge's name on that server. UnifyBench++ has gpt-4.1-mini."""
    judge_key_env: str | None = None
    """Environment variable with the server's key. None: no key is sent."""

    geneval_detector: str | None = None
    """What finds the objects that GenEval's rules judge by: Mask2Former, OWLv2 or Grounding DINO in transformers'
    format, a folder or a hub name; the published rules' is facebook/mask2former-swin-small-coco-instance. None:
    GenEval's own program scores the export."""
    geneval_colours: str = "openai/clip-vit-large-patch14"
    """CLIP that tells the colours of what geneval_detector finds; the default is the published rules'."""

    baseline: bool = False
    """Put the scores of any data beside what was published of this very model before any training (GenEval, DPG-Bench,
    MMMU, ...), with what was measured otherwise: check it before you train. A benchmark's always are. export_name says
    which benchmark a table is."""

    # --- export ---
    export: tuple[Literal["geneval", "dpg", "wise", "t2i_compbench", "lmms_eval", "vlmevalkit"], ...] = ()
    """Also write what other benchmarks' scorers read, into export/<name> of output_dir."""
    export_name: str | None = None
    """What lmms-eval or VLMEvalKit calls the task or data set. None: the tasks' names here."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        path_problems,
        drawing_problems,
        judge_problems,
        evaluation_problems,
        benchmark_problems,
        template_kwargs_problems,
    )
    RENAMED: ClassVar[Mapping[str, str]] = OF_EVALUATION
