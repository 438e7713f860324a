"""`recipes/evaluate.py` from settings to tables: load, generate, score, export.

Ranks (torchrun) share out the items; rank 0 scores and exports.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from ..errors import ConfigError, EvaluationError, RolloutTooLarge
from ..evaluate import baseline
from ..evaluate.benchmarks.data_sets import DATA_SETS, sources_of
from ..evaluate.benchmarks.known import load_benchmark_prompts
from ..evaluate.export import export
from ..evaluate.generate import generate_items, select
from ..evaluate.graders import Graders
from ..evaluate.manifest import Settings, read_manifest
from ..evaluate.score import Result, read_complete, rich_table, score_folder
from ..evaluate.sources import load_items
from ..policies.base import Policy
from ..processes.group import init_distributed, one_at_a_time, own_device, place
from ..records import Prompt
from ..rewards.judge.attribute_judge import AttributeScorer
from ..rollout.capacity import remarks_on
from .evaluation_config import EvaluateConfig
from .trained_with import (
    drawing_turn_of,
    filling_of,
    inputs_of,
    run_of,
    tells_concepts,
    unconditional_of,
    world_of_model,
)


def run_evaluation(config: EvaluateConfig, console: Console | None = None) -> Result | None:
    """Runs the stages that `config` asks for.

    Returns:
        Scores, on rank 0; None elsewhere and where nothing was scored.

    Raises:
        EvaluationError, DataError, PictureError: as their files say.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun's ranks
        init_distributed()
    rank = place()[0]
    console = console or Console(quiet=rank != 0, highlight=False)
    folder = config.output_dir
    if config.stage != "score":
        generate(config, console)
    if rank != 0:
        return None
    for kind in config.export:
        items = read_complete(folder)
        out = folder / "export" / kind
        how = export(
            items, folder, kind, out, model=str(read_manifest(folder)["model"]["name"]), name=config.export_name
        )
        console.print(f"  {kind}: {out}\n  to score it: {how}", markup=False, soft_wrap=True)
    if config.stage == "generate":
        return None
    with console.status("scoring"):
        result = score_folder(folder, graders_of(config), world_scorers(folder))
    console.print(rich_table(result))
    console.print(f"  {folder / 'scores.json'}, {folder / 'scores.md'}", markup=False, soft_wrap=True)
    if config.baseline or config.benchmark or result.outcomes:
        show_published(config, result, console)
    return result


def show_published(config: EvaluateConfig, result: Result, console: Console) -> None:
    """Ours beside what was published of the untouched model, and of what was trained from it."""
    folder = config.output_dir
    if config.baseline and run_of(config.model) is not None:
        console.print(
            f"  {config.model} lies in a run's folder: it is no untouched model", markup=False, soft_wrap=True
        )
    text = baseline.write(folder, baseline.compare(folder, read_complete(folder), result, config.export_name))
    console.print(text, markup=False, soft_wrap=True, end="")
    console.print(f"  {folder / baseline.TABLE}", markup=False, soft_wrap=True)


def generate(config: EvaluateConfig, console: Console) -> None:
    """Stage 1."""
    items, policy, model, source = one_at_a_time(lambda: parts_of(config, console))
    settings = Settings(
        seed=config.seed,
        temperature=config.temperature,
        max_text_tokens=config.max_completion_length,
        cfg_weight=config.cfg_weight,
        unconditional=unconditional_of(config, config.model),
        drawing_turn=drawing_turn_of(config, config.model),
        **filling_of(config, config.model),
        picture_fit=policy.picture_fit,
        chat_template_kwargs=inputs_of(config, config.model).chat_template_kwargs,
        images_per_prompt=config.images_per_prompt,
        greedy_texts=config.greedy_texts,
        sampled_texts=config.sampled_texts,
        batch_size=config.batch_size,
    )
    count = sum(map(len, items.values()))
    console.print(
        f"  {count} items of {len(items)} tasks from {source}, into {config.output_dir}", markup=False, soft_wrap=True
    )

    with console.status("generating") as status:
        try:
            generate_items(
                policy,
                items,
                config.output_dir,
                settings,
                model_name=model,
                source=source,
                progress=lambda done, total: status.update(f"generated {done} of {total}"),
            )
        except (RolloutTooLarge, ValueError) as error:
            if not str(error).startswith("generate: "):
                raise
            raise EvaluationError(str(error)) from error  # a prompt or a batch that the model cannot take


