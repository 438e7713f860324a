"""A truth is matched with its options when data are loaded, by the rules that answers are scored by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from syncr1.engine.data.samples import load_prompts, load_samples
from syncr1.engine.errors import DataError
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.accuracy import AccuracyReward
from syncr1.engine.rewards.builtin.text import text_reward


def chain(folder: Path, **row: Any) -> Prompt:
    """The one prompt of a table for Sync-R1, a question about words."""
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "Which?", "segments": "text", **row}))
    (prompt,) = load_prompts(folder / "train.jsonl")
    return prompt


def accuracy(said: str, prompt: Prompt) -> float | None:
    columns: dict[str, Any] = {
        name: [getattr(prompt, name)] for name in ("answer", "options", "qa_type", "segments", "id")
    }
    return AccuracyReward()(completions=[f"<think></think><answer>{said}</answer>"], **columns)[0]


@pytest.mark.parametrize("answer", ["B", "(b)", "**B**", "dog", "The dog.", "B. dog", r"\boxed{B}"])
def test_a_chain_holds_the_options_own_text(tmp_path: Path, answer: str) -> None:
    """A letter used to stay one, and the text reward of every step with this row failed."""
    prompt = chain(tmp_path, options=["cat", "dog"], answer=answer)
    assert prompt.answer == "dog"
    columns: dict[str, Any] = {name: [getattr(prompt, name)] for name in ("answer", "options", "segments", "qa_type")}
    assert text_reward(completions=["dog"], **columns) == [1.0]
    assert accuracy("B", prompt) == accuracy("a dog", prompt) == accuracy("(B) dog", prompt) == 1.0
    assert accuracy("A", prompt) == accuracy("cat", prompt) == accuracy("A or B", prompt) == 0.0


def test_an_options_text_comes_first_in_a_chain(tmp_path: Path) -> None:
    assert chain(tmp_path, options=["B", "A"], answer="A").answer == "A", "as written, letters or not"


@pytest.mark.parametrize("answer", ["C", "bird", "A or B", "B. cat"])
def test_a_truth_that_names_no_option_is_refused_at_load(tmp_path: Path, answer: str) -> None:
    with pytest.raises(DataError, match=r"column 'answer': the answer .* names none of the options \['cat', 'dog'\]"):
        chain(tmp_path, options=["cat", "dog"], answer=answer)


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["1/2", "1/3"], "0.5", "A"),
        (["3 cm", "3 m"], r"3\text{ m}", "B"),
        (["(1,2)", "[1,2]"], "[1, 2]", "B"),
        (["x^2", "2x"], "x²", "A"),
        (["12", "20"], "二十", "B"),
        (["10", "100"], "10²", "B"),
    ],
)
def test_a_truth_may_be_written_otherwise(tmp_path: Path, options: list[str], answer: str, letter: str) -> None:
    row = {"question": "Which?", "options": options, "answer": answer}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    ((prompt,),) = load_samples(tmp_path / "train.jsonl")
    assert prompt.qa_type == "MC" and prompt.answer == letter
    assert accuracy(letter, prompt) == accuracy(answer, prompt) == 1.0


def test_a_truth_that_two_options_share_is_refused(tmp_path: Path) -> None:
    row = {"question": "Which?", "options": ["1/2", "0.5", "2"], "answer": r"\frac{1}{2}", "qa_type": "MC"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="is not among the options"):
        load_samples(tmp_path / "train.jsonl")
