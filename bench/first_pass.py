"""What the pass over the data before the first step takes: pictures opened for the first time, and again; lengths.

    python bench/first_pass.py                              10,000 photographs of 384 x 384 as JPEG, 100,000 rows
    python bench/first_pass.py --pictures 2000 --form png

Photographs are cut from those that scikit-image ships, and written anew each time. CPU seconds are those of this
process and of the processes that it starts: what a machine of one core would take, whatever else this one does. The
rows of the cached pass are as many names (hard links) of the same pictures, noted as if they had been opened.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
from PIL import Image

from syncr1.engine.data.decoders import num_cores
from syncr1.engine.data.faults import STRICT
from syncr1.engine.data.loaded import load_chains
from syncr1.engine.data.opened import _key, broken_pictures, pictures_of
from syncr1.engine.data.seen import Seen
from syncr1.engine.methods.first_pass import unusable_rows
from syncr1.engine.world.worlds import WORLDS


def write_photographs(folder: Path, count: int, side: int, form: str) -> None:
    """`count` of them, each another piece of a photograph."""
    from skimage import data

    sources = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee", "chelsea")]
    random = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        width = int(random.integers(200, min(source.size)))
        left, top = (int(random.integers(0, size - width + 1)) for size in source.size)
        piece = source.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + width, top + width))
        piece.save(folder / f"{number}.{form}", **({"quality": 90} if form == "jpg" else {}))


def write_rows(path: Path, names: list[str]) -> None:
    with path.open("w") as file:
        for number, name in enumerate(names):
            row = {"prompt": f"what is number {number} of these?", "answer": "a cup", "image": name}
            file.write(json.dumps(row) + "\n")


@contextmanager
def timed(what: str, count: int) -> Iterator[None]:
    """Prints what the block took."""
    wall, before = time.perf_counter(), os.times()
    yield
    wall, after = time.perf_counter() - wall, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    print(f"{what:58} {wall:8.2f} s  {cpu:8.2f} CPU s  {cpu / count * 10_000:8.2f} CPU s per 10,000", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=384)
    parser.add_argument("--form", choices=("jpg", "png"), default="jpg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["SYNCR1_CACHE"] = f"{name}/cache"
        folder, count = Path(name).resolve(), args.pictures
        write_photographs(folder, count, args.side, args.form)
        size = sum(path.stat().st_size for path in folder.glob(f"*.{args.form}")) / count
        print(
            f"{count} {args.form} of {args.side} x {args.side}, {size / 1024:.0f} KiB each; {num_cores()} cores",
            flush=True,
        )
        files = [folder / f"{number}.{args.form}" for number in range(count)]
        with timed("the first pass over the pictures", count):
            assert not broken_pictures(files, seen=Seen("a"))
        with timed("the pass again", count):
            assert not broken_pictures(files, seen=Seen("a"))
        names = [f"{number}-of-all.{args.form}" for number in range(args.rows)]
        for number, link in enumerate(names):
            os.link(files[number % count], folder / link)
        write_rows(folder / "train.jsonl", names)
        with timed(f"reading {args.rows} rows", args.rows):
            loaded = load_chains(folder / "train.jsonl", scored=False, faults=STRICT)
        refs = pictures_of(loaded.prompts)
        Seen("b").add(_key(ref) for ref in refs)
        with timed(f"a cached pass over the pictures of {args.rows} rows", args.rows):
            assert not broken_pictures(refs, seen=Seen("b"))
        policy = WORLDS["rendered"].untrained()
        with timed(f"the lengths of {args.rows} prompts, the tiny base's tokenizer", args.rows):
            assert not unusable_rows(policy, loaded.prompts, "b", "none", 16)
        with timed("the lengths again", args.rows):
            assert not unusable_rows(policy, loaded.prompts, "b", "none", 16)


if __name__ == "__main__":
    main()
