"""What can be known of a conversion before torch is loaded: the layouts of its folders, whole weights, the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.deepseek_config import OURS, THEIRS
from ..checkpoints.deepseek_files import config_in
from ..checkpoints.hub_cache import snapshots
from ..checkpoints.show_o_files import OURS as SHOW_O
from ..checkpoints.show_o_files import SHOW_O as PUBLISHED
from ..checkpoints.show_o_files import published_class, show_o_problems
from ..errors import ConfigError, refuse
from . import hub_names
from .hub_names import Wanted
from .model_files import folder_problems, settings_in, show_o_damage, weight_problems
from .preflight import output_problems

GOES = {
    THEIRS: ("deepseek", "transformers"),
    OURS: ("transformers", "deepseek"),
    PUBLISHED: ("showlab", "transformers"),
    SHOW_O: ("transformers", "showlab"),
}
"""Kind of a checkpoint -> the layout that it is in, and the one that it can be converted into."""


def check_conversion(config: Any) -> None:
    """Ends the process with exit code 2 where a checkpoint cannot be converted, as far as names, sizes and JSON tell.

    Args:
        config: settings of `recipes/convert.py`.
    """
    problems, names, size = list[str](), list[Wanted](), 0
    for setting, model in (("model", config.model), ("base", config.base), ("vq", config.vq)):
        folder = Path(model or "").expanduser()
        if model is None or folder.is_file():
            continue
        if not folder.is_dir():
            parts = setting == "model" and config.vq and config.tokenizer
            names.append(Wanted(hub_names.NAMED_PARTS if parts else setting, model))
            continue
        problems += show_o_damage(setting, folder) if setting == "vq" else _folder_problems(setting, folder, config)
        size = size or sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    problems += output_problems("output", config.output, size)
    problems += [] if problems else hub_names.look_up(names)[0]
    if not problems and not Path(config.model).expanduser().is_dir():  # its settings are in the hub's cache now
        kinds = [kind_of_folder(folder) for folder in snapshots(config.model, "model")]
        problems += [problem for kind in kinds[:1] if (problem := direction_problem(config, kind))]
    if problems:
        refuse(ConfigError.of(list(dict.fromkeys(problems))))


def kind_of_folder(folder: Path) -> str:
    """Its `model_type`, or the class of a folder of diffusers' kind."""
    return str(config_in(folder).get("model_type") or published_class(folder))


def _folder_problems(setting: str, folder: Path, config: Any) -> list[str]:
    kind = kind_of_folder(folder)
    if isinstance(settings_in(folder / "config.json"), dict) and kind not in GOES:
        return [
            f"{setting}: expected Janus in DeepSeek's layout ({THEIRS}) or transformers' ({OURS}), or Show-o, got "
            f"model_type {kind!r} in {folder}; other models need no conversion, or have none"
        ]
    if setting == "base" and GOES.get(kind, ("",))[0] == "transformers":
        theirs = "DeepSeek's" if kind == OURS else "showlab's"
        return [f"base: expected {theirs} layout, got {folder} in transformers'; name the published one"]
    if kind == PUBLISHED:
        found = show_o_problems(setting, folder, vq=config.vq, text=config.tokenizer) if setting == "model" else []
        found += show_o_damage(setting, folder)
    elif kind == SHOW_O:
        found = [f"{setting}: expected whole safetensors, got {problem}" for problem in weight_problems(folder)]
    else:
        found = folder_problems(setting, folder, trained=True)
    problem = direction_problem(config, kind) if setting == "model" else ""
    return [*found, problem] if problem else found


def direction_problem(config: Any, kind: str) -> str:
    """A conversion into the layout that a checkpoint has already, or into another model's; empty for the other way.

    Args:
        config: settings of `recipes/convert.py`.
        kind: of its model.
    """
    there, other = GOES.get(kind, ("", config.to))
    if config.to in (None, other):
        return ""
    has = (
        f", whose layout {config.model} has already" if config.to == there else f", another model's than {config.model}"
    )
    return f"to: expected {other}, got {config.to}{has}; use it as it is, or leave --to out for the other one"
