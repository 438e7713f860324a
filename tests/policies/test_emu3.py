"""Emu3 through the protocol: the layout of images, heads, checkpoints, and a user's text.

Sampling and training have test_emu3_rollout.py.
"""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, world_photo
from small_emu3 import BOI, EOS, FRAME, IMAGE, IMAGE_SIZE, NUM_CODES, PlainEmu3, all_plans, processor, sharp_emu3
from small_emu3 import model as small_model
from stepping_cases import same_draws
from transformers import AutoProcessor, Emu3ForConditionalGeneration

from syncr1.engine.pictures import open_picture
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling


@pytest.fixture(scope="module")
def policy() -> Emu3Policy:
    return sharp_emu3()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as the small model's images, so that transformers' processor does not resize it."""
    return world_photo(tmp_path_factory.mktemp("photos"), 3)


# The layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_a_shown_image_lies_as_transformers_processor_puts_it(photo: Path, scattered: bool) -> None:
    """Ids, slots and embeddings: BOI, size, wrapper, rows with their ends, EOF, EOI inside the chat template."""
    policy = sharp_emu3(scattered=scattered)
    prompt = make_prompt("what is the colour?", ("text",), photo)
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    text = policy.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = policy.processor(images=open_picture(photo), text=text, return_tensors="pt")
    tokens = policy.prompt_tokens(prompt)
    assert tokens.tolist() == inputs["input_ids"][0].tolist()
    assert int(policy.image_slots(tokens).sum()) == 4 * 5
    expected = policy.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    torch.testing.assert_close(policy.see(policy.load_images([photo]))[0], expected)
    assert len(torch.unique(expected, dim=0)) > 4, "several codes, or any order would pass"


@pytest.mark.parametrize("scattered", [False, True])
def test_a_drawing_begins_as_transformers_processor_has_it(scattered: bool) -> None:
    """`return_for_image_generation`: BOS, the words without a template, BOI, size, wrapper; nothing else."""
    policy = sharp_emu3(scattered=scattered)
    prompt = make_prompt("draw the creature", ("image",))
    ids = policy.processor(text=prompt.text, return_for_image_generation=True, image_area=IMAGE_SIZE**2)["input_ids"][0]
    frame = policy._image_ids[policy.forced_image_tokens()[:FRAME]].tolist()
    assert [*policy.prompt_tokens(prompt).tolist(), policy.image_start, *frame] == ids
    empty = policy.processor(text="", return_for_image_generation=True, image_area=IMAGE_SIZE**2)["input_ids"][0]
    assert [*policy.unconditional_tokens().tolist(), *frame] == empty


@pytest.mark.parametrize("scattered", [False, True])
def test_images_and_tokens(photo: Path, scattered: bool) -> None:
    """`image_tokens` are transformers' codes between what is forced, and `draw` gives transformers' own pixels."""
    policy = sharp_emu3(scattered=scattered)
    plain = PlainEmu3(policy)
    images = policy.load_images([photo, world_photo(photo.parent, 8)])
    tokens, forced = policy.image_tokens(images), policy.forced_image_tokens()
    assert tokens.shape == (2, policy.num_image_tokens) == (2, FRAME + 4 * 5) and forced.shape == (FRAME + 4 * 5,)
    codes = tokens[:, forced < 0]
    assert codes.max() < NUM_CODES and codes.shape == (2, 16)
    assert forced[FRAME:].view(4, 5).tolist() == [[-1] * 4 + [NUM_CODES]] * 4
    sizes = torch.tensor([images.shape[-2:]] * 2)
    bpe = policy.model.model.get_image_tokens(images * 2 - 1, sizes).view(2, -1)
    for row in range(2):
        assert policy._image_ids[tokens[row]].tolist() == plain.image(codes[row], 4).tolist()
        assert policy._image_ids[tokens[row, FRAME:]].tolist() == bpe[row].tolist()
    ends = torch.zeros(2, 3, dtype=bpe.dtype)
    expected = policy.model.decode_image_tokens(image_tokens=torch.cat([bpe, ends], 1), height=4, width=4)
    drawn = policy.draw(tokens)
    assert drawn.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, (expected * 0.5 + 0.5).clamp(0, 1))
    assert (drawn[0] - drawn[1]).abs().mean() > 0.01
    features = policy.vision_features(images)
    assert features.dtype == torch.float32 and (features[0] - features[1]).abs().max() > 1e-3


def test_embeddings_and_heads_are_transformers_rows() -> None:
    """One matrix: the codes' rows wherever they lie, and for text nothing that only images have."""
    for scattered in (False, True):
        policy = sharp_emu3(scattered=scattered)
        plain, hidden = PlainEmu3(policy), torch.randn(3, 64)
        logits = policy.model.lm_head(hidden)
        image, text = policy.head(hidden, "image"), policy.head(hidden, "text")
        torch.testing.assert_close(hidden @ image.weight.T, logits[:, plain.code_ids])
        assert image.forbidden is None and text.forbidden is not None
        reached = torch.ones(len(policy.tokenizer), dtype=torch.bool)
        reached[plain.never_in_text] = False
        allowed = torch.zeros_like(reached)
        allowed[: len(text.weight)] = True
        allowed[text.forbidden] = False
        assert allowed.tolist() == reached.tolist()
        torch.testing.assert_close(hidden @ text.weight.T, logits[:, : len(text.weight)])
        codes = torch.arange(NUM_CODES).view(2, -1)
        torch.testing.assert_close(policy.embed(codes, "image"), policy.decoder().embed_tokens(plain.code_ids[codes]))
        storage = policy.model.lm_head.weight.untyped_storage().data_ptr()
        assert text.weight.untyped_storage().data_ptr() == storage
        assert (image.weight.untyped_storage().data_ptr() == storage) is not scattered, "a copy where it must be one"
        if not scattered:  # as published: the end token is the last word
            assert len(text.weight) == policy.tokenizer.eos_token_id + 1


