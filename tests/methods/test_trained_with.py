"""trained_with.py: a checkpoint is asked as its run asked it, unless it is said how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluate_cases import SETTINGS, few_items, generated
from helpers import sharp_policy
from made import cache_folder
from rich.console import Console

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.errors import ConfigError
from syncr1.engine.evaluate.manifest import read_manifest
from syncr1.engine.learn.from_settings import held_out_sampling
from syncr1.engine.methods.evaluation import parts_of
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.model import Model
from syncr1.engine.methods.resume import check_settings
from syncr1.engine.methods.sample import prompts_of, run_sample
from syncr1.engine.methods.sample_config import SampleConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.trained_with import (
    drawing_turn_of,
    filling_of,
    inputs_of,
    run_of,
    tells_concepts,
    trained_inputs,
    unconditional_of,
)
from syncr1.engine.policies.inputs import Inputs
from syncr1.engine.settings.train_config import TrainConfig
from syncr1.engine.settings.yaml_files import to_yaml


def left_by(run: Path, config: TrainConfig) -> str:
    """The checkpoint of a run."""
    model = run / "checkpoints" / "last"
    model.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    return str(model)


def test_a_checkpoint_is_asked_as_in_its_run(tmp_path: Path) -> None:
    turn = "Draw {prompt}: {text}"
    data = tmp_path / "data"
    real = left_by(tmp_path / "real", SyncR1Config(model="org/janus", data=data, drawing_turn=turn))
    toy = left_by(tmp_path / "toy", SyncR1Config())
    own = EvaluateConfig()
    assert drawing_turn_of(own, real) == turn and tells_concepts(own, real)
    assert drawing_turn_of(own, toy) == "none" and not tells_concepts(own, toy)
    said = EvaluateConfig(drawing_turn="t2i_r1", concept_info=False)
    assert drawing_turn_of(said, real) == "t2i_r1" and not tells_concepts(said, real)
    (tmp_path / "real" / "config.yaml").write_text("stage: refined")
    assert run_of(real) is None and drawing_turn_of(own, real) == "none" and not tells_concepts(own, real)
    of_data = SampleConfig(data=str(data), concept_info=None)
    assert tells_concepts(of_data, "org/janus") and not tells_concepts(of_data, None)


def test_a_checkpoint_is_guided_as_in_its_run(tmp_path: Path) -> None:
    """Of either method: CoRL's trainings have settings of their own."""
    runs = (SyncR1Config(unconditional="pads"), CorlConfig(unconditional="pads"), CorlConfig())
    models = [left_by(tmp_path / str(number), run) for number, run in enumerate(runs)]
    assert [unconditional_of(SampleConfig(), model) for model in models] == ["pads", "pads", "fixed"]
    assert unconditional_of(EvaluateConfig(unconditional="fixed"), models[0]) == "fixed"
    for text in ("unconditional: words", "- 1", "a: [", "\xff"):
        (tmp_path / "0" / "config.yaml").write_text(text, encoding="latin-1")
        assert unconditional_of(EvaluateConfig(), models[0]) == "fixed"
    assert unconditional_of(EvaluateConfig(), "org/janus") == unconditional_of(EvaluateConfig(), None) == "fixed"


def test_a_checkpoint_fills_images_in_as_in_its_run(tmp_path: Path) -> None:
    """In as many steps, with as much chance, of either method."""
    runs = (SyncR1Config(image_steps=50, image_noise=1.8), CorlConfig(image_steps=8))
    first, second = (left_by(tmp_path / str(number), run) for number, run in enumerate(runs))
    assert filling_of(SampleConfig(), first) == {"image_steps": 50, "image_noise": 1.8}
    assert filling_of(EvaluateConfig(image_steps=4), first) == {"image_steps": 4, "image_noise": 1.8}
    assert filling_of(EvaluateConfig(image_noise=0.0), second) == {"image_steps": 8, "image_noise": 0.0}
    for text in ("image_steps: many\nimage_noise: .nan", "image_steps: 0\nimage_noise: -1", "image_steps: true"):
        (tmp_path / "0" / "config.yaml").write_text(text)
        assert filling_of(SampleConfig(), first) == {}
    assert filling_of(SampleConfig(), "org/show-o") == filling_of(SampleConfig(), None) == {}


