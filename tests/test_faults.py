"""One rank of two fails, in every way and at a stage of a step: all end in time, say who it was, and lose nothing.

`python tests/faults.py` puts faults at random ranks, stages and steps, as many as wanted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faults import BENIGN, KINDS, STAGE_TIMEOUT, Ended, Fault, check, flags_of, preload, run
from helpers import short_base, world_folder
from safetensors.torch import load_file

from syncr1.engine.training import SAVE

pytestmark = pytest.mark.slow
FATAL = {
    "killed": Fault("killed", 1, 2, "update"),
    "exits": Fault("exits", 0, 1, "reward"),
    "raises": Fault("raises", 0, 1, "pack"),
    "stalls": Fault("stalls", 1, 1, "rollout"),
    "disk full": Fault("disk full", 1, 2, "rollout"),
    "SIGTERM": Fault("SIGTERM", 1, 1, "rollout"),
}
STAGE = {"killed": "2", "stalls": "3", "SIGTERM": "2", "benign": "3"}
"""ZeRO's, where it is not 0."""


def ended(tmp_path_factory: pytest.TempPathFactory, folder: Path, name: str, *faults: Fault, more: tuple[str, ...] = ()
          ) -> Ended:  # fmt: skip
    preload()
    base, world = short_base(tmp_path_factory), world_folder(tmp_path_factory)
    result = run(folder, flags_of(base, world, folder, "--zero_stage", STAGE.get(name, "0"), *more), faults)
    check(faults, result, folder)
    assert result.seconds < STAGE_TIMEOUT + 60
    return result


@pytest.mark.parametrize("kind", FATAL)
def test_all_ranks_end(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, kind: str) -> None:
    ended(tmp_path_factory, tmp_path, kind, FATAL[kind])


def test_what_a_run_survives(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """NaN on one rank: all skip that update. A reward fails or hangs on one: it is counted, the step goes on."""
    assert set(BENIGN) == {"nan", "reward raises", "reward hangs"} and set(FATAL) <= set(KINDS)
    faults = [
        Fault("nan", 1, 1, "rollout"),
        Fault("reward raises", 1, 2, "reward"),
        Fault("reward hangs", 0, 3, "reward"),
    ]
    ended(tmp_path_factory, tmp_path, "benign", *faults)


def test_who_was_asked_to_end_goes_on_as_if_never_asked(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """SIGUSR1 to one rank in the second step, a second start with `latest`: the weights of an undisturbed run."""
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    (whole / "run").mkdir(parents=True)
    (whole / "run" / SAVE).touch()
    ended(tmp_path_factory, whole, "SIGTERM")
    ended(tmp_path_factory, asked, "SIGTERM", Fault("SIGUSR1", 0, 1, "rollout"))
    ended(tmp_path_factory, asked, "SIGTERM", more=("--resume_from_checkpoint", "latest"))
    weights = [(f / "run" / "checkpoints" / "last" / "model.safetensors").read_bytes() for f in (whole, asked)]
    assert weights[0] == weights[1]
    # What the file asked for, before the first step: the model as it was, and no more than once.
    start, saved = (load_file(f / "model.safetensors") for f in (
        short_base(tmp_path_factory), whole / "run" / "checkpoints" / "model_000000"))  # fmt: skip
    assert saved.keys() == start.keys() and all(torch.equal(saved[name], start[name]) for name in saved)
    assert not (whole / "run" / SAVE).exists() and len(list(whole.glob("run/checkpoints/model_*"))) == 1
