"""What docs/scaling.md says is what its calculator and its measurements say; the arithmetic of both, by hand."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
try:
    import paced
    import scaling_model as model
    import weak_scaling
finally:
    sys.path.remove(str(ROOT / "bench"))

PAGE = (ROOT / "docs" / "scaling.md").read_text()
MACHINE = model.Machine()
SIZES = (model.JANUS_1B, model.JANUS_7B)


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_calculator_prints() -> None:
    assert model.placed(PAGE) == PAGE, "python bench/scaling_model.py --write docs/scaling.md"
    with pytest.raises(SystemExit, match="0 places"):
        model.placed("nothing")


def test_the_page_shows_what_was_measured() -> None:
    (path,) = (ROOT / "bench" / "results").glob("*-weak-scaling.json")
    measured = json.loads(path.read_text())
    shown = PAGE.partition("<!-- measured -->\n")[2].partition("<!-- /measured -->")[0]
    assert shown == weak_scaling.show(measured["rows"]) + "\n"
    assert measured["goals"] and all(line["met"] == (line["measured"] >= 0.9) for line in measured["goals"])


def test_numbers_in_the_text() -> None:
    texts = round(model.Job().prompts * model.Job().text_share * model.Job().group)
    longest = [f"{model.expected_longest(size * texts, 48, 2048):.0f}" for size in (1, 64, 1024)]
    assert f"longest of {texts} answers" in PAGE
    assert "has {} on one GPU, {} on 64 and {} on 1,024".format(*longest) in PAGE
    assert f"one in {round(MACHINE.gpu_hours, -2):,.0f} GPU-hours" in PAGE
    drawn = 1024 * model.Job().prompts * model.Job().image_share * model.Job().group
    per_second = [drawn / model.step_of(one, MACHINE, model.Job(), 1024).seconds for one in SIZES]
    assert f"{drawn / 1000:.0f},000 pictures" in PAGE
    assert f"{per_second[0] / 1000:.0f},000 a second (1B), {round(per_second[1], -2):,.0f} (7B)" in PAGE


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SIZES, ids=lambda one: one.name)
def test_parameters_are_those_of_transformers(one: Any) -> None:
    config = LlamaConfig(
        vocab_size=one.vocabulary,
        hidden_size=one.hidden,
        intermediate_size=one.mlp,
        num_hidden_layers=one.layers,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        decoder = LlamaForCausalLM(config)
    norms = (2 * one.layers + 1) * one.hidden
    assert sum(p.numel() for p in decoder.parameters()) == one.blocks + 2 * one.text_head + norms
    image_head = (one.hidden + 1) * one.hidden + (one.hidden + 1) * one.image_vocabulary
    assert one.image_head == pytest.approx(image_head, rel=1e-3)
    assert one.trained == one.blocks + 2 * one.text_head + one.image_head


@pytest.mark.parametrize(("size", "groups", "milliseconds"), [(0, 1, 0.85), (0, 2, 1.11), (1, 2, 4.2)])
def test_decoding_at_its_floor(size: int, groups: int, milliseconds: float) -> None:
    """By hand: (weights + 2 G rows x 352 tokens of keys and values) / 4.3 TB/s."""
    one = SIZES[size]
    job = model.Job(prompt_tokens=64, retries=0.0)
    seconds = model.rollout_seconds(one, replace(MACHINE, memory_rate=4.3e12, decode_share=1.0), job, groups, 0, 0)
    assert 1e3 * seconds / 576 == pytest.approx(milliseconds, rel=0.02)


def test_lengths() -> None:
    assert model.expected_longest(2, 2.0, 2) == 1.75  # 1 with 1/4, else 2
    assert model.mean_length(2.0, 10_000) == pytest.approx(2.0)
    drawn = torch.distributions.Geometric(1 / 8).sample((20_000, 6)).add(1).clamp(max=20).amax(1)
    assert model.expected_longest(6, 8.0, 20) == pytest.approx(float(drawn.mean()), rel=0.01)


def test_slowest_of_normal_ranks() -> None:
    assert model.expected_slowest(1) == pytest.approx(0, abs=1e-9)
    assert model.expected_slowest(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-6)
    assert model.expected_slowest(64) == pytest.approx(float(torch.randn(20_000, 64).amax(1).mean()), rel=0.02)


def test_communication_by_hand() -> None:
    one, job = replace(SIZES[0], layers=0, vocabulary=0), model.Job(zero_stage=0)
    small = 8 * (20e-6 + 10e-6)
    assert model.communication_seconds(one, MACHINE, job, 1, 1) == 0
    two = model.communication_seconds(one, MACHINE, job, 2, 3)
    assert two == pytest.approx(2 * 2 * one.trained / 2 / 350e9 + small)
    moved = [sum(model.update_bytes(one.trained, stage, 3)) / (2 * one.trained) for stage in range(4)]
    assert moved == [1, 2, 4, 10]
    assert model.communication_seconds(one, MACHINE, job, 9, 1) > model.communication_seconds(one, MACHINE, job, 8, 1)


def test_failures_by_hand() -> None:
    assert model.young(2, 10_000) == 200
    assert MACHINE.gpu_hours / 16384 == pytest.approx(54 * 24 / 419)
    found = model.Survival(between=10_000, rank_bytes=0, blocked=2, background=0, interval=200, restart=100)
    assert found.lost(200) == pytest.approx(2 / 200 + 100 / 10_000 + 100 / 10_000)
    assert found.lost(200) < min(found.lost(150), found.lost(250))
    whole = model.survival_of(SIZES[0], MACHINE, model.Job(zero_stage=0), 64).rank_bytes
    assert whole == 12 * SIZES[0].trained == 64 * model.survival_of(SIZES[0], MACHINE, model.Job(), 64).rank_bytes


def test_what_makes_a_step_longer() -> None:
    job = model.Job()
    for one in SIZES:
        steps = [model.step_of(one, MACHINE, job, size) for size in (1, 8, 64, 1024)]
        assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
        assert steps[0].efficiency == pytest.approx(1.0)
        in_turn = model.step_of(one, MACHINE, replace(job, fullest=model.IN_TURN[64]), 64)
        assert in_turn.uneven > 2 * steps[2].uneven
        assert in_turn.communication >= steps[2].communication, "as many micro-batches, or more"


# The measurement ------------------------------------------------------------------------------------------------------


NUMBERS = {
    "cpu_seconds": 0.5,
    "sent_bytes": 3e6,
    "packets": 9.0,
    "collectives": 7,
    "collective_bytes": 4_000_000,
    "collective_seconds": 0.25,
    "over_pace": 0.0,
}
"""Per step."""


def rank_file(seconds: float, saving: float, steps: int = 5) -> dict[str, Any]:
    """What paced.py writes: steps of `seconds`, the first twice as long, the fourth `saving` longer."""
    at, rows = 100.0, []
    for index in range(steps + 1):
        told = {name: index * value for name, value in NUMBERS.items()}
        rows.append({"at": at, **told, "calls": {"allreduce": index * 7}})
        at += seconds * (2 if index == 0 else 1) + (saving if index == 3 else 0)
    return {"network": {"small_seconds": 0.001, "large_seconds": 0.02}, "steps": rows}


def run_of(nodes: int, seconds: float, network: str = "unshaped") -> dict[str, Any]:
    read = weak_scaling.read_run([rank_file(seconds, 0.5) for _ in range(nodes)], weak_scaling.Work())
    return {"nodes": nodes, "zero_stage": 2, "network": network, "start_seconds": 10.0, **read}


def test_a_run_is_read() -> None:
    run = run_of(2, 2.0)
    assert run["step_seconds"] == pytest.approx(2.0) and run["save_seconds"] == pytest.approx(2.5)
    assert run["all_seconds"] == pytest.approx((3 * 2.0 + 2.5) / 4)
    assert run["cpu_seconds"] == pytest.approx(1.0), "of both ranks"
    assert (run["collectives"], run["calls"], run["collective_seconds"]) == (7, {"allreduce": 7}, 0.25)


def test_efficiency_and_what_was_expected() -> None:
    rounds = [run_of(1, 2.0), run_of(4, 2.5), run_of(1, 4.0), run_of(4, 4.4)]
    alone, four = weak_scaling.summary(rounds, 2_000_000)
    assert alone["efficiency"] == alone["expected"] == 1.0
    assert four["efficiency"] == pytest.approx((2.0 / 2.5 + 4.0 / 4.4) / 2), "each round by itself"
    added = 7 * 0.001 + 2 * 0.02
    assert four["expected"] == pytest.approx((2 / (2 + added) + 4 / (4 + added)) / 2)
    assert weak_scaling.show([alone, four]).count("\n") == 3
    (goal,) = weak_scaling.goals([alone, four], quick=False)
    assert goal["met"] is False and goal["measured"] == four["efficiency"]
    assert weak_scaling.goals([alone, four], quick=True)[0]["met"] is None


def test_other_networks_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    for network in ("unshaped", "1gbit", "unshaped"):
        runs = [run_of(1, 2.0, network), run_of(2, 2.5, network)]
        rows = weak_scaling.summary(runs, 1)
        content = {"rows": rows, "runs": runs, "goals": weak_scaling.goals(rows, quick=False)}
        weak_scaling.write(path, content)
    found = json.loads(path.read_text())
    assert [(row["network"], row["nodes"]) for row in found["rows"]] == [
        ("1gbit", 1),
        ("1gbit", 2),
        ("unshaped", 1),
        ("unshaped", 2),
    ]
    assert len(found["runs"]) == 4 and len(found["goals"]) == 1


def test_real_work_is_filled_up_and_no_collective_hides() -> None:
    counter = paced.Counter()
    pace = paced.Pace(counter, rollout=0.05, update=0.02)
    start = time.perf_counter()
    pace.rollout_begins(2)
    time.sleep(0.03)
    pace.before_score()
    pace.before_update()
    assert 0.14 <= time.perf_counter() - start < 0.5 and pace.over == 0.0
    pace.rollout_begins(1)
    time.sleep(0.06)
    pace.before_score()
    assert pace.over >= 0.01
    pace.rollout_begins(1)
    counter.calls["allreduce"] = 1
    with pytest.raises(AssertionError, match="hidden"):
        pace.before_score()


def test_collectives_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo

    for name in paced.COLLECTIVES:
        if hasattr(ProcessGroup, name):
            monkeypatch.setattr(ProcessGroup, name, getattr(ProcessGroup, name))  # put back afterwards
    counter = paced.Counter()
    counter.watch()
    group = ProcessGroup(0, 1)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, ProcessGroupGloo(HashStore(), 0, 1))
    group.allreduce([torch.ones(3)])
    group.allgather([[torch.ones(5)]], [torch.ones(5)])
    assert counter.calls == {"allreduce": 1, "allgather": 1} and counter.bytes == 12 + 20
    assert counter.now()["collectives"] == 2 and counter.seconds > 0
