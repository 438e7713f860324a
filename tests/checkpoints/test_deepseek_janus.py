"""Janus from DeepSeek's layout into transformers' and back: every bit, and the numbers that the original code computes.

EXPECTED was computed once by DeepSeek's own code (github.com/deepseek-ai/Janus, 1daa72f) on these very folders.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import numpy as np
import pytest
import torch
from deepseek_janus import THREE, Sizes, config_of, save_small, shapes_of
from PIL import Image
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT, JanusProcessor

from syncr1.engine.checkpoints.convert import convert, hashes_of
from syncr1.engine.checkpoints.deepseek_config import to_ours
from syncr1.engine.checkpoints.deepseek_janus import NO_COUNTERPART, RULES, origin_of, place_of
from syncr1.engine.checkpoints.deepseek_processor import chat_template
from syncr1.engine.checkpoints.weight_source import weights_in
from syncr1.engine.errors import CheckpointError
from syncr1.engine.policies.auto import load_policy


def same_bits(one: Path, other: Path) -> None:
    a, b = weights_in(one), weights_in(other)
    assert a.tensors.keys() == b.tensors.keys()
    for name, info in a.tensors.items():
        assert b.tensors[name] == info, name
        count = info.num_elements
        assert torch.equal(
            a.elements(name, 0, count).view(torch.uint8), b.elements(name, 0, count).view(torch.uint8)
        ), name


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", THREE.values(), ids=THREE)
def test_every_name_leads_there_and_back(sizes: Sizes) -> None:
    taken = set()
    for name in shapes_of(sizes):
        place = place_of(name)
        assert place is not None, name
        for index, ours in enumerate(place.names):
            assert origin_of(ours) == (name, index, place.leading_axis) and ours not in taken
            taken.add(ours)
    assert all(rule.why for rule in RULES) and all(NO_COUNTERPART.values())


@pytest.mark.parametrize(
    "name", ["aligner.layers.1.weight", "vision_model.blocks.0.norm1.weight", "lm_head.weight", ""]
)
def test_a_name_that_janus_does_not_have(name: str) -> None:
    assert place_of(name) is None
    assert origin_of(f"x.{name}") is None


# Conversations --------------------------------------------------------------------------------------------------------


def test_the_template_writes_deepseeks_conversations() -> None:
    """As `Conversation.get_prompt` of janus/utils/conversation.py, and as transformers' converter, to the letter."""
    import jinja2

    def written(messages: list[tuple[str, list[str | None]]], start: bool, tokens: dict[str, int]) -> str:
        asked = [
            {
                "role": role,
                "content": [{"type": "text", "text": t} if t is not None else {"type": "image"} for t in parts],
            }
            for role, parts in messages
        ]
        template = jinja2.Environment().from_string(chat_template(tokens))
        return template.render(messages=asked, add_generation_prompt=start)

    pro = {"<|User|>": 1, "<|Assistant|>": 2}
    end = "<｜end▁of▁sentence｜>"
    assert written([("user", [None, "What? "])], True, pro) == "<|User|>: <image_placeholder>\nWhat?\n\n<|Assistant|>:"
    assert written([("user", ["Look: ", None])], True, {}) == "User: Look: \n<image_placeholder>\n\nAssistant:"
    turns: list[tuple[str, list[str | None]]] = [("user", ["Hi"]), ("assistant", ["Hello."]), ("user", ["a", "b"])]
    wanted = f"<|User|>: Hi\n\n<|Assistant|>: Hello.{end}<|User|>: a b"
    assert written(turns, True, pro) == f"{wanted}\n\n<|Assistant|>:" and written(turns, False, pro) == wanted
    assert written([("user", ["Hi"]), ("assistant", [""])], False, pro) == "<|User|>: Hi\n\n<|Assistant|>:"


# Checkpoints ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What the original code computes."""

    num_ids: int
    sum_ids: int
    drawing: int
    """Ids of a turn to draw in."""
    text: list[float]
    """The text head's first logits behind a picture and a question."""
    image: list[float]
    """The image head's behind a prompt and sixteen codes."""
    pixels: list[float]
    """Of the picture that those codes are, red, green and blue of the first, and the mean square."""
    codes: list[int]
    """Of a picture."""


