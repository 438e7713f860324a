"""Show-o's model, configuration and processor: the released code's hidden states, saving and loading, derived ids."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import small_show_o as small
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from syncr1.engine.errors import ConfigError
from syncr1.engine.policies.picture_fit import ByProcessor, Normalisation
from syncr1.engine.policies.show_o_model import (
    CONTROLS,
    PAD,
    ShowOConfig,
    ShowOForUnifiedGeneration,
    ShowOProcessor,
)

PUBLISHED = json.loads((Path(small.__file__).parent / "show_o_published.json").read_text())
"""What showlab/Show-o's own code (commit 45a5a2d; its own Phi and masks) gives with the weights of `small.fill`:
drawing "a red cat" with some places masked, and a question about a picture."""


def additive(ids: torch.Tensor, config: Any, *, draws: bool) -> torch.Tensor:
    """[1, 1, T, T]: the omni mask, 0 where a row sees a column. Drawing: the image's rows see all; else all see it."""
    start, end = (int((ids == index).nonzero()) for index in (config.soi_token_id, config.eoi_token_id))
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    if draws:
        seen[start:] = True
    else:
        seen[:, : end + 1] = True
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_the_released_codes_hidden_states(task: str) -> None:
    """Theirs with the pads in front, which nothing sees; ours without, at the same positions."""
    model, _ = small.small_show_o()
    small.fill(model.showo)
    told = PUBLISHED[task]
    ids = torch.tensor(told["ids"])
    places = torch.arange(told["start"], told["start"] + len(ids))
    if task == "t2i":
        assert int((ids == model.config.soi_token_id).nonzero()) + told["start"] == model.config.text_slots
    mask = additive(ids, model.config, draws=task == "t2i")
    with torch.no_grad():
        out = model(input_ids=ids[None], attention_mask=mask, position_ids=places[None], output_hidden_states=True)
    hidden = torch.tensor(told["hidden"]).view(len(ids), -1)
    torch.testing.assert_close(out.hidden_states[-1][0], hidden, rtol=0, atol=1e-5)
    rows = [model.config.text_slots + 1 - told["start"], -2] if task == "t2i" else [1, -1]
    logits = torch.tensor(told["logits"]).view(2, -1)
    torch.testing.assert_close(out.logits[0, rows], logits, rtol=0, atol=1e-5)


def test_prompts_are_the_released_codes() -> None:
    _, processor = small.small_show_o()
    config, words = small.small_show_o()[0].config, processor.tokenizer
    text = words("a red cat", add_special_tokens=False).input_ids
    drawing = [config.t2i_token_id, config.sot_token_id, *text, config.eot_token_id, config.soi_token_id]
    assert PUBLISHED["t2i"]["ids"][: len(drawing)] == drawing
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    asked = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert asked == "USER: \nwhat is it? ASSISTANT:"
    codes = [config.text_rows + code for code in PUBLISHED["codes"][2]]
    image = [config.soi_token_id, *codes, config.eoi_token_id]
    question = words(asked, add_special_tokens=False).input_ids
    assert PUBLISHED["mmu"]["ids"] == [config.mmu_token_id, *image, config.sot_token_id, *question]


def test_a_conversation_and_words_alone() -> None:
    _, processor = small.small_show_o()
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "c?"}]},
    ]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == f"USER: a? ASSISTANT: b{small.EOS}USER: c? ASSISTANT:"


@pytest.mark.parametrize("image_size", [8, 16])
def test_a_folder_holds_everything(tmp_path: Path, image_size: int) -> None:
    model, processor = small.small_show_o(image_size=image_size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = ShowOForUnifiedGeneration.from_pretrained(tmp_path, use_safetensors=True)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.config.num_image_tokens == (image_size // 4) ** 2
    config: Any = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ShowOConfig) and config.to_diff_dict() == model.config.to_diff_dict()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, ShowOProcessor) and loaded.chat_template == processor.chat_template
    text = f"a cat{CONTROLS[0]}"
    assert loaded.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(loaded.tokenizer("a cat, 2?").input_ids) == "a cat, 2?"


