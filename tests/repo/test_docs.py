"""README, docs/ and the reference of the ops say what is true: code runs, commands parse, names and numbers exist.

What is special to the pages on data and rewards is in test_docs_data.py and test_docs_rewards.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import warm
import yaml
from helpers import end_process_group, environment
from made import cache_folder, short_base, world_folder

from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.yaml_files import to_yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "kernels/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
NAMED = re.compile(
    r"(?<![\w/.*])((?:recipes|bench|engine|kernels|docs|tests|examples)/[\w./-]*\w\.(?:py|md|yaml|json|sbatch))"
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def with_blocks(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def patches_trl(page: str) -> bool:
    """Whether its code does, which holds for the whole interpreter."""
    return "syncr1.kernels.trl" in "".join(blocks(page, "python"))


@cache
def hooks() -> ModuleType:
    """docs/hooks.py, which knows every recipe's settings."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def settings() -> dict[str, Any]:
    """Recipe -> one of its settings objects."""
    return dict(hooks().recipes())


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in with_blocks("python") if not patches_trl(page)])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "syncr1.engine.api" in "".join(blocks(page, "python")):  # trains: from a base that takes seconds to make
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
        monkeypatch.setattr("syncr1.engine.world.worlds.tiny_base", lambda *_: short_base())
    scope: dict[str, object] = {}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), scope)  # blocks build on those before them
    finally:
        end_process_group()


@pytest.mark.slow
def test_python_that_patches_trl_runs_as_it_is_printed() -> None:
    """In an interpreter of its own: nothing that the page does not import is there."""
    pytest.importorskip("trl")
    (page,) = (page for page in with_blocks("python") if patches_trl(page))
    command = [sys.executable, "-c", "\n".join(blocks(page, "python"))]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "clip_low/text" in done.stdout


# Commands -------------------------------------------------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has what the pages' commands name."""
    for folder in (
        "unifybench",
        "W0",
        "MCQ",
        "OE",
        "runs/sync_r1/checkpoints/last",
        "runs/corl/unified/checkpoints/last",
        *("geneval", "val2014", "POPE/output/coco", "WISE/WISE_legacy/data"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "runs" / "evaluate").mkdir()
    files = ("my_rewards.py", "scores.py", "aesthetics.py")  # what is in them: test_docs_rewards.py
    for name in ("prompts.jsonl", "evaluation_metadata.jsonl", "runs/evaluate/manifest.json", *files):
        (tmp_path / name).write_text("{}")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(
        ROOT / "recipes", tmp_path / "recipes", ignore=lambda _, names: [n for n in names if n.endswith(".py")]
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_a_shell_reads_the_commands_as_they_stand(page: str) -> None:
    """Parentheses without quotes, a line that goes on where nothing follows: what shlex lets pass."""
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_commands_are_marked_as_such() -> None:
    """Under another name no test would find them; inline ones stand in a block, too, or say the recipe alone."""
    assert [page for page in PAGES if blocks(page, "sh") or blocks(page, "shell") or blocks(page, "console")] == []


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_are_taken(page: str, workplace: Path) -> None:
    """Recipes by their own settings, values included; other scripts and make's targets are there."""
    makefile = text_of("Makefile")
    for words in commands(page):
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            assert words[0] == "make" and re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
            continue
        flags = words[words.index(script) + 1 :]
        assert words[0] in (".venv/bin/python", "python", "torchrun") and (ROOT / script).is_file(), words
        recipe = script.removeprefix("recipes/")
        if recipe in settings() and "--help" not in flags:
            default = ROOT / "recipes" / "corl_tiny.yaml" if recipe == "corl.py" else None
            parse(type(settings()[recipe]), flags, default_yaml=default)
        else:
            assert all(
                flag.partition("=")[0] in (ROOT / script).read_text()
                or f"    {flag.partition('=')[0][2:]}: " in (ROOT / script).read_text()  # a field of its settings
                for flag in flags
                if flag != "--help" and flag.startswith("--")
            ), words


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_files_and_flags_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    assert [name for name in NAMED.findall(text) if not (ROOT / name).exists()] == []
    known = {f"--{name}" for config in settings().values() for name in yaml.safe_load(to_yaml(config, comments=False))}
    scripts = "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
    named = {flag for code in re.findall(r"`([^`\n]+)`", text) for flag in re.findall(r"(?<!\S)--[a-z]\w+", code)}
    others = {"--no", "--max_restarts", "--tool", "--repo", "--local", "--outfile", "--decoder_alone"}
    assert [flag for flag in sorted(named - known - others) if f'"{flag}"' not in scripts] == []


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "NOTES.md"])
def test_links_lead_somewhere_in_the_repository(page: str) -> None:
    """Pages that only the built site has are dead for whoever reads these on a web page of the repository; and the
    site has a page for whatever else they link to."""
    links = re.findall(
        r"\]\((?!https?:|#|mailto:)([^)\s#]+)[^)\s]*\)", re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    )
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    if page.startswith("docs/"):
        outside = {link for link in links if link.startswith("../")}
        assert outside <= hooks().IN_THE_REPOSITORY.keys()


