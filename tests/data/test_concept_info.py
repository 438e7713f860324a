"""What info.json tells of concepts: in questions, in drawing turns, in R_txt; found, checked and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import sharp_policy
from made import world_folder
from test_prompts import EXPLICIT, IMPLICIT, album, copy, edit, write  # noqa: F401  # fixtures

from syncr1.engine.data.concept_info import meant_by, told_of
from syncr1.engine.data.faults import STRICT, Faults
from syncr1.engine.data.loaded import load_chains
from syncr1.engine.data.prompts import load_benchmark, load_training_prompts
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.text import brier_among, text_reward
from syncr1.engine.rewards.reward import columns_for
from syncr1.engine.rollout.drawing_turn import DrawingTurns


@pytest.fixture
def told(copy: Path) -> Path:  # noqa: F811
    """The album with a line on how chelsea looks, and the facts of both."""
    edit(copy / "concept" / "train" / "chelsea" / "info.json", info="<chelsea> is a ginger cat.")
    return copy


def by_id(prompts: list[Prompt]) -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in prompts}


def test_a_request_is_asked_for_by_the_fact_that_it_means(told: Path) -> None:
    """Mode r as the released trainer gives it: the facts in the question, item i for request i, R_txt over all."""
    plain, prompts = by_id(load_training_prompts(told)), by_id(load_training_prompts(told, concept_info=True))
    assert plain.keys() == prompts.keys()
    facts = (
        "<chelsea> likes fish",
        "<chelsea> sleeps on a red sofa",
        "<chelsea> lives by the sea",
        "<chelsea> plays chess",
    )
    for k in range(3):
        rea, before = prompts[f"train/chelsea/rea/{k}"], plain[f"train/chelsea/rea/{k}"]
        assert rea.options == facts and rea.answer == facts[k] and rea.info == "<chelsea> is a ginger cat."
        assert rea.request == before.text and rea.request in rea.text and all(fact in rea.text for fact in facts)
        assert (rea.target, rea.references, rea.segments) == (before.target, before.references, before.segments)
        assert not before.options and not before.info and before.request is None
    rea = prompts["train/chelsea/rea/0"]
    right, wrong = text_reward(**columns_for([rea] * 2, [facts[0], facts[2]], [None] * 2))
    assert right is not None and wrong is not None and right > 2 * wrong
    assert right == brier_among(facts, 0, facts[0]), "over all facts, not of one"


def test_what_is_drawn_behind_an_answer_is_told_of_and_what_is_drawn_at_once_is_not(told: Path) -> None:
    """Mode u asks what it did; its drawing turn has the concept and how it looks."""
    plain, prompts = load_training_prompts(told), load_training_prompts(told, concept_info=True)
    for before, prompt in zip(plain, prompts, strict=True):
        if prompt.task in ("vqa", "qa", "rec"):
            assert prompt.request == before.request == f"A photo of <{prompt.concept}>."
            assert prompt.info == ("<chelsea> is a ginger cat." if prompt.concept == "chelsea" else "")
            assert replace(prompt, info="") == before
        elif prompt.task == "pure_gen":
            assert prompt == before
    turns = DrawingTurns(sharp_policy(), "sync_r1", 8)
    vqa = next(p for p in prompts if p.task == "vqa" and p.concept == "chelsea")
    assert turns.words(vqa, "Looking.") == "A photo of <chelsea>. <chelsea> is a ginger cat. Looking."
    rea = by_id(prompts)["train/chelsea/rea/0"]
    assert turns.words(rea, "fish") == "<chelsea> with its favourite food. <chelsea> is a ginger cat. fish"


def test_held_out_requests_are_written_again_in_full(told: Path) -> None:
    """As UnifyBench++ asks: scored by the explicit prompt, no fact alone, and no other task changes."""
    plain, benchmark = load_benchmark(told), load_benchmark(told, concept_info=True)
    for task, before in plain.items():
        for one, other in zip(before, benchmark[task], strict=True):
            if task not in ("rea", "dense_rea"):
                assert one == other
                continue
            assert other.answer == one.answer == one.target and other.options == ()
            assert one.text in other.text and "in full" in other.text and other.request == one.text


def test_the_fact_is_found_by_words_where_no_order_says_it(told: Path) -> None:
    """Folders with training requests of their own; what means no fact, or two alike, is asked for in full."""
    facts = ["<a> likes fish.", "", "<a> sleeps on a red sofa.", "<a> lives by the sea."]
    of = told_of({"extra_info": facts}, Path("info.json"))
    requests = [
        ("<a> in bed", "<a> on a red sofa"),
        ("<a> in red", "<a> in red, at noon"),
        ("<a>", "sea, fish"),
        ("<a>", ""),
    ]
    assert meant_by(of, requests, by_place=False) == [facts[2], "", "", ""]
    assert meant_by(of, requests, by_place=True) == facts
    assert meant_by(of, [*requests, requests[0]], by_place=True) == [facts[2], "", "", "", facts[2]]
    lists = {
        IMPLICIT: ["<chelsea> at home", "<chelsea> looks up"],
        EXPLICIT: ["<chelsea> by the sea", "<chelsea> looks up at a lamp"],
    }
    write(told / "concept" / "train" / "chelsea" / "t2i_conditions.json", lists)
    prompts = by_id(load_training_prompts(told, concept_info=True))
    at_home, looks_up = (prompts[f"train/chelsea/rea/{k}"] for k in range(2))
    assert at_home.answer == "<chelsea> lives by the sea" and len(at_home.options) == 4
    assert looks_up.answer == "<chelsea> looks up at a lamp" and not looks_up.options and "in full" in looks_up.text


def test_the_rendered_world_goes_the_same_way() -> None:
    """Its requests of favourites mean the place, those that name a place mean no fact; by default nothing is told."""
    world = world_folder()
    prompts = [p for p in load_training_prompts(world, concept_info=True) if p.task == "rea" and p.concept == "bobo"]
    places = [p for p in prompts if p.options]
    assert {p.answer for p in places} == {"the favourite place of <bobo> is the beach."} and len(places) < len(prompts)
    assert all(p.info.startswith("<bobo> is a round red") for p in prompts)
    assert not any(p.info or p.options for p in load_training_prompts(world) if p.task == "rea")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"info": ["red"]}, "'info' must be text, a line on how the concept looks, got ['red']; rewrite it"),
        (
            {"extra_info": "likes fish"},
            "'extra_info' must be a list of texts, a fact each, got 'likes fish'",
        ),
        ({"extra_info": ["likes fish", 3]}, "'extra_info' must be a list of texts"),
        ({"extra_info": {"food": "fish"}}, "'extra_info' must be a list of texts"),
    ],
)
def test_facts_that_are_none_are_a_fault_once(told: Path, changes: dict[str, Any], words: str) -> None:
    edit(told / "concept" / "train" / "chelsea" / "info.json", **changes)
    faults = Faults(keep=True)
    load_chains(told, faults=faults)
    (fault,) = faults.found
    assert words in fault and "chelsea/info.json" in fault


def test_a_folder_says_what_it_tells(told: Path) -> None:
    """And one that tells nothing trains as ever."""
    lines = load_chains(told, concept_info=True, faults=STRICT).told
    assert lines[0].endswith("info of 1 and extra_info of 2 of 2; 6 of 6 requests mean one item of it")
    assert lines[1] == "<chelsea>: info, 4 items of extra_info; 3 of 3 requests mean one of them"
    assert lines[2] == "  '<chelsea> with its favourite food' means '<chelsea> likes fish'"
    assert load_chains(told, faults=STRICT).told == []
    for name in ("chelsea", "eileen"):
        edit(told / "concept" / "train" / name / "info.json", info="", extra_info=[])
    quiet = load_chains(told, concept_info=True, faults=STRICT)
    (line,) = quiet.told
    assert line == "info.json has neither info nor extra_info of any concept: the policy is told nothing of them"
    texts = [(p.text, p.answer, p.options, p.info) for p in quiet.prompts]
    assert texts == [(p.text, p.answer, p.options, p.info) for p in load_training_prompts(told)]
