"""What can be known before torch is loaded: versions, the model's files, names on the hub, data, rewards, the disk.

A start that cannot come to anything ends here, in seconds and before any work, with a line for each thing that is
wrong; `--dry_run` goes through the same.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoints.deepseek_config import OURS, THEIRS
from ..checkpoints.deepseek_files import config_in, weight_names
from ..checkpoints.hub import problems_with_hub
from ..checkpoints.hub_cache import snapshots
from ..checkpoints.published import kept_conversion
from ..checkpoints.show_o_files import needs_conversion
from ..errors import ConfigError, kind_of, refuse
from ..evaluate.benchmarks.data_sets import sources_of
from ..policies.kinds import DRAWING, is_liquid_folder
from ..processes.launch import count_gpus, restarted
from ..processes.run_folder import unused_folder
from ..rewards.images.image_rewards import NAMED, WITHOUT_TOKENIZER, Checkpoint, checkpoints_of
from ..rewards.images.image_rewards import problems_of as image_problems
from ..rewards.transport import key_problem
from ..settings.masked_rules import order_problems
from ..settings.rules import gpus_problem, ranks_problem
from ..settings.source_names import split_named
from ..whole_files import cache_dir
from . import hub_names
from .data_names import data_problems
from .gpus import STATE_BYTES
from .hub_names import Wanted, gib
from .mistyped import mistyped_run
from .model_files import (
    folder_problems,
    num_weights,
    positions,
    settings_in,
    text_decoders,
    weight_problems,
)
from .reward_names import reward_problems

NEEDED = {"torch": (2, 10), "transformers": (5, 12, 1), "deepspeed": (0, 19, 8), "peft": (0, 18), "datasets": (4, 7)}
NEEDED |= {"safetensors": (0, 7)}
"""Versions that pyproject.toml asks for: an environment of another project's is told before it fails somewhere."""
TOY_POSITIONS = 512
"""Longest sequence of the tiny base."""
FILLED_IN = ("show_o",)
"""`model_type`s of models that fill images in."""
MANY = 1 << 30
"""Tokens of an image, where nothing has counted them yet."""
LEAST_SPACE = 1 << 24
"""Bytes that must be free where anything is written: a page, pictures, a log."""
NVIDIA = Path("/dev/nvidiactl")
"""Is there where a GPU is."""


def check_start(config: Any) -> None:
    """Ends the process with exit code 2 where a run with these settings could not come to anything.

    Args:
        config: a recipe's settings, which are right by themselves.
    """
    problems = version_problems()
    models, names = models_of(config)
    for setting, folder in models.items():
        reads_text = setting.removeprefix("reward_models ") not in WITHOUT_TOKENIZER
        problems += folder_problems(setting, folder, trained=setting == "model", tokenizer=reads_text)
    damage, others = _merged_problems(_merged_of(config))
    problems, names = problems + damage, names + others
    problems += [] if problems else length_problems(config, models.get("model"))
    problems += [] if problems else turn_problems(config, models.get("model"))
    problems += [] if problems else filling_problems(config, models.get("model"))
    problems += [] if problems else conversion_problems(models.get("model"))
    problems += ahead_problems(config)
    problems += judge_problems(config)
    problems += reward_problems("reward_funcs", getattr(config, "reward_funcs", ()), _built_in(config))
    problems += image_problems(_image_rewards(config), getattr(config, "reward_models", ()))
    problems += data_problems(config)
    needed = 0 if problems else space_needed(config, models.get("model"))
    problems += output_problems("output_dir", written_to(config), needed)
    problems += mistyped_run(config)
    if getattr(config, "model", "") is None or getattr(config, "data", "") is None:  # the embedded ones, which are kept
        problems += cache_problems()
    if not problems and os.environ.get("LOCAL_RANK", "0") == "0":  # one of a machine asks for all
        problems, downloads = hub_names.look_up([*names, *_data_sets(config)])
        problems += [] if problems else _kind_problems(_merged_of(config))
        for download in downloads:
            size = gib(download.num_bytes) if download.num_bytes else "of unknown size"
            print(f"syncr1: to download: {download.wanted.setting} {download.wanted.name}, {size}", flush=True)
        if getattr(config, "push_to_hub", False) and not restarted():  # a night's work does not end for a hub
            problems += problems_with_hub(config)
    if problems:
        refuse(ConfigError.of(list(dict.fromkeys(problems))))