def test_the_readme_s_tree_has_every_room() -> None:
    tree = text_of("README.md").split("## The tree")[1].split("## Limits")[0]
    rooms = [path.name for path in (ROOT / "engine").iterdir() if (path / "__init__.py").is_file()]
    assert len(rooms) > 10 and [room for room in rooms if f" {room}/" not in tree] == []


def test_every_public_op_is_in_the_reference() -> None:
    from syncr1.kernels import api

    ops = [name for name in hooks().public_ops() if callable(getattr(api, name)) and name[0].islower()]
    assert ops and [name for name in ops if not re.search(rf"`[^`\n]*\b{name}\b", text_of("kernels/README.md"))] == []


# Numbers --------------------------------------------------------------------------------------------------------------


@cache
def score_tables() -> ModuleType:
    """bench/score_tables.py, which makes the tables from what was measured."""
    spec = importlib.util.spec_from_file_location("score_tables", ROOT / "bench" / "score_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_tables_are_what_was_measured() -> None:
    """As `python bench/score_tables.py --write` leaves them."""
    for (page, mark), table in score_tables().tables().items():
        assert score_tables().between(text_of(page), mark).group() == table, (
            f"{page}: run bench/score_tables.py --write"
        )


def test_every_held_out_task_of_a_run_is_in_the_readme() -> None:
    """Recognition and what is not trained on among them, marked where they fell or are guessed."""
    runs = json.loads((ROOT / "bench" / "results" / "ablations.json").read_text())["default"]
    known = {name.split("/")[1] for name in runs[0] if "/num_items" in name and "before" in name}
    assert known == {*score_tables().ANSWERS, *score_tables().DRAWINGS}
    table = score_tables().between(text_of("README.md"), "results").group()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if "|" in line}
    recognition = next(row for name, row in rows.items() if "recognition" in name)
    assert (
        recognition.count("**at chance**") == 2
        and "**fell**" in rows["*not trained on:* draw a caption without a concept"]
    )
    captions = [run[f"{when}/general_image/all_right/cnn"] for when in ("before", "after") for run in runs]
    assert all(after < before for before, after in zip(captions[:5], captions[5:], strict=True))


def test_changes_over_seeds_by_hand() -> None:
    """Student's interval of five changes; a fall, a score at chance and one below it are marked."""
    tables = score_tables()
    found = tables.change_of([0.5, 0.6, 0.7, 0.6, 0.6], [0.4, 0.5, 0.5, 0.5, 0.5])
    half = 2.7764451 * statistics.stdev([-0.1, -0.1, -0.2, -0.1, -0.1]) / 5**0.5
    assert (found.low, found.high) == pytest.approx((-0.12 - half, -0.12 + half))
    assert found.mark == "fell" and found.worst == pytest.approx(-0.2) and tables.signed(found.change) == "−.120"
    assert tables.change_of([0.4, 0.5, 0.6], [0.5, 0.6, 0.7]).mark == "" == tables.change_of([0.5], [0.1]).mark
    chance = [tables.change_of([0.5] * 3, after, 0.5).mark for after in ([0.45, 0.5, 0.55], [0.1, 0.2, 0.1], [0.9] * 3)]
    assert chance == ["at chance", "below chance", ""]
    assert [tables.share(value) for value in (0.0, 0.5, 1.0)] == [".000", ".500", "1.000"]


def test_the_readme_is_of_one_sitting() -> None:
    assert len(text_of("README.md").splitlines()) <= 180


# The site -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_is_built_and_needs_nobody(tmp_path: Path) -> None:
    """Strictly, so every link and anchor resolves (not with --quiet, which lets warnings pass); its pages load nothing
    from another machine."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": ".", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {Path(page).with_suffix(".html").name for page in PAGES if page.startswith("docs/")} <= pages.keys()
    loads = r"""<(?:script|img|link|iframe)[^>]+(?:src|href)=["']?(https?:)?//"""
    assert [name for name, page in pages.items() if re.search(loads, page)] == []
    assert [op for op in hooks().public_ops() if f'id="syncr1.kernels.api.{op}"' not in pages["api.html"]] == []
    for config in settings().values():
        names = yaml.safe_load(to_yaml(config, comments=False))
        assert [name for name in names if f"<code>--{name}</code>" not in pages["flags.html"]] == []


# The one run with names -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_with_names_runs(tmp_path: Path) -> None:
    """docs/models.md's command for Janus-Pro, on one rank, with a Janus of random weights and the world's folder."""
    (words,) = (words for words in commands("docs/models.md") if "--ranks_per_node" in words)
    flags = words[words.index("recipes/sync_r1.py") + 1 :]
    here = {
        "--model": str(saved_janus(tmp_path)),
        "--data": str(world_folder()),
        "--ranks_per_node": "1",
        "--prompts_per_step": "4",
    }
    flags = [here.get(before, flag) for before, flag in zip(["", *flags], flags, strict=False)]
    shorter = ["--max_steps", "1", "--eval_samples", "0", "--output_dir", str(tmp_path / "run")]
    warm.run(str(ROOT / "recipes" / "sync_r1.py"), *flags, *shorter, env=environment(cache_folder()))
    assert (tmp_path / "run" / "checkpoints" / "last" / "config.json").is_file()


def saved_janus(folder: Path) -> Path:
    from small_models import small_janus

    return small_janus(folder / "janus")
