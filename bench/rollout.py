"""Rollouts beside transformers': answers about photos, and drawn images, from the same weights.

    python bench/rollout.py                       both cases, a few minutes on two cores
    python bench/rollout.py --only drawing        one of them, the other stays in the file
    python bench/rollout.py --quick --out /tmp/x  a tiny model: shows that everything runs

Photos are encoded and images decoded inside the timed region of both sides; every side samples exactly as many tokens.
The peers are described in released.py.  The floor is what rates.py says.

Dims: P prompts, G members, R text tokens, L prompt tokens.
"""

from __future__ import annotations

from typing import Any

import models
import rates
import torch
from comparison import OURS, Case, Comparison, Goal, Provider, Told, only_probe, parser_of, run_cases
from released import Encode, hf_image_rollout, hf_text_rollout
from sides import Sides, photo_folder, work_of

from syncr1.engine.rollout.sampler import RolloutEngine
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.stopwatch import Stopwatch

CASES = ("understanding", "drawing")
HF_TEXT, HF_IMAGE = "HF generate", "HF loop"


def understanding(sides: Sides) -> Case:
    """Answers of G members to each of P questions about photos."""
    work, size = sides.work, sides.size
    ids, pixels, engine = sides.ids(sides.questions), sides.pixels(), RolloutEngine(sides.policy)
    P, L = ids.shape

    def ours(short: bool) -> Told:
        few = short and size.device == "cpu"
        sampling = Sampling(num_generations=2 if few else work.group, max_text_tokens=2 if few else work.text_tokens)
        rollouts = engine.generate(sides.questions[: 1 if few else P], sampling)
        count = sum(rollout.segments[0].tokens.numel() for rollout in rollouts)
        assert few or count == P * work.group * work.text_tokens, count
        return Told(engine.stats.seconds, {"kv_bytes": engine.stats.kv_bytes, "tokens": count})

    def hf(encode: Encode, short: bool) -> Told:
        few, time = short and size.device == "cpu", Stopwatch()
        chosen = slice(0, 1 if few else P)
        made = hf_text_rollout(
            sides.peer,
            ids[chosen],
            pixels[chosen],
            2 if few else work.group,
            2 if short else work.text_tokens,
            forbidden=sides.forbidden,
            encode=encode,
            time=time,
        )
        return Told(time.seconds, {"kv_bytes": made.kv_bytes, "tokens": made.tokens.numel()})

    def floor() -> dict[str, float]:
        B, steps = P * work.group, work.text_tokens - 1
        read = sum(P * L + B * done for done in range(1, steps + 1)) * sides.kv_token_bytes
        return rates.rollout_floor(
            sides.policy.model,
            device=size.device,
            num_photos=P,
            photo_rows=size.photo_tokens,
            prompt_tokens=P * L,
            rows=B,
            steps=steps,
            head=[sides.policy.model.lm_head.weight],
            kv_read_bytes=read,
        )

    def goals(found: Comparison) -> list[Goal]:
        per_prompt = f"{HF_TEXT}, photo once per prompt"
        return [
            Goal(
                "understanding rollout, faster than HF generate", found.times_slower(HF_TEXT), 2.5, key="text_rollout"
            ),
            Goal("understanding rollout, KV / HF generate's", found.number_share("kv_bytes", per_prompt), 0.25, True),
        ]

    shape = f"{P} x {size.photo_tokens}+{work.prompt_tokens} tokens, G {work.group}, {work.text_tokens} new; {size}"
    providers = [
        Provider(OURS, ours),
        Provider(f"{HF_TEXT}, photo once per prompt", lambda short: hf("per prompt", short)),
        Provider(f"{HF_TEXT}, photo per sample", lambda short: hf("per sample", short), memory=False),
    ]
    return Case("Understanding rollout", shape, providers, goals, floor)


def drawing(sides: Sides) -> Case:
    """Images of G members for each of P prompts, under guidance."""
    work, size = sides.work, sides.size
    ids, engine = sides.ids(sides.drawings), RolloutEngine(sides.policy)
    (P, L), N = ids.shape, size.image_tokens
    on_gpu = size.device == "cuda"

    def ours(short: bool) -> Told:
        few = short and size.device == "cpu"
        sampling = Sampling(num_generations=2 if few else work.group, cfg_weight=work.cfg_weight)
        rollouts = engine.generate(sides.drawings[: 1 if few else P], sampling)
        count = sum(rollout.segments[0].tokens.numel() for rollout in rollouts)
        assert few or count == P * work.group * N, count
        return Told(engine.stats.seconds, {"kv_bytes": engine.stats.kv_bytes, "tokens": count})

    def hf(short: bool) -> Told:
        few, time = short and size.device == "cpu", Stopwatch()
        made = hf_image_rollout(
            sides.peer,
            ids[: 1 if few else P],
            2 if few else work.group,
            2 if short else N,
            work.cfg_weight,
            pad_id=sides.pad_id,
            time=time,
        )
        with torch.no_grad(), time("draw"):
            whole = made.tokens if not short else made.tokens[:, :1].expand(-1, N).contiguous()
            sides.peer.model.vqmodel.decode(whole)
        return Told(time.seconds, {"kv_bytes": made.kv_bytes, "tokens": made.tokens.numel()})

    def floor() -> dict[str, float]:
        rows, free = 2 * P * work.group, sides.policy.unconditional_tokens().numel()
        read = sum(P * L + free + rows * done for done in range(1, N)) * sides.kv_token_bytes
        return rates.rollout_floor(
            sides.policy.model,
            device=size.device,
            num_photos=0,
            photo_rows=0,
            prompt_tokens=P * L + free,
            rows=rows,
            steps=N - 1,
            head=rates.linears(sides.policy.model.model.generation_head),
            kv_read_bytes=read,
        )

    def goals(found: Comparison) -> list[Goal]:
        stages = found.provider(OURS).stages()
        least = found.floor["steps"] + found.floor["keys and values"]
        steps = stages["image"] / least if "image" in stages else None
        return [
            *([Goal("image tokens, all steps / their floor", steps, 1.5, True, key="image_step")] if on_gpu else []),
            Goal("image rollout, faster than the HF loop", found.times_slower(HF_IMAGE), 1.5, key="image_rollout"),
            Goal("image rollout, KV / the HF loop's", found.number_share("kv_bytes", HF_IMAGE), 0.85, True),
        ]

    shape = f"{P} x {L} tokens, G {work.group}, {N} image tokens, CFG {work.cfg_weight:g}; {size}"
    return Case("Image rollout", shape, [Provider(OURS, ours), Provider(HF_IMAGE, hf)], goals, floor)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = parser_of(__doc__)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only or ()) - set(CASES))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    size, work = models.size_of(given.device, given.quick), work_of(given.device, given.quick)
    with photo_folder() as folder:
        sides = Sides(size, work, folder, work.questions, work.drawings)

        def build(name: str) -> Case:
            return {"understanding": understanding, "drawing": drawing}[name](sides)

        if given.probe:
            only_probe(given, build)
            return {}
        return run_cases(given, CASES, build, __file__, "rollout")


if __name__ == "__main__":
    main()
