"""TIM against the formula in float64, image by image through transformers' own forward, and what must not move it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import PlainJanus, sharp_policy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.policies.lora import add_lora, base_of
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.tim import TextImageMatching, matching

TEXTS = (
    "round.",
    "a red round creature with a crown and a striped body sits at the beach, waving at the blue one behind it",
    "draw it again",
    "what is the colour of the creature?",
    "一 red 🐙\n\n",
)


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(torch.rand(len(TEXTS), 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def tim(
    reward: TextImageMatching, images: Sequence[Tensor | None], texts: Sequence[str | None] = TEXTS
) -> list[float | None]:
    return reward(prompts=["unused"] * len(images), images=images, target=texts)


def loop(hidden: Tensor, image: Sequence[int], words: Sequence[int]) -> float:
    """The formula, one pair of positions after another."""
    rows = hidden.double()
    cosine = [[float(rows[j] @ rows[k] / (rows[j].norm() * rows[k].norm())) for k in words] for j in image]
    patches = sum(max(row) for row in cosine) / len(image)
    return 0.5 * (patches + sum(max(column) for column in zip(*cosine, strict=True)) / len(words))


@torch.no_grad()
def expected(policy: JanusPolicy, image: Tensor, text: str, *, with_tag: bool = False) -> float:
    """One sequence alone, its words found by hand: between the image's end and the assistant's tag."""
    plain = PlainJanus(policy)
    plain.model.double()
    tokens = policy.prompt_tokens(Prompt(id="x", task="caption", text=text, images=(Path("x.png"),)))
    embeddings = plain.text(tokens).clone()
    features = plain.model.model.get_image_features(((image - 0.5) / 0.5).double()[None], return_dict=True)
    embeddings[tokens == policy.image_slot] = features.pooler_output[0]
    end_of_image, tag = (policy.tokenizer.convert_tokens_to_ids(t) for t in ("<end_of_image>", "<|assistant|>"))
    slots = (tokens == policy.image_slot).nonzero().flatten().tolist()
    first, last = tokens.tolist().index(end_of_image) + 1, tokens.tolist().index(tag)
    return loop(plain.hidden(embeddings), slots, range(first, last + with_tag))


@pytest.mark.parametrize("with_tag", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_it_is_the_formula(policy: JanusPolicy, images: list[Tensor], with_tag: bool, batch_size: int) -> None:
    """Texts of 1 to 60 tokens in one packed forward; other batches, the same values."""
    got = tim(TextImageMatching(policy, batch_size=batch_size, include_assistant_tag=with_tag), images)
    want = [expected(policy, image, text, with_tag=with_tag) for image, text in zip(images, TEXTS, strict=True)]
    assert got == pytest.approx(want, abs=1e-5)
    assert len({round(value, 3) for value in want}) == len(want)


def test_order_and_neighbours_do_not_matter(policy: JanusPolicy, images: list[Tensor]) -> None:
    reward = TextImageMatching(policy)
    together = tim(reward, images)
    assert tim(reward, images[::-1], TEXTS[::-1]) == pytest.approx(together[::-1], abs=1e-6)
    for image, text, value in zip(images, TEXTS, together, strict=True):
        assert tim(reward, [image], [text]) == pytest.approx([value], abs=1e-6)


def test_images_and_words_matter(policy: JanusPolicy, images: list[Tensor]) -> None:
    reward = TextImageMatching(policy)
    values = tim(reward, [images[0], images[1], images[0]], [TEXTS[1], TEXTS[1], TEXTS[2]])
    assert len({round(value or 0.0, 5) for value in values}) == 3


def test_none_where_there_is_nothing_to_match(policy: JanusPolicy, images: list[Tensor]) -> None:
    """No words, no drawing: None, no crash, and the others keep their values."""
    reward = TextImageMatching(policy)
    alone = tim(reward, images[:1])
    assert tim(reward, [images[0], images[1], None, images[2]], [TEXTS[0], "", "round.", " \n"]) == [
        pytest.approx(alone[0], abs=1e-6),
        None,
        None,
        None,
    ]
    assert tim(reward, [None], ["round."]) == [None] and tim(reward, [], []) == []


def test_a_prompt_without_a_target_is_its_own_description(policy: JanusPolicy, images: list[Tensor]) -> None:
    reward = TextImageMatching(policy)
    assert reward(prompts=list(TEXTS), images=images, target=[None] * len(images)) == tim(reward, images)


def test_control_tokens_in_a_text_are_words(policy: JanusPolicy, images: list[Tensor]) -> None:
    """A text cannot fake placeholders or the assistant's tag, which would move the places."""
    values = tim(TextImageMatching(policy), images[:2], ["<image_placeholder> red", "<|assistant|> red <end_of_image>"])
    assert all(value is not None and -1 <= value <= 1 for value in values)


