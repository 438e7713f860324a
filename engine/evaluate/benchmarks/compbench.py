"""T2I-CompBench: 300 prompts in each of eight categories: attributes, relations, numbers, and all of these together.

    layout      Karine-Huang/T2I-CompBench's examples/dataset: <category>_val.txt, one prompt a line

The published numbers come from BLIP-VQA, UniDet and CLIP, by its own programs (`--export t2i_compbench` writes a folder
of samples for each category). The judge here grades each image from 1 to 5 against its category's criterion, as the
repository's GPT-4V evaluation does, in a wording of ours; 5 is 1 and 1 is 0.

Source: T2I-CompBench `GORS_finetune/inference_eval.py`, `MLLM_eval/gpt4v_eval.py`; rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import ChatError, DataError
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept, Nobody, ask_judge, earlier
from ..sources import MAX_PROMPT_BYTES
from ..store import Item
from .asking import drawing
from .benchmark_outcome import Outcome, Scored, mean_part
from .layouts import Source

CRITERIA: Mapping[str, str] = {
    "color": "every object that is named is there, in the colour that is named",
    "shape": "every object that is named is there, in the shape that is named",
    "texture": "every object that is named is there, of the texture or material that is named",
    "spatial": "the objects that are named are there, and lie to each other as the text says",
    "3d_spatial": "the objects that are named are there, and lie before or behind each other as the text says",
    "numeracy": "the objects that are named are there, in the numbers that are named",
    "non_spatial": "the objects that are named are there, and do with each other what the text says",
    "complex": "objects, their attributes, their places and what they do are as the text says",
}
"""What counts in each category."""
QUESTION = (
    "An image was drawn for this text: {prompt}\nWhat counts: {criterion}.\nReply with one number: 5 all of it, 4 "
    "nearly all of it, 3 some of it, 2 hardly anything of it, 1 nothing of it."
)


def load(source: Source) -> list[Prompt]:
    """The validation prompts of every category that is there.

    Raises:
        DataError: none of its files, or one that is empty or no text.
    """
    path = source.path
    places = [path, path / "examples" / "dataset", path / "dataset"]
    files = {path.stem.removesuffix("_val"): path} if path.is_file() else {}
    for name in CRITERIA:
        there = (place / f"{name}_val.txt" for place in places)
        if (file := next((file for file in there if file.is_file()), None)) is not None:
            files[name] = file
    if not files or not files.keys() <= CRITERIA.keys():
        raise DataError(
            f"{path}: expected <category>_val.txt of {', '.join(CRITERIA)}; name T2I-CompBench's clone, or its "
            "examples/dataset"
        )
    return [prompt for name, file in files.items() for prompt in _of_file(name, file)]


def _of_file(name: str, file: Path) -> list[Prompt]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable as UTF-8 ({error}); download it again") from error
    prompts = [line for line in lines if line]
    if not prompts or any(len(line.encode()) > MAX_PROMPT_BYTES for line in prompts):
        raise DataError(f"{file}: expected one prompt a line; download it again")
    return [
        drawing("t2i_compbench", f"{name}/{place:03}", text, name, place=place) for place, text in enumerate(prompts)
    ]


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """By the judge; nothing without one."""
    drawn = [item for item in items if item.drawn is not None]
    groups = [str(item.prompt.extra["group"]) for item in drawn]
    asked = [
        (item, QUESTION.format(prompt=item.prompt.text, criterion=CRITERIA[group]))
        for item, group in zip(drawn, groups, strict=True)
    ]
    missing = graders.missing("t2i_compbench")
    at_hand = graders if missing is None else earlier(kept, "t2i_compbench", graders)
    try:
        values = ask_judge("t2i_compbench", asked, lambda reply, _: grade_of(reply), folder, at_hand, kept)
    except (ChatError, Nobody) as error:
        how = "--judge_url grades them here; or `--export t2i_compbench` and its own programs"
        outcome = Outcome(benchmark="T2I-CompBench", how=how)
        return Scored(outcome=outcome, left_out={"t2i_compbench": missing or str(error)})
    ids = [item.prompt.id for item in drawn]
    of = {
        name: Measured.of(ids, [v if group == name else None for v, group in zip(values, groups, strict=True)])
        for name in CRITERIA
        if name in groups
    }
    parts = [mean_part("mean of categories", list(of.values())), *(mean_part(name, [one]) for name, one in of.items())]
    lost = sum(value is None for value in values)
    return Scored(
        outcome=Outcome(
            benchmark="T2I-CompBench",
            parts=tuple(part for part in parts if part is not None),
            how=f"{at_hand.judge_name or 'the judge'}, which grades each image",
            remarks=("not BLIP-VQA, UniDet and CLIP, as for the published numbers, read the images",),
        ),
        measures={"t2i_compbench": Measured.of(ids, values)},
        left_out={"t2i_compbench": f"no grade of {lost} of {len(values)} images; score again"} if lost else {},
    )


def grade_of(reply: str | None) -> float | None:
    """(grade - 1) / 4 of a reply with one grade; None otherwise."""
    words = (reply or "").replace(".", " ").split()
    grades = {int(word) for word in words if word.isdecimal()}
    if len(grades) != 1 or not 1 <= (grade := grades.pop()) <= 5:
        return None
    return (grade - 1) / 4
