"""Each benchmark's published layout, small: a few rows with the real columns, and the pictures that they name."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_files import dpg, geneval
from PIL import Image

COLOURS = ("red", "green", "blue", "white")


def encoded(colour: str, size: int = 8) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def cell(colour: str) -> dict[str, Any]:
    """As `datasets` stores a picture."""
    return {"bytes": encoded(colour), "path": None}


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


# Questions ------------------------------------------------------------------------------------------------------------


def pope_github(folder: Path) -> Path:
    """RUCAIBox/POPE's output/coco: JSON lines under the name .json, and COCO's pictures beside them."""
    (folder / "val2014").mkdir(parents=True)
    for number in (1, 2):
        (folder / "val2014" / f"COCO_val2014_00000000000{number}.jpg").write_bytes(encoded(COLOURS[number]))
    for kind in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": number,
                "image": f"COCO_val2014_00000000000{1 + number % 2}.jpg",
                "text": f"Is there a {name} in the image?",
                "label": label,
            }
            for number, (name, label) in enumerate((("dog", "yes"), ("car", "no"), ("cat", "yes"), ("bus", "no")), 1)
        ]
        (folder / f"coco_pope_{kind}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pope_hub(folder: Path) -> Path:
    """lmms-lab/POPE, downloaded."""
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Is there a {COLOURS[number]} thing in the image?",
            "answer": ("yes", "no")[number % 2],
            "image_source": "COCO_val2014_000000000001",
            "image": cell(COLOURS[number]),
            "category": ("random", "popular")[number // 2],
        }
        for number in range(4)
    ]
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return folder


def mmmu(folder: Path) -> Path:
    """MMMU/MMMU, downloaded: a folder per subject; options are a list written in Python."""
    base: dict[str, Any] = {f"image_{place}": None for place in range(1, 8)}
    base |= {"explanation": "", "img_type": "['Photographs']", "topic_difficulty": "Easy", "subfield": "x"}
    art = [
        base
        | {
            "id": f"validation_Art_{number}",
            "question": "What is <image 1>?",
            "options": "['a cat', \"a dog's\", 'a bus', 'none of these']",
            "answer": "ABCD"[number % 4],
            "question_type": "multiple-choice",
            "image_1": cell(COLOURS[number % 4]),
        }
        for number in range(6)
    ]
    maths = [
        base
        | {
            "id": "validation_Math_1",
            "question": "How long is it, <image 1> to <image 2>?",
            "options": "[]",
            "answer": "12",
            "question_type": "open",
            "image_1": cell("red"),
            "image_2": cell("blue"),
        }
    ]
    parquet(folder / "Art" / "validation-00000-of-00001.parquet", art)
    parquet(folder / "Math" / "validation-00000-of-00001.parquet", maths)
    parquet(folder / "Art" / "test-00000-of-00001.parquet", [row | {"answer": "?"} for row in art[:1]])
    return folder


MMBENCH = (
    {"index": 0, "question": "What colour?", "hint": "Look.", "options": ("red", "green", "blue"), "answer": "A"},
    {"index": 1, "question": "Which one?", "hint": "nan", "options": ("cat", "dog"), "answer": "B"},
)


def mmbench_tsv(path: Path, *, circular: bool) -> Path:
    """VLMEvalKit's TSV: pictures in base64, or another row's index; the further orders as rows of their own."""
    rows = []
    for entry in MMBENCH:
        options: tuple[str, ...] = entry["options"]  # type: ignore[assignment]
        for turn in range(len(options) if circular else 1):
            turned = options[turn:] + options[:turn]
            right = options["ABC".index(str(entry["answer"]))]
            rows.append(
                {
                    "index": int(str(entry["index"])) + turn * 1_000_000,
                    "question": entry["question"],
                    "hint": entry["hint"],
                    **{"ABCD"[place]: turned[place] if place < len(turned) else "nan" for place in range(4)},
                    "answer": "ABC"[turned.index(right)],
                    "category": "color",
                    "l2-category": ("coarse", "fine")[int(str(entry["index"]))],
                    "image": str(entry["index"]) if turn else base64.b64encode(encoded("red")).decode(),
                    "split": "dev",
                }
            )
    header = list(rows[0])
    lines = ["\t".join(header), *("\t".join(str(row[name]) for name in header) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def mmbench_hub(folder: Path) -> Path:
    """lmms-lab/MMBench, downloaded."""
    rows = [
        {
            "index": entry["index"],
            "question": entry["question"],
            "hint": entry["hint"],
            "answer": entry["answer"],
            **{
                letter: (*entry["options"], "nan", "nan")[place]  # type: ignore[misc]
                for place, letter in enumerate("ABCD")
            },
            "category": "color",
            "image": cell("red"),
            "source": "x",
            "L2-category": "coarse",
            "comment": "nan",
            "split": "dev",
        }
        for entry in MMBENCH
    ]
    parquet(folder / "en" / "dev-00000-of-00001.parquet", rows)
    return folder


MATHVISTA: tuple[dict[str, Any], ...] = (
    {
        "pid": "1",
        "question": "What is the total volume?",
        "choices": None,
        "unit": "g",
        "precision": None,
        "answer": "1000",
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"task": "visual question answering"},
    },
    {
        "pid": "2",
        "question": "Find d.",
        "choices": None,
        "unit": None,
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "textbook question answering"},
    },
    {
        "pid": "3",
        "question": "∠BOC＝（）",
        "choices": ["135°", "140°", "145°", "150°"],
        "unit": None,
        "precision": None,
        "answer": "145°",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {"task": "geometry problem solving"},
    },
    {
        "pid": "4",
        "question": "Between which years?",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": "[2007, 2008]",
        "question_type": "free_form",
        "answer_type": "list",
        "metadata": {"task": "figure question answering"},
    },
)


def mathvista_github(folder: Path) -> Path:
    """lupantech/MathVista's data folder."""
    (folder / "images").mkdir(parents=True)
    for row in MATHVISTA:
        (folder / "images" / f"{row['pid']}.jpg").write_bytes(encoded("red"))
    whole = {row["pid"]: {**row, "image": f"images/{row['pid']}.jpg"} for row in MATHVISTA}
    (folder / "testmini.json").write_text(json.dumps(whole))
    return folder


