"""Masked drawing and its training beside the released way (released_show_o.py), from the same weights.

    python bench/masked.py                       both cases, a few minutes on two cores
    python bench/masked.py --only training       one of them, the other stays in the file
    python bench/masked.py --quick --out /tmp/x  a tiny model: shows that everything runs

A Phi whose trunk and table are to each other about as in Phi-1.5: a quarter of its width, a third of its layers, of its
words and codes. Weights are random, which changes no shape: how many places a step settles is the schedule's.

The floor of ours is its matrix products at the machine's rate: N + 2 places an image, side and step through the trunk,
unknown places through the codes' head. That of the released way has 129 more positions and the whole table's head.

Dims: G members, N image tokens, T steps, k of them trained.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import rates
import torch
from comparison import OURS, Case, Comparison, Goal, Provider, Told, only_probe, parser_of, run_cases
from released_show_o import PublishedShowO
from tokenizers import Tokenizer, models
from transformers import PhiConfig, PreTrainedTokenizerFast

from syncr1.engine.forward.masked_states import MaskedPlan
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.policies.magvit import MagvitConfig
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.policies.show_o_model import ShowOConfig, ShowOForUnifiedGeneration, ShowOProcessor
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rollout.mask_schedule import MaskSchedule
from syncr1.engine.rollout.sampler import RolloutEngine
from syncr1.engine.rollout.sampling import Sampling

CASES = ("drawing", "training")
RELEASED = "released way"
MEMBERS, STEPS, GUIDANCE, TRAINED = 8, 16, 1.75, 4
PROMPT = Prompt(id="bench/masked", task="gen", text="a photo of a small red cat on a blue chair", segments=("image",))


def build_policy(quick: bool) -> ShowOPolicy:
    """Random weights, seeded."""
    characters = {chr(index): index - 32 for index in range(32, 127)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({**characters, "<|endoftext|>": len(characters)}, [])),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    side, words, bits = (64, 512, 6) if quick else (256, 12_576, 11)
    processor = ShowOProcessor.made_of(tokenizer, side)
    vq = MagvitConfig(
        bits=bits,
        channels=32,
        encoder_multipliers=(1,) * 5,
        encoder_blocks=(1,) * 5,
        decoder_multipliers=(1,) * 5,
        decoder_blocks=(1,) * 5,
    )
    width, layers = (64, 2) if quick else (512, 8)
    text = PhiConfig(
        vocab_size=words + vq.num_codes + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
    )
    config = ShowOConfig(text_config=text, vq_config=asdict(vq), image_size=side)
    config.take_tokens(processor.tokenizer)
    torch.manual_seed(0)
    return ShowOPolicy(ShowOForUnifiedGeneration(config), processor).eval()


class Sides:
    """Both sides' models and what they are given."""

    def __init__(self, quick: bool) -> None:
        self.policy = policy = build_policy(quick)
        peer = copy.deepcopy(self.policy.model.showo)
        peer.set_attn_implementation("sdpa")
        self.peer = PublishedShowO(self.policy, peer)
        self.sampling = Sampling(
            num_generations=MEMBERS, cfg_weight=1 + GUIDANCE, image_steps=STEPS, image_noise=1.0, seed=1
        )
        config = self.policy.model.config.text_config
        self.shape = (
            f"G {MEMBERS}, {self.policy.num_image_tokens} image tokens, T {STEPS}; {config.num_hidden_layers} layers, "
            f"D {config.hidden_size}, V {config.vocab_size}, fp32"
        )
        self.weights = rates.linears(policy.decoder())
        self.trunk = sum(weight.numel() for weight in self.weights)

    def multiply_adds(self, *, places: float, scored: float, rows: int) -> float:
        """Of `places` through the trunk and `scored` of them through `rows` of a head."""
        width = self.policy.model.config.text_config.hidden_size
        return places * self.trunk + scored * rows * width

    def released_more(self, *, states: float, scored: float) -> float:
        """Multiply-adds of the released way over ours, for `states` passes over an image of which ours score so many
        places."""
        config, N = self.policy.model.config, self.policy.num_image_tokens
        padded = states * (N + 2 + config.text_slots)
        released = self.multiply_adds(places=padded, scored=padded, rows=config.mask_token_id + 1)
        return released / self.multiply_adds(places=states * (N + 2), scored=scored, rows=config.num_codes)


