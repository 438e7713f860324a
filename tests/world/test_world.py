"""The embedded world: attributes, renders, texts, items, checker. The folder on disk is `test_world_disk.py`'s."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from syncr1.engine.world import items as tasks
from syncr1.engine.world import texts
from syncr1.engine.world.attributes import (
    ATTRIBUTES,
    CONCEPTS,
    HELD_OUT_LOOKS,
    LOOK_INDEX,
    LOOKS,
    PLACES,
    TRAIN_LOOKS,
    UNSEEN_PLACE,
    VALUES,
    Look,
)
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.render import canonical_table, render

LOOK = Look("round", "red", "crown", "striped", "beach")


def test_looks_number_360_and_their_words_go_both_ways() -> None:
    assert len(LOOKS) == len(set(LOOKS)) == 360
    for look in LOOKS:
        assert look == Look.from_dict(look.to_dict())
        assert tuple(VALUES[name][i] for name, i in zip(ATTRIBUTES, look.indices(), strict=True)) == look.words()
    assert LOOK.description() == "round red crown striped beach"


@pytest.mark.parametrize("words", ["round red crown striped mars", "red round crown striped beach"])
def test_bad_looks_are_refused(words: str) -> None:
    values = dict(zip(ATTRIBUTES, words.split(), strict=True))
    for bad in (values, {"shape": "round"}):
        with pytest.raises(ValueError, match="Look"):
            Look.from_dict(bad)


def test_concepts_are_distinct_and_use_every_value() -> None:
    bodies = [concept.look.words()[:-1] for concept in CONCEPTS]
    assert len(CONCEPTS) == 12 and len(set(bodies)) == 12
    for column, name in enumerate(ATTRIBUTES):
        assert {concept.look.words()[column] for concept in CONCEPTS} == set(VALUES[name])
    names = {concept.name for concept in CONCEPTS}
    assert all(concept.friend in names - {concept.name} for concept in CONCEPTS)


def test_held_out_looks_are_a_fifth_hold_the_unseen_places_and_leave_every_value_in_training() -> None:
    assert len(HELD_OUT_LOOKS) == 72 and not HELD_OUT_LOOKS & set(TRAIN_LOOKS)
    assert len(TRAIN_LOOKS) == 288
    for concept in CONCEPTS:
        unseen = UNSEEN_PLACE[concept.name]
        assert unseen != concept.place
        assert {place for place in PLACES if concept.look.at(place) in HELD_OUT_LOOKS} == {unseen}
    for column, name in enumerate(ATTRIBUTES):
        for split in (TRAIN_LOOKS, HELD_OUT_LOOKS):
            assert {look.words()[column] for look in split} == set(VALUES[name])


def test_rendering_is_deterministic_and_cached_read_only() -> None:
    first = render(LOOK)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(LOOK))
    np.testing.assert_array_equal(first, canonical_table()[LOOK_INDEX[LOOK]])
    varied = [render(LOOK, variation=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(varied[0], varied[1])
    assert (varied[0] != varied[2]).any() and (varied[0] != first).any()
    with pytest.raises(ValueError, match="read-only"):
        canonical_table()[0] = 0


def test_all_renders_can_be_told_apart() -> None:
    flat = canonical_table().reshape(360, -1).astype(np.float32)
    squares = (flat**2).sum(1)
    mse = (squares[:, None] + squares[None] - 2 * flat @ flat.T) / flat.shape[1]
    np.fill_diagonal(mse, np.inf)
    assert mse.min() > 200.0  # grey levels squared; sensor noise is at most 36


def test_vocabulary_is_small_and_covers_every_text() -> None:
    vocabulary = set(texts.VOCABULARY)
    assert len(vocabulary) < 150
    for split in ("train", "test"):
        items = tasks.stream(dict.fromkeys(tasks.TASKS, 1.0), seed=3, split=split)
        for item in itertools.islice(items, 300):
            assert set(texts.split_words(item.question + " " + item.answer)) <= vocabulary
            assert "{" not in item.question and 1 <= len(item.answer.split()) <= 5


def all_wordings() -> list[tuple[str, dict[str, tuple[str, ...]]]]:
    groups = {"ask": texts.ATTRIBUTE_QUESTIONS, "fact": texts.FACT_QUESTIONS, "prompt": texts.PROMPTS}
    tables = [(f"{group}/{name}", table) for group, part in groups.items() for name, table in part.items()]
    return [*tables, ("who", texts.WHO_QUESTIONS), ("rec", texts.RECOGNITION_QUESTIONS)]


def test_wordings_are_enough_split_and_made_of_trained_words() -> None:
    trained: set[str] = set()
    for _, table in all_wordings():
        for wording in table["train"]:
            trained |= set(texts.split_words(re.sub(r"\{\w+\}", " ", wording)))
    for name, table in all_wordings():
        assert len(table["train"]) >= 3 and len(table["test"]) >= 2, name
        assert not set(table["train"]) & set(table["test"]), name
        for wording in table["test"]:
            assert set(texts.split_words(re.sub(r"\{\w+\}", " ", wording))) <= trained, (name, wording)


def test_training_items_never_show_what_is_held_out() -> None:
    held = {canonical_table()[LOOK_INDEX[look]].tobytes() for look in HELD_OUT_LOOKS}
    questions: dict[str, set[str]] = {"train": set(), "test": set()}
    for split in ("train", "test"):
        for item in itertools.islice(tasks.stream(dict.fromkeys(tasks.TASKS, 1.0), seed=5, split=split), 1500):
            questions[split].add(item.question)
            if split == "train" and item.look is not None:
                assert item.look not in HELD_OUT_LOOKS
            if split == "test" and item.task == "generic_t2i":
                assert item.look in HELD_OUT_LOOKS
            if item.photo is not None:
                assert item.photo.dtype == np.uint8 and item.photo.tobytes() not in held
    assert not questions["train"] & questions["test"]


def test_training_photos_show_training_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Look] = []

    def spy(look: Look, *, variation: np.random.Generator | None = None) -> np.ndarray:
        shown.append(look)
        return render(look, variation=variation)

    monkeypatch.setattr(tasks, "render", spy)
    for _ in itertools.islice(tasks.stream(dict.fromkeys(tasks.TASKS, 1.0), seed=9), 1500):
        pass
    assert len(shown) > 500 and not set(shown) & HELD_OUT_LOOKS


def test_items_are_answered_rightly_and_repeat_with_the_seed() -> None:
    weights = dict.fromkeys(tasks.TASKS, 1.0)
    runs = [list(itertools.islice(tasks.stream(weights, seed=1), 60)) for _ in range(2)]
    assert [(i.question, i.answer) for i in runs[0]] == [(i.question, i.answer) for i in runs[1]]
    by_name = {concept.name: concept for concept in CONCEPTS}
    for item in runs[0]:
        if item.task == "personal_vqa" and item.attribute != "place":
            assert item.answer == getattr(by_name[item.concept].look, item.attribute)
        if item.task == "personal_t2i":
            assert (
                item.answer == item.look.description()
                and item.look.words()[:-1] == by_name[item.concept].look.words()[:-1]
            )
    with pytest.raises(ValueError, match="unknown tasks"):
        next(tasks.stream({"dance": 1.0}, seed=0))


def test_checker_reads_its_own_table_perfectly_and_survives_noise() -> None:
    checker = AttributeChecker(AttributeChecker.raw_table())
    table = checker.raw_table()
    assert checker.score(table, LOOKS).shape == (360, 5) and bool((checker.score(table, LOOKS) == 1).all())
    assert checker.read(table[:7]) == list(LOOKS[:7])
    noisy = (table + 0.05 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert checker.score(noisy, LOOKS).mean() == 1.0
    assert checker.score(table[:2], LOOKS[:2], attributes=("place", "hat")).shape == (2, 2)


def test_checker_scores_single_wrong_attributes_and_grades_softly() -> None:
    checker = AttributeChecker.from_round_trip(lambda images: images)
    table = checker.raw_table()
    wrong = Look("round", "blue", "crown", "striped", "beach")
    image = table[LOOK_INDEX[wrong]][None]
    assert checker.score(image, [LOOK]).tolist() == [[1, 0, 1, 1, 1]]
    posterior = checker.posterior(image)
    assert list(posterior) == list(ATTRIBUTES)
    assert all(torch.allclose(p.sum(1), torch.ones(1)) for p in posterior.values())
    half = (image + table[LOOK_INDEX[LOOK]][None]) / 2
    red = VALUES["colour"].index(LOOK.colour)
    assert posterior["colour"][0, red] < 0.5 * checker.posterior(half)["colour"][0, red]
    assert checker.posterior(half)["shape"][0, VALUES["shape"].index(LOOK.shape)] > 0.9
    assert checker.mse(image)[0, LOOK_INDEX[wrong]] < 1e-6
    torch.testing.assert_close(checker.mse(half)[0], (half - table).square().flatten(1).mean(1), atol=1e-5, rtol=1e-4)


def test_checker_refuses_wrong_shapes() -> None:
    checker = AttributeChecker(AttributeChecker.raw_table())
    with pytest.raises(ValueError, match="expected images"):
        checker.score(torch.zeros(2, 3, 32, 32), [LOOK])
    with pytest.raises(ValueError, match="expected a table"):
        AttributeChecker(torch.zeros(5, 3, 32, 32))
