"""What strangers hand in runs no code, what a run writes holds no secret, and nothing listens to the network.

Beside these: test_repo.py (no unpickling, no shell), test_checkpoints.py (`auto_map` and `trust_remote_code` in a
checkpoint), test_chat.py (the judge's key), test_model_card.py (redaction), test_pictures.py and test_sources.py
(bombs, paths that lead out of a folder).
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import ROOT, environment
from judge_server import server
from made import cache_folder, short_base
from recipe_cases import SECRETS, leaks, started
from small_emu3 import sharp_emu3
from small_models import saved, small_bert, small_blip, small_clip, small_janus, small_t5
from test_repo import calls, imports, keywords, trees
from text_models import policy as text_policy

from syncr1.engine.checkpoints.merge import merge_checkpoints
from syncr1.engine.checkpoints.safetensors_stream import MappedCheckpoint
from syncr1.engine.checkpoints.sharded import MANIFEST, shard_name, verified
from syncr1.engine.checkpoints.sharded import save as save_checkpoint
from syncr1.engine.errors import CheckpointError, ConfigError
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import load_policy
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.rewards.builtin.captioner import BlipCaptioner
from syncr1.engine.rewards.builtin.clip import ClipScorer
from syncr1.engine.rewards.builtin.perceptual import lpips_model
from syncr1.engine.rewards.builtin.spice import FactualParser
from syncr1.engine.rewards.builtin.text_similarity import BertScore

MARKER = "a_strangers_code_ran"


# The source -----------------------------------------------------------------------------------------------------------

REVIEWED = {
    "exec_module": {"engine/rewards/yours/custom.py"},
    "all_gather_object": {"engine/checkpoints/sharded.py", "engine/processes/group.py"},
    "broadcast_object_list": {"engine/show/runlog.py"},
}
"""What runs code or unpickles, and the files that were reviewed for it: a reward of the user's own, which the user
names; short results between the ranks of one job, which torch sends as pickles."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
NEVER = {
    *("os.system", "os.popen", "os.startfile", "unsafe_load", "full_load", "read_pickle", "add_safe_globals"),
    *("gather_object", "scatter_object_list", "send_object_list", "recv_object_list", "rpc_sync", "rpc_async"),
    *("extractall", "unpack_archive", "mktemp"),
}
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code", "codeop"),
    *("socketserver", "http.server", "xmlrpc", "wsgiref", "flask", "fastapi", "uvicorn", "aiohttp", "zmq", "ray"),
    *("multiprocessing.connection", "multiprocessing.managers", "telnetlib", "ftplib", "tarfile", "zipfile", "pty"),
}
READS_IN_MEMORY = {("bench/gpu_wheels.py", "zipfile"), ("engine/data/readers/tar_shards.py", "tarfile")}
"""Read texts of a wheel that pip brought, and of a data set's tar, whose pictures are read by their places; neither
unpacks anything."""
SHELLS = {
    *(
        "engine/data/decoders.py",
        "engine/show/environment.py",
        "engine/processes/beside.py",
        "engine/processes/launch.py",
        "engine/processes/nodes.py",
        "engine/rewards/yours/isolated.py",
    ),
    "kernels/triton_ops/aot.py",
    "recipes/install.py",
}
"""Files that may start programs, with a list of words each."""


@cache
def sources() -> list[tuple[str, ast.Module]]:
    return list(trees())


def all_calls() -> list[tuple[str, str, ast.Call]]:
    """(file, function as it is written, call)"""
    return [(name, function, call) for name, tree in sources() for function, call in calls(tree)]


def last_name(function: str) -> str:
    return function.rsplit(".", 1)[-1]


def test_what_runs_code_is_in_reviewed_files_alone() -> None:
    found: dict[str, set[str]] = {}
    for name, function, _ in all_calls():
        for known in {function, last_name(function)} & (NEVER | set(REVIEWED)) | {function} & BUILTINS:
            found.setdefault(known, set()).add(name)
    assert found == REVIEWED


def test_modules_that_unpickle_listen_or_unpack_are_not_imported() -> None:
    found = [
        f"{name}:{line} {module}"
        for name, tree in sources()
        for line, module in imports(tree, name)
        if {module, module.split(".")[0]} & MODULES and (name, module) not in READS_IN_MEMORY
    ]
    assert found == []