def mathvista_hub(folder: Path) -> Path:
    """AI4Math/MathVista, downloaded: `image` is a path of nothing that is there."""
    rows = [
        {**row, "image": f"images/{row['pid']}.jpg", "decoded_image": cell("red"), "query": ""} for row in MATHVISTA
    ]
    parquet(folder / "data" / "testmini-00000-of-00001-x.parquet", rows)
    return folder


# Drawings -------------------------------------------------------------------------------------------------------------


def geneval_clone(folder: Path) -> Path:
    """djghosh13/geneval."""
    (folder / "prompts").mkdir(parents=True)
    geneval(folder / "prompts" / "evaluation_metadata.jsonl")
    return folder


DPG_QUESTIONS = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question
1,A red truck.,,1,0,entity,whole,entity - whole (truck),Is there a truck?
1,A red truck.,,2,1,attribute,color,"attribute - color (truck, red)",Is the truck red?
1,A red truck.,,3,2,relation,spatial,"relation - spatial (truck, road, on)",Is it on a road?
10,é,,1,0,global,,global - (é),Is it an é?
""".replace(",question\n", ",question_natural_language\n", 1)


def dpg_clone(folder: Path) -> Path:
    """TencentQQGYLab/ELLA."""
    (folder / "dpg_bench").mkdir(parents=True)
    dpg(folder / "dpg_bench" / "prompts")
    (folder / "dpg_bench" / "dpg_bench.csv").write_text(DPG_QUESTIONS)
    return folder


def wise(folder: Path, *, verified: bool = False) -> Path:
    """A data folder of PKU-YuanGroup/WISE."""
    folder.mkdir(parents=True)
    ending = "_verified" if verified else ""
    for name, first in (("cultural_common_sense", 1), ("spatio-temporal_reasoning", 401), ("natural_science", 999)):
        rows = [
            {
                "Prompt": f"request {number}",
                "Explanation": f"This refers to {number}",
                "Category": "x",
                "Subcategory": "y",
                "prompt_id": number,
            }
            for number in (first, first + 1)
        ]
        (folder / f"{name}{ending}.json").write_text(json.dumps(rows))
        (folder / f"{name}_rewrite.json").write_text(json.dumps(rows))
    return folder


def compbench(folder: Path) -> Path:
    """Karine-Huang/T2I-CompBench."""
    place = folder / "examples" / "dataset"
    place.mkdir(parents=True)
    (place / "color_val.txt").write_text("a green bench and a blue bowl\na red/white car\n")
    (place / "color_train.txt").write_text("not this\n")
    (place / "numeracy_val.txt").write_text("two boys\n")
    return folder
