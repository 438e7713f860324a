"""A checkpoint as it is published, under the name that a user gives: the folder to load, in transformers' format.

A hub name is fetched into the hub's cache. A folder in DeepSeek's layout, or a published Show-o, is converted
once, into our own cache (`converted/`), under a name that its files' contents give: the same files in another place are
found again, and changed ones are converted anew. Of several processes one converts, and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from ..whole_files import cache_dir, locked, made_once, write_atomically
from .deepseek_files import FORMAT, SETTINGS, record_in, weight_names
from .hub_cache import fetched, settings_fetched
from .show_o_files import is_show_o, layout_of, needs_conversion, read_files

Say = Callable[[str], object]
HOME = "converted"


def local_checkpoint(name: str | Path, say: Say) -> Path:
    """The folder that holds a checkpoint in transformers' format.

    Args:
        name: of a folder, or on the hub (`org/name`, `org/name@revision`).
        say: takes lines about what takes time: what is fetched, what is converted and where it is kept.

    Raises:
        ConfigError: it cannot be had (hub_cache.py).
        CheckpointError: it is in a layout of its own and cannot be converted (convert.py).
    """
    folder = published_folder(name, say)
    return _converted(folder, str(name), say) if needs_conversion(folder) else folder


def published_folder(name: str | Path, say: Say) -> Path:
    """The folder of a checkpoint in the layout that it is published in; ConfigError where it cannot be had."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else fetched(str(name), say)


def settings_folder(name: str | Path) -> Path:
    """The folder with a checkpoint's settings and tokenizer; its weights are not fetched. ConfigError as above."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else settings_fetched(str(name))


@contextmanager
def settings_alone(name: str | Path, say: Say) -> Iterator[str | Path]:
    """What `AutoConfig` and `AutoProcessor` are to read of a checkpoint: its name, or, of one that is to be converted,
    a folder of settings that is gone afterwards. No weights are written; where they are there, their names and shapes
    are checked."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = settings_fetched(str(name), drawing=True)
    if not needs_conversion(folder):
        yield folder
        return
    from .convert import plan_of
    from .convert_plans import ours_of, write_ours

    names, plan = weight_names(folder), None
    if is_show_o(folder) or (names and all((folder / file).is_file() for file in names)):
        plan = plan_of(folder)
    kept = kept_conversion(folder)
    told = f"a run converts it once, into {cache_dir() / HOME}" if kept is None else f"its conversion is kept in {kept}"
    say(f"{name} is in {layout_of(folder)} layout: {told}")
    with tempfile.TemporaryDirectory() as draft:
        if plan is not None and is_show_o(folder):
            plan.write_settings(Path(draft))
        else:
            write_ours(folder, ours_of(folder), Path(draft))
        yield Path(draft)


def kept_conversion(folder: Path) -> Path | None:
    """The conversion of a folder in a published layout, where one is kept and neither has changed; takes no torch."""
    try:
        seen = _seen(folder, _files(folder))
        kept = seen.parent / seen.read_text().strip()
    except (OSError, CheckpointError):
        return None
    return kept if record_in(kept) is not None else None


def _files(folder: Path) -> list[Path]:
    if is_show_o(folder):
        return read_files(folder)
    return [path for file in (*weight_names(folder), *SETTINGS) if (path := folder / file).is_file()]


def _seen(folder: Path, files: list[Path]) -> Path:
    """The note that leads from these files, by place, size and time, to their conversion."""
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return cache_dir() / HOME / f".seen-{_digest([str(folder.resolve()), stamps])}"


def _converted(folder: Path, name: str, say: Say) -> Path:
    """The conversion of a folder in a published layout, made where it is not kept yet."""
    files = _files(folder)
    seen = _seen(folder, files)
    seen.parent.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        say(f"another process converts {name}: waiting for it")

    with locked(seen.with_name(f"{seen.name}.lock"), wait):
        kept = kept_conversion(folder)
        if kept is not None:
            say(f"{name} is in {layout_of(folder)} layout; its conversion is kept in {kept}")
            return kept
        made = _made(seen.parent, folder, files, name, say, wait)
        write_atomically(seen, made.name)
    return made


def _made(home: Path, folder: Path, files: list[Path], name: str, say: Say, wait: Callable[[], object]) -> Path:
    from .convert import convert, hashes_of

    size = sum(path.stat().st_size for path in files)
    say(f"{name} is in {layout_of(folder)} layout: converting it to transformers', once ({size / 1e9:.2f} GB) ...")
    hashes = hashes_of(files)
    kept = home / f"{'show_o' if is_show_o(folder) else 'janus'}-{_digest([FORMAT, hashes])}"
    if kept.is_dir() and record_in(kept) is None:
        say(f"{kept} is not as it was made: made again")
        shutil.rmtree(kept)
    made_once(kept, lambda draft: convert(folder, draft, name=name, say=say, read=hashes), wait)
    say(f"converted, kept in {kept}")
    return kept


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
