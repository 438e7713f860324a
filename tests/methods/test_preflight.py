"""What is looked at before torch is loaded: what passes, and what the table of mistakes has no room for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deepseek_janus import Sizes, config_of
from hub_files import HubFiles, hub_files
from made import short_base, world_folder
from mistake import LLAMA
from mistakes import REWARD, model, text
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from syncr1.engine.checkpoints import hub_cache
from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.needs import reward_models
from syncr1.engine.data.prompts import load_anchors, load_training_prompts
from syncr1.engine.errors import kind_of
from syncr1.engine.methods.crash import report_to
from syncr1.engine.methods.data_names import EMBEDDED, data_problems
from syncr1.engine.methods.hub_names import Wanted, look_up
from syncr1.engine.methods.mistyped import distance, mistyped_run
from syncr1.engine.methods.model_files import (
    UNIFIED,
    folder_problems,
    num_weights,
    positions,
    settings_in,
    text_decoders,
)
from syncr1.engine.methods.preflight import (
    FILLED_IN,
    NEEDED,
    TOY_POSITIONS,
    check_weights,
    filling_problems,
    space_needed,
    turn_problems,
    version_problems,
    written_to,
)
from syncr1.engine.methods.reward_names import reward_problems
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import KNOWN, load_policy

ROOT = Path(__file__).resolve().parents[2]


# What passes ----------------------------------------------------------------------------------------------------------


def test_a_saved_model_has_no_problems() -> None:
    assert folder_problems("model", short_base(), trained=True) == []
    policy = load_policy(short_base())
    assert num_weights(short_base()) == sum(w.numel() for w in policy.model.state_dict().values())
    assert policy.max_positions == TOY_POSITIONS == positions(dict(settings_in(short_base() / "config.json")))
    config = SyncR1Config(model=str(short_base()))
    assert space_needed(config, short_base()) == 16 * num_weights(short_base())


def test_versions_are_those_of_the_project() -> None:
    """Of this environment, none is too old; and the numbers are pyproject.toml's."""
    import tomllib

    assert version_problems() == []
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    given = {line.partition(">=")[0]: line.partition(">=")[2] for line in wanted}
    assert {name: ".".join(map(str, numbers)) for name, numbers in NEEDED.items()} == {
        name: given[name] for name in NEEDED
    }


def test_an_old_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.1+cpu" if name == "torch" else "99.0")
    (told,) = version_problems()
    assert told.startswith("torch: expected at least 2.10, got 2.9.1+cpu; ")


def test_models_that_draw_may_have_a_drawing_turn(tmp_path: Path) -> None:
    """Each of them; transformers has Emu3 among its text decoders as well."""
    config = SyncR1Config(drawing_turn="sync_r1")
    for kind in (*UNIFIED, "llama"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert len(turn_problems(config, tmp_path)) == (kind == "llama")


def test_settings_of_masked_order_are_for_models_that_fill_images_in(tmp_path: Path) -> None:
    """And the other way round; nothing is said of a model whose kind is not known yet."""
    config, draws = SyncR1Config(masked_steps=2, image_steps=8), "draws one token after another"
    for kind, words in {"janus": draws, "emu3": draws, "llama": "draws no images", "show_o": ""}.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        told = filling_problems(config, tmp_path)
        assert len(told) == 2 * bool(words) and all(words in line and str(tmp_path) in line for line in told)
        assert filling_problems(SyncR1Config(), tmp_path) == []
        assert len(filling_problems(SyncR1Config(unconditional="pads"), tmp_path)) == (not words)
    assert len(filling_problems(config, None)) == 2
    assert filling_problems(replace(config, model="org/name"), None) == []
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Showo"}))
    assert filling_problems(config, tmp_path) == []


def test_kinds_of_models_are_those_that_are_loaded() -> None:
    assert set(UNIFIED) == KNOWN.keys()
    assert set(FILLED_IN) == {kind for kind, policy in KNOWN.items() if policy.decoding_order == "masked"}
    assert text_decoders() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(UNIFIED)


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("r.py:good", REWARD),
        ("verl@r.py:good", REWARD),
        ("isolated@verl@r.py:good", REWARD),
        ("r.py:made()", f"{REWARD}\n\ndef made():\n    return good\n"),
        ("r.py:Thing.judge", "class Thing:\n    judge = staticmethod(len)\n"),
        ("r.py:alias", f"{REWARD}\nalias = good\n"),
        ("r.py:join", "from os.path import join\n"),
        ("r.py:late", "try:\n    import no_such_package\nexcept ImportError:\n    late = len\n"),
        ("r.py:written", "globals()['written'] = len\n"),
        ("r.py:star", "from os.path import *\n"),
        ("r.py:beside", "from helper import beside\n"),
        ("json:dumps", ""),
        ("os.path:join", ""),
    ],
)
def test_rewards_that_load_are_let_pass(
    spec: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text(r__py=source, helper__py="beside = len\n")(tmp_path)
    assert reward_problems("reward_funcs", [spec], ("accuracy",)) == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "d", "unify", "org/name", "org/name@main:config"])
