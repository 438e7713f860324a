"""Recipes in a process of their own, with secrets in its environment, and in this one, which has loaded torch."""

from __future__ import annotations

import logging
import os
import runpy
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import transformers
import warm
from helpers import ROOT, environment

SECRETS = {
    "HF_TOKEN": "hf_" + "Q" * 34,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "R" * 34,
    "WANDB_API_KEY": "5" * 40,
    "OPENAI_API_KEY": "sk-" + "S" * 40,
    "ZAI_API_KEY": "zai" + "T" * 40,
    "AWS_SECRET_ACCESS_KEY": "U" * 40,
    "JUDGE_KEY": "judge-" + "V" * 30,
    "MY_PASSWORD": "correct-horse-battery-W",
}


def started(cache_dir: Path, recipe: str, *flags: object) -> tuple[str, float]:
    """What a recipe says, with secrets in its environment, and the seconds of a core that it takes beside imports."""
    planted = {**environment(cache_dir), **SECRETS, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    program = warm.Program(str(ROOT / "recipes" / recipe), *map(str, flags), env=planted)
    said = "".join(program.communicate(timeout=600))
    assert program.poll() == 0, said[-6000:]
    return said, program.seconds()


def leaks(text: bytes) -> list[str]:
    return [name for name, value in SECRETS.items() if value.encode() in text]


def recipe_here(capsys: pytest.CaptureFixture[str], recipe: str, *flags: object, expected: int = 0) -> tuple[str, str]:
    """Its stdout and stderr; what it switches off for a run's own display is on again afterwards."""
    path = str(ROOT / "recipes" / recipe)
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "deepspeed", "transformers")]
    levels = [logger.level for logger in loggers]
    code: object = 0
    more = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with patch.object(sys, "argv", [path, *map(str, flags)]), patch.dict(os.environ, more), warnings.catch_warnings():
        for name in {*os.environ} - {*environment()}:  # a launcher's, left by a test that trained in this process
            del os.environ[name]
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        finally:
            transformers.utils.logging.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    output = capsys.readouterr()
    assert code == expected, output
    return output.out, output.err