def check_weights(models: Mapping[str, str], output: Path | None = None) -> None:
    """Ends the process with exit code 2 where one of the models, by setting, has no whole safetensors: folders by their
    headers, other names by what the hub tells; or where `output`, a folder for one of their size, cannot be written."""
    problems, names = _merged_problems(models)
    if output is not None:
        last = Path(list(models.values())[-1]).expanduser()
        size = sum(path.stat().st_size for path in last.glob("*.safetensors")) if last.is_dir() else 0
        problems += output_problems("output", output.absolute().parent if output.exists() else output, size)
    problems += [] if problems else hub_names.look_up(names)[0]
    problems += [] if problems else _kind_problems(models)
    if problems:
        refuse(ConfigError.of(list(dict.fromkeys(problems))))


def _kind_problems(models: Mapping[str, str]) -> list[str]:
    """Models of several kinds, by setting, of which nothing can be merged."""
    kinds = dict[str, str]()
    for setting, model in models.items():
        if setting.partition(" ")[0] not in hub_names.OWN:  # compared, not merged
            continue
        folder = Path(model).expanduser()
        places = [folder] if folder.is_dir() else snapshots(model, "model")
        found = next((kind for place in places if (kind := config_in(place).get("model_type"))), None)
        if isinstance(found, str):
            kinds[setting] = OURS if found == THEIRS else found
    if len(set(kinds.values())) < 2:
        return []
    told = ", ".join(f"{setting} {kind}" for setting, kind in kinds.items())
    return [f"models: expected models of one kind, trained from one base, got {told}; name those of one base"]


def _merged_problems(models: Mapping[str, str]) -> tuple[list[str], list[Wanted]]:
    """What is wrong with folders that are merged, by setting, and names on the hub among them: of a folder its weights,
    of one in DeepSeek's layout, which is converted first, all of it."""
    problems, names = list[str](), list[Wanted]()
    for setting, model in models.items():
        folder = Path(model).expanduser()
        if not folder.is_dir():
            names.append(Wanted(setting, model))
        elif needs_conversion(folder):
            problems += folder_problems(setting, folder, trained=True) or conversion_problems(folder)
        else:
            found = weight_problems(folder)
            problems += [f"{setting}: expected whole safetensors, got {problem}" for problem in found]
    return problems, names


def _merged_of(config: Any) -> dict[str, str]:
    """What CoRL merges besides what it trains, by setting."""
    base = getattr(config, "merge_base", None)
    models = {f"merge_models {name}": name for name in getattr(config, "merge_models", ())}
    return models if base is None else {"merge_base": base, **models}


def models_of(config: Any) -> tuple[dict[str, Path], list[Wanted]]:
    """Checkpoints that a run needs whatever its data: folders by setting, and names on the hub."""
    folders, names = dict[str, Path](), list[Wanted]()
    for one in _image_models(config):
        path = Path(one.name).expanduser()
        if path.is_dir():
            folders[f"reward_models {one.key}"] = path
        elif not path.is_file():
            names.append(Wanted(f"reward_models {one.key}", one.name))
    for setting in ("model", "clip"):
        name = getattr(config, setting, None)
        if name is None or (setting == "clip" and not _uses_clip(config)):
            continue
        folder = Path(name).expanduser()
        if folder.is_dir():
            folders[setting] = folder
        else:
            names.append(Wanted(setting, name))
    if getattr(config, "geneval_detector", None) is not None:
        for setting in ("geneval_detector", "geneval_colours"):
            folder = Path(getattr(config, setting)).expanduser()
            folders |= {setting: folder} if folder.is_dir() else {}
            names += [] if folder.is_dir() else [Wanted(setting, getattr(config, setting))]
    return folders, names


