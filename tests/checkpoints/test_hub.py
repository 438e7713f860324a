"""hub.py against a hub on this machine, by the hub's own library: what arrives is what was saved, no run is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from hub_server import TOKEN, HubServer, hub_server

from syncr1.engine.checkpoints import hub
from syncr1.engine.checkpoints.hub import problems_with_hub, push, repository_of
from syncr1.engine.methods.sync_r1_config import SyncR1Config

PROGRAM = """
import sys
from pathlib import Path
from syncr1.engine.checkpoints.hub import problems_with_hub, push, repository_of
from syncr1.engine.methods.sync_r1_config import SyncR1Config
config = SyncR1Config(push_to_hub=True, output_dir=Path("runs/my run"))
print(problems_with_hub(config), "torch" in sys.modules)
print(push({"": Path(sys.argv[1])}, repository_of(config), config.hub_private_repo, print))
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The library of this process, pointed at it as HF_ENDPOINT would when it is imported; xet needs the real one."""
    from huggingface_hub import constants

    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "last"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A card\n")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(1_000))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asking(**settings: object) -> SyncR1Config:
    return SyncR1Config(push_to_hub=True, **settings)  # type: ignore[arg-type]


def test_what_arrives_is_what_was_saved(model: Path, tmp_path: Path) -> None:
    """A process of its own, told where the hub is by HF_ENDPOINT and who asks by HF_TOKEN; without torch."""
    with hub_server() as server:
        known = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(model)],
            cwd=ROOT,
            env={**os.environ, **known, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
        assert said[0] == "[] False" and said[-1] == "True"
        assert server.repositories == {"alice/my-run": files_of(model)}
        assert server.visibility == {"alice/my-run": "private"}
        assert TOKEN not in done.stdout + done.stderr


def test_two_models_two_repositories_and_a_second_upload_goes_into_the_same(server: HubServer, model: Path) -> None:
    assert push({"t2i": model, "merged": model}, "lab/run", False, lambda line: None)
    assert server.repositories.keys() == {"lab/run-t2i", "lab/run-merged"}
    assert set(server.visibility.values()) == {"public"}
    (model / "config.json").write_text('{"a": 1}')
    assert push({"t2i": model}, "lab/run", True, lambda line: None)
    assert server.repositories["lab/run-t2i"] == files_of(model)


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/commit/", "/objects/batch"])
def test_an_upload_that_fails_is_told_in_a_line_with_the_command_to_repeat_it(
    where: str, server: HubServer, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refused[where] = (403, "not today")
    before = files_of(model)
    assert not push({"": model}, "lab/run", True, lambda line: None)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if f"hf upload lab/run {model} . --private" in line] == lines[-1:]
    assert "the model is whole in" in lines[-1] and files_of(model) == before
    assert TOKEN not in "".join(lines)


def test_one_that_fails_keeps_no_other_back(server: HubServer, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.refused["run-merged"] = (403, "not this one")
    assert not push({"merged": model, "t2i": model}, "lab/run", True, lambda line: None)
    assert server.repositories["lab/run-t2i"] == files_of(model)
    assert capsys.readouterr().err.count("is not uploaded") == 1


def test_nothing_is_asked_of_the_hub_without_push_to_hub(server: HubServer) -> None:
    assert problems_with_hub(SyncR1Config()) == [] and server.requests == []


@pytest.mark.parametrize("name", [None, "mine", "alice/mine", "LAB/mine"])
def test_an_upload_that_can_work_is_not_refused_and_makes_nothing_yet(server: HubServer, name: str | None) -> None:
    assert problems_with_hub(asking(hub_model_id=name)) == []
    assert server.requests == ["GET /api/whoami-v2"] and server.repositories == {}


def test_what_cannot_work_is_said_before_anything_is_trained(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**settings: object) -> str:
        (told,) = problems_with_hub(asking(**settings))
        assert TOKEN not in told and "; " in told and "expected" in told and "got" in told
        return told

    assert "expected a repository of alice or lab, got bob/mine" in refused(hub_model_id="bob/mine")
    server.owner["auth"]["accessToken"]["role"] = "fineGrained"  # may not list where it may write
    assert problems_with_hub(asking(hub_model_id="bob/mine")) == []
    server.owner["auth"]["accessToken"]["role"] = "read"
    assert "expected a token that may write, got one of alice that may read" in refused()
    server.refused["whoami"] = (503, "maintenance")
    assert "maintenance" in refused() and "hf upload" in refused()
    server.refused.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "expected a valid token" in refused() and "401" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "run `hf auth login`, or set HF_TOKEN" in refused()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset it, or leave push_to_hub out" in refused()


def test_a_hub_that_is_not_there_or_does_not_answer_costs_seconds(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "SECONDS", 0.5)
    server.answers.clear()
    started = time.monotonic()
    (told,) = problems_with_hub(asking())
    assert "no answer within 0.5 s" in told and server.url in told and time.monotonic() - started < 5
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    (told,) = problems_with_hub(asking())
    assert "http://127.0.0.1:9" in told and "HF_ENDPOINT" in told


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"output_dir": Path("runs/sync_r1")}, "sync_r1"),
        ({"output_dir": Path("runs/mein Lauf: bob..o")}, "mein-Lauf-bob-o"),
        ({"run_name": "2026-01--first/second.git"}, "2026-01-first-second"),
        ({"run_name": "\u00e9\u00e9"}, "syncr1"),
        ({"hub_model_id": "a/b", "run_name": "c"}, "a/b"),
    ],
)
def test_a_repositorys_name_follows_from_the_runs(settings: dict[str, object], name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    assert repository_of(asking(**settings)) == name
    validate_repo_id(name)
