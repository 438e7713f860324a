"""Pickled weights: tensors alone, whatever a file asks for; and a piece of each at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_janus import save_weights

from syncr1.engine.checkpoints import weight_source
from syncr1.engine.checkpoints.weight_source import PickledWeights, load_pickled, weights_in
from syncr1.engine.errors import CheckpointError

MARKER = "a_strangers_code_ran"


class Hostile:
    """Unpickled, it would run a program."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARKER,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_calls_something_is_refused_by_its_name(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": Hostile()}, "m.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as refused:
        load_pickled(tmp_path / "m.bin")
    assert "a pickle that would call posix.mkdir; nothing of it was run" in str(refused.value)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([torch.ones(2)], "expected tensors by name, got list"),
        ({}, "expected tensors by name, got dict"),
        ({"model": {"w": torch.ones(2)}, "step": 3}, "got dict under 'model'; if it is a training's state"),
        ({3: torch.ones(2)}, "got Tensor under '3'"),
        ({"w": np.ones(2)}, "a pickle that would call numpy"),
        ({"w": torch.ones(2).to_sparse()}, "expected plain numbers, got w torch.sparse_coo"),
        (torch.nn.Linear(2, 2), "would call torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_state_dict(held: object, words: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "m.bin")
    with pytest.raises(CheckpointError) as refused:
        load_pickled(tmp_path / "m.bin")
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0, 1, 100, 3000])
def test_a_file_that_was_cut_off(kept: int, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"download it again|take the publisher's file"):
        load_pickled(tmp_path / "m.bin")


@pytest.mark.parametrize("form", ["bin", "bin_shards", "safetensors", "safetensors_shards"])
def test_pieces_are_the_tensors_elements(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_source, "HELD", 100)  # the files are opened anew after every few pieces
    tensors = {name: torch.randn(shape) for name, shape in {"a": (7, 9), "b": (40,), "c": (2, 3, 5), "d": ()}.items()}
    save_weights(tmp_path, tensors, form)
    weights = weights_in(tmp_path)
    assert {name: info.shape for name, info in weights.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    for name, tensor in reversed(tensors.items()):
        for start in range(0, tensor.numel(), 11):
            assert torch.equal(weights.elements(name, start, start + 11), tensor.flatten()[start : start + 11])
    assert sorted(path.name for path in weights.files) == sorted(
        path.name for path in tmp_path.iterdir() if path.suffix != ".json"
    )


def test_tensors_that_share_or_skip_numbers(tmp_path: Path) -> None:
    """Tied weights are saved once; a transposed tensor has its elements in its own order."""
    one = torch.randn(4, 5)
    torch.save({"a": one, "b": one, "c": one.T}, tmp_path / "pytorch_model.bin")
    weights = PickledWeights(tmp_path)
    assert torch.equal(weights.elements("b", 0, 20), one.flatten())
    assert torch.equal(weights.elements("c", 3, 9), one.T.flatten()[3:9])


def test_files_of_torch_before_zip_archives_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(weights_in(tmp_path).elements("a", 1, 3), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        ({"a": "../pytorch_model.bin"}, "names of .bin files in its own folder"),
        ({"a": "x.safetensors"}, "names of .bin files in its own folder"),
        ({"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}, "expected 2 shards, got 1 (pytorch_model-2.bin"),
    ],
)
def test_an_index_that_does_not_fit(placed: dict[str, str], words: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(CheckpointError) as refused:
        weights_in(tmp_path)
    assert words in str(refused.value)
