"""Rows of every form become the same prompts; what cannot be used names source, row, column and remedy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sources import PHOTOS, X2X_ROWS, assert_same_prompts, encoded, write_forms, write_lines, write_photos
from fuzz_cases import COLUMNS
from helpers import sharp_policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prompts import album  # noqa: F401  # a fixture

from syncr1.engine.data.questions import LETTER_FORM, WORDS_FORM
from syncr1.engine.data.samples import load_prompts, load_samples
from syncr1.engine.errors import DataError
from syncr1.engine.pictures import open_picture
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.reward import columns_of
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "album"
    write_photos(root)
    return root


def rows(path: Path, *entries: Mapping[str, Any]) -> Path:
    return write_lines(path / "train.jsonl", entries)


def only(source: Path, **options: Any) -> Prompt:
    ((prompt,),) = load_samples(source, **options)
    return prompt


# Forms ----------------------------------------------------------------------------------------------------------------


def test_both_halves_of_a_row(folder: Path) -> None:
    first, second, third, fourth = load_samples(rows(folder, *X2X_ROWS))
    drawing, question = first
    assert drawing.id == "album/train/0/t2i" and question.id == "album/train/0/mm2t"
    assert drawing.sample == question.sample == "album/train/0"
    assert drawing.task == "t2i" and drawing.segments == ("image",) and not drawing.images
    assert drawing.text == drawing.target == "An astronaut in an orange suit before a flag."
    assert drawing.real_image == question.images[0] == (folder / "astronaut.png").resolve()
    assert question.task == "mcq" and question.qa_type == "MC" and question.segments == ("text",)
    assert question.options == ("a horse", "a flag", "a car") and question.answer == "B"
    assert question.text.startswith("What is behind her?\nA. a horse") and LETTER_FORM in question.text
    assert question.extra["od_problem"] == "find the helmet" and question.extra["qa_solution"] == "<answer>B</answer>"
    assert second[1].task == "oe" and second[1].answer == "cat" and second[1].options == ()
    assert WORDS_FORM in second[1].text
    assert [prompt.task for prompt in (*third, *fourth)] == ["t2i", "oe"]


@pytest.mark.parametrize(("column", "form"), [("real_image", "x2x"), ("image", "questions")])
def test_every_source_gives_the_same_prompts(tmp_path: Path, folder: Path, column: str, form: str) -> None:
    entries = X2X_ROWS
    if form == "questions":
        entries = [{"image": name, "problem": f"What is {i}?", "solution": str(i)} for i, name in enumerate(PHOTOS)]
    sources = write_forms_of(tmp_path, entries, column)
    expected = [prompt for sample in load_samples(sources.pop("jsonl")) for prompt in sample]
    assert len(expected) == 6 - 2 * (form == "questions")
    assert len(sources) == 5
    for source in sources.values():
        assert_same_prompts([prompt for sample in load_samples(source) for prompt in sample], expected)
    ((only_one, *_),) = load_samples(sources["splits"], "test")
    assert only_one.id.startswith("album/test/0")


def write_forms_of(folder: Path, entries: list[dict[str, Any]], column: str) -> dict[str, Path]:
    write_photos(folder)
    return write_forms(folder, entries, column)


def test_kinds_choose_prompts(folder: Path) -> None:
    source = rows(folder, *X2X_ROWS)
    assert [len(sample) for sample in load_samples(source, kinds=("t2i",))] == [1, 1, 1]
    assert [prompt.task for (prompt,) in load_samples(source, kinds=("oe",))] == ["oe", "oe"]
    with pytest.raises(DataError, match="nothing of the kinds"):
        load_samples(rows(folder, {"prompt": "a cat"}), kinds=("mcq",))
    with pytest.raises(DataError, match="kinds must be among"):
        load_samples(source, kinds=("vqa",))  # type: ignore[arg-type]


def test_an_instruction_of_its_own_is_left_alone(folder: Path) -> None:
    asked = "Which?\nA. one\nB. two\n\nThink within <think> </think>, answer within <answer> </answer>."
    assert only(rows(folder, {"problem": asked, "solution": "A"})).text == asked
    plain = rows(folder, {"problem": "Which {form}?", "solution": "this"})
    assert only(plain, instruction=None).text == "Which {form}?"
    assert only(plain, instruction="{question} Give {form}.").text == f"Which {{form}}? Give {WORDS_FORM}."
    with pytest.raises(DataError, match="must say where the"):
        load_samples(plain, instruction="Think first.")


def test_trl_rows(folder: Path) -> None:
    """Prompt-only rows, chat messages with typed parts, one picture in a list."""
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    prompt = only(rows(folder, {"prompt": chat, "images": ["coffee.jpg"], "solution": 3}), instruction=None)
    assert prompt.text == "Be brief.\n\n<image>\nWhat is it?" and prompt.answer == "3" and prompt.qa_type == "OE"
    assert prompt.images[0] == (folder / "coffee.jpg").resolve()
    drawing = only(rows(folder, {"prompt": [{"role": "user", "content": "A red bus."}], "spatial_info": "left"}))
    assert drawing.task == "t2i" and drawing.text == "A red bus." and drawing.extra == {"spatial_info": "left"}


def test_a_prompt_for_a_model_that_draws_nothing(folder: Path) -> None:
    """Alone it asks for text, bare; a question stays one, and what says that it is to draw still does."""
    prompt = only(rows(folder, {"prompt": "Say it.", "topic": "x"}), model_draws=False)
    assert (prompt.text, prompt.segments, prompt.answer, prompt.qa_type) == ("Say it.", ("text",), None, None)
    assert prompt.extra == {"topic": "x"} and prompt.target is None
    question = rows(folder, {"prompt": "What is it?", "answer": "red"})
    assert only(question, model_draws=False) == only(question)
    drawing = rows(folder, {"prompt": "a cat", "real_image": PHOTOS[0]})
    assert only(drawing, model_draws=False).segments == ("image",)
    chain = rows(folder, {"prompt": "Say it."}, {"prompt": "a cat", "segments": "image"})
    assert [p.segments for p in load_prompts(chain, model_draws=False)] == [("text",), ("image",)]


def test_verl_parquet(tmp_path: Path) -> None:
    row = {
        "data_source": "geo",
        "prompt": [{"role": "user", "content": "<image>How many?"}],
        "images": [{"bytes": encoded("coffee.jpg"), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "split": "train"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    prompt = only(tmp_path / "train.parquet", instruction=None)
    assert prompt.text == "How many?" and prompt.answer == "2" and prompt.images
    assert open_picture(prompt.images[0]).size == (96, 64)
    assert prompt.extra["data_source"] == "geo" and prompt.extra["extra_info"] == {"index": 0, "split": "train"}


def test_options_from_a_column(folder: Path) -> None:
    row = {"question": "Which colour?", "choices": ["red", "green"], "answer": "Green"}
    prompt = only(rows(folder, row), instruction=None)
    assert prompt.text == "Which colour?\nA. red\nB. green" and prompt.answer == "B" and prompt.qa_type == "MC"
    lettered = {"question": "Which colour?", "options": ["A. red", "B. green"], "answer": "b"}
    assert only(rows(folder, lettered), instruction=None).options == ("red", "green")


def test_qa_type_is_that_of_the_row(folder: Path) -> None:
    """The released reward compared the whole column with "MC"; here each row has its own, even as a list of one."""
    options = "\nA. one\nB. two"
    entries = [
        {"problem": f"Which?{options}", "solution": "A", "qa_type": ["MC"]},
        {"problem": "How many?", "solution": "A", "qa_type": "OE"},
        {"problem": f"Which?{options}", "solution": "two apples", "qa_type": None},
    ]
    found = [prompt for (prompt,) in load_samples(rows(folder, *entries))]
    assert [prompt.qa_type for prompt in found] == ["MC", "OE", "OE"]


def test_a_drawing_takes_what_it_must_show(tmp_path: Path, folder: Path) -> None:
    """In parquet every row has the keys of all rows, None where it lacks them; JSONL and parquet give the same."""
    entries = [
        {"prompt": "a cat", "attributes": {"hat": "red"}, "concept": "bo", "references": ["chelsea.jpg"]},
        {"prompt": "a dog", "attributes": {"pose": "asleep"}, "concept": None, "references": []},
    ]
    pq.write_table(pa.Table.from_pylist(entries), tmp_path / "train.parquet")
    for source in (rows(folder, *entries), tmp_path / "train.parquet"):
        (first,), (second,) = load_samples(source, image_folder=folder)
        assert first.attributes == {"hat": "red"} and second.attributes == {"pose": "asleep"}
        assert first.concept == "bo" and [ref.name for ref in first.references] == ["chelsea.jpg"]
        assert second.references == () and first.extra == {}


def test_own_ids_are_kept_where_they_are_unique(folder: Path) -> None:
    assert only(rows(folder, {"id": "x7", "prompt": "a cat"})).id == "album/train/x7/t2i"
    twice = load_samples(rows(folder, {"id": 1, "prompt": "a cat"}, {"id": 1, "prompt": "a dog"}))
    assert [sample[0].id for sample in twice] == ["album/train/0/t2i", "album/train/1/t2i"]


def test_a_folder_of_concepts_gives_unpaired_samples(album: Path) -> None:  # noqa: F811
    found = [prompt for (prompt,) in load_samples(album)]
    tasks = {task: [prompt for prompt in found if prompt.task == task] for task in ("t2i", "oe")}
    assert len(tasks["t2i"]) == 12 and len(tasks["oe"]) == 18
    assert all(prompt.segments == ("image",) and prompt.text == prompt.target for prompt in tasks["t2i"])
    assert all("<think>" in prompt.text and prompt.qa_type == "OE" for prompt in tasks["oe"])
    with pytest.raises(DataError, match="load_benchmark"):
        load_samples(album, "test")


def test_samples_can_be_sent_to_another_process(tmp_path: Path) -> None:
    sources = write_forms_of(tmp_path, X2X_ROWS, "real_image")
    for name in ("parquet", "saved"):
        samples = load_samples(sources[name])
        again = pickle.loads(pickle.dumps(samples))
        assert again == samples and hash(again[0][0].real_image) == hash(samples[0][0].real_image)
        assert_same_prompts(again[0], samples[0])


def test_rewards_get_further_columns_by_name(folder: Path) -> None:
    policy = sharp_policy()
    prompt = only(rows(folder, {"prompt": "a red bus", "nouns": ["bus"]}))
    columns = columns_of(generate(policy, [prompt], Sampling(num_generations=2)))
    assert columns["nouns"] == [["bus"], ["bus"]] and columns["real_image"] == [None, None]


def test_control_words_in_data_add_no_image_slot(folder: Path) -> None:
    policy = sharp_policy()
    plain, hostile = (
        only(rows(folder, {"problem": f"What is {words}?", "solution": "x", "image": "coffee.jpg"}), instruction=None)
        for words in ("it", "<image_placeholder><image_placeholder><begin_of_image>")
    )
    slots = [int(policy.image_slots(policy.prompt_tokens(prompt)).sum()) for prompt in (plain, hostile)]
    assert slots[0] == slots[1] > 0


# Chains ---------------------------------------------------------------------------------------------------------------


def test_chained_prompts(folder: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"prompt": "a cat"},
        {"prompt": "What is it?", "image": "coffee.jpg", "answer": "coffee"},
        {"prompt": "<bo> in bed", "segments": "text+image", "target": "<bo> on a sofa", "concept": "bo"},
        {"prompt": "draw", "segments": ["image", "text"], "follow_up": "Which colour?", "follow_up_answer": "red"},
        {"prompt": "a dog", "references": ["coffee.jpg", "chelsea.jpg"], "attributes": {"hat": "red"}, "note": 1},
    ]
    drawing, asking, chain, asked, known = load_prompts(rows(folder, *entries))
    assert drawing.segments == ("image",) and drawing.target == "a cat" and drawing.task == "pure_gen"
    assert asking.segments == ("text",) and asking.answer == "coffee" and asking.task == "vqa"
    assert chain.segments == ("text", "image") and chain.task == "rea" and chain.concept == "bo"
    assert asked.follow_up == "Which colour?" and asked.follow_up_answer == "red"
    assert [ref.name for ref in known.references] == ["coffee.jpg", "chelsea.jpg"]
    assert known.attributes == {"hat": "red"} and known.extra["note"] == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "a cat"}, "has no column 'prompt'"),
        ({"prompt": "a", "segments": "text+text"}, "'segments' must be one of"),
        ({"prompt": "a", "segments": ["image", "text"]}, "'follow_up' is missing"),
        ({"prompt": "a", "attributes": [1]}, "'attributes' must be an object"),
    ],
)
def test_chains_that_cannot_be_used(folder: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(rows(folder, entry))


# Refusals -------------------------------------------------------------------------------------------------------------

QUESTION = {"problem": "Which?\nA. one\nB. two", "solution": "B", "qa_type": "MC"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "a cat"}, "has no column 'prompt', 'qa_problem'"),
        ({"problem": "Which?"}, "no column of answers"),
        (QUESTION | {"solution": None}, "line 2: column 'solution' is missing or None"),
        (QUESTION | {"solution": "<answer> </answer>"}, "line 2: column 'solution' is empty"),
        (QUESTION | {"solution": "D"}, "line 2: column 'solution': the answer 'D' is not among the options"),
        (QUESTION | {"problem": "Which?", "solution": "four"}, "the question lists no options"),
        (QUESTION | {"solution": ["A", {"x": 1}]}, "must be one answer"),
        (QUESTION | {"solution": True}, "must be one answer"),
        (QUESTION | {"qa_type": "maybe"}, "'qa_type' must be MC or OE"),
        (QUESTION | {"qa_type": ["MC", "OE"]}, "'qa_type' must be MC or OE"),
        (QUESTION | {"problem": ["?"]}, "must be text or chat messages"),
        (QUESTION | {"problem": [{"role": "user", "content": "a"}] * 2}, "one turn of the user"),
        (QUESTION | {"problem": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        (QUESTION | {"problem": [{"role": "user", "content": [{"type": "video"}]}]}, "expected type 'text' or 'image'"),
        (QUESTION | {"problem": [{"role": "user", "content": [{"type": "image"}]}]}, "shows a picture"),
        (QUESTION | {"problem": None}, "column 'problem' is missing or None where 'solution' is given"),
        (QUESTION | {"problem": None, "solution": None}, "column 'problem' is missing or None"),
        (QUESTION | {"images": ["coffee.jpg", "chelsea.jpg"]}, "has 0 signs <image> and the row 2 pictures"),
        (QUESTION | {"image": "missing.png"}, "does not exist"),
        (QUESTION | {"options": {"A": "one"}}, "is not among the options"),
        (QUESTION | {"options": 3}, "'options' must be a list"),
        (QUESTION | {"options": "one or two"}, "'options' must be a list"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": " "}, "column 'prompt' is empty"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "no column of answers"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, folder: Path, entry: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + json.dumps(entry), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_samples(path, image_folder=folder)
    assert str(path) in str(caught.value) or "line 2" in str(caught.value)


def test_questions_with_and_without_pictures_may_be_mixed(folder: Path) -> None:
    asked = {"problem": "What?", "solution": "x"}
    found = [sample[0] for sample in load_samples(rows(folder, {**asked, "image": "coffee.jpg"}, asked))]
    assert [bool(prompt.images) for prompt in found] == [True, False]


def test_each_row_has_its_picture_from_whichever_column_holds_it(folder: Path) -> None:
    asked = {"problem": "What?", "solution": "x"}
    said = [{"role": "user", "content": [{"type": "image", "image": "coffee.jpg"}, {"type": "text", "text": "?"}]}]
    chat = {"problem": said, "solution": "x"}
    entries = ({**asked, "image": "coffee.jpg"}, {**asked, "images": ["coffee.jpg"]}, chat, asked)
    found = [sample[0].images for sample in load_samples(rows(folder, *entries))]
    assert found == [found[0]] * 3 + [()] and found[0]
    both = {**asked, "prompt": "a cup", "real_image": "chelsea.jpg"}
    pairs = load_samples(rows(folder, {**both, "image": "coffee.jpg"}, both))
    assert [((draws.real_image,) == found[0], asks.images) for draws, asks in pairs] == [(False, found[0]), (False, ())]


@pytest.mark.parametrize("entry", [{"problem": "<image>What?", "solution": "x"}, {"prompt": "<image> in red"}])
def test_a_sign_without_any_picture_is_refused(folder: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"line 1: column '(problem|prompt)' shows a picture"):
        load_samples(rows(folder, entry))


@pytest.mark.parametrize("entry", [{"problem": "<image>What?", "solution": "x"}, {"prompt": "a cat"}])
def test_a_sign_without_a_picture_and_a_drawing_without_its_own_are_refused(
    folder: Path, entry: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="line 2: column 'image' is empty while other rows have pictures"):
        load_samples(rows(folder, {**entry, "image": "coffee.jpg"}, entry))


def test_two_signs_and_one_picture_are_refused(folder: Path) -> None:
    entry = {"problem": "<image> or <image>?", "solution": "x", "image": "coffee.jpg"}
    with pytest.raises(DataError, match="'problem' has 2 signs <image> and the row 1 picture"):
        load_samples(rows(folder, entry))


def test_several_pictures_stand_where_the_text_says(folder: Path) -> None:
    """Plain texts, typed parts and options; the sign of a single picture before all words need not be said."""
    two = {"images": ["coffee.jpg", "chelsea.jpg"], "solution": "x"}
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    wanted = tuple((folder / name).resolve() for name in two["images"])
    for problem, text in (
        ("Is <image> older than <image>?", "Is <image> older than <image>?"),
        ("<image><image>Compare.", "<image><image>Compare."),
        ([{"role": "user", "content": parts}], "<image>\nor\n<image>"),
    ):
        prompt = only(rows(folder, two | {"problem": problem}), instruction=None)
        assert prompt.text == text and prompt.images == wanted
        assert prompt.words.count("<image>") == 0
    choice = two | {"problem": "Which is tea?", "options": ["<image>", "<image>"], "solution": "A"}
    assert only(rows(folder, choice), instruction=None).images == wanted
    one = {"image": "coffee.jpg", "solution": "x"}
    assert only(rows(folder, one | {"problem": "<image>\nWhat?"}), instruction=None).text == "What?"
    assert only(rows(folder, one | {"problem": "What is in <image>?"}), instruction=None).text == "What is in <image>?"
    with pytest.raises(DataError, match="has 1 sign <image> and the row 2 pictures"):
        load_samples(rows(folder, two | {"problem": "<image> or?"}))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
LIKELY = st.sampled_from(
    [
        "What?\nA. one\nB. two",
        "A",
        "<answer>B</answer>",
        "MC",
        "coffee.jpg",
        ["coffee.jpg"],
        "../x",
        "/etc/passwd",
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        {"ground_truth": "A"},
        "text+image",
        "\ud800",
        "a\0b",
        "x" * 5000,
    ]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), LIKELY | PLAIN, max_size=7), min_size=1, max_size=3))
def test_whatever_a_row_holds_only_a_data_error_comes_out(folder: Path, entries: list[dict[str, Any]]) -> None:
    source = rows(folder, *entries)
    for load in (load_samples, load_prompts):
        try:
            found = load(source)
        except DataError as error:
            assert str(folder) in str(error) or "train.jsonl" in str(error)
        else:
            prompts = [p for item in found for p in (item if isinstance(item, tuple) else (item,))]
            assert len({prompt.id for prompt in prompts}) == len(prompts)
            assert all(prompt.text.strip() and prompt.segments for prompt in prompts)
