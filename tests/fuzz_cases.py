"""What is odd: values, texts near good ones, damaged files; for `test_fuzz.py`."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = [
    *("", " ", "\0", "\ud800", "a\0b", "~nobody/x", "~", "../x", "/", "x" * 5000, "a/" * 3000, "nan", "-inf", "1e999"),
    *("9" * 5000, "-0", "٣", "İ", "\u202e", "<think>", "</answer>", "<image>", "A", "B.", "(C)", "{form}", "None"),
    *("true", "null", "[", "]", "%s", "\r\n", "ﷺ" * 9, "a" + "\u0301" * 50, "1,000", "-.5", "and hundred"),
]
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**4200), 0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf")]
text = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
scalar = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | text
nested = st.sampled_from([1, 5, 60, 400, 900, 980, 3000])
value = scalar | st.lists(scalar, max_size=3) | st.dictionaries(text, scalar, max_size=2)


def mutated(seeds: list[str], pieces: list[str]) -> st.SearchStrategy[str]:
    """Texts near good ones: a few cuts, repeats and odd pieces."""
    edit = st.tuples(
        st.integers(0, 1 << 10), st.integers(0, 40), st.sampled_from([*pieces, *ODD_TEXTS]) | st.text(max_size=3)
    )

    def apply(seed: str, edits: list[tuple[int, int, str]]) -> str:
        for at, length, piece in edits:
            at %= len(seed) + 1
            seed = seed[:at] + piece + seed[at + length :]
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=4))


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """A file with bits flipped, bytes put in, and its end cut off."""
    edit = st.tuples(st.integers(0, len(good)), st.integers(0, 8), st.binary(max_size=8))

    def apply(edits: list[tuple[int, int, bytes]], end: int) -> bytes:
        data = good
        for at, length, piece in edits:
            data = data[:at] + piece + data[at + length :]
        return data[:end]

    return st.builds(apply, st.lists(edit, max_size=4), st.just(1 << 30) | st.integers(0, len(good)))


def brackets(depth: int, inner: str = "1", name: str | None = None) -> str:
    """JSON that is `depth` deep."""
    opening = "[" if name is None else f'{{"{name}":'
    return opening * depth + inner + ("]" if name is None else "}") * depth


def as_json_text(content: Any) -> str:
    """Integers of any length included, which Python refuses to write."""
    if isinstance(content, dict):
        return "{" + ", ".join(f"{json.dumps(str(name))}: {as_json_text(part)}" for name, part in content.items()) + "}"
    if isinstance(content, list):
        return "[" + ", ".join(map(as_json_text, content)) + "]"
    if isinstance(content, int) and not isinstance(content, bool) and abs(content) > 10**4000:
        return "9" * 5000
    return json.dumps(content)


# Pieces of formats ----------------------------------------------------------------------------------------------------

YAML_PIECES = [
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!python/object/apply:os.system [id]",
        "!!bool x",
        "!!int ''",
        "!!float x",
        "!!timestamp x",
    ),
    *(
        "!!set {a}",
        "!!omap [a: 1]",
        "!!binary '*'",
        "2001-99-99",
        "0x" + "f" * 5000,
        "0b",
        "1_0",
        "1:59:59",
        ": ",
        "- ",
    ),
    *("? ", "[[[[[[", "{a: {a: ", "---\n", "...\n", "%YAML 9.9\n", "\t", "|\n", ">-\n", "# ", '"\\ud800"', '"\\0"'),
    *("'", "@", "`"),
]
SETTINGS_FILES = [
    "seed: 1\nbeta: 0.02\n",
    "model: null\nreport_to: [tensorboard]\n",
    "loss_type: dapo\nlearning_rate: 1e-4\n",
    "output_dir: runs/x\ndata: a/b\n",
    "reward_funcs: [cycle, tim]\nmerge_models: [a, b]\n",
]
JSON_PIECES = ['"prompt":', "{", "}", "[", "]", '"', ",", ":", "\\ud800", "\\u0000", "1e999", "NaN", "9" * 5000, "\n"]
TAGS = [
    *("<think>", "</think>", "<answer>", "</answer>", "<think>" * 50, "<answer>" * 50, "</answer>" * 50, "A"),
    *("twenty-one", "1,000,000"),
]
COLUMNS = [
    *(
        "prompt",
        "real_image",
        "image",
        "images",
        "qa_problem",
        "qa_solution",
        "qa_type",
        "problem",
        "solution",
        "answer",
    ),
    *("id", "options", "segments", "follow_up", "attributes", "references", "reward_model", "concept", "extra", "text"),
    "target",
]