def _image_models(config: Any) -> list[Checkpoint]:
    """Of image rewards by name; none where `reward_models` is wrong, which is told apart."""
    rewards, settings = _image_rewards(config), getattr(config, "reward_models", ())
    return [] if image_problems(rewards, settings) else checkpoints_of(rewards, settings)


def _image_rewards(config: Any) -> tuple[str, ...]:
    """Names of rewards, with that of faces where R_id asks for them."""
    return (*getattr(config, "reward_funcs", ()), *(("face",) if getattr(config, "identity_faces", False) else ()))


def _built_in(config: Any) -> tuple[str, ...]:
    """What `reward_funcs` may name without a place; nothing where a recipe has no such setting."""
    return (*config.REWARDS, *NAMED) if hasattr(config, "reward_models") else getattr(config, "REWARDS", ())


def _uses_clip(config: Any) -> bool:
    """CoRL names one by default, for rewards that it may not have been asked for."""
    asked = getattr(config, "reward_funcs", None)
    return not hasattr(config, "cycle_text") or bool({"clip_text", "clip_image"} & set(asked or ()))


def _data_sets(config: Any) -> list[Wanted]:
    if benchmarks := getattr(config, "benchmark", ()):
        read = () if config.stage == "score" else sources_of(benchmarks, config.data).values()
        return [Wanted("data", name, "dataset") for name in read if name and not os.path.exists(name)]
    found = []
    for setting in ("data", "data_t2i", "data_mcq", "data_oe", "eval_data"):
        source = getattr(config, setting, None)
        base = None if source is None else split_named(source)[0]
        if base is not None and not os.path.exists(os.path.expanduser(base)):
            found.append(Wanted(setting, base, "dataset"))
    return found


def version_problems() -> list[str]:
    """Libraries that are not there, or older than what this program was written for."""
    found = []
    for package, needed in NEEDED.items():
        wanted = ".".join(map(str, needed))
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(package) is None:
                found.append(
                    f"{package}: expected at least {wanted}, got none; run `pip install .`, or .venv/bin/python"
                )
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
        if numbers < needed:
            found.append(
                f"{package}: expected at least {wanted}, got {version}; `pip install -U '{package}>={wanted}'`"
            )
    return found


def length_problems(config: Any, folder: Path | None) -> list[str]:
    """A text that alone is longer than the model's positions; that of a prompt is known once it is read."""
    if not hasattr(config, "max_completion_length") or (getattr(config, "model", None) is not None and folder is None):
        return []
    told = {} if folder is None else settings_in(folder / "config.json")
    reach = TOY_POSITIONS if folder is None else positions(told) if isinstance(told, dict) else None
    if reach is None or config.max_completion_length < reach:
        return []
    return [
        f"max_completion_length: expected less than the {reach} positions of {folder or 'the tiny model'}, got "
        f"{config.max_completion_length}; lower it, the prompt needs some as well"
    ]


def turn_problems(config: Any, folder: Path | None) -> list[str]:
    """A turn to draw in, for a model that draws nothing."""
    turn, told = getattr(config, "drawing_turn", None), {} if folder is None else settings_in(folder / "config.json")
    if turn in (None, "none") or not isinstance(told, dict) or told.get("model_type") not in text_decoders():
        return []
    if folder is not None and is_liquid_folder(folder):
        return []
    return [
        f"drawing_turn: expected none for {folder}, a {told['model_type']}, which draws no images, got {turn}; leave "
        f"it out, or name {DRAWING} as model"
    ]


