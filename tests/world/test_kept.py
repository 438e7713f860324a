"""kept.py and what is made on first use: cut off anywhere it goes on, to the same last bit, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from safetensors.torch import load_file

from syncr1.engine.world import embedded, kept
from syncr1.engine.world.base_model import BaseSettings, train_base
from syncr1.engine.world.kept import Kept

BASE = BaseSettings(steps=5, batch=8, photo_pool=16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Kept.__init__, "__defaults__", (0.0,))
    return tmp_path / "cache"


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is made and where it is kept; the next start says that it goes on, to the same last bit, and leaves
    nothing but the model."""
    said: list[str] = []
    steps: list[int] = []

    def train(settings: BaseSettings, told: Callable[[int, float], None] | None, own: Kept) -> Any:
        def interrupted(step: int, loss: float) -> None:
            steps.append(step)
            if step == 2 and len(steps) == 3:
                raise KeyboardInterrupt

        return train_base(settings, interrupted, own)

    monkeypatch.setattr(embedded, "train_base", train)
    with pytest.raises(KeyboardInterrupt):
        embedded.tiny_base(BASE, said.append)
    assert "a Janus of a million parameters" in said[0] and str(cache / "tiny_base-") in said[1]
    assert said[2] == "3 of 5 steps are kept; the next start goes on from there"
    folder = embedded.tiny_base(BASE, said.append)
    assert "going on after 3 of 5 steps" in said[4] and steps == [0, 1, 2, 3, 4]
    train_base(BASE).save(cache.with_name("whole"))
    made, whole = (load_file(path / "model.safetensors") for path in (folder, cache.with_name("whole")))
    assert len(made) > 100 and all(torch.equal(value, whole[name]) for name, value in made.items())
    assert sorted(path.name for path in cache.iterdir()) == [f".{folder.name}.lock", folder.name]


@pytest.mark.parametrize("damage", ["truncated", "empty", "other torch"])
def test_a_file_that_cannot_be_used_is_no_start(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    Kept(path, every=0.0).save(7, [weight], optimizer)
    assert Kept(path).steps == 7
    if damage == "other torch":
        monkeypatch.setattr(torch, "__version__", "1.0")
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage == "truncated" else b"")
    again = Kept(path)
    assert again.steps == again.restore([weight], optimizer) == 0


def test_a_parameter_that_no_batch_has_reached_has_no_state(tmp_path: Path) -> None:
    """AdamW begins its count when a gradient first comes: zeros in its place would be another training."""
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, unused])
    (used**2).sum().backward()
    optimizer.step()
    Kept(tmp_path / "kept", every=0.0).save(1, [used, unused], optimizer)
    fresh = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    again = torch.optim.AdamW(fresh)
    assert Kept(tmp_path / "kept").restore(fresh, again) == 1
    assert torch.equal(fresh[0], used) and fresh[1] not in again.state
    assert again.state[fresh[0]]["step"] == 1


def test_it_is_written_every_few_seconds_and_not_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(kept.time, "monotonic", lambda: now[0])
    own = Kept(tmp_path / "kept", every=5.0)
    weight = torch.nn.Parameter(torch.ones(3))
    written = []
    for step in range(1, 10):
        now[0] += 2.0
        own.save(step, [weight], torch.optim.AdamW([weight]))
        written.append(own.steps)
    assert written == [0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_the_name_of_what_is_made_does_not_follow_how_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a word in a message would have everybody's base made anew."""
    before = embedded.fingerprint("world")
    read = Path.read_bytes
    changed = {"embedded.py", "kept.py"}
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other" if path.name in changed else read(path))
    assert embedded.fingerprint("world") == before
    changed.add("supervised.py")
    assert embedded.fingerprint("world") != before