def test_data_of_every_form_are_let_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text(rows__jsonl='{"prompt": "a"}\n', d___train__jsonl="{}", unify___concept___x="")(tmp_path)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "rows.parquet")
    assert data_problems(CorlConfig(data=name, prompts_per_step=1)) == []


def test_the_world_has_the_prompts_that_are_told() -> None:
    world = world_folder()
    assert (len(load_training_prompts(world)), len(load_anchors(world))) == EMBEDDED["rendered"]
    most = SyncR1Config(prompts_per_step=4096, anchor_fraction=0.125)
    assert data_problems(most) == [] != data_problems(SyncR1Config(prompts_per_step=4200, anchor_fraction=0.125))


def test_what_lies_at_a_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("gone", tmp_path / "link")
    told = {name: kind_of(tmp_path / name) for name in ("", "file", "pipe", "link", "nothing", "file/below", "x" * 300)}
    assert list(told.values())[:5] == [
        "a folder",
        "a file",
        "a pipe",
        "a link to what is not there",
        "which is not there",
    ]
    assert "ot a directory" in told["file/below"] and "too long" in told["x" * 300]
    assert kind_of("/dev/null") == "a device" and kind_of("\0") == "which is not there"


def test_a_run_that_is_beside_another_is_written_where_it_can_be(tmp_path: Path) -> None:
    """A new run gets a numbered folder, so that it is the one above which has to be writable; a resumed one goes on."""
    text(run___config__yaml="seed: 0\n")(tmp_path)
    new = SyncR1Config(output_dir=tmp_path / "run")
    assert written_to(new) == tmp_path / "run-2"
    assert written_to(replace(new, resume_from_checkpoint="latest")) == tmp_path / "run"


def test_a_fault_is_reported_where_the_project_came_from() -> None:
    assert report_to().startswith(("at https://", "where you got syncr1 from"))


