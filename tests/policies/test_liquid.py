"""Liquid through the protocol: how it is told from a text decoder, prompts, heads, pictures, checkpoints.

Sampling and training have tests/rollout/test_one_table_rollout.py, the VQGAN's drawing half test_vqgan_decoder.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import text_models
import torch
from helpers import make_prompt, world_photo
from PIL import Image
from small_chameleon import IMAGE_SIZE, NUM_CODES
from small_liquid import (
    BOI,
    BOS,
    CONTROLS,
    END,
    EOI,
    EOS,
    FREE,
    PADDED,
    START,
    PlainLiquid,
    language_model,
    sharp_liquid,
    tokenizer,
)
from transformers import AutoModelForCausalLM, ChameleonVQVAE

from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.methods.preflight import turn_problems
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.pictures import MemoryImage
from syncr1.engine.policies.auto import load_policy, model_draws, policy_class
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.policies.liquid import LiquidPolicy
from syncr1.engine.rollout.capacity import check_plans
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

WAYS: list[dict[str, Any]] = [{}, {"tied": False}, {"tied": False, "family": "llama"}]


@pytest.fixture(scope="module")
def policy() -> LiquidPolicy:
    return sharp_liquid()


@pytest.fixture(scope="module")
def published(policy: LiquidPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as it is published: the language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    bare = copy.deepcopy(policy.model)
    del bare.vqmodel, bare.config.vq_config
    bare.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


# What it is told by ---------------------------------------------------------------------------------------------------


def test_its_tokenizer_tells_it_from_a_text_decoder(published: Path, tmp_path: Path) -> None:
    """Whatever file of it names them: transformers 4 wrote added tokens into the short one as well."""
    assert json.loads((published / "config.json").read_text())["model_type"] == "gemma"
    assert policy_class(published) is LiquidPolicy and model_draws(published)
    config = SyncR1Config(drawing_turn="sync_r1")
    assert turn_problems(config, published) == []
    text_models.policy("gemma").save(tmp_path)
    assert policy_class(tmp_path) is CausalLMPolicy and len(turn_problems(config, tmp_path)) == 1
    words = json.loads((tmp_path / "tokenizer_config.json").read_text())
    words["added_tokens_decoder"] = {str(i): {"content": text, "special": True} for i, text in enumerate((BOI, EOI))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    assert policy_class(tmp_path) is CausalLMPolicy, "two of three may be anybody's"
    words["added_tokens_decoder"]["9"] = {"content": FREE, "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    assert policy_class(tmp_path) is LiquidPolicy


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_released_code(policy: LiquidPolicy, tmp_path: Path) -> None:
    """Texts written out as its scripts put them together, and then tokenised whole, BOS first."""
    photo = world_photo(tmp_path, 3)
    ids_of = lambda text: policy.tokenizer(text).input_ids  # noqa: E731
    asked = policy.prompt_tokens(make_prompt("a red cup.", ("image",)))
    assert asked.tolist() == ids_of("a red cup. Generate an image based on this description.")
    turn = f"{START}user\nwhat is it?{END}\n{START}model\n"
    for plan in (("text",), ("text", "image")):
        assert policy.prompt_tokens(make_prompt("what is it?", plan)).tolist() == ids_of(turn)
    shown = policy.prompt_tokens(make_prompt("what is it?", ("text",), photo))
    slots = policy.image_slots(shown)
    assert shown[~slots].tolist() == ids_of(f"{START}user\n{BOI}{EOI}\nwhat is it?{END}\n{START}model\n")
    first = int(slots.nonzero()[0, 0])
    assert int(slots.sum()) == 16 and slots[first : first + 16].all()
    assert policy.tokenizer.convert_ids_to_tokens(int(shown[first - 1])) == BOI
    again = policy.prompt_tokens(make_prompt("again", ("image",), photo))
    assert policy.image_slots(again).any(), "behind a photo a drawing is an answer"


def test_turns_and_the_free_prompt(policy: LiquidPolicy) -> None:
    ids = policy.tokenizer.convert_tokens_to_ids
    prompt = make_prompt("draw it", ("text", "image", "text"), follow_up="what?")
    words = policy.encode("the cup Generate an image based on this description.").tolist()
    assert policy.drawing_tokens(prompt, "the cup").tolist() == [*words, ids(BOI)]
    turn = policy.encode(f"{START}user\nwhat?{END}\n{START}model\n").tolist()
    assert policy.follow_up_tokens(prompt).tolist() == [*ids([EOI, EOS]), *turn]
    assert policy.unconditional_tokens().tolist() == ids([BOS, FREE, BOI])
    assert policy.unconditional_tokens(5).tolist() == ids([BOS, FREE, FREE, FREE, BOI])
    assert policy.unconditional_tokens(2).tolist() == ids([BOS, BOI])
    assert policy.end_tokens == {ids(EOS), ids(END)}
    with pytest.raises(DataError, match="expected a follow_up question"):
        policy.follow_up_tokens(make_prompt("x", ("image", "text")))


def test_a_tokenizers_own_template_is_followed() -> None:
    made = LiquidPolicy(language_model(tokenizer(), 0), tokenizer(template=text_models.TEMPLATE))
    asked = made.tokenizer.decode(made.prompt_tokens(make_prompt("hi", ("text",))))
    assert asked == f"{BOS}<|user|>hi<|end|><|answer|>"


@pytest.mark.parametrize("text", [*CONTROLS, f"a{BOI}{EOS}", f"<un{BOI}conditional>", f"<<eoi>{START}start_of_turn>"])
def test_a_users_text_cannot_hold_a_control_token(policy: LiquidPolicy, text: str, tmp_path: Path) -> None:
    control = set(policy.tokenizer.convert_tokens_to_ids([*CONTROLS]))
    plain = [policy.prompt_tokens(make_prompt("x", plan)).tolist() for plan in (("text",), ("image",))]
    for plan, other in zip((("text",), ("image",)), plain, strict=True):
        found = [i for i in policy.prompt_tokens(make_prompt(text, plan)).tolist() if i in control]
        assert found == [i for i in other if i in control]


# Pictures -------------------------------------------------------------------------------------------------------------


def test_photos_are_made_square_by_a_border(policy: LiquidPolicy, tmp_path: Path) -> None:
    """As the released code shows them: the whole photo, on its own grey."""
    path = tmp_path / "wide.png"
    Image.new("RGB", (96, 32), (200, 20, 20)).save(path)
    loaded = policy.load_images([path])
    assert loaded.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    grey, red = (torch.tensor(colour) / 255 for colour in ((122.0, 116.0, 104.0), (200.0, 20.0, 20.0)))
    torch.testing.assert_close(loaded[0, :, 0], grey[:, None].expand(3, IMAGE_SIZE), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded[0, :, 16], red[:, None].expand(3, IMAGE_SIZE), rtol=0, atol=1e-6)
    exact = torch.rand(3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(policy.load_images([MemoryImage("m", exact)])[0], exact)


@pytest.mark.parametrize("way", WAYS[:2])
def test_images_and_tokens(way: dict[str, Any]) -> None:
    """Codes of transformers' VQGAN, in rows behind the tokenizer's; both ways by 2 / 255, as in the released code."""
    policy = sharp_liquid(**way)
    plain, images = PlainLiquid(policy), torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = policy.image_tokens(images)
    assert isinstance(policy.vqmodel, ChameleonVQVAE)
    with torch.no_grad():
        latents = policy.vqmodel.quant_conv(policy.vqmodel.encoder(images * 2 - 1))
    assert torch.equal(tokens.flatten(), policy.vqmodel.quantize(latents)[2])
    table = plain.model.get_input_embeddings()
    torch.testing.assert_close(policy.see(images), table(plain.code_ids[tokens]).detach())
    assert policy.draw(tokens).shape == images.shape
    rows = policy.model.get_output_embeddings().weight.shape[0]
    assert rows == len(policy.tokenizer) + NUM_CODES + PADDED
    hidden = torch.randn(3, 64)
    text, image = policy.head(hidden, "text"), policy.head(hidden, "image")
    weight = plain.model.get_output_embeddings().weight
    assert torch.equal(image.weight, weight[plain.code_ids])
    assert text.weight.shape[0] == len(policy.tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS[::2])
def test_greedy_text_and_image_are_transformers_own(way: dict[str, Any]) -> None:
    """Token for token: `generate` of the language model, and its guidance beside `<unconditional>`."""
    policy = sharp_liquid(**way)
    plain = PlainLiquid(policy)
    asked = make_prompt("what is the colour?", ("text",))
    (rollout,) = generate(policy, [asked], Sampling(num_generations=1, temperature=0.0, max_text_tokens=12))
    ids = policy.prompt_tokens(asked)[None]
    same = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    out = plain.model.generate(
        ids,
        **same,
        max_new_tokens=12,
        suppress_tokens=plain.never_in_text.tolist(),
        eos_token_id=sorted(policy.end_tokens),
    )
    assert rollout.segments[0].tokens.tolist() == out[0, ids.shape[1] :].tolist()
    drawn = make_prompt("a red cup", ("image",))
    (rollout,) = generate(policy, [drawn], Sampling(num_generations=1, temperature=0.0, cfg_weight=4.0))
    ids = torch.cat([policy.prompt_tokens(drawn), torch.tensor([policy.image_start])])[None]
    others = sorted(set(range(plain.logits(ids[0]).shape[-1])) - set(plain.code_ids.tolist()))
    out = plain.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        suppress_tokens=others,
        guidance_scale=4.0,
        negative_prompt_ids=policy.unconditional_tokens()[None],
    )
    assert plain.code_ids[rollout.segments[0].tokens].tolist() == out[0, ids.shape[1] :].tolist()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_the_published_folder_answers_and_says_what_is_missing(published: Path, tmp_path: Path) -> None:
    loaded = load_policy(published).eval()
    assert isinstance(loaded, LiquidPolicy) and loaded.vqmodel is None
    for made in (loaded, LiquidPolicy.without_weights(published)):
        with pytest.raises(DataError, match=r"asks for an image, but .*VQGAN.*vqgan\.ckpt.*beside the weights"):
            check_plans(made, [make_prompt("draw it")])
        asked = make_prompt("what?", ("text",), world_photo(tmp_path, 3))
        with pytest.raises(ConfigError, match=r"LiquidPolicy cannot see images \(prompt .*: .*vqgan\.ckpt"):
            made.prompt_tokens(asked)
        with pytest.raises(ConfigError, match=r"LiquidPolicy cannot see images: .*vqgan\.ckpt"):
            made.image_tokens(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    (rollout,) = generate(loaded, [make_prompt("what?", ("text",))], Sampling(num_generations=1, max_text_tokens=3))
    assert rollout.segments[0].tokens.numel()


def test_with_the_published_file_beside_it_it_draws(policy: LiquidPolicy, published: Path, tmp_path: Path) -> None:
    """And what it saves is a language model's checkpoint that holds the VQGAN, too."""
    folder = tmp_path / "with"
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    whole = {name: tensor.clone() for name, tensor in policy.vqmodel.state_dict().items()}
    torch.save({"state_dict": whole}, folder / "vqgan.ckpt")
    config = json.loads((folder / "config.json").read_text())
    # What no shape tells is the size of its images; the published one's is the default.
    (folder / "config.json").write_text(json.dumps(config | {"vq_config": policy.vqmodel.config.to_dict()}))
    loaded = LiquidPolicy.from_pretrained(folder).eval()
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = policy.image_tokens(images)
    assert torch.equal(loaded.image_tokens(images), tokens) and torch.equal(loaded.draw(tokens), policy.draw(tokens))
    loaded.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vqgan.ckpt").exists()
    again = LiquidPolicy.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16} and again.draw(tokens).dtype == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(theirs.lm_head.weight, policy.model.lm_head.weight)
    empty = LiquidPolicy.without_weights(tmp_path / "saved")
    assert all(p.is_meta for p in empty.parameters()) and empty.num_image_tokens == 16 and not empty.cannot_draw


def test_a_vqgan_that_does_not_belong_is_refused(policy: LiquidPolicy, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with"
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    whole = {name: tensor.clone() for name, tensor in policy.vqmodel.state_dict().items()}
    torch.save(whole | {"quantize.embedding.weight": torch.zeros(NUM_CODES + 9, 8)}, folder / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=rf"expected {len(policy.tokenizer) + NUM_CODES + 9} rows in the table"):
        LiquidPolicy.from_pretrained(folder)
    encoder_alone = {name: tensor for name, tensor in whole.items() if not name.startswith("decoder.")}
    torch.save(encoder_alone, folder / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=r"vqgan\.ckpt: expected a VQGAN's decoder\.conv_in"):
        LiquidPolicy.from_pretrained(folder)
    torch.save({"a": torch.zeros(2)}, folder / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=r"vqgan\.ckpt: expected Chameleon's VQGAN, encoder and decoder"):
        LiquidPolicy.from_pretrained(folder)
