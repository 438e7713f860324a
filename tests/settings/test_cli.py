"""flags.py: flags over YAML over defaults; what is wrong is said on stderr, at once, with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import ChildrenSeconds

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.flags import parse, write_default_yaml
from syncr1.engine.settings.yaml_files import from_yaml

PROGRAM = """
import sys
from syncr1.engine.settings.flags import parse
from syncr1.engine.methods.sync_r1_config import SyncR1Config
config = parse(SyncR1Config, description="Trains.")
print(config.learning_rate, "torch" in sys.modules)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherConfig:
    """Another recipe's settings."""

    # --- a part ---
    rate: float = 0.5
    """How fast."""
    names: tuple[str, ...] = ("a",)
    """Which."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError("rate: expected at least 0; raise it")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(SyncR1Config, list(arguments))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_defaults_without_flags() -> None:
    assert parse(SyncR1Config, []) == SyncR1Config()


def test_flags_override_yaml_which_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 1e-4\nbeta: 0.5\nreport_to: [tensorboard]\n")
    config = parse(SyncR1Config, ["--config", str(path), "--learning_rate", "3e-5"])
    assert (config.learning_rate, config.beta, config.seed) == (3e-5, 0.5, 0)
    assert parse(SyncR1Config, [f"--config={path}"]).learning_rate == 1e-4
    assert parse(SyncR1Config, ["--seed", "3"], default_yaml=path).beta == 0.5
    assert parse(SyncR1Config, ["--config", str(path), "--report_to", "none"]).report_to == ("none",)


def test_a_flag_may_complete_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("dgs: top_k\n")
    assert parse(SyncR1Config, ["--config", str(path), "--dgs_keep", "4"]).dgs_keep == 4
    assert "dgs_keep" in refused(capsys, "--config", str(path))


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--dry_run"], "dry_run", True),
        (["--no-dry_run"], "dry_run", False),
        (["--no_bf16"], "bf16", False),
        (["--num-generations", "4"], "num_generations", 4),
        (["--num_generations=4"], "num_generations", 4),
        (["--model", "None"], "model", None),
        (["--delta", "1.5"], "delta", 1.5),
        (["--output_dir", "x y"], "output_dir", Path("x y")),
        (["--zero_stage", "2"], "zero_stage", 2),
    ],
)
def test_flag_spellings(arguments: list[str], field: str, expected: object) -> None:
    assert getattr(parse(SyncR1Config, arguments), field) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate", "3"], "did you mean --learning_rate?"),
        (["--epsilon_low", "3"], "set epsilon"),
        (["--no_such_thing_at_all"], "--help lists all settings"),
        (["--num_generations", "1"], "at least 2"),
        (["--learning_rate", "nan"], "a finite number"),
        (["--nodes", "0"], "at least 1"),
        (["--config"], "expected a YAML file"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--config", "a.yaml", "--config", "b.yaml"], "given 2 times"),
        (["--num_generations", "x"], "num_generations"),
        (["--zero_stage", "7"], "zero_stage"),
        (["--learning_rate"], "learning_rate"),
        (["stray"], "stray"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *arguments)


def test_a_wrong_flag_is_refused_in_seconds_and_without_torch() -> None:
    with ChildrenSeconds() as seconds:
        done = run("--num_generation", "1")
    assert seconds.used < 3
    assert done.returncode == 2
    assert "did you mean --num_generations?" in done.stderr
    assert done.stdout == ""
    assert run("--learning_rate", "1e-4").stdout.split() == ["0.0001", "False"]


def test_help_is_grouped_and_explained() -> None:
    done = run("--help")
    assert done.returncode == 0
    for words in ("Trains.", "dynamic group scaling", "--config", "--learning_rate", "AdamW's peak", "--no_dry_run"):
        assert words in done.stdout


def test_other_dataclasses_work_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.yaml"
    write_default_yaml(OtherConfig, path)
    assert from_yaml(OtherConfig, path) == OtherConfig()
    config = parse(OtherConfig, ["--config", str(path), "--rate", "2", "--names", "x", "y"])
    assert config == OtherConfig(rate=2.0, names=("x", "y"))
    with pytest.raises(SystemExit):
        parse(OtherConfig, ["--rate", "-1"])
    assert "rate: expected at least 0" in capsys.readouterr().err
