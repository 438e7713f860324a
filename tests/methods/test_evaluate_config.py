"""evaluation_config.py: every setting explained, and what cannot work refused before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, environment

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.schema import settings_of
from syncr1.engine.settings.yaml_files import from_yaml, to_yaml


def test_defaults_work_and_survive_yaml() -> None:
    config = EvaluateConfig()
    assert from_yaml(EvaluateConfig, to_yaml(config)) == config
    assert config.seed == 3407 and config.stage == "all"


def test_every_setting_is_explained() -> None:
    assert [setting.name for setting in settings_of(EvaluateConfig) if len(setting.doc) < 10] == []
    assert {setting.section for setting in settings_of(EvaluateConfig)} == {
        "what is evaluated",
        "sampling",
        "scoring",
        "export",
    }


def test_flags(tmp_path: Path) -> None:
    flags = ["--tasks", "rec", "vqa", "--export", "geneval", "dpg", "--no_think", "--limit", "3", "--data", "a/b"]
    config = parse(EvaluateConfig, flags)
    assert config.tasks == ("rec", "vqa") and config.export == ("geneval", "dpg") and config.think is False
    assert config.limit == 3 and config.data == "a/b"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"judge_url": "https://x/v1"}, "judge_model: expected beside judge_url"),
        ({"judge_model": "x"}, "judge_url: expected beside judge_model"),
        ({"greedy_texts": False, "sampled_texts": False}, "got both off"),
        ({"export": ("dpg",), "images_per_prompt": 5}, "DPG-Bench's grid, got 5"),
        ({"export": ("dpg", "dpg")}, "got dpg twice"),
        ({"export": ("wise",), "images_per_prompt": 2}, "as WISE scores them, got 2"),
        ({"benchmark": ("pope",), "data_form": "table"}, "data_form: expected none beside benchmark"),
        ({"benchmark": ("geneval",)}, "git clone https://github.com/djghosh13/geneval"),
        ({"benchmark": ("mmmu", "mmmu")}, "benchmark: expected each once, got mmmu twice"),
        ({"benchmark": ("mmmu",), "data": "./nowhere"}, "got ./nowhere, which is not there"),
        ({"image_folder": Path("nowhere")}, "image_folder: expected a folder of pictures"),
        ({"limit": 0}, "limit: expected at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"clip_references": -1}, "clip_references"),
        ({"data_form": "dpg", "data": "nowhere"}, "nowhere, which is not there"),
        ({"model": "./nowhere"}, "which is not a folder"),
        ({"stage": "score", "output_dir": Path("nowhere")}, "run --stage generate first"),
        ({"stage": "both"}, "stage: expected one of generate, score, all"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvaluateConfig(**values)


def test_a_slip_is_refused_before_torch_is_loaded() -> None:
    program = (
        "import sys; from syncr1.engine.methods.evaluation_config import EvaluateConfig; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_names_from_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(EvaluateConfig, ["--num_items", "3"])
    assert "set limit" in capsys.readouterr().err
