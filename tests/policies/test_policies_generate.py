"""Policies of random small configurations against transformers' own `generate`: greedy text, guided greedy images.

What a configuration hides from a policy (grouped heads, head sizes, biases, norms, rotations, windows) must either be
computed as transformers does, or be refused when the policy is made.  Two logits nearer than NEAR may fall either way.
"""

from __future__ import annotations

import copy
import inspect
import random
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import PlainJanus, make_prompt, sharp_policy, world_photo
from small_emu3 import IMAGE_SIZE, PlainEmu3, sharp_emu3
from text_models import END, tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationMixin,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

NEAR = 1e-3
POSITIONS = 160
TEXT = ("text",)


def random_text(draw: random.Random, hidden: int, **fixed: Any) -> tuple[PreTrainedConfig, bool]:
    """(configuration of a decoder, whether a window hides keys)."""
    heads = draw.choice([2, 4, 8])
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": draw.choice([48, 96, 130]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "max_position_embeddings": POSITIONS,
        "initializer_range": draw.choice([0.1, 0.2]),
        "rms_norm_eps": draw.choice([1e-6, 1e-2]),
        "hidden_act": draw.choice(["silu", "gelu_pytorch_tanh"]),
        "rope_parameters": draw.choice(
            [
                {"rope_type": "default", "rope_theta": 1e4},
                {"rope_type": "default", "rope_theta": 50.0},
                {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            ]
        ),
    }
    kind, own, hides = draw.choice(
        [
            (LlamaConfig, {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}, False),
            (LlamaConfig, {"head_dim": draw.choice([8, 16, 24])}, False),
            (Qwen3Config, {"head_dim": 16}, False),
            (Qwen2Config, {}, False),
            (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, True),
            (MistralConfig, {"sliding_window": None, "head_dim": 8}, False),
            (MistralConfig, {"sliding_window": POSITIONS, "head_dim": 16}, False),
            (MistralConfig, {"sliding_window": 12, "head_dim": 8}, True),
        ]
    )
    return kind(**settings | own | fixed), hides


