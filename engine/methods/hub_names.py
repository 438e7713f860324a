"""Names on the hub, looked at before torch is loaded: in the cache, reachable, there, allowed, safetensors among them.

An unreachable hub costs transformers most of a minute of retries for every file; here it costs seconds, once, and what
is in the cache is used without asking again.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..checkpoints.deepseek_config import THEIRS
from ..checkpoints.deepseek_files import is_theirs, weight_names
from ..checkpoints.hub_cache import (
    VQGAN,
    absent_from,
    cache_folder,
    is_offline,
    settings_fetched,
    snapshots,
    split,
    stay_offline,
)
from ..checkpoints.published import kept_conversion
from ..checkpoints.show_o_files import MAGVIT, SHOW_O, is_show_o
from ..errors import ConfigError, one_line
from ..reasons import reason_of
from ..whole_files import cache_dir
from .model_files import folder_problems, show_o_damage, weight_problems

Kind = Literal["model", "dataset"]
REACH = 4.0
"""Seconds that looking a name up and connecting may take."""
PICKLE = re.compile(r"pytorch_model[\w-]*\.bin$")
OWN = ("model", "base", "models", "merge_models", "merge_base")
"""Settings, or how they begin, that name the model that a run trains, converts or merges: its kind matters."""
NAMED_PARTS = "model to convert"
"""The setting, where Show-o's tokenizers are named beside it and need not lie in its folder."""
ANSWER = 10.0
"""Seconds that the hub may take to tell about a repository."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A repository that a run needs, and the setting that names it."""

    setting: str
    name: str
    kind: Kind = "model"


@dataclass(frozen=True, slots=True)
class Download:
    """What will be fetched before the run can begin."""

    wanted: Wanted
    num_bytes: int
    """0 where the hub did not tell."""
    converted: int = 0
    """Bytes of the copy in transformers' format that a run makes of it, in our own cache; 0 where it makes none."""


def look_up(wanted: list[Wanted]) -> tuple[list[str], list[Download]]:
    """What is wrong with names on the hub, in words, and what has yet to be fetched.

    Where the hub does not answer and all is in the cache, it is not asked again in this process.
    """
    absent = [one for one in wanted if not is_cached(one)]
    kept = [
        (one, folder)
        for one in wanted
        if one not in absent and one.setting.partition(" ")[0] in OWN
        for folder in _kept(one)
    ]
    if problems := [problem for one, folder in kept for problem in own_problems(one, folder, weights=True)]:
        return problems, []
    copies = {one.name: size for one, folder in kept if (size := _to_convert(folder))}
    if is_offline():
        return [_absent(one, "offline is set (HF_HUB_OFFLINE)") for one in absent] or _space([], copies), []
    unreachable = why_unreachable() if wanted else ""
    if unreachable and not absent:
        stay_offline()
    if unreachable:
        return [_absent(one, unreachable) for one in absent] or _space([], copies), []
    problems, downloads = [], []
    for one in absent:
        told = _ask(one)
        if isinstance(told, str):
            problems += told.splitlines()
        else:
            downloads.append(told)
    return problems + _space(downloads, copies), downloads


def is_cached(wanted: Wanted) -> bool:
    """All files of a model are there, or any of a data set."""
    if wanted.kind == "model":
        return bool(_kept(wanted))
    there = snapshots(wanted.name.partition(":")[0], "dataset")
    return any(next(folder.glob(kind), None) is not None for folder in there for kind in ("*", "*/*"))


def _kept(wanted: Wanted) -> list[Path]:
    """The snapshot of a model with all its files; empty where there is none."""
    return [folder for folder in snapshots(wanted.name, "model") if not absent_from(folder)][:1]


def is_begun(wanted: Wanted) -> list[str]:
    """Files that a model's snapshot in the cache lacks; empty where there is none, or all are there."""
    return next((absent for folder in snapshots(wanted.name, "model") if (absent := absent_from(folder))), [])


def why_unreachable(address: str = "") -> str:
    """Empty where an address (the hub's), or the proxy that leads to it, takes a connection; else why not."""
    endpoint = urlsplit(address or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    through = urlsplit(proxy) if proxy and not proxy_bypass(endpoint.hostname or "") else endpoint
    host, port = through.hostname or "", through.port or (443 if through.scheme == "https" else 80)
    answer: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), REACH).close()
            answer.append("")
        except OSError as error:
            answer.append(f"{host}:{port} does not answer ({one_line(error)})")

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(REACH)
    return answer[0] if answer else f"{host}:{port} does not answer within {REACH:g} s"


def _absent(wanted: Wanted, why: str) -> str:
    fetch = f"hf download {'--repo-type dataset ' if wanted.kind == 'dataset' else ''}{_fetch_words(wanted.name)}"
    if wanted.kind == "model" and (absent := is_begun(wanted)):
        return (
            f"{wanted.setting}: expected all files of {wanted.name} in the cache, got a download that was cut off "
            f"({absent[0]} is missing), and {why}; go on with it where there is a network (`{fetch}`)"
        )
    what = "files" if wanted.kind == "model" else "rows"
    return (
        f"{wanted.setting}: expected a folder, or a name whose {what} are in the cache, got {wanted.name}, which is "
        f"neither, and {why}; correct the name or path, or fetch it where there is a network (`{fetch}`)"
    )


def _fetch_words(name: str) -> str:
    """What `hf download` is given for a name."""
    repository, revision = split(name.partition(":")[0])
    return f"{repository} --revision {revision}" if revision else repository


