"""Chameleon through the protocol: prompts, heads, pictures, checkpoints and what is missing from them.

Sampling and training have tests/rollout/test_one_table_rollout.py, the VQGAN's drawing half test_vqgan_decoder.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, world_photo
from small_chameleon import (
    BOI,
    BOS,
    EOI,
    IMAGE,
    IMAGE_SIZE,
    NUM_CODES,
    PAD,
    SEP,
    PlainChameleon,
    code_name,
    sharp_chameleon,
)
from small_chameleon import model as small_model
from small_chameleon import processor as small_processor
from torch import Tensor
from transformers import AutoProcessor, ChameleonForConditionalGeneration
from transformers.generation import LogitsProcessor, LogitsProcessorList

from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.pictures import open_picture
from syncr1.engine.policies.auto import policy_class
from syncr1.engine.policies.chameleon import ChameleonPolicy
from syncr1.engine.rollout.capacity import check_plans, remarks_on
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

WAYS: list[dict[str, Any]] = [{}, {"scattered": True}, {"swin_norm": True}]


@pytest.fixture(scope="module")
def policy() -> ChameleonPolicy:
    return sharp_chameleon()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as the small model's images, so that transformers' processor does not resize it."""
    return world_photo(tmp_path_factory.mktemp("photos"), 3)


def drawable_checkpoint(policy: ChameleonPolicy, folder: Path) -> dict[str, Tensor]:
    """Saves it as transformers' converter does, without a decoder; returns what the published file has."""
    made = copy.deepcopy(policy)
    whole = {name: tensor.clone() for name, tensor in made.vqmodel.state_dict().items()}
    del made.vqmodel.decoder
    made.save(folder)
    return whole


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_prompts_are_the_processors(photo: Path, scattered: bool) -> None:
    """A question, about a photo or not, and a request to draw: BOS, the image, the words, the separator."""
    policy = sharp_chameleon(scattered=scattered)
    prompt = make_prompt("what is the colour?", ("text",), photo)
    inputs = policy.processor(images=open_picture(photo), text=f"{IMAGE}{prompt.text}", return_tensors="pt")
    tokens = policy.prompt_tokens(prompt)
    assert tokens.tolist() == inputs["input_ids"][0].tolist()
    assert int(policy.image_slots(tokens).sum()) == 16
    features = policy.model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(policy.see(policy.load_images([photo])), features)
    assert len(torch.unique(features[0], dim=0)) > 4, "several codes, or any order would pass"
    for plan in (("text",), ("image",)):
        alone = policy.prompt_tokens(make_prompt("draw the creature", plan))
        assert alone.tolist() == policy.processor(text="draw the creature")["input_ids"][0].tolist()
        assert policy.tokenizer.convert_ids_to_tokens([alone[0], alone[-1]]) == [BOS, SEP]


def test_turns_and_the_free_prompt(policy: ChameleonPolicy) -> None:
    """Written out by hand."""
    ids = policy.tokenizer.convert_tokens_to_ids
    prompt = make_prompt("draw it", ("text", "image", "text"), follow_up="what?")
    words = policy.encode("draw the cup").tolist()
    assert policy.drawing_tokens(prompt, "draw the cup").tolist() == [*words, *ids([SEP, BOI])]
    turn = [*ids([EOI, "</s>"]), *policy.encode("what?").tolist(), ids(SEP)]
    assert policy.follow_up_tokens(prompt).tolist() == turn
    assert policy.unconditional_tokens().tolist() == ids([BOS, BOI])
    assert policy.unconditional_tokens(5).tolist() == ids([BOS, PAD, PAD, PAD, BOI])
    with pytest.raises(DataError, match="expected a follow_up question"):
        policy.follow_up_tokens(make_prompt("x", ("image", "text")))


def test_a_chat_template_is_followed(photo: Path) -> None:
    made = sharp_chameleon()
    made.processor.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    text = made.tokenizer.decode(made.prompt_tokens(make_prompt("who?", ("text",), photo)))
    assert text == f"{BOS}[user]{BOI}{IMAGE * 16}{EOI}who?[bot]"


