"""estimate.py: beside the counters and the bytes of a real small run, and its arithmetic by hand."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import ROOT, all_kinds_of_prompts, own_process_group, rows_of
from made import cache_folder, short_base

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.dry_runs import beside, total
from syncr1.engine.data.stream import PromptStream
from syncr1.engine.methods import estimate as estimating
from syncr1.engine.methods.cost import Unit
from syncr1.engine.methods.dry_run import policy_without_weights, show
from syncr1.engine.methods.estimate import Disk, Estimate, estimate_of, step_work, the_gpu
from syncr1.engine.methods.gpus import GPUS, collective_seconds, gpu_called, update_bytes
from syncr1.engine.methods.memory import Memory, memory_of, prepare
from syncr1.engine.methods.reward_memory import reward_models
from syncr1.engine.methods.sync_r1 import run
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import Prompt


def config_of(**more: Any) -> SyncR1Config:
    few: dict[str, Any] = {"prompts_per_step": 4, "num_generations": 2, "max_steps": 2, "max_completion_length": 8}
    return SyncR1Config(**few | {"eval_samples": 8 if "eval_steps" in more else 0} | more)


@cache
def bare() -> Policy:
    """The tiny Janus in float32, without numbers."""
    return prepare(config_of(), policy_without_weights(None))


@cache
def memory() -> Memory:
    with tempfile.TemporaryDirectory() as folder:
        return memory_of(config_of(), bare(), all_kinds_of_prompts(Path(folder)), 1)


@cache
def unit() -> Unit:
    return Unit.of(bare())


def of(config: SyncR1Config, prompts: list[Prompt], ranks: int = 1, **more: Any) -> Estimate:
    return estimate_of(config, bare(), unit(), prompts, ranks, memory(), **more)


# A real run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_and_disk_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What metrics.jsonl counted and what lies in the run's folder, each within 10 %."""
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    folder, seen = tmp_path / "run", list[list[Prompt]]()
    config = config_of(
        model=str(short_base()),
        output_dir=folder,
        save_total_limit=1,
        dgs="none",
        preview_fraction=0.0,
        checkpointing_steps=1,
        reward_funcs=("text",),
    )
    drawn = PromptStream.next_step

    def recorded(stream: PromptStream) -> list[Prompt]:
        prompts = drawn(stream)
        seen.append(prompts)
        return prompts

    monkeypatch.setattr(PromptStream, "next_step", recorded)
    with own_process_group():
        run(config)
    first = rows_of(folder)[0]
    policy = bare()
    work = step_work(config, policy, unit(), seen[0], first["completions/mean_length"])
    assert work.prefill.tokens == first["rollout/prefill_tokens"]
    assert sum(work.sampled.values()) == pytest.approx(first["num_tokens"], rel=0.1)
    assert work.update.tokens == pytest.approx(first["pack/tokens"], rel=0.1)

    page = (ROOT / "docs" / "reproduce.md").read_text().partition("## 7.")[2].partition("## 8.")[0]
    named = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    assert len(named) > 12
    others = {"rewards/format/mean", "rollout/preview_acceptance"}  # CoRL's, and the preview's, which is off
    told = {re.sub("<name>|…", "text", name) for name in named - others}
    assert told <= first.keys(), "docs/reproduce.md names what metrics.jsonl has"

    disk = Disk.of(config, policy)
    states = [path for path in (folder / "checkpoints").glob("step_*") if path.is_dir()]
    assert disk.kept == len(states) == 1
    for state in states:
        assert disk.checkpoint == pytest.approx(bytes_of(state), rel=0.1)
    assert disk.model == pytest.approx(bytes_of(folder / "checkpoints" / "last"), rel=0.1)
    assert disk.total == pytest.approx(bytes_of(folder / "checkpoints"), rel=0.1)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    return all_kinds_of_prompts(tmp_path_factory.mktemp("prompts"))