# Names of runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "there", "is_slip"),
    [
        ("runs/snyc_r1", "runs/sync_r1", True),
        ("runs/sync_rl", "runs/sync_r1", True),
        ("run/sync_r1", "runs/sync_r1", True),
        ("runs/seed_2", "runs/seed_1", False),
        ("runs/lr1e-5", "runs/lr3e-5", False),
        ("runs/arm-b", "runs/arm-a", False),
        ("runs/dapo", "runs/grpo", False),
        ("runs/sync_r1_long", "runs/sync_r1", False),
    ],
)
def test_a_slip_is_told_from_names_in_a_row(
    wanted: str, there: str, is_slip: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text(**{f"{there.replace('/', '___')}___checkpoints___latest": "step_000001"})(tmp_path)
    config = SyncR1Config(output_dir=tmp_path / wanted, resume_from_checkpoint="latest")
    told = mistyped_run(config)
    assert (len(told) == 1 and f"did you mean {tmp_path / there}?" in told[0]) is is_slip, told
    assert is_slip or "a new one begins" in capsys.readouterr().out


def test_a_run_that_is_there_is_no_slip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is a folder that was made for it, one with a number behind, or a start that resumes nothing."""
    text(sync___checkpoints___latest="", snyc___x="", snic_2___x="")(tmp_path)
    (tmp_path / "snic-2" / "checkpoints").mkdir(parents=True)
    (tmp_path / "snic-2" / "checkpoints" / "latest").write_text("")
    for name in ("sync", "snyc", "snic"):
        assert mistyped_run(SyncR1Config(output_dir=tmp_path / name, resume_from_checkpoint="latest")) == []
    assert mistyped_run(SyncR1Config(output_dir=tmp_path / "synk")) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("a", "b", "apart"), [("ab", "ab", 0), ("ab", "ba", 1), ("abc", "ac", 1), ("", "ab", 2), ("kitten", "sitting", 3)]
)
def test_distance(a: str, b: str, apart: int) -> None:
    assert distance(a, b) == distance(b, a) == apart


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[HubFiles]:
    with hub_files() as server:
        yield server


@pytest.fixture
def hub(server: HubFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubFiles:
    """What the hub answers about repositories, on this machine."""
    server.use(monkeypatch, tmp_path / "hub")
    config, words = {"config.json": json.dumps(LLAMA).encode()}, {"tokenizer.json": b"{}"}
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    weights = {"model.safetensors": bytes(3 << 20)}
    flow = {"config.json": json.dumps({"model_type": "multi_modality", "vision_gen_enc_config": {}}).encode()}
    files = {"preprocessor_config.json": b"{}", "tokenizer_config.json": b"{}", **words}
    theirs = json.dumps(config_of(Sizes())).encode()
    server.repositories |= {
        "org/whole": {**config, **words, **weights},
        "org/pickled": {**config, **words, "pytorch_model.bin": b"12345"},
        "org/gated": {**config, **words, **weights},
        "org/nested": {"model/config.json": b"{}", **weights},
        "org/wordless": {**config, **weights},
        "org/holes": {**config, **words, "model.safetensors.index.json": index, "model-1.safetensors": b""},
        "org/strange": {**words, **weights, "config.json": b'{"model_type": "t5"}'},
        "org/theirs": {**files, "config.json": theirs, "pytorch_model.bin": bytes(2 << 20)},
        "org/flow": {**flow, **files, "pytorch_model.bin": b"12345"},
    }
    server.gated.add("org/gated")
    return server


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/pickled", "model: expected safetensors, got org/pickled with pytorch_model.bin; "),
        ("org/gated", "org/gated: hub: expected access to a gated repository"),
        ("org/nothing", "org/nothing: hub: expected a repository's name"),
        ("org/whole@v9", "org/whole@v9: hub: expected a branch, tag or commit of the repository"),
        ("org/nested", "expected a config.json, got org/nested without; its subfolder model has one"),
        ("org/wordless", "expected a tokenizer beside the weights (tokenizer.json), got none in org/wordless"),
        ("org/holes", "expected the shards that its index names, got org/holes without 1 of them (model-2"),
        ("org/strange", "got model_type 't5' in org/strange"),
        ("org/flow", "expected Janus or Janus-Pro, got org/flow, JanusFlow"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_says_is_a_line(name: str, words: str) -> None:
    (told,), _ = look_up([Wanted("model", name)])
    assert words in told and "\n" not in told and "; " in told


@pytest.mark.usefixtures("hub")
def test_what_must_be_downloaded_is_listed() -> None:
    problems, (download,) = look_up([Wanted("model", "org/whole")])
    assert problems == [] and download.num_bytes == (3 << 20) + len(json.dumps(LLAMA)) + 2


def test_a_hub_that_fails_and_a_disk_that_is_full(hub: HubFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        (told,), _ = look_up([Wanted("model", "org/whole")])
        assert "of free space for org/whole" in told
        room = usage._replace(free=(3 << 20) + 2000)
        patch.setattr(shutil, "disk_usage", lambda path: room)
        assert look_up([Wanted("model", "org/whole")])[0] == []
        (told,), _ = look_up([Wanted("model", "org/theirs")])
        assert "of free space for org/theirs and org/theirs in transformers' format, got" in told, "it is kept twice"
        if Path("/dev/shm").is_dir():
            patch.setenv("SYNCR1_CACHE", "/dev/shm")
            assert look_up([Wanted("model", "org/theirs")])[0] == [], "there is room for each on its disk"
    hub.broken.add("org/whole")
    (told,), _ = look_up([Wanted("model", "org/whole")])
    assert "org/whole: hub: expected" in told and "\n" not in told


def test_half_of_a_download_is_told_where_there_is_no_network(hub: HubFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_up([Wanted("model", "org/whole")])[1], "its settings are in the cache now, and its weights are not"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (told,), _ = look_up([Wanted("model", "org/whole")])
    assert "a download that was cut off (model.safetensors is missing)" in told and "`hf download org/whole`" in told
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (told,), _ = look_up([Wanted("model", "org/whole@main")])
    assert "does not answer" in told and "`hf download org/whole --revision main`" in told


def test_what_is_in_the_cache_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And is then not asked for in this process, which would take a minute."""
    for name in hub_cache._OFFLINE:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    model()(snapshots)
    (snapshots / "m").rename(snapshots / "0")
    assert look_up([Wanted("model", "org/name")]) == ([], [])
    assert hub_cache.is_offline()
    (told,), _ = look_up([Wanted("model", "org/other")])
    assert "org/other" in told and "offline" in told


# Models of rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, ["captioner", "spice_parser"]),
        ({"cycle_text": "bertscore"}, ["captioner", "bert"]),
        ({"captioner": "policy", "spice_parser": "world"}, []),
        ({"cycle_text": "none"}, []),
        ({"reward_funcs": ("clip_text", "accuracy")}, ["clip"]),
        ({"reward_funcs": ("accuracy",)}, []),
    ],
)
def test_only_models_that_are_asked_are_wanted(changed: dict[str, object], wanted: list[str]) -> None:
    assert [one.setting for one in reward_models(CorlConfig(**changed))] == wanted  # type: ignore[arg-type]


