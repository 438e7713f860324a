"""The world of handwritten digits: its pictures, questions, folder, readers and base."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from helpers import ROOT

from syncr1.engine.data.faults import Faults
from syncr1.engine.data.loaded import load_chains
from syncr1.engine.evaluate.sources import load_items
from syncr1.engine.methods.data_checks import check_attributes
from syncr1.engine.methods.data_names import EMBEDDED
from syncr1.engine.methods.trained_with import world_of_model
from syncr1.engine.pictures import load_pictures
from syncr1.engine.world.digits.digit_items import RECKON, RESULT, TASKS, pairs_of, stream, vocabulary
from syncr1.engine.world.digits.digit_readers import KNOWN, NearestDigit, table_of, train_digit_cnn
from syncr1.engine.world.digits.digits_base import DigitsBaseSettings, NoisyWriter, train_digits_base
from syncr1.engine.world.digits.folder import NUM_ITEMS, write_digits
from syncr1.engine.world.digits.handwriting import FILE, NAMES, alone, handwriting, rows_of, sheet
from syncr1.engine.world.texts import split_words
from syncr1.engine.world.tiny_janus import build_policy
from syncr1.engine.world.vq import load_vq, round_trip
from syncr1.engine.world.worlds import WORLDS, world_of


def test_the_data_are_those_of_scikit_learn_and_each_picture_is_on_one_side() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    ink, digits = handwriting()
    known = datasets.load_digits()
    assert torch.equal(ink * 16, torch.tensor(known.images).float())
    assert digits.tolist() == known.target.tolist()
    train, test = rows_of("train"), rows_of("test")
    rows = [row for split in (train, test) for own in split.values() for row in own]
    assert sorted(rows) == list(range(1797))
    assert all(int(digits[row]) == digit for split in (train, test) for digit, own in split.items() for row in own)
    assert all(0.24 < len(test[digit]) / (len(test[digit]) + len(train[digit])) < 0.26 for digit in range(10))


def test_pictures_have_the_digit_within_a_margin() -> None:
    one, four = alone(0), sheet([0, 1, 2, 3])
    assert one.shape == four.shape == (32, 32, 3) and one.dtype == four.dtype == np.uint8
    assert one.max() > 200 and not one[:2].any() and not one[:, -2:].any()
    quarter = four[16:, :16]
    assert quarter.max() > 200 and not quarter[0].any() and not quarter[:, -1].any()


def test_questions_have_right_answers_and_known_words() -> None:
    words = set(vocabulary())
    for split in ("train", "test"):
        for task in TASKS:
            for item in islice(stream({task: 1.0}, 0, split), 60):
                assert set(split_words(item.question)) <= words, item.question
                assert (item.photo is not None) == (task in ("read", "count"))
                assert item.answer is None or item.answer in NAMES
                if item.answer is not None and item.digit is not None:
                    assert NAMES[item.digit] == item.answer
                if task == "reckon":
                    a, b = (NAMES.index(word) for word in split_words(item.question) if word in NAMES)
                    assert item.digit in {RESULT[kind](a, b) for kind in RECKON}
    assert {len(pairs_of(kind)) for kind in RECKON} == {55, 100}


def test_what_is_counted_is_there() -> None:
    """A reader of the small digits finds as many above the limit as the answer says."""
    ink, digits = handwriting()
    for seed in range(8):
        (item,) = islice(stream({"count": 1.0}, seed, "train"), 1)
        assert item.photo is not None
        limit = next(NAMES.index(word) for word in split_words(item.question) if word in NAMES)
        found = []
        for top in (0, 16):
            for left in (0, 16):
                part = torch.from_numpy(item.photo[top : top + 16, left : left + 16, 0].copy()).float() / 255
                small = torch.nn.functional.interpolate(part[None, None, 1:-1, 1:-1], size=(8, 8), mode="area")[0, 0]
                found.append(int(digits[(ink - small).square().sum((1, 2)).argmin()]))
        assert sum(digit > limit for digit in found) == NAMES.index(item.answer or "")


def test_the_folder_is_a_table_that_both_halves_are_read_from(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits")
    loaded = load_chains(tmp_path / "digits", faults=Faults())
    assert len(loaded.prompts) == len(TASKS) * NUM_ITEMS["train"] and not loaded.unused
    assert {task: len(prompts) for task, prompts in loaded.held_out.items()} == dict.fromkeys(TASKS, NUM_ITEMS["test"])
    check_attributes(loaded.everything(), "digits")
    assert world_of(p.attributes for p in loaded.prompts if p.attributes) is WORLDS["digits"]
    reading = next(prompt for prompt in loaded.prompts if prompt.task == "read")
    assert reading.segments == ("text", "image") and reading.attributes == {"digit": reading.answer}
    assert load_pictures(list(reading.images), 32)[0].shape == (3, 32, 32)
    rows = [json.loads(line) for line in (tmp_path / "digits" / "test.jsonl").read_text().splitlines()]
    assert all(row["segments"] == "text" for row in rows if row["task"] == "read")
    scored = load_items(tmp_path / "digits")  # as recipes/evaluate.py and recipes/sample.py read it
    assert {task: len(prompts) for task, prompts in scored.items()} == dict.fromkeys(TASKS, NUM_ITEMS["test"])
    assert scored["reckon"][0].segments == ("text", "image")


def test_the_worlds_are_told_apart() -> None:
    assert world_of([{"digit": "seven"}]) is WORLDS["digits"]
    assert world_of([{"shape": "round", "place": "moon"}]) is WORLDS["rendered"]
    assert world_of([{"digit": "seven"}, {"shape": "round"}]) is None and world_of([]) is None


def test_two_readers_tell_held_out_digits_through_the_tokenizer() -> None:
    """Few steps: the whole training reads 99 % of them."""
    vq = load_vq(FILE.parent)
    pictures, digits = table_of("test", 10)
    seen = round_trip(vq, pictures)
    nearest = NearestDigit(table_of("train", KNOWN)[0])
    assert (nearest.read_indices(seen)[:, 0] == digits).float().mean() > 0.9
    posterior = nearest.posterior(seen)["digit"]
    torch.testing.assert_close(posterior.sum(1), torch.ones(len(digits)))
    state = torch.get_rng_state()
    cnn = train_digit_cnn(lambda some: some, steps=60)
    assert torch.equal(torch.get_rng_state(), state)
    assert (cnn.read_indices(seen)[:, 0] == digits).float().mean() > 0.8


def test_the_base_repeats_and_is_noisy() -> None:
    settings = DigitsBaseSettings(steps=2, batch=4, item_pool=40, hands=2)
    first, second = (train_digits_base(settings).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    policy = build_policy([" ".join(vocabulary())] * 20, [], seed=0, image_tokenizer=FILE.parent)
    writer = NoisyWriter(policy, DigitsBaseSettings(item_pool=400, hands=2))
    items = [item for item in writer._pool if item.task == "read"]
    right = np.mean([writer._told(item) == item.answer for item in items for _ in range(4)])
    assert 0.6 < right < 0.85


def test_a_run_of_digits_is_planned_and_its_model_is_asked_about_digits(tmp_path: Path) -> None:
    out, _ = warm.run(str(ROOT / "recipes" / "sync_r1.py"), "--world", "digits", "--dry_run")
    assert "800 prompts, 0 anchors" in out
    prompts, anchors = EMBEDDED["digits"]
    assert (prompts, anchors) == (len(TASKS) * NUM_ITEMS["train"], 0)
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("world: digits\n")
    assert world_of_model(tmp_path / "checkpoints" / "last") == "digits"
    assert world_of_model(tmp_path / "checkpoints" / "last", "rendered") == "rendered"
    assert world_of_model(None) == world_of_model("org/name") == "rendered"
