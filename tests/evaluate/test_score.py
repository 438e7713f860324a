"""Stage 2: scores of a folder by hand; what is left out is named, and an interrupted stage 1 is not scored."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from evaluate_cases import Colours, few_items, generated, plain, written
from rich.console import Console

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.graders import Graders
from syncr1.engine.evaluate.held_out import score_rollouts, table_of
from syncr1.engine.evaluate.score import markdown, read_complete, read_items, rich_table, rows_of, score_folder
from syncr1.engine.evaluate.store import ITEMS, Item
from syncr1.engine.pictures import MemoryImage
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.judge.attribute_judge import index_scorer
from syncr1.engine.world.attributes import LOOKS, VALUES
from syncr1.engine.world.checker import AttributeChecker

CHECKER = AttributeChecker(AttributeChecker.raw_table())
SCORERS = {"checker": index_scorer(CHECKER.read_indices, VALUES)}


def asked(name: str, task: str, right: str, greedy: str, sampled: str, **more: Any) -> Item:
    prompt = Prompt(id=name, task=task, text="?", segments=("text",), answer=right, **more)
    return Item(prompt=prompt, greedy=greedy, sampled=sampled)


def tagged(answer: str) -> str:
    return f"<think> so </think><answer> {answer} </answer>"


def test_texts_by_hand(tmp_path: Path) -> None:
    options = ("red", "blue")
    rows = [
        asked("1", "rec", "yes", "yes", "no"),
        asked("2", "rec", "no", "yes", "no"),
        asked("3", "qa", "red", "red", "blue"),
        asked("4", "mcq", "B", tagged("B"), "B", qa_type="MC", options=options),
        asked("5", "mcq", "A", tagged("red"), tagged("B"), qa_type="MC", options=options),
        asked("6", "oe", "two", tagged("2"), "two", qa_type="OE"),
    ]
    written(tmp_path, [(row, None) for row in rows])
    scores = score_folder(tmp_path).scores
    assert scores["rec"]["recall/greedy"] == 0.5 == scores["rec"]["recall/sampled"]
    assert scores["qa"]["score/greedy"] == 1.0 and scores["qa"]["score/sampled"] == 0.0
    assert scores["mcq"] == {
        "num_items": 2,
        "accuracy/greedy": 1.0,
        "format/greedy": 1.0,
        "score/greedy": 1.0,
        "accuracy/sampled": 0.0,
        "format/sampled": 0.5,
        "score/sampled": 0.0,
    }
    assert scores["oe"]["accuracy/greedy"] == 1.0 and scores["oe"]["accuracy/sampled"] == 0.0
    assert score_folder(tmp_path).summary["understanding/greedy"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def drawn(index: int, member: int = 0, **more: Any) -> Item:
    prompt = Prompt(id=str(index), task="t2i", text="?", segments=("image",), target="red", **more)
    return Item(prompt=prompt, member=member)


def test_images_by_hand(tmp_path: Path) -> None:
    """Two members of one prompt count alike, and are one item."""
    right, wrong = CHECKER.table[0], CHECKER.table[-1]
    wanted = LOOKS[0].to_dict()
    shared = sum(LOOKS[-1].to_dict()[name] == value for name, value in wanted.items()) / len(wanted)
    rows = [(drawn(0, attributes=wanted), right), (drawn(0, 1, attributes=wanted), wrong)]
    written(tmp_path, rows)
    found = score_folder(tmp_path, image_scorers=SCORERS)
    assert found.scores["t2i"]["attributes/checker"] == pytest.approx((1 + shared) / 2)
    assert found.scores["t2i"]["num_items"] == 1
    assert found.summary == {"image/checker": pytest.approx((1 + shared) / 2), "image/all_right/checker": 0.5}
    assert found.tasks["t2i"].measures["all_right/checker"].by_item == {"0": 0.5}
    assert found.left_out == {"clip_t": "no CLIP model was given (--clip)"}
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored["scores"] == found.scores and stored["left_out"] == found.left_out
    assert "CLIP-T | left out | left out" in (tmp_path / "scores.md").read_text()


def test_clip_i_is_the_main_score_of_photographs(tmp_path: Path) -> None:
    red, yellow = plain((1.0, 0.0, 0.0)), plain((1.0, 1.0, 0.0))
    prompt = Prompt(id="a", task="pure_gen", text="a red one", segments=("image",), references=(MemoryImage("r", red),))
    written(tmp_path, [(Item(prompt=prompt), yellow)])
    found = score_folder(tmp_path, Graders(clip=Colours(), clip_name="colours"))
    metrics = found.scores["pure_gen"]
    assert metrics["clip_i"] == metrics["clip_t"] == metrics["score/sampled"] == pytest.approx(0.5**0.5)
    assert found.left_out == {} and set(found.summary) == {"image/clip_i", "image/clip_t"}
    assert ("pure_gen", "1", "CLIP-T", "", "0.707") in rows_of(found)


class Silent:
    """A judge that never answers the second question."""

    def ask_many(self, questions: Any, images: Any) -> list[str | None]:
        return [None if index == 1 else "1" for index in range(len(questions))]


def test_missing_verdicts_are_told_and_do_not_count(tmp_path: Path) -> None:
    written(tmp_path, [(asked(str(i), "vqa", "red", f"{i}", "blue"), None) for i in range(3)])
    found = score_folder(tmp_path, Graders(judge=Silent(), judge_name="silent"))
    assert found.scores["vqa"]["judge"] == 1.0
    assert found.left_out == {"vqa/judge": "no verdict for 1 of 3 items; score again to ask again"}
    assert ("vqa", "3", "judge (0, .5, 1)", "100.0 % [34, 100]", "") in rows_of(found)


def test_a_metric_without_any_verdict_is_left_out_of_the_table_by_name(tmp_path: Path) -> None:
    written(tmp_path, [(asked("1", "vqa", "red", "a", "b"), None), (asked("2", "vqa", "red", "c", "d"), None)])

    class Mute:
        def ask_many(self, questions: Any, images: Any) -> list[str | None]:
            return [None] * len(questions)

    found = score_folder(tmp_path, Graders(judge=Mute(), judge_name="mute"))
    assert "judge" not in found.scores["vqa"] and "no verdict for 2 of 2" in found.left_out["vqa/judge"]
    assert ("vqa", "2", "judge (0, .5, 1)", "left out", "left out") in rows_of(found)


def test_nothing_said_is_nan_and_shown_as_a_dash(tmp_path: Path) -> None:
    written(tmp_path, [(asked("1", "rec", "perhaps", "yes", "yes"), None)])
    found = score_folder(tmp_path)
    assert ("rec", "1", "main score: balanced accuracy", "–", "–") in rows_of(found)
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["rec"]["recall/greedy"] is None


def test_tables_name_every_task_and_what_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, [(asked("1", "vqa", "red", "red", "red"), None), (asked("2", "other", "a", "a", "b"), None)])
    found = score_folder(tmp_path)
    shown = markdown(found)
    assert (
        "| vqa | 1 | judge (0, .5, 1) | left out | left out |" in shown
        and "| other | 1 | main score: accuracy | 100.0 % [21, 100] | 0.0 % [0, 79] |" in shown
    )
    assert "- judge (0, .5, 1): no judge was given" in shown
    assert shown.count("- accuracy: share of the answers") == 1 and "- balanced accuracy" not in shown
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rich_table(found))
    text = console.export_text()
    assert "Questions about a photo of the concept" in text and "no judge was given" in text


def test_the_table_fits_80_characters_and_says_how_sure_it_is(tmp_path: Path) -> None:
    """Whole drawings before their attributes, intervals beside scores, what is guessed by name; no number is cut."""
    wanted = LOOKS[0].to_dict()
    shown = [CHECKER.table[0] if i % 3 else CHECKER.table[1] for i in range(12)]
    rows: list[tuple[Item, Any]] = [
        (asked(f"r{i}", "rec", ("yes", "no")[i % 2], "yes", "yes"), None) for i in range(12)
    ]
    rows += [(drawn(i, attributes=wanted), image) for i, image in enumerate(shown)]
    written(tmp_path, rows)
    readers = {"checker": SCORERS["checker"], "cnn": SCORERS["checker"]}
    found = score_folder(tmp_path, image_scorers=readers)
    stream = io.StringIO()
    Console(width=80, file=stream).print(rich_table(found))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert [row[2] for row in rows_of(found)] == [
        "main score: balanced accuracy (at chance)",
        *("drawings right, classifier", "drawings right, checker"),
        *("attributes right, classifier", "attributes right, checker"),
        "CLIP-T",
    ]
    assert text.count("66.7 % [39, 86]") == 2, "8 of 12: Wilson's"
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored["intervals"]["t2i/all_right/cnn"] == pytest.approx([0.391, 0.862], abs=1e-3)
    assert stored["scores"]["t2i"]["all_right/cnn"] == pytest.approx(2 / 3)


def test_an_interrupted_stage_1_is_not_scored(tmp_path: Path) -> None:
    rows = [(drawn(index, member), plain((1.0, 0.0, 0.0))) for index in range(2) for member in range(2)]
    written(tmp_path, rows)
    assert len(read_complete(tmp_path)) == 4
    lines = (tmp_path / ITEMS).read_bytes().splitlines(keepends=True)
    for kept in (lines[:3], lines[:2], [*lines[:3], lines[3][:30]]):
        (tmp_path / ITEMS).write_bytes(b"".join(kept))
        with pytest.raises(EvaluationError, match="has 1 of 2 items; run --stage generate again"):
            score_folder(tmp_path)
    with pytest.raises(EvaluationError, match="missing"):
        score_folder(tmp_path / "nowhere")


def test_stage_2_scores_as_the_trainer_does(tmp_path: Path) -> None:
    """The trainer's metrics over rollouts in memory and stage 2 over the folder are one code and one number."""
    items = few_items()
    folder = generated(items, tmp_path / "out")
    stored = read_complete(folder)
    greedy, sampled = read_items(stored, folder, with_images=True)
    by_id = {prompt.id: prompt for prompts in items.values() for prompt in prompts}
    whole = [[replace(r, prompt=by_id[r.prompt.id]) for r in rollouts] for rollouts in (greedy, sampled)]
    assert len(greedy) == 4 and len(sampled) == 10 and all(r.image is not None for r in sampled if r.prompt.attributes)
    expected = score_rollouts(*whole, image_scorers=SCORERS)
    found = score_folder(folder, image_scorers=SCORERS)
    assert found.tasks == expected and table_of(found.tasks) == table_of(expected)
    stored = json.loads((folder / "scores.json").read_text())
    assert stored["per_item"] == json.loads(json.dumps(table_of(expected)["per_item"]))
    drawn = [row for row in rows_of(found) if row[0] == "pure_gen"]
    assert [row[2] for row in drawn][:2] == [
        "drawings right, checker",
        "attributes right, checker",
    ]
    assert set(found.left_out) == {"clip_t", "clip_i", "judge"}
