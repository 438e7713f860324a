"""The engine from Python, in three lines; what the recipes do, without a command line.

    from syncr1.engine.api import Model, SyncR1Config, train

    result = train(SyncR1Config(max_steps=20))
    result.model().draw("draw <bobo> at the place it likes.").save("bobo.png")

Settings are those of the flags (`--help`), and so are their checks and what a run's folder holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoints.hub import problems_with_hub
from .corl.config import CorlConfig
from .errors import ConfigError
from .methods.model import Model
from .methods.sync_r1_config import SyncR1Config
from .processes.launch import unused_folder
from .records import Prompt, Rollout

__all__ = ["CorlConfig", "Model", "Prompt", "Result", "Rollout", "SyncR1Config", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run leaves."""

    folder: Path
    """The run's: report.html, metrics.jsonl, samples/, checkpoints."""
    scores: Mapping[str, Mapping[str, float]]
    """Model -> its held-out means; empty where nothing was scored."""
    models: Mapping[str, Path]
    """Name -> checkpoint, in order of making: Sync-R1 leaves `last`; CoRL one of each training, and what was merged."""

    def model(self, name: str | None = None) -> Model:
        """One of `models`, loaded; None: the last one.

        Raises:
            KeyError: the run has none of that name.
        """
        return Model.load(self.models[name or list(self.models)[-1]])


def train(config: SyncR1Config | CorlConfig) -> Result:
    """A whole run in this process, as `recipes/sync_r1.py` or `recipes/corl.py` does it with these settings.

    Args:
        config: settings; without `resume_from_checkpoint` the run gets a folder of its own, `output_dir` or a numbered
            one beside it.

    Raises:
        ConfigError, DataError, CheckpointError, …: what cannot work, see errors.py; nothing is lost.
    """
    if problems := problems_with_hub(config):  # hours of work do not wait for a hub
        raise ConfigError.of(problems)
    if config.resume_from_checkpoint is None:
        config = replace(config, output_dir=unused_folder(config.output_dir))
    if isinstance(config, CorlConfig):
        from .corl.run import run as corl

        scores = corl(config)
    else:
        from .methods.sync_r1 import run as sync_r1

        scores = sync_r1(config)
    return Result(folder=config.output_dir, scores=scores, models=models_of(config.output_dir))


def models_of(folder: Path) -> dict[str, Path]:
    """The checkpoints in a run's folder by name, in order of making."""
    own = folder / "checkpoints" / "last"
    found = {"last": own} if own.is_dir() else {}
    for below in folder.iterdir() if folder.is_dir() else ():
        for model in (below / "checkpoints" / "last", below):
            if (model / "config.json").is_file():
                found[below.name] = model
                break
    return dict(sorted(found.items(), key=lambda item: (item[1] / "config.json").stat().st_mtime))