def drawing(sides: Sides) -> Case:
    """Images of G members of one prompt, under guidance."""
    engine, policy = RolloutEngine(sides.policy), sides.policy
    prompt, N = policy.prompt_tokens(PROMPT), policy.num_image_tokens

    def ours(short: bool) -> Told:
        sampling = Sampling(num_generations=2, cfg_weight=2.0, image_steps=2) if short else sides.sampling
        engine.generate([PROMPT], sampling)
        return Told(engine.stats.seconds, {"kv_bytes": engine.stats.kv_bytes})

    def released(short: bool) -> Told:
        codes = sides.peer.draw(prompt, 2 if short else MEMBERS, 2 if short else STEPS, GUIDANCE)
        policy.draw(codes)
        return Told()

    unknown = [2 * MEMBERS * left for left in (N, *MaskSchedule(N, STEPS).left[:-1])]
    codes = policy.head(torch.zeros(1, policy.model.config.text_config.hidden_size), "image").weight

    def floor() -> dict[str, float]:
        return {
            "trunk": STEPS * rates.products(sides.weights, 2 * MEMBERS * (N + 2)),
            "head": sum(rates.products([codes], rows) for rows in unknown),
        }

    def goals(found: Comparison) -> list[Goal]:
        more = sides.released_more(states=2 * MEMBERS * STEPS, scored=sum(unknown))
        return [
            Goal("masked rollout, faster than the published loop", found.times_slower(RELEASED), 3.0, key="masked"),
            Goal("masked rollout, multiply-adds, released / ours", more, 1.0),
        ]

    title, shape = "Masked drawing", f"guidance {GUIDANCE}, {sides.shape}"
    return Case(title, shape, [Provider(OURS, ours), Provider(RELEASED, released)], goals, floor)


def training(sides: Sides) -> Case:
    """Forward and backward of k steps of every member's image, conditional, as Mask-GRPO trains."""
    policy = sides.policy
    sampling = Sampling(num_generations=MEMBERS, image_steps=STEPS, seed=1)
    rollouts = RolloutEngine(policy).generate([PROMPT], sampling)
    advantages = torch.linspace(-1, 1, MEMBERS)
    plan = MaskedPlan("committed", TRAINED)
    forward = PolicyForward(policy, Objective(loss_type="dapo"))

    def steps_of(rollout: Rollout) -> list[int]:
        segment = rollout.segments[0]
        assert segment.order is not None
        states = plan.states(segment, rollout.uid)
        return [int(segment.order[state.scored][0]) for state in states]

    def ours(short: bool) -> Told:
        count = 2 if short else MEMBERS
        given = (policy, rollouts[:count], advantages[:count, None].expand(-1, 2).contiguous())
        kept = torch.ones(count, dtype=torch.bool)
        (batch,) = pack(*given, kept, num_generations=count, max_tokens=1 << 60, masked=plan)
        assert batch.filled is not None
        policy.zero_grad(set_to_none=True)
        forward(batch, num_items={"text": 1.0, "image": float(batch.filled.num_items)})["loss"].backward()
        return Told()

    def released(short: bool) -> Told:
        count = 2 if short else MEMBERS
        sides.peer.model.zero_grad(set_to_none=True)
        images = [rollout.segments[0] for rollout in rollouts[:count]]
        steps = [steps_of(rollout)[: 1 if short else None] for rollout in rollouts[:count]]
        sides.peer.update(policy.prompt_tokens(PROMPT), images, steps, advantages[:count])
        return Told()

    N, states = policy.num_image_tokens, MEMBERS * TRAINED
    codes = policy.head(torch.zeros(1, policy.model.config.text_config.hidden_size), "image").weight
    scored = MEMBERS * N * TRAINED // STEPS

    def floor() -> dict[str, float]:
        """Forward and backward are three products."""
        return {
            "trunk": 3 * rates.products(sides.weights, states * (N + 2)),
            "head": 3 * rates.products([codes], scored),
        }

    def goals(found: Comparison) -> list[Goal]:
        more = sides.released_more(states=states, scored=scored)
        return [
            Goal("masked training, faster than a padded forward a step", found.times_slower(RELEASED), 2.0),
            Goal("masked training, peak memory / the released way's", found.memory_share(RELEASED), 0.4, True),
            Goal("masked training, multiply-adds, released / ours", more, 1.0),
        ]

    shape = f"k {TRAINED}, {sides.shape}"
    return Case("Masked training", shape, [Provider(OURS, ours), Provider(RELEASED, released)], goals, floor)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = parser_of(__doc__)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only or ()) - set(CASES))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    sides = Sides(given.quick)

    def build(name: str) -> Case:
        return {"drawing": drawing, "training": training}[name](sides)

    if given.probe:
        only_probe(given, build)
        return {}
    return run_cases(given, CASES, build, __file__, "masked")


if __name__ == "__main__":
    main()