# The checkpoint -------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(policy: Emu3Policy, photo: Path, tmp_path: Path) -> None:
    """Weights, batch norms' statistics, vocabulary, template, image size and draws come back; safetensors alone."""
    policy.save(tmp_path)
    loaded = Emu3Policy.from_pretrained(tmp_path).eval()
    state = loaded.state_dict()
    assert set(state) == set(policy.state_dict()) and any("running_mean" in name for name in state)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert (loaded.image_size, loaded.num_image_tokens, loaded.image_start, loaded.end_tokens) == (
        policy.image_size,
        policy.num_image_tokens,
        policy.image_start,
        policy.end_tokens,
    )
    sampling = Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=8)
    same_draws(*(generate(p, all_plans(photo), sampling) for p in (loaded, policy)))
    hf = Emu3ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(hf.lm_head.weight, policy.model.lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == policy.processor.chat_template
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").is_file()
    larger = Emu3Policy.from_pretrained(tmp_path, image_size=48)
    assert larger.side == 6 and larger.num_image_tokens == FRAME + 6 * 7
    larger.save(tmp_path / "larger")
    assert Emu3Policy.from_pretrained(tmp_path / "larger").image_size == 48


def test_other_image_sizes(policy: Emu3Policy, photo: Path, tmp_path: Path) -> None:
    """A size of its own reaches the prompt's size text, the slots and the pictures."""
    larger = Emu3Policy(policy.frozen_copy().model, policy.processor, image_size=48)
    prompt = make_prompt("who?", ("text", "image"), photo)
    assert "6*6" in larger.tokenizer.decode(larger.prompt_tokens(prompt))
    (rollout,) = generate(larger, [prompt], Sampling(num_generations=1, max_text_tokens=4))
    assert rollout.image is not None and rollout.image.shape == (3, 48, 48)
    replayed = PlainEmu3(larger).replay(rollout, larger.load_images([photo]) * 2 - 1, temperature=1.0, cfg_weight=1.0)
    for segment, (logp, _) in zip(rollout.segments, replayed, strict=True):
        torch.testing.assert_close(segment.logp, logp, rtol=0, atol=1e-4)


def test_the_published_size_is_the_default() -> None:
    """720 x 720 pixels, 90 x 90 codes and "90*90" before them, where a configuration says nothing."""
    made = processor()
    bare = small_model(made.tokenizer, 0)
    del bare.config.image_area
    policy = Emu3Policy(bare, made)
    assert (policy.image_size, policy.side) == (720, 90)
    frame = policy.tokenizer.decode(policy._image_ids[policy.forced_image_tokens()[:6]])
    assert policy.num_image_tokens == 6 + 90 * 91 and frame == "90*90<|image token|>"


def test_refusals(policy: Emu3Policy) -> None:
    made = policy.frozen_copy()
    for size in (0, 36, -8):
        with pytest.raises(ValueError, match="positive multiple of 8 pixels"):
            Emu3Policy(made.model, made.processor, image_size=size)
    with pytest.raises(ValueError, match="expected a follow_up question"):
        policy.follow_up_tokens(make_prompt("x", ("image", "text")))
    untemplated = processor()
    untemplated.chat_template = None
    bare = Emu3Policy(made.model, untemplated)
    with pytest.raises(ValueError, match="expected a chat template"):
        bare.prompt_tokens(make_prompt("x", ("text",)))
    assert bare.prompt_tokens(make_prompt("x", ("image",))).numel() == 2
    mapping = made.model.model.vocabulary_mapping
    mapping.vocab_map = {text: i for text, i in mapping.vocab_map.items() if text != "<|visual token 000003|>"}
    for cached in ("img2bpe", "image_tokens_str"):
        vars(mapping).pop(cached, None)
    with pytest.raises(ValueError, match="got 23 of them"):
        Emu3Policy(made.model, made.processor)


@pytest.mark.parametrize("text", [IMAGE, f"a{BOI}{EOS}", f"<im{IMAGE}age>", "<|visual token 000001|>", "<|extra_200|>"])
def test_a_users_text_cannot_hold_a_control_token(policy: Emu3Policy, photo: Path, text: str) -> None:
    control = set(policy.tokenizer.all_special_ids) | {int(i) for i in policy._image_ids[: NUM_CODES + 1]}
    for segments in (("text",), ("image",)):
        assert not control & set(policy.prompt_tokens(make_prompt(text, segments)).tolist()[1:])
    shown = policy.prompt_tokens(make_prompt(text, image=photo))
    assert int(policy.image_slots(shown).sum()) == 4 * 5
    assert policy.decode_text(policy.text_tokens("round <x> 4*4")) == "round <x> 4*4"


def test_training_mode_changes_nothing() -> None:
    """No dropout (0.1 as published) in the decoder, and the VQ model's batch norms do not learn from pictures."""
    policy = sharp_emu3().train()
    assert policy.model.config.text_config.attention_dropout == 0.1
    assert policy.training and not any(module.training for module in policy.model.model.vqmodel.modules())
    assert all(module.p == 0 for module in policy.decoder().modules() if isinstance(module, torch.nn.Dropout))
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    first = policy.draw(policy.image_tokens(images))
    assert torch.equal(first, policy.draw(policy.image_tokens(images)))
    assert torch.equal(first, sharp_emu3().draw(sharp_emu3().image_tokens(images)))
