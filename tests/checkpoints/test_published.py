"""`--model` in DeepSeek's layout, from a folder or the hub: converted once, by whoever comes first, and again when the
files change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from deepseek_janus import THREE, config_of, save_small
from hub_files import HubFiles, hub_files
from safetensors.torch import save_file
from small_liquid import sharp_liquid

from syncr1.engine.checkpoints.deepseek_files import RECORD
from syncr1.engine.checkpoints.hub_cache import absent_from, fetched, snapshots
from syncr1.engine.checkpoints.merge import merge_checkpoints
from syncr1.engine.checkpoints.published import kept_conversion, local_checkpoint, settings_alone
from syncr1.engine.checkpoints.weight_source import weights_in
from syncr1.engine.errors import CheckpointError, ConfigError
from syncr1.engine.policies.auto import load_policy, policy_class
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.policies.liquid import LiquidPolicy


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in DeepSeek's layout, and a cache of the test's own."""
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path / "cache"))
    save_small(tmp_path / "theirs", weights="bin_shards")
    return tmp_path / "theirs"


def test_a_folder_is_converted_once(theirs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert kept_conversion(theirs) is None
    first = local_checkpoint(theirs, said.append)
    assert any("once" in line for line in said) and str(first) in said[-1]
    assert first == kept_conversion(theirs) == local_checkpoint(str(theirs), said.append)
    assert "is kept in" in said[-1]
    shutil.copytree(theirs, tmp_path / "copy")  # the same files in another place
    assert local_checkpoint(tmp_path / "copy", said.append) == first
    assert local_checkpoint(first, said.append) == first, "transformers' format needs nothing"


def test_other_files_or_a_damaged_conversion_are_converted_anew(theirs: Path) -> None:
    said: list[str] = []
    first = local_checkpoint(theirs, said.append)
    (first / "model.safetensors").write_bytes(b"cut off")
    assert kept_conversion(theirs) is None
    assert local_checkpoint(theirs, said.append) == first and any("made again" in line for line in said)
    assert weights_in(first).tensors
    tensors = torch.load(theirs / "pytorch_model-00001-of-00003.bin", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, theirs / "pytorch_model-00001-of-00003.bin")
    second = local_checkpoint(theirs, said.append)
    assert second != first and json.loads((second / RECORD).read_text())["source"] == str(theirs)


def test_a_folder_that_cannot_be_converted_leaves_nothing(theirs: Path, tmp_path: Path) -> None:
    (theirs / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises((CheckpointError, OSError)):
        local_checkpoint(theirs, lambda line: None)
    assert [path for path in (tmp_path / "cache" / "converted").iterdir() if not path.name.endswith(".lock")] == []


def test_of_several_at_once_one_converts(theirs: Path) -> None:
    """Threads, for which the lock is that of processes: each opens the file itself."""
    said: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: local_checkpoint(theirs, said.append), range(3)))
    assert len(set(made)) == 1 and sum("converting it" in line for line in said) == 1
    assert sum("is kept in" in line for line in said) == 2


def test_a_base_in_deepseeks_layout_is_merged_against(theirs: Path, tmp_path: Path) -> None:
    """What a training that started from it left is in transformers' format, and its base is the one that was named."""
    said: list[str] = []
    trained = local_checkpoint(theirs, said.append)
    report = merge_checkpoints(theirs, [trained, trained], tmp_path / "merged", "mean", say=said.append)
    assert report.moved == (0.0, 0.0) and "is kept in" in said[-1] and not (tmp_path / "merged" / RECORD).exists()
    merged, own = weights_in(tmp_path / "merged"), weights_in(trained)
    assert merged.tensors == own.tensors
    assert torch.equal(*(weights.elements("lm_head.weight", 0, 64) for weights in (merged, own)))


def test_settings_alone_write_no_weights(theirs: Path, tmp_path: Path) -> None:
    assert policy_class(theirs) is JanusPolicy
    with settings_alone(theirs, lambda line: None) as folder:
        policy = policy_class(folder).without_weights(folder)
        assert not list(Path(folder).rglob("*.safetensors"))
    assert policy.num_image_tokens == 16 and not (tmp_path / "cache").exists()
    (theirs / "config.json").write_text(json.dumps(config_of(THREE["pro_7b"])))
    with pytest.raises(CheckpointError, match="of another shape"), settings_alone(theirs, lambda line: None):
        pass


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[HubFiles]:
    with hub_files() as server:
        yield server


@pytest.fixture
def hub(server: HubFiles, tmp_path: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch) -> HubFiles:
    """A hub with one repository, and a cache without any."""
    server.use(monkeypatch, tmp_path / "hub")
    server.add("org/janus", theirs)
    return server


