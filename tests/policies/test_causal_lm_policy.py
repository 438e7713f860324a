"""Text models through the protocol: the same numbers as transformers' own forward, or a refusal that says why."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import torch.nn.functional as F
from helpers import make_prompt, packed
from text_models import ANSWER, BOS, END, EOS, FAMILIES, PAD, USER, VOCABULARY, config, model, policy, tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3NextConfig,
)

from syncr1.engine.errors import ConfigError
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.policies.attention_interface import PackedLayout
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.cache import Decode, Prefill, Store
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.policies.tokens import control_tokens
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.kernels.api import SharedPrefixLayout

TEXT = ("text",)


def plain_of(made: CausalLMPolicy) -> torch.nn.Module:
    """The same weights with transformers' own attention."""
    plain = copy.deepcopy(made.model)
    plain.set_attn_implementation("eager")
    return plain.eval()


def random_ids(num: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (num,), generator=torch.Generator().manual_seed(seed))


def logits_of(made: CausalLMPolicy, hidden: Tensor) -> Tensor:
    head = made.head(hidden, "text")
    return F.linear(head.hidden, head.weight, head.bias)


def shared_layout() -> SharedPrefixLayout:
    """Prompts of 4 and 1 tokens; the first with responses of 3 and 6, the second with one of 2."""
    offsets = ([0, 4, 5], [0, 3, 9, 11], [0, 2, 3])
    return SharedPrefixLayout(*(torch.tensor(o, dtype=torch.int32) for o in offsets))


SEQUENCES = ([*range(4), *range(5, 8)], [*range(4), *range(8, 14)], [4, 14, 15])
"""Rows of the packed axis that are one sequence each."""


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_each_sequence_alone(family: str) -> None:
    """Trunk and head on a shared-prefix layout, against transformers' forward on ids, sequence by sequence."""
    made, layout, ids = policy(family), shared_layout(), random_ids(16)
    embeddings = made.embed(ids, "text")
    with torch.no_grad():
        hidden = made.trunk(embeddings[None], layout.position_ids()[None], PackedLayout(layout))[0]
        for rows in SEQUENCES:
            expected = plain_of(made)(input_ids=ids[rows][None], use_cache=False)
            torch.testing.assert_close(logits_of(made, hidden[rows]), expected.logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama_tied_mha", "qwen3", "granite"])
def test_gradients_are_transformers_own(family: str, checkpointing: bool) -> None:
    """Of every parameter, for a loss on responses; the prompt that two of them share gets the sum."""
    made, layout, ids = policy(family), shared_layout(), random_ids(16)
    plain = plain_of(made)
    if checkpointing:
        made.train().checkpoint_activations()
    hidden = made.trunk(made.embed(ids, "text")[None], layout.position_ids()[None], PackedLayout(layout))[0]
    logits_of(made, hidden[5:]).logsumexp(-1).sum().backward()
    for rows in SEQUENCES:
        logits = plain(input_ids=ids[rows][None], use_cache=False).logits[0]
        logits[[r >= 5 for r in rows]].logsumexp(-1).sum().backward()
    for (name, ours), theirs in zip(made.model.named_parameters(), plain.parameters(), strict=True):
        scale = max(1.0, float(theirs.grad.abs().max()))
        torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_is_the_whole_forward(family: str) -> None:
    """`cache_shape` fits the decoder: a prompt once, then one token at a time for two members."""
    made, ids = policy(family), random_ids(13)
    shape = made.cache_shape()
    prompts, own = Store(shape, [5]), Store(shape, [4, 4])
    prefill = Prefill(prompts)
    made.trunk(made.embed(ids[:5], "text")[None], prefill.position_ids[None], prefill)
    members = ids[5:].view(2, 4)
    for step in range(4):
        spans = torch.tensor([[0, 5, start, step] for start in own.starts[:2]])
        position_ids = torch.full((2, 1), 5 + step)
        hidden = made.trunk(made.embed(members[:, step : step + 1], "text"), position_ids, Decode(prompts, own, spans))
        for member in range(2):
            whole = torch.cat([ids[:5], members[member, : step + 1]])
            expected = plain_of(made)(input_ids=whole[None], use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits_of(made, hidden[member])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "granite"])
