"""A small Show-o: a Phi of transformers' class, five bits a code, and a tokenizer with the published control tokens.

Dims: n images, T tokens.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import PhiConfig, PreTrainedTokenizerFast

from syncr1.engine.policies.magvit import MagvitConfig
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.policies.show_o_model import ShowOConfig, ShowOForUnifiedGeneration, ShowOProcessor

EOS = "<|endoftext|>"
VQ = MagvitConfig(
    bits=5,
    channels=32,
    encoder_multipliers=(1, 1, 2),
    encoder_blocks=(1, 2, 1),
    decoder_multipliers=(1, 2, 1),
    decoder_blocks=(2, 1, 1),
)
"""Four pixels a code; encoder and decoder of different widths and depths, as the published ones."""
IMAGE_SIZE = 16
"""4 x 4 codes."""
TEXT_SLOTS = 24


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and EOS, which is BOS and the unknown as well, as Phi-1.5's is; none of Show-o's yet."""
    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {text: index for index, text in enumerate([*characters, EOS])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token=EOS))
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=EOS, eos_token=EOS, unk_token=EOS)


def processor(image_size: int = IMAGE_SIZE) -> ShowOProcessor:
    return ShowOProcessor.made_of(tokenizer(), image_size)


def phi(rows: int) -> PhiConfig:
    return PhiConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        qk_layernorm=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )


def model(words: PreTrainedTokenizerFast, seed: int, *, image_size: int = IMAGE_SIZE, more: int = 0) -> Any:
    """Random weights, biases and norms as well.

    Args:
        words: with the control tokens.
        seed: of the weights.
        image_size: pixels of a side.
        more: rows of text behind the tokens, as concepts without a name have.
    """
    config = ShowOConfig(
        text_config=phi(len(words) + more + VQ.num_codes + 1),
        vq_config=asdict(VQ),
        image_size=image_size,
        text_slots=TEXT_SLOTS,
    )
    config.take_tokens(words)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ShowOForUnifiedGeneration(config)
        for name, parameter in made.showo.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, float("norm" in name and name.endswith("weight")), 0.2)
    fill(made.vqmodel)
    return made.eval()


@cache
def _sharp(seed: int, image_size: int) -> tuple[Any, ShowOProcessor]:
    made = processor(image_size)
    return model(made.tokenizer, seed, image_size=image_size), made


def small_show_o(seed: int = 0, *, image_size: int = IMAGE_SIZE) -> tuple[Any, ShowOProcessor]:
    """(model, processor) of 4 x 4 codes, or of 2 x 2 with 8 pixels."""
    return copy.deepcopy(_sharp(seed, image_size))


def sharp_show_o(seed: int = 0, *, image_size: int = IMAGE_SIZE) -> ShowOPolicy:
    """An untrained small Show-o whose distributions are far from uniform; the embedded worlds have 32 pixels."""
    return ShowOPolicy(*small_show_o(seed, image_size=image_size)).eval()


def noise(count: int, salt: int) -> Tensor:
    """[count] float64 in [-1, 1), the same on every machine and with every torch."""
    places = torch.arange(count, dtype=torch.float64)
    return torch.frac((torch.sin(places * 12.9898 + salt * 78.233) * 43758.5453).abs()) * 2 - 1


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Gives a module weights by the order of their names, whatever code it is of; buffers are constants."""
    for salt, (name, parameter) in enumerate(sorted(module.named_parameters())):
        values = noise(parameter.numel(), salt).view(parameter.shape)
        if parameter.dim() > 1:
            values *= math.sqrt(3 / (parameter.numel() / parameter.shape[0]))
        elif "norm" in name:
            values = values * 0.3 + name.endswith("weight")
        else:
            values *= 0.1
        parameter.copy_(values)


def pictures(count: int, size: int = IMAGE_SIZE) -> Tensor:
    """[n, 3, size, size] float32 in [-1, 1)."""
    return noise(count * 3 * size * size, 1).view(count, 3, size, size).float()


def publish(
    folder: Path, *, seed: int = 0, weights: str = "bin", more: int = 0, beside: bool = True, **config: Any
) -> dict[str, Tensor]:
    """Writes a small Show-o as showlab publishes it, its tokenizers within; returns its tensors, the image tokenizer's
    under `vqmodel.`.

    Args:
        folder: to make.
        seed: of the weights.
        weights: bin or safetensors.
        more: rows of text without a token.
        beside: its tokenizers as well, in `magvitv2` and `phi-1_5`.
        config: further fields of config.json.
    """
    words = tokenizer()
    own = len(words)
    made = model(processor().tokenizer, seed, more=more)
    tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    settings = {
        "_class_name": "Showo",
        "_diffusers_version": "0.30.1",
        "codebook_size": VQ.num_codes,
        "llm_model_path": "microsoft/phi-1_5",
        "llm_vocab_size": own,
        "load_from_showo": True,
        "mask_token_id": made.config.mask_token_id,
        "num_new_special_tokens": 10,
        "num_vq_tokens": made.config.num_image_tokens,
        "vocab_size": made.config.mask_token_id + 1,
        "w_clip_vit": False,
    }
    _save(folder, settings | config, _under(tensors, "showo.", keep=True), weights)
    if beside:
        _save(folder / "magvitv2", {"_class_name": "MAGVITv2"}, _under(tensors, "vqmodel."), weights)
        words.save_pretrained(folder / "phi-1_5")
        phi(own).save_pretrained(folder / "phi-1_5")
    return tensors


def _under(tensors: dict[str, Tensor], prefix: str, *, keep: bool = False) -> dict[str, Tensor]:
    return {
        name if keep else name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], weights: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if weights == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "pytorch_model.safetensors")
