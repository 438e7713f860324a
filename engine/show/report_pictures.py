"""The same requests before and after training, beside the concept's photo and the target; sheets of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .markup import embed, section, words
from .names import PHOTOS, task_words
from .run_files import Run, table_of

MAX_SHEETS, MAX_CARDS = 8, 48
SIDES = {"before": "before", "after": "after"}
LEAD = (
    "Held-out requests, the same before and after training. Which ones they are was fixed before training, "
    "by their place in the data; none was picked by its result."
)
READ_BY = (
    " What a drawing shows is read by a classifier that no reward uses (✓ as asked, ✗ not as asked, and what it shows "
    "instead)."
)
RIGHT, WRONG = "✓", "✗"


def cards(run: Run) -> str:
    """A card per example, with what the model made of it before and after."""
    shown = [card(run.folder, row, [("before", run.folder, row), ("after", run.folder, row)]) for row in run.examples]
    read = any(table_of(row, f"{when}_shows") for row in run.examples for when in SIDES)
    body = f'<div class="pairs">{"".join(shown[:MAX_CARDS])}</div>' if shown else ""
    return section("The same requests, before and after", body, "pictures", LEAD + (READ_BY if read else ""))


def card(folder: Path, row: Mapping[str, Any], sides: Sequence[tuple[str, Path, Mapping[str, Any]]]) -> str:
    """What was asked, the photo and the target, and what came of it.

    Args:
        folder: of the run whose photo is shown.
        row: the example.
        sides: heading, folder and example of each answer; the heading's last word (before, after) says which of it.
    """
    drawn = any(example.get(f"{_when(name)}_image") for name, _, example in sides)
    task = task_words(str(row.get("task", "")), drawn=drawn)
    answers = "".join(_side(name, where, example, row, drawn) for name, where, example in sides)
    photo = _photo(folder, row)
    return (
        f'<article class="pair"><p class="task">{words(task)}</p><p class="asked">{words(row.get("prompt") or "")}</p>'
        f'{_target(row, drawn)}<div class="sides">{photo}{answers}</div></article>'
    )


def _when(heading: str) -> str:
    return heading.rpartition(" ")[2].strip(",:")


def _photo(folder: Path, row: Mapping[str, Any]) -> str:
    """The picture that the request shows, or one of the concept that it names, which the model was not shown."""
    name, kind = row.get("photo"), row.get("photo_is")
    said = PHOTOS.get(kind, "photo") if isinstance(kind, str) else "photo"
    picture = embed(folder, folder / name, said) if isinstance(name, str) else ""
    if not picture:
        return ""
    head = f"photo of {row['concept']}" if kind == "concept" and isinstance(row.get("concept"), str) else "photo"
    caption = f"<figcaption>{words(said)}</figcaption>"
    return f'<figure class="photo"><span class="side">{words(head)}</span>{picture}{caption}</figure>'


def _target(row: Mapping[str, Any], drawn: bool) -> str:
    """What should come out: the right text, and what the picture must show."""
    said = []
    if row.get("answer"):
        said.append(f"Right answer: {row['answer']}")
    asked = table_of(row, "asked")
    if drawn and asked:
        said.append("The picture must show: " + ", ".join(f"{name} {value}" for name, value in asked.items()))
    elif drawn and row.get("target") and row.get("target") not in (row.get("answer"), row.get("prompt")):
        said.append(f"The picture must show: {row['target']}")
    return "".join(f'<p class="target">{words(line)}</p>' for line in said)


def _side(heading: str, folder: Path, row: Mapping[str, Any], asked_by: Mapping[str, Any], drawn: bool) -> str:
    when = _when(heading)
    name = row.get(f"{when}_image")
    alt = f"{heading}: {row.get('prompt', '')}"
    picture = embed(folder, folder / name, alt) if isinstance(name, str) else ""
    if not picture and drawn:
        picture = '<div class="nothing">no picture</div>'
    marks = verdicts(table_of(asked_by, "asked"), table_of(row, f"{when}_shows"))
    text = row.get(f"{when}_text")
    said = _answer(str(text), row.get("answer")) if text else ""
    return f'<figure><span class="side">{words(heading)}</span>{picture}{marks}<figcaption>{said}</figcaption></figure>'


def verdicts(asked: Mapping[str, Any], shows: Mapping[str, Any]) -> str:
    """A line per attribute: a sign, the word right or wrong for who hears it, and what is shown instead; "" where
    nothing was read."""
    known = [name for name in asked if name in shows]
    if not known:
        return ""
    right = sum(1 for name in known if asked[name] == shows[name])
    head = "all as asked" if right == len(known) else f"{right} of {len(known)} as asked"
    items = "".join(_verdict(str(name), asked[name], shows[name]) for name in known)
    sign, kind = (RIGHT, "right") if right == len(known) else (WRONG, "wrong")
    return f'<p class="verdict {kind}">{sign} {head}</p><ul class="verdicts">{items}</ul>'


def _verdict(name: str, asked: Any, shows: Any) -> str:
    if asked == shows:
        return f'<li class="right">{RIGHT} {words(name)} {words(shows)}<span class="heard">, right</span></li>'
    return (
        f'<li class="wrong">{WRONG} {words(name)} <b>{words(shows)}</b>, not {words(asked)}'
        '<span class="heard">, wrong</span></li>'
    )


def _answer(text: str, answer: Any) -> str:
    """What was said, with the verdict where a right answer is known: whole, or how many of its words."""
    said = f"“{words(text)}”"
    if not isinstance(answer, str) or not answer.strip():
        return said
    got, right = text.casefold().split(), answer.casefold().split()
    if got == right or answer_in_tags(text).casefold().split() == right:
        return f'{said} <span class="right">{RIGHT} right</span>'
    hits = sum(a == b for a, b in zip(got, right, strict=False))
    most = max(len(got), len(right))
    share = f"{hits} of {most} words right" if len(right) > 1 and hits else "wrong"
    return f'{said} <span class="wrong">{WRONG} {share}</span>'


def answer_in_tags(text: str) -> str:
    """What stands between <answer> and </answer>; the text where there are no tags."""
    _, found, rest = text.partition("<answer>")
    return rest.partition("</answer>")[0].strip() if found else text.strip()


def sheets(run: Run, running: bool = False) -> str:
    """The sheets of samples, evenly spread, first and last among them; the last one open.

    Args:
        run: whose.
        running: the page will soon be written anew: it shows the newest one alone, as it is.
    """
    paths = list(run.sheets)[-1:] if running else list(run.sheets)
    count = min(MAX_SHEETS, len(paths))
    chosen = sorted({round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)})
    blocks = []
    for position, index in enumerate(chosen):
        picture = sheet(run, paths[index], shrink=not running)
        is_open = " open" if position == len(chosen) - 1 else ""
        if picture:
            blocks.append(f"<details{is_open}><summary>Step {step_of(run, paths[index])}</summary>{picture}</details>")
    left = len(run.sheets) - len(blocks)
    note = f'<p class="note">{left} more in samples/.</p>' if left and blocks else ""
    lead = "A row for each request, all trajectories of its group beside each other, the best reward first."
    return section("What it made while training", "".join(blocks) + note if blocks else "", "samples", lead)


def sheet(run: Run, path: Path, *, shrink: bool = True) -> str:
    """One sheet, as wide as it is, in a frame that scrolls; `shrink` as for `embed`."""
    alt = f"Samples of step {step_of(run, path)}, with requests, texts and rewards"
    picture = embed(run.folder, path, alt, shrink=shrink)
    return f'<div class="scroll">{picture}</div>' if picture else ""


def step_of(run: Run, path: Path) -> str:
    """The step that a sheet is of, counted from 1 as curves are."""
    number = path.stem.removeprefix("step_")
    return str(int(number) + 1 - run.first_step) if number.isdecimal() and len(number) < 19 else number
