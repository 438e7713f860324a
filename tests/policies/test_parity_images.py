"""Drawings of Janus and Emu3 against transformers' own `generate` with guidance, token for token.

Greedy drawings go through transformers' loop as it is. Sampled ones are drawn from its logits, mixed by its own
guidance, with the sampler's random numbers (`parity_cases.OurDraws`). The prompt without words is as long as the other
(`unconditional="pads"`), as in Janus's own loop.
"""

from __future__ import annotations

from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from helpers import make_prompt
from parity_cases import (
    CELLS,
    OurDraws,
    emu3_of,
    emu3_policy,
    janus_of,
    janus_policy,
    plain,
    random_cell,
    same_tokens,
)
from small_emu3 import IMAGE_SIZE
from text_models import own_cache
from torch import Tensor
from transformers import ClassifierFreeGuidanceLogitsProcessor, LogitsProcessor, LogitsProcessorList

from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Rollout
from syncr1.engine.rollout.batch import IMAGE_OFFSET
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

WEIGHTS = (1.5, 5.0)
WORDS = ("draw it.", "draw a red creature at the beach")


class Guided(LogitsProcessor):
    """Transformers' guidance, then our draws: its loop would put the guidance last."""

    def __init__(self, weight: float, draws: OurDraws) -> None:
        self.mix, self.draws = ClassifierFreeGuidanceLogitsProcessor(weight), draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.draws(input_ids, self.mix(input_ids, scores))


def drawn(policy: Any, weight: float, temperature: float) -> tuple[list[Rollout], Sampling]:
    sampling = Sampling(
        num_generations=1, temperature=temperature, cfg_weight=weight, unconditional="pads", max_text_tokens=4, seed=1
    )
    return generate(policy, [make_prompt(text, ("image",)) for text in WORDS], sampling), sampling


def check_janus(policy: JanusPolicy, weight: float) -> None:
    """Tokens, and the pixels that the processor's `postprocess` makes of them."""
    model = plain(policy, "sdpa")
    for temperature in (0.0, 0.8):
        rollouts, sampling = drawn(policy, weight, temperature)
        for rollout in rollouts:
            turn = [{"role": "user", "content": [{"type": "text", "text": rollout.prompt.text}]}]
            text = policy.processor.apply_chat_template(turn, add_generation_prompt=True)
            inputs = policy.processor(
                text=[text], generation_mode="image", return_tensors="pt", add_special_tokens=False
            )
            draws = OurDraws(rollout, sampling, IMAGE_OFFSET)
            mixed = Guided(weight, draws)
            tokens = model.generate(
                **inputs,
                generation_mode="image",
                do_sample=False,
                # Greedily as a user would; else all that follows the logits is in `mixed`.
                guidance_scale=1.0 if temperature else weight,
                logits_processor=LogitsProcessorList([mixed] if temperature else []),
                max_length=96,
                **own_cache(model, 96),
            )
            mine = rollout.segments[0].tokens
            greedy = shortfalls(model, policy, inputs["input_ids"][0], mine, weight)[0] < 1e-3
            near = draws.near if temperature else greedy.__getitem__
            if same_tokens(mine.tolist(), tokens[0].tolist(), near):
                pixels = model.decode_image_tokens(tokens).permute(0, 3, 1, 2)
                shown = policy.processor.postprocess(list(pixels.float()))["pixel_values"][0]
                assert rollout.image is not None and shown.dtype in (torch.uint8, np.uint8)
                levels = rollout.image.numpy() * 255 - np.asarray(shown).astype(float)
                assert levels.min() > -0.01 and levels.max() < 1.01, "it cuts off what we keep behind the point"


