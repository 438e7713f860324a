"""Which ids a text may hold: tags that are special tokens may, turn markers and rows without a token never."""

from __future__ import annotations

from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, sharp_policy
from small_emu3 import sharp_emu3
from small_show_o import sharp_show_o
from text_models import END, USER, model, policy, tokenizer
from tokenizers import AddedToken

from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.policies.tokens import control_tokens, ids_of
from syncr1.engine.rewards.builtin.format import format_reward
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPECIAL = [
    *TAGS,
    "<|begin_of_thought|>",
    "[THINK]",
    "<tool_call>",
    "<SOLUTION>",
    "<start_working_out>",
    "<loc_7>",
    "##",
]


def janus() -> tuple[Any, Any]:
    made = sharp_policy()
    return made.model, made.processor


def emu3() -> tuple[Any, Any]:
    made = sharp_emu3()
    return made.model, made.processor


def show_o() -> tuple[Any, Any]:
    made = sharp_show_o()
    return made.model, made.processor


def text() -> tuple[Any, Any]:
    return model("llama"), tokenizer()


KINDS: dict[str, tuple[Any, type[Policy]]] = {
    "janus": (janus, JanusPolicy),
    "emu3": (emu3, Emu3Policy),
    "show_o": (show_o, ShowOPolicy),
    "text": (text, CausalLMPolicy),
}


def with_tokens(kind: str, tokens: list[str], rows: int = 0) -> Policy:
    """A policy whose tokenizer has further special tokens, and whose head has further rows."""
    make, policy_class = KINDS[kind]
    checkpoint, processor = make()
    words = getattr(processor, "tokenizer", processor)
    words.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    head = checkpoint.get_output_embeddings().weight
    behind = checkpoint.config.num_codes + 1 if policy_class is ShowOPolicy else 0  # rows that stay the last ones
    checkpoint.resize_token_embeddings(max(len(words) + behind, head.shape[0]) + rows, mean_resizing=False)
    with torch.no_grad():
        checkpoint.get_output_embeddings().weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return policy_class(checkpoint, processor).eval()  # type: ignore[call-arg]


def samples(made: Policy, num: int) -> torch.Tensor:
    sampling = Sampling(num_generations=num, max_text_tokens=8)
    rollouts = generate(made, [make_prompt("what is the colour?", ("text",))], sampling)
    return torch.cat([rollout.segments[0].tokens for rollout in rollouts])


def never(made: Policy) -> set[int]:
    """Ids of the whole head that a text never has."""
    head = made.head(torch.zeros(1, made.decoder().config.hidden_size), "text")
    assert head.forbidden is not None
    return {*head.forbidden.tolist(), *range(head.weight.shape[0], made.model.get_output_embeddings().weight.shape[0])}


@pytest.mark.parametrize("kind", KINDS)
def test_tags_that_are_special_tokens_are_words(kind: str) -> None:
    """Sampled, read, and left in the instruction: the answer's form can be earned."""
    made = with_tokens(kind, SPECIAL)
    ids = made.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert not never(made) & set(ids)
    answer = "<think>it is red</think><answer>red</answer>"
    tokens = made.text_tokens(answer)
    assert set(made.tokenizer.convert_tokens_to_ids(TAGS)) < set(tokens.tolist())
    assert "".join(made.decode_text(tokens).split()) == "".join(answer.split())
    assert format_reward(completions=[made.decode_text(tokens)], segments=[("text",)]) == [1.0]
    asked = "Think in <think> </think>, answer in <answer> </answer>."
    assert made.escape(asked) == asked
    shown = made.prompt_tokens(make_prompt(asked, ("text",))).tolist()
    assert set(made.tokenizer.convert_tokens_to_ids(TAGS)) < set(shown)
    assert set(samples(made, 150).tolist()) & set(ids), "nothing keeps them from being sampled"


@pytest.mark.parametrize("kind", KINDS)
def test_structural_tokens_are_none(kind: str) -> None:
    """By name, by the template, or by the form that vendors keep for the machine."""
    steering = ["<|fim_prefix|>", "<｜User｜>", "<unused12>", "<reserved_3>", "<patch_placeholder>", "<img>"]
    made = with_tokens(kind, steering)
    ids = set(made.tokenizer.convert_tokens_to_ids(steering))
    assert ids <= never(made) and ids <= set(made.control.values())
    for token in steering:
        assert token not in made.escape(f"a {token} b") and made.decode_text(torch.tensor([*ids])) == ""
    named = set(made.tokenizer.all_special_ids) - ids
    assert named - made.end_tokens <= never(made)


