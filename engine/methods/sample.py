"""`recipes/sample.py` from settings to pictures and texts: load, ask, write; several models side by side.

    config.yaml      the settings, readable by --config
    samples.jsonl    a line per trajectory: model, prompt, member, text, the picture's file
    pictures/        what was drawn, as PNG
    grid.png         a row per prompt, a column per sample, model beside model

Every batch is on disk before the next one is drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from ..evaluate.generate import select
from ..evaluate.manifest import picture_names
from ..evaluate.sources import load_items
from ..policies.auto import model_draws
from ..policies.base import Policy
from ..policies.inputs import check_fit
from ..processes.launch import unused_folder
from ..records import Prompt, Rollout
from ..rollout.capacity import remarks_on
from ..rollout.sampling import truncation_of
from ..settings.train_config import WorldName
from ..settings.yaml_files import to_yaml
from ..show.sheets import MAX_ROWS, sheet_of_models, to_picture
from ..world.worlds import WORLDS
from .model import Model, prompt_of
from .sample_config import SampleConfig
from .trained_with import drawing_turn_of, filling_of, inputs_of, tells_concepts, unconditional_of, world_of_model

WORD = re.compile(r"<[^<>\s]+>|[^\W_]+(?:['’-][^\W_]+)*")
"""A concept's name in brackets, or a word."""
FEW_WORDS, MAX_WORDS = 2000, 12
"""Tokens of a vocabulary whose words are tokens of their own, and words that a warning lists."""
Samples = dict[str, list[Rollout]]
"""Model -> its trajectories, in the order of the prompts."""