def test_how_long_work_takes() -> None:
    gpu = GPUS["h100"]
    assert gpu.compute_seconds(0.2 * gpu.flops) == pytest.approx(1.0), "two operations, at 40 % of the peak"
    assert gpu.compute_seconds(0.2 * gpu.float32, bf16=False) == pytest.approx(1.0)
    assert gpu.read_seconds(0.45 * gpu.bandwidth) == pytest.approx(1.0)
    assert gpu.decode_seconds(0.2 * gpu.flops, 0.9 * gpu.bandwidth) == pytest.approx(2.0), "the higher bound"
    assert gpu.decode_seconds(0.6 * gpu.flops, 0.9 * gpu.bandwidth) == pytest.approx(3.0)
    assert update_bytes(10, 2, 3, item=4) == (120.0, 40.0)
    assert collective_seconds(1e9, 0, 1) == 0 < collective_seconds(1e9, 0, 2) < collective_seconds(1e9, 0, 16)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_driver_s_name_is_known(told: str, name: Any) -> None:
    assert gpu_called(told) is GPUS[name]


def test_another_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_called("Tesla V100-SXM2-16GB") is None
    assert the_gpu(config_of(gpu="a100")) == (GPUS["a100"], "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100-SXM2-16GB")
    gpu, why = the_gpu(config_of())
    assert gpu is GPUS["h100"] and "Tesla V100" in why and "--gpu" in why
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert the_gpu(config_of()) == (GPUS["h200"], "")


def test_hours_grow_with_what_is_done(prompts: list[Prompt]) -> None:
    """Twice the steps, the group, the GPUs, a slower GPU, scores: each costs what it must."""
    base = of(config_of(gpu="h100"), prompts)
    assert of(config_of(gpu="h100", max_steps=4), prompts).gpu_hours == pytest.approx(2 * base.gpu_hours)
    assert of(config_of(gpu="h100"), prompts, 2).gpu_hours > 2 * base.gpu_hours, "as many prompts for each"
    assert of(config_of(gpu="a100"), prompts).gpu_hours > base.gpu_hours
    assert of(config_of(gpu="h100", bf16=True), prompts).gpu_hours < base.gpu_hours
    scored = of(config_of(gpu="h100", eval_steps=1), prompts, held_out=prompts)
    assert (scored.times, scored.items) == (3, len(prompts)) and scored.hours.scoring > 0
    twice = of(config_of(gpu="h100", eval_steps=1), prompts, held_out=prompts * 30)
    assert 10 * scored.hours.scoring < twice.hours.scoring <= 30.1 * scored.hours.scoring
    guided = of(config_of(gpu="h100", cfg_weight=1.0), prompts)
    assert guided.work.image.multiply_adds < 0.6 * base.work.image.multiply_adds


def test_a_dozen_lines_the_total_first(prompts: list[Prompt]) -> None:
    lines = of(config_of(bf16=True), prompts, held_out=prompts).lines()
    assert len(lines) <= 14 and lines[0].startswith("it will take about less than 0.01 GPU-hours on one H100 SXM (")
    assert "scores of 8 held-out items, 2 times" in "\n".join(lines) and "no GPU is here; --gpu" in lines[-2]
    assert "45% of 3.35 TB/s" in lines[-1] and "40% of 989 TFLOP/s" in lines[-1]
    assert "40% of 67 TFLOP/s" in of(config_of(), prompts).lines()[-1], "float32 has no tensor cores"
    assert not any(len(line) > 160 for line in lines)


def test_sampling_ahead_takes_a_second_gpu(prompts: list[Prompt]) -> None:
    """Its steps take the longer half, and both GPUs are paid for."""
    plain = of(config_of(), prompts)
    ahead = of(config_of(rollout_staleness=1, importance_correction="truncate"), prompts)
    learning = sum(ahead.hours.step[name] for name in ("score", "update", "optimizer", "between ranks"))
    longer = max(learning, sum(ahead.hours.step.values()) - learning)
    assert ahead.hours.seconds == pytest.approx(2 * longer) and ahead.hours.seconds < plain.hours.seconds
    assert ahead.gpu_hours == pytest.approx(2 * ahead.hours.seconds / 3600)
    said = "\n".join(ahead.lines())
    assert "on 2 x H100 SXM (" in said and "one GPU draws while the other trains" in said
    assert "draws while" not in "\n".join(plain.lines())


