"""Show-o's drawing and Mask-GRPO's update as their released code runs them, on transformers' own Phi: the peer of ours.

Rewritten from what they do (showlab/Show-o at 45a5a2d; Mask-GRPO, arXiv 2510.13418); none of their code is here.

- prompts are padded on the left to 129 positions; a step is one forward over everything, conditional and unconditional
  rows in one batch, with a dense mask, and logits of every position over the whole table, of which the codes are cut;
- softmax, multinomial over every place, known or not; Gumbel noise, a sort;
- training: a padded forward and backward for every trained step, all members a batch, logits of every position over the
  whole table.

Kinder to them than the code: sdpa attention; the mask is made once; no random generator on the way.

Dims: B rows, L positions of a padded sequence, N image tokens, V rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.records import Segment


class PublishedShowO:
    """The language model with a dense mask; its own copy, since attention is another.

    Args:
        policy: whose model it is; its weights are shared, but for the copy's attention.
        model: that copy.
    """

    def __init__(self, policy: ShowOPolicy, model: torch.nn.Module) -> None:
        self.policy, self.model = policy, model
        config = policy.model.config
        self.slots, self.first, self.mask = config.text_slots, config.text_rows, config.mask_token_id

    def padded(self, prompt: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """([B, L] ids, [B, 1, L, L] float mask to add) for `images` [B, N] of row ids."""
        pads = torch.full((self.slots - prompt.numel(),), self.policy.model.config.pad_token_id)
        soi, eoi = self.policy.image_frame()
        B = len(images)
        head, tail = torch.cat([pads, prompt, soi]).expand(B, -1), eoi.expand(B, -1)
        ids = torch.cat([head, images, tail], 1)
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen[self.slots :] = True
        seen[:, : pads.numel()] = False
        seen[: pads.numel()] |= torch.eye(ids.shape[1], dtype=torch.bool)[: pads.numel()]
        return ids, torch.zeros(B, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, L, V]."""
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def codes(self, logits: Tensor) -> Tensor:
        """[B, L, V] -> [B, N, K] of the image's places."""
        N = self.policy.num_image_tokens
        return logits[:, -(N + 1) : -1, self.first : -1]

    @torch.no_grad()
    def draw(self, prompt: Tensor, num_images: int, steps: int, guidance: float, noise: float = 1.0) -> Tensor:
        """[n, N] int64 codes: `t2i_generate`."""
        N = self.policy.num_image_tokens
        images = torch.full((num_images, N), self.mask)
        (ids, seen), (free, seen_free) = (
            self.padded(words, images) for words in (prompt, self.policy.unconditional_tokens())
        )
        mask, sampled, temperature = torch.cat([seen, seen_free]), images, noise
        for step in range(steps):
            ids[:, -(N + 1) : -1] = free[:, -(N + 1) : -1] = images
            conditional, unconditional = self.logits(torch.cat([ids, free]), mask).chunk(2)
            logits = self.codes((1 + guidance) * conditional - guidance * unconditional)
            probs = logits.softmax(-1)
            drawn = torch.multinomial(probs.flatten(0, 1), 1)[:, 0].view(num_images, N)
            unknown = images == self.mask
            sampled = torch.where(unknown, drawn, images - self.first)
            chosen = probs.gather(-1, sampled[..., None])[..., 0]
            chosen = torch.where(unknown, chosen, torch.finfo(chosen.dtype).max)
            ratio = (step + 1) / steps
            left = int(N * math.cos(ratio * math.pi * 0.5))
            left = max(1, min(int(unknown[0].sum()) - 1, left))
            temperature *= 1.0 - ratio
            gumbel = -(-torch.rand_like(chosen).clamp(min=1e-20).log()).clamp(min=1e-20).log()
            confidence = chosen.log() + temperature * gumbel
            cut = confidence.sort(-1).values[:, left : left + 1]
            images = torch.where(confidence < cut, self.mask, sampled + self.first)
        return sampled

    def update(
        self, prompt: Tensor, images: Sequence[Segment], steps: Sequence[Sequence[int]], advantages: Tensor
    ) -> None:
        """Forward and backward of the members' first chosen steps, then of their second ones, …; gradients add up."""
        tokens = torch.stack([segment.tokens for segment in images])
        orders = torch.stack([segment.order for segment in images if segment.order is not None])
        for chosen in zip(*steps, strict=True):
            step = torch.tensor(chosen)[:, None]
            ids, mask = self.padded(prompt, torch.where(orders < step, tokens + self.first, self.mask))
            logp = self.codes(self.logits(ids, mask)).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
            settled = (logp * (orders == step)).sum(1)
            ratio = (settled - settled.detach()).exp()
            loss = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages).mean() / len(steps[0])
            loss.backward()
