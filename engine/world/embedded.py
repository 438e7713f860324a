"""The embedded default: what a run uses without `--model` and `--data`, each made on first use and kept in a cache.

Making says what is made, why, and where it is kept, and shows how far it is; cut off, it goes on at the next start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..show.pulse import pulse
from ..whole_files import cache_dir, made_once
from .base_model import BaseSettings, train_base
from .corl_base import CorlBaseSettings, train_corl_base
from .digits.digit_readers import DigitCNN, train_digit_cnn
from .digits.digits_base import DigitsBaseSettings, train_digits_base
from .digits.folder import write_digits
from .digits.handwriting import FILE as DIGITS_FILE
from .disk import write_world
from .filled.filled_bases import BASE, DIGITS_BASE, train_filled_base, train_filled_digits
from .filled.sign_vq import FOLDER as FILLED
from .general import write_general
from .judge_cnn import JudgeCNN, train_judge
from .kept import Kept
from .tiny_blip import BlipSettings, save_blip, train_blip
from .vq import load_vq, round_trip
from .x2x import write_x2x

Report = Callable[[str], None]

CORL_FILES = frozenset({"corl_base.py", "scene_graph.py", "tiny_blip.py", "x2x.py"})
"""Of CoRL's embedded default alone: what else is made does not depend on them."""
HOW_FILES = frozenset({"embedded.py", "kept.py", "worlds.py"})
"""How things are made and kept, not what they are."""


def fingerprint(*parts: object, corl: bool = False) -> str:
    """Names a cache entry: by its settings and by the code and weights that it is made with."""
    digest = hashlib.blake2b(digest_size=6)
    world = Path(__file__).parent
    kinds = ("*.py", "*.safetensors", "*.json")
    files = sorted(path for kind in kinds for path in world.glob(kind) if path.name not in HOW_FILES)
    for path in files if corl else [path for path in files if path.name not in CORL_FILES]:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr(parts).encode())
    return digest.hexdigest()


# Sync-R1's ----------------------------------------------------------------------------------------------------------


def world_folder() -> Path:
    """Folder of the rendered world in UnifyBench++'s layout."""

    def write(folder: Path) -> None:
        with pulse("drawing the rendered world"):
            write_world(folder)
            write_general(folder)

    return made_once(cache_dir() / f"world-{fingerprint('world')}", write)


def tiny_base(settings: BaseSettings, report: Report | None = None) -> Path:
    """Folder of the tiny base in transformers' format; trained when the cache has none for these settings.

    Args:
        settings: of the training.
        report: takes lines for people; None: nothing is said, and no progress shown.
    """
    folder = cache_dir() / f"tiny_base-{fingerprint(asdict(settings))}"
    what = "the tiny starting model, a Janus of a million parameters that learns the rendered world from noisy labels"
    return _trained(
        folder,
        what,
        settings.steps,
        report,
        lambda draft, told, kept: train_base(settings, told, kept).save(draft),
    )


def judge_cnn() -> JudgeCNN:
    """The independent classifier, which no reward uses; trained in seconds at first use and kept."""

    def make(draft: Path) -> None:
        draft.mkdir()
        with pulse("training the classifier that scores drawings"):
            save_file(train_judge(load_vq()).state_dict(), draft / "judge.safetensors")

    folder = made_once(cache_dir() / f"judge-{fingerprint('judge')}", make)
    judge = JudgeCNN()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.requires_grad_(False).eval()


# The digits' --------------------------------------------------------------------------------------------------------


def digits_fingerprint(*parts: object) -> str:
    """As `fingerprint`: of the digits' own files, and of the rendered world's, some of which they share."""
    return fingerprint(_digest(DIGITS_FILE.parent), *parts)


def _digest(folder: Path) -> str:
    """Of a folder's own files."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def digits_folder() -> Path:
    """Folder of the digits' prompts and pictures."""
    return made_once(cache_dir() / f"digits-{digits_fingerprint('digits')}", write_digits)


def digits_base(settings: DigitsBaseSettings, report: Report | None = None) -> Path:
    """Folder of the digits' tiny base in transformers' format; arguments as of `tiny_base`."""
    folder = cache_dir() / f"digits_base-{digits_fingerprint(asdict(settings))}"
    what = "the tiny starting model, a Janus of a million parameters that learns to write from noisy labels"
    return _trained(
        folder,
        what,
        settings.steps,
        report,
        lambda draft, told, kept: train_digits_base(settings, told, kept).save(draft),
    )


def digit_cnn() -> DigitCNN:
    """The independent reader of digits, which no reward uses; trained in seconds at first use and kept."""

    def make(draft: Path) -> None:
        draft.mkdir()
        vq = load_vq(DIGITS_FILE.parent)
        with pulse("training the classifier that scores drawings"):
            reader = train_digit_cnn(lambda pictures: round_trip(vq, pictures))
            save_file(reader.state_dict(), draft / "judge.safetensors")

    folder = made_once(cache_dir() / f"digit_judge-{digits_fingerprint('judge')}", make)
    reader = DigitCNN()
    reader.load_state_dict(load_file(folder / "judge.safetensors"))
    return reader.requires_grad_(False).eval()