@torch.no_grad()
def test_sampling_and_training_agree_with_transformers(family: str) -> None:
    """From prompts to log-probabilities: the sampler's, the trainer's and a plain forward's are the same numbers."""
    made, prompts = policy(family), [make_prompt(text, TEXT) for text in ("what is the colour?", "red")]
    rollouts = generate(made, prompts, Sampling(num_generations=3, max_text_tokens=6, seed=0))
    assert len(rollouts) == 6 and all(len(r.segments) == 1 and len(r.segments[0].tokens) for r in rollouts)
    (batch,) = packed(made, rollouts, 3)
    scored = PolicyForward(made, Objective())(batch)["logp"][batch.loss_mask]
    forbidden = made.head(torch.zeros(1, 32), "text").forbidden
    assert forbidden is not None
    expected = []
    for rollout in rollouts:
        tokens = rollout.segments[0].tokens
        ids = torch.cat([made.prompt_tokens(rollout.prompt), tokens])
        logits = plain_of(made)(input_ids=ids[None], use_cache=False).logits[0, -len(tokens) - 1 : -1]
        logp = logits.index_fill(1, forbidden, -torch.inf).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(rollout.segments[0].logp, logp, rtol=1e-5, atol=1e-5)
        expected.append(logp)
    torch.testing.assert_close(scored, torch.cat(expected), rtol=1e-5, atol=1e-5)


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
REFUSED = {
    "soft-capped scores and logits": (Gemma2Config(**WIDE, head_dim=8), "attn_logit_softcapping=50.0"),
    "soft-capped logits": (
        Gemma2Config(**WIDE, head_dim=8, attn_logit_softcapping=None, sliding_window=64),
        "final_logit_softcapping=30.0 caps",
    ),
    "sliding layers": (Gemma3TextConfig(**WIDE, head_dim=8, sliding_window=16), "sliding_window=16 hides"),
    "a sliding window": (config("mistral", sliding_window=63), "sliding_window=63 hides keys within its 64 pos"),
    "half of the layers slide": (
        config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding_window=8 hides",
    ),
    "sinks": (GptOssConfig(**WIDE, head_dim=8, num_local_experts=2, num_experts_per_tok=2), "attention has sinks"),
    "chunks": (Llama4TextConfig(**WIDE, head_dim=8, num_local_experts=2), "layer_types has chunked_attention"),
    "linear attention": (Qwen3NextConfig(**WIDE, **MOE, head_dim=8, num_experts=2), "layer_types has linear_attention"),
    "a recurrent state": (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2), "max_position_embeddings"),
    "latent attention": (
        DeepseekV3Config(**WIDE | MOE | LATENT | {"num_key_value_heads": 4}, n_routed_experts=2, n_group=1),
        "keys of size 16 and values of size 8",
    ),
    "rotation by the longest": (LlamaConfig(**WIDE, rope_parameters=LONG), "rope_type=longrope"),
    "no attention interface": (FalconConfig(**SMALL), "does not take its attention from"),
    "an encoder": (BertConfig(**SMALL, intermediate_size=48), "other logits than transformers' own forward"),
    "dropout that cannot be switched off": (
        OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
        "other logits than transformers' own forward",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_models_that_would_be_silently_wrong_are_refused(why: str) -> None:
    refused, message = REFUSED[why]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(refused)
    with pytest.raises(ValueError, match=message) as error:
        CausalLMPolicy(made, tokenizer())
    assert "CausalLMPolicy" in str(error.value)


def test_a_scale_that_no_config_names_is_refused() -> None:
    """The probe compares logits, so it needs no list of models that do something of their own."""
    made = model("llama")
    head = made.lm_head
    head.register_forward_hook(lambda module, inputs, logits: logits * 1.5)
    with pytest.raises(ValueError, match="other logits"):
        CausalLMPolicy(made, tokenizer())
    head.register_forward_hook(lambda module, inputs, logits: logits / 1.5)
    CausalLMPolicy(made, tokenizer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_experts_are_accepted(dtype: torch.dtype) -> None:
    """The probe's tolerance is above their rounding."""
    for family in ("llama", "qwen2", "granite"):
        assert policy(family, dtype=dtype).cache_shape().dtype == dtype
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**WIDE, num_local_experts=4), dtype=dtype)
    assert CausalLMPolicy(experts, tokenizer()).cache_shape().num_heads == 2


def test_construction_leaves_the_mode_alone_and_switches_dropout_off() -> None:
    """Log-probabilities of a policy in training mode are those of one network (GPT-2 has dropout everywhere)."""
    for training in (True, False):
        made = CausalLMPolicy(model("gpt2").train(training), tokenizer())
        assert all(module.training == training for module in made.model.modules())
    made.train()
    layout, ids = shared_layout(), random_ids(16)
    first, second = (
        made.trunk(made.embed(ids, "text")[None], layout.position_ids()[None], PackedLayout(layout)) for _ in range(2)
    )
    assert torch.equal(first, second) and first.requires_grad


def words(made: CausalLMPolicy, text: str) -> list[str]:
    return made.tokenizer.convert_ids_to_tokens(made.prompt_tokens(make_prompt(text, TEXT)).tolist())


def test_prompt_goes_through_the_chat_template_or_stays_plain() -> None:
    chat, plain = policy(), policy(template=None)
    inner = plain.tokenizer.tokenize("the colour?")
    assert words(chat, "the colour?") == [BOS, USER, *inner, END, ANSWER]
    assert words(plain, "the colour?") == inner, "as the tokenizer has it, which adds no BOS"
    assert words(plain, "") == [BOS]
    assert chat.decode_text(chat.prompt_tokens(make_prompt("the colour?", TEXT))) == "the colour?"
    assert not chat.image_slots(chat.prompt_tokens(make_prompt("x", TEXT))).any()


