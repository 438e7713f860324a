"""Repositories of models in the hub's cache, and how they get there; no torch.

`org/name` is the branch `main`, `org/name@revision` a branch, tag or commit. The files that are used are fetched and no
others: settings, tokenizer, and the weights that the index names, safetensors where there are any; pickles only of
DeepSeek's layout and showlab's. What a kill leaves of a download is never in a snapshot, so that a snapshot holds whole
files, though perhaps not all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import ConfigError
from ..policies.kinds import SAFE
from ..reasons import reading
from ..show.pulse import pulse
from .deepseek_files import NEEDED, PICKLED, PUBLISHED_SAFE, is_theirs, weight_names
from .show_o_files import is_published

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""What lies beside the weights, indices among them."""
VQGAN = ("vqgan.safetensors", "vqgan.ckpt")
"""Ends of names of what Chameleon and Liquid draw with, where a repository has it (policies/vqgan_files.py)."""


def split(name: str) -> tuple[str, str]:
    """Repository and revision, which is empty where none is named."""
    repository, _, revision = name.partition("@")
    return repository, revision


def is_offline() -> bool:
    """The user has said that there is no network."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE)


def stay_offline() -> None:
    """The libraries, which are not imported yet, use their caches without asking."""
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))


def cache_folder() -> Path:
    """Where repositories are kept."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def snapshots(name: str, kind: str) -> list[Path]:
    """Those of a repository that a name means: the one that the branch or tag led to when it was last asked for, else,
    where nothing says which that was, all.

    Args:
        kind: model or dataset.
    """
    repository, revision = split(name)
    home = cache_folder() / f"{kind}s--{repository.replace('/', '--')}"
    there = [path for path in (home / "snapshots").iterdir() if path.is_dir()] if (home / "snapshots").is_dir() else []
    led_to = home / "refs" / (revision or "main")
    try:
        commit = led_to.read_text().strip() if led_to.is_file() else revision
    except OSError:
        commit = revision
    return [path for path in there if path.name == commit] if commit else there


def absent_from(folder: Path) -> list[str]:
    """Files of a snapshot of a model that have to be there and are not; empty where it is whole."""
    absent = absent_settings(folder)
    if absent:
        return absent
    names = weight_names(folder)
    if not is_published(folder) and not all(name.endswith(".safetensors") for name in names):
        names = []  # pickles, which are not taken
    if not names:
        return [] if any(not path.name.endswith(VQGAN) for path in folder.glob("*.safetensors")) else [SAFE]
    return [name for name in names if not (folder / name).is_file()]


def absent_settings(folder: Path) -> list[str]:
    """The same of its settings alone."""
    needed = ["config.json", *(NEEDED if is_theirs(folder) else ())]
    return [name for name in needed if not (folder / name).is_file()]


def fetched(name: str, say: Callable[[str], object]) -> Path:
    """The snapshot of a model's repository, with all that is used of it; fetched where it is not in the cache.

    Raises:
        ConfigError: no such repository or revision, no access, no network and not in the cache, or files missing.
    """
    whole = [path for path in snapshots(name, "model") if not absent_from(path)]
    if whole and is_offline():
        return whole[0]
    folder = settings_fetched(name, drawing=True)
    theirs, files = is_published(folder), weight_names(folder)
    if not files or not all((folder / file).is_file() for file in files):
        say(f"fetching {name} from the hub ...")
        shards = [file for file in files if theirs or file.endswith(".safetensors")]
        with pulse(f"fetching {name}"):
            folder = _get(name, [*_BESIDE, *(shards or [SAFE, PUBLISHED_SAFE])])
            if theirs and not weight_names(folder):
                folder = _get(name, [*_BESIDE, PICKLED])
    return _complete(name, folder, absent_from(folder))


def _complete(name: str, folder: Path, absent: list[str]) -> Path:
    if absent:
        raise ConfigError(
            f"model: {name}: expected all its files, got {len(absent)} missing ({absent[0]}); its repository is not "
            f"whole, or a download was cut off: `hf download {split(name)[0]}`, where there is a network, goes on"
        )
    return folder


def settings_fetched(name: str, *, drawing: bool = False) -> Path:
    """The snapshot of a model's repository, with its settings and its tokenizer at least; ConfigError as `fetched`.

    Args:
        name: of it.
        drawing: with a VQGAN that lies beside the weights (0.3 GB): without it nothing tells whether the model draws.
    """
    with pulse(f"fetching {name}"):
        folder = _get(name, [*_BESIDE, *(f"*{name}" for name in VQGAN if drawing)])
    return _complete(name, folder, absent_settings(folder))


def _get(name: str, patterns: Iterable[str]) -> Path:
    """Fetches what is not in the cache of the files that match."""
    repository, revision = split(name)
    _check_name(name, repository)
    with reading("model", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars, logging

        disable_progress_bars()
        logging.set_verbosity_error()  # it warns of each try anew; what fails in the end is told in a line

        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))


def _check_name(name: str, repository: str) -> None:
    """ConfigError where no repository can be called so: it was meant as a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        is_file = Path(name).is_file()
        what = "a file; name the folder that it is in" if is_file else "which is not a folder; correct it"
        raise ConfigError(f"model: expected a checkpoint folder or a hub name, got {name}, {what}") from None
