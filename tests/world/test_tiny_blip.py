"""The tiny captioner: deterministic, an ordinary BLIP on disk, and it learns."""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipProcessor

from syncr1.engine.rewards.builtin.captioner import BlipCaptioner
from syncr1.engine.world.attributes import LOOKS
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.tiny_blip import BlipSettings, build_blip, build_tokenizer, caption, save_blip, train_blip

pytestmark = pytest.mark.slow
SHORT = BlipSettings(steps=26, batch=24, photos=1, drawings=1)


@pytest.fixture(scope="module")
def trained() -> tuple[BlipForConditionalGeneration, BlipProcessor, list[float]]:
    losses: list[float] = []
    model, processor = train_blip(SHORT, lambda _, loss: losses.append(loss))
    return model, processor, losses


def test_every_caption_comes_back_from_its_tokens() -> None:
    tokenizer = build_tokenizer()
    for look in LOOKS:
        ids = tokenizer(caption(look)).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= 20
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.sep_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption(look)
    assert len({caption(look) for look in LOOKS}) == len(LOOKS)


@pytest.mark.slow
def test_training_moves_the_loss_down_and_is_repeatable(
    trained: tuple[BlipForConditionalGeneration, BlipProcessor, list[float]],
) -> None:
    """Bitwise, whatever the global generator did before; a seed draws other weights."""
    model, _, losses = trained
    assert losses[-1] < 0.35 * losses[0] and not model.training
    torch.manual_seed(9)
    first, second = model.state_dict(), train_blip(SHORT)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    start, other = (build_blip(seed)[0].state_dict() for seed in (SHORT.seed, 1))
    assert any(not torch.equal(start[name], other[name]) for name in start)
    moved = [name for name, value in first.items() if not torch.equal(value, start[name])]
    assert any(name.startswith("vision_model") for name in moved)
    assert any(name.startswith("text_decoder") for name in moved)


def test_the_folder_is_an_ordinary_blip(
    trained: tuple[BlipForConditionalGeneration, BlipProcessor, list[float]], tmp_path: Path
) -> None:
    """The captioner that loads BLIP-base loads this one, and says what the model in memory says."""
    model, processor, _ = trained
    save_blip(tmp_path, model, processor)
    assert any(tmp_path.glob("*.safetensors")) and not any(tmp_path.glob("*.bin"))
    images = AttributeChecker.raw_table()[::60]
    captions = BlipCaptioner.from_pretrained(tmp_path, batch_size=4)(images)
    assert len(captions) == len(images) and all(text.startswith("a ") for text in captions)
    ids = model.generate(pixel_values=images * 2 - 1, max_new_tokens=50, do_sample=False)
    assert captions == [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