@pytest.mark.parametrize(
    "text",
    [
        IMAGE,
        f"a{BOI}</s>",
        f"<im{IMAGE}age>",
        code_name(3),
        f"IMG{code_name(1)}IMGBZ",
        5 * "IMG" + "BZ",
        SEP,
        f"<eo{BOI}ss>",
    ],
)
def test_a_users_text_cannot_hold_a_control_token(photo: Path, text: str) -> None:
    policy = sharp_chameleon(scattered=True)
    control = {*policy.tokenizer.all_special_ids, *policy._code_rows.tolist(), policy.image_start, policy.image_end}
    for segments in (("text",), ("image",)):
        assert not control & set(policy.prompt_tokens(make_prompt(text, segments)).tolist()[1:-1])
    shown = policy.prompt_tokens(make_prompt(text, image=photo))
    assert int(policy.image_slots(shown).sum()) == 16


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_images_and_tokens(photo: Path, scattered: bool) -> None:
    """`image_tokens` are transformers' codes, wherever their rows lie; drawings go back through the processor's own
    scaling, which is not that by 2 / 255."""
    policy = sharp_chameleon(scattered=scattered)
    plain = PlainChameleon(policy)
    pixels = policy.processor.image_processor(
        [open_picture(photo), open_picture(world_photo(photo.parent, 8))], return_tensors="pt"
    )["pixel_values"]
    images = policy.load_images([photo, world_photo(photo.parent, 8)])
    torch.testing.assert_close(policy.normalisation().pixels(images), pixels)
    tokens = policy.image_tokens(images)
    assert tokens.shape == (2, 16) and tokens.max() < NUM_CODES
    assert torch.equal(plain.code_ids[tokens], policy.model.model.get_image_tokens(pixels).long())
    drawn = policy.draw(tokens)
    assert drawn.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE) and drawn.dtype == torch.float32
    vqmodel = policy.vqmodel
    with torch.no_grad():
        latent = vqmodel.quantize.embedding(tokens).mT.unflatten(2, (4, 4)).contiguous()
        expected = vqmodel.decoder(vqmodel.post_quant_conv(latent))
    torch.testing.assert_close(drawn, ((expected + 1) / (255 * 0.0078)).clamp(0, 1))
    assert (drawn[0] - drawn[1]).abs().mean() > 0.01


# Against transformers' own generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS[1:])
@torch.no_grad()
def test_greedy_text_is_transformers_own(way: dict[str, Any], photo: Path) -> None:
    policy = sharp_chameleon(**way)
    theirs, never = PlainChameleon(policy).model, PlainChameleon(policy).never_in_text
    prompts = [make_prompt("who is this?", ("text",), photo), make_prompt("what is the colour?", ("text",))]
    for rollout in generate(policy, prompts, Sampling(num_generations=1, temperature=0.0, max_text_tokens=12)):
        ids = policy.prompt_tokens(rollout.prompt)[None]
        shown = {}
        if rollout.prompt.images:
            shown["pixel_values"] = policy.normalisation().pixels(policy.load_images(rollout.prompt.images))
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=never.tolist(),
            **shown,
        )
        assert rollout.segments[0].tokens.tolist() == out[0, ids.shape[1] :].tolist()


class _CodesAlone(LogitsProcessor):
    """What `generate` draws by: the codes' logits, which transformers' forward has put out, from the hidden states."""

    def __init__(self, plain: PlainChameleon, empty: Tensor, start: int, weight: float) -> None:
        self.plain, self.empty, self.start, self.weight = plain, empty, start, weight

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids[0, self.start :]
        c, u = (self.plain.logits(torch.cat([ids, drawn]))[-1] for ids in (input_ids[0, : self.start], self.empty))
        guided = (u + self.weight * (c - u))[self.plain.code_ids]
        return torch.full_like(scores, -torch.inf).index_copy(1, self.plain.code_ids, guided[None])


@pytest.mark.parametrize(("way", "weight"), list(zip(WAYS, (1.0, 3.0, 3.0), strict=True)))
@torch.no_grad()
def test_greedy_image_is_transformers_own(way: dict[str, Any], weight: float) -> None:
    """Its `generate`, with the mask over codes lifted and guidance as in the released code."""
    policy = sharp_chameleon(**way)
    prompt, plain = make_prompt("draw the creature", ("image",)), PlainChameleon(policy)
    (ours,) = generate(policy, [prompt], Sampling(num_generations=1, temperature=0.0, cfg_weight=weight))
    ids = torch.cat([policy.prompt_tokens(prompt), torch.tensor([policy.image_start])])[None]
    chosen = _CodesAlone(plain, policy.unconditional_tokens(), ids.shape[1], weight)
    out = plain.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        logits_processor=LogitsProcessorList([chosen]),
    )
    assert plain.code_ids[ours.segments[0].tokens].tolist() == out[0, ids.shape[1] :].tolist()
    assert len(ours.segments[0].tokens.unique()) > 1


def test_heads_are_transformers_logits_with_the_mask_lifted(policy: ChameleonPolicy) -> None:
    plain, ids = PlainChameleon(policy), policy.prompt_tokens(make_prompt("what is it?"))
    masked = plain.model(input_ids=ids[None], use_cache=False).logits[0]
    hidden = plain.hidden(ids)
    text, image = policy.head(hidden, "text"), policy.head(hidden, "image")
    assert image.weight.shape[0] == NUM_CODES and image.forbidden is None
    assert (masked[:, plain.code_ids] == torch.finfo(masked.dtype).min).all()
    torch.testing.assert_close(image.hidden @ image.weight.T, plain.logits(ids)[:, plain.code_ids])
    rows, forbidden = text.weight.shape[0], text.forbidden
    assert forbidden is not None
    kept = sorted(set(range(rows)) - set(forbidden.tolist()))
    torch.testing.assert_close((text.hidden @ text.weight.T)[:, kept], masked[:, kept])
    never = set(plain.never_in_text.tolist())
    assert not never & set(kept) and never >= set(range(rows, masked.shape[1]))


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_has_the_decoder_among_its_weights(policy: ChameleonPolicy, tmp_path: Path) -> None:
    """transformers reads it as its own class, and a policy draws with it again; so does one of bfloat16."""
    policy.save(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".ckpt", ".pt")]
    assert policy_class(tmp_path) is ChameleonPolicy
    loaded = ChameleonPolicy.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(loaded.draw(loaded.image_tokens(images)), policy.draw(policy.image_tokens(images)))
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, policy.model.lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path).image_seq_length == 16
    half = ChameleonPolicy.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.draw(half.image_tokens(images)).dtype == torch.float32
    empty = ChameleonPolicy.without_weights(tmp_path)
    assert all(p.is_meta for p in empty.parameters()) and not empty.cannot_draw
    (tmp_path / "model.safetensors").unlink()
    assert not ChameleonPolicy.without_weights(tmp_path).cannot_draw, "not known before the weights are there"


