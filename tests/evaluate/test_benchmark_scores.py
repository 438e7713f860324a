"""Whole benchmarks scored from a stored folder: numbers by hand, judges and detectors asked once, tables, exports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import benchmark_layouts as made
import pytest
from benchmark_files import GENEVAL
from evaluate_cases import plain, written
from small_models import small_clip
from torch import Tensor

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.baseline import compare, markdown
from syncr1.engine.evaluate.benchmarks.geneval_prompts import SCORED, results_of
from syncr1.engine.evaluate.benchmarks.known import load_benchmark_prompts
from syncr1.engine.evaluate.export import GENEVAL_RESULTS, export
from syncr1.engine.evaluate.graders import Graders
from syncr1.engine.evaluate.score import Result, read_complete, score_folder
from syncr1.engine.evaluate.score import markdown as scores_table
from syncr1.engine.evaluate.store import Item
from syncr1.engine.records import Prompt


def prompts(name: str, data: Path) -> list[Prompt]:
    (found,) = load_benchmark_prompts(name, str(data), None).values()
    return found


def answered(folder: Path, asked: Sequence[Prompt], answers: Mapping[str, str], otherwise: str = "") -> Path:
    """A folder in which each question has its answer, by id without the benchmark's name."""
    texts = [answers.get(prompt.id.partition("/")[2], otherwise) for prompt in asked]
    written(folder, [(Item(prompt=prompt, greedy=text), None) for prompt, text in zip(asked, texts, strict=True)])
    return folder


def drawn(folder: Path, asked: Sequence[Prompt], reds: Sequence[float], members: int = 1) -> Path:
    """A folder of images, each of one red: of each prompt's members in turn."""
    shades = iter(reds)
    rows = [
        (Item(prompt=prompt, member=member), plain((next(shades), 0.0, 0.0)))
        for prompt in asked
        for member in range(members)
    ]
    written(folder, rows)
    return folder


def parts(result: Result, name: str) -> dict[str, float]:
    return {part.name: pytest.approx(part.value, abs=0.01) for part in result.outcomes[name].parts}


# Answers --------------------------------------------------------------------------------------------------------------


def test_pope_by_hand(tmp_path: Path) -> None:
    """Of each kind two are yes: one is seen, one is not; of two noes one is said to be there."""
    asked = prompts("pope", made.pope_github(tmp_path / "pope"))
    said = {1: "Yes", 2: "Yes, there is a car.", 3: "No.", 4: "There is not one."}
    answers = {f"{kind}/{n}": text for kind in ("random", "popular", "adversarial") for n, text in said.items()}
    result = score_folder(answered(tmp_path / "out", asked, answers))
    found = parts(result, "pope")
    assert found == {
        "F1": 50,
        "accuracy": 50,
        "precision": 50,
        "recall": 50,
        "share of yes": 50,
        **{f"F1, {kind}": 50 for kind in ("random", "popular", "adversarial")},
    }
    assert result.scores["pope"]["accuracy/greedy"] == 0.5 == result.summary["understanding/greedy"]
    counts = {part.name: part.num_items for part in result.outcomes["pope"].parts}
    assert counts["F1"] == 12 and counts["precision"] == 6 == counts["recall"]
    assert result.outcomes["pope"].parts[0].interval is not None


def test_mmmu_by_hand(tmp_path: Path) -> None:
    asked = prompts("mmmu", made.mmmu(tmp_path / "mmmu"))
    told = ("A", "The answer is (B)", "B", "hm", "<answer>A</answer>")
    answers = {f"validation_Art_{n}": text for n, text in enumerate(told)}
    answers["validation_Math_1"] = "So it is 12.0 cm, the result is 12"
    result = score_folder(answered(tmp_path / "out", asked, answers, otherwise="A or B"))
    found = parts(result, "mmmu")
    assert list(found) == ["overall", "Art and Design", "Science"]
    assert found == {"overall": 500 / 7, "Art and Design": 400 / 6, "Science": 100}, "`A or B`: the last one, as MMMU"
    remarks = " ".join(result.outcomes["mmmu"].remarks)
    assert "1 answers name no option" in remarks
    (line,) = compare(tmp_path / "out", read_complete(tmp_path / "out"), result)
    table = markdown([line], "tiny")
    assert "| MMMU | 7 | 71.4 | 35.9 to 91.8 | 36.3 | Janus-Pro-1B | authors |" in table
    assert "| … Science | 1 | 100.0 | 20.7 to 100.0 |" in table
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert saved["benchmarks"]["mmmu"]["parts"][0]["num_items"] == 7
    assert saved["scores"]["mmmu"]["accuracy/greedy"] == pytest.approx(5 / 7)
    assert "mmmu/score/greedy" in saved["per_item"]