def test_programs_are_started_from_words() -> None:
    """No shell, and only where it is needed: a commit, a compiler, other machines and processes, the installer."""
    users = {name for name, tree in sources() for _, module in imports(tree, name) if module == "subprocess"}
    assert {name for name in users if not name.startswith("bench/")} <= SHELLS
    for name, function, call in all_calls():
        assert keywords(call).get("shell", "False") == "False", f"{name}:{call.lineno}"
        if function.startswith("subprocess.") and call.args:
            words = call.args[0]
            assert not isinstance(words, ast.Constant | ast.JoinedStr), f"{name}:{call.lineno}: a text, not words"


def test_arrays_and_weights_are_loaded_without_pickles() -> None:
    seen = 0
    for name, function, call in all_calls():
        given = keywords(call)
        assert given.get("allow_pickle", "False") == "False", f"{name}:{call.lineno}"
        if re.fullmatch(r"(Auto\w+|cls\.(model|processor)_class)\.from_pretrained", function):
            seen += 1
            spread = any(keyword.arg is None for keyword in call.keywords)  # see the test below
            assert given.get("trust_remote_code") == "False" or spread, f"{name}:{call.lineno} {function}"
    assert seen >= 5, "the search finds what it is for"


def test_remote_code_is_never_trusted() -> None:
    """Also where the keyword comes out of a dict."""
    values = [
        (name, ast.unparse(value))
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "trust_remote_code"
    ]
    assert values and {value for _, value in values} == {"False"}


def test_sockets_stay_on_this_machine() -> None:
    """Nothing is served; the one port that is bound is looked for on the loopback."""
    bound = [
        (name, ast.unparse(call.args[0]))
        for name, function, call in all_calls()
        if last_name(function) in ("bind", "create_server", "listen", "start_server", "serve_forever")
        and not function.startswith("inspect")
    ]
    assert all(place.startswith("('127.0.0.1'") for _, place in bound), bound
    everywhere = [
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::")
    ]
    assert everywhere == []


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_versions_with_known_holes_are_not_installed() -> None:
    """CVE-2026-24747 (torch), CVE-2026-5241 (transformers), CVE-2026-40192 (Pillow); pins are exact, none is a URL."""
    for path in (ROOT / "constraints.txt", *(ROOT / "constraints").glob("*.txt")):
        pins = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!-]+( ?;.*)?", pin) for pin in pins), pins
        pinned = {name.lower(): version(number) for name, number in (pin.split(";")[0].split("==") for pin in pins)}
        for name, floor in {"torch": (2, 10), "transformers": (5, 3), "pillow": (12, 2)}.items():
            assert pinned.get(name, floor) >= floor
        assert "://" not in "".join(pins)
    assert "git+" not in (ROOT / "pyproject.toml").read_text()


# Files from strangers -------------------------------------------------------------------------------------------------


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / MARKER
    yield path
    assert not path.exists(), "a pickle was read"


