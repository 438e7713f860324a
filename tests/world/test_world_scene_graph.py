"""Captions of the rendered world as scene graphs: every wording of a look says the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.rewards.builtin.spice import SceneGraph, Spice
from syncr1.engine.world.attributes import ATTRIBUTES, LOOKS, VALUES, Look
from syncr1.engine.world.scene_graph import CREATURE, NO_HAT, parse_caption, parse_captions
from syncr1.engine.world.texts import PROMPTS, fill
from syncr1.engine.world.tiny_blip import caption

WORDINGS = [
    wording
    for kind in ("explicit", "explicit_dense")
    for split in ("train", "test")
    for wording in PROMPTS[kind][split]  # type: ignore[index]
]


def meant(look: Look) -> SceneGraph:
    """The graph of a look, put together from its fields."""
    hats = [] if look.hat == "none" else [look.hat]
    words = [look.shape, look.colour, look.pattern, *([] if hats else [NO_HAT])]
    return SceneGraph(
        frozenset((CREATURE, look.place, *hats)),
        frozenset((CREATURE, word) for word in words),
        frozenset([(CREATURE, "at", look.place), *((CREATURE, "with", hat) for hat in hats)]),
    )


@pytest.mark.parametrize("wording", WORDINGS)
def test_every_wording_of_every_look_is_read(wording: str) -> None:
    for look in LOOKS:
        assert parse_caption(fill(wording, look=look)) == meant(look)


def test_the_captioners_words_and_the_bare_description_are_read() -> None:
    texts = [text for look in LOOKS for text in (caption(look), look.description(), caption(look).upper())]
    assert parse_captions(texts) == [graph for look in LOOKS for graph in [meant(look)] * 3]


@given(st.sampled_from(LOOKS), st.sampled_from(ATTRIBUTES), st.data())
def test_one_wrong_word_changes_the_graph(look: Look, name: str, data: st.DataObject) -> None:
    """Whatever attribute differs, something of either graph is missing from the other."""
    other = data.draw(st.sampled_from([value for value in VALUES[name] if value != getattr(look, name)]))
    first, second = meant(look), parse_caption(caption(Look.from_dict(look.to_dict() | {name: other})))
    assert set(first.tuples()) - set(second.tuples()) and set(second.tuples()) - set(first.tuples())


def test_unknown_words_say_nothing() -> None:
    assert parse_caption("two cats sleep on the couch") == parse_caption("") == SceneGraph()
    assert parse_caption("a zebra like creature at the beach near rome") == SceneGraph(
        frozenset({CREATURE, "beach"}), frozenset(), frozenset({(CREATURE, "at", "beach")})
    )
    assert parse_caption("a creature with a crown and no hat").attributes == frozenset(), "the crown counts"


def test_a_concept_is_its_own_subject() -> None:
    graph = parse_caption("draw <bobo>, blue, with a tophat, at the moon.")
    assert graph.objects == {"bobo", "tophat", "moon"}
    assert graph.attributes == {("bobo", "blue")} and ("bobo", "with", "tophat") in graph.relations


def test_spice_counts_what_is_right() -> None:
    """1 for another wording of the same look, less for each wrong attribute."""
    right = Look("round", "red", "crown", "striped", "beach")
    asked = fill(PROMPTS["explicit"]["train"][1], look=right)
    wrong = [right, Look("round", "blue", "crown", "striped", "beach"), Look("round", "blue", "none", "plain", "moon")]
    values = Spice(parse_captions)([caption(look) for look in wrong], [asked] * 3)
    assert values[0] == 1.0 > values[1] > values[2] > 0.0
