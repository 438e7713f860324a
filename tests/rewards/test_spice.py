"""SPICE: graphs and F1 by hand and against FACTUAL's own evaluator, the parser on a small T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import saved, small_t5
from transformers import AutoTokenizer, T5ForConditionalGeneration

from syncr1.engine.rewards.builtin.spice import TASK, FactualParser, SceneGraph, Spice, WordNet, f_score, read_graph

SYNSETS = """\
man\n1 2\nguy\n1\nwoman\n3\nboard\n4 5\nsurfboard\n5\nride\n6\nsit_on\n7\nperch_on\n7
red\n8\ncrimson\n8\nbox\n9\nchurch\n10\nbig\n11\nlarge\n11\nhope\n12\nlady\n3\nbus\n13\nfly\n14\n"""
EXCEPTIONS = "man\nmen\nride\nrode ridden\n"
WORDNET = WordNet.from_texts(SYNSETS, EXCEPTIONS)


def graph(*facts: str) -> SceneGraph:
    return read_graph(" , ".join(f"( {fact} )" for fact in facts))


def test_graphs_are_read() -> None:
    read = read_graph("( Man , riding , surfboard ) , ( surfboard , is , Red ) , ( man , is , 2 ),(sky)")
    assert read.objects == {"man", "surfboard", "sky"}
    assert read.attributes == {("surfboard", "red"), ("man", "2")}
    assert read.relations == {("man", "riding", "surfboard")}
    assert read.tuples()[0] == ("man",) and len(read.tuples()) == 6
    assert graph("man , tall") == SceneGraph(frozenset({"man"}), frozenset({("man", "tall")}))
    assert graph("man , sits , on top of , big board").relations == {("man", "sits on top of", "big board")}
    assert graph("pigs:1 , v:fly , pigs:2").relations == {("pigs", "fly", "pigs")}
    assert graph("tv:3 , is , on").attributes == {("tv", "on")}
    cut = read_graph("( man , riding , surfboard ) , ( surfboard , is")
    assert cut == graph("man , riding , surfboard")
    assert read_graph("( man , ridi") == read_graph("man") == SceneGraph(frozenset({"man"}))
    for nothing in ("", "()", "( , , )", " , ", ") ("):
        assert read_graph(nothing) == SceneGraph()


@given(text=st.text(st.sampled_from("ab (),:1v的 \n"), max_size=40) | st.text(max_size=40))
def test_any_text_is_a_graph(text: str) -> None:
    read = read_graph(text)
    assert 0.0 <= f_score(read, read, WORDNET) <= 1.0
    assert {name for pair in read.attributes for name in pair[:1]} <= read.objects
    assert {name for triple in read.relations for name in triple[::2]} <= read.objects


def test_f_score_by_hand() -> None:
    """Four tuples against five, by equality and then with synonyms."""
    ours = graph("man , rode , board", "board , is , crimson")  # man, board, (man rode board), (board crimson)
    theirs = graph("guy , ride , surfboard", "surfboard , is , red", "surfboard , is , big")
    assert f_score(ours, theirs) == 0.0
    assert f_score(ours, theirs, WORDNET) == pytest.approx(2 * 4 / (4 + 5))
    assert f_score(graph("man , rode , board"), graph("man , rode , board", "sky")) == pytest.approx(2 * 3 / (3 + 4))
    assert (
        f_score(SceneGraph(), theirs, WORDNET)
        == f_score(ours, SceneGraph())
        == f_score(SceneGraph(), SceneGraph())
        == 0.0
    )


def test_a_tuple_is_matched_once() -> None:
    assert f_score(graph("man", "guy"), graph("man"), WORDNET) == pytest.approx(2 / 3)
    assert f_score(graph("man"), graph("man", "guy"), WORDNET) == pytest.approx(2 / 3)
    assert f_score(graph("guy , with , hat"), graph("man , with , hat"), WORDNET) == 1.0  # "with" has no synset


def test_words_have_the_synsets_of_what_they_are_forms_of() -> None:
    assert WORDNET("men") == WORDNET("man") == {1, 2} and WORDNET("Rode") == WORDNET("riding") == WORDNET("rides") == {
        6
    }
    assert WORDNET("boxes") == {9} and WORDNET("churches") == {10} and WORDNET("larger") == {11}
    assert WORDNET("hopeful") == {12} and WORDNET("ladies") == {3} and WORDNET("flies") == {14}
    assert WORDNET("sit  on") == WORDNET("perch on") == {7}
    assert WORDNET("bus") == {13} and WORDNET("boss") == WORDNET("的") == WORDNET("") == frozenset()


def test_tables_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "english.synsets").write_text(SYNSETS)
    (tmp_path / "english.exceptions").write_text(EXCEPTIONS)
    assert WordNet.from_folder(tmp_path)("men") == {1, 2}
    with pytest.raises(ValueError):
        WordNet.from_texts("man\n1\nwoman")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "factual_scene_graph", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps FactualSceneGraph"):
        WordNet.from_package()


NAMES = st.sampled_from(["man", "men", "guy", "woman", "lady", "bus", "cat", "hat", "sky", "boxes", "sofa", "couch"])
LOOKS = st.sampled_from(["red", "crimson", "big", "large", "small", "little", "standing", "2", "two", "sunny"])
LINKS = st.sampled_from(["riding", "ride", "ridden", "on", "near", "sit", "sits", "wear", "hold", "holding", "above"])
FACTS = st.lists(
    st.tuples(NAMES) | st.tuples(NAMES, st.just("is"), LOOKS) | st.tuples(NAMES, LINKS, NAMES), min_size=1, max_size=7
)


@pytest.fixture(scope="module")
def factual() -> tuple[Any, WordNet]:
    """FACTUAL's evaluator, and the table that it reads too."""
    return pytest.importorskip("factual_scene_graph.evaluation.spice_evaluation"), WordNet.from_package()