def test_a_checkpoint_is_given_pictures_and_prompts_as_in_its_run(tmp_path: Path) -> None:
    """A run from before there was the choice cut them at the centre; no run, and the processor is the law."""
    given = {"picture_fit": "pad", "chat_template_kwargs": ("thinking=false", "date_string=26 Jul 2024")}
    runs = (SyncR1Config(**given), CorlConfig(**given), SyncR1Config())
    models = [left_by(tmp_path / str(number), run) for number, run in enumerate(runs)]
    before, expected = Inputs("crop"), Inputs(**given)
    assert [trained_inputs(model) for model in models] == [expected, expected, Inputs()]
    assert inputs_of(SampleConfig(), models[0]) == inputs_of(EvaluateConfig(), models[1]) == expected
    said = EvaluateConfig(picture_fit="crop", chat_template_kwargs=("thinking=true",))
    assert inputs_of(said, models[0]) == Inputs("crop", ("thinking=true",))
    (tmp_path / "0" / "config.yaml").write_text("prompts_per_step: 4")
    assert trained_inputs(models[0]) == before and trained_inputs("org/janus") == trained_inputs(None) == Inputs()
    for text in ("picture_fit: stretch", "chat_template_kwargs: 3", "chat_template_kwargs: [thinking]"):
        (tmp_path / "1" / "config.yaml").write_text(text)
        assert trained_inputs(models[1]) == Inputs()


def test_a_run_from_before_the_choice_is_told_of_it() -> None:
    """It goes on with photos as its processor prepares them, which it did not begin with; the tiny base's are alike."""
    notes: list[str] = []
    for config in (SyncR1Config(), SyncR1Config(model="org/janus")):
        before = yaml.safe_load(to_yaml(config, comments=False))
        check_settings(before, config, pytest.fail)
        del before["picture_fit"]
        check_settings(before, config, notes.append)
    (note,) = notes
    assert "this run began with 'crop'" in note and "pass --picture_fit crop to go on as it began" in note


def test_every_way_to_a_model_prepares_as_its_run_did(tmp_path: Path) -> None:
    """The model from Python, sampling, and a new folder of an evaluation, which notes it."""
    where = left_by(tmp_path / "run", SyncR1Config(picture_fit="pad"))
    sharp_policy().save(Path(where))
    policy = Model.load(where, device="cpu").policy
    assert policy.picture_fit == "pad" and policy.template_kwargs == {}
    assert Model.load(where, device="cpu").policy.fit() == policy.fit()
    items = generated(
        few_items(), tmp_path / "items", replace(SETTINGS, picture_fit="pad", chat_template_kwargs=("a=1",))
    )
    assert read_manifest(items)["sampling"]["picture_fit"] == "pad"
    assert read_manifest(items)["sampling"]["chat_template_kwargs"] == ["a=1"]


def test_what_is_worth_knowing_of_a_model_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = left_by(tmp_path / "run", SyncR1Config(chat_template_kwargs=("thinking=false",)))
    sharp_policy().save(Path(where))
    Model.load(where, device="cpu")
    assert f"{where}: its chat template reads no thinking: " in capsys.readouterr().out
    (tmp_path / "run" / "config.yaml").unlink()
    Model.load(where, device="cpu")
    assert capsys.readouterr().out == ""


def test_a_processor_that_does_not_fit_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    odd = sharp_policy()
    odd.processor.image_processor.size = {"height": 48, "width": 48}
    odd.save(tmp_path / "odd")
    asked: dict[str, Any] = {"model": str(tmp_path / "odd"), "output_dir": tmp_path / "out"}
    with pytest.raises(ConfigError, match="picture_fit: expected"):
        Model.load(asked["model"], device="cpu")
    with pytest.raises(ConfigError, match="picture_fit: expected"):
        run_sample(SampleConfig(prompt=("a",), **asked))
    with pytest.raises(ConfigError, match="picture_fit: expected"):
        parts_of(EvaluateConfig(**asked), Console(quiet=True))
    assert parts_of(EvaluateConfig(picture_fit="crop", **asked), Console(quiet=True))[1].picture_fit == "crop"


def test_a_run_tells_of_concepts_where_model_and_data_are_given(tmp_path: Path) -> None:
    given = SyncR1Config(model="org/janus", data=tmp_path)
    assert given.tells_concepts and not replace(given, concept_info=False).tells_concepts
    assert not SyncR1Config().tells_concepts and SyncR1Config(concept_info=True).tells_concepts
    assert not SyncR1Config(data=tmp_path).tells_concepts and not SyncR1Config(model="org/janus").tells_concepts


def test_the_turn_reaches_every_sampler(tmp_path: Path) -> None:
    assert held_out_sampling(SyncR1Config(drawing_turn="sync_r1")).drawing_turn == "sync_r1"
    with pytest.raises(ConfigError, match=r"generate: drawing_turn: .* got \{answer\}"):
        generated(few_items(), tmp_path / "items", replace(SETTINGS, drawing_turn="{answer}"))


def test_what_is_shown_is_told_of_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    asked = SampleConfig(tasks=("rea",), num_items=1)
    (plain,), (told,) = prompts_of(asked, True), prompts_of(asked, True, concept_info=True)
    assert plain.text in told.text and told.request == plain.text and told.info and not plain.info
