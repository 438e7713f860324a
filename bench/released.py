"""One step of unified RL as ULM-R1's released trainer takes it, with transformers alone: the peer of our whole step.

Rewritten from what that trainer does (arXiv 2505.17534; its repository at 82837cb); none of its code is here.  As
released:

- text: the photo is encoded once per prompt, then `generate` repeats the prompt G times *before* prefill;
- images: the prompt is repeated 2 G times before prefill, conditional and unconditional rows alternate, the
  unconditional ones have padding between the first and the last token; DynamicCache, which copies all keys and values
  at every step; guidance, softmax and multinomial as separate eager operations;
- then two padded forwards without shared prompts, photos repeated G times and encoded again: text logits over the whole
  vocabulary for the sampled rows, image logits likewise; their log-probabilities; the loss is the mean over sequences
  of token means, text plus image, under one advantage (R_image + .8 R_text - mean) / (std + 1e-4), unbiased std; both
  graphs live until one backward; no trajectory is pruned; nothing is checkpointed;
- one prompt pair per forward and backward (its batch size on a GPU), gradients accumulated; the decoder and the text
  head are trained; clip at norm 1; AdamW.

Kinder to it than the code, wherever in doubt:

- rollouts may take all prompts at once instead of a pair at a time (`pair_by_pair=False`);
- no attention masks, as all prompts are of one length: attention takes the fast causal path, and nothing is padded; the
  released loop passes a mask at every step;
- text is sampled without its default top-k of 50; end tokens are forbidden, which costs one small operation a step;
- image log-probabilities come from the hidden states that predict them (released: one position late);
- pictures stay tensors (released: through PIL); rewards are our cheap ones (released: BLIP, LPIPS, BERTScore);
- neither side has a reference model (its first stage has none); the optimizer's fused kernel; sdpa attention.

Harder on it: nothing that we know of.  What is told of this way of training goes further than its code: photos encoded
G times in rollouts (transformers' Janus `generate` does so, given pixels) and text logits of every position (T2I-R1
does so).  `encode="per sample"` and `logits="every position"` are that.

Dims: P prompts, G members, S = P * G sequences, L prompt tokens, R sampled tokens, N photo embeddings, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor
from transformers import DynamicCache, JanusForConditionalGeneration

from syncr1.engine.stopwatch import Stopwatch
from syncr1.kernels.api import TokenStream, linear_grpo_loss

Encode = Literal["per prompt", "per sample"]
Logits = Literal["sampled rows, fused", "sampled rows", "every position"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a rollout made."""

    prompt: Tensor
    """[P, L] int64."""
    tokens: Tensor
    """[S, R] int64, members of a prompt adjacent."""
    kv_bytes: int
    """Keys and values held at the end."""

    @property
    def group_size(self) -> int:
        """G."""
        return self.tokens.shape[0] // self.prompt.shape[0]

    @property
    def rows(self) -> Tensor:
        """[S, L + R]: every sequence with its own copy of the prompt."""
        return torch.cat([self.prompt.repeat_interleave(self.group_size, 0), self.tokens], 1)

    @staticmethod
    def joined(parts: Sequence[Sampled]) -> Sampled:
        """Prompts one after another; the caches were not held at once."""
        kv_bytes = max(part.kv_bytes for part in parts)
        return Sampled(torch.cat([p.prompt for p in parts]), torch.cat([p.tokens for p in parts]), kv_bytes)

    def pairs(self) -> Iterator[Sampled]:
        """One prompt at a time."""
        for i, prompt in enumerate(self.prompt):
            members = slice(i * self.group_size, (i + 1) * self.group_size)
            yield Sampled(prompt[None], self.tokens[members], self.kv_bytes)


def cache_bytes(cache: Any) -> int:
    """Keys and values of a transformers cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def photo_embeddings(model: JanusForConditionalGeneration, ids: Tensor, pixels: Tensor) -> Tensor:
    """[n, L] int64, [n, 3, H, W] -> [n, L, D]: the photos' features at their placeholders."""
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    embeddings = model.get_input_embeddings()(ids)
    slots = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
    return embeddings.masked_scatter(slots, features.to(embeddings.dtype))


