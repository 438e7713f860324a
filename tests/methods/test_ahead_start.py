"""What starts a process that samples ahead: which GPU it gets, and what has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import sharp_policy
from made import cache_folder, short_base, world_folder

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods import preflight
from syncr1.engine.methods.ahead_start import device_beside, started_ahead
from syncr1.engine.methods.starting import loaded_from
from syncr1.engine.methods.sync_r1_ahead import side
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import load_policy
from syncr1.engine.settings.train_config import TrainConfig
from syncr1.engine.settings.yaml_files import to_yaml

STALE = TrainConfig(rollout_staleness=1, importance_correction="mask")


@pytest.mark.parametrize(
    ("environ", "index", "gpu"),
    [({}, 0, "1"), ({"CUDA_VISIBLE_DEVICES": "5, 3"}, 0, "3"), ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1, "GPU-a")],
)
def test_it_gets_the_gpu_behind_this_ones(
    environ: Mapping[str, str], index: int, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_beside(environ, torch.device("cuda", index)) == {"CUDA_VISIBLE_DEVICES": gpu}
    assert device_beside(environ, torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="expected a second GPU for the process that samples ahead, got 1"):
        device_beside(environ, torch.device("cuda", 0))


def test_a_single_gpu_is_told_before_torch_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight, "NVIDIA", tmp_path)
    for visible, problems in (("2", 1), ("0,1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(preflight.ahead_problems(STALE)) == problems and not preflight.ahead_problems(TrainConfig())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert preflight.ahead_problems(STALE) == []


def test_a_method_that_has_none() -> None:
    with pytest.raises(ConfigError, match="expected 0 for this method"), started_ahead(STALE, sharp_policy(), None):
        pass
    with started_ahead(TrainConfig(), sharp_policy(), None) as started:
        assert started.beside is None
        started.close()


def test_the_other_process_loads_the_folder_that_this_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on the hub is not asked for again: it may have come to mean another model, or be out of reach."""
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = SyncR1Config(model="org/nowhere", data=str(world_folder()), reward_funcs=("identity", "text"))
    folder = loaded_from(load_policy(short_base()), "org/nowhere")
    assert folder == str(short_base())
    made = side({"settings": to_yaml(config, comments=False), "model": folder, "skipped": {}})
    assert made.policy.model.name_or_path == folder
    assert loaded_from(sharp_policy(), "here") == "here"