def filling_problems(config: Any, folder: Path | None) -> list[str]:
    """Settings that a model's decoding order has no use for, as far as its kind tells."""
    if not hasattr(config, "masked_logp") or (getattr(config, "model", None) is not None and folder is None):
        return []
    told = {"model_type": getattr(config, "policy", "janus")} if folder is None else settings_in(folder / "config.json")
    if not isinstance(told, dict) or (folder is not None and needs_conversion(folder)):
        return []
    kind = str(told.get("model_type"))
    usual = {field.name: field.default for field in fields(config)}
    draws = kind not in text_decoders() or (folder is not None and is_liquid_folder(folder))
    order = "masked" if kind in FILLED_IN else "raster"
    return order_problems(config, f"{folder or 'the tiny model'}, a {kind}", order, MANY * draws, usual)


def ahead_problems(config: Any) -> list[str]:
    """A process that samples ahead, for several ranks or beside a single GPU."""
    if not getattr(config, "rollout_staleness", 0):
        return []
    on_gpu = NVIDIA.exists() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    found = [ranks_problem(int(os.environ.get("WORLD_SIZE", "1")))]
    found += [gpus_problem(count_gpus(os.environ))] if on_gpu else []
    return [problem for problem in found if problem]


def judge_problems(config: Any) -> list[str]:
    """A key that no request could be made with; the address is looked at with the settings."""
    if getattr(config, "judge_key_env", None) is None or config.judge_model is None:
        return []
    problem = key_problem(config.judge_key_env)
    return [f"judge_key_env: {problem}"] if problem else []


def written_to(config: Any) -> Path:
    """The folder that a recipe makes or goes on in: a numbered neighbour where `output_dir` holds another run."""
    goes_on = getattr(config, "resume_from_checkpoint", None) is not None or not hasattr(config, "num_generations")
    return config.output_dir if goes_on else unused_folder(config.output_dir)


def output_problems(setting: str, folder: Path, needed: int = 0) -> list[str]:
    """A place where nothing can be written, or not enough.

    Args:
        setting: that names it.
        folder: which need not be there.
        needed: bytes that will be written there at least.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = kind_of(there)
        return [f"{setting}: expected a folder, got {folder}, where {there} is {what}; choose another name"]
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".syncr1-", dir=there))
        free = shutil.disk_usage(there).free
    except OSError as error:
        return [
            f"{setting}: expected a folder that can be written, got {folder} ({there}: {error.strerror}); change "
            "its permissions, or choose another one"
        ]
    if max(needed, LEAST_SPACE) <= free:
        return []
    what = f"{gib(needed)} of free space for the model and a checkpoint" if needed > LEAST_SPACE else "free space"
    less = ", or train with lora_rank" if setting == "output_dir" and needed > LEAST_SPACE else ""
    remedy = f"free some, or choose another disk{less}"
    return [f"{setting}: expected {what}, got {gib(free)} at {there}; {remedy}"]


def cache_problems() -> list[str]:
    """What is made on first use has to be kept somewhere."""
    cache = cache_dir()
    there = next(path for path in (cache, *cache.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return []
    got = f"{cache}, where {there} {'cannot be written' if there.is_dir() else 'is no folder'}"
    return [f"SYNCR1_CACHE: expected a folder that can be written, got {got}; name another one"]


def conversion_problems(folder: Path | None) -> list[str]:
    """No place for what a checkpoint in a published layout is converted into."""
    if folder is None or not needs_conversion(folder) or kept_conversion(folder) is not None:
        return []
    needed = sum((folder / name).stat().st_size for name in weight_names(folder))
    return cache_problems() or output_problems("SYNCR1_CACHE", cache_dir(), needed)


def space_needed(config: Any, folder: Path | None) -> int:
    """Bytes of the saved model and of one checkpoint, by the headers of the weights; 0 where nothing is trained, or
    where the model is not here yet."""
    if folder is None or not hasattr(config, "checkpointing_steps"):
        return 0
    count = num_weights(folder)
    state = 0 if config.lora_rank else STATE_BYTES * count
    return count * (2 if config.bf16 else 4) + state