def shortfalls(model: Any, policy: JanusPolicy, ids: Tensor, mine: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """[n] by how much a drawing's tokens miss the greatest guided logit, and that logit's size; whole forwards."""
    rows = []
    for start in (ids, policy.unconditional_tokens(len(ids))):
        begun = model.get_input_embeddings()(start[None])
        done = model.prepare_embeddings_for_image_generation(mine[None, :-1])
        hidden = model.model.language_model(inputs_embeds=torch.cat([begun, done], 1), use_cache=False)
        rows.append(model.model.generation_head(hidden.last_hidden_state[0, -len(mine) :]).float())
    mixed = rows[1] + weight * (rows[0] - rows[1])
    return mixed.max(-1).values - mixed.gather(1, mine[:, None])[:, 0], mixed.abs().max()


JANUS = ("tied", "one key head", "padded vocabulary", "yarn rope", "no window")
"""The others differ from these in nothing that a drawing could show and a text (test_parity_text.py) could not."""


@pytest.mark.parametrize("name", JANUS)
@torch.no_grad()
def test_janus(name: str) -> None:
    policy = janus_policy(*janus_of(CELLS[name], 1, image_size=48 if name == "tied" else 32))
    check_janus(policy, WEIGHTS[len(name) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_random_janus(seed: int) -> None:
    policy, weight = janus_policy(*janus_of(random_cell(seed), seed)), WEIGHTS[seed % 2]
    if getattr(policy.decoder().config, "layer_types", None) is None:
        check_janus(policy, weight)
        return
    # Transformers' own loop fails in all releases up to 5.23 where masks come per kind of layer.
    for rollout in drawn(policy, weight, 0.0)[0]:
        ids = torch.cat([rollout.prompt_tokens, torch.tensor([policy.image_start])])
        missed, _ = shortfalls(plain(policy, "sdpa"), policy, ids, rollout.segments[0].tokens, weight)
        assert missed.max() < 1e-3


@pytest.mark.parametrize("weight", WEIGHTS)
@torch.no_grad()
def test_janus_in_bfloat16(weight: float) -> None:
    """Each token is within 1/32 of the greatest logit's size of it, and nearly all are the greatest themselves."""
    model, processor = janus_of(CELLS["yarn rope"], 1)
    policy = janus_policy(model.bfloat16(), processor)
    for rollout in drawn(policy, weight, 0.0)[0]:
        ids = torch.cat([rollout.prompt_tokens, torch.tensor([policy.image_start])])
        missed, size = shortfalls(plain(policy, "sdpa"), policy, ids, rollout.segments[0].tokens, weight)
        assert missed.max() <= size / 32 and (missed == 0).float().mean() > 0.8


def check_emu3(policy: Emu3Policy, weight: float) -> None:
    """The code's places are drawn, its size and the ends of rows stand where transformers' processor has them."""
    forced, ids_of = policy.forced_image_tokens(), policy._image_ids
    frame = int((forced < 0).nonzero()[0])
    model = plain(policy)
    for temperature in (0.0, 0.8):
        rollouts, sampling = drawn(policy, weight, temperature)
        for rollout in rollouts:
            asked = {"return_for_image_generation": True, "image_area": IMAGE_SIZE**2, "return_tensors": "pt"}
            inputs = policy.processor(text=[rollout.prompt.text], **asked)
            ids = inputs["input_ids"]
            free = torch.cat([policy.unconditional_tokens(ids.shape[1] - frame), ids_of[forced[:frame]]])[None]
            given = torch.where(forced >= 0, ids_of[forced.clamp(min=0)], -1)[frame:]
            draws = OurDraws(
                rollout,
                sampling,
                IMAGE_OFFSET + frame,
                allowed=ids_of[: policy.num_codes],
                forced=given,
            )
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                negative_prompt_ids=free,
                negative_prompt_attention_mask=torch.ones_like(free),
                guidance_scale=weight,
                do_sample=False,
                max_new_tokens=len(given),
                logits_processor=LogitsProcessorList([draws]),
            )
            mine = ids_of[rollout.segments[0].tokens[frame:]].tolist()
            same_tokens(mine, out[0, ids.shape[1] :].tolist(), draws.near)


EMU3: dict[str, dict[str, int]] = {
    "one key head": {"num_key_value_heads": 1},
    "padded vocabulary": {"padding": 50, "num_attention_heads": 8},
}


@pytest.mark.parametrize("name", EMU3)
@torch.no_grad()
def test_emu3(name: str) -> None:
    check_emu3(emu3_policy(*emu3_of(2, **EMU3[name])), WEIGHTS[len(name) % 2])
