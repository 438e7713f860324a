"""Folders of runs as the run log writes them, in a second and without a model: for tests of the pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from run_records import HOSTILE, SCORES_AFTER, SCORES_BEFORE, make_group, make_metrics, make_prompt, make_rollout

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.records import Prompt
from syncr1.engine.show.runlog import RunLog
from syncr1.engine.show.scores import score_rows

ASKED = {"shape": "round", "colour": "red"}
NUM_STEPS = 30


def prompts_in(folder: Path) -> list[Prompt]:
    """A drawing with a photo, one of a concept that the model is not shown, and a question."""
    photo = make_prompt("bobo", folder)
    unseen = replace(photo, id="train/unseen", images=(), references=(photo.images[0],), concept="bobo")  # type: ignore[arg-type]
    return [replace(photo, attributes=ASKED), replace(unseen, attributes=ASKED), make_prompt("mimi", draws=False)]


def finished_run(folder: Path, name: str = "r", **settings: Any) -> Path:
    """The folder of a run of 30 steps, with samples, scores and examples."""
    config = SyncR1Config(**({"output_dir": folder / name, "max_steps": NUM_STEPS} | settings))
    prompts = prompts_in(folder)
    with RunLog(config.output_dir, config) as log:
        log.scores(before=SCORES_BEFORE)
        for step in range(config.max_steps):
            log.metrics(make_metrics(step, reward_failures=float(step == 3)))
            if step % 10 == 0:
                rollouts = [rollout for prompt in prompts for rollout in make_group(prompt)]
                log.samples(step, rollouts, {"reward": [0.5] * len(rollouts)})
        log.scores(
            before=SCORES_BEFORE,
            after=SCORES_AFTER,
            examples_before=[make_rollout(prompt, 0, text=HOSTILE) for prompt in prompts],
            examples_after=[make_rollout(prompt, 1) for prompt in prompts],
            read_before=[{"shape": "round", "colour": "blue"}, {"shape": "square", "colour": "blue"}, {}],
            read_after=[ASKED, {"shape": "round", "colour": "blue"}, {}],
        )
    return log.folder


def run_of_several(folder: Path) -> Path:
    """The folder of a run of two trainings and a merge, of which the second training was stopped."""
    config = SyncR1Config(output_dir=folder / "several", max_steps=6)
    tables = [[row._asdict() for row in score_rows(None, scores)] for scores in (SCORES_BEFORE, SCORES_AFTER)]
    base, first = {"title": "starting model", "table": tables[0]}, {"title": "both", "table": tables[1]}
    part: dict[str, Any] = {"name": "first", "title": "both", "kind": "training", "from": ["starting model"]}
    merge = {"name": "merged", "title": "merged", "kind": "merge", "from": ["both", "second"], "state": "planned"}
    later = part | {"name": "second", "title": "second", "from": ["both"], "state": "planned"}
    with RunLog(config.output_dir, config) as log:
        log.parts({"parts": [part | {"state": "running"}, later, merge], "models": {"base": base}})
        finished_run(log.folder, "first", max_steps=6)
        parts = [part | {"state": "done"}, later, merge]
        compared = {"before": "base", "after": {"drawings": "first", "answers": "first"}}
        log.parts({"parts": parts, "models": {"base": base, "first": first}} | compared, "both")
        log.scores(before=SCORES_BEFORE, after=SCORES_AFTER)
    return log.folder
