"""Real small policies, trajectories, photos and processes for the tests of the engine; as a script, one rank of two.

`helpers.py OUT` on two ranks is the worker of `test_learner.py`.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from warm import environment as environment

from syncr1.engine.forward.packing import pack
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import PackedBatch, Prompt, Rollout, Segment, SegmentKind
from syncr1.engine.rollout.preview_gate import PreviewGate
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.world.attributes import CONCEPTS, LOOKS
from syncr1.engine.world.base_model import corpus
from syncr1.engine.world.render import render
from syncr1.engine.world.tiny_janus import build_policy
from syncr1.kernels.api import group_advantages

ROOT = Path(__file__).resolve().parents[2]
CHAIN: tuple[SegmentKind, ...] = ("text", "image")
LONG_CHAIN: tuple[SegmentKind, ...] = ("text", "image", "text")


# Policies -------------------------------------------------------------------------------------------------------------


@cache
def _sharp_policy(seed: int) -> JanusPolicy:
    policy = build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=seed, freeze_vision=True).eval()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(4)
        policy.model.model.generation_head.vision_head.weight.mul_(4)
        policy.model.model.generation_head.vision_head.bias.normal_(generator=torch.Generator().manual_seed(seed))
        plain = PlainJanus(policy)
        hidden = plain.hidden(plain.prompt(make_prompt("draw the red creature at the beach"))).mean(0)
        end = next(iter(policy.end_tokens))
        policy.model.lm_head.weight[end] += hidden * 14 / hidden.square().sum()
    return policy


def sharp_policy(seed: int = 0) -> JanusPolicy:
    """An untrained tiny Janus whose distributions are far from uniform and whose texts end at different lengths."""
    return copy.deepcopy(_sharp_policy(seed))


class PlainJanus:
    """The same weights through transformers alone: one sequence at a time, its own attention, no cache, no mask."""

    def __init__(self, policy: JanusPolicy) -> None:
        self.policy, self.model = policy, copy.deepcopy(policy.model)
        self.model.model.language_model.set_attn_implementation("sdpa")

    def hidden(self, embeddings: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.model.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]

    def text(self, tokens: Tensor) -> Tensor:
        return self.model.model.language_model.embed_tokens(tokens)

    def image(self, tokens: Tensor) -> Tensor:
        return self.model.prepare_embeddings_for_image_generation(tokens)

    def prompt(self, prompt: Prompt) -> Tensor:
        """[L, D] embeddings, the photo's features in their slots."""
        tokens = self.policy.prompt_tokens(prompt)
        embeddings = self.text(tokens).clone()
        if prompt.images:
            pixels = (self.policy.load_images(prompt.images) - 0.5) / 0.5
            features = self.model.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)
            embeddings[tokens == self.model.config.image_token_id] = features.to(embeddings.dtype)
        return embeddings

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.model.model.generation_head(hidden)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """The ids that are never sampled have no probability: control tokens except the end."""
        logits = self.model.lm_head(hidden)
        tokenizer = self.policy.tokenizer
        never = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
        return logits.index_fill(-1, torch.tensor(never), -torch.inf)

    @torch.no_grad()
    def replay(
        self, rollout: Rollout, *, temperature: float = 1.0, cfg_weight: float = 1.0, shift: int = 0
    ) -> dict[str, Tensor]:
        """Teacher-forced log-probabilities of a trajectory: `text`, `image` (conditional), `image_mixed`, `follow_up`.

        `shift` scores every image token that many positions late (the fault that the replay must be able to see).
        """
        pieces, out = [self.prompt(rollout.prompt)], {}
        for segment in rollout.segments:
            pieces.append(self.lead(segment))
            first = sum(len(piece) for piece in pieces)
            pieces.append(self.text(segment.tokens) if segment.kind == "text" else self.image(segment.tokens))
            hidden = self.hidden(torch.cat(pieces))
            rows = torch.arange(first, first + len(segment.tokens)) - 1
            if segment.kind == "text":
                name = "text" if "image" not in out else "follow_up"
                out[name] = _gather(self.text_logits(hidden[rows]), segment.tokens, temperature)
                continue
            conditional = self.image_logits(hidden[(rows + shift).clamp(max=len(hidden) - 1)])
            out["image"] = _gather(conditional, segment.tokens, temperature)
            beside = self.policy.unconditional_tokens() if segment.free_prompt is None else segment.free_prompt
            free = self.hidden(torch.cat([self.text(beside), pieces[-1]]))
            unconditional = self.image_logits(free[-1 - len(segment.tokens) : -1])
            mixed = unconditional + cfg_weight * (conditional - unconditional)
            out["image_mixed"] = _gather(mixed, segment.tokens, temperature)
        return out

    def lead(self, segment: Segment) -> Tensor:
        """[L, D] embeddings of what the policy was given before a segment, the drawn image in its slots."""
        embeddings = self.text(segment.lead).clone()
        if segment.lead_image is not None:
            embeddings[segment.lead == self.model.config.image_token_id] = segment.lead_image
        return embeddings