def test_without_a_decoder_it_answers_and_says_what_is_missing(policy: ChameleonPolicy, tmp_path: Path) -> None:
    """As transformers' converter leaves facebook's checkpoints."""
    drawable_checkpoint(policy, tmp_path)
    for loaded in (ChameleonPolicy.from_pretrained(tmp_path).eval(), ChameleonPolicy.without_weights(tmp_path)):
        assert "vqgan.ckpt" in loaded.cannot_draw
        with pytest.raises(DataError, match=r"asks for an image, but .*decoder.*vqgan\.ckpt.*beside the weights"):
            check_plans(loaded, [make_prompt("draw it")])
        check_plans(loaded, [make_prompt("what is it?", ("text",))])
        assert remarks_on(loaded, [make_prompt("what is it?", ("text",))]) == []
    loaded = ChameleonPolicy.from_pretrained(tmp_path).eval()
    with pytest.raises(ConfigError, match=r"ChameleonPolicy cannot draw: .*vqgan\.ckpt"):
        loaded.draw(torch.zeros(1, 16, dtype=torch.long))
    (rollout,) = generate(loaded, [make_prompt("what?", ("text",))], Sampling(num_generations=1, max_text_tokens=3))
    assert rollout.segments[0].tokens.numel() and loaded.image_tokens(torch.rand(1, 3, 32, 32)).shape == (1, 16)


def test_the_published_file_beside_the_weights_makes_it_draw(policy: ChameleonPolicy, tmp_path: Path) -> None:
    whole = drawable_checkpoint(policy, tmp_path)
    (tmp_path / "tokenizer").mkdir()
    torch.save({"state_dict": whole}, tmp_path / "tokenizer" / "vqgan.ckpt")
    loaded = ChameleonPolicy.from_pretrained(tmp_path).eval()
    tokens = policy.image_tokens(torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert torch.equal(loaded.draw(tokens), policy.draw(tokens))
    assert not ChameleonPolicy.without_weights(tmp_path).cannot_draw
    other = whole | {"quantize.embedding.weight": whole["quantize.embedding.weight"].flip(0)}
    torch.save({"state_dict": other}, tmp_path / "tokenizer" / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=r"vqgan\.ckpt: expected the VQGAN of this checkpoint, got .* codebook"):
        ChameleonPolicy.from_pretrained(tmp_path)
    del whole["decoder.conv_in.bias"]
    torch.save({"state_dict": whole}, tmp_path / "tokenizer" / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=r"vqgan\.ckpt: expected a VQGAN's conv_in\.bias"):
        ChameleonPolicy.from_pretrained(tmp_path)


def test_refusals() -> None:
    made = small_processor()
    made.image_seq_length = 64
    with pytest.raises(ConfigError, match=r"expected image_seq_length 16, .* 4 x 4 codes, got 64"):
        ChameleonPolicy(small_model(made.tokenizer, 0), made)
    made = small_processor()
    bare = small_model(made.tokenizer, 0)
    del bare.model.vocabulary_mapping.vocab_map[code_name(7)]
    with pytest.raises(ConfigError, match=r"vocabulary_map with 24 codes .*, got 23"):
        ChameleonPolicy(bare, made)


@pytest.mark.parametrize(
    ("name", "said"), [("facebook/chameleon-7b", 1), ("leloy/Anole-7b-v0.1-hf", 0), ("chameleon-anole", 0), ("x", 0)]
)
def test_chameleons_own_release_is_told(policy: ChameleonPolicy, name: str, said: int) -> None:
    made = policy.frozen_copy()
    made.model.name_or_path = name
    assert len(remarks_on(made, [make_prompt("draw it")])) == said
    assert not remarks_on(made, [make_prompt("what?", ("text",))])


def test_training_mode_changes_nothing(policy: ChameleonPolicy) -> None:
    made = sharp_chameleon().train()
    assert made.training and not any(module.training for module in made.vqmodel.modules())
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(made.draw(made.image_tokens(images)), policy.draw(policy.image_tokens(images)))
    assert not any(parameter.requires_grad for parameter in made.vqmodel.parameters())
