"""Captioners on small checkpoints: BLIP against greedy search by hand, a policy against its rollout."""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import sharp_policy
from small_models import BLIP_SIZE, saved, small_blip
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor

from syncr1.engine.errors import ConfigError
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.captioner import QUESTION, BlipCaptioner, PolicyCaptioner
from syncr1.engine.rewards.builtin.pretrained import Preparation
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_blip, tmp_path_factory)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Six flat and noisy pictures that differ strongly, without the sharpest of edges."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(6, 3, 1, 1, generator=generator)
    rough = (flat + 0.7 * torch.randn(6, 3, 12, 8, generator=generator)).clamp(0, 1)
    return torch.nn.functional.interpolate(rough, (60, 40), mode="bilinear")


def greedy(model: BlipForConditionalGeneration, pixels: Tensor, most: int) -> list[int]:
    """Tokens by the decoder alone: whole sequence each step, no cache, one image."""
    text = model.config.text_config
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        tokens = torch.tensor([[text.bos_token_id]])
        for _ in range(most):
            logits = model.text_decoder(tokens, encoder_hidden_states=seen, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
            if int(tokens[0, -1]) == text.sep_token_id:
                break
    return tokens[0].tolist()


def test_blip_captions_are_greedy_and_do_not_depend_on_the_batch(folder: Path, images: Tensor) -> None:
    captioner = BlipCaptioner.from_pretrained(folder, max_new_tokens=9, batch_size=4)
    captions = captioner(images)
    model, processor = (
        BlipForConditionalGeneration.from_pretrained(folder).eval(),
        BlipProcessor.from_pretrained(folder),
    )
    for image, caption in zip(images, captions, strict=True):
        tokens = greedy(model, captioner.preparation(image[None]), 9)
        assert caption == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert captions == [caption for image in images for caption in captioner(image[None])]
    assert len(set(captions)) > 2 and all(len(caption.split()) <= 9 for caption in captions)
    assert captioner(images[:0]) == []


def test_blip_reads_what_its_processor_reads(folder: Path, images: Tensor) -> None:
    """8-bit pictures through the processor: the same captions, pixels within the rounding to 8 bits."""
    captioner = BlipCaptioner.from_pretrained(folder, max_new_tokens=9)
    processor = BlipProcessor.from_pretrained(folder)
    bytes_of = (images * 255).round().to(torch.uint8)
    theirs = processor(images=list(bytes_of), return_tensors="pt").pixel_values
    ours = captioner.preparation(bytes_of / 255.0)
    levels = (ours - theirs).abs() * 255 * min(processor.image_processor.image_std)
    assert float(levels.mean()) < 0.5 and float(levels.max()) < 4.0
    own_size = torch.rand(2, 3, BLIP_SIZE, BLIP_SIZE).mul(255).round() / 255
    expected = processor(images=list((own_size * 255).round().to(torch.uint8)), return_tensors="pt").pixel_values
    torch.testing.assert_close(Preparation.of(processor.image_processor)(own_size), expected, rtol=0, atol=1e-5)
    tokens = captioner.model.generate(pixel_values=theirs, max_new_tokens=9)
    words = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert sum(a == b for a, b in zip(words, captioner(images), strict=True)) >= 5


@pytest.mark.parametrize("bad", [torch.rand(1, 3, 8, 8) * 2 - 1, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_images_out_of_range_are_refused(folder: Path, bad: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        BlipCaptioner.from_pretrained(folder)(bad)
    with pytest.raises(ValueError, match="expected"):
        PolicyCaptioner(sharp_policy())(bad)


def test_blip_needs_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        BlipCaptioner.from_pretrained(tmp_path / "nowhere")
    folder = small_blip(tmp_path / "blip")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        BlipCaptioner.from_pretrained(folder)


def test_policy_captions_are_its_answers(tmp_path: Path) -> None:
    """The same words as for pictures in files, whatever the batch; the policy keeps its mode."""
    from torchvision.utils import save_image

    policy = sharp_policy().train()
    policy.decoder().eval()
    modes = [module.training for module in policy.modules()]
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)).mul(255).round() / 255
    captioner = PolicyCaptioner(policy, max_tokens=8, batch_size=2)
    captions = captioner(images)
    assert [module.training for module in policy.modules()] == modes and policy.training
    prompts = []
    for i, image in enumerate(images):
        save_image(image, tmp_path / f"{i}.png")
        prompts.append(
            Prompt(id=str(i), task="caption", text=QUESTION, images=(tmp_path / f"{i}.png",), segments=("text",))
        )
    answers = generate(policy.eval(), prompts, Sampling(num_generations=1, temperature=0.0, max_text_tokens=8))
    assert captions == [rollout.text.strip() for rollout in answers]
    assert captioner(images[:0]) == []


def test_policy_captions_can_be_sampled(tmp_path: Path) -> None:
    policy = sharp_policy()
    images = torch.rand(4, 3, 20, 20)
    captions = {seed: PolicyCaptioner(policy, max_tokens=6, temperature=1.0, seed=seed)(images) for seed in (0, 1)}
    assert captions[0] != captions[1]
    assert captions[0] == PolicyCaptioner(policy, max_tokens=6, temperature=1.0, seed=0)(images)
