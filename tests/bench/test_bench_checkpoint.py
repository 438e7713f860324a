"""The benchmark of checkpoints runs at tiny sizes, and its step is the same each time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from helpers import ROOT, own_process_group

from syncr1.engine.checkpoints.sharded import folders, verified

BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
try:
    import checkpoint
finally:
    sys.path.remove(str(BENCH))


@pytest.fixture
def process_group() -> Iterator[None]:
    with own_process_group():
        yield


def test_it_runs_at_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = checkpoint.main(
        ["--quick", "--only", "writing", "--device", "cpu", "--no_memory", "--out", str(tmp_path)]
    )
    rows = {row["provider"]: row for row in content["cases"]["writing"]["rows"]}
    assert len(rows) == 5 and all(row["bytes_per_second"] > 0 for row in rows.values())
    assert set(content["cases"]["writing"]["floor"]) == {"SHA-256", "disk"} and len(content["goals"]) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"], "the checkpoints are gone"
    assert "| copy alone |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        checkpoint.main(["--only", "no_such_case"])


@pytest.mark.slow
def test_a_step_and_a_save_beside_it(tmp_path: Path, process_group: None) -> None:
    """Every round samples the same tokens, so that rounds can be compared, and saves them again."""
    training = checkpoint.Training(tmp_path, quick=True)
    case = checkpoint.stepping(tmp_path / "case", quick=True)
    assert {provider.name for provider in case.providers} == {"ours", "no save", checkpoint.AWAITED}
    sampled = []
    training.trainer.on_step = lambda metrics, rollouts, _: sampled.append(metrics.values["num_tokens"])
    for _ in range(2):
        training.save()
        training.step()
        training.wait()
    assert sampled[0] == sampled[1] > 0
    (newest,) = (verified(folder) for folder in folders(tmp_path))
    saved = [value.nbytes for name, value in newest.tensors(0).items() if name.startswith("optimizer/")]
    assert newest.step == 2 and sum(saved) == training.bytes > 0