def test_mmbench_counts_a_question_where_every_order_is_right(tmp_path: Path) -> None:
    asked = prompts("mmbench", made.mmbench_tsv(tmp_path / "a.tsv", circular=True))
    right = {prompt.id.partition("/")[2]: str(prompt.answer) for prompt in asked}
    assert parts(score_folder(answered(tmp_path / "all", asked, right)), "mmbench") == {
        "overall, every order right": 100,
        "first order": 100,
        "coarse": 100,
        "fine": 100,
    }
    always_a = dict.fromkeys(right, "A")
    found = parts(score_folder(answered(tmp_path / "a", asked, always_a)), "mmbench")
    assert found == {"overall, every order right": 0, "first order": 50, "coarse": 0, "fine": 0}
    texts = right | {"1": "dog", "1000001": "A. dog"}
    assert parts(score_folder(answered(tmp_path / "t", asked, texts)), "mmbench")["fine"] == 100


class Judge:
    """Answers by a rule; remembers what it was asked."""

    def __init__(self, reply: Any) -> None:
        self.reply, self.asked = reply, []  # type: ignore[var-annotated]

    def ask_many(self, questions: Sequence[str], images: Sequence[Tensor | None]) -> list[str | None]:
        self.asked += list(questions)
        return [self.reply(question, image) for question, image in zip(questions, images, strict=True)]


def test_mathvista_by_rules_and_the_judge(tmp_path: Path) -> None:
    asked = prompts("mathvista", made.mathvista_github(tmp_path / "data"))
    answers = {"1": "1000", "2": "It is about one point two.", "3": "C", "4": "from 2007 to 2008"}
    folder = answered(tmp_path / "out", asked, answers)
    alone = score_folder(folder)
    assert parts(alone, "mathvista")["overall"] == 50 and "2 answers" in alone.outcomes["mathvista"].how
    assert "no judge" in alone.left_out["mathvista"]
    judge = Judge(lambda question, image: "1.2" if "point two" in question else "[2007, 2009]")
    graders = Graders(judge=judge, judge_name="small")
    assert parts(score_folder(folder, graders), "mathvista") == {
        "overall": 75,
        "figure question answering": 0,
        "geometry problem solving": 100,
        "textbook question answering": 100,
        "visual question answering": 100,
    }
    assert len(judge.asked) == 2 and "requiring" in judge.asked[0]
    again = score_folder(folder, graders)
    assert parts(again, "mathvista")["overall"] == 75 and len(judge.asked) == 2, "nothing is asked twice"
    assert parts(score_folder(folder), "mathvista")["overall"] == 75, "earlier verdicts serve without the judge"


# Drawings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    correct: bool
    reason: str


class RedIsRight:
    """A detector that finds everything in red images and nothing in others."""

    def __init__(self) -> None:
        self.num_images = 0

    def verdicts(self, images: Sequence[Tensor], metadata: Sequence[Mapping[str, Any]]) -> list[Said]:
        self.num_images += len(images)
        rights = [bool(image[0].mean() > 0.5) for image in images]
        return [
            Said(right, "" if right else f"no {row['include']}") for right, row in zip(rights, metadata, strict=True)
        ]


