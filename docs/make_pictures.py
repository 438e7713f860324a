"""Makes the pictures of a run that README.md and docs/index.md show, from the run's folder, into docs/pictures:

python docs/make_pictures.py runs/sync_r1                 before_after.png, samples.png, and report.png where there is
                                                          a Chromium to show the page
python docs/make_pictures.py runs/sync_r1 --rows 0 1 3 5  other rows of the sheet of samples

The four requests of before_after.png are the first whose drawing shows all that was asked after training and did not
before: what the page says under the picture. What a run got wrong is in its report.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from syncr1.engine.pictures import load_pictures
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.show.report import write_report
from syncr1.engine.show.run_files import read_run
from syncr1.engine.show.sheets import FRAME, before_after_sheet

PICTURES = Path(__file__).with_name("pictures")
NUM_EXAMPLES = 4
SIZE = 32
"""Side of the rendered world's pictures."""
WINDOW = (1280, 1900)
"""Of the browser: the head of the page, its story and the first cards."""


def examples(run: Path) -> Image.Image:
    """Requests that were drawn wrong before and right after."""
    learnt = [row for row in read_run(run).examples if not _right(row, "before") and _right(row, "after")]
    if len(learnt) < NUM_EXAMPLES:
        raise SystemExit(
            f"make_pictures.py: expected {NUM_EXAMPLES} requests that got right, got {len(learnt)} in {run}"
        )
    chosen = learnt[:NUM_EXAMPLES]
    return before_after_sheet(*([_rollout(run, row, when) for row in chosen] for when in ("before", "after")))


def _right(row: Mapping[str, Any], when: str) -> bool:
    """Whether a drawing shows all that was asked."""
    return bool(row["asked"]) and row[f"{when}_image"] is not None and row[f"{when}_shows"] == row["asked"]


def _rollout(run: Path, row: Mapping[str, Any], when: str) -> Rollout:
    """What a line of examples.jsonl tells of, as the sheet takes it."""
    photo = () if row["photo"] is None else (run / row["photo"],)
    prompt = Prompt(id=row["id"], task=row["task"], text=row["prompt"], answer=row["answer"], references=photo)
    image = load_pictures([run / row[f"{when}_image"]], SIZE)[0]
    nothing = torch.zeros(0, dtype=torch.int64)
    text = row[f"{when}_text"]
    return Rollout(
        prompt=prompt, member=0, prompt_tokens=nothing, prompt_image=None, segments=(), text=text, image=image
    )


def rows_of(sheet: Image.Image, chosen: Sequence[int]) -> Image.Image:
    """Some rows of a sheet of samples, below its title; rows are parted by lines as wide as the sheet."""
    frame = tuple(int(FRAME[i : i + 2], 16) for i in (1, 3, 5))
    probes = [sheet.width // 8 * i for i in range(1, 8)]
    lines = [y for y in range(sheet.height) if all(sheet.getpixel((x, y)) == frame for x in probes)]
    bounds = list(zip(lines, [*lines[1:], sheet.height], strict=True))
    if not bounds or max(chosen) >= len(bounds):
        raise SystemExit(f"make_pictures.py: expected rows below {len(bounds)}, got {list(chosen)}")
    parts = [sheet.crop((0, top, sheet.width, bottom)) for top, bottom in (bounds[row] for row in chosen)]
    picture = Image.new("RGB", (sheet.width, lines[0] + sum(part.height for part in parts)), "white")
    picture.paste(sheet.crop((0, 0, sheet.width, lines[0])), (0, 0))
    y = lines[0]
    for part in parts:
        picture.paste(part, (0, y))
        y += part.height
    return picture


def screenshot(page: Path, picture: Path) -> bool:
    """The page as a browser shows it; False where there is no browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
        command = [browser, *flags, size, f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(picture, optimize=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1, 3, 8], help="of the sheet of samples, from 0")
    parser.add_argument("--output", type=Path, default=PICTURES)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    examples(asked.run).save(asked.output / "before_after.png", optimize=True)
    sheets = read_run(asked.run).sheets
    if sheets:
        rows_of(Image.open(sheets[-1]).convert("RGB"), asked.rows).save(asked.output / "samples.png", optimize=True)
    if not screenshot(write_report(asked.run), asked.output / "report.png"):
        print("make_pictures.py: no Chromium here: report.png is not made")
    for path in sorted(asked.output.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
