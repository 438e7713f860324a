"""docs/forms.md: each of its examples is read, and becomes what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from syncr1.engine.data.rows import ANSWER_COLUMNS, CHAT_COLUMNS, QUESTION_COLUMNS, SHOWN_COLUMNS
from syncr1.engine.data.samples import load_samples
from syncr1.engine.data.table import SUFFIXES
from syncr1.engine.pictures import ImageRef, open_picture
from syncr1.engine.records import Prompt

PAGE = (ROOT / "docs" / "forms.md").read_text()
BLOCKS = re.findall(r"```(\w+) title=\"([\w.]+)\"\n(.+?)```", PAGE, re.DOTALL)
BECOMES = dict(re.findall(r"```text title=\"([\w.]+) becomes\"\n(.+?)```", PAGE, re.DOTALL))


def named(ref: ImageRef) -> str:
    return ref.name.removesuffix(", column 'image'")


def shown(prompt: Prompt) -> str:
    """A prompt as the page writes it."""
    if prompt.segments == ("image",):
        compared = f", compared with {named(prompt.real_image)}" if prompt.real_image else ""
        return f"draws {prompt.text}{compared}"
    right = " or ".join(prompt.right_answers) if prompt.qa_type == "OE" and prompt.right_answers else prompt.answer
    options = f" of {' | '.join(prompt.options)}" if prompt.options else ""
    picture = f", shows {named(prompt.images[0])}" if prompt.images else ""
    return f"{prompt.qa_type} {right}{options}{picture}"


@pytest.mark.parametrize(("language", "name", "content"), BLOCKS, ids=[name for _, name, _ in BLOCKS])
def test_an_example_becomes_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, name: str, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for picture in ("cup.jpg", "cups.png"):
        Image.new("RGB", (8, 6), "brown").save(picture)
    if language == "python":
        exec(compile(content, name, "exec"), {})  # what a reader of the page would run
    else:
        Path(name).write_text(content, encoding="utf-8")
    samples = load_samples(Path(name), instruction=None)
    prompts = [prompt for sample in samples for prompt in sample]
    assert [shown(prompt) for prompt in prompts] == BECOMES[name].splitlines() and len(prompts) == 3
    for prompt in prompts:
        assert all(option in prompt.text for option in prompt.options), "what can be chosen is said"
        for ref in (*prompt.images, prompt.real_image):
            assert ref is None or open_picture(ref).size in ((8, 6), (1, 1))


def test_every_example_says_what_it_becomes_and_every_suffix_has_one() -> None:
    assert {name for _, name, _ in BLOCKS} == set(BECOMES)
    told = {Path(name).suffix for name in BECOMES} | {".feather"}  # arrow by its other name
    assert set(SUFFIXES) <= told
    for name in (*ANSWER_COLUMNS, *QUESTION_COLUMNS, *CHAT_COLUMNS, *SHOWN_COLUMNS):
        assert f"`{name}`" in PAGE, name
