"""Texts of every policy against transformers' own `generate`, token for token: the likeliest, and sampled ones.

Sampled texts are drawn from transformers' logits with the sampler's own random numbers (`parity_cases.OurDraws`). What
a configuration hides from a policy must either be computed as transformers does, or be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt
from parity_cases import (
    CELLS,
    HIDING,
    TEXT_ONLY,
    Cell,
    OurDraws,
    config_of,
    emu3_of,
    emu3_policy,
    janus_of,
    janus_policy,
    plain,
    random_cell,
    same_tokens,
    seeded,
)
from PIL import Image
from text_models import END, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, LogitsProcessorList

from syncr1.engine.pictures import open_picture
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

TEXT = ("text",)
MOST = 12
WORDS = ("what is the colour?", "a creature at the beach with hats")


def decoder(cell: Cell, seed: int) -> Any:
    """A text model whose vocabulary has rows without a token."""
    config = config_of(cell, 32, 300, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = seeded(lambda: AutoModelForCausalLM.from_config(config), seed)
    model.generation_config.eos_token_id = [2, tokenizer().convert_tokens_to_ids(END)]
    return model


def check_text(policy: Policy, model: Any, rollout: Rollout, sampling: Sampling, inputs: dict[str, Tensor]) -> None:
    """What `model` of transformers makes of a prompt with the same random numbers."""
    head = policy.head(torch.zeros(1, policy.decoder().config.hidden_size), "text")
    never = head.forbidden
    assert never is not None
    beyond = torch.arange(head.weight.shape[0], model.lm_head.weight.shape[0])  # of Emu3: the codes, which are no text
    draws = OurDraws(rollout, sampling, 0, forbidden=torch.cat([never, beyond]))
    # Janus's own `generate` hands everything to this one for text, but for the processors of logits.
    out = GenerationMixin.generate(
        model,
        **inputs,
        do_sample=False,
        max_new_tokens=MOST,
        eos_token_id=sorted(policy.end_tokens),
        logits_processor=LogitsProcessorList([draws]),
    )
    found = out[0, inputs["input_ids"].shape[1] :].tolist()
    same_tokens(rollout.segments[0].tokens.tolist(), found, draws.near)


def check_texts(policy: Policy, prompts: list[Prompt], inputs_of: Callable[[Prompt], dict[str, Tensor]]) -> None:
    """Greedy and sampled; the rollouts of all prompts come from one batch, transformers takes one at a time."""
    model = plain(policy)
    for temperature in (0.0, 0.9):
        sampling = Sampling(num_generations=1, temperature=temperature, max_text_tokens=MOST, seed=3)
        for rollout in generate(policy, prompts, sampling):
            check_text(policy, model, rollout, sampling, inputs_of(rollout.prompt))


@pytest.mark.parametrize("name", [*CELLS, *TEXT_ONLY])
@torch.no_grad()
def test_text_models(name: str) -> None:
    policy = CausalLMPolicy(decoder((CELLS | TEXT_ONLY)[name], 0), tokenizer())

    def inputs_of(prompt: Prompt) -> dict[str, Tensor]:
        turns = [{"role": "user", "content": prompt.text}]
        return policy.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    check_texts(policy, [make_prompt(text, TEXT) for text in WORDS], inputs_of)


IN_JANUS = ("tied", "one key head", "padded vocabulary", "dynamic rope", "llama3 rope", "yarn rope", "qwen3")
"""The others differ from these in nothing that the model around the decoder could change."""


def janus_inputs(policy: JanusPolicy, prompt: Prompt) -> dict[str, Any]:
    """The processor's own, the photo's pixels included."""
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt.text}]
    images = {}
    if prompt.images:
        content, images = [{"type": "image"}, *content], {"images": [open_picture(prompt.images[0])]}
    text = policy.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    policy.processor.num_image_tokens = policy.num_image_slots  # 576 in transformers 5.12, whatever it is given
    return policy.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)


@torch.no_grad()
def test_a_text_model_in_bfloat16() -> None:
    """Each token is within 1/32 of the greatest logit's size of it, and nearly all are the greatest themselves."""
    policy = CausalLMPolicy(decoder(CELLS["tied"], 0).bfloat16(), tokenizer())
    model, sampling = plain(policy), Sampling(num_generations=1, temperature=0.0, max_text_tokens=MOST)
    for rollout in generate(policy, [make_prompt(text, TEXT) for text in WORDS], sampling):
        tokens = rollout.segments[0].tokens
        ids = torch.cat([rollout.prompt_tokens, tokens])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(tokens) - 1 : -1].float()
        logits[:, policy._forbidden] = -torch.inf
        missed = logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]
        assert missed.max() <= logits[logits.isfinite()].abs().max() / 32 and (missed == 0).float().mean() > 0.8


def asked(tmp_path: Path) -> list[Prompt]:
    """A photo that is no square, and words alone."""
    Image.effect_noise((96, 40), 90).convert("RGB").save(tmp_path / "wide.png")
    return [make_prompt("who is this?", TEXT, tmp_path / "wide.png"), make_prompt(WORDS[0], TEXT)]


@pytest.mark.parametrize("name", IN_JANUS)
@torch.no_grad()
def test_janus(name: str, tmp_path: Path) -> None:
    size = 48 if name == "tied" else 32
    policy = janus_policy(*janus_of(CELLS[name], 1, image_size=size))
    check_texts(policy, asked(tmp_path), lambda prompt: janus_inputs(policy, prompt))


EMU3: dict[str, dict[str, int]] = {
    "as many key heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "num_hidden_layers": 1},
    "padded vocabulary": {"padding": 50, "num_attention_heads": 8},
}


@pytest.mark.parametrize("name", EMU3)
@torch.no_grad()
def test_emu3(name: str) -> None:
    policy = emu3_policy(*emu3_of(2, **EMU3[name]))
    check_texts(
        policy, [make_prompt(text, TEXT) for text in WORDS], lambda p: {"input_ids": policy.prompt_tokens(p)[None]}
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_random_decoders(seed: int, tmp_path: Path) -> None:
    """Heads, layers and widths at random, in a text model and in a Janus."""
    text = CausalLMPolicy(decoder(random_cell(seed), seed), tokenizer())
    prompts = [make_prompt(words, TEXT) for words in WORDS]
    check_texts(text, prompts, lambda prompt: {"input_ids": text.prompt_tokens(prompt)[None]})
    janus = janus_policy(*janus_of(random_cell(100 + seed), seed))
    check_texts(janus, asked(tmp_path), lambda prompt: janus_inputs(janus, prompt))


@pytest.mark.parametrize("name", HIDING)
def test_a_window_is_refused_by_every_policy(name: str) -> None:
    """By the same words: a window that hides keys is no matter of which model it is in."""
    with pytest.raises(ValueError, match=r"CausalLMPolicy: .* sliding_window=12 hides keys"):
        CausalLMPolicy(decoder(HIDING[name], 0), tokenizer())
    with pytest.raises(ValueError, match=r"JanusPolicy: .* sliding_window=12 hides keys"):
        janus_policy(*janus_of(HIDING[name], 0))
    with pytest.raises(ValueError, match=r"Emu3Policy: .* sliding_window=12 hides keys"):
        emu3_policy(*emu3_of(0, sliding_window=12))