def test_rows_follow_from_the_table() -> None:
    """Concepts without a name (UniCTokens) move the codes, and nothing else."""
    _, processor = small.small_show_o()
    tokens = len(processor.tokenizer)
    for more in (0, 17):
        config = small.model(processor.tokenizer, 0, more=more).config
        assert config.text_rows == tokens + more
        assert config.mask_token_id == tokens + more + small.VQ.num_codes
        assert config.soi_token_id == tokens - len(CONTROLS)
        assert config.pad_token_id == processor.tokenizer.convert_tokens_to_ids(PAD)


def test_published_numbers() -> None:
    """As the released code has them: the codes behind 50 305 tokens, 16 x 16 at 256 pixels, 32 x 32 at 512."""
    config = ShowOConfig(text_config={"vocab_size": 58498})
    assert (config.text_rows, config.mask_token_id, config.num_image_tokens) == (50305, 58497, 256)
    assert ShowOConfig(text_config={"vocab_size": 58498}, image_size=512).num_image_tokens == 1024
    with torch.device("meta"):
        state = ShowOForUnifiedGeneration(
            ShowOConfig(text_config={"vocab_size": 58498, "qk_layernorm": True})
        ).state_dict()
    expected = {
        "showo.model.embed_tokens.weight": (58498, 2048),
        "showo.model.layers.23.self_attn.k_layernorm.weight": (64,),
        "showo.model.layers.23.self_attn.dense.bias": (2048,),
        "showo.model.layers.0.mlp.fc1.weight": (8192, 2048),
        "showo.model.final_layernorm.bias": (2048,),
        "showo.lm_head.bias": (58498,),
        "vqmodel.quantize.embedding": (8192, 13),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_a_processor_takes_tokens_that_are_there() -> None:
    """Those of an enlarged tokenizer keep their ids; what it lacks goes behind."""
    words = small.tokenizer()
    words.add_special_tokens({"pad_token": PAD})
    words.add_tokens([*CONTROLS, "<bo>", "<token_0>"])
    before = words.get_vocab()
    assert ShowOProcessor.made_of(words, 16).tokenizer.get_vocab() == before
    lacking = small.tokenizer()
    lacking.add_tokens(["<bo>"])
    made = ShowOProcessor.made_of(lacking, 16).tokenizer
    assert made.convert_tokens_to_ids([PAD, *CONTROLS]) == list(range(98, 108))


def test_pictures_come_as_the_released_code_cuts_them() -> None:
    """The shorter side scaled, the middle cut out, [-1, 1]."""
    _, processor = small.small_show_o()
    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    picture.paste((0, 255, 0), (16, 0, 48, 32))
    pixels = ByProcessor.of(processor.image_processor)(picture, small.IMAGE_SIZE)
    assert pixels.shape == (3, 16, 16) and pixels[1, :, 2:-2].min() > 0.99
    normalised = Normalisation.of(processor.image_processor).pixels(torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
    torch.testing.assert_close(normalised[0, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))


def test_what_does_not_fit_is_said() -> None:
    words = small.processor().tokenizer
    config = ShowOConfig(text_config=small.phi(20), vq_config=asdict(small.VQ), image_size=16)
    with pytest.raises(ConfigError, match="rows for text, 32 codes and a mask, got 20"):
        ShowOForUnifiedGeneration(config)
    odd = ShowOConfig(text_config=small.phi(140), vq_config=asdict(small.VQ), image_size=18)
    with pytest.raises(ConfigError, match="multiple of 4 pixels, got 18"):
        ShowOForUnifiedGeneration(odd)
    with pytest.raises(ConfigError, match="at most 106 tokens"):
        ShowOConfig(text_config=small.phi(139), vq_config=asdict(small.VQ)).take_tokens(words)
    with pytest.raises(ConfigError, match="without soi, eoi, t2i, mmu, pad"):
        ShowOConfig(text_config=small.phi(140), vq_config=asdict(small.VQ)).take_tokens(small.tokenizer())


def test_without_numbers() -> None:
    """On the device `meta`, as the dry run makes it."""
    config = small.small_show_o()[0].config
    with torch.device("meta"):
        model = ShowOForUnifiedGeneration(config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