def test_half_a_checkpoint_is_found_in_each_of_its_files(tmp_path: Path) -> None:
    model(weights="whole")(tmp_path)
    (tmp_path / "m" / "tokenizer_config.json").write_text("{")
    assert len(folder_problems("model", tmp_path / "m", trained=True)) == 1


@pytest.mark.usefixtures("hub")
def test_what_is_merged_is_looked_at_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names on the hub as folders are: JanusFlow, an index with holes, a model of another kind than the others."""
    for name, words in (
        ("org/flow", "merge_models org/flow: expected Janus or Janus-Pro, got org/flow, JanusFlow"),
        ("org/holes", "merge_base: expected the shards that its index names, got org/holes without 1"),
    ):
        (told,), _ = look_up([Wanted(words.partition(":")[0], name)])
        assert told.startswith(words)
    assert look_up([Wanted("models org/strange", "org/strange")])[0] == [], (
        "whatever it is, it may be merged with its like"
    )
    with pytest.raises(SystemExit) as ended:
        check_weights({"base": "org/whole", "models org/strange": "org/strange"})
    assert ended.value.code == 2
    assert "got base llama, models org/strange t5; name those of one base" in capsys.readouterr().err
    check_weights({"base": "org/whole", "models org/whole": "org/whole"})
    check_weights({"compare org/whole": "org/whole", "compare org/strange": "org/strange"})
