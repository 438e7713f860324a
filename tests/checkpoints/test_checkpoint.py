"""Checkpoints survive kills, full disks and damage: the newest whole one loads, and nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_faults import CODES, FaultyOS, faults_on_ranks
from hypothesis import given
from hypothesis import strategies as st
from kills import PlainSaving, kill_saves
from safetensors.torch import load_file
from torch import Tensor

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.sharded import LATEST, MANIFEST, STATE, folders, newest, save, set_aside, verified
from syncr1.engine.errors import CheckpointError

KILLS = int(os.environ.get("SYNCR1_KILLS", "20"))


def tensors(step: int = 1) -> dict[str, Tensor]:
    """Every kind of shape and type, those that upset alignment first."""
    return {
        "odd": torch.arange(7, dtype=torch.uint8) + step,
        "half": torch.full((3, 5), step, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(float(step)),
        "turned": torch.arange(12.0).view(3, 4).t() + step,
        "long": torch.tensor([2**62 + step, -step]),
    }


def saved(root: Path, steps: Sequence[int], keep: int | None = None) -> Path:
    for step in steps:
        save(root, step, tensors(step), {"step": step}, keep)
    return root


def silent(text: str) -> None:
    raise AssertionError(f"warned: {text}")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# What is written ------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    """Bits, dtypes, shapes, strided and empty tensors; the file is one that safetensors itself reads."""
    folder = save(tmp_path / "a" / "b", 20, tensors(), {"text": "é\n", "list": [1, 2.5, None]})
    found = newest(folder.parent, silent)
    assert found is not None and (found.folder, found.step, found.world_size) == (folder, 20, 1)
    assert same(found.tensors(0), tensors()) and same(load_file(folder / "rank_0000.safetensors"), tensors())
    assert found.state() == {"text": "é\n", "list": [1, 2.5, None]}
    assert sorted(path.name for path in folder.parent.iterdir()) == [LATEST, "step_000020"]
    assert (folder.parent / LATEST).read_text() == "step_000020\n"


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [5, 4]), (9, [5, 4, 3, 2, 1]), (None, [5, 4, 3, 2, 1])])
def test_keeps_the_newest(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    root = saved(tmp_path, [1, 2, 3, 4, 5], keep)
    assert [verified(folder).step for folder in folders(root)] == left
    assert not list(root.glob(".*"))


def test_is_never_overwritten(tmp_path: Path) -> None:
    root = saved(tmp_path, [3])
    with pytest.raises(CheckpointError, match="step_000003"):
        save(root, 3, tensors(9), {})
    found = newest(root, silent)
    assert found is not None and same(found.tensors(0), tensors(3))


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure keeps what was fsynced: files, then their folder, then the renaming, then `latest` likewise."""
    log: list[str] = []
    names: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace")}

    def opened(path: Any, *rest: Any, **more: Any) -> int:
        file: int = real["open"](path, *rest, **more)
        names[file] = Path(path).name
        return file

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda file: (log.append(f"sync {names[file]}"), real["fsync"](file))[1])
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda a, b, call=real[name]: (log.append(f"name {Path(b).name}"), call(a, b))[1])
    save(tmp_path / "c", 1, tensors(), {})
    assert log == [
        *("sync rank_0000.safetensors", "sync state.json", "sync manifest.json", "sync .draft-step_000001"),
        *("name step_000001", "sync c", "sync .draft-latest", "name latest", "sync c"),
    ]


# Kills ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    """Saves in a loop, killed at random: what has a checkpoint's name is whole, and what was saved is there.

    SYNCR1_KILLS=200 for more of them; tests/support/kills.py does the same with ZeRO learners and several ranks."""
    told = kill_saves(tmp_path, PlainSaving, KILLS)
    assert told["last_step"] > KILLS / 4 and told["mid_save"] > KILLS / 4, told


# A disk that fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_an_error_at_the_nth_call_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Every n: a clear error, the older checkpoint as it was, no broken one, and the next save works."""
    number = 0
    while True:
        number += 1
        root = saved(tmp_path / str(number), [1])
        monkeypatch.setattr(checkpoint, "os", FaultyOS(number, code))
        try:
            save(root, 2, tensors(2), {"step": 2}, keep=1)
        except CheckpointError as error:
            assert os.strerror(code) in str(error) and str(root) in str(error)
        else:
            break
        finally:
            monkeypatch.undo()
        steps = [verified(folder).step for folder in folders(root)]
        assert (
            steps
            and set(steps) <= {1, 2}
            and all(same(verified(f).tensors(0), tensors(verified(f).step)) for f in folders(root))
        )
        saved(root, [3], keep=1)
        assert [verified(folder).step for folder in folders(root)] == [3] and not list(root.glob(".draft-*"))
    assert number > 50, "every write of every file was tried"