@torch.no_grad()
def hf_text_rollout(
    model: JanusForConditionalGeneration,
    ids: Tensor,
    pixels: Tensor,
    num_generations: int,
    max_new_tokens: int,
    *,
    forbidden: Sequence[int],
    encode: Encode = "per prompt",
    time: Stopwatch | None = None,
) -> Sampled:
    """`generate` with `num_return_sequences`; exactly `max_new_tokens` tokens each.

    Args:
        model: transformers' Janus.
        ids: [P, L] int64.
        pixels: [P, 3, H, W].
        num_generations: G.
        max_new_tokens: R.
        forbidden: ids that are not sampled, the end token among them.
        encode: `per prompt` gives `generate` embeddings; `per sample` gives it pixels, which it repeats.
        time: gets `prefill` (the photos included) and `text`.
    """
    time = time or Stopwatch()
    options = {
        "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": num_generations,
        "max_new_tokens": max_new_tokens, "suppress_tokens": list(forbidden), "return_dict_in_generate": True,
        "use_cache": True, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    with _prefill_apart(model, time, "text"):
        if encode == "per prompt":
            out = model.generate(inputs_embeds=photo_embeddings(model, ids, pixels), **options)
        else:
            out = model.generate(input_ids=ids, pixel_values=pixels, **options)
    return Sampled(ids, out.sequences[:, -max_new_tokens:], cache_bytes(out.past_key_values))


@contextmanager
def _prefill_apart(model: JanusForConditionalGeneration, time: Stopwatch, rest: str) -> Iterator[None]:
    """Books everything up to the end of the decoder's first forward as `prefill`, what follows as `rest`."""
    stages = [time("prefill"), time(rest)]
    stages[0].__enter__()

    def first_forward_ended(*_: Any) -> None:
        hook.remove()
        stages[0].__exit__(None, None, None)
        stages[1].__enter__()

    hook = model.model.language_model.register_forward_hook(first_forward_ended)
    yield
    stages[1].__exit__(None, None, None)


@torch.no_grad()
def hf_image_rollout(
    model: JanusForConditionalGeneration,
    ids: Tensor,
    num_generations: int,
    num_tokens: int,
    cfg_weight: float,
    *,
    pad_id: int,
    time: Stopwatch | None = None,
) -> Sampled:
    """The loop of Janus: every row of every sample has its own prompt, conditional and unconditional in turn.

    Args:
        model: transformers' Janus.
        ids: [P, L] int64, the image's start last.
        num_generations: G.
        num_tokens: R.
        cfg_weight: guidance.
        pad_id: stands for the prompt in the unconditional rows.
        time: gets `prefill` and `image`.
    """
    time = time or Stopwatch()
    decoder, head = model.model.language_model, model.model.generation_head
    rows = ids.repeat_interleave(2 * num_generations, 0)
    rows[1::2, 1:-1] = pad_id
    cache = DynamicCache(config=model.config.text_config)
    tokens = torch.empty(ids.shape[0] * num_generations, num_tokens, dtype=torch.long, device=ids.device)
    embeddings = model.get_input_embeddings()(rows)
    with time("prefill"):
        hidden = decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    with time("image"):
        for step in range(num_tokens):
            logits = head(hidden)
            conditional, unconditional = logits[0::2], logits[1::2]
            mixed = unconditional + cfg_weight * (conditional - unconditional)
            token = torch.multinomial(mixed.softmax(-1), 1)[:, 0]
            tokens[:, step] = token
            if step + 1 < num_tokens:
                fed = model.prepare_embeddings_for_image_generation(token.repeat_interleave(2))[:, None]
                hidden = decoder(inputs_embeds=fed, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    return Sampled(ids, tokens, cache_bytes(cache))


def selected(logits: Tensor, tokens: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """Log-probabilities [n, R] of tokens [n, R] under logits [n, R, V], one sequence at a time to save memory."""
    if forbidden is not None:
        logits = logits.index_fill(-1, forbidden, -math.inf)
    normalisers = torch.stack([row.logsumexp(-1) for row in logits])
    return logits.gather(-1, tokens[..., None])[..., 0] - normalisers


def text_logp(
    model: JanusForConditionalGeneration, rows: Tensor, pixels: Tensor, num_sampled: int,
    *, logits: Logits = "sampled rows", forbidden: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[n, R]: photos encoded once per row; `forbidden` ids have no probability (the released code has none such)."""
    embeddings = photo_embeddings(model, rows, pixels)
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    if logits == "every position":
        return selected(model.lm_head(hidden)[:, :-1], rows[:, 1:], forbidden)[:, -num_sampled:]
    predicting = hidden[:, -num_sampled - 1 :]
    return selected(model.lm_head(predicting)[:, :-1], rows[:, -num_sampled:], forbidden)


def image_logp(model: JanusForConditionalGeneration, prompts: Tensor, tokens: Tensor) -> Tensor:
    """[n, R] of image tokens [n, R] behind prompts [n, L]."""
    parts = [model.get_input_embeddings()(prompts), model.prepare_embeddings_for_image_generation(tokens)]
    hidden = model.model.language_model(inputs_embeds=torch.cat(parts, 1), use_cache=False).last_hidden_state
    return selected(model.model.generation_head(hidden[:, -tokens.shape[1] - 1 : -1]), tokens)


def policy_loss(logp: Tensor, advantages: Tensor) -> Tensor:
    """Mean over sequences of token means of -A exp(logp - old), on policy."""
    return -(advantages[:, None] * (logp - logp.detach()).exp()).mean(1).mean()


def group_normalised(rewards: Tensor, num_generations: int) -> Tensor:
    """[S] -> [S] advantages."""
    groups = rewards.view(-1, num_generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of both sides."""

    text: Callable[[Tensor], Tensor]
    """[S, R] tokens -> [S]."""
    image: Callable[[Tensor], Tensor]
    """[S, 3, H, W] in [0, 1] -> [S]."""


class ReleasedTrainer:
    """The weights and the optimizer of the peer; one `step` is one update from paired prompts.

    Args:
        model: its own copy; `requires_grad` says what is trained.
        rewards: see Rewards.
        num_generations, max_new_tokens, cfg_weight, forbidden, pad_id: as in the rollouts.
        pair_by_pair: roll out one pair at a time, as it does on a GPU; False is kinder.
        encode, logits: see the head of this file.
        learning_rate: of AdamW.
    """

    def __init__(
        self, model: JanusForConditionalGeneration, rewards: Rewards, *, num_generations: int, max_new_tokens: int,
        cfg_weight: float, forbidden: Sequence[int], pad_id: int, pair_by_pair: bool = False,
        encode: Encode = "per prompt", logits: Logits = "sampled rows", learning_rate: float = 1e-6,
    ) -> None:  # fmt: skip
        self.model, self.rewards = model, rewards
        self.num_generations, self.max_new_tokens, self.cfg_weight = num_generations, max_new_tokens, cfg_weight
        self.forbidden, self.pad_id, self.pair_by_pair = list(forbidden), pad_id, pair_by_pair
        self.encode: Encode = encode
        self.logits: Logits = logits
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, fused=True)
        self.num_image_tokens = model.model.vqmodel.quantize.quant_state_dims[0] ** 2

    def warm_up(self, question_ids: Tensor, pixels: Tensor) -> None:
        """A few tokens, and one step along no gradient, which allocates the optimizer's state."""
        hf_text_rollout(self.model, question_ids, pixels, 2, 2, forbidden=self.forbidden)
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def rollouts(
        self, question_ids: Tensor, pixels: Tensor, drawing_ids: Tensor, time: Stopwatch
    ) -> tuple[Sampled, Sampled]:
        """Answers and images, of all pairs at once or one pair after another."""
        made = []
        for ids, photos, drawn in zip(
            *(x.split(1 if self.pair_by_pair else x.shape[0]) for x in (question_ids, pixels, drawing_ids)), strict=True
        ):
            text = hf_text_rollout(self.model, ids, photos, self.num_generations, self.max_new_tokens,
                                   forbidden=self.forbidden, encode=self.encode, time=time)  # fmt: skip
            image = hf_image_rollout(self.model, drawn, self.num_generations, self.num_image_tokens, self.cfg_weight,
                                     pad_id=self.pad_id, time=time)  # fmt: skip
            made.append((text, image))
        texts, images = zip(*made, strict=True)
        return Sampled.joined(texts), Sampled.joined(images)

    def step(self, question_ids: Tensor, pixels: Tensor, drawing_ids: Tensor) -> dict[str, float]:
        """P questions [P, L] about photos [P, 3, H, W], P drawings [P, L']; returns seconds by stage."""
        time = Stopwatch()
        texts, images = self.rollouts(question_ids, pixels, drawing_ids, time)
        with torch.no_grad(), time("draw"):
            pictures = (self.model.model.vqmodel.decode(images.tokens).float() * 0.5 + 0.5).clamp(0, 1)
        with time("reward"):
            rewards = self.rewards.image(pictures) + 0.8 * self.rewards.text(texts.tokens)
            advantages = group_normalised(rewards, self.num_generations).to(pixels.device)
        self.backward(texts, images, pixels, advantages, time)
        with time("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.seconds

    def backward(
        self, texts: Sampled, images: Sampled, pixels: Tensor, advantages: Tensor, time: Stopwatch | None = None,
        forbidden: Tensor | None = None,
    ) -> float:  # fmt: skip
        """Adds up the gradients of the mean over pairs, a pair at a time; advantages [S]. Returns the loss."""
        time, G, total = time or Stopwatch(), self.num_generations, 0.0
        count = texts.prompt.shape[0]
        for i, (text, image) in enumerate(zip(texts.pairs(), images.pairs(), strict=True)):
            mine = advantages[i * G : (i + 1) * G]
            with time("forward"):
                photos = pixels[i : i + 1].repeat_interleave(G, 0)
                text_loss = policy_loss(
                    text_logp(self.model, text.rows, photos, text.tokens.shape[1], logits=self.logits,
                              forbidden=forbidden), mine
                )  # fmt: skip
                prompts = image.prompt.repeat_interleave(G, 0)
                loss = (text_loss + policy_loss(image_logp(self.model, prompts, image.tokens), mine)) / count
            with time("backward"):
                loss.backward()
            total += float(loss.detach())
        return total


def padded_update(
    model: JanusForConditionalGeneration,
    sampled: Sampled,
    photo_features: Tensor,
    rewards: Tensor,
    *,
    logits: Logits,
    forbidden: Tensor | None,
) -> float:
    """Forward and backward over [S, L + R] rows, each with its own prompt; gradients are left in the parameters.

    Args:
        model: transformers' Janus, sdpa attention.
        sampled: P prompts, S sequences.
        photo_features: [P, N, D] embeddings of the photos, computed before.
        rewards: [S] float32.
        logits: `sampled rows, fused` is our head and loss on the rows that predict a sampled token.
        forbidden: [F] ids without probability.

    Returns:
        The loss.
    """
    rows, R, G = sampled.rows, sampled.tokens.shape[1], sampled.group_size
    embeddings = model.get_input_embeddings()(rows)
    slots = (rows == model.config.image_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(slots, photo_features.repeat_interleave(G, 0).to(embeddings.dtype))
    mask = torch.ones_like(rows)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, use_cache=False
    ).last_hidden_state
    if logits == "sampled rows, fused":
        loss = _fused_loss(model, hidden[:, -R - 1 : -1], sampled.tokens, rewards, G, forbidden)
    else:
        kept = rows.shape[1] if logits == "every position" else R + 1
        logp = selected(model.lm_head(hidden[:, -kept:])[:, :-1], rows[:, -kept + 1 :], forbidden)[:, -R:]
        loss = policy_loss(logp, group_normalised(rewards, G))
    loss.backward()
    return float(loss.detach())


def _fused_loss(
    model: JanusForConditionalGeneration, hidden: Tensor, tokens: Tensor, rewards: Tensor, group: int,
    forbidden: Tensor | None,
) -> Tensor:  # fmt: skip
    """Our fused head and loss on hidden states [S, R, D] that predict tokens [S, R]."""
    S, R = tokens.shape
    stream = TokenStream(
        hidden=hidden.flatten(0, 1), weight=model.lm_head.weight, targets=tokens.flatten(),
        rows=torch.arange(S * R, device=tokens.device), forbidden=forbidden,
    )  # fmt: skip
    ends = torch.arange(0, S * R + 1, R, dtype=torch.int32, device=tokens.device)
    groups = torch.arange(0, S + 1, group, dtype=torch.int32, device=tokens.device)
    return linear_grpo_loss([stream], rewards, ends, groups, loss_type="dapo").loss


def one_copy(policy: Any) -> JanusForConditionalGeneration:
    """The policy's weights in a model of the peer's own, with transformers' attention; what is trained stays so."""
    model = copy.deepcopy(policy.model)
    model.model.language_model.set_attn_implementation("sdpa")
    return model
