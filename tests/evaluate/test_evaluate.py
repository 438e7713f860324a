"""Metrics by hand, and a whole evaluation: a speaker of known skill on the rendered world."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch

from syncr1.engine.data.prompts import load_benchmark
from syncr1.engine.evaluate.drawing import by_task, choose, together
from syncr1.engine.evaluate.held_out import Evaluator, means, score_rollouts, summary
from syncr1.engine.evaluate.measures import accuracy, attribute_metrics, verdict, weighted_recall, words_in_place
from syncr1.engine.evaluate.tasks import chance_of, tagged_scores, text_scores
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.builtin.identity import IdentityReward
from syncr1.engine.rewards.judge.attribute_judge import index_scorer
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.show.names import AT_CHANCE, FELL, UNTRAINED
from syncr1.engine.show.scores import score_rows
from syncr1.engine.world.attributes import LOOK_INDEX, LOOKS, VALUES, Look
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.disk import write_world
from syncr1.engine.world.general import write_general

CHECKER = AttributeChecker(AttributeChecker.raw_table())
SCORERS = {"checker": index_scorer(CHECKER.read_indices, VALUES)}


def test_accuracy_and_words_in_place() -> None:
    assert accuracy("Yes.", "yes") == 1.0 and accuracy("yes", "yes it is") == 0.0
    assert words_in_place("round red crown", "round red crown") == 1.0
    assert words_in_place("round red crown", "round blue crown") == pytest.approx(2 / 3)
    assert words_in_place("round red crown", "red crown") == 0.0
    assert words_in_place("round red crown", "round red crown crown") == 0.75
    assert words_in_place("round", "") == 0.0 and words_in_place("", "") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes"), ("no, it is not", "no"), ("unknown", None), ("", None), ("Not yes", "yes"), ("是", None)],
)
def test_verdict_looks_for_words(text: str, expected: str | None) -> None:
    assert verdict(text) == expected


def test_weighted_recall_does_not_reward_always_yes() -> None:
    ids, answers = list("abcd"), ["yes"] * 3 + ["no"]
    assert weighted_recall(ids, answers, ["yes"] * 4).value == weighted_recall(ids, answers, ["yes"] * 4).chance == 0.5
    assert weighted_recall(ids, answers, ["Yes."] * 3 + ["No."]).value == 1.0
    assert weighted_recall(ids[:2], ["yes", "yes"], ["yes", "maybe"]).value == 0.5
    assert math.isnan(weighted_recall(["a"], ["perhaps"], ["yes"]).value)


def test_attribute_metrics_by_hand() -> None:
    look = LOOKS[0]
    images = [CHECKER.table[0], CHECKER.table[0]]
    other_hat = next(hat for hat in VALUES["hat"] if hat != look.hat)
    wanted = [look.to_dict(), {"hat": other_hat, "shape": look.shape}]
    measured = attribute_metrics(["a", "b"], SCORERS, images, wanted)
    metrics = {name: one.value for name, one in measured.items()}
    assert metrics["attributes/checker"] == 0.75 and metrics["all_right/checker"] == 0.5
    assert metrics["hat/checker"] == 0.5 and metrics["shape/checker"] == metrics["place/checker"] == 1.0
    assert measured["attributes/checker"].by_item == {"a": 1.0, "b": 0.5} and "place/checker" in measured
    assert measured["place/checker"].by_item == {"a": 1.0}, "what was not asked for does not count"
    assert attribute_metrics([], SCORERS, [], []) == {}
    with pytest.raises(ValueError, match="checker"):
        attribute_metrics(["a", "b"], {"checker": lambda images, wanted: torch.zeros(3)}, images, wanted)


def test_main_scores_follow_the_task() -> None:
    long = Prompt(id="0", task="vqa", text="?", answer="It is looking at the camera.")
    assert text_scores("vqa", [long], ["It is looking at a camera."])["score"].value > 0.8
    short = replace(long, answer="red")
    assert text_scores("vqa", [short], ["read"])["score"].value == 0.0
    described = Prompt(id="1", task="rea", text="?", answer="round red", attributes={"shape": "round"})
    assert text_scores("rea", [described], ["round blue"])["score"].value == 0.5
    assert text_scores("rea", [replace(described, attributes=None)], ["round red"])["score"].value == pytest.approx(1.0)
    recognised = [Prompt(id=a, task="rec", text="?", answer=a) for a in ("yes", "no")]
    assert text_scores("rec", recognised, ["yes", "yes"])["score"].value == 0.5


def test_choice_of_items_is_fixed_by_the_seed() -> None:
    prompts = [Prompt(id=str(i), task="qa", text="?") for i in range(50)]
    assert choose(prompts, 10, 0) == choose(prompts, 10, 0) != choose(prompts, 10, 1)
    assert choose(prompts, 50, 0) == prompts
    chosen = [int(p.id) for p in choose(prompts, 10, 0)]
    assert chosen == sorted(set(chosen)) and len(chosen) == 10
    both = {"vqa": prompts[:5], "qa": prompts[5:40]}
    assert together(both, 10) == [[*choose(both["qa"], 10, 0), *both["vqa"]]]
    assert by_task(both, 10, 6) == [both["vqa"], choose(both["qa"], 10, 0)[:6], choose(both["qa"], 10, 0)[6:]]


def test_questions_with_tags_are_read_from_the_tags_alone() -> None:
    said = ["<think>x</think><answer>B</answer>", "so <answer>(b) dog</answer>", "B", "<answer>A</answer>"]
    question = Prompt(id="0", task="mcq", text="?", answer="B", options=("cat", "dog"), qa_type="MC")
    asked = [replace(question, id=str(place)) for place in range(4)]
    found = tagged_scores(asked, said)
    assert {name: one.value for name, one in found.items()} == {"accuracy": 0.5, "format": 0.25, "score": 0.5}
    assert found == text_scores("mcq", asked, said) and found["score"].chance == 0.5 and found["format"].chance is None
    nothing_asked = [replace(one, answer=None, qa_type=None) for one in asked]
    assert {name: one.value for name, one in tagged_scores(nothing_asked, said).items()} == {"format": 0.25}


# A whole evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Prompt]]:
    root: Path = write_world(tmp_path_factory.mktemp("world") / "data")
    write_general(root, num_items=12)
    return load_benchmark(root)


def evaluator(benchmark: Mapping[str, Sequence[Prompt]], num_items: int = 96, **more: Any) -> Evaluator:
    """Everything in one batch; `more`: as `score_rollouts` takes it."""
    return Evaluator(
        batches=together(benchmark, num_items),
        sampling=Sampling(num_generations=1, max_text_tokens=6),
        score=partial(score_rollouts, **more),
        num_examples=2,
    )


class Speaker:
    """Knows every answer when greedy; at temperature 1 knows each `nth` item alone, says nothing to the others, and
    gives them a wrong hat."""

    def __init__(self, nth: int = 2) -> None:
        self.nth = nth
        self.calls: list[tuple[float, list[Prompt]]] = []

    def __call__(self, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        self.calls.append((temperature, list(prompts)))
        seen: dict[str, int] = {}
        rollouts = []
        for prompt in prompts:
            turn = seen[prompt.task] = seen.get(prompt.task, -1) + 1
            rollouts.append(self._answer(prompt, knows=temperature == 0 or turn % self.nth == 0))
        return rollouts

    def _answer(self, prompt: Prompt, knows: bool) -> Rollout:
        image = None
        if "image" in prompt.segments:
            values = dict(prompt.attributes or {})
            if not knows:
                values["hat"] = next(hat for hat in VALUES["hat"] if hat != values["hat"])
            image = CHECKER.table[LOOK_INDEX[Look.from_dict(values)]]
        text = (prompt.answer or "") if knows and "text" in prompt.segments else ""
        return Rollout(
            prompt=prompt,
            member=0,
            prompt_tokens=torch.arange(2),
            prompt_image=None,
            segments=(),
            text=text,
            image=image,
        )


def test_evaluation_of_a_speaker_of_known_skill(held_out: dict[str, list[Prompt]]) -> None:
    speaker = Speaker()
    identity = IdentityReward(lambda images: images.flatten(1), 32)
    result = evaluator(held_out, 12, image_scorers=SCORERS, identity=identity).of(speaker)
    scores = result.scores
    assert [temperature for temperature, _ in speaker.calls] == [0.0, 1.0]
    assert {prompt.segments for prompt in speaker.calls[0][1]} == {("text",)}, "greedy runs draw nothing"
    for task in ("vqa", "qa", "rea", "dense_rea", "general_vqa"):
        assert scores[task]["score/greedy"] == 1.0 and scores[task]["score/sampled"] == 0.5
        assert scores[task]["accuracy/greedy"] == 1.0 and scores[task]["accuracy/sampled"] == 0.5
        assert scores[task]["num_items"] == 12
    assert scores["rec"]["score/greedy"] == 1.0 and scores["rec"]["recall/greedy"] == 1.0
    for task in ("rea_gen", "dense_rea_gen", "pure_gen", "dense_gen", "general_image"):
        assert scores[task]["attributes/checker"] == pytest.approx(0.9)
        assert scores[task]["all_right/checker"] == 0.5 and scores[task]["hat/checker"] == 0.5
        assert scores[task]["score/sampled"] == pytest.approx(0.9) and "score/greedy" not in scores[task]
    assert 0.0 < scores["rea_gen"]["identity"] <= 1.0 and "identity" not in scores["general_image"]
    assert all(
        0.0 <= value <= 1.0 for metrics in scores.values() for name, value in metrics.items() if name != "num_items"
    )
    assert {len(examples) for examples in result.examples.values()} == {2}
    assert result.examples["rea"][0].image is not None and result.examples["rea"][0].text


def test_summary_keeps_general_tasks_apart(held_out: dict[str, list[Prompt]]) -> None:
    readers = SCORERS | {"cnn": SCORERS["checker"]}
    found = evaluator(held_out, 12, image_scorers=readers).of(Speaker()).summary
    assert set(found) == {
        *("understanding/greedy", "understanding/sampled", "image/checker", "image/cnn"),
        *("general_vqa/greedy", "general_vqa/sampled", "general_image/checker", "general_image/cnn"),
        *(f"{family}/all_right/{reader}" for family in ("image", "general_image") for reader in readers),
    }
    assert found["image/all_right/cnn"] == 0.5
    assert found["understanding/greedy"] == 1.0 and found["image/checker"] == pytest.approx(0.9)
    tasks = {"a": {"score/greedy": 1.0}, "b": {"score/greedy": 0.0}, "general_vqa": {"score/greedy": 0.25}}
    assert means(tasks, summary(tasks)) == {"understanding/greedy": 0.5, "general_vqa/greedy": 0.25}
    nothing = {"rec": {"score/greedy": math.nan}}
    assert means(nothing, summary(nothing)) == summary({}) == {}


def test_the_table_of_an_evaluation_that_got_worse(held_out: dict[str, list[Prompt]]) -> None:
    """Every task once, recognition among them; what fell is marked, and the same evaluation twice changes nothing."""
    score = evaluator(held_out, 12, image_scorers=SCORERS | {"cnn": SCORERS["checker"]})
    before, after = (score.of(Speaker(nth)).table for nth in (1, 2))
    rows = {row.name: row for row in score_rows(before, after)}
    assert {row.task for row in rows.values()} == {*held_out, "rea_gen", "dense_rea_gen", "summary"}
    assert [row.family for row in rows.values()][:2] == ["recognition"] * 2
    fell = {name for name, row in rows.items() if FELL in row.marks}
    assert fell == {name for name in rows if "greedy" not in name}
    assert rows["general_image/all_right/cnn"].marks == (UNTRAINED, FELL)
    assert rows["pure_gen/all_right/cnn"].change == -0.5 and rows["pure_gen/attributes/cnn"].change == pytest.approx(
        -0.1
    )
    for row in rows.values():
        assert row.num_items == 12 or row.family == "summary"
    for task in ("pure_gen", "rea_gen", "general_image"):
        whole, share = (rows[f"{task}/{name}/checker"] for name in ("all_right", "attributes"))
        assert whole.after is not None and share.after is not None and whole.after < share.after
    assert {row.change for row in score_rows(after, after)} == {0.0}
    assert {row.change_interval for row in score_rows(after, after)} == {None}


def test_guessing_is_marked(held_out: dict[str, list[Prompt]]) -> None:
    """Always yes, about photos of which half show the creature."""

    def yes(prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        return [replace(rollout, text="yes") for rollout in Speaker()(prompts, temperature)]

    rows = score_rows(None, evaluator({"rec": held_out["rec"]}, 40).of(yes).table)
    assert [(row.after, row.marks, row.chance) for row in rows if row.task == "rec"] == [(0.5, (AT_CHANCE,), 0.5)] * 2


@pytest.mark.parametrize(
    ("prompts", "chance"),
    [
        ([{"options": ("a", "b"), "qa_type": "MC"}, {"options": ("a", "b", "c", "d"), "qa_type": "MC"}], 0.375),
        ([{"answer": "Yes."}, {"answer": "no"}], 0.5),
        ([{"answer": "yes"}, {"answer": "red"}], None),
        ([{"options": ("left", "right"), "text": "left or right?"}], 0.5),
        ([{"options": ("left", "right"), "text": "where?"}], None),
        ([{"answer": "red"}], None),
        ([], None),
    ],
)
def test_what_guessing_scores(prompts: list[dict[str, Any]], chance: float | None) -> None:
    """One of the options that are shown, yes or no; where one answer is open, nobody knows."""
    made = [Prompt(**({"id": str(i), "task": "t", "text": "?", "answer": "x"} | row)) for i, row in enumerate(prompts)]
    assert chance_of(made) == chance


def test_without_attributes_there_is_bleu_and_identity(held_out: dict[str, list[Prompt]]) -> None:
    plain = {task: held_out[task][:4] for task in ("rea", "pure_gen")}
    drawn = {prompt.id: prompt.attributes for prompts in plain.values() for prompt in prompts}

    def generate(prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        known = Speaker()([replace(p, attributes=drawn[p.id]) for p in prompts], temperature)
        return [replace(rollout, prompt=prompt) for rollout, prompt in zip(known, prompts, strict=True)]

    photos = {task: [replace(p, attributes=None) for p in prompts] for task, prompts in plain.items()}
    identity = IdentityReward(lambda images: images.flatten(1), 32)
    result = evaluator(photos, image_scorers=SCORERS, identity=identity).of(generate)
    assert result.scores["rea"]["score/greedy"] == result.scores["rea"]["bleu/greedy"] == pytest.approx(1.0)
    assert result.scores["pure_gen"]["score/sampled"] == result.scores["pure_gen"]["identity"]
    assert set(result.summary) == {"understanding/greedy", "understanding/sampled", "image/identity"}


def test_generate_must_answer_what_it_was_asked(held_out: dict[str, list[Prompt]]) -> None:
    with pytest.raises(ValueError, match="one rollout per prompt"):
        evaluator(held_out, 4).of(lambda prompts, temperature: Speaker()(prompts, temperature)[:-1])
    with pytest.raises(ValueError, match="one rollout per prompt"):
        evaluator(held_out, 4).of(lambda prompts, temperature: Speaker()(prompts[::-1], temperature))


@pytest.mark.slow
def test_a_real_policy_is_scored(held_out: dict[str, list[Prompt]]) -> None:
    """An untrained tiny Janus, sampled by the engine: every task gets its scores, and nearly all of them are poor."""
    from syncr1.engine.world.attributes import CONCEPTS
    from syncr1.engine.world.texts import VOCABULARY
    from syncr1.engine.world.tiny_janus import build_policy

    policy = build_policy(VOCABULARY, [concept.name for concept in CONCEPTS], seed=0)
    first, again = (evaluator(held_out, 4, image_scorers=SCORERS)(policy) for _ in range(2))
    assert first.scores == again.scores
    assert set(first.scores) == set(held_out) | {"rea_gen", "dense_rea_gen"}
    assert first.summary["understanding/greedy"] < 0.5 and 0.0 <= first.summary["image/checker"] < 0.8
    assert all(rollout.image is not None for rollout in first.examples["pure_gen"])