def _ask(wanted: Wanted) -> Download | str:
    """What the hub tells about a repository: that it is there, that it is open to this token, and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    name, revision = split(wanted.name.partition(":")[0])
    api = HfApi()
    ask = api.model_info if wanted.kind == "model" else api.dataset_info
    try:
        info: Any = ask(name, revision=revision or None, timeout=ANSWER, files_metadata=True)
        if getattr(info, "gated", False):  # everybody is told what is in it; its files are another matter
            api.auth_check(name, repo_type=wanted.kind)
    except HFValidationError as error:
        return f"{wanted.setting}: expected a name on the hub, got {wanted.name} ({one_line(error)}); correct it"
    except Exception as error:  # of its client, which has one class for each status and each layer
        reason = reason_of(error)
        if reason is None:
            raise
        return f"{wanted.setting}: {wanted.name}: {reason}"
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    if wanted.kind == "dataset":
        return Download(wanted, sum(sizes.values()))
    config = getattr(info, "config", None) or {}
    problem = _incomplete(wanted, sizes, config) or _unlike(wanted, sizes)
    fetched = _fetched(sizes)
    return problem or Download(wanted, fetched, fetched if config.get("model_type") == THEIRS else 0)


def _unlike(wanted: Wanted, sizes: Mapping[str, int]) -> str:
    """What is wrong with the repository of a run's own model, by its settings, which are fetched for that, and by the
    names in its index; empty where nothing."""
    if wanted.setting.partition(" ")[0] not in OWN:
        return ""
    try:
        folder = settings_fetched(wanted.name)
    except ConfigError as error:
        return str(error).replace("model:", f"{wanted.setting}:", 1)
    shards = [name for name in weight_names(folder) if name not in sizes]
    if shards:
        return (
            f"{wanted.setting}: expected the shards that its index names, got {wanted.name} without {len(shards)} of "
            f"them ({shards[0]}); its repository is not whole, take another revision or name"
        )
    return "\n".join(own_problems(wanted, folder, weights=False))


def own_problems(wanted: Wanted, folder: Path, *, weights: bool) -> list[str]:
    """What is wrong with the snapshot of a run's own model, told by its name on the hub; of one that is merged as it
    is, only its weights matter."""
    if is_show_o(folder) and wanted.setting == NAMED_PARTS:
        problems = show_o_damage("model", folder) if weights else []
    elif wanted.setting in ("model", "base") or is_theirs(folder):
        problems = folder_problems(wanted.setting, folder, trained=True, weights=weights)
    else:
        found = weight_problems(folder) if weights else []
        problems = [f"{wanted.setting}: expected whole safetensors, got {problem}" for problem in found]
    return [problem.replace(str(folder), wanted.name) for problem in problems]


def _incomplete(wanted: Wanted, sizes: Mapping[str, int], config: Mapping[str, Any]) -> str:
    """What a model's repository lacks, by the names of its files; empty where nothing."""
    if "config.json" not in sizes:
        given = next((name for name in sizes if name.endswith("/config.json")), "")
        remedy = f"its subfolder {given.rpartition('/')[0]} has one: download that, and name the folder"
        remedy = remedy if given else "take a checkpoint that save_pretrained wrote"
        return f"{wanted.setting}: expected a config.json, got {wanted.name} without; {remedy}"
    kind = config.get("diffusers")
    named = kind.get("_class_name") if isinstance(kind, dict) else None
    theirs = config.get("model_type") == THEIRS or named in (SHOW_O, MAGVIT)
    if any(name.endswith(".safetensors") for name in sizes) or (theirs and any(PICKLE.match(name) for name in sizes)):
        return ""
    others = next((name for name in sizes if name.endswith((".bin", ".pt", ".pth", ".gguf"))), "no weights")
    remedy = "take another revision (many have refs/pr/… with safetensors), or convert it where you trust it"
    return f"{wanted.setting}: expected safetensors, got {wanted.name} with {others}; {remedy}"


def _fetched(sizes: Mapping[str, int]) -> int:
    """Bytes of the files that are taken."""
    whole = any(name.endswith(".safetensors") and "/" not in name for name in sizes)
    kinds = (".json", ".model", ".txt", ".jinja", *((".safetensors",) if whole else (".bin",)))
    beside = {name for name in sizes if name.endswith(VQGAN)}
    return sum(size for name, size in sizes.items() if name in beside or (name.endswith(kinds) and "/" not in name))


def _to_convert(folder: Path) -> int:
    """Bytes of the copy that is made of a snapshot in DeepSeek's layout; 0 where there is one, or none is made."""
    if not is_theirs(folder) or kept_conversion(folder) is not None:
        return 0
    return sum((folder / name).stat().st_size for name in weight_names(folder))


def _space(downloads: list[Download], cached: Mapping[str, int]) -> list[str]:
    """A disk without room for what is fetched, or for that and what is converted, where both lie on one.

    Args:
        downloads: what is fetched.
        cached: by names of what is in the cache already, the bytes of a conversion that is to be made of it.
    """
    cache, own = cache_folder(), cache_dir()
    places = [(cache, "HF_HOME", {one.wanted.name: one.num_bytes for one in downloads})]
    converted = {**cached, **{one.wanted.name: one.converted for one in downloads if one.converted}}
    copies = {f"{name} in transformers' format": size for name, size in converted.items()}
    if copies and _there(own).stat().st_dev == _there(cache).stat().st_dev:
        places[0][2].update(copies)
    elif copies:
        places.append((own, "SYNCR1_CACHE", copies))
    found = []
    for folder, variable, needed in places:
        free = shutil.disk_usage(_there(folder)).free
        if sum(needed.values()) > free:
            setting = downloads[0].wanted.setting if downloads else variable
            found.append(
                f"{setting}: expected {gib(sum(needed.values()))} of free space for "
                f"{' and '.join(needed)}, got {gib(free)} at {folder}; free some, or let {variable} name another disk"
            )
    return found


def _there(folder: Path) -> Path:
    """A folder, or what is there of the way to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
