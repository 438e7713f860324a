"""TensorBoard, trackio and wandb behind one small protocol; each is imported only when it is asked for.

Nothing leaves the machine unless its owner says so: trackio logs to local files (and a Space that it makes is private),
and wandb runs offline unless `WANDB_MODE` says otherwise.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

PROJECT = "syncr1"


class Tracker(Protocol):
    """Where scalars and pictures go, beside the run's own files."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars of a step; all of them are finite."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Sends a picture from the run's folder."""

    def close(self) -> None:
        """Ends the tracker's run."""


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            self.writer.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Hugging Face's trackio: a local database, or the Space that `TRACKIO_SPACE_ID` names."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.trackio = importlib.import_module("trackio")
        private: dict[str, Any] = {}
        if "private" in inspect.signature(self.trackio.init).parameters:
            private["private"] = True
        elif os.environ.get("TRACKIO_SPACE_ID"):
            # An older trackio would make the Space public.
            raise RuntimeError("report_to trackio: this version cannot make a Space private; pip install -U trackio")
        self.trackio.init(project=PROJECT, name=folder.name, config=dict(settings), **private)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.trackio.log({name: self.trackio.Image(str(path), caption=f"step {step}")}, step=step)

    def close(self) -> None:
        self.trackio.finish()


class Wandb:
    """Weights & Biases, offline unless `WANDB_MODE` says otherwise; `wandb sync` uploads later."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.wandb = importlib.import_module("wandb")
        self.run = self.wandb.init(
            project=PROJECT,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[Trackio] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


class Trackers:
    """All trackers that `report_to` names, as one.  One that fails to start is an error, since the user asked for it;
    one that fails later is reported on stderr and left out from there on, since the run's own files hold everything."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self.active: dict[str, Tracker] = {name: TRACKERS[name](folder, settings) for name in names}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each("log", step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._each("picture", step, name, path)

    def close(self) -> None:
        self._each("close")
        self.active.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.active.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a tracker's server must not end hours of training
                print(f"{name}: {method} failed ({error}); this tracker is left out from now on", file=sys.stderr)
                del self.active[name]