@pytest.mark.parametrize(
    ("template", "token", "structural"),
    [
        ("{{ '<start_of_turn>' }}", "<start_of_turn>", True),
        ("no turn", "<start_of_answer>", False),
        ("[INST] [/INST]", "[INST]", True),
        ("<think>\n", "<think>", False),  # R1's template opens the answer with it
        ("<|think|>", "<|think|>", True),
        ("", "<|think|>", False),
        ({"default": "<|a|>", "tools": "<call>"}, "<call>", True),
        (None, USER, True),  # the tokenizer's own template has it
    ],
)
def test_what_a_template_writes_is_a_marker(template: Any, token: str, structural: bool) -> None:
    words = tokenizer()
    words.add_tokens([AddedToken(token, special=True)], special_tokens=True)
    assert (token in control_tokens(words, template)) == structural


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_token_are_never_sampled(kind: str) -> None:
    made = with_tokens(kind, [], rows=500)
    tokens = samples(made, 40)
    known = set(made.tokenizer.get_vocab().values())
    assert set(tokens.tolist()) <= known and len(tokens) > 100
    assert set(range(made.model.get_output_embeddings().weight.shape[0])) - known <= never(made)


def test_rows_without_a_code_are_never_drawn() -> None:
    """Transformers makes no such head; a checkpoint whose head was enlarged would draw nothing from them."""
    checkpoint, processor = janus()
    head = checkpoint.model.generation_head
    grown = torch.nn.Linear(head.vision_head.in_features, head.vision_head.out_features + 9)
    checkpoint.model.generation_head.vision_head = grown
    made = JanusPolicy(checkpoint, processor).eval()
    forbidden = made.head(torch.zeros(1, 128), "image").forbidden
    assert forbidden is not None and len(forbidden) == 9 and int(forbidden[0]) == grown.out_features - 9
    (drawn,) = generate(made, [make_prompt("draw it", ("image",))], Sampling(num_generations=1))
    assert int(drawn.segments[0].tokens.max()) < grown.out_features - 9


@pytest.mark.parametrize("kind", KINDS)
def test_every_end_of_the_generation_configuration_ends_a_text(kind: str) -> None:
    """One, several or none are listed; the tokenizer's own is one in any case."""
    make, policy_class = KINDS[kind]
    checkpoint, processor = make()
    own = getattr(processor, "tokenizer", processor).eos_token_id
    for listed, expected in (([own, 40, 41], {own, 40, 41}), (40, {own, 40}), (None, {own}), ([40, 41], {own, 40, 41})):
        checkpoint.generation_config.eos_token_id = listed
        made = policy_class(checkpoint, processor).eval()  # type: ignore[call-arg]
        assert made.end_tokens == expected and not never(made) & expected
    sampling = Sampling(num_generations=60, max_text_tokens=12, temperature=2.0)
    rollouts = generate(made, [make_prompt("red", ("text",))], sampling)
    ends = {int(r.segments[0].tokens[-1]) for r in rollouts if not r.segments[0].truncated}
    assert len(ends) > 1 and ends <= made.end_tokens
    assert not any(set(r.segments[0].tokens[:-1].tolist()) & made.end_tokens for r in rollouts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_generation_configuration_suppresses_is_never_sampled(kind: str) -> None:
    make, policy_class = KINDS[kind]
    checkpoint, processor = make()
    checkpoint.generation_config.suppress_tokens = [40, 41, 10**6, -1]
    assert {40, 41} <= never(policy_class(checkpoint, processor))  # type: ignore[call-arg]


def test_ids_as_configurations_write_them() -> None:
    assert [ids_of(value) for value in (None, 0, [1, 2], (3,), torch.tensor([4, 5]), torch.tensor(6), [None, 7])] == [
        *([], [0], [1, 2], [3], [4, 5], [6], [7]),
    ]
    assert END in control_tokens(policy().tokenizer)
