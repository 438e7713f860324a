"""Rows of the data that cannot be used: the run is refused, or trains on the others (`--bad_rows`).

What a run has left out is written into its folder (data.json). It stays out when the run is resumed, also where it has
been mended by then: the others keep their places, and the run goes on as it would have. A new run takes it up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..data.faults import Faults
from ..data.loaded import Loaded, read_whole
from ..errors import DataError
from ..settings.train_config import TrainConfig
from ..show.run_files import DATA_FILE

Say = Callable[[str], None]
MOST_SAID = 3
SKIP = "--bad_rows skip trains without such rows"
MEND = "the run that goes on has begun with them: mend them"


@dataclass(frozen=True, slots=True)
class BadRows:
    """What becomes of them in one run."""

    skip: bool = False
    """They are left out; else they end the run."""
    without: Mapping[str, str] = field(default_factory=dict)
    """`Loaded.skipped` of the run from its beginning."""
    remedy: str = SKIP
    """What an error says can be done."""

    @classmethod
    def of(cls, config: TrainConfig, resumed: Path | None) -> BadRows:
        """`resumed`: the folder of the run that goes on, which leaves out what it has left out; None: a new run."""
        if resumed is None:
            return cls(config.bad_rows == "skip")
        return cls(False, skipped_by(resumed), MEND)

    def read(self, data: object, read: Callable[..., Loaded]) -> Loaded:
        """What a loader reads, without what is left out; raises DataError as `read_whole`."""
        return read_whole(data, read, skip=self.skip, without=self.without, remedy=self.remedy)

    def settle(self, loaded: Loaded, bad: Mapping[str, str], data: object) -> None:
        """Leaves these rows out, each with what is wrong with it.

        Raises:
            DataError: where rows are not left out: the first, and how many more; or nothing would be left.
        """
        if not bad:
            return
        if not self.skip:
            faults = Faults(keep=True)
            for row, words in bad.items():
                faults.add(DataError(words), row)
            faults.raise_first(data, self.remedy)
        loaded.leave_out(bad)
        if not loaded.samples:
            raise DataError(f"{data}: no row can be used; the first: {next(iter(bad.values()))}")


def skipped_by(folder: Path) -> dict[str, str]:
    """What a run has left out, by its folder; {} for a run from before there was a choice.

    Raises:
        DataError: its data.json is not what a run writes.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        return {}
    try:
        return {str(row["row"]): str(row["why"]) for row in json.loads(path.read_text(encoding="utf-8"))["skipped"]}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path}: expected the rows that the run left out, got what cannot be read ({type(error).__name__}); put "
            "the file back as the run wrote it, or start a new run"
        ) from error


def say_skipped(skipped: Mapping[str, str], num_kept: int, say: Say) -> None:
    """How many rows are left out, and the first of them with what is wrong."""
    if not skipped:
        return
    say(f"skipped: {len(skipped)} rows that cannot be used; {num_kept} are left ({DATA_FILE} in the run's folder)")
    for words in list(skipped.values())[:MOST_SAID]:
        say(f"  skipped: {words}")
    if len(skipped) > MOST_SAID:
        say(f"  skipped: {len(skipped) - MOST_SAID} more")
