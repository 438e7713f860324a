"""Manifests: fingerprints of contents, what differs in words, whole files or none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.manifest import (
    MANIFEST,
    SAMPLED_VALUES,
    Settings,
    claim,
    describe,
    differences,
    prompts_fingerprint,
    read_manifest,
    weights_fingerprint,
)
from syncr1.engine.pictures import MemoryImage
from syncr1.engine.records import Prompt
from syncr1.engine.whole_files import write_atomically

BEGUN = {"format": 1, "model": {"name": "a", "fingerprint": "1"}, "data": {"source": "/x", "fingerprint": "2"}}
ASKED = Prompt(id="a", task="qa", text="what?", answer="red", extra={"n": 1})


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    assert claim(tmp_path / "new", BEGUN) is False
    assert read_manifest(tmp_path / "new") == BEGUN
    assert claim(tmp_path / "new", BEGUN) is True
    moved = {**BEGUN, "model": {"name": "b", "fingerprint": "1"}, "data": {"source": "/y", "fingerprint": "2"}}
    assert claim(tmp_path / "new", moved) is True, "names and places do not count"
    with pytest.raises(EvaluationError, match=r"model.fingerprint: a \(1\) then, b \(9\) now\n"):
        claim(tmp_path / "new", {**BEGUN, "model": {"name": "b", "fingerprint": "9"}})
    assert read_manifest(tmp_path / "new") == BEGUN


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"format": 2}', "\xff"])
def test_a_manifest_that_cannot_be_read(contents: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(contents.encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"manifest\.json"):
        claim(tmp_path, BEGUN)


def test_missing_manifests(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--stage generate"):
        read_manifest(tmp_path)
    (tmp_path / "items.jsonl").touch()
    with pytest.raises(EvaluationError, match=r"has items.jsonl but no manifest.json"):
        claim(tmp_path, BEGUN)


def test_differences_name_added_and_removed_settings() -> None:
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}})) == [
        "a.c: 2 then, None now",
        "a.d: None then, 3 now",
    ]
    assert list(differences(BEGUN, BEGUN)) == []


@pytest.mark.parametrize("kwargs", [(), ("date_string=26 Jul 2024", "enable_thinking=false")])
@pytest.mark.parametrize("fit", ["processor", "crop"])
def test_a_folder_goes_on_with_every_kind_of_setting(kwargs: tuple[str, ...], fit: Any, tmp_path: Path) -> None:
    """A manifest that was read again equals the one it was written from: JSON has no tuples."""
    policy, items = torch.nn.Linear(2, 2), {"qa": [ASKED]}
    settings = Settings(chat_template_kwargs=kwargs, picture_fit=fit)
    assert claim(tmp_path, describe(policy, "a", items, "b", settings)) is False  # type: ignore[arg-type]
    assert claim(tmp_path, describe(policy, "a", items, "b", settings)) is True  # type: ignore[arg-type]
    other = replace(settings, chat_template_kwargs=("x=1",), picture_fit="pad")
    with pytest.raises(EvaluationError, match=rf"sampling\.picture_fit: {fit} then, pad now") as raised:
        claim(tmp_path, describe(policy, "a", items, "b", other))  # type: ignore[arg-type]
    assert f"chat_template_kwargs: {list(kwargs)} then, ['x=1'] now" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_weights_are_told_apart(dtype: torch.dtype) -> None:
    state = {"w": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    print_ = weights_fingerprint(state)
    assert print_ == weights_fingerprint({name: state[name].clone() for name in reversed(state)})
    changed = state["w"].clone()
    changed[0, 0] = 1
    others = [
        {**state, "w": changed},
        {**state, "w": state["w"].reshape(3, 2)},
        {"v": state["w"], "scalar": state["scalar"]},
        {**state, "empty": torch.zeros(0, dtype=dtype)},
    ]
    found = [weights_fingerprint(other) for other in others]
    assert len({print_, *found}) == 5


def test_large_weights_are_sampled_evenly() -> None:
    large = torch.zeros(SAMPLED_VALUES * 10)
    moved = large + 1e-6
    assert weights_fingerprint({"w": large}) != weights_fingerprint({"w": moved})


def test_prompts_are_told_apart_by_all_that_they_say(tmp_path: Path) -> None:
    photo = tmp_path / "a.png"
    photo.write_bytes(b"12345")
    shown = replace(ASKED, images=(photo,), references=(photo,))
    drawn = MemoryImage("drawn", torch.zeros(3, 4, 4))
    prompts = [
        ASKED,
        replace(ASKED, answer="blue"),
        replace(ASKED, extra={"n": 2}),
        replace(ASKED, attributes={"hat": "crown"}),
        shown,
        replace(shown, references=()),
        replace(ASKED, images=(drawn,)),
    ]
    assert len({prompts_fingerprint([p]) for p in prompts}) == len(prompts)
    before = prompts_fingerprint([shown])
    moved = tmp_path / "elsewhere" / "a.png"
    moved.parent.mkdir()
    moved.write_bytes(b"12345")
    assert prompts_fingerprint([replace(shown, images=(moved,), references=(moved,))]) == before
    moved.write_bytes(b"123456")
    assert prompts_fingerprint([replace(shown, images=(moved,))]) != before
    assert prompts_fingerprint([ASKED, shown]) != prompts_fingerprint([shown, ASKED])


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, json.dumps({"é": 1}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "half")
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
