"""The rendered world in the columns of x2x_rft_22k, CoRL's first-stage data, so that the real set can stand in for it.

```
<root>/ x2x.json  train.jsonl  test.jsonl  images/{train,test}_<k>.png
```
Each line of a jsonl file holds

prompt        a caption that asks for a look
real_image    a photo of that look, relative to the folder
qa_problem    a question about that photo; a multiple-choice one goes on with lines "A. red", "B. green", …
qa_solution   "<answer>B</answer>" or "<answer>red</answer>"
qa_type       MC or OE, in turn
attributes    ours: what the photo shows, for scores that read attributes

Test rows show held-out looks in held-out wordings, as in `items.py`.
Source: the columns are those of mm-vl/x2x_rft_22k as ULM-R1's trainer reads them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from PIL import Image

from .attributes import ATTRIBUTES, TRAIN_LOOKS, VALUES, Look
from .items import TEST_LOOKS, pick
from .render import Picture, render
from .texts import ATTRIBUTE_QUESTIONS, PROMPTS, Split, fill

VERSION: Final = 1
"""Raise whenever what is written changes, so that old folders are replaced."""
STAMP: Final = "x2x.json"
LETTERS: Final = "ABCD"
NUM_ROWS: Final[dict[Split, int]] = {"train": 500, "test": 200}
_SALT: Final[dict[Split, int]] = {"train": 0x78327830, "test": 0x78327831}
_CAPTIONS: Final = ("explicit", "explicit_dense")

QAType = Literal["MC", "OE"]


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a photo: `options` are empty unless it is multiple choice; `solution` is a letter then."""

    text: str
    solution: str
    attribute: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Row:
    """One sample before it is written; `photo` is uint8 `[32, 32, 3]`."""

    look: Look
    photo: Picture
    caption: str
    question: Question
    qa_type: QAType


def ask(rng: np.random.Generator, look: Look, split: Split, qa_type: QAType, attribute: str | None = None) -> Question:
    """A question about one attribute of `look`; multiple choice offers up to four values, the right one among them.

    Options keep the order of `VALUES`: to find a letter in a random order takes the tiny model longer than all the rest
    (after 300 steps that teach it to see and to say every attribute it still guesses: .28, measured).
    """
    name = attribute or pick(rng, ATTRIBUTES)
    wording = fill(pick(rng, ATTRIBUTE_QUESTIONS[name][split]))
    truth = str(getattr(look, name))
    if qa_type == "OE":
        return Question(wording, truth, name)
    wrong = [value for value in VALUES[name] if value != truth]
    offered = {truth, *(wrong[int(i)] for i in rng.permutation(len(wrong))[: len(LETTERS) - 1])}
    options = tuple(value for value in VALUES[name] if value in offered)
    lines = [wording, *(f"{letter}. {value}" for letter, value in zip(LETTERS, options, strict=False))]
    return Question("\n".join(lines), LETTERS[options.index(truth)], name, options)


def caption_of(rng: np.random.Generator, look: Look, split: Split) -> str:
    """A drawing prompt that spells `look` out."""
    return fill(pick(rng, PROMPTS[pick(rng, _CAPTIONS)][split]), look=look)


def x2x_rows(split: Split, *, seed: int = 0, num_rows: int | None = None) -> list[Row]:
    """The samples of a split: looks and attributes take turns, types alternate; same arguments, same rows."""
    rng = np.random.default_rng([seed, _SALT[split]])
    looks = TRAIN_LOOKS if split == "train" else TEST_LOOKS
    rows: list[Row] = []
    order: list[int] = []
    for index in range(NUM_ROWS[split] if num_rows is None else num_rows):
        order = order or [int(i) for i in rng.permutation(len(looks))]
        look = looks[order.pop()]
        qa_type: QAType = "OE" if index % 2 else "MC"
        question = ask(rng, look, split, qa_type, ATTRIBUTES[index // 2 % len(ATTRIBUTES)])
        rows.append(Row(look, photograph(rng, look), caption_of(rng, look, split), question, qa_type))
    return rows


def photograph(rng: np.random.Generator, look: Look) -> Picture:
    """A photo from straight ahead: light, tint and noise as `render` varies them, but no shift and no scale.

    A drawing is compared with it, and likeness sees two pixels of shift sooner than a wrong shape: within groups of
    drawings, 1 - LPIPS (alex, random weights, 64 px) correlates .02 with a right shape on shifted photos and .12 to .30
    on these, .76 and .80 with all attributes (two bases, 32 groups of 8).
    """
    gain = rng.uniform(0.88, 1.12) * rng.uniform(0.95, 1.05, size=3)
    picture = render(look).astype(np.float64) * gain
    return np.clip(np.rint(picture + rng.normal(0.0, rng.uniform(0.0, 6.0), size=picture.shape)), 0, 255).astype(
        np.uint8
    )


def write_x2x(root: str | Path, seed: int = 0) -> Path:
    """Write the data set below `root`, unless `root/x2x.json` says that this version and seed lie there already.

    Args:
        root: a folder; created when missing. One that holds other files but no stamp is refused.
        seed: of looks, photos and wordings.

    Returns:
        `root` as a Path.

    Raises:
        FileExistsError: `root` holds something that this function did not write.
    """
    root = Path(root)
    stamp = {"x2x": "syncr1", "version": VERSION, "seed": seed, "rows": dict(NUM_ROWS)}
    if (root / STAMP).is_file():
        if json.loads((root / STAMP).read_text(encoding="utf-8")) == stamp:
            return root
        shutil.rmtree(root / "images", ignore_errors=True)
        (root / STAMP).unlink()
    elif root.exists() and any(root.iterdir()):
        raise FileExistsError(f"write_x2x: {root} isn't empty and holds no {STAMP}; give an empty or new folder")
    (root / "images").mkdir(parents=True)
    for split in NUM_ROWS:
        lines = []
        for index, row in enumerate(x2x_rows(split, seed=seed)):
            picture = f"images/{split}_{index}.png"
            Image.fromarray(row.photo).save(root / picture, compress_level=1)
            lines.append(json.dumps(_columns(row, picture)))
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")  # last: a cut-short folder has no stamp
    return root


def _columns(row: Row, picture: str) -> dict[str, object]:
    return {
        "prompt": row.caption,
        "real_image": picture,
        "qa_problem": row.question.text,
        "qa_solution": f"<answer>{row.question.solution}</answer>",
        "qa_type": row.qa_type,
        "attributes": row.look.to_dict(),
    }