def _gather(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


# Trajectories ---------------------------------------------------------------------------------------------------------


def make_prompt(text: str, segments: tuple[SegmentKind, ...] = CHAIN, image: Path | None = None, **more: Any) -> Prompt:
    return Prompt(
        id=f"{'-'.join(segments)}/{image is not None}/{text}",
        task="rea",
        text=text,
        segments=segments,
        images=() if image is None else (image,),
        **more,
    )


def world_photo(folder: Path, index: int) -> Path:
    path = folder / f"{index}.png"
    if not path.exists():
        Image.fromarray(render(LOOKS[index], variation=np.random.default_rng(index))).save(path)
    return path


def all_kinds_of_prompts(folder: Path) -> list[Prompt]:
    """Text only, image only, chained and followed up; with and without a photo; of different lengths."""
    photos = [world_photo(folder, index) for index in range(2)]
    return [
        make_prompt("what is the colour of the creature?", ("text",), photos[0]),
        make_prompt("draw it.", ("image",)),
        make_prompt("draw the creature, round, red, plain, with a crown, at the beach.", CHAIN),
        make_prompt("who is this?", CHAIN, photos[1]),
        make_prompt("sound?", ("text",)),
        make_prompt("show a photo of a triangle creature.", ("image",), photos[0]),
        make_prompt("draw the blue one.", LONG_CHAIN, follow_up="what is its colour?"),
        make_prompt("draw it again.", ("image", "text"), photos[1], follow_up="where is it?"),
    ]


def sampled(
    policy: JanusPolicy, folder: Path, *, num_generations: int = 3, cfg_weight: float = 2.0, seed: int = 0
) -> list[Rollout]:
    """Six groups: text, image and both, each with and without a photo."""
    sampling = Sampling(num_generations=num_generations, cfg_weight=cfg_weight, max_text_tokens=8, seed=seed)
    return generate(policy, all_kinds_of_prompts(folder)[:6], sampling)


def random_rewards(num: int, seed: int = 0) -> Tensor:
    """[num] float32."""
    return torch.rand(num, generator=torch.Generator().manual_seed(seed))


def random_advantages(num: int, num_generations: int, seed: int = 0) -> Tensor:
    """[num, 2] float32 of `random_rewards`, both columns alike, as shared credit has them."""
    offsets = torch.arange(0, num + 1, num_generations)
    return group_advantages(random_rewards(num, seed), offsets)[:, None].expand(-1, 2).contiguous()


def packed(
    policy: JanusPolicy,
    rollouts: Sequence[Rollout],
    num_generations: int,
    max_tokens: int = 1 << 30,
    *,
    keep: Tensor | None = None,
    seed: int = 0,
    share_prefix: bool = True,
    guided: bool = False,
) -> list[PackedBatch]:
    keep = torch.ones(len(rollouts), dtype=torch.bool) if keep is None else keep
    return pack(
        policy,
        rollouts,
        random_advantages(len(rollouts), num_generations, seed),
        keep,
        num_generations=num_generations,
        max_tokens=max_tokens,
        share_prefix=share_prefix,
        guided=guided,
    )


def given(kind: SegmentKind, tokens: Sequence[int]) -> Segment:
    """A segment with chosen tokens and log-probabilities -1, -2, …"""
    logp = -torch.arange(1.0, len(tokens) + 1)
    return Segment(kind=kind, tokens=torch.tensor(tokens), logp=logp, logp_mixed=logp, entropy=logp.abs())


class Gate(PreviewGate):
    """A preview judged by the picture's mean red; remembers what was judged."""

    def __init__(
        self,
        *,
        threshold: float | None,
        max_attempts: int,
        fraction: float = 0.5,
        nan: bool = False,
        min_keep: int | None = None,
    ) -> None:
        self.seen: list[dict[tuple[str, str], float]] = []
        super().__init__(
            self._judge,
            fraction=fraction,
            threshold=threshold,
            acceptance=0.5,
            max_attempts=max_attempts,
            min_keep=min_keep,
        )
        self._nan = nan

    def _judge(self, prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        scores = images[:, 0].mean((1, 2))
        self.seen.append({(p.id, t): float(s) for p, t, s in zip(prompts, texts, scores, strict=True)})
        return torch.full_like(scores, float("nan")) if self._nan else scores


# Processes ------------------------------------------------------------------------------------------------------------


def end_process_group() -> None:
    if dist.is_initialized():
        import deepspeed.comm

        end = deepspeed.comm if deepspeed.comm.is_initialized() else dist  # else its groups would be gone, but not it
        end.destroy_process_group()


@contextmanager
def own_process_group() -> Iterator[None]:
    """Leaves neither a process group nor the launcher's variables to the tests that follow."""
    before = dict(os.environ)
    try:
        yield
    finally:
        end_process_group()
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def everything_partitioned() -> Iterator[None]:
    """ZeRO-3 leaves parameters below 100 000 elements whole, all of a tiny model's; here it splits them too."""
    from syncr1.engine.learn import learner

    original = learner.deepspeed_config

    def config(settings: learner.LearnerSettings, num_trained: int) -> dict[str, Any]:
        made = original(settings, num_trained)
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
        return made

    learner.deepspeed_config = config
    try:
        yield
    finally:
        learner.deepspeed_config = original


# The worker -----------------------------------------------------------------------------------------------------------


def weights_of(learner: Any) -> dict[str, Tensor]:
    with learner.sampling() as policy:
        return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_of(learner: Any) -> dict[str, Tensor]:
    """All weights and the optimizer's state."""
    from syncr1.engine.checkpoints.optimizer_state import optimizer_tensors

    with learner.sampling() as policy:
        tensors = {name: p.detach().clone() for name, p in policy.named_parameters()}
    held = optimizer_tensors(learner.optimizer, learner.policy)
    return tensors | {f"optimizer {name}": tensor.clone() for name, tensor in held.items()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, a row for each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learn(
    stage: int, batches: Sequence[PackedBatch], *, failing: bool = False, seed: int = 0, **objective: Any
) -> tuple[dict[str, Any], Any]:
    """Two updates from the same starting point; `failing`: an error inside `sampling()` comes between them."""
    from syncr1.engine.forward.objective import Objective
    from syncr1.engine.learn.learner import Learner
    from syncr1.engine.learn.optimizer import LearnerSettings

    settings = LearnerSettings(learning_rate=1e-3, zero_stage=stage)
    learner = Learner(sharp_policy(seed), Objective(**objective), settings)
    losses, norms = [], []
    for _ in range(2):
        metrics = learner.update(learner.score(batches))
        losses.append(
            float(learner.all_reduce(torch.tensor(metrics["loss"], dtype=torch.float64))) / learner.world_size
        )
        norms.append(metrics["grad_norm"])
        if failing:
            try:
                with learner.sampling():
                    raise RuntimeError("a reward broke")
            except RuntimeError as error:
                assert str(error) == "a reward broke"
    return {"losses": losses, "norms": norms}, learner


def main(folder: Path) -> None:
    """Both ranks train on their halves of one batch, under every ZeRO stage; rank 0 writes what came out."""
    from syncr1.engine.processes.group import init_distributed

    torch.set_num_threads(1)
    gc.freeze()  # ZeRO-3 collects in every step: what was imported is not looked through
    init_distributed()
    rank = dist.get_rank()
    policy = sharp_policy()
    rollouts = sampled(policy, folder)
    whole = packed(policy, rollouts, 3, 1)
    mine = whole[:4] if rank == 0 else whole[4:]
    nothing = packed(policy, rollouts, 3, keep=torch.zeros(len(rollouts), dtype=torch.bool))
    cases: dict[str, tuple[int, list[PackedBatch], dict[str, Any]]] = {
        f"stage{stage}": (stage, mine, {"loss_type": "dapo"}) for stage in (0, 1, 2, 3)
    }
    cases |= {
        "grpo2": (2, mine, {"loss_type": "grpo"}),
        "failing3": (3, mine, {"loss_type": "dapo", "failing": True}),
        "pruned3": (3, whole if rank == 0 else nothing, {"loss_type": "grpo"}),
    }
    results: dict[str, Any] = {}
    for name, (stage, batches, more) in cases.items():
        results[name], learner = learn(stage, batches, **more)
        weights = weights_of(learner)
        if name == "failing3":
            learner.save(folder / "checkpoint")
        if rank == 0:
            torch.save(weights, folder / f"{name}.pt")
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with everything_partitioned():
        main(Path(sys.argv[1]))