@given(ours=FACTS, theirs=FACTS)
def test_f_score_is_that_of_factuals_evaluator(
    factual: tuple[Any, WordNet], ours: list[tuple[str, ...]], theirs: list[tuple[str, ...]]
) -> None:
    """Over words that are in its table."""
    evaluator, wordnet = factual
    texts = [" , ".join(f"( {' , '.join(fact)} )" for fact in facts) for facts in (ours, theirs)]
    expected = evaluator.eval_spice(texts[0], [texts[1]], merge_tuples_synonyms=False, synonym_match=True)
    assert f_score(read_graph(texts[0]), read_graph(texts[1]), wordnet) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_t5, tmp_path_factory)


def test_parser_writes_what_the_model_says(folder: Path) -> None:
    """One caption at a time through transformers alone: the same text, whatever the batch."""
    parser = FactualParser.from_pretrained(folder, num_beams=2, batch_size=2, max_output_tokens=24)
    captions = ["a man riding a red surfboard", "two dogs", "", "a blue bus on a street", "  "]
    written = parser.write(captions)
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for caption, text in zip(captions, written, strict=True):
        if not caption.strip():
            assert text == ""
            continue
        inputs = tokenizer(TASK + caption, return_tensors="pt", truncation=True, max_length=64)
        tokens = model.generate(**inputs, num_beams=2, max_length=24, early_stopping=True)
        assert text == tokenizer.decode(tokens[0], skip_special_tokens=True).strip() != ""
    assert parser(captions) == [read_graph(text) for text in written]
    assert parser([]) == []


def test_spice_of_odd_captions(folder: Path) -> None:
    """10 000 characters, nothing, and Chinese: in range, no crash, each text parsed once."""
    parser = FactualParser.from_pretrained(folder, num_beams=1, max_output_tokens=16)
    spice = Spice(parser, WORDNET)
    (dog,) = parser(["a dog"])  # random weights, and ids that differ from one training of the tokenizer to the next
    odd = ["a red dog " * 1000, "", " \n", "一只狗在海滩上奔跑", "( ( ) , ,", "a dog"]
    values = spice(odd, ["a dog"] * len(odd))
    assert all(0.0 <= value <= 1.0 for value in values) and values[1] == values[2] == 0.0
    assert values[5] == (1.0 if dog.objects else 0.0)
    assert spice.graphs.num_computed == len(odd) and spice(odd, ["a dog"] * len(odd)) == values
    assert spice.graphs.num_computed == len(odd)
    with pytest.raises(ValueError, match="1 candidates, but 2 references"):
        spice(["a"], ["a", "b"])


def test_spice_takes_any_parser() -> None:
    spice = Spice(lambda captions: [graph(*caption.split(";")) for caption in captions], WORDNET)
    assert spice(["man , rode , board"], ["guy , ride , surfboard"]) == [1.0]
    assert spice([], []) == []