def pickled(folder: Path, marker: Path) -> Path:
    """The folder of a model, its weights replaced by pickles under every name that a loader may look for."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "model.pt", "optimizer.pt", "weights.pth")
    for name in names:
        torch.save({"weight": Runs(marker)}, folder / name)
    return folder


def emu3(folder: Path) -> Path:
    sharp_emu3().save(folder)
    return folder


def decoder(folder: Path) -> Path:
    text_policy().save(folder)
    return folder


LOADERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "janus": (small_janus, load_policy),
    "emu3": (emu3, load_policy),
    "decoder": (decoder, CausalLMPolicy.from_pretrained),
    "captioner": (small_blip, BlipCaptioner.from_pretrained),
    "bert": (small_bert, BertScore.from_pretrained),
    "clip": (small_clip, ClipScorer.from_pretrained),
    "parser": (small_t5, FactualParser.from_pretrained),
    "merge": (small_janus, MappedCheckpoint),
    "merged": (small_janus, lambda folder: merge_checkpoints(folder, [folder, folder], folder.parent / "out")),
}


@pytest.mark.parametrize("name", LOADERS)
def test_pickled_weights_are_refused(
    name: str, marker: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build, load = LOADERS[name]
    folder = tmp_path / "model"
    shutil.copytree(saved(build, tmp_path_factory), folder)
    if name != "merged":
        load(folder)
    with pytest.raises((OSError, CheckpointError, ConfigError)):
        load(pickled(folder, marker))


def test_pickled_lpips_weights_are_refused(marker: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights"):
        lpips_model("squeeze", pickled(tmp_path, marker) / "weights.pth")


def test_a_pickle_under_a_checkpoints_names_is_refused(marker: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoints", 1, {"a": torch.ones(2)}, {})
    torch.save({"a": Runs(marker)}, folder / shard_name(0))
    with pytest.raises(CheckpointError, match="damaged"):
        verified(folder)
    torch.save({"a": Runs(marker)}, folder / MANIFEST)
    with pytest.raises(CheckpointError):
        verified(folder)


def test_the_trap_for_pickles_works(tmp_path: Path) -> None:
    torch.save({"weight": Runs(tmp_path / MARKER)}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / MARKER).exists()


# Settings -------------------------------------------------------------------------------------------------------------

STARTED = """
import runpy, sys
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
except SystemExit as end:
    print(end.code, sorted({"torch", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize("recipe", ["sync_r1.py", "corl.py", "evaluate.py", "merge.py"])
def test_yaml_that_names_python_objects_is_refused_before_anything_is_loaded(
    recipe: str, marker: Path, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"seed: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    command = [sys.executable, "-c", STARTED, str(ROOT / "recipes" / recipe), "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.stdout == "2 []\n", done.stdout + done.stderr[-2000:]
    assert "not plain YAML" in done.stderr


@pytest.mark.parametrize("config", [SyncR1Config, EvaluateConfig])
@pytest.mark.parametrize(
    "url", ["https://user:{}@host/v1", "https://host/v1?key={}", "https://host/v1#{}", "https://[{}/v1"]
)
def test_addresses_that_hold_a_secret_are_refused(config: type[Any], url: str) -> None:
    """They would stand in config.yaml; the message does not repeat them."""
    for model in ("m", None):
        with pytest.raises(ConfigError, match=r"judge_key_env|correct it") as refused:
            config(judge_url=url.format("hunter2hunter2"), judge_model=model)
        assert "hunter2" not in str(refused.value)


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_secret_is_written_or_said(tmp_path: Path) -> None:
    """A run of one step with a judge that needs a key: log, settings, samples, report, card and checkpoints."""
    base, out = short_base(), tmp_path / "run"
    small = [
        "--model",
        base,
        "--output_dir",
        out,
        "--max_steps",
        1,
        "--eval_samples",
        0,
        "--prompts_per_step",
        2,
        "--num_generations",
        2,
        "--judge_url",
        "{url}",
        "--judge_model",
        "none",
        "--judge_key_env",
        "JUDGE_KEY",
        "--reward_timeout",
        20,
        "--sample_steps",
        1,
    ]
    cache_dir = cache_folder()
    with server(lambda request: (200, "[50, 50]")) as url:
        said, _ = started(cache_dir, "sync_r1.py", *(url if flag == "{url}" else flag for flag in small))
    assert leaks(said.encode()) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "report.html", "README.md", "config.json"} <= names
    assert {path.name: leaks(path.read_bytes()) for path in files if leaks(path.read_bytes())} == {}
    assert "JUDGE_KEY" in (out / "config.yaml").read_text(), (
        "the variable's name is kept, so that a run can be repeated"
    )


@pytest.mark.slow
def test_no_secret_in_a_dry_run_of_corl(tmp_path: Path) -> None:
    """Sync-R1's is that of test_plan.py."""
    flags = ["--dry_run", "--output_dir", tmp_path / "run", "--judge_key_env", "JUDGE_KEY"]
    said, _ = started(cache_folder(), "corl.py", *flags)
    assert "output_dir" in said and leaks(said.encode()) == []


def test_the_search_for_secrets_finds_one() -> None:
    assert leaks(b"x" + SECRETS["WANDB_API_KEY"].encode()) == ["WANDB_API_KEY"]


def test_no_flag_takes_a_secret() -> None:
    """Command lines are seen by every user of a machine, and stand in environment.json."""
    from syncr1.engine.corl.config import CorlConfig
    from syncr1.engine.settings.schema import settings_of

    secret = re.compile(r"(^|_)(api_key|key|token|secret|password|credential)$")
    names = {s.name for config in (SyncR1Config, CorlConfig, EvaluateConfig) for s in settings_of(config)}
    assert len(names) > 100 and [name for name in names if secret.search(name)] == []
    assert os.environ.get("JUDGE_KEY") is None
