"""CLIP and judge on items made by hand: values, what is kept, what is asked again, and a judge behind a real socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from evaluate_cases import Colours, plain, written
from judge_server import server
from torch import Tensor

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.graders import (
    KEPT,
    Asker,
    Graders,
    Kept,
    Values,
    clauses_of,
    grade,
    metrics_of,
    scored_text,
    verdict_of,
)
from syncr1.engine.evaluate.store import Item
from syncr1.engine.pictures import MemoryImage
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.judge.llm_judge import LLMJudge

RED, GREEN, YELLOW = plain((1.0, 0.0, 0.0)), plain((0.0, 1.0, 0.0)), plain((1.0, 1.0, 0.0))
DIAGONAL = 0.5**0.5


def drawing(name: str, task: str, target: str, **more: Any) -> Item:
    return Item(prompt=Prompt(id=name, task=task, text="draw", segments=("image",), target=target, **more))


def answer(name: str, task: str, right: str, said: str, target: str | None = None) -> Item:
    return Item(
        prompt=Prompt(id=name, task=task, text=f"{name}?", segments=("text",), answer=right, target=target), greedy=said
    )


class Judge:
    """Answers by a rule, and remembers what it was asked."""

    def __init__(self, rule: Callable[[str, Tensor | None], str | None]) -> None:
        self.rule, self.asked = rule, list[str]()

    def ask_many(self, questions: Sequence[str], images: Sequence[Tensor | None]) -> list[str | None]:
        self.asked += questions
        return [self.rule(question, image) for question, image in zip(questions, images, strict=True)]


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    red, green = MemoryImage("red", RED), MemoryImage("green", GREEN)
    rows = [
        (drawing("a", "pure_gen", "a red <bobo>", references=(red, green)), RED),
        (drawing("b", "pure_gen", "a green one", references=(green,)), YELLOW),
        (drawing("c", "dense_gen", "red, a hat, the sea, red", references=(red,)), RED),
        (drawing("d", "t2i", "a blue thing"), RED),
        (answer("e", "vqa", "cat", "a cat"), None),
        (answer("f", "qa", "dog", "cat"), None),
        (answer("g", "dense_rea", "red hat", "red", target="draw a red hat"), None),
    ]
    return written(tmp_path, rows)


def by_value(graded: Values) -> dict[str, dict[str, list[float | None]]]:
    """What items got, without whose it is."""
    return {task: {name: [value for _, value in of] for name, of in found.items()} for task, found in graded.items()}


def test_clip_values_by_hand(items: list[Item], tmp_path: Path) -> None:
    graded, left_out = grade(items, tmp_path, Graders(clip=Colours(), clip_name="colours"))
    values = by_value(graded)
    assert [name for name, _ in graded["pure_gen"]["clip_t"]] == ["a", "b"], "by item"
    assert left_out == dict.fromkeys(("judge", "clauses"), "no judge was given (--judge_url, --judge_model)")
    assert values["pure_gen"]["clip_t"] == pytest.approx([1.0, DIAGONAL], abs=1e-6)
    assert values["pure_gen"]["clip_i"] == pytest.approx([1.0, DIAGONAL], abs=1e-6), "one photo, as published"
    assert values["dense_gen"] == {"clip_i": pytest.approx([1.0], abs=1e-6)}
    assert values["t2i"] == {"clip_t": pytest.approx([0.0], abs=1e-6)}
    everything, _ = grade(items, tmp_path, Graders(clip=Colours(), clip_name="colours", clip_references=0))
    assert by_value(everything)["pure_gen"]["clip_i"] == pytest.approx([0.5, DIAGONAL], abs=1e-6), "the mean over both"


def test_what_is_known_is_not_computed_again(items: list[Item], tmp_path: Path) -> None:
    clip = Colours()
    first, _ = grade(items, tmp_path, Graders(clip=clip, clip_name="colours"))
    assert (clip.num_texts, clip.num_images) == (3, 3)
    again, _ = grade(items, tmp_path, Graders(clip=clip, clip_name="colours"))
    assert first == again and (clip.num_texts, clip.num_images) == (3, 3)
    grade(items, tmp_path, Graders(clip=clip, clip_name="another"))
    assert (clip.num_texts, clip.num_images) == (6, 6), "another model's values are its own"
    lines = (tmp_path / KEPT).read_bytes().splitlines(keepends=True)
    (tmp_path / KEPT).write_bytes(b"".join(lines[:4]) + lines[4][:20])  # b and c of clip_i were lost
    third, _ = grade(items, tmp_path, Graders(clip=clip, clip_name="colours"))
    assert third == first and clip.num_texts == 6 and clip.num_images == 7, "c has the image and photo of a"


def test_values_of_a_grader_that_is_not_given_again(items: list[Item], tmp_path: Path) -> None:
    """CLIP on one machine, the judge from another: what is complete and of one grader counts."""
    first, _ = grade(items, tmp_path, Graders(clip=Colours(), clip_name="colours", clip_references=0))
    judge = Graders(judge=Judge(lambda question, image: "1"), judge_name="rule", clip_references=0)
    both, left_out = grade(items, tmp_path, judge)
    assert left_out == {} and all(both[task][metric] == first[task][metric] for task in first for metric in first[task])
    (tmp_path / KEPT).write_bytes(b"".join((tmp_path / KEPT).read_bytes().splitlines(keepends=True)[1:]))
    _, left_out = grade(items, tmp_path, judge)
    assert left_out == {"clip_t": "no CLIP model was given (--clip)"}, "one value is gone"
    grade(items, tmp_path, Graders(clip=Colours(), clip_name="another"))
    _, left_out = grade(items, tmp_path, judge)
    assert set(left_out) == {"clip_t", "clip_i"}, "whose values they would be is unclear"


def test_judged_values_by_hand(items: list[Item], tmp_path: Path) -> None:
    def rule(question: str, image: Tensor | None) -> str:
        if image is None:
            return "Score: 0.5" if "dog" in question or "draw a red hat" in question else "1"
        assert image.shape == (3, 4, 4) and float(image[0].mean()) == 1.0
        return "1" if "this: red?" in question or "sea" in question else "0"

    judge = Judge(rule)
    values, _ = grade(items, tmp_path, Graders(judge=judge, judge_name="rule"))
    assert by_value(values) == {
        "vqa": {"judge": [1.0]},
        "qa": {"judge": [0.5]},
        "dense_rea": {"judge": [0.5]},
        "dense_gen": {"clauses": [pytest.approx(2 / 3)]},
    }
    assert len(judge.asked) == 6, "a clause that comes twice is asked once"
    assert all("f?" in q and "dog" in q and "cat" in q for q in judge.asked if "dog" in q)
    grade(items, tmp_path, Graders(judge=judge, judge_name="rule"))
    assert len(judge.asked) == 6


def test_a_missing_verdict_is_none_and_asked_again(items: list[Item], tmp_path: Path) -> None:
    failing = Judge(lambda question, image: None if "sea" in question or "dog" in question else "1")
    graded, _ = grade(items, tmp_path, Graders(judge=failing, judge_name="rule"))
    values = by_value(graded)
    assert values["qa"]["judge"] == values["dense_gen"]["clauses"] == [None]
    assert values["vqa"]["judge"] == [1.0]
    mended = Judge(lambda question, image: "1")
    graded, _ = grade(items, tmp_path, Graders(judge=mended, judge_name="rule"))
    values = by_value(graded)
    assert values["qa"]["judge"] == values["dense_gen"]["clauses"] == [1.0] and len(mended.asked) == 2


def test_metrics_of_tasks() -> None:
    assert metrics_of(answer("a", "rec", "yes", "no")) == [("rec", "recall")]
    assert metrics_of(answer("a", "choice", "a", "b")) == [("choice", "accuracy"), ("choice", "bleu")]
    chained = Prompt(id="a", task="dense_rea", text="?", answer="x", target="y", references=(Path("p"),))
    assert metrics_of(Item(prompt=chained, sampled="x", drawn="a.png")) == [
        ("dense_rea", "bleu"),
        ("dense_rea", "judge"),
        ("dense_rea_gen", "clauses"),
        ("dense_rea_gen", "clip_i"),
    ]
    own = Prompt(id="a", task="vqa", text="?", answer="x", target="y")
    found = metrics_of(Item(prompt=own, sampled="x", drawn="a.png"))
    assert found == [("vqa", "bleu"), ("vqa", "judge"), ("vqa", "clip_t")], "no photo, no CLIP-I"
    assert metrics_of(Item(prompt=Prompt(id="a", task="x", text="?", answer=None), sampled="x")) == []


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("1", 1.0),
        ("0.5", 0.5),
        (" **0** ", 0.0),
        ("Score: .5.", 0.5),
        ("1.0 - yes, 1", 1.0),
        ("1, it does.", 1.0),
        ("0 or 1", None),
        ("10", None),
        ("0.7", None),
        ("", None),
        (None, None),
        ("-1", None),
        ("yes", None),
        ("v1.5", None),
        ("0.5/1", None),
    ],
)
def test_verdicts(reply: str | None, expected: float | None) -> None:
    assert verdict_of(reply, (0.0, 0.5, 1.0)) == expected
    if expected == 0.5:
        assert verdict_of(reply, (0.0, 1.0)) is None


def test_clauses() -> None:
    assert clauses_of("a cat, 3.5 m long, on a mat. Red; a cat!") == ["a cat", "3.5 m long", "on a mat", "Red"]
    assert clauses_of("一只猫，红色。") == ["一只猫", "红色"]
    assert clauses_of(" , . ") == []


def test_clip_reads_what_the_concept_is_where_that_is_known() -> None:
    named = drawing("a", "rea", "a photo of <bobo>", concept="bobo")
    assert scored_text(named) == "a photo of <bobo>"
    known = drawing("a", "rea", "a photo of <bobo>", concept="bobo", extra={"concept_class": "dog"})
    assert scored_text(known) == "a photo of dog"


def test_kept_values_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / KEPT).write_text('{"key": "a", "metric": "m", "grader": "g", "value": 1}\nnothing\n')
    with pytest.raises(EvaluationError, match="line 2"):
        Kept(tmp_path)


# A judge behind a socket ----------------------------------------------------------------------------------------------


def judge_at(url: str) -> Asker:
    return LLMJudge(url, "small", retries=0, timeout=10)


def test_a_served_judge(items: list[Item], tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    def reply(request: dict[str, Any]) -> tuple[int, str]:
        content = request["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = next(part["text"] for part in parts if part["type"] == "text")
        seen.append((text, any(part["type"] == "image_url" for part in parts)))
        return 200, "0" if "hat?" in text else "1"

    with server(reply) as url:
        values, left_out = grade(items, tmp_path, Graders(judge=judge_at(url), judge_name="small"))
    assert set(left_out) == {"clip_t", "clip_i"} and by_value(values)["vqa"]["judge"] == [1.0]
    assert by_value(values)["dense_gen"]["clauses"] == [pytest.approx(2 / 3)]
    assert len(seen) == 6 and sum(shown for _, shown in seen) == 3, "clauses are asked about the image, answers are not"
    # The server is gone: everything that is needed is on disk.
    again, _ = grade(items, tmp_path, Graders(judge=judge_at(url), judge_name="small"))
    assert again == values


def test_a_judge_that_refuses_takes_nothing_else_along(items: list[Item], tmp_path: Path) -> None:
    with server(lambda request: (401, "no")) as url:
        graders = Graders(clip=Colours(), clip_name="colours", judge=judge_at(url), judge_name="small")
        values, refused = grade(items, tmp_path, graders)
    assert set(refused) == {"judge", "clauses"} and "401" in refused["judge"]
    assert set(values) == {"pure_gen", "dense_gen", "t2i"} and set(values["dense_gen"]) == {"clip_i"}
