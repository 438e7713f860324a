"""The published settings in recipes/presets/: each loads, says something, and makes a plan with a small model."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import yaml
from made import cache_folder, short_base
from recipe_cases import recipe_here
from small_models import small_clip
from small_show_o import sharp_show_o

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.forward.objective import Objective
from syncr1.engine.learn.from_settings import objective_of, settings_of
from syncr1.engine.learn.schedule import learning_rate
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.modality import clip_of
from syncr1.engine.settings.yaml_files import from_yaml, to_yaml
from syncr1.engine.world.embedded import prepare_x2x

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "presets"
PRESETS = sorted(path.name for path in FOLDER.glob("*.yaml"))
ELSEWHERE: dict[str, list[object]] = {
    "sync_r1.py": ["--max_completion_length", 100],
    "corl.py": [
        *("--max_completion_length", 100, "--captioner", "world", "--spice_parser", "world"),
        *("--lpips_weights", "random", "--cycle_text", "spice"),
    ],
}
"""In place of what would be downloaded, and for a model of 512 positions."""


def config_type(name: str) -> type[Any]:
    return CorlConfig if name.startswith("corl") else SyncR1Config


def preset(name: str) -> Any:
    return from_yaml(config_type(name), FOLDER / name)


def test_there_are_those_that_the_documentation_names() -> None:
    page = (FOLDER.parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in page] == []
    ours = {"sync_r1_janus_pro_1b", "sync_r1_janus_pro_7b", "corl_janus_pro_1b", "t2i_r1_janus_pro_7b"}
    told = {"corl_paper", "corl_released", "sync_r1_paper", "sync_r1_released", "sync_r1_show_o", "mask_grpo"}
    assert {name.removesuffix(".yaml") for name in PRESETS} == ours | told


def test_the_two_sizes_of_sync_r1_differ_in_what_fits_alone() -> None:
    small, large = (yaml.safe_load((FOLDER / f"sync_r1_janus_pro_{size}.yaml").read_text()) for size in ("1b", "7b"))
    differ = {name for name in small | large if small.get(name) != large.get(name)}
    assert differ == {"model", "max_tokens_per_microbatch"}


def test_corl_s_preset_is_the_paper_s_and_what_fits() -> None:
    ours, paper = (yaml.safe_load((FOLDER / f"corl_{name}.yaml").read_text()) for name in ("janus_pro_1b", "paper"))
    assert {name for name in paper if ours.get(name) != paper[name]} == set()
    assert ours["data"] == "mm-vl/x2x_rft_22k" and ours["gradient_checkpointing"] is True


@pytest.mark.parametrize("name", PRESETS)
def test_where_numbers_come_from_is_said(name: str) -> None:
    """A paper's number, a commit or an issue stands in the comments, and each mark in brackets is explained."""
    comments = "\n".join(line for line in (FOLDER / name).read_text().splitlines() if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}", comments) or re.search(r"@[0-9a-f]{7}", comments)
    marks = set(re.findall(r"\[([A-Za-z0-9-]+)\]", comments))
    assert {mark for mark in marks if not re.search(rf"\[{mark}\][ ,]*(is|its|a)\b|\[{mark}\] ", comments)} == set()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short_and_every_line_is_a_setting(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert yaml.safe_load(text).keys() == {line.split(":")[0] for line in lines}
    assert f"recipes/presets/{name}" in text, "its first lines say how it is used"
    assert preset(name) != config_type(name)()


def test_what_is_published() -> None:
    """The numbers that tell the methods apart, as the learner and the loss get them."""
    released, paper = preset("sync_r1_released.yaml"), preset("sync_r1_paper.yaml")
    objective = objective_of(released, 576)
    assert (objective.credit, objective.loss_type, released.scale_rewards) == ("image_only", "luspo", "none")
    assert (objective.policy_logp, released.drawing_turn, released.top_k, released.image_top_k) == (
        "guided",
        "sync_r1",
        5,
        0,
    )
    assert (objective.beta, objective.epsilon, objective.importance_sampling_level) == (0.01, 0.2, "token")
    learner = settings_of(released)
    assert (learner.adam_beta1, learner.adam_beta2, learner.weight_decay) == (0.9, 0.999, 1e-3)
    assert learning_rate(released, 9) == 1e-6 > learning_rate(released, 49) > learning_rate(released, 50) == 0
    assert (paper.credit, paper.scale_rewards) == ("shared", "group")
    masked = preset("mask_grpo.yaml")
    assert (masked.masked_logp, masked.policy_logp, masked.cfg_weight, masked.image_steps) == (
        "step",
        "conditional",
        1,
        50,
    )
    assert clip_of(objective_of(masked, 1024), "image") == (0.1, 0.2)
    show_o, differ = preset("sync_r1_show_o.yaml"), set[str]()
    for name in fields(show_o):
        if getattr(show_o, name.name) != getattr(released, name.name):
            differ.add(name.name)
    drawing = {"image_steps", "image_noise", "masked_logp", "masked_steps"}
    assert differ == drawing | {"max_tokens_per_microbatch", "gradient_checkpointing"}
    corl = preset("corl_paper.yaml")
    assert (corl.loss_type, corl.beta, corl.refined_beta, corl.refined_num_generations) == ("grpo", 0, 0.02, 16)
    second = corl.for_stage("mcq", 1000)
    assert (second.prompts_per_step, second.learning_rate, second.max_steps) == (32, 1e-6, 32)
    t2i = preset("t2i_r1_janus_pro_7b.yaml")
    assert (t2i.num_generations, t2i.beta, t2i.learning_rate, t2i.zero_stage) == (8, 0.01, 1e-6, 3)
    assert Objective().loss_type == t2i.loss_type


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_of_each(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the rendered world, with a small model in place of a published one."""
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    recipe = "corl.py" if name.startswith("corl") else "sync_r1.py"
    elsewhere, model = ELSEWHERE[recipe], str(short_base())
    if "image_steps" in yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")):
        sharp_show_o(image_size=32).save(tmp_path / "model")
        model = str(tmp_path / "model")
        if name == "mask_grpo.yaml":
            elsewhere = [*elsewhere, "--reward_models", f"clip={small_clip(tmp_path / 'clip')}"]
    if name == "corl_janus_pro_1b.yaml":  # names its data; corl_paper.yaml goes through all of its stages
        data = str(prepare_x2x())
        names = ("--data", "--data_t2i", "--data_mcq", "--data_oe")
        elsewhere = [*elsewhere, *(word for flag in names for word in (flag, data)), "--stage", "unified"]
        elsewhere = [*elsewhere, "--captioner", "policy", "--cycle_text", "soft_jaccard"]
    flags = ["--config", FOLDER / name, "--model", model, "--output_dir", tmp_path / "run", "--dry_run"]
    out, _ = recipe_here(capsys, recipe, *flags, *elsewhere)
    block = out[out.index("settings that differ") : out.index("plan:")].splitlines()[1:-1]
    changed = yaml.safe_load("\n".join(line.strip() for line in block))
    settings = yaml.safe_load(to_yaml(config_type(name)(), comments=False)) | changed
    given = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert "it will take about" in out and "no GPU is here" in out
    own = {"model", "max_completion_length", "cycle_text", "captioner", "stage"}
    own |= {"data", "data_t2i", "data_mcq", "data_oe", "reward_models"}
    assert {key: settings[key] for key in given.keys() - own} == {key: given[key] for key in given.keys() - own}
    assert not (tmp_path / "run").exists()
