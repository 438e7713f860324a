"""recipes/merge.py: flags to a folder with its card; and how much memory a merge takes."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from syncr1.engine.checkpoints.merge import RECORD, merge_checkpoints
from syncr1.engine.checkpoints.safetensors_stream import SafetensorsWriter, TensorInfo
from syncr1.engine.policies.kinds import SAFE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script as a module, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location("merge_recipe", ROOT / "recipes" / "merge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["merge_recipe"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    made = []
    for name in ("w0", "a", "b"):
        (tmp_path / name).mkdir()
        weights = {"w": torch.randn(20, 3), "steps": torch.tensor(3)}
        save_file(weights, tmp_path / name / SAFE, metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"architectures": ["JanusForConditionalGeneration"]}')
        made.append(str(tmp_path / name))
    return made


def run(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["merge.py", *arguments])
    recipe.main()


def test_flags_to_a_folder_and_its_card(
    recipe: ModuleType,
    folders: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, *models = folders
    out = tmp_path / "out"
    run(recipe, monkeypatch, "--base", base, "--models", *models, "--output", str(out), "--method", "fnorm")
    merge_checkpoints(base, models, tmp_path / "direct", "fnorm")
    assert torch.equal(load_file(out / SAFE)["w"], load_file(tmp_path / "direct" / SAFE)["w"])
    card = (out / "README.md").read_text()
    assert "fnorm merge" in card and "`w0`" in card and "`a`" in card and str(tmp_path) not in card
    assert {path.name for path in out.iterdir()} == {SAFE, RECORD, "config.json", "README.md"}
    said = capsys.readouterr().out
    assert "2 of 2 tensors" in said and f"saved {out}" in said and re.search(r"a: moved by \d", said)


def test_wrong_flags_are_all_said_at_once(
    recipe: ModuleType, folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(recipe, monkeypatch, "--models", folders[0], "--width", "-1", "--output", folders[1])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    for words in (
        "base: expected",
        "there is no default",
        "models: expected two",
        "width: expected",
        "output: expected",
    ):
        assert words in said
    with pytest.raises(SystemExit):
        run(recipe, monkeypatch, "--base", folders[0], "--models", folders[1], "nowhere", "--output", "x")
    assert "nowhere, which is neither" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_end_with_one_message(
    recipe: ModuleType,
    folders: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file({"w": torch.zeros(2)}, Path(folders[2]) / SAFE)
    with pytest.raises(SystemExit) as caught:
        run(recipe, monkeypatch, "--base", folders[0], "--models", *folders[1:], "--output", str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "w: float32 [20, 3]" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def private_memory() -> int:
    """Bytes that are this process's own; pages of mapped files are not counted."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        pytest.skip("this kernel does not tell RssAnon")
    return int(found[1]) * 1024


def private_memory_grows(work: Callable[[], object]) -> int:
    """Bytes at most, while `work` runs."""
    finished, seen, before = threading.Event(), [], private_memory()

    def watch() -> None:
        while not finished.wait(0.002):
            seen.append(private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        finished.set()
        watcher.join()
    assert len(seen) > 20
    return max(seen) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """After a small merge, which gets the allocator its buffers, one of 12 times the size takes little more."""

    def merge_of(millions: int, where: Path) -> None:
        info = TensorInfo("embedding", torch.bfloat16, (millions * 1_000_000 // 64, 64))
        piece = torch.randn(1_000_000).bfloat16()
        for seed, name in enumerate(("w0", "a", "b")):
            (where / name).mkdir(parents=True)
            with SafetensorsWriter(where / name, [info]) as writer:
                for _ in range(millions):
                    writer.write("embedding", piece.roll(seed))
        merge_checkpoints(where / "w0", [where / "a", where / "b"], where / "out")

    merge_of(1, tmp_path / "small")
    grown = private_memory_grows(lambda: merge_of(12, tmp_path / "large"))
    assert grown < 60_000_000, f"{grown / 1e6:.0f} MB; W0 and two δ of the whole tensor would have 288 MB"