def test_errors_of_one_of_two_ranks(tmp_path: Path) -> None:
    """Every rank is told the same, which names the rank; nothing hangs; the older checkpoint stays, the next is saved.

    tests/support/disk_faults.py tries more of them."""
    told = faults_on_ranks(tmp_path, 8)
    assert sum(told["kinds"].values()) == 8 and {kind.split()[-1] for kind in told["kinds"]} == {"0", "1"}, told


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="saving"):
        save(tmp_path / "file" / "checkpoints", 1, tensors(), {})


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << (position % 8)
    path.write_bytes(bytes(content))


@given(st.data())
def test_a_flipped_bit_anywhere_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Of data, header, state or manifest: the older checkpoint is taken, with a warning that names the file."""
    root = saved(tmp_path_factory.mktemp("flip"), [1, 2])
    name = data.draw(st.sampled_from(["rank_0000.safetensors", STATE, MANIFEST]))
    size = (root / "step_000002" / name).stat().st_size
    flip(root / "step_000002" / name, data.draw(st.integers(0, size - 1)))
    warnings: list[str] = []
    found = newest(root, warnings.append)
    assert found is not None and found.step == 1 and same(found.tensors(0), tensors(1))
    assert len(warnings) == 1 and f"step_000002/{name}" in warnings[0]


@pytest.mark.parametrize("name", ["rank_0000.safetensors", STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "folder"])
def test_a_damaged_file_is_seen(tmp_path: Path, name: str, damage: str) -> None:
    root = saved(tmp_path, [1, 2])
    path = root / "step_000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[:-1], "longer": content + b"x"}[damage])
    warnings: list[str] = []
    found = newest(root, warnings.append)
    assert found is not None and found.step == 1 and len(warnings) == 1 and name in warnings[0]
    with pytest.raises(CheckpointError, match=name):
        verified(root / "step_000002")


@pytest.mark.parametrize("text", ["", "step_000009\n", "../../elsewhere", "\0\xff" * 60])
def test_latest_is_not_depended_on(tmp_path: Path, text: str) -> None:
    root = saved(tmp_path, [1, 2])
    (root / LATEST).write_text(text)
    warnings: list[str] = []
    found = newest(root, warnings.append)
    assert found is not None and found.step == 2 and len(warnings) == 1 and LATEST in warnings[0]
    assert newest(saved(root, [3]), silent) is not None, "and the next save mends it"


def test_latest_may_be_missing(tmp_path: Path) -> None:
    root = saved(tmp_path, [1, 2])
    (root / LATEST).unlink()
    found = newest(root, lambda text: None)
    assert found is not None and found.step == 2


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent", silent) is None and newest(tmp_path, silent) is None
    root, warnings = saved(tmp_path, [1, 2]), list[str]()
    for folder in folders(root):
        (folder / STATE).unlink()
    assert newest(root, warnings.append) is None and len(warnings) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"step": 7},
        {"world_size": 0},
        {"world_size": 2},
        {"format": 99},
        {"files": {"../../x": {"bytes": 1, "sha256": ""}}},
        {"files": None},
    ],
)
def test_a_manifest_that_was_made_up(tmp_path: Path, change: dict[str, Any]) -> None:
    """With a digest that is right, so that its content is what is refused."""
    folder = saved(tmp_path, [2]) / "step_000002"
    manifest = json.loads((folder / MANIFEST).read_text()) | change
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}))
    with pytest.raises(CheckpointError):
        verified(folder)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    """A DeepSpeed or torch checkpoint is no checkpoint here, and nothing in it is opened."""
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self) -> Any:
            return (marker.touch, ())

    folder = tmp_path / "step_000001"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "rank_0000.safetensors", STATE, MANIFEST):
        torch.save(Bomb(), folder / name)
    with pytest.raises(CheckpointError):
        verified(folder)
    assert not marker.exists()


def test_set_aside(tmp_path: Path) -> None:
    root = saved(tmp_path, [1, 2, 3])
    assert [path.name for path in set_aside(root, 1)] == ["aside_1-step_000003", "aside_1-step_000002"]
    saved(root, [2])
    set_aside(root, 1)
    assert sorted(path.name for path in root.glob("aside*")) == [
        *("aside_1-step_000002", "aside_1-step_000003", "aside_2-step_000002"),
    ]
    found = newest(root, lambda text: None)
    assert found is not None and found.step == 1
    shutil.rmtree(root / "step_000001")
    assert newest(root, lambda text: None) is None