Parts = tuple[dict[str, list[Prompt]], Policy, str, str]
"""Items by task, the policy, and the names of model and data."""


def parts_of(config: EvaluateConfig, console: Console) -> Parts:
    """Data and model; the embedded ones where `config` names none."""
    from ..checkpoints.published import local_checkpoint
    from ..policies.auto import load_policy
    from ..policies.inputs import check_fit
    from ..world.worlds import WORLDS
    from .starting import limit_threads

    found, source = items_of(config)
    items = select(found, config.tasks, config.limit)

    def say(line: str) -> None:
        console.print(f"  {line}", markup=False, soft_wrap=True)

    model = config.model or str(WORLDS[config.world or "rendered"].bases["janus"].folder(say))
    asked = inputs_of(config, config.model)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    policy = check_fit(asked.given_to(load_policy(local_checkpoint(model, say), dtype=dtype)))
    policy.eval().requires_grad_(False)
    for line in remarks_on(policy, [prompt for prompts in items.values() for prompt in prompts]):
        say(line)
    limit_threads(policy)
    return items, policy.to(own_device()), model, source


def items_of(config: EvaluateConfig) -> tuple[dict[str, list[Prompt]], str]:
    """What is asked, by task, and the name of the data: a benchmark's, data of one's own, or the embedded world."""
    from ..world.worlds import WORLDS

    told, found, sources = tells_concepts(config, config.model), dict[str, list[Prompt]](), list[str]()
    own = {} if config.benchmark else {"": config.data}
    for name, source in (sources_of(config.benchmark, config.data) | own).items():
        read = source or str(WORLDS[world_of_model(config.model, config.world)].folder())
        if name in DATA_SETS:
            found |= load_benchmark_prompts(
                name, read, config.split, image_folder=config.image_folder, think=bool(config.think)
            )
        else:
            found |= load_items(
                read,
                "unifybench" if name else config.data_form,
                config.split,
                think=config.think is not False,
                concept_info=told,
                image_folder=config.image_folder,
            )
        sources.append(read)
    return found, ", ".join(sources)


def graders_of(config: EvaluateConfig) -> Graders:
    """CLIP, the judge and GenEval's detector, as far as `config` names them."""
    clip = judge = detector = None
    if config.clip is not None:
        from ..rewards.builtin.clip import ClipScorer

        try:
            clip = ClipScorer.from_pretrained(config.clip, device=own_device())
        except ConfigError as error:
            raise ConfigError(f"clip: {error}") from error
    if config.judge_url is not None and config.judge_model is not None:
        from ..rewards.judge.llm_judge import LLMJudge

        judge = LLMJudge(config.judge_url, config.judge_model, api_key_env=config.judge_key_env)
    if config.geneval_detector is not None:
        from ..rewards.images.geneval import GenEval

        detector = GenEval.from_pretrained(config.geneval_detector, config.geneval_colours, device=own_device())
    return Graders(
        clip=clip,
        clip_name=config.clip or "",
        clip_references=config.clip_references,
        judge=judge,
        judge_name=config.judge_model or "",
        detector=detector,
        detector_name=f"{config.geneval_detector}, {config.geneval_colours}" if config.geneval_detector else "",
    )


def world_scorers(folder: Path) -> dict[str, AttributeScorer]:
    """Readers of attributes, where the items name those of an embedded world; they need no policy."""
    from ..world.vq import load_vq, round_trip
    from ..world.worlds import world_of
    from .judges import world_readers

    world = world_of(item.prompt.attributes for item in read_complete(folder) if item.prompt.attributes and item.drawn)
    if world is None:
        return {}
    vq = load_vq(world.image_tokenizer)
    return world_readers(world, world.grader(lambda images: round_trip(vq, images)))