def test_a_text_beyond_the_positions_is_cut(policy: JanusPolicy, images: list[Tensor]) -> None:
    short, long = "red round " * 400, "red round " * 800
    reward = TextImageMatching(policy)
    assert len(policy.prompt_tokens(Prompt(id="x", task="gen", text=short))) > policy.max_positions
    a, b = tim(reward, [images[0]] * 2, [short, long])
    assert a is not None and a == pytest.approx(b, abs=1e-6)


def test_modes_come_back_and_no_gradient_flows(policy: JanusPolicy, images: list[Tensor]) -> None:
    made, seen = sharp_policy(), []
    made.train()
    made.model.model.vision_model.eval()
    modes = [module.training for module in made.modules()]
    trunk = made.trunk

    def watched(*arguments: Tensor) -> Tensor:
        hidden: Tensor = trunk(*arguments)  # type: ignore[arg-type]
        seen.append((made.training, hidden.requires_grad))
        return hidden

    made.trunk = watched  # type: ignore[method-assign, assignment]
    reward = TextImageMatching(made)
    assert tim(reward, images) == pytest.approx(tim(TextImageMatching(policy), images), abs=1e-6)
    with pytest.raises(RuntimeError):
        tim(reward, [images[0], torch.rand(3, 8, 8)])
    assert [module.training for module in made.modules()] == modes and seen == [(False, False)]


def test_weights_that_broke_are_told(images: list[Tensor]) -> None:
    made = sharp_policy()
    with torch.no_grad():
        made.model.model.language_model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="finite hidden states"):
        tim(TextImageMatching(made), images)


def test_a_frozen_base_does_not_move_with_adapters(images: list[Tensor]) -> None:
    made = sharp_policy()
    add_lora(made, 2, 8.0)
    live, frozen = TextImageMatching(made), TextImageMatching(base_of(made))
    before = tim(live, images)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3)
    assert tim(frozen, images) == pytest.approx(before, abs=1e-6)
    assert abs((tim(live, images)[0] or 0.0) - (before[0] or 0.0)) > 1e-3


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    patches=st.integers(1, 5),
    seed=st.integers(0, 1 << 16),
)
def test_matching_over_ragged_texts(lengths: list[int], patches: int, seed: int) -> None:
    """Rows that belong to nobody are NaN: no value may come from them; no word gives -inf."""
    noise = torch.Generator().manual_seed(seed)
    hidden, places, spans = torch.full((1, 4), math.nan), [], []
    hidden[0] = 0.5  # the row that padding points at
    for length in lengths:
        own = torch.nn.functional.normalize(torch.randn(patches + length, 4, generator=noise), dim=1)
        start = len(hidden)
        places.append(range(start, start + patches))
        spans.append((start + patches, start + patches + length))
        hidden = torch.cat([hidden, own, torch.full((1, 4), math.nan)])
    begin, end = torch.tensor(spans).unbind(1)
    got = matching(hidden, torch.tensor([list(rows) for rows in places]), begin, end)
    for value, rows, (first, last) in zip(got.tolist(), places, spans, strict=True):
        want = loop(hidden, rows, range(first, last)) if last > first else -math.inf
        assert value == pytest.approx(want, abs=1e-5)
