"""Training beside padded rows, and a whole Sync-GRPO step beside ULM-R1's (released.py).

    python bench/step.py                       both cases, several minutes on two cores
    python bench/step.py --only training       one of them, the others stay in the file
    python bench/step.py --only step_at_once   the step, with the released rollouts of all prompts at once
    python bench/step.py --only our_step       the step of ours alone, by stage
    python bench/step.py --only guided_loss    the same, trained on the distribution that guidance draws from, and not
    python bench/step.py --quick --out /tmp/x  a tiny model: shows that everything runs

The step is mixed: as many questions about photos as images to draw, G trajectories each, the same cheap rewards on both
sides.  Ours is the engine's own Trainer, with dynamic group scaling and without.  On: pruning keeps .9 of the variance
mass; a preview after a fifth of an image, with the threshold that a quarter of all previews passes (both the released
Sync-R1's numbers), gives up the others but the best two of a group.  The released trainer draws and trains everything.

Dims: P prompts, G members.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from comparison import OURS, Case, Comparison, Goal, Provider, Told, only_probe, parser_of, run_cases
from models import Size
from released import ReleasedTrainer
from sides import PEER_REWARDS, Sides, Work, our_image_reward, our_text_reward, photo_folder, work_of
from training import training

from syncr1.engine.records import Prompt
from syncr1.engine.settings.train_config import PolicyLogp

CASES, ON_REQUEST = ("training", "step"), ("step_at_once", "our_step", "guided_loss")
RELEASED, WITH_DGS, WITHOUT_DGS = "released", f"{OURS}, DGS", f"{OURS}, no DGS"
DESCRIBED = f"{RELEASED}, G photos and all logits"
"""The released way as it is often told; its code is leaner, see released.py."""
CONVENTIONS: tuple[PolicyLogp, ...] = ("conditional", "guided", "guided_detached")
NUMBERS = {
    "dgs/keep_fraction": "kept",
    "rollout/dropped_fraction": "dropped",
    "num_tokens": "tokens",
    "pack/tokens": "positions",
    "pack/sharing_ratio": "sharing",
}


@dataclass(slots=True)
class Given:
    """The same prompts at every step."""

    prompts: list[Prompt]

    def next_step(self) -> list[Prompt]:
        return self.prompts


class OurStep:
    """The engine's Trainer on a policy of its own.

    Args:
        sides: for the prompts.
        dgs: dynamic group scaling.
        policy_logp: what of image tokens is trained.
    """

    def __init__(self, sides: Sides, dgs: bool, policy_logp: PolicyLogp = "conditional") -> None:
        from syncr1.engine.learn.from_settings import objective_of, sampler_of, settings_of
        from syncr1.engine.learn.learner import Learner
        from syncr1.engine.learn.trainer import Trainer
        from syncr1.engine.methods.sync_r1_config import SyncR1Config
        from syncr1.engine.rewards.ensemble import RewardSet
        from syncr1.engine.rewards.preview_scorer import build_preview

        work, size = sides.work, sides.size
        config = SyncR1Config(
            num_generations=work.group,
            max_completion_length=work.text_tokens,
            cfg_weight=work.cfg_weight,
            policy_logp=policy_logp,
            prompts_per_step=2 * work.pairs,
            max_steps=1000,
            warmup_steps=0,
            learning_rate=1e-6,
            beta=0.0,
            anchor_fraction=0.0,
            bf16=size.dtype is torch.bfloat16,
            replay_check_steps=0,
            dgs="variance_mass" if dgs else "none",
            preview_fraction=0.2 if dgs else 0.0,
            preview_acceptance=0.25,
            preview_max_attempts=1,
            preview_min_keep=2 if dgs else None,
        )
        rewards = RewardSet(
            functions={"text": our_text_reward, "image": our_image_reward}, weights=(0.8, 1.0), kinds=("text", "image")
        )
        policy = models.build_policy(size)
        learner = Learner(
            policy, objective_of(config, policy.num_image_tokens, config.anchor_beta), settings_of(config)
        )
        self.everything = [*sides.questions, *sides.drawings]
        self.prompts = Given(self.everything)
        sampler, preview = sampler_of(config, policy), build_preview(config, rewards)
        self.trainer = Trainer(config, learner, sampler, self.prompts, rewards, preview)
        self.device = size.device

    def __call__(self, short: bool) -> Told:
        few = short and self.device == "cpu"
        self.prompts.prompts = self.everything[:1] if few else self.everything
        metrics = self.trainer.train_step()
        seconds: dict[str, float] = {}
        for stage, value in metrics.seconds.items():
            name = stage.split("/")[-1]
            seconds[name] = seconds.get(name, 0.0) + value
        return Told(seconds, {name: metrics.values[key] for key, name in NUMBERS.items()})


def released_step(sides: Sides, name: str, **how: Any) -> Provider:
    """ULM-R1's step on the peer's copy of the weights; `how`: see ReleasedTrainer."""
    work = sides.work
    trainer = ReleasedTrainer(
        sides.peer,
        PEER_REWARDS,
        num_generations=work.group,
        max_new_tokens=work.text_tokens,
        cfg_weight=work.cfg_weight,
        forbidden=sides.forbidden,
        pad_id=sides.pad_id,
        **how,
    )
    questions, pixels, drawings = sides.ids(sides.questions), sides.pixels(), sides.ids(sides.drawings)
    sampled = work.pairs * work.group * (work.text_tokens + sides.size.image_tokens)
    positions = sampled + work.group * (questions.numel() + drawings.numel())

    def run(short: bool) -> Told:
        if short and sides.size.device == "cpu":
            trainer.warm_up(questions[:1], pixels[:1])
            return Told()
        return Told(trainer.step(questions, pixels, drawings), {"tokens": sampled, "positions": positions})

    return Provider(name, run, memory=False)


def step(sides: Sides, against: str) -> Case:
    """P questions about photos and P drawings, from prompts to updated weights.

    Args:
        sides: the model and the prompts.
        against: the released step in its two forms (`pairs`), with all prompts `at once`, or nothing (`none`).
    """
    work, size = sides.work, sides.size
    peers: dict[str, Provider] = {}
    if against == "at once":
        peers = {f"{RELEASED}, at once": released_step(sides, f"{RELEASED}, at once")}
    elif against == "pairs":
        peers = {
            DESCRIBED: released_step(sides, DESCRIBED, pair_by_pair=True, encode="per sample", logits="every position"),
            RELEASED: released_step(sides, RELEASED, pair_by_pair=True),
        }

    def goals(found: Comparison) -> list[Goal]:
        return [
            Goal(f"whole step {words}, faster than {peer}", found.ratio(peer, mine), wanted)
            for peer in peers
            for words, mine, wanted in (("with DGS", WITH_DGS, 5.0), ("without DGS", WITHOUT_DGS, 3.0))
        ]

    shape = (
        f"{work.pairs} + {work.pairs} prompts, G {work.group}, {work.text_tokens} text and {size.image_tokens} image "
        f"tokens, CFG {work.cfg_weight:g}; {size}"
    )
    ours = [Provider(name, OurStep(sides, dgs=name == WITH_DGS), memory=False) for name in (WITH_DGS, WITHOUT_DGS)]
    return Case("Whole step", shape, [*peers.values(), *ours], goals)


def guided_loss(sides: Sides) -> Case:
    """The mixed step without pruning under each convention; the rollout is the same."""
    work, size = sides.work, sides.size
    images, texts = (work.pairs * work.group * n for n in (size.image_tokens, work.text_tokens))
    prompts = sum(sides.policy.prompt_tokens(p).numel() for p in (*sides.questions, *sides.drawings))
    decoder = sides.policy.model.model.language_model
    trunk = sum(p.numel() for layer in decoder.layers for p in layer.parameters())
    heads = texts * sides.policy.model.lm_head.weight.numel() + images * size.hidden * size.image_vocabulary
    own = trunk * (prompts + texts + images + work.pairs * work.group) + heads
    twins = trunk * (images + sides.policy.unconditional_tokens().numel())

    def goals(found: Comparison) -> list[Goal]:
        made = []
        for how, floor in (("guided", 1 + twins / own), ("guided_detached", 1 + twins / own / 3)):
            mine, words = f"{OURS}, {how}", f"{how} loss / conditional"
            update = _stage_ratio(found, mine, f"{OURS}, conditional")
            made += [
                Goal(f"{words}, whole step", found.ratio(mine, f"{OURS}, conditional"), 1.35, True),
                Goal(f"{words}, forward and backward (multiply-adds: {floor:.2f})", update, floor * 1.1, True),
                Goal(f"{words}, peak extra memory", found.memory_share(f"{OURS}, conditional", mine), 1.3, True),
            ]
        return made

    shape = (
        f"{work.pairs} + {work.pairs} prompts, G {work.group}, {work.text_tokens} text and {size.image_tokens} image "
        f"tokens, CFG {work.cfg_weight:g}; {size}"
    )
    return Case(
        "Whole step, by what is trained of images drawn with guidance",
        shape,
        [Provider(f"{OURS}, {how}", OurStep(sides, dgs=False, policy_logp=how)) for how in CONVENTIONS],
        goals,
    )


def _stage_ratio(found: Comparison, mine: str, other: str) -> float | None:
    """Forward and backward of one over the other's, by medians."""
    one, two = (sum(found.provider(n).stages().get(s, 0.0) for s in ("forward", "backward")) for n in (mine, other))
    return one / two if one and two else None


def build_case(name: str, size: Size, work: Work, folder: Path) -> Case:
    """A case by name, with sides of its own."""
    if name == "training":
        return training(Sides(size, work, folder, 2, 0))
    if name == "guided_loss":
        return guided_loss(Sides(size, work, folder, work.pairs, work.pairs))
    against = {"step": "pairs", "step_at_once": "at once", "our_step": "none"}[name]
    return step(Sides(size, work, folder, work.pairs, work.pairs), against)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = parser_of(__doc__)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only or ()) - {*CASES, *ON_REQUEST})
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join((*CASES, *ON_REQUEST))}")
    size, work = models.size_of(given.device, given.quick), work_of(given.device, given.quick)
    with photo_folder() as folder:
        if given.probe:
            only_probe(given, lambda name: build_case(name, size, work, folder))
            return {}
        return run_cases(given, CASES, lambda name: build_case(name, size, work, folder), __file__, "step")


if __name__ == "__main__":
    main()
