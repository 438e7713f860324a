"""safetensors_stream.py: what it writes is what others read, in any pieces; what it cannot read it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from syncr1.engine.checkpoints.safetensors_stream import (
    DTYPES,
    MappedCheckpoint,
    SafetensorsWriter,
    TensorInfo,
)
from syncr1.engine.errors import CheckpointError
from syncr1.engine.policies.kinds import SAFE, SAFE_INDEX

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (5, 3), (2, 3, 3, 3)]


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Every bit pattern may come up, NaN and infinities too: a writer moves bytes, not numbers."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(high, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write(folder: Path, tensors: dict[str, Tensor], *, piece: int = 4, **options: object) -> SafetensorsWriter:
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(folder, infos, **options) as writer:  # type: ignore[arg-type]
        for info in writer.tensors:
            for part in tensors[info.name].reshape(-1).split(piece):
                writer.write(info.name, part)
    return writer


def assert_same(read: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor)), name


def test_every_dtype_and_shape_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        f"{name}/{i}": filled(dtype, shape, i) for name, dtype in DTYPES.items() for i, shape in enumerate(SHAPES)
    }
    write(tmp_path, tensors, metadata={"from": 'Ünïcödé " \\'})
    assert_same(load_file(tmp_path / SAFE), tensors)
    with safe_open(tmp_path / SAFE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "from": 'Ünïcödé " \\'}
    assert [path.name for path in tmp_path.iterdir()] == [SAFE]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from(SHAPES)), max_size=6),
    st.integers(1, 9),
    st.integers(1, 200),
)
def test_pieces_and_shards_do_not_show(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, tuple[int, ...]]], piece: int, max_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": filled(DTYPES[name], shape, i) for i, (name, shape) in enumerate(kinds)}
    writer = write(folder, tensors, piece=piece, max_shard_bytes=max_shard)
    read = {name: value for file in writer.files for name, value in load_file(folder / file).items()}
    assert_same(read, tensors)
    mapped = MappedCheckpoint(folder)
    assert {info.name for info in mapped.tensors.values()} == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(bits(mapped.flat(name)), bits(tensor))
    for file in writer.files:
        held = load_file(folder / file)
        assert len(held) <= 1 or sum(t.numel() * t.element_size() for t in held.values()) <= max_shard


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """A memory map of float64 behind three odd bytes could not be used in place."""
    tensors = {"a": filled(torch.int8, (3,)), "b": filled(torch.float64, (2,)), "c": filled(torch.bfloat16, (3,))}
    write(tmp_path, tensors)
    for name, tensor in tensors.items():
        assert MappedCheckpoint(tmp_path).flat(name).data_ptr() % tensor.dtype.itemsize == 0


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("max_shard", [10**9, 8_000])
def test_transformers_loads_it(tmp_path: Path, max_shard: int) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    writer = write(tmp_path, state, piece=1000, max_shard_bytes=max_shard)
    assert (len(writer.files) > 2) == (tmp_path / SAFE_INDEX).exists() == (max_shard == 8_000)
    loaded, told = LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, use_safetensors=True, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert_same(loaded.state_dict(), state)


def test_the_index_is_transformers_own(tmp_path: Path) -> None:
    """Names and total size as `save_pretrained` writes them; it may place tensors in other shards."""
    tiny_llama().save_pretrained(tmp_path / "theirs", max_shard_size=8_000)
    state = {n: v for file in MappedCheckpoint(tmp_path / "theirs").files for n, v in load_file(file).items()}
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", state, max_shard_bytes=8_000)
    ours, theirs = (json.loads((tmp_path / who / SAFE_INDEX).read_text()) for who in ("ours", "theirs"))
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    for name, file in ours["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "ours" / file)[name], state[name])


INFOS = [TensorInfo("a", torch.float32, (4,)), TensorInfo("b", torch.float32, (2,))]
WRONG: dict[str, list[tuple[str, Tensor]]] = {
    "too few": [("a", torch.zeros(4)), ("b", torch.zeros(1))],
    "none of the last": [("a", torch.zeros(4))],
    "too many": [("a", torch.zeros(5))],
    "behind the end": [("a", torch.zeros(4)), ("b", torch.zeros(2)), ("b", torch.zeros(1))],
    "another order": [("b", torch.zeros(2))],
    "half, then the next": [("a", torch.zeros(2)), ("b", torch.zeros(2))],
    "another dtype": [("a", torch.zeros(4, dtype=torch.float64))],
}


@pytest.mark.parametrize("pieces", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("max_shard", [10**9, 1])
def test_pieces_that_do_not_fit_leave_nothing(tmp_path: Path, pieces: list[tuple[str, Tensor]], max_shard: int) -> None:
    with (
        pytest.raises(ValueError, match="SafetensorsWriter"),
        SafetensorsWriter(tmp_path, INFOS, max_shard_bytes=max_shard) as writer,
    ):
        for name, piece in pieces:
            writer.write(name, piece)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path, INFOS, max_shard_bytes=1) as writer:
        writer.write("a", torch.zeros(4))
        writer.write("b", torch.zeros(1))
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ from each other"):
        SafetensorsWriter(tmp_path, [INFOS[0], INFOS[0]])
    with pytest.raises(ValueError, match="complex128"):
        SafetensorsWriter(tmp_path, [TensorInfo("a", torch.complex128, (1,))])
    with pytest.raises(ValueError, match="max_shard_bytes"):
        SafetensorsWriter(tmp_path, INFOS, max_shard_bytes=0)
    with pytest.raises(RuntimeError, match="context manager"):
        SafetensorsWriter(tmp_path, INFOS).write("a", torch.zeros(4))
    save_file({"a": torch.zeros(1)}, tmp_path / SAFE)
    with pytest.raises(FileExistsError, match=SAFE):
        SafetensorsWriter(tmp_path, INFOS)


def shards(folder: Path, **changes: object) -> Path:
    write(folder, {"a": torch.zeros(4), "b": torch.ones(4)}, max_shard_bytes=16)
    index = json.loads((folder / SAFE_INDEX).read_text())
    index["weight_map"] |= changes
    (folder / SAFE_INDEX).write_text(json.dumps(index))
    return folder


def test_reader_refuses_an_index_that_does_not_fit(tmp_path: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    for number, changes in enumerate([{"c": first}, {"b": first}, {"c": "missing.safetensors"}]):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(CheckpointError, match="copy it again"):
            MappedCheckpoint(shards(tmp_path / str(number), **changes))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "weights.bin"])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    save_file({"c": torch.zeros(1)}, tmp_path / SAFE)
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match="its own folder"):
        MappedCheckpoint(shards(tmp_path / "in", c=name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SAFE_INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="weight_map"):
        MappedCheckpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / SAFE)
    (tmp_path / SAFE).write_bytes((tmp_path / SAFE).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        MappedCheckpoint(tmp_path)


def test_other_folders_are_refused_with_the_remedy(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(CheckpointError) as caught:
            MappedCheckpoint(tmp_path)
        return str(caught.value)

    assert "save_pretrained" in refused()
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert "can run code" in refused()
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "merge_and_unload" in refused()
    save_file({"a": torch.zeros(1)}, tmp_path / SAFE)
    (tmp_path / SAFE_INDEX).write_text("{}")
    assert "out of date" in refused()
    with pytest.raises(CheckpointError, match="no folder"):
        MappedCheckpoint(tmp_path / "nowhere")