EXPECTED = {
    "pro_1b": Expected(
        221,
        25463,
        14,
        [-1.5784, -0.22829, 0.2465, -0.45017, -0.63599],
        [-1.89788, 3.15161, 1.54187, -1.51862, -0.05914],
        [0.72714, 0.19731, -1.69679, 0.66135],
        [51, 51, 23, 33, 51, 38, 38, 51, 51, 38, 38, 38, 38, 51, 38, 51],
    ),
    "pro_7b": Expected(
        221,
        25463,
        14,
        [0.17426, -0.44286, -0.46553, -0.7616, -0.20514],
        [-0.57478, 1.40246, -0.30421, 1.78007, -2.06511],
        [1.18539, -1.3576, 1.0183, 1.38388],
        [25, 29, 25, 25, 25, 29, 25, 25, 25, 54, 25, 3, 29, 29, 25, 29],
    ),
    "janus_1b": Expected(
        232,
        25878,
        25,
        [-1.26014, -0.82225, -0.15111, -0.47358, -1.84507],
        [-0.71818, -0.72275, 0.35427, -0.14452, -0.16738],
        [-0.9042, 1.56486, 0.45805, 2.13468],
        [31, 8, 8, 17, 31, 8, 8, 17, 31, 8, 17, 17, 17, 17, 22, 17],
    ),
}
FORMS = {"pro_1b": "bin", "pro_7b": "bin_shards", "janus_1b": "safetensors_shards"}


@pytest.mark.parametrize("name", THREE)
def test_there_and_back_is_bit_for_bit_and_means_what_the_original_means(name: str, tmp_path: Path) -> None:
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    save_small(theirs, THREE[name], weights=FORMS[name])
    done = convert(theirs, ours)
    assert (
        done.to == "transformers"
        and len(done.kept) == 14
        and done.read == hashes_of(theirs / file for file in done.read)
    )
    assert {file: digest for file, (_, digest) in done.written.items()} == hashes_of([ours / "model.safetensors"])
    returned = convert(ours, back, max_shard_bytes=1_000_000)
    assert returned.zeros == () and len(returned.written) > 1
    same_bits(theirs, back)
    for file in theirs.glob("*.json"):
        assert "index" in file.name or file.read_bytes() == (back / file.name).read_bytes()
    compare(ours, THREE[name], EXPECTED[name])


