"""CoRL's dry run: every training planned, and what all of them take together said first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..data.samples import Sample
from ..errors import DataError
from ..evaluate.drawing import by_task
from ..methods.dry_run import show
from ..methods.estimate import Estimate, hours_words, size_words
from ..methods.reward_memory import image_reward_models, reward_models
from ..policies.base import Policy
from ..records import Prompt
from ..show.pulse import duration
from .config import CorlConfig, Training
from .needs import check_needs
from .parts import data_of
from .reward_parts import SEGMENTS
from .training_data import TrainingData, stream_of

Say = Callable[[str], None]


def plan_all(config: CorlConfig, say: Say = print) -> None:
    """Says what the run takes, then each training's plan.

    Raises:
        As `methods.dry_run.show`, before anything is said of the cost.
    """
    data = data_of(config)
    if config.data is not None:
        data.check(say)
    check_needs(config, data)
    items = scored_items(config, data)
    trainings = data.trainings()
    told: list[str] = []
    estimates = []
    for number, training in enumerate(trainings):
        samples = data.samples(training)
        settings = config.for_stage(training, len(samples))
        told.append(f"\n# {training}: {len(samples)} samples of {data.root}, {settings.max_steps} steps\n")
        # The base's scores are those before the first training; each later one has its start's.
        times = 1 + (number == 0) + (number == len(trainings) - 1 and merges(trainings))
        estimates.append(
            show(
                settings,
                partial(_first_prompts, settings, training, samples),
                told.append,
                held_out=lambda: items,
                everything=partial(_every_prompt, config, samples),
                times=times,
                beside=partial(beside, settings, training),
                refers=settings.lora_rank > 0 or settings.beta > 0 or (settings.image_beta or 0) > 0,
            )
        )
    for line in (*total(trainings, estimates), *told):
        say(line)


def total(trainings: Sequence[Training], estimates: Sequence[Estimate]) -> list[str]:
    """What all trainings take, and each one's share."""
    if len(estimates) < 2:
        return []
    hours = sum(one.gpu_hours for one in estimates)
    seconds = sum(one.hours.seconds for one in estimates)
    merged = estimates[-1].disk.model * merges(trainings)
    disk = sum(one.disk.total for one in estimates) + merged
    worst = max(estimates, key=lambda one: one.memory.peak())
    return [
        f"all {len(estimates)} trainings take about {hours_words(hours)} on {worst.gpus} ({duration(seconds)}), "
        f"{worst.memory.peak() / 2**30:.1f} GiB of a GPU's {worst.gpu.memory / 2**30:.0f}, {size_words(disk)} of disk",
        *(f"  {name}: {one.headline()}" for name, one in zip(trainings, estimates, strict=True)),
    ]


def merges(trainings: Sequence[Training]) -> bool:
    """Whether a model of two is made at the end."""
    return {"mcq", "oe"} <= set(trainings)


def scored_items(config: CorlConfig, data: TrainingData) -> list[Prompt]:
    """The held-out items that every model is scored on; none where the data hold none out."""
    if not config.eval_samples:
        return []
    try:
        benchmark = data.held_out()
    except DataError:
        return []
    return [prompt for batch in by_task(benchmark, config.eval_samples, config.eval_samples) for prompt in batch]


def beside(config: CorlConfig, training: Training, policy: Policy) -> dict[str, int]:
    """The frozen copy of the starting model that judges, which is loaded apart, and the rewards' own models."""
    size = sum(parameter.numel() for parameter in policy.parameters())
    judges = {"frozen copy that judges": size * (2 if config.bf16 else 4)}
    if "image" not in SEGMENTS[training]:
        return judges
    used, own = set(config.reward_funcs), ("policy", "world")
    cycle = "cycle" in used
    names = {
        "captioner": config.captioner if cycle and config.cycle_text != "none" else None,
        "LPIPS": f"lpips {config.lpips_net}" if cycle and config.cycle_image == "lpips" else None,
        "SPICE's parser": config.spice_parser if cycle and config.cycle_text == "spice" else None,
        "BERT": config.bert if cycle and config.cycle_text == "bertscore" else None,
        "CLIP": config.clip if used & {"clip_text", "clip_image"} else None,
    }
    models = reward_models({use: name for use, name in names.items() if name not in own})
    return judges | models | image_reward_models(config.reward_funcs, config.reward_models)


def _first_prompts(settings: CorlConfig, training: Training, samples: Sequence[Sample], ranks: int) -> list[Prompt]:
    return stream_of(settings, training, samples, 0, ranks).next_step()


def _every_prompt(config: CorlConfig, samples: Sequence[Sample]) -> list[Prompt]:
    """The user's own, whose lengths nobody knows; none of the rendered world."""
    return [prompt for sample in samples for prompt in sample] if config.data is not None else []
