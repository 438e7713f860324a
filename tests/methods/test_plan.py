"""dry_run.py and `--dry_run`: what a run would be, and what would stop it, without a GPU and without weights."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import all_kinds_of_prompts, environment, make_prompt
from made import cache_folder, short_base
from PIL import Image
from recipe_cases import leaks, recipe_here, started

from syncr1.engine.errors import ConfigError, PictureError
from syncr1.engine.methods.dry_run import check_batch, nothing_trained, policy_without_weights, show
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import load_policy


@pytest.fixture(scope="module")
def base() -> Path:
    return short_base()


def test_shapes_are_those_of_the_checkpoint_and_no_weight_is_read(base: Path, tmp_path: Path) -> None:
    loaded = load_policy(base)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    policy = policy_without_weights(str(bare))
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    expected = {name: (p.shape, p.requires_grad) for name, p in loaded.named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in policy.named_parameters()} == expected
    prompt = make_prompt("what is it?")
    assert torch.equal(policy.prompt_tokens(prompt), loaded.prompt_tokens(prompt))
    (bare / "config.json").write_text(json.dumps({"model_type": "showo"}))
    with pytest.raises(ConfigError, match="emu3 or janus"):
        policy_without_weights(str(bare))


def test_a_batch_is_checked(tmp_path: Path) -> None:
    policy, config = policy_without_weights(None), SyncR1Config()
    check_batch(config, policy, all_kinds_of_prompts(tmp_path))
    broken = tmp_path / "broken.png"
    Image.new("RGB", (8, 8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(PictureError, match="broken"):
        check_batch(config, policy, [make_prompt("who?", ("text",), broken)])
    with pytest.raises(ValueError, match="shorten the prompt"):
        check_batch(config, policy, [make_prompt("why " * 600)])


def said(config: SyncR1Config, folder: Path) -> str:
    lines: list[str] = []
    show(config, lambda ranks: all_kinds_of_prompts(folder)[: 8 // ranks], lines.append)
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test that trained in this process has left, or the machine's own."""
    for name in {*os.environ} - {*environment()} | {"SLURM_JOB_ID", "SYNCR1_HOSTFILE"}:
        monkeypatch.delenv(name, raising=False)


def test_the_plan_tells_ranks_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sync_r1.py", "--nodes", "2"])
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    out = said(SyncR1Config(nodes=2, hostfile=tmp_path / "hosts", zero_stage=2), tmp_path)
    assert "plan: 2 nodes, 4 ranks, ZeRO stage 2" in out and "a, b" in out
    assert "at the worst moment" in out and "first step's 2 prompts of a rank" in out


def test_nodes_that_cannot_be_had_are_part_of_the_plan(tmp_path: Path) -> None:
    out = said(SyncR1Config(nodes=4, ranks_per_node=2), tmp_path)
    assert "plan: 4 nodes, 8 ranks" in out and "exit code 2" in out and "sbatch --nodes=4" in out


def test_what_would_stop_the_run_stops_the_plan() -> None:
    def refuse(ranks: int) -> Any:
        raise ConfigError(f"not for {ranks} ranks")

    with pytest.raises(ConfigError, match="not for 1 ranks"):
        show(SyncR1Config(), refuse, lambda _: None)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (["--dry_run", "--seed", "1"], ["--seed", "1"]),
        (["--dry-run", "true", "--seed", "1"], ["--seed", "1"]),
        (["--dry_run=yes", "--chat_template_kwargs", "day=26 Jul"], ["--chat_template_kwargs", "day=26 Jul"]),
        (["--seed", "1", "--dry_run", "1"], ["--seed", "1"]),
        (["--config", "mine.yaml"], ["--config", "mine.yaml", "--no_dry_run"]),
    ],
)
def test_the_last_line_is_the_command_that_trains(
    given: list[str], left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the flag was written, none of it stays; and the command starts this Python, not whichever is found."""
    lines: list[str] = []
    monkeypatch.setattr(sys, "argv", ["recipes/sync_r1.py", *given])
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / "env/bin/python"))
    nothing_trained(lines.append)
    assert shlex.split(lines[0].partition("to train: ")[2]) == ["env/bin/python", "recipes/sync_r1.py", *left]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    nothing_trained(lines.append)
    assert shlex.split(lines[1].partition("to train: ")[2])[0] == "python"


@pytest.mark.slow
def test_dry_run_of_the_recipe_needs_less_than_a_minute(tmp_path: Path) -> None:
    """Of which importing torch and the rest takes no ten seconds; nothing is written, and no secret is said."""
    flags = ["--nodes", 4, "--zero_stage", 2, "--judge_key_env", "JUDGE_KEY", "--output_dir", tmp_path / "run"]
    out, seconds = started(cache_folder(), "sync_r1.py", "--dry_run", *flags)
    assert seconds < 50
    last = out.rstrip().splitlines()[-1]
    assert re.match(r"this was a dry run: nothing was trained; to train: \S*python\S* \S*sync_r1\.py --nodes 4 ", last)
    for words in (
        "zero_stage: 2",
        "plan: 4 nodes, 4 ranks",
        "sbatch --nodes=4",
        "it will take about",
        "lengths checked",
    ):
        assert words in out
    assert leaks(out.encode()) == [] and not (tmp_path / "run").exists()


@pytest.fixture
def cache_dir(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs of this session keep the rendered world."""
    folder = cache_folder()
    monkeypatch.setenv("SYNCR1_CACHE", str(folder))
    return folder


@pytest.mark.slow
def test_dry_run_shows_settings_and_prompts(
    base: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dry_run", "--model", base, "--output_dir", tmp_path / "run", "--max_steps", 7]
    out, _ = recipe_here(capsys, "sync_r1.py", *flags)
    settings, prompts = out[out.index("settings that differ") : out.index("plan:")], out.rpartition("data: ")[2]
    assert "a settings file: 3\n" in settings and "\n  max_steps: 7\n" in settings
    assert settings.count("\n") == 5 and re.search(r"  \d+ more are as they are by default", settings)
    assert len(re.findall(r"->", prompts)) == 16 and "Infer what is meant, then draw it (rea): " in prompts
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_that_cannot_be_ends_with_a_message(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dry_run", "--nodes", "5", "--prompts_per_step", "16"]
    _, err = recipe_here(capsys, "sync_r1.py", *flags, expected=2)
    assert "multiple of the 5 ranks" in err and "Traceback" not in err