def run_sample(config: SampleConfig, console: Console | None = None) -> Samples:
    """Asks every model everything and writes what they make of it; returns the trajectories.

    Raises:
        ConfigError, DataError, PictureError: a model, data or a picture that cannot be used.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    names = config.compare or (config.model,)
    draw = all(model_draws(name) for name in names)
    prompts = prompts_of(config, draw, tells_concepts(config, names[0]), world_of_model(names[0]))
    folder = unused_folder(config.output_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    samples: Samples = {}
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as rows:
        for number, name in enumerate(names):
            model = Model.unchecked(name, bf16=config.bf16)
            check_fit(inputs_of(config, name).given_to(model.policy))
            if unknown := unknown_words(model.policy, [prompt.text for prompt in prompts]):
                console.print(f"  warning: {told_unknown(model.name, unknown)}", markup=False, style="yellow")
            for line in remarks_on(model.policy, prompts):
                console.print(f"  {line}", markup=False)
            turn = drawing_turn_of(config, name)
            made = samples[model.name] = []
            for batch in batches(prompts, config.batch_size):
                for rollout in ask(model, batch, config, turn):
                    rows.write(json.dumps(_row(folder, number, model.name, rollout), ensure_ascii=False) + "\n")
                    made.append(rollout)
                rows.flush()
                console.print(f"  {model.name}: {len(made)} of {len(prompts) * config.num_generations}", markup=False)
            del model  # before the next one is loaded
    shown = dict(zip(short_names(list(samples)), samples.values(), strict=True))
    sheet_of_models("What the models make of each prompt", shown).save(folder / "grid.png")
    _tell(console, config, folder, prompts, samples)
    return samples


def prompts_of(
    config: SampleConfig, draws: bool, concept_info: bool = False, world: WorldName = "rendered"
) -> list[Prompt]:
    """What is asked, with unique ids, the same of every model; `concept_info`: as of `load_items`; `world`: whose
    held-out items are asked where nothing is given."""
    typed = list(config.prompt)
    if config.prompts_file is not None:
        lines = config.prompts_file.read_text(encoding="utf-8-sig").splitlines()
        typed += [line.strip() for line in lines if line.strip()]
    if not typed and config.prompts_file is not None:
        raise ConfigError(f"prompts_file: expected a prompt on each line, got none in {config.prompts_file}")
    if typed:
        produce = config.produce or (("text",) if config.image or not draws else ("image",))
        return [prompt_of(text, produce, config.image, number) for number, text in enumerate(typed)]
    found = load_items(config.data or WORLDS[world].folder(), split=config.split, concept_info=concept_info)
    items = select(found, config.tasks, config.num_items)
    asked = [prompt for group in items.values() for prompt in group if draws or "image" not in prompt.segments]
    if not asked:
        raise ConfigError("data: every item asks for a drawing, and the model draws nothing; pass --prompt")
    return asked


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """At most `size` prompts at a time."""
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def ask(model: Model, prompts: Sequence[Prompt], config: SampleConfig, drawing_turn: str) -> list[Rollout]:
    """One batch, sampled as the settings say."""
    return model.sample(
        prompts,
        config.num_generations,
        temperature=config.temperature,
        max_text_tokens=config.max_completion_length,
        cfg_weight=config.cfg_weight,
        unconditional=unconditional_of(config, model.name),
        drawing_turn=drawing_turn,
        **filling_of(config, model.name),
        **truncation_of(config),
        seed=config.seed,
    )


def unknown_words(policy: Policy, texts: Sequence[str]) -> list[str]:
    """Words of `texts` that the model cannot have met, in their order: those without a token, and, where the vocabulary
    is one of a few hundred words (the embedded models'), those that are no token of their own."""
    tokenizer = policy.tokenizer
    whole_words, unknown_id = len(tokenizer) <= FEW_WORDS, tokenizer.unk_token_id
    found = []
    for word in dict.fromkeys(word for text in texts for word in WORD.findall(text)):
        ids = policy.encode(word).tolist()
        if unknown_id in ids or (whole_words and len(ids) > 1):
            found.append(word)
    return found


def told_unknown(model: str, words: Sequence[str]) -> str:
    """What they are, what comes of it, and what to do."""
    shown = ", ".join(words[:MAX_WORDS]) + (f" and {len(words) - MAX_WORDS} more" if len(words) > MAX_WORDS else "")
    return (
        f"{model} has never met these words, and what it makes of them means nothing: {shown}; ask in the words of its "
        "training data (recipes/sample.py without --prompt shows some)"
    )


def short_names(names: Sequence[str]) -> list[str]:
    """The ends of paths, as short as they can be told apart by."""
    parts = [Path(name).parts for name in names]
    length = next((n for n in range(1, 100) if len({p[-n:] for p in parts}) == len(parts)), 100)
    return ["/".join(p[-length:]) for p in parts]


def _row(folder: Path, model_number: int, model: str, rollout: Rollout) -> dict[str, object]:
    """A trajectory's line in samples.jsonl; writes its picture."""
    prompt, picture = rollout.prompt, None
    if rollout.image is not None:
        place = prompt.id.replace("/", "_")[:80]
        picture = f"pictures/{model_number}_{place}_{rollout.member}.png"
        to_picture(rollout.image).save(folder / picture)
    return {
        "model": model,
        "id": prompt.id,
        "task": prompt.task,
        "prompt": prompt.text,
        "image": picture_names(prompt.images),
        "member": rollout.member,
        "text": rollout.text if "text" in prompt.segments else None,
        "truncated": any(segment.truncated for segment in rollout.segments),
        "picture": picture,
        "answer": prompt.answer,
        "target": prompt.target,
    }


def _tell(console: Console, config: SampleConfig, folder: Path, prompts: Sequence[Prompt], samples: Samples) -> None:
    """The texts, where they are few, and where everything lies."""
    if len(prompts) <= 8:
        for name, made in zip(short_names(list(samples)), samples.values(), strict=True):
            for rollout in made:
                if "text" in rollout.prompt.segments:
                    console.print(f"  {name}: {rollout.prompt.text!r} -> {rollout.text!r}", markup=False)
    if len(prompts) > MAX_ROWS:
        console.print(f"  grid.png shows the first {MAX_ROWS} of {len(prompts)} prompts")
    console.print(f"  {folder / 'grid.png'}\n  {folder / 'samples.jsonl'}", markup=False)
