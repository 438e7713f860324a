"""Generated items in the layouts that other benchmarks' scorers read.

| kind | what is written | read by |
|---|---|---|
| geneval | `00000/metadata.jsonl`, `00000/samples/0000.png`, … | djghosh13/geneval `evaluation/evaluate_images.py` |
| wise | `<prompt_id>.png` | PKU-YuanGroup/WISE `vllm_eval.py`, `WISE_legacy/gpt_eval.py` |
| t2i_compbench | `<category>/samples/<prompt>_000000.png`, … | Karine-Huang/T2I-CompBench: one `--out_dir` a category |
| dpg | `<prompt's name>.png`: one image, or up to four as a 2x2 grid | ELLA `dpg_bench/compute_dpg_bench.py` |
| lmms_eval | `<task>.json` with `args`, `model_configs`, `logs: [{doc_id, resps: [[text]]}]` | lmms-eval
  `lmms_eval/models/simple/from_log.py`: `--model from_log --model_args logs=<folder>` scores it without a model |
| | `<date>_samples_<task>.jsonl` | its log viewers (`lmms_eval/loggers/evaluation_tracker.py`) |
| vlmevalkit | `<model>_<data set>.tsv` with `index`, the data's columns and `prediction` | VLMEvalKit
  `vlmeval/smp/file.py`, with PRED_FORMAT=tsv and --reuse |

`doc_id` (lmms-eval) and `index` (VLMEvalKit) come from the data's columns of these names; without them they are the
item's place in its task, which is right where the data hold the data set's rows in their order.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..errors import EvaluationError
from ..pictures import open_picture
from ..rewards.builtin.tags import answer_of
from ..whole_files import write_atomically
from .store import Item

GENEVAL_RESULTS = "geneval_results.jsonl"
"""In the folder: where GenEval's scorer is to write, and `--baseline` reads."""
Kind = Literal["geneval", "dpg", "wise", "t2i_compbench", "lmms_eval", "vlmevalkit"]


