"""Upload of saved models to the Hugging Face hub: asked for before anything is trained, done after everything is saved.

The token is the hub library's own (`HF_TOKEN`, or what `hf auth login` keeps); it is never an argument, never written.
An upload that fails costs nothing but the upload: the model lies on the disk, one line says why and how to try again,
and the exit code stays 0, so that no launcher starts a finished training again.
"""

from __future__ import annotations

import re
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..settings.train_config import TrainConfig

SECONDS = 5.0
"""That the hub has to answer who the token's owner is."""


def repository_of(config: TrainConfig) -> str:
    """Name of the repository, with its owner's where the settings give one."""
    if config.hub_model_id is not None:
        return config.hub_model_id
    plain = re.sub(r"[^A-Za-z0-9_.-]|\.\.+|--+", "-", config.run_name or config.output_dir.resolve().name)
    return re.sub(r"-+", "-", plain).strip("-.").removesuffix(".git")[:96] or "syncr1"


def problems_with_hub(config: TrainConfig) -> list[str]:
    """What would keep an upload from working, as far as it can be known before there is a model; empty without
    `push_to_hub`. Takes at most `SECONDS`, makes nothing on the hub, and needs no torch."""
    if not config.push_to_hub:
        return []
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return [
            "push_to_hub: expected a hub that may be reached, got HF_HUB_OFFLINE; unset it, or leave push_to_hub out"
        ]
    if get_token() is None:
        return ["push_to_hub: expected a token of the hub, got none; run `hf auth login`, or set HF_TOKEN"]
    answer = _whoami()
    if isinstance(answer, Exception):
        return [_refusal(answer, constants.ENDPOINT)]
    return _not_allowed(answer, repository_of(config), constants.ENDPOINT)


def _whoami() -> dict[str, Any] | Exception:
    """The hub's answer, or why there is none; in time also where a name server or a proxy does not answer."""
    from huggingface_hub import HfApi

    found: list[dict[str, Any] | Exception] = []

    def ask() -> None:
        try:
            found.append(HfApi().whoami())
        except Exception as error:  # whatever it is, it is told
            found.append(error)

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else TimeoutError(f"no answer within {SECONDS:g} s")


def _refusal(error: Exception, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        remedy = f"make one at {endpoint}/settings/tokens, then `hf auth login` or HF_TOKEN"
        return f"push_to_hub: expected a valid token of the hub, got one that {endpoint} refuses ({status}); {remedy}"
    remedy = "check the network and HF_ENDPOINT, or leave push_to_hub out and upload later with `hf upload`"
    return f"push_to_hub: expected an answer of {endpoint}, got {_in_a_line(error)}; {remedy}"


def _not_allowed(owner: Mapping[str, Any], repository: str, endpoint: str) -> list[str]:
    """A token that may only read, or a repository of somebody else's."""
    role = ((owner.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        remedy = f"make one at {endpoint}/settings/tokens"
        return [f"push_to_hub: expected a token that may write, got one of {owner.get('name')} that may read; {remedy}"]
    space, slash, _ = repository.rpartition("/")
    orgs = [org.get("name") for org in owner.get("orgs") or ()]
    names = [str(name) for name in (owner.get("name"), *orgs) if name]
    if not slash or space.lower() in map(str.lower, names) or role == "fineGrained":  # which may not list them all
        return []
    return [f"hub_model_id: expected a repository of {' or '.join(names)}, got {repository}; change the part before /"]


def push(models: Mapping[str, Path], repository: str, private: bool, say: Callable[[str], None]) -> bool:
    """Uploads each folder; whether all went well.  A failure is told on stderr, and raises nothing.

    Args:
        models: what is put behind the repository's name ("" for nothing) -> the model's folder.
        repository: `name`, which is then the token's owner's, or `owner/name`.
        private: for a repository that is not there yet.
        say: takes lines for people.
    """
    from huggingface_hub import HfApi

    api, all_well = HfApi(), True
    for suffix, folder in models.items():
        name = f"{repository}-{suffix}" if suffix else repository
        try:
            url = api.create_repo(name, private=private, exist_ok=True)
            say(f"uploading {folder} to {url}")
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Model trained with syncr1")
            say(f"uploaded {url}")
        except (Exception, KeyboardInterrupt) as error:  # the training is done, whatever the hub thinks of it
            told = (
                f"push_to_hub: {name} is not uploaded ({_in_a_line(error)}); the model is whole in {folder}; try again:"
            )
            print(f"{told} {command(name, folder, private)}", file=sys.stderr, flush=True)
            all_well = False
    return all_well


def command(repository: str, folder: Path, private: bool) -> str:
    """What uploads a saved model by hand."""
    return shlex.join(["hf", "upload", repository, str(folder), ".", *(["--private"] if private else [])])


def _in_a_line(error: BaseException) -> str:
    words = re.sub(r"For more information check: \S+", "", str(error))  # of HTTP's codes; the hub's own words follow
    text = " ".join(words.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