@torch.no_grad()
def compare(folder: Path, sizes: Sizes, wanted: Expected) -> None:
    policy = load_policy(folder).eval()
    model, processor = policy.model, policy.processor
    model.model.language_model.set_attn_implementation("sdpa")
    side = np.mgrid[0 : sizes.image_size, 0 : sizes.image_size, 0:3]
    picture = ((side[0] * 7 + side[1] * 13 + side[2] * 29) % 256).astype(np.uint8)

    def asked(*content: dict[str, str], **mode: Any) -> Any:
        text = processor.apply_chat_template([{"role": "user", "content": [*content]}], add_generation_prompt=True)
        if mode.get("images") and "num_image_tokens" not in signature(JanusProcessor.__init__).parameters:
            # Before 5.14 transformers' processor gives every picture 576 places, whatever the model.
            slots = f"<begin_of_image>{'<image_placeholder>' * 16}<end_of_image>"
            text = DEFAULT_SYSTEM_PROMPT + text.replace("<image_placeholder>", slots)
            pixels = processor.image_processor(mode["images"], return_tensors="pt")
            return SimpleNamespace(**processor.tokenizer(text, return_tensors="pt"), **pixels)
        return processor(text=[text], return_tensors="pt", **mode)  # a text alone is read letter by letter in 5.12

    shown = asked({"type": "image"}, {"type": "text", "text": "A cat?"}, images=[Image.fromarray(picture)])
    assert (shown.input_ids.numel(), int(shown.input_ids.sum())) == (wanted.num_ids, wanted.sum_ids)
    logits = model(input_ids=shown.input_ids, pixel_values=shown.pixel_values).logits[0, -1, :5]
    assert logits.tolist() == pytest.approx(wanted.text, abs=1e-4)
    drawing = asked({"type": "text", "text": "a cat"}, generation_mode="image").input_ids
    assert drawing.numel() == wanted.drawing
    codes = (torch.arange(16) * 5 % sizes.codes)[None]
    embedded = torch.cat([policy.embed(drawing, "text"), policy.embed(codes, "image")], 1)
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state
    assert model.model.generation_head(hidden)[0, -1, :5].tolist() == pytest.approx(wanted.image, abs=1e-4)
    pixels = model.model.vqmodel.decode(codes)[0]
    assert [*pixels[:, 0, 0].tolist(), float(pixels.square().mean())] == pytest.approx(wanted.pixels, abs=1e-4)
    seen = policy.image_tokens(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    assert seen[0].tolist() == wanted.codes


def test_bfloat16_stays_what_it_is(tmp_path: Path) -> None:
    save_small(tmp_path / "theirs", dtype=torch.bfloat16, weights="safetensors")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert {info.dtype for info in weights_in(tmp_path / "ours").tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder, and DeepSeek's beside it."""
    home = tmp_path_factory.mktemp("pair")
    save_small(home / "theirs")
    convert(home / "theirs", home / "ours")
    return home / "ours"


def test_what_was_trained_takes_the_rest_from_its_base_or_has_zeros(ours: Path, tmp_path: Path) -> None:
    """What a run saves has neither DeepSeek's files nor the tensors that transformers has no place for."""
    policy = load_policy(ours)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1.0)
    policy.save(tmp_path / "trained")
    done = convert(tmp_path / "trained", tmp_path / "plain")
    assert len(done.zeros) == 14 and any("sizes" in line for line in done.lost)
    based = convert(tmp_path / "trained", tmp_path / "based", base=ours.parent / "theirs")
    assert based.zeros == () and based.lost == ()
    save_small(tmp_path / "other", replace(THREE["pro_1b"], layers=3))
    wrong = convert(tmp_path / "trained", tmp_path / "on_another", base=tmp_path / "other")
    assert wrong.lost[0].startswith("settings files of the base: another model's sizes"), "the wrong size is named"
    assert (
        json.loads((tmp_path / "on_another" / "config.json").read_text())["language_config"]["num_hidden_layers"] == 2
    )
    before, after = weights_in(ours.parent / "theirs"), weights_in(tmp_path / "based")
    plain = weights_in(tmp_path / "plain")
    assert before.tensors == after.tensors and set(plain.tensors) == set(after.tensors)
    moved = {
        name
        for name, info in before.tensors.items()
        if not torch.equal(before.elements(name, 0, info.num_elements), after.elements(name, 0, info.num_elements))
    }
    assert moved == {"language_model.lm_head.weight"}
    assert not plain.elements("gen_vision_model.quantize.codebook_used", 0, 65536).any()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert to_ours(config)["vision_config"] == to_ours(config_of(THREE["pro_1b"]))["vision_config"]
    convert(tmp_path / "plain", tmp_path / "again")
    same_bits(tmp_path / "trained", tmp_path / "again")


def broken(home: Path, **changes: Any) -> Path:
    """A small folder whose tensors were changed: None takes one away."""
    folder = home / "m"
    tensors = save_small(folder, weights="safetensors")
    (folder / "model.safetensors").unlink()
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"language_model__lm_head__weight": None}, "1 missing (language_model.lm_head.weight)"),
        ({"language_model__adapter": torch.ones(2)}, "1 unknown (language_model.adapter)"),
        ({"gen_embed__weight": torch.ones(3, 8)}, "1 of another shape (gen_embed.weight: [3, 8] for [64, 8])"),
        (
            {"vision_model__vision_tower__blocks__0__attn__qkv__bias": torch.ones(95)},
            "attn.qkv.bias: [95] for [96]",
        ),
        (
            {"gen_embed__weight": torch.ones(64, 8, dtype=torch.uint8)},
            "1 of integers (quantised) (gen_embed.weight)",
        ),
        ({"vision_model__vision_tower__blocks__9__norm1__bias": torch.ones(32)}, "1 unknown"),
    ],
)
def test_tensors_that_are_not_the_configs_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = broken(tmp_path, **changes)
    with pytest.raises(CheckpointError) as refused:
        convert(folder, tmp_path / "out")
    assert words in str(refused.value) and "take weights and config.json from one place" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_model_of_tied_heads(tmp_path: Path) -> None:
    """DeepSeek's file has one tensor for both; its way back has two that are equal, which compute the same."""
    folder = broken(tmp_path, language_model__lm_head__weight=None)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "ours")
    policy = load_policy(tmp_path / "ours")
    assert policy.model.lm_head.weight is policy.model.model.language_model.embed_tokens.weight
    shutil.rmtree(tmp_path / "ours" / "deepseek")
    convert(tmp_path / "ours", tmp_path / "back")
    held, size = weights_in(tmp_path / "back"), 320 * 32
    head = held.elements("language_model.lm_head.weight", 0, size)
    assert torch.equal(head, held.elements("language_model.model.embed_tokens.weight", 0, size))
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["language_config"]["tie_word_embeddings"] is False
    )


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("processor_config.json", "sft_format", "plain", "sft_format 'plain'"),
        ("processor_config.json", "add_special_token", True, "add_special_token true"),
        ("processor_config.json", "image_start_tag", "<boi>", "the token <boi>, got none"),
        ("preprocessor_config.json", "image_size", 64, "expected 32, the vision tower's, got image_size 64"),
        ("tokenizer_config.json", "eos_token", None, "expected bos_token and eos_token"),
    ],
)
def test_settings_that_have_no_counterpart(file: str, name: str, value: object, words: str, tmp_path: Path) -> None:
    save_small(tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    if name == "eos_token":
        (tmp_path / "m" / "special_tokens_map.json").unlink()
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / "m", tmp_path / "out")
    assert words in str(refused.value) and not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"of free space for the converted checkpoint, got 0\.00 GB"):
        convert(ours, tmp_path / "out")
    assert not list(tmp_path.iterdir())