def test_geneval_whole(tmp_path: Path) -> None:
    asked = prompts("geneval", made.geneval_clone(tmp_path / "geneval"))
    folder = drawn(tmp_path / "out", asked, [1, 1, 1, 0, 1, 0, 0, 0], members=4)
    missing = score_folder(folder)
    assert missing.outcomes["geneval"].parts == () and "--geneval_detector" in missing.left_out["geneval"]
    detector = RedIsRight()
    graders = Graders(detector=detector, detector_name="rule")
    result = score_folder(folder, graders)
    assert parts(result, "geneval") == {"overall": 0.5, "single_object": 0.75, "color_attr": 0.25}
    assert result.scores["geneval"]["geneval"] == 0.5 == result.scores["geneval"]["score/sampled"]
    assert "right by GenEval's rules" in scores_table(result)
    lines = [json.loads(line) for line in (folder / SCORED).read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True] * 3 + [False, True] + [False] * 3
    assert lines[3]["reason"].startswith("no [") and json.loads(lines[7]["metadata"]) == GENEVAL[1]
    assert [row[1:] for row in results_of(folder / SCORED)][:1] == [(1.0, "single_object")], (
        "as summary_scores.py reads"
    )
    # Images of the same pixels for the same prompt are looked at once.
    assert detector.num_images == 4
    score_folder(folder, graders)
    assert detector.num_images == 4 and parts(score_folder(folder), "geneval")["overall"] == 0.5
    (folder / GENEVAL_RESULTS).write_text('{"tag": "single_object", "correct": false}\n')
    assert "0.000 by GenEval's own scorer" in " ".join(score_folder(folder).outcomes["geneval"].remarks)
    few = Graders(detector=Few(), detector_name="few")
    with pytest.raises(EvaluationError, match="gave 0 verdicts"):
        score_folder(folder, few)


class Few:
    def verdicts(self, images: Sequence[Tensor], metadata: Sequence[Mapping[str, Any]]) -> list[Said]:
        return []


def test_geneval_by_a_real_detector(tmp_path: Path) -> None:
    """OWLv2 and CLIP of random weights, of transformers' own classes."""
    geneval = pytest.importorskip("syncr1.engine.rewards.images.geneval")
    small = pytest.importorskip("small_detectors")
    names = [str(make(tmp_path / make.__name__)) for make in (small.small_owlv2, small_clip)]
    asked = prompts("geneval", made.geneval_clone(tmp_path / "geneval"))
    folder = drawn(tmp_path / "out", asked, [0.9, 0.1])
    graders = Graders(detector=geneval.GenEval.from_pretrained(*names), detector_name=names[0])
    result = score_folder(folder, graders)
    assert list(parts(result, "geneval")) == ["overall", "single_object", "color_attr"] and result.left_out.keys() == {
        "clip_t"
    }
    lines = [json.loads(line) for line in (folder / SCORED).read_text().splitlines()]
    assert all(line["correct"] or "expected" in line["reason"] for line in lines) and len(lines) == 2


def test_dpg_by_the_judge(tmp_path: Path) -> None:
    asked = prompts("dpg", made.dpg_clone(tmp_path / "ella"))
    folder = drawn(tmp_path / "out", asked, [1.0, 0.0, 0.5, 0.5, 1.0, 1.0], members=2)
    judge = Judge(lambda question, image: "0" if "red?" in question and image[0].mean() < 0.5 else "1")
    result = score_folder(folder, Graders(judge=judge, judge_name="small"))
    # Prompt 1: all of three, and one of three, as the third hangs on the second; prompt 10: all; the other has none.
    assert parts(result, "dpg") == {
        "overall": 100 * (2 / 3 + 1) / 2,
        "attribute": 50,
        "entity": 100,
        "global": 100,
        "relation": 100,
    }
    assert len(judge.asked) == 7 and "not mPLUG-large" in result.outcomes["dpg"].remarks[0], "equal images once"
    silent = Judge(lambda question, image: "perhaps")
    unread = score_folder(folder, Graders(judge=silent, judge_name="other"))
    assert unread.left_out["dpg"].startswith("no answer to 8 of 8") and unread.outcomes["dpg"].parts == ()
    (tmp_path / "ella" / "dpg_bench" / "dpg_bench.csv").unlink()
    bare = prompts("dpg", tmp_path / "ella")
    without = score_folder(drawn(tmp_path / "bare", bare, [1.0] * 3), Graders(judge=judge, judge_name="small"))
    assert "dpg_bench.csv" in without.left_out["dpg"]