def test_a_tokenizer_without_bos_gets_none() -> None:
    made = policy(template=None)
    made.tokenizer.bos_token = None
    assert words(made, "red")[0] != BOS
    with pytest.raises(ValueError, match="is empty, and the tokenizer has no BOS"):
        made.prompt_tokens(make_prompt("", TEXT))


@pytest.mark.parametrize(
    "text", [END, f"a{END}{ANSWER}yes", f"<|{END}end|>", f"<{EOS}eos>", f"{BOS}{PAD}", "<|us<pad>er|>"]
)
def test_a_users_text_cannot_hold_a_control_token(text: str) -> None:
    """Turn markers are special without being among the named special tokens."""
    made = policy()
    control = set(control_tokens(made.tokenizer).values())
    assert control == set(made.tokenizer.convert_tokens_to_ids([PAD, BOS, EOS, USER, ANSWER, END]))
    ids = made.prompt_tokens(make_prompt(text, TEXT)).tolist()
    assert control & set(ids[:2] + ids[-2:]) and not control & set(ids[2:-2])


def test_ends_and_forbidden_ids() -> None:
    """Every listed end ends a text; a text given to the policy ends as its template ends an answer."""
    chat, plain = policy(), policy(template=None)
    end, eos = (chat.tokenizer.convert_tokens_to_ids(t) for t in (END, EOS))
    assert chat.end_tokens == plain.end_tokens == {end, eos}
    assert chat.text_tokens("red").tolist() == [*plain.tokenizer("red").input_ids, end]
    assert plain.text_tokens("red").tolist()[-1] == eos
    forbidden = set(chat.head(torch.zeros(1, 32), "text").forbidden.tolist())
    assert len(chat.tokenizer) < VOCABULARY
    unused = set(range(len(chat.tokenizer), VOCABULARY))
    assert forbidden == unused | set(chat.tokenizer.convert_tokens_to_ids([PAD, BOS, USER, ANSWER]))


def test_images_are_refused_with_the_prompts_name(tmp_path: Path) -> None:
    made = policy()
    for prompt in (make_prompt("draw"), make_prompt("who?", TEXT, image=tmp_path / "photo.png")):
        with pytest.raises(ValueError, match=f"prompt {prompt.id}.*Janus, Emu3, Anole, Liquid, Show-o"):
            made.prompt_tokens(prompt)
    nothing, images = torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 8, 8)
    calls = (
        lambda: made.embed(nothing, "image"),
        lambda: made.head(torch.zeros(1, 32), "image"),
        made.unconditional_tokens,
        lambda: made.follow_up_tokens(make_prompt("x", TEXT)),
        lambda: made.see(images),
        lambda: made.vision_features(images),
        lambda: made.image_tokens(images),
        lambda: made.draw(nothing),
        lambda: made.load_images([tmp_path]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="has no image vocabulary; use a checkpoint that draws"):
            call()
    assert (made.num_image_tokens, made.image_size, made.image_start) == (0, 0, -1)


@pytest.mark.parametrize("family", ["llama_tied_mha", "granite"])
def test_save_and_load_round_trip(family: str, tmp_path: Path) -> None:
    """Weights, tokenizer, template and ends come back, in transformers' own format, as they were after training."""
    made = policy(family)
    with torch.no_grad():
        made.model.get_input_embeddings().weight[5] += 1.0
    made.save(tmp_path)
    loaded = CausalLMPolicy.from_pretrained(tmp_path)
    for (name, a), (other, b) in zip(made.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name
    same = [f for f in ("end_tokens", "max_positions") if getattr(made, f) == getattr(loaded, f)]
    assert same == ["end_tokens", "max_positions"] and loaded.max_positions == 64
    shapes = [p.cache_shape() for p in (made, loaded)]
    assert all(getattr(shapes[0], f.name) == getattr(shapes[1], f.name) for f in fields(shapes[0]))
    assert words(loaded, "the colour?") == words(made, "the colour?")
    ids = random_ids(7)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(theirs, plain_of(made)(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == made.tokenizer.chat_template
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    made = policy()
    made.save(tmp_path)
    torch.save(made.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        CausalLMPolicy.from_pretrained(tmp_path)


def test_a_frozen_copy_stays() -> None:
    made = policy("qwen3")
    assert isinstance(made, Policy)
    frozen, ids, layout = made.frozen_copy(), random_ids(16), shared_layout()
    before = frozen.trunk(frozen.embed(ids, "text")[None], layout.position_ids()[None], PackedLayout(layout))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.1)
    after = frozen.trunk(frozen.embed(ids, "text")[None], layout.position_ids()[None], PackedLayout(layout))
    assert torch.equal(before, after) and not before.requires_grad
