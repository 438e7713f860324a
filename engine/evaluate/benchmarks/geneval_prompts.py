"""GenEval: 553 prompts about objects, their number, colour and place; an image is right or not, by the published rules.

    layout      djghosh13/geneval's prompts/evaluation_metadata.jsonl, or the folder or clone that it lies in

A detector here says what each image shows and judges it by GenEval's rules (`--geneval_detector`); what it said is
written as GenEval's own evaluate_images.py writes it, so that its summary_scores.py reads it. Results of its own
program, in `geneval_results.jsonl` of the folder, take the place of a detector, or stand beside it.

Source: djghosh13/geneval `evaluation/evaluate_images.py`, `evaluation/summary_scores.py`; rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, EvaluationError
from ...records import Prompt
from ...show.measured import Measured
from ...whole_files import write_atomically
from ..export import GENEVAL_RESULTS
from ..graders import Detector, Graders, Kept, Nobody, drawn_images, earlier, in_parts, key_of
from ..sources import load_geneval
from ..store import Item, file_name
from .benchmark_outcome import Outcome, Part, Scored, mean_part
from .layouts import Source

METADATA = "evaluation_metadata.jsonl"
SCORED = "geneval_scored.jsonl"
"""In the folder: what our detector said."""


def load(source: Source) -> list[Prompt]:
    """Its prompts; DataError where the file is missing or a line cannot be used."""
    path = source.path
    if path.is_dir():
        found = [place / METADATA for place in (path, path / "prompts") if (place / METADATA).is_file()]
        if not found:
            raise DataError(f"{path}: has no {METADATA}, in it or in prompts/; name GenEval's clone or that file")
        path = found[0]
    return load_geneval(path)


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """Ours where a detector is at hand, or its earlier verdicts; else those of GenEval's own program."""
    drawn = [item for item in items if item.drawn is not None]
    theirs = _theirs(folder, len(drawn))
    at_hand = graders if graders.missing("geneval") is None else earlier(kept, "geneval", graders)
    assert at_hand.detector is not None
    try:
        right = _verdicts(drawn, folder, at_hand.detector, at_hand.detector_name, kept)
    except Nobody:
        if theirs is not None:
            return Scored(outcome=theirs)
        how = (
            "--geneval_detector, or `--export geneval` and its own scorer's "
            f"`--outfile {folder / GENEVAL_RESULTS}`; then --stage score"
        )
        missing = {"geneval": graders.missing("geneval") or "verdicts of several detectors are kept: name one"}
        return Scored(outcome=Outcome(benchmark="GenEval", how=how), left_out=missing)
    ids = [item.prompt.id for item in drawn]
    tags = [str(_metadata(item)["tag"]) for item in drawn]
    remarks = [f"{len(drawn)} images; {at_hand.detector_name} finds the objects, GenEval has Mask2Former (Swin-S)"]
    if theirs is not None and theirs.headline is not None:
        remarks.append(f"{theirs.headline.value:.3f} by {theirs.how}")
    outcome = Outcome(
        benchmark="GenEval",
        parts=_parts(ids, right, tags),
        how=f"GenEval's rules on what the detector finds, here ({SCORED})",
        remarks=tuple(remarks),
    )
    return Scored(outcome=outcome, measures={"geneval": Measured.of(ids, right)})


def _parts(ids: Sequence[str], right: Sequence[float], tags: Sequence[str]) -> tuple[Part, ...]:
    """The overall score, the mean over tags, then each tag's."""
    measured = {
        tag: Measured.of(ids, [value if other == tag else None for value, other in zip(right, tags, strict=True)])
        for tag in dict.fromkeys(tags)
    }
    found = [mean_part("overall", list(measured.values())), *(mean_part(tag, [one]) for tag, one in measured.items())]
    return tuple(part for part in found if part is not None)


def _metadata(item: Item) -> Mapping[str, Any]:
    metadata: Mapping[str, Any] = item.prompt.extra["geneval_metadata"]
    return metadata


def _verdicts(items: Sequence[Item], folder: Path, detector: Detector, name: str, kept: Kept) -> list[float]:
    """1 for each image that is right; what is kept is not looked at again. Writes `SCORED`."""
    keys = [key_of("geneval", name, item.digest, json.dumps(_metadata(item), sort_keys=True)) for item in items]
    new = {key: item for key, item in zip(keys, items, strict=True) if key not in kept.values}
    for part in in_parts(list(new.items())):
        chosen = [item for _, item in part]
        found = detector.verdicts(drawn_images(chosen, folder), [_metadata(item) for item in chosen])
        if len(found) != len(part):
            raise EvaluationError(f"geneval: the detector gave {len(found)} verdicts of {len(part)} images")
        rows = [(key, item, float(one.correct)) for (key, item), one in zip(part, found, strict=True)]
        kept.add("geneval", name, rows, [one.reason for one in found])
    right = [kept.values[key] for key in keys]
    lines = [
        {
            "filename": f"images/{file_name(item.key)}.png",
            "tag": _metadata(item)["tag"],
            "prompt": _metadata(item)["prompt"],
            "correct": bool(value),
            "reason": kept.told.get(key, ""),
            "metadata": json.dumps(_metadata(item)),
        }
        for item, key, value in zip(items, keys, right, strict=True)
    ]
    write_atomically(folder / SCORED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return right


# GenEval's own program ------------------------------------------------------------------------------------------------


def _theirs(folder: Path, images: int) -> Outcome | None:
    """What its evaluate_images.py said of the export; None where it was not run."""
    path = folder / GENEVAL_RESULTS
    if not path.is_file():
        return None
    rows = list(results_of(path))
    some = "" if len(rows) == images else f", which has {len(rows)} of the folder's {images} images: run it again"
    parts = _parts([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])
    return Outcome(benchmark="GenEval", parts=parts, how=f"GenEval's own scorer ({GENEVAL_RESULTS}{some})")


def results_of(path: Path) -> Iterator[tuple[str, float, str]]:
    """Prompt, 1 where right, and tag of each image that GenEval's evaluate_images.py scored.

    Raises:
        EvaluationError: no lines with `tag` and `correct`.
    """
    count = 0
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row, count = json.loads(line), count + 1
            yield str(row.get("metadata", number)), float(bool(row["correct"])), str(row["tag"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{path}: expected what GenEval's evaluate_images.py writes, a line with `tag` and `correct` per image "
            f"({type(error).__name__}: {error}); run it again with --outfile {path}, or remove the file"
        ) from error
    if not count:
        raise EvaluationError(f"{path}: is empty; run GenEval's evaluate_images.py again, or remove the file")