# The tiny Show-o's ---------------------------------------------------------------------------------------------------


def filled_fingerprint(*parts: object) -> str:
    """As `digits_fingerprint`: of the files of both worlds, whose teachers teach it, and of its own."""
    return digits_fingerprint(_digest(FILLED), *parts)


def filled_base(report: Report | None = None, settings: BaseSettings = BASE) -> Path:
    """Folder of the tiny Show-o that knows the rendered world; arguments as of `tiny_base`."""
    folder = cache_dir() / f"filled_base-{filled_fingerprint(asdict(settings))}"
    what = "the tiny starting model, a Show-o of a million parameters that learns the rendered world from noisy labels"
    return _trained(
        folder,
        what,
        settings.steps,
        report,
        lambda draft, told, kept: train_filled_base(settings, told, kept).save(draft),
    )


def filled_digits(report: Report | None = None, settings: DigitsBaseSettings = DIGITS_BASE) -> Path:
    """Folder of the tiny Show-o that knows the digits; arguments as of `tiny_base`."""
    folder = cache_dir() / f"filled_digits-{filled_fingerprint(asdict(settings))}"
    what = "the tiny starting model, a Show-o of a million parameters that learns to write from noisy labels"
    return _trained(
        folder,
        what,
        settings.steps,
        report,
        lambda draft, told, kept: train_filled_digits(settings, told, kept).save(draft),
    )


# CoRL's -------------------------------------------------------------------------------------------------------------


def prepare_x2x(seed: int = 0) -> Path:
    """Folder of the rendered world in x2x_rft_22k's columns."""

    def write(folder: Path) -> None:
        with pulse("drawing the rendered world"):
            write_x2x(folder, seed)

    return made_once(cache_dir() / f"x2x-{fingerprint(seed, corl=True)}", write)


def corl_base(report: Report | None = None, settings: CorlBaseSettings | None = None) -> Path:
    """Folder of the tiny base in transformers' format; trained in about two minutes when the cache has none.

    Args:
        report: as of `tiny_base`.
        settings: of the training.
    """
    s = settings or CorlBaseSettings()
    folder = cache_dir() / f"corl_base-{fingerprint(asdict(s), corl=True)}"
    what = (
        "the tiny starting model, a Janus of a million parameters that learns to draw and to answer from noisy labels"
    )
    return _trained(folder, what, s.steps, report, lambda draft, told, kept: train_corl_base(s, told, kept).save(draft))


def captioner_folder(report: Report | None = None, settings: BlipSettings | None = None) -> Path:
    """Folder of the tiny BLIP in transformers' format; trained in under a minute when the cache has none.

    Args:
        report, settings: as of `corl_base`.
    """
    s = settings or BlipSettings()
    folder = cache_dir() / f"tiny_blip-{fingerprint(asdict(s), corl=True)}"
    what = "the captioner, a tiny BLIP that tells the cycle reward what a drawing shows"
    return _trained(
        folder, what, s.steps, report, lambda draft, told, kept: save_blip(draft, *train_blip(s, told, kept))
    )


# Both's -------------------------------------------------------------------------------------------------------------

Told = Callable[[int, float], None]
"""(step, loss) after a step."""


def _trained(
    folder: Path, what: str, steps: int, report: Report | None, make: Callable[[Path, Told | None, Kept], object]
) -> Path:
    """`folder`, trained by `make(draft, told, kept)` on first use.

    Args:
        what: is made, for people.
        steps: of the training.
        report: as of `tiny_base`.
    """
    if folder.is_dir():
        return folder
    say = report or (lambda line: None)

    def make_it(draft: Path) -> None:
        kept = Kept(folder.with_name(f"{folder.name}.unfinished"))
        say(f"making, once, {what}")
        say(f"kept in {folder}" + (f"; going on after {kept.steps} of {steps} steps" if kept.steps else ""))
        try:
            with _told(report, steps, kept.steps) as told:
                make(draft, told, kept)
        except BaseException:
            if kept.steps:
                say(f"{kept.steps} of {steps} steps are kept; the next start goes on from there")
            raise

    made_once(folder, make_it, lambda: say(f"another process is making {what}; waiting for it"))
    folder.with_name(f"{folder.name}.unfinished").unlink(missing_ok=True)
    return folder


@contextmanager
def _told(report: Report | None, steps: int, done: int) -> Iterator[Told | None]:
    """A bar, for those who are spoken to."""
    if report is None:
        yield None
        return
    with pulse("  training", steps, done) as moved:
        yield lambda step, loss: moved(step + 1, f"loss {loss:.2f}")