def seeded(make: Any, seed: int) -> Any:
    """A model whose norms and biases count, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "vqmodel" not in name:
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model.eval()


def same_text(mine: Tensor, out: Any, start: int, never: Tensor) -> None:
    """Token for token what `generate` gave, up to the first near tie."""
    theirs, logits = out.sequences[0, start:], torch.stack(out.logits)[:, 0]
    for place in range(min(len(mine), len(theirs))):
        if mine[place] == theirs[place]:
            continue
        top = logits[place].index_fill(0, never, -torch.inf).topk(2).values
        assert float(top[0] - top[1]) < NEAR, (place, mine.tolist(), theirs.tolist())
        return
    assert len(mine) == len(theirs)


def greedy(model: Any, never: Tensor, num_tokens: int, **inputs: Any) -> Any:
    ids = inputs["input_ids"]
    return model.generate(
        **inputs,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        suppress_tokens=never.tolist(),
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_text_models(seed: int) -> None:
    draw = random.Random(seed)
    config, hides = random_text(
        draw,
        32,
        vocab_size=300,
        tie_word_embeddings=draw.random() < 0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = seeded(lambda: AutoModelForCausalLM.from_config(config), seed)
    model.generation_config.eos_token_id = [2, tokenizer().convert_tokens_to_ids(END)]
    if hides:
        with pytest.raises(ValueError, match=r"CausalLMPolicy: .* sliding_window=.* hides keys"):
            CausalLMPolicy(model, tokenizer())
        return
    plain, policy = copy.deepcopy(model), CausalLMPolicy(model, tokenizer())
    prompts = [make_prompt(text, TEXT) for text in ("what is the colour?", "red", "a creature at the beach with hats")]
    for rollout in generate(policy, prompts, Sampling(num_generations=1, temperature=0.0, max_text_tokens=24)):
        ids = policy.prompt_tokens(rollout.prompt)[None]
        out = greedy(plain, policy._forbidden, 24, input_ids=ids)
        same_text(rollout.segments[0].tokens, out, ids.shape[1], policy._forbidden)


def random_janus(draw: random.Random, seed: int) -> tuple[JanusForConditionalGeneration, Any, bool]:
    """(a tiny Janus with another decoder inside, its processor, whether a window hides keys)."""
    known = sharp_policy()
    old = known.model.config
    text, hides = random_text(
        draw,
        old.text_config.hidden_size,
        vocab_size=old.text_config.vocab_size,
        tie_word_embeddings=False,
        **{name: getattr(old.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    config = JanusConfig(
        text_config=text,
        vision_config=old.vision_config,
        vq_config=old.vq_config,
        image_token_id=old.image_token_id,
        tie_word_embeddings=False,
    )
    model = seeded(lambda: JanusForConditionalGeneration(config), seed)
    model.model.vqmodel.load_state_dict(known.model.model.vqmodel.state_dict())
    model.model.generation_head.vision_head.weight.data.mul_(4)
    model.generation_config = copy.deepcopy(known.model.generation_config)
    return model, known.processor, hides


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
@torch.no_grad()
def test_janus(seed: int, tmp_path: Path) -> None:
    draw = random.Random(100 + seed)
    model, processor, hides = random_janus(draw, seed)
    if hides:
        with pytest.raises(ValueError, match=r"JanusPolicy: .* sliding_window=.* hides keys"):
            JanusPolicy(model, processor)
        return
    theirs, policy = copy.deepcopy(model), JanusPolicy(model, processor).eval()
    answers = [make_prompt("who is this?", TEXT, world_photo(tmp_path, 3)), make_prompt("what is the colour?", TEXT)]
    mean = torch.tensor(policy._normalisation()[0])[:, None, None]
    for rollout in generate(policy, answers, Sampling(num_generations=1, temperature=0.0, max_text_tokens=16)):
        ids = policy.prompt_tokens(rollout.prompt)[None]
        shown = {}
        if rollout.prompt.image is not None:
            shown = {"pixel_values": (policy.load_images([rollout.prompt.image]) - mean) / mean}
        out = greedy(theirs, policy._forbidden_text, 16, input_ids=ids, generation_mode="text", **shown)
        start = out.sequences.shape[1] - len(out.logits)
        same_text(rollout.segments[0].tokens, out, start, policy._forbidden_text)
    # As many words as our unconditional branch has pads, so that transformers' own is the same prompt.
    weight, prompt = draw.choice([1.5, 3.0, 5.0]), make_prompt("draw it.", ("image",))
    (ours,) = generate(policy, [prompt], Sampling(num_generations=1, temperature=0.0, cfg_weight=weight))
    ids = torch.cat([policy.prompt_tokens(prompt), torch.tensor([policy.image_start])])[None]
    mine, plain = ours.segments[0].tokens, PlainJanus(policy)
    if getattr(model.config.text_config, "layer_types", None) is None and images_can_be_generated():
        tokens = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
            guidance_scale=weight,
            max_length=64,
        )[0]
        different = (mine != tokens).nonzero().flatten()
        if len(different):
            top = guided_logits(plain, policy, ids[0], mine[: int(different[0])], weight).topk(2).values
            assert float(top[0] - top[1]) < NEAR, (mine.tolist(), tokens.tolist())
        return
    for place in range(len(mine)):
        logits = guided_logits(plain, policy, ids[0], mine[:place], weight)
        assert float(logits.max() - logits[mine[place]]) < NEAR, place


def images_can_be_generated() -> bool:
    """transformers' own image loop fails in some releases (5.17: a new argument of the cache's, that it leaves out),
    and in all up to 5.23 where masks come per kind of layer."""
    added = inspect.signature(GenerationMixin._prepare_static_cache).parameters.get("prefill_chunk_size")
    return added is None or added.default is not inspect.Parameter.empty


def guided_logits(plain: PlainJanus, policy: JanusPolicy, ids: Tensor, drawn: Tensor, weight: float) -> Tensor:
    """[V] of the next image token, from whole forwards of both branches."""
    begun = [plain.text(ids), plain.text(policy.unconditional_tokens())]
    c, u = (plain.image_logits(plain.hidden(torch.cat([start, plain.image(drawn)]))[-1]) for start in begun)
    return u + weight * (c - u)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_emu3(seed: int) -> None:
    draw, known = random.Random(200 + seed), sharp_emu3()
    old = known.model.config
    text = copy.deepcopy(old.text_config)
    text.num_attention_heads = draw.choice([2, 4, 8])
    text.num_key_value_heads = draw.choice([n for n in (1, 2, 4, 8) if text.num_attention_heads % n == 0])
    text.head_dim = text.hidden_size // text.num_attention_heads
    text.num_hidden_layers, text.rms_norm_eps = draw.choice([1, 2, 3]), draw.choice([1e-6, 1e-2])
    config = Emu3Config(
        text_config=text, vq_config=old.vq_config, vocabulary_map=old.vocabulary_map, image_area=IMAGE_SIZE**2
    )
    model = seeded(lambda: Emu3ForConditionalGeneration(config), seed)
    model.generation_config = copy.deepcopy(known.model.generation_config)
    policy = Emu3Policy(model, known.processor).eval()
    theirs = PlainEmu3(policy).model
    prompts = [make_prompt(text, TEXT) for text in ("what is the colour?", "who is at the beach")]
    never = torch.tensor(sorted({*policy._forbidden_text.tolist(), *range(policy._num_text, text.vocab_size)}))
    for rollout in generate(policy, prompts, Sampling(num_generations=1, temperature=0.0, max_text_tokens=16)):
        ids = policy.prompt_tokens(rollout.prompt)[None]
        same_text(
            rollout.segments[0].tokens, greedy(theirs, never, 16, input_ids=ids), ids.shape[1], policy._forbidden_text
        )


def test_a_window_is_refused_by_every_policy() -> None:
    """By the same words: a window that hides keys is no matter of which model it is in."""
    known, window = sharp_emu3(), {"sliding_window": 8}
    text = copy.deepcopy(known.model.config.text_config)
    text.sliding_window = window["sliding_window"]
    config = copy.deepcopy(known.model.config)
    config.text_config = text
    with pytest.raises(ValueError, match=r"Emu3Policy: .* sliding_window=8 hides keys"):
        Emu3Policy(Emu3ForConditionalGeneration(config), known.processor)