def export(items: Sequence[Item], folder: Path, kind: Kind, out: Path, *, model: str, name: str | None = None) -> str:
    """Writes one layout, in full, into `out`.

    Args:
        items: everything that was generated, in order.
        folder: where the images of `items` are.
        kind: the layout.
        out: the layout's folder; what an earlier export left there is removed, since scorers take every file they find.
        model: what the scorer shall call the model.
        name: the benchmark's own name of the task (lmms-eval) or data set (VLMEvalKit); None: ours.

    Returns:
        How to score it: a command.

    Raises:
        EvaluationError: there is nothing of this kind among the items, or the layout cannot hold what there is.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise EvaluationError(f"export {kind}: {out} is no folder; remove it, or choose another output_dir")
    draft = out.with_name(f".{out.name}.draft")
    _remove(draft)
    draft.mkdir(parents=True)
    try:
        how = _WRITERS[kind](items, folder, draft, _file_name(model), name)
        _remove(out)
        draft.rename(out)
    finally:
        _remove(draft)
    return how.replace("{out}", str(out))


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _export_geneval(items: Sequence[Item], folder: Path, out: Path, model: str, name: str | None) -> str:
    chosen = [item for item in items if "geneval_metadata" in item.prompt.extra and item.drawn]
    _some(chosen, "geneval", "evaluate on GenEval's evaluation_metadata.jsonl")
    for item in chosen:
        place = out / f"{item.prompt.extra['geneval_index']:05}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        metadata = json.dumps(item.prompt.extra["geneval_metadata"])
        (place / "metadata.jsonl").write_text(metadata + "\n", encoding="utf-8")
        shutil.copyfile(folder / str(item.drawn), place / "samples" / f"{item.member:04}.png")
    scored = folder / GENEVAL_RESULTS
    return f'python evaluation/evaluate_images.py "{{out}}" --outfile "{scored}" --model-path <detectors>'


def _export_dpg(items: Sequence[Item], folder: Path, out: Path, model: str, name: str | None) -> str:
    chosen: dict[str, list[Item]] = {}
    for item in items:
        if "dpg_name" in item.prompt.extra and item.drawn:
            chosen.setdefault(item.prompt.extra["dpg_name"], []).append(item)
    _some(list(chosen), "dpg", "evaluate on a folder of DPG-Bench's prompts")
    size = count = 0
    for stem, group in chosen.items():
        if len(group) > 4:
            raise EvaluationError(
                f"export dpg: a grid holds 4 images of a prompt, got {len(group)}; lower images_per_prompt"
            )
        pictures = [open_picture(folder / str(item.drawn)) for item in group]
        size, count = pictures[0].width, len(pictures)
        grid(pictures).save(out / f"{stem}.png")
    script = "accelerate launch dpg_bench/compute_dpg_bench.py"
    return f'{script} --image-root-path "{{out}}" --resolution {size} --pic-num {count}'


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture as it is; up to four of one size in reading order on a 2x2 grid, free places black."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % 2 * width, place // 2 * height))
    return sheet


def _export_wise(items: Sequence[Item], folder: Path, out: Path, model: str, name: str | None) -> str:
    chosen = [item for item in items if item.prompt.task == "wise" and item.drawn]
    _some(chosen, "wise", "evaluate with --benchmark wise")
    if any(item.member for item in chosen):
        raise EvaluationError("export wise: WISE scores one image of a prompt; set --images_per_prompt 1")
    for item in chosen:
        shutil.copyfile(folder / str(item.drawn), out / f"{item.prompt.extra['prompt_id']}.png")
    if chosen[0].prompt.extra["edition"] == "verified":
        return 'IMAGE_DIR="{out}" JUDGE_MODEL=<judge> VLLM_API_BASE=<server>/v1 bash eval_qwen.sh, in WISE\'s clone'
    return 'python gpt_eval.py --image_dir "{out}" … for each file of data/, then Calculate.py, in WISE_legacy'


def _export_compbench(items: Sequence[Item], folder: Path, out: Path, model: str, name: str | None) -> str:
    chosen = [item for item in items if item.prompt.task == "t2i_compbench" and item.drawn]
    _some(chosen, "t2i_compbench", "evaluate with --benchmark t2i_compbench")
    counts: dict[str, int] = {}
    for item in chosen:
        group = str(item.prompt.extra["group"])
        samples = out / group / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        number = counts[group] = counts.get(group, -1) + 1
        text = item.prompt.text.replace("/", " ").replace("_", " ")  # its programs read the prompt before the first _
        shutil.copyfile(folder / str(item.drawn), samples / f"{text[:200]}_{number:06}.png")
    return (
        "T2I-CompBench's programs, in its clone, for each category: BLIPvqa_eval/BLIP_vqa.py --out_dir={out}/color/, … "
        "(UniDet for spatial, 3d_spatial and numeracy, CLIPScore for non_spatial, 3_in_1 for complex)"
    )


def _export_lmms(items: Sequence[Item], folder: Path, out: Path, model: str, name: str | None) -> str:
    tasks = _answers(items, "lmms_eval", name)
    now = datetime.now(UTC)
    for task, answered in tasks.items():
        rows = [
            {
                "doc_id": number,
                "resps": [[_said(item)]],
                "filtered_resps": [_said(item)],
                "target": item.prompt.answer or "",
                "input": item.prompt.text,
            }
            for number, item in _numbered(answered, "doc_id")
        ]
        log = {
            "args": {"model": model, "model_args": "", "limit": None},
            "model_configs": {"task": task},
            "time": f"{now:%m%d_%H%M}",
            "logs": rows,
        }
        file = _file_name(task)
        write_atomically(out / f"{file}.json", json.dumps(log, ensure_ascii=False, indent=1))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(out / f"{now:%Y%m%d_%H%M%S}_samples_{file}.jsonl", lines)
    return f"python -m lmms_eval --model from_log --model_args logs={{out}} --tasks {','.join(tasks)}"


def _export_vlmevalkit(items: Sequence[Item], folder: Path, out: Path, model: str, name: str | None) -> str:
    tasks = _answers(items, "vlmevalkit", name)
    for task, answered in tasks.items():
        rows = [_vlmevalkit_row(number, item) for number, item in _numbered(answered, "index")]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(out / f"{model}_{_file_name(task)}.tsv", buffer.getvalue())
    place = f"<work-dir>/{model}/T20000101_G00000000"  # a run's folder of an earlier date, as --reuse looks for
    command = f"PRED_FORMAT=tsv python run.py --model {model} --data {' '.join(tasks)} --work-dir <work-dir> --reuse"
    return f"copy {{out}} to {place}, then {command}"


def _vlmevalkit_row(number: int | str, item: Item) -> dict[str, Any]:
    """The data set's own columns where the data have them, then the prediction."""
    letters = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", item.prompt.options, strict=False))
    given = {column: value for column, value in item.prompt.extra.items() if isinstance(value, str | int | float)}
    return {
        "index": number,
        "question": item.prompt.text,
        **letters,
        "answer": item.prompt.answer or "",
        **given,
        "prediction": _said(item),
    }


def _said(item: Item) -> str:
    """The answer in its tags where the text has them, else the whole text: the scorers know nothing of tags."""
    text = item.text or ""
    found = answer_of(text)
    return text if found is None else found


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "model"


def _answers(items: Sequence[Item], kind: str, name: str | None) -> dict[str, list[Item]]:
    """The answered items by task, under the task's name as the other benchmark knows it."""
    tasks: dict[str, list[Item]] = {}
    for item in items:
        if item.member == 0 and item.text is not None and "image" not in item.prompt.segments:
            tasks.setdefault(item.prompt.task, []).append(item)
    _some(list(tasks), kind, "evaluate on questions")
    if name is None:
        return tasks
    if len(tasks) > 1:
        raise EvaluationError(
            f"export {kind}: export_name names one task, and there are {', '.join(tasks)}; choose one with --tasks"
        )
    return {name: next(iter(tasks.values()))}


def _numbered(items: Sequence[Item], column: str) -> list[tuple[Any, Item]]:
    """Each item's number in its data set; EvaluationError where two have the same."""
    numbered = [(item.prompt.extra.get(column, place), item) for place, item in enumerate(items)]
    if len({str(number) for number, _ in numbered}) < len(numbered):
        raise EvaluationError(f"export: two items have the same {column!r}; give every row of the data its own")
    return numbered


def _some(found: Sequence[Any], kind: str, remedy: str) -> None:
    if not found:
        raise EvaluationError(f"export {kind}: none of the items can be exported so; {remedy}")


_WRITERS: Mapping[str, Callable[[Sequence[Item], Path, Path, str, str | None], str]] = {
    "geneval": _export_geneval,
    "dpg": _export_dpg,
    "wise": _export_wise,
    "t2i_compbench": _export_compbench,
    "lmms_eval": _export_lmms,
    "vlmevalkit": _export_vlmevalkit,
}