@pytest.mark.parametrize(
    ("part", "more", "said"),
    [
        ("keys and values", {}, "lower --prompts_per_step"),
        ("keys and values", {"prompts_per_step": 1}, "--max_completion_length"),
        ("activations", {}, "--gradient_checkpointing, or"),
        ("activations", {"gradient_checkpointing": True}, "lower --max_tokens"),
        ("AdamW's moments", {}, "--bf16"),
        ("AdamW's moments", {"bf16": True}, "--lora_rank"),
    ],
)
def test_what_does_not_fit_has_a_remedy(part: str, more: dict[str, Any], said: str, prompts: list[Prompt]) -> None:
    found = replace(of(config_of(), prompts[:1]), config=config_of(**more))
    large = {part: 100 << 30}
    rooms = {name: getattr(found.memory, name) for name in ("lasting", "rollout", "backward", "update")}
    grown = Memory(**{name: {k: large.get(k, v) for k, v in parts.items()} for name, parts in rooms.items()})
    lines = replace(found, memory=grown).lines()
    assert "WHICH DOES NOT FIT" in lines[0] and said in lines[1] and "1.5 GiB" in lines[1]
    assert "FIT" not in found.lines()[0]


def test_disk_by_hand() -> None:
    config = config_of(max_steps=100, checkpointing_steps=20, save_total_limit=3, eval_steps=50)
    policy = bare()
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    disk = Disk.of(config, policy)
    assert (disk.checkpoint, disk.kept, disk.best) == (12 * trained, 3, True)
    assert disk.total == 3 * disk.checkpoint + 2 * disk.model and disk.peak > disk.total
    for every, limit, kept in ((0, 2, 1), (30, None, 4), (100, None, 1), (40, 2, 2)):
        found = Disk.of(replace(config, checkpointing_steps=every, save_total_limit=limit), policy)
        assert found.kept == kept, (every, limit)
    adapted = config_of(lora_rank=4)
    with_adapters = prepare(adapted, policy_without_weights(None))
    assert Disk.of(adapted, with_adapters).checkpoint < disk.checkpoint / 3
    assert Disk.of(adapted, with_adapters).model == disk.model, "what is saved is the merged model"


def test_reward_models_are_counted(tmp_path: Path, prompts: list[Prompt]) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.safetensors").write_bytes(b"x" * 1000)
    named = {"a": "openai/clip-vit-base-patch32", "b": str(tmp_path / "own"), "c": "some/other", "d": None}
    assert reward_models(named) == {"a": 604_000_000, "b": 1000, "c": 0}
    policy, config = bare(), CorlConfig()
    held = beside(config, "unified", policy)
    assert set(held) == {"frozen copy that judges", "captioner", "LPIPS", "SPICE's parser"}
    assert held["frozen copy that judges"] == 4 * sum(p.numel() for p in policy.parameters())
    assert set(beside(config, "mcq", policy)) == {"frozen copy that judges"}
    released = replace(config, cycle_text="bertscore", captioner="policy")
    assert set(beside(released, "t2i", policy)) == {"frozen copy that judges", "LPIPS", "BERT"}
    said: list[str] = []
    show(config_of(), lambda ranks: prompts[:4], said.append, beside=lambda policy: {"CLIP": 0, "BLIP": 1 << 20})
    text = "\n".join(said)
    assert "not in the memory: CLIP" in text and "BLIP 1.0" in text


def test_all_trainings_together(prompts: list[Prompt]) -> None:
    one = of(config_of(gpu="h100"), prompts, 8)
    lines = total(("unified", "t2i", "mcq", "oe"), [one] * 4)
    hours = estimating.hours_words(4 * one.gpu_hours)
    assert lines[0].startswith(f"all 4 trainings take about {hours} on 8 x H100 SXM (")
    assert f"{estimating.size_words(4 * one.disk.total + one.disk.model)} of disk" in lines[0], "and the merged model"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["unified", "t2i", "mcq", "oe"]
    assert total(("unified",), [one]) == []