def test_a_name_is_fetched_and_converted(hub: HubFiles, theirs: Path) -> None:
    hub.repositories["org/janus"]["demo.py"] = b"print('nobody needs this')"
    hub.repositories["org/janus"]["extra.bin"] = b"nor this"
    found = local_checkpoint("org/janus", lambda line: None)
    assert found.name.startswith("janus-") and weights_in(found).tensors
    assert not {"demo.py", "extra.bin"} & set(hub.fetched)
    hub.fetched.clear()
    assert local_checkpoint("org/janus@main", lambda line: None) == found and hub.fetched == []


def test_a_cached_name_needs_no_hub(hub: HubFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched("org/janus", lambda line: None)
    assert snapshots("org/janus", "model") == [folder] and absent_from(folder) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.repositories.clear()
    assert fetched("org/janus", lambda line: None) == folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/nothing", "model: org/nothing: hub: expected a repository's name"),
        ("org/janus@v9", "model: org/janus@v9: hub: expected a branch, tag or commit"),
        ("org/gated", "model: org/gated: hub: expected access to a gated repository"),
        ("org/holes", "model: org/holes: expected all its files, got 1 missing (pytorch_model-00002-of-00003.bin)"),
        ("org/bare", "model: org/bare: expected all its files, got 1 missing (tokenizer.json)"),
        ("org/pickles", "model: org/pickles: expected all its files, got 1 missing (model.safetensors)"),
    ],
)
def test_what_cannot_be_fetched_is_a_line(hub: HubFiles, theirs: Path, name: str, words: str) -> None:
    for other in ("org/gated", "org/holes", "org/bare", "org/pickles"):
        hub.add(other, theirs)
    hub.gated.add("org/gated")
    del hub.repositories["org/holes"]["pytorch_model-00002-of-00003.bin"]
    del hub.repositories["org/bare"]["tokenizer.json"]
    hub.repositories["org/pickles"]["config.json"] = b'{"model_type": "janus"}'  # whose pickles are not taken
    with pytest.raises(ConfigError) as refused:
        fetched(name, lambda line: None)
    assert words in str(refused.value) and "; " in str(refused.value) and "\n" not in str(refused.value)
    assert name != "org/pickles" or not any(file.endswith(".bin") for file in hub.fetched)


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "../janus", "@main", "file.json"])
def test_a_path_that_is_no_folder_is_told_as_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository is called so, and nothing is to be fetched again."""
    monkeypatch.chdir(tmp_path)
    Path("file.json").touch()
    given = str(tmp_path / name) if name == "file.json" else name
    remedy = "a file; name the folder that it is in" if name == "file.json" else "which is not a folder; correct it"
    told = f"model: expected a checkpoint folder or a hub name, got {given}, {remedy}"
    with pytest.raises(ConfigError) as refused:
        local_checkpoint(given, lambda line: None)
    assert str(refused.value) == told
    with pytest.raises(ConfigError) as refused, settings_alone(given, lambda line: None):
        pass
    assert str(refused.value) == told


def test_half_a_download_is_told_and_gone_on_with(hub: HubFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cut = "pytorch_model-00002-of-00003.bin"
    with pytest.raises(ConfigError, match=r"hub: expected whole files, got .*goes on where it was cut off"):
        fetched("org/janus", lambda line: None)
    (folder,) = snapshots("org/janus", "model")
    assert absent_from(folder) == [hub.cut]
    hub.cut = ""
    assert absent_from(fetched("org/janus", lambda line: None)) == []


def test_what_a_model_draws_with_comes_with_its_settings(hub: HubFiles, tmp_path: Path) -> None:
    """Else a dry run would say of a repository that it cannot draw, and so would a run whose weights were there."""
    liquid = sharp_liquid()
    vqgan = liquid.vqmodel
    liquid.save(tmp_path / "liquid")
    save_file(vqgan.state_dict(), tmp_path / "liquid" / "vqgan.safetensors")
    liquid.model.vqmodel = None
    liquid.model.save_pretrained(tmp_path / "liquid", max_shard_size="20KB")
    (tmp_path / "liquid" / "model.safetensors").unlink()
    told = json.loads((tmp_path / "liquid" / "config.json").read_text())
    (tmp_path / "liquid" / "config.json").write_text(json.dumps({**told, "vq_config": None}))
    hub.add("org/liquid", tmp_path / "liquid")
    assert policy_class("org/liquid@main") is LiquidPolicy
    with settings_alone("org/liquid", lambda line: None) as folder:
        assert not policy_class(folder).without_weights(folder).cannot_draw
    assert not any(file.startswith("model-") for file in hub.fetched)
    (snapshot,) = snapshots("org/liquid", "model")
    (snapshot / "model.safetensors.index.json").unlink()
    assert absent_from(snapshot) == ["model.safetensors"], "a VQGAN is no model"
    hub.fetched.clear()
    folder = fetched("org/liquid", lambda line: None)  # the weights, as another program would have left them
    (folder / "vqgan.safetensors").unlink()
    assert (fetched("org/liquid", lambda line: None) / "vqgan.safetensors").is_file()
    assert not load_policy(folder).cannot_draw
