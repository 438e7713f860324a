"""Rewards and data of a user's own in recipes/sync_r1.py, as somebody brings them: what works, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import warm
from helpers import ROOT, own_process_group, rows_of, sharp_policy
from made import cache_folder
from PIL import Image
from recipe_cases import recipe_here

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.training_data import TrainingData
from syncr1.engine.errors import ConfigError, PictureError, RewardsFailed, RewardSpecError
from syncr1.engine.methods.data_checks import checked_chains
from syncr1.engine.methods.reward_names import reward_problems
from syncr1.engine.methods.sync_r1 import run
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.scorable import NEEDS, check_scorable
from syncr1.engine.settings.flags import parse
from syncr1.engine.world.embedded import prepare_x2x, world_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SMALL = ("--prompts_per_step", 2, "--num_generations", 2, "--max_completion_length", 4, "--anchor_fraction", 0)
SMALL += ("--warmup_steps", 0, "--eval_samples", 0, "--sample_steps", 0, "--beta", 0)
MINE = """
def long(*, completions, **_): return [float(len(text)) for text in completions]

def boom(**_): return [1 / 0]

calls = 0

def gives_up(*, completions, **_):
    global calls
    calls += 1
    if calls > 3:
        raise RuntimeError("no quota left")
    return [float(len(text)) for text in completions]

