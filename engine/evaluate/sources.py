"""What can be evaluated on: a UnifyBench++ folder, a table of questions or captions, GenEval's and DPG-Bench's prompts.

| form | how it is told | tasks |
|---|---|---|
| unifybench | a folder with `concept/` | rec, vqa, qa, choice, rea, dense_rea, pure_gen, dense_gen, general_… |
| geneval | JSON lines with `tag`, `include` and `prompt`: GenEval's `prompts/evaluation_metadata.jsonl` | geneval |
| dpg | a folder of .txt files, one prompt each: ELLA's `dpg_bench/prompts` | dpg |
| table | anything else that `engine.data` opens: JSONL, parquet, a saved data set, a hub name | t2i, mcq, oe, … |

A table with a column `segments` has Sync-R1's chains, and is read as they are trained on.

Sources: djghosh13/geneval `generation/diffusers_generate.py`; TencentQQGYLab/ELLA `dpg_bench/compute_dpg_bench.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..data.prompts import by_task, load_benchmark
from ..data.questions import THINK_THEN_ANSWER
from ..data.samples import chains_of, samples_of
from ..data.table import open_table
from ..errors import DataError, shown
from ..records import Prompt
from ..settings.source_names import is_one_file

Form = Literal["unifybench", "geneval", "dpg", "table"]
MAX_PROMPT_BYTES = 1 << 16
"""A prompt's text file is a paragraph; anything near this size is something else."""


def load_items(
    source: str | Path,
    form: Form | None = None,
    split: str | None = None,
    *,
    think: bool = True,
    concept_info: bool = False,
    image_folder: Path | None = None,
) -> dict[str, list[Prompt]]:
    """Task -> prompts.

    Args:
        source: file, folder or hub name.
        form: how to read it; None: told by its contents.
        split: of a table that has splits; None: test.
        think: a table's questions get the instruction to think and to answer in tags.
        concept_info: of a UnifyBench++ folder, the policy is told what info.json has of a concept.
        image_folder: what a table's paths of pictures are relative to; None: the folder of the table.

    Raises:
        DataError: the source is missing, empty, lacks splits where one is named, or an entry cannot be used; names the
            entry and the remedy.
    """
    path = Path(source).expanduser()
    form = form or form_of(path)
    if split is not None and (form != "table" or is_one_file(source)):
        what = "a file" if is_one_file(source) else f"data of the form {form}"
        raise DataError(f"split: expected none for {source}, got {split!r}: {what} has no splits; leave it out")
    if form == "unifybench":
        return load_benchmark(path, concept_info=concept_info)
    if form == "geneval":
        return {"geneval": load_geneval(path)}
    if form == "dpg":
        return {"dpg": load_dpg(path)}
    instruction = THINK_THEN_ANSWER if think else None
    split = split or "test"
    table = open_table(source, split, image_folder=image_folder)
    if "segments" in table.columns:
        return by_task(chains_of(table, split))
    samples = samples_of(table, split, instruction)
    return by_task(prompt for sample in samples for prompt in sample)


def form_of(path: Path) -> Form:
    """The form of a file or folder, told by its contents."""
    if (path / "concept").is_dir():
        return "unifybench"
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
        return "dpg" if names and all(name.endswith(".txt") for name in names) else "table"
    if path.is_file() and path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            first = file.readline(MAX_PROMPT_BYTES)
        if '"tag"' in first and '"include"' in first and '"prompt"' in first:
            return "geneval"
    return "table"


def load_geneval(path: Path) -> list[Prompt]:
    """GenEval's prompts; `extra` keeps each line's metadata, which its scorer reads back, and its number.

    Raises:
        DataError: a line is no object with the texts `prompt` and `tag`, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected GenEval's evaluation_metadata.jsonl") from error
    prompts = []
    for index, line in enumerate(line for line in lines if line.strip()):
        metadata = _metadata(line, f"{path}, line {index + 1}")
        prompts.append(
            Prompt(
                id=f"geneval/{index:05}",
                task="geneval",
                text=metadata["prompt"],
                segments=("image",),
                target=metadata["prompt"],
                extra={"geneval_index": index, "geneval_metadata": metadata},
            )
        )
    if not prompts:
        raise DataError(f"{path}: is empty; expected one JSON object per line")
    return prompts


def _metadata(line: str, where: str) -> Mapping[str, Any]:
    try:
        metadata = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object per line") from error
    for name in ("prompt", "tag"):
        value = metadata.get(name) if isinstance(metadata, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {name!r} must be text, got {shown(value)}; GenEval's scorer needs it")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{where}: {name!r} holds half of a surrogate pair; download the file again")
    return dict(metadata)


def load_dpg(folder: Path) -> list[Prompt]:
    """DPG-Bench's prompts: each file's text, under the file's name, which is what its questions are found by.

    Raises:
        DataError: no .txt file, an empty or huge one, or a name with a further dot (its scorer cuts names there).
    """
    paths = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{folder}: has no .txt file; expected a folder like ELLA's dpg_bench/prompts")
    prompts = []
    for path in paths:
        if "." in path.stem:
            raise DataError(f"{path}: DPG-Bench's scorer cuts names at their first dot; rename the file")
        if path.stat().st_size > MAX_PROMPT_BYTES:
            raise DataError(f"{path}: is over {MAX_PROMPT_BYTES} bytes, so it is no prompt")
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 ({error}); rewrite it in UTF-8") from error
        if not text:
            raise DataError(f"{path}: is empty; write its prompt, or remove it")
        prompts.append(
            Prompt(
                id=f"dpg/{path.stem}",
                task="dpg",
                text=text,
                segments=("image",),
                target=text,
                extra={"dpg_name": path.stem},
            )
        )
    return prompts
