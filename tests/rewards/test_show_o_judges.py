"""Rewards that read drawings with the policy itself, where that is a Show-o: against whole forwards of transformers."""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import torch.nn.functional as F
from small_show_o import sharp_show_o
from torch import Tensor

from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.caption import QUESTION, CaptionLikelihood
from syncr1.engine.rewards.builtin.tim import TextImageMatching

TEXTS = ["a red cat", "who", "a small blue dog at the beach."]


@pytest.fixture(scope="module")
def policy() -> ShowOPolicy:
    return sharp_show_o()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def forward(policy: ShowOPolicy, image: Tensor, question: str, answer: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [L], hidden [L, D], log-probabilities of the next text [L, rows]) by transformers' own attention, which
    is given who sees whom: all that the picture's end and what precedes it see each other."""
    tokens = policy.prompt_tokens(Prompt(id="x", task="caption", text=question, images=(Path("x.png"),)))
    ids = tokens if answer is None else torch.cat([tokens, policy.text_tokens(answer)])
    plain = sharp_show_o().model.double()
    plain.showo.model.set_attn_implementation("eager")
    embeddings = plain.get_input_embeddings()(ids).clone()
    codes = policy.image_tokens(image[None])[0]
    embeddings[ids == policy.image_slot] = plain.get_input_embeddings()(policy._code_rows[codes])
    end = 1 + ids.tolist().index(policy.model.config.eoi_token_id)
    sees = torch.ones(len(ids), len(ids)).tril().bool()
    sees[:end, :end] = True
    mask = torch.zeros(len(ids), len(ids), dtype=torch.float64).masked_fill(~sees, float("-inf"))
    hidden = plain.showo.model(inputs_embeds=embeddings[None], attention_mask=mask[None, None]).last_hidden_state[0]
    logits = plain.showo.lm_head(hidden)[:, : policy.model.config.text_rows]
    head = policy.head(torch.zeros(1, hidden.shape[1]), "text")
    assert head.forbidden is not None
    logits[:, head.forbidden] = float("-inf")
    return ids, hidden, logits[:, : head.weight.shape[0]].log_softmax(-1)


def test_descriptions_are_answers_beside_the_drawing(policy: ShowOPolicy, images: Tensor) -> None:
    found = CaptionLikelihood(policy)(images, [TEXTS, TEXTS[::-1], TEXTS])
    for row, of_image in enumerate((TEXTS, TEXTS[::-1], TEXTS)):
        for column, text in enumerate(of_image):
            ids, _, logp = forward(policy, images[row], QUESTION, text)
            first = len(ids) - len(policy.text_tokens(text))
            own = logp[torch.arange(first - 1, len(ids) - 1), ids[first:]]
            assert float(found[row, column]) == pytest.approx(float(own.mean()), abs=1e-5)


def test_tim_is_the_formula(policy: ShowOPolicy, images: Tensor) -> None:
    """Words from behind the picture's line break to the assistant's tag; places of the picture's codes."""
    found = TextImageMatching(policy)(prompts=[""] * 3, images=list(images), target=TEXTS)
    for image, text, value in zip(images, TEXTS, found, strict=True):
        ids, hidden, _ = forward(policy, image, text, None)
        before, behind = (policy.encode(words).numel() for words in ("USER: \n", " ASSISTANT:"))
        begin = 1 + ids.tolist().index(policy.model.config.eoi_token_id) + 1 + before
        rows = F.normalize(hidden, dim=-1)
        cosines = rows[ids == policy.image_slot] @ rows[begin : len(ids) - behind].T
        assert begin + len(text) == len(ids) - behind
        assert value == pytest.approx(float(cosines.amax(1).mean() + cosines.amax(0).mean()) / 2, abs=1e-5)
