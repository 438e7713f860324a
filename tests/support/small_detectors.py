"""Small random checkpoints of the detectors and question answerers that image rewards load: transformers' own classes.

As in small_models.py: each builder writes a folder that `from_pretrained` reads, and returns it.
"""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

from small_models import BLIP_SIZE, CLIP_POSITIONS, CLIP_SIZE, clip_tokenizer, seeded, wordpiece
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GitVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SwinConfig,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

CLASSES = ("person", "dog", "mouse", "tv")
"""Of the small Mask2Former, as COCO calls them."""
SQUARE = {"height": CLIP_SIZE, "width": CLIP_SIZE}


def _swin() -> SwinConfig:
    return SwinConfig(
        image_size=CLIP_SIZE,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def small_mask2former(folder: Path) -> Path:
    """Mask2Former over a Swin of width 8, ten queries, CLASSES."""
    config = Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    seeded(lambda: Mask2FormerForUniversalSegmentation(config), spread=0.3).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32).save_pretrained(folder)
    return folder


def small_owlv2(folder: Path) -> Path:
    """OWLv2 over pictures of 32 pixels in 16 patches, CLIP's tokenizer, 16 text positions."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 16
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Owlv2Config(
        text_config=text | width, vision_config={**width, "image_size": CLIP_SIZE, "patch_size": 8}, projection_dim=32
    )
    seeded(lambda: Owlv2ForObjectDetection(config)).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size=SQUARE), tokenizer).save_pretrained(folder)
    return folder


def small_grounding_dino(folder: Path) -> Path:
    """Grounding DINO over a Swin and a BERT of width 16 and 32."""
    tokenizer = wordpiece(folder)
    text = {"model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    config = GroundingDinoConfig(
        backbone_config=_swin(),
        text_config=text,
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_feature_levels=4,
        max_text_len=64,
        encoder_n_points=2,
        decoder_n_points=2,
    )
    seeded(lambda: GroundingDinoForObjectDetection(config)).save_pretrained(folder)
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def small_siglip(folder: Path) -> Path:
    """SigLIP over pictures of 32 pixels, 16 text positions."""
    tokenizer = wordpiece(folder)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config={**width, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**width, "image_size": CLIP_SIZE, "patch_size": 8},
    )
    seeded(lambda: SiglipModel(config)).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size=SQUARE), tokenizer).save_pretrained(folder)
    return folder


def small_aesthetic(folder: Path) -> Path:
    """A CLIP vision tower and LAION's five layers in one safetensors file, as shunk031's conversions are."""
    import torch
    from safetensors.torch import load_file, save_file

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=CLIP_SIZE,
        patch_size=8,
    )
    seeded(lambda: CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=SQUARE).save_pretrained(folder)
    weights, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for index, (wide, narrow) in {0: (24, 16), 2: (16, 8), 4: (8, 4), 6: (4, 3), 7: (3, 1)}.items():
        weights[f"layers.{index}.weight"] = torch.randn(narrow, wide, generator=random)
        weights[f"layers.{index}.bias"] = torch.randn(narrow, generator=random)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _answering(folder: Path) -> object:
    tokenizer = wordpiece(folder)
    tokenizer.add_tokens(["yes", "no"])
    return tokenizer


def small_blip_vqa(folder: Path) -> Path:
    """BlipForQuestionAnswering over pictures of 48 pixels, whose tokenizer has yes and no."""
    tokenizer = _answering(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        encoder_hidden_size=32,
        projection_dim=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"),
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = BlipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=BLIP_SIZE,
        patch_size=16,
    )
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    seeded(lambda: BlipForQuestionAnswering(config), spread=0.3).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": BLIP_SIZE, "width": BLIP_SIZE}), tokenizer).save_pretrained(folder)
    return folder


def small_git(folder: Path) -> Path:
    """GitForCausalLM over pictures of 32 pixels, whose tokenizer has yes and no."""
    tokenizer = _answering(folder)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GitConfig(
        vision_config=GitVisionConfig(**width, image_size=CLIP_SIZE, patch_size=8).to_dict(),
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        **width,
    )
    seeded(lambda: GitForCausalLM(config), spread=0.3).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=SQUARE)
    GitProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)


def small_llava(folder: Path) -> Path:
    """Llava, an image-text-to-text model with a chat template, whose tokenizer has yes and no."""
    tokenizer = _answering(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**width, image_size=CLIP_SIZE, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(**width, vocab_size=len(tokenizer), max_position_embeddings=256),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    seeded(lambda: LlavaForConditionalGeneration(config), spread=0.3).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=SQUARE)
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def small_trocr(folder: Path) -> Path:
    """TrOCR: a ViT over pictures of 32 pixels and a text decoder."""
    tokenizer = clip_tokenizer()
    vision = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=CLIP_SIZE,
        patch_size=8,
    )
    text = TrOCRConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=CLIP_POSITIONS,
        cross_attention_hidden_size=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    seeded(lambda: VisionEncoderDecoderModel(config=config), spread=0.3).save_pretrained(folder)
    TrOCRProcessor(ViTImageProcessor(size=SQUARE), tokenizer).save_pretrained(folder)
    return folder