@pytest.mark.parametrize("verified", [False, True])
def test_wise_by_the_judge(verified: bool, tmp_path: Path) -> None:
    asked = prompts("wise", made.wise(tmp_path / "data", verified=verified))
    folder = drawn(tmp_path / "out", asked, [1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    graded = {
        False: ("consistency: 0\nrealism: 1\nbeauty: 0", "consistency: 2\nrealism: 2\nbeauty: 2"),
        True: ("0", "1"),
    }
    judge = Judge(lambda question, image: graded[verified][int(image[0].mean() > 0.5)])
    assert "no judge" in score_folder(folder).left_out["wise"]
    result = score_folder(folder, Graders(judge=judge, judge_name="small"))
    low, (time, chemistry) = (0.0, (0.12, 0.12)) if verified else (0.1, (0.167, 0.1))
    culture = (1 + low) / 2
    assert parts(result, "wise") == {
        "overall": (0.4 * culture + time * 1 + chemistry * low) / (0.4 + time + chemistry),
        "culture": culture,
        "time": 1.0,
        "chemistry": low,
    }
    outcome = result.outcomes["wise"]
    assert outcome.benchmark == ("WISE Verified" if verified else "WISE") and "space, biology" in outcome.remarks[1]
    assert all("This refers to" in question for question in judge.asked)
    (line,) = compare(folder, read_complete(folder), result)
    assert {row.score for row in line.published if not row.part} == (
        {"0.2650", "0.3340"} if verified else {"0.26", "0.35", "0.33"}
    )


def test_compbench_by_the_judge(tmp_path: Path) -> None:
    asked = prompts("t2i_compbench", made.compbench(tmp_path / "t2i"))
    folder = drawn(tmp_path / "out", asked, [1.0, 0.0, 1.0])
    judge = Judge(lambda question, image: "5" if image[0].mean() > 0.5 else "2")
    result = score_folder(folder, Graders(judge=judge, judge_name="small"))
    assert parts(result, "t2i_compbench") == {"mean of categories": (0.625 + 1) / 2, "color": 0.625, "numeracy": 1.0}
    assert "in the colour that is named" in judge.asked[0] and "in the numbers" in judge.asked[2]


def test_exports_are_what_their_programs_read(tmp_path: Path) -> None:
    asked = prompts("wise", made.wise(tmp_path / "data"))
    items = read_complete(drawn(tmp_path / "out", asked, [0.1] * 6))
    assert "gpt_eval.py" in export(items, tmp_path / "out", "wise", tmp_path / "wise", model="m")
    assert sorted(path.name for path in (tmp_path / "wise").iterdir()) == [
        f"{n}.png" for n in sorted(map(str, (1, 2, 401, 402, 999, 1000)))
    ]
    twice = read_complete(drawn(tmp_path / "twice", asked, [0.1] * 12, members=2))
    with pytest.raises(EvaluationError, match="--images_per_prompt 1"):
        export(twice, tmp_path / "twice", "wise", tmp_path / "w2", model="m")
    asked = prompts("t2i_compbench", made.compbench(tmp_path / "t2i"))
    items = read_complete(drawn(tmp_path / "comp", asked, [0.1] * 6, members=2))
    export(items, tmp_path / "comp", "t2i_compbench", tmp_path / "samples", model="m")
    found = sorted(str(path.relative_to(tmp_path / "samples")) for path in (tmp_path / "samples").rglob("*.png"))
    assert found[:2] == [f"color/samples/a green bench and a blue bowl_00000{n}.png" for n in (0, 1)]
    assert found[2] == "color/samples/a red white car_000002.png" and len(found) == 6
    with pytest.raises(EvaluationError, match="none of the items"):
        export(items, tmp_path / "comp", "wise", tmp_path / "no", model="m")


def test_items_of_no_benchmark_stay_as_they_were(tmp_path: Path) -> None:
    asked = [Prompt(id="qa/0", task="qa", text="?", segments=("text",), answer="red")]
    result = score_folder(answered(tmp_path / "out", asked, {"0": "red"}))
    assert result.outcomes == {} and result.scores["qa"]["accuracy/greedy"] == 1.0
    assert "benchmarks" not in json.loads((tmp_path / "out" / "scores.json").read_text())
    assert not math.isnan(result.summary["understanding/greedy"])
