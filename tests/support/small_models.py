"""Small real checkpoints of the models that rewards load: transformers' own classes, configs and tokenizers, seeded.

Each builder writes a folder that `from_pretrained` reads, safetensors only, and returns it.  Weights are random, and
wider than transformers draws them, so that two inputs never give one output; they know nothing of the world.
`saved(build, factory)` keeps one folder per session.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from made import made_once, session_folder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.base_model import corpus
from syncr1.engine.world.tiny_janus import build_policy

WORDS = (
    "a an the of on in at with and is are to two three red blue green white black small big man woman dog cat horse "
    "bus table bench street beach field sky snow surf ##board ##s ##ing riding sitting standing wearing holding hat"
)
SENTENCES = ("a man riding a red surfboard", "two dogs sitting on the bench at the beach", "a blue bus on a street")
BLIP_SIZE, CLIP_SIZE, CLIP_POSITIONS = 48, 32, 77


def saved(build: Callable[[Path], Path], factory: pytest.TempPathFactory) -> Path:
    """The folder of `build`, made once in a session by whichever test asks first."""
    return made_once(session_folder(factory), build.__name__, build)


def seeded(make: Callable[[], PreTrainedModel], *, spread: float = 0.1, seed: int = 0) -> PreTrainedModel:
    """The model with every parameter drawn afresh: norms about 1, all else of standard deviation `spread`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                torch.nn.init.normal_(parameter, 1.0, spread)
            elif parameter.dim() > 0:
                torch.nn.init.normal_(parameter, 0.0, spread)
    return model


def wordpiece(folder: Path) -> BertTokenizerFast:
    """BERT's own tokenizer over WORDS, the letters and their continuations: other scripts become [UNK]."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *WORDS.split()]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=64)


def small_bert(folder: Path, *, seed: int = 0) -> Path:
    """BertModel: 3 layers of 32, 64 positions."""
    tokenizer = wordpiece(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    seeded(lambda: BertModel(config), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_blip(folder: Path, *, seed: int = 0) -> Path:
    """BlipForConditionalGeneration over 48-pixel images, its processor and BERT's tokenizer."""
    tokenizer = wordpiece(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        encoder_hidden_size=32,
        projection_dim=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
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
    seeded(lambda: BlipForConditionalGeneration(config), spread=0.3, seed=seed).save_pretrained(folder)
    pictures = BlipImageProcessor(size={"height": BLIP_SIZE, "width": BLIP_SIZE})
    BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def clip_tokenizer(sentences: Sequence[str] = SENTENCES) -> CLIPTokenizerFast:
    """CLIP's byte-level BPE with its end-of-word mark, trained on `sentences`; every text has an encoding."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(sentences, trainer)
    trained = bpe.get_vocab()
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    order = [*alphabet, *(f"{c}</w>" for c in alphabet), *sorted(trained, key=trained.__getitem__)]
    order = [*dict.fromkeys(order), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizerFast(
        vocab={token: i for i, token in enumerate(order)}, merges=merges, model_max_length=CLIP_POSITIONS
    )


def small_clip(folder: Path, *, seed: int = 0) -> Path:
    """CLIPModel over 32-pixel images and 77 text positions, its processor and its kind of tokenizer."""
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=CLIP_SIZE,
        patch_size=8,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    seeded(lambda: CLIPModel(config), seed=seed).save_pretrained(folder)
    crop = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    pictures = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=crop)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def small_t5(folder: Path, *, seed: int = 0) -> Path:
    """T5ForConditionalGeneration, 2 layers of 32, with a unigram tokenizer that knows brackets and commas."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz(),:"),
    )
    graph = "Generate Scene Graph: ( man , riding , surfboard ) , ( surfboard , is , red )"
    unigram.train_from_iterator([*SENTENCES, graph] * 4, trainer)
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    seeded(lambda: T5ForConditionalGeneration(config), spread=0.3, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_janus(folder: Path, *, seed: int = 0) -> Path:
    """The rendered world's tiny Janus, untrained."""
    build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=seed).save(folder)
    return folder