def turns_odd(*, completions, **_):
    global calls
    calls += 1
    return ["good"] if calls == 3 else [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("janus")
    sharp_policy().save(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = [{"prompt": f"the colour of {name}?", "segments": ["text"], "answer": "red"} for name in "abcd"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def sync_r1(place: Path, model: Path, *flags: object, data: str = "rows.jsonl") -> None:
    where = ("--model", model, "--data", place / data, "--output_dir", place / "run")
    run(parse(SyncR1Config, [str(flag) for flag in (*where, *SMALL, *flags)]))


def test_own_rewards_stand_beside_the_papers_with_a_weight_each(place: Path, model: Path) -> None:
    own = f"{place}/mine.py:long"
    sync_r1(place, model, "--max_steps", 2, "--reward_funcs", "text", own, "--reward_weights", 0.5, 2)
    for row in rows_of(place / "run"):
        assert row["reward"] == pytest.approx(0.5 * row["rewards/text/mean"] + 2 * row["rewards/long/mean"])
    with pytest.raises(SystemExit):
        sync_r1(place, model, "--reward_funcs", "text", own, "--reward_weights", 1)


def test_a_reward_that_fails_always_costs_nothing(place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As somebody starts it: one line with the place, exit code 2, and no run folder."""
    where = ("--model", model, "--data", place / "rows.jsonl", "--output_dir", place / "run")
    _, err = recipe_here(
        capsys, "sync_r1.py", *where, *SMALL, "--reward_funcs", "text", f"{place}/mine.py:boom", expected=2
    )
    (line,) = (line for line in err.splitlines() if "reward" in line)
    assert f"ZeroDivisionError: division by zero, at {place}/mine.py:4 in boom" in line and "Traceback" not in err
    assert not (place / "run").exists()


def test_one_that_gives_up_ends_the_run_with_what_was_learnt(place: Path, model: Path) -> None:
    """One trial call and two good steps; then three that fail."""
    flags = ("--max_steps", 9, "--checkpointing_steps", 0, "--reward_funcs", "text", f"{place}/mine.py:gives_up")
    with pytest.raises(RewardsFailed, match=r"step 5: reward 'gives_up' failed for everyone in 3 steps.*no quota left"):
        sync_r1(place, model, *flags)
    assert len(rows_of(place / "run")) == 5 and (place / "run" / "checkpoints" / "step_000005").is_dir()
    assert RewardsFailed.code == 2


@pytest.mark.slow
def test_a_broken_contract_ends_all_ranks_after_the_same_step(place: Path, model: Path) -> None:
    flags = ("--model", model, "--data", place / "rows.jsonl", "--output_dir", place / "run", *SMALL, "--max_steps", 5)
    own = ("--reward_funcs", "text", f"{place}/mine.py:turns_odd")
    env = warm.environment(place / "cache")
    _, err = warm.run(str(ROOT / "recipes" / "sync_r1.py"), *map(str, (*flags, *own)), env=env, ranks=2, expected=2)
    assert "expected 1 values" not in err and "expected 2 values, one per trajectory, got 1" in err
    assert "Traceback" not in err and len(rows_of(place / "run")) == 2
    assert (place / "run" / "checkpoints" / "step_000002").is_dir()


def test_a_reward_that_cannot_be_loaded_is_told_before_the_model(place: Path, model: Path) -> None:
    weightless = place / "weightless"
    weightless.mkdir()
    (weightless / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(RewardSpecError, match="has no 'short'"):
        sync_r1(place, weightless, "--reward_funcs", f"{place}/mine.py:short")


# Data -----------------------------------------------------------------------------------------------------------------


def test_questions_that_are_not_asked_are_said(place: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"a {word} square", "qa_problem": "what?", "qa_solution": "red"} for word in ("red", "blue")]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sync_r1(place, model, "--max_steps", 1, "--eval_samples", 2, data="pairs.jsonl")
    said = " ".join(capfd.readouterr().out.split())
    assert (
        "not used: column 'qa_problem': 2 questions are not asked" in said and "recipes/corl.py trains on both" in said
    )
    assert "a file or a named split has no held-out part; give one by --eval_data" in said


def test_rewards_that_can_score_nothing_are_refused(place: Path, model: Path) -> None:
    (place / "bare.jsonl").write_text('{"prompt": "say something", "segments": "text"}\n' * 2)
    with pytest.raises(ConfigError, match=r"none of identity, judge, text can score any of the 2 prompts.*an `answer`"):
        sync_r1(place, model, data="bare.jsonl")
    sync_r1(place, model, "--max_steps", 1, "--reward_funcs", f"{place}/mine.py:long", data="bare.jsonl")


def test_eval_data_makes_the_table_of_a_file(place: Path, model: Path) -> None:
    sync_r1(place, model, "--max_steps", 1, "--eval_data", place / "rows.jsonl", "--eval_samples", 2)
    assert json.loads((place / "run" / "scores.json").read_text())["after"]["qa/num_items"] == 2


def photos(place: Path, broken: int, count: int = 10) -> Path:
    rows = []
    for number in range(count):
        name = f"{number}.jpg"
        Image.effect_noise((64, 48), 50).convert("RGB").save(place / name)
        if number < broken:
            (place / name).write_bytes((place / name).read_bytes()[:400])
        rows.append({"prompt": f"what is in {number}?", "image": name, "answer": "noise"})
    (place / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_broken_photos_are_found_before_anything_is_trained(place: Path, model: Path) -> None:
    photos(place, broken=9)
    with pytest.raises(
        PictureError, match=r"9 of 10 pictures of the data cannot be read: .*0\.jpg: .*; and 4 more; repl"
    ):
        sync_r1(place, model, data="seen.jsonl")
    assert not (place / "run").exists()
    with pytest.raises(PictureError, match="1 of 10"):
        photos(place, broken=1)
        sync_r1(place, model, "--dry_run", data="seen.jsonl")


def test_a_photo_that_goes_bad_later_leaves_a_checkpoint(place: Path, model: Path) -> None:
    photos(place, broken=0, count=2)
    spoils = "from pathlib import Path\ncalls = 0\n\ndef spoils(*, completions, image, **_):\n    global calls\n"
    spoils += (
        "    calls += 1\n    [p.write_bytes(b'') for p in image if calls == 3]\n    return [1.0] * len(completions)\n"
    )
    (place / "spoils.py").write_text(spoils)
    flags = ("--max_steps", 5, "--checkpointing_steps", 0, "--reward_funcs", f"{place}/spoils.py:spoils")
    with pytest.raises(PictureError, match=r"\.jpg: cannot be read"):
        sync_r1(place, model, *flags, data="seen.jsonl")
    assert len(rows_of(place / "run")) == 2 and (place / "run" / "checkpoints" / "step_000002").is_dir()


def test_needs_are_known_of_every_built_in_reward() -> None:
    """One that is missing there would pass for a user's own, which may need anything."""
    assert {*SyncR1Config.REWARDS, *CorlConfig.REWARDS} <= NEEDS.keys()


def test_prompts_without_a_reward_are_counted() -> None:
    """Some of the prompts: said, by task and with what is missing; the judge behind an address needs no target."""
    prompts = [
        Prompt(id=str(n), task=task, text="x", segments=(kind,))
        for n, (task, kind) in enumerate([("qa", "text"), ("qa", "text"), ("t2i", "image")])
    ]
    (said,) = check_scorable(["text", "remote_judge"], prompts, "rows")
    assert said.startswith("2 of 3 prompts have no reward and teach nothing (2 of task qa): text needs a text and an")
    with pytest.raises(ConfigError, match="any of the 3 prompts of rows"):
        check_scorable(["text", "judge", "identity"], prompts, "rows")
    assert check_scorable(["text", "mine.py:f"], prompts, "rows") == []


@pytest.mark.parametrize("recipe", ["sync_r1.py", "corl.py"])
def test_the_tiny_base_refuses_photographs(place: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the base is made: no minutes are lost on it."""
    photos(place, broken=0)
    flags = ("--data", place / "seen.jsonl", "--output_dir", place / "run", "--prompts_per_step", 2)
    _, err = recipe_here(capsys, recipe, *flags, expected=2)
    assert "model: none is given, and" in err and "64x48" in err and "Janus-Pro-1B" in err and "Traceback" not in err


def test_a_copy_of_the_rendered_world_is_taken_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words, its pictures, no file that nothing reads: nothing to say, by either recipe."""
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    said: list[str] = []
    world, x2x = world_folder(), prepare_x2x()
    assert len(checked_chains(settings(data=world), world, said.append).prompts) > 1000
    TrainingData(CorlConfig(data=str(x2x), max_completion_length=16), x2x).check(said.append)
    assert said == []


def settings(**changes: Any) -> SyncR1Config:
    return SyncR1Config(**changes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("identiy",), "did you mean identity"),
        (("absent.py:f",), "no file absent.py"),
        (("mine:",), "got 'mine:'"),
        (("a.b:f", "c.d:f"), "got f twice"),
        (("text", "text"), "got text twice"),
        ((), "expected at least one"),
    ],
)
def test_names_that_cannot_be_are_refused_before_torch(names: tuple[str, ...], said: str) -> None:
    """Among settings, or by the look at the files that recipes take before they load anything."""
    try:
        problems = reward_problems("reward_funcs", names, settings(reward_funcs=names).REWARDS)
    except ConfigError as refused:
        problems = str(refused).splitlines()
    assert any(problem.startswith("reward_funcs: ") and said in problem for problem in problems), problems


def test_weights_are_those_given_or_the_papers() -> None:
    assert settings().weight_of("judge") == 0.39
    own = settings(reward_funcs=("judge", "a.b:f"), reward_weights=(3.0, 0.5))
    assert [own.weight_of(name) for name in ("judge", "a.b:f", "text")] == [3.0, 0.5, 0.0]
    assert settings(reward_funcs=("a.b:f",)).weight_of("a.b:f") == 1.0
    with pytest.raises(ConfigError, match="got 0 for all"):
        settings(reward_funcs=("a.b:f",), reward_weights=(0.0,))
