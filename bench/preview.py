"""What a preview is worth: how its score and the finished drawing's reward go together, within a group, by fraction.

    python bench/preview.py                                  the embedded base and world, on one core
    python bench/preview.py --model runs/x/checkpoints/last --name trained
    python bench/preview.py --quick --out /tmp/x             few drawings: shows that everything runs

Groups are drawn whole, with the default run's settings and without a preview.  Then every drawing is cut after each
fraction of its sampled tokens, completed in each of the ways below, and scored as preview DGS scores it (the run's own
image rewards).  `pearson` and `spearman` are means over groups of the correlation with the finished drawing's whole
reward, text included; a group whose previews are all alike counts as 0, one whose rewards are alike is left out.
Intervals are 95 % by bootstrap over prompts; `gain` is the mean difference of `best of two` to repeating the last row,
group by group.  `best of two` is what a redraw gains: the mean reward of the better
preview of two members, above that of one, as a share of what choosing by the finished rewards would gain.

Ways to complete a picture: repeat the last row (what the sampler does) · mirror the drawn rows · tile them · paint the
rest in the drawn part's mean colour · `likely`: one more pass of the trunk over the repeated row, each undrawn token
its most likely id · `likely twice`: the same over what came out.  Seconds are those of completing and decoding.

Only the policy's protocol is used (tokens of an image, forced ones, `draw`, `trunk`, `head`), so that any policy that
draws in raster order can be measured; one that draws in another order brings its own `cut`.

Dims: n drawings, G members of a group, N tokens of an image, k of them drawn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from syncr1.engine.data.prompts import load_training_prompts
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import build_reward_set, prepare_data, prepare_model
from syncr1.engine.policies.auto import load_policy
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import IMAGE, Prompt, Rollout
from syncr1.engine.rewards.ensemble import combine
from syncr1.engine.rewards.preview_scorer import build_preview
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rollout.completion import fill
from syncr1.engine.rollout.preview import preview_length
from syncr1.engine.rollout.preview_gate import PreviewGate
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.show.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "preview.json"
FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
RESAMPLES = 2000
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Whole drawings, members of a group adjacent."""

    policy: Policy
    rollouts: list[Rollout]
    tokens: Tensor
    """[n, N] int64."""
    rewards: Tensor
    """[n] float32; NaN = none."""
    group: int
    """G."""


# Ways to complete a picture -------------------------------------------------------------------------------------------


def repeated(drawn: Drawn, k: int) -> Tensor:
    """[n, N]: the last whole row again and again."""
    return fill(drawn.tokens[:, :k], drawn.tokens.shape[1], drawn.policy.forced_image_tokens())


def mirrored(drawn: Drawn, k: int) -> Tensor:
    """The drawn rows in reverse, then forwards, and so on."""
    side, rows = _grid(drawn, k)
    order = [*range(rows), *reversed(range(rows))]
    return _from_rows(drawn, k, [order[row % len(order)] for row in range(side)])


def tiled(drawn: Drawn, k: int) -> Tensor:
    """The drawn rows in order again."""
    side, rows = _grid(drawn, k)
    return _from_rows(drawn, k, [row % rows for row in range(side)])


def likely(drawn: Drawn, k: int, passes: int = 1) -> Tensor:
    """Every undrawn token the most likely one, given what stands before it: one pass of the trunk each time."""
    tokens = repeated(drawn, k)
    for _ in range(passes):
        tokens = torch.cat([tokens[:, :k], most_likely(drawn, tokens)[:, k:]], 1)
    return tokens


WAYS: dict[str, Callable[[Drawn, int], Tensor]] = {
    "repeat": repeated,
    "mirror": mirrored,
    "tile": tiled,
    "likely": likely,
    "likely twice": partial(likely, passes=2),
}
PAINTED = "mean colour"
"""Of pixels, not of tokens."""


def completed(drawn: Drawn, k: int, way: str) -> Tensor:
    """[n, 3, H, W] pictures of the first k tokens."""
    if way != PAINTED:
        return drawn.policy.draw(WAYS[way](drawn, k))
    images = drawn.policy.draw(repeated(drawn, k)).clone()
    side, rows = _grid(drawn, k)
    edge = images.shape[2] * rows // side
    images[:, :, edge:] = images[:, :, :edge].mean((2, 3), keepdim=True)
    return images


def _grid(drawn: Drawn, k: int) -> tuple[int, int]:
    """(rows of the whole picture, rows that are whole after k tokens, at least 1)."""
    side = round(drawn.tokens.shape[1] ** 0.5)
    return side, max(1, k // side)


def _from_rows(drawn: Drawn, k: int, rows: Sequence[int]) -> Tensor:
    """[n, N]: what is drawn, and below it rows of it in this order."""
    filled = repeated(drawn, k)
    side = len(rows)
    copied = filled.view(-1, side, side)[:, list(rows)].reshape(filled.shape)
    return torch.cat([filled[:, :k], copied[:, k:]], 1)


@torch.no_grad()
def most_likely(drawn: Drawn, tokens: Tensor) -> Tensor:
    """[n, N]: the conditional distribution's mode at every token, given the tokens before it."""
    policy, n = drawn.policy, len(tokens)
    as_if = [_with_image(rollout, row) for rollout, row in zip(drawn.rollouts, tokens, strict=True)]
    everything = torch.ones(n, dtype=torch.bool)
    (batch,) = pack(policy, as_if, torch.zeros(n, 2), everything, num_generations=drawn.group, max_tokens=1 << 60)
    rows = (batch.modality == IMAGE).nonzero().squeeze(1)
    head = policy.head(PolicyForward(policy, Objective()).hidden(batch)[batch.layout.predicting_rows()[rows]], "image")
    logits = head.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    if head.forbidden is not None:
        logits[:, head.forbidden] = -torch.inf
    found, forced = logits.argmax(-1).view(tokens.shape), policy.forced_image_tokens()
    return found if forced is None else torch.where(forced >= 0, forced, found)


def _with_image(rollout: Rollout, tokens: Tensor) -> Rollout:
    """The trajectory up to its image, which is `tokens`."""
    at = next(i for i, segment in enumerate(rollout.segments) if segment.kind == "image")
    nothing = torch.zeros(tokens.shape[0])
    image = replace(rollout.segments[at], tokens=tokens, logp=nothing, logp_mixed=nothing, entropy=nothing)
    return replace(rollout, segments=(*rollout.segments[:at], image))


# What they are worth --------------------------------------------------------------------------------------------------


def group_values(previews: np.ndarray, finals: np.ndarray, measure: Callable[..., float]) -> list[float]:
    """`measure(preview [G], final [G])` of each group [P, G] whose finished rewards differ; without NaN members."""
    found = []
    for preview, final in zip(previews, finals, strict=True):
        known = np.isfinite(preview) & np.isfinite(final)
        if known.sum() >= 3 and np.ptp(final[known]) > 0:
            found.append(measure(preview[known], final[known]))
    return found


def pearson(preview: np.ndarray, final: np.ndarray) -> float:
    """0 where all previews are alike: they tell nothing."""
    return 0.0 if np.ptp(preview) == 0 else float(np.corrcoef(preview, final)[0, 1])


def spearman(preview: np.ndarray, final: np.ndarray) -> float:
    """Ties share the mean of their ranks."""
    return pearson(rankdata(preview), rankdata(final))


def best_of_two(preview: np.ndarray, final: np.ndarray) -> float:
    """Share of the gain of the better of two: the members chosen by preview, above one; over chosen by reward."""
    first, second = np.triu_indices(len(final), 1)
    by_preview = np.sign(preview[first] - preview[second]) * (final[first] - final[second]) / 2
    by_reward = np.abs(final[first] - final[second]) / 2
    return float(by_preview.mean() / by_reward.mean())


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """95 % of the mean, by bootstrap over the groups."""
    array, random = np.asarray(values), np.random.default_rng(seed)
    means = array[random.integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def draw_groups(policy: Policy, prompts: Sequence[Prompt], config: SyncR1Config) -> list[Rollout]:
    sampling = Sampling(
        num_generations=config.num_generations,
        temperature=config.temperature,
        max_text_tokens=config.max_completion_length,
        cfg_weight=config.cfg_weight,
        seed=config.seed,
    )
    parts = [prompts[i : i + 16] for i in range(0, len(prompts), 16)]
    return [rollout for part in parts for rollout in generate(policy, part, sampling)]


def measure(drawn: Drawn, gate: PreviewGate, ways: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each fraction and way, and one for the finished drawing judged as a preview is."""
    finals = drawn.rewards.view(-1, drawn.group).double().numpy()
    plain: dict[int, list[float]] = {}
    prompts, texts = [r.prompt for r in drawn.rollouts], [r.text for r in drawn.rollouts]
    rows = []

    def row(fraction: float, k: int, way: str, pictures: Callable[[], Tensor]) -> None:
        start = time.perf_counter()
        images = pictures()
        seconds = (time.perf_counter() - start) / len(images)
        previews = gate.score(prompts, texts, images).view(-1, drawn.group).double().numpy()
        found: dict[str, Any] = {"fraction": fraction, "tokens": k, "completion": way}
        for name, function in (("pearson", pearson), ("spearman", spearman), ("best_of_two", best_of_two)):
            values = group_values(previews, finals, function)
            found[name], found[f"{name}_95"] = float(np.mean(values)), interval(values)
            found["groups"], found["drawings"] = len(values), len(values) * drawn.group
        if way == "repeat":
            plain[k] = values
        elif k in plain:
            gains = [mine - theirs for mine, theirs in zip(values, plain[k], strict=True)]
            found["gain"], found["gain_95"] = float(np.mean(gains)), interval(gains)
        rows.append(found | {"milliseconds_per_image": 1e3 * seconds})

    N = drawn.tokens.shape[1]
    forced = drawn.policy.forced_image_tokens()
    for fraction in FRACTIONS:
        gate.fraction = fraction
        k = preview_length(gate, N, forced)
        for way in ways:
            row(fraction, k, way, lambda k=k, way=way: completed(drawn, k, way))  # type: ignore[misc]
    row(1.0, N, "finished", lambda: drawn.policy.draw(drawn.tokens))
    return rows


def run(config: SyncR1Config, num_prompts: int, ways: Sequence[str]) -> list[dict[str, Any]]:
    policy = load_policy(str(prepare_model(config))).eval()
    prompts = [p for p in load_training_prompts(prepare_data(config)) if p.rewarded]
    rewards = build_reward_set(config, policy, prompts)
    gate = build_preview(config, rewards)
    assert gate is not None, "the run's rewards look at no image"
    drawing = [prompt for prompt in prompts if "image" in prompt.segments]
    chosen = [drawing[i] for i in np.random.default_rng(config.seed).permutation(len(drawing))[:num_prompts]]
    rollouts = draw_groups(policy, chosen, config)
    tokens = torch.stack([next(s.tokens for s in r.segments if s.kind == "image") for r in rollouts])
    totals = combine(score(rollouts, rewards.functions).values, rewards.weight_tensor())
    with torch.no_grad():
        return measure(Drawn(policy, rollouts, tokens, totals, config.num_generations), gate, ways)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        low, high = row[f"{name}_95"]
        return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"

    lines = ["| drawn | completion | Pearson | Spearman | best of two | gain | ms an image |", "|" + "---|" * 7]
    for row in rows:
        cells = [cell(row, name) for name in ("pearson", "spearman", "best_of_two", "gain")]
        drawn = f"{row['fraction']:.3g} ({row['tokens']})"
        lines.append(f"| {drawn} | {row['completion']} | {' | '.join(cells)} | {row['milliseconds_per_image']:.2f} |")
    return "\n".join([*lines, "", f"{rows[-1]['groups']} groups, {rows[-1]['drawings']} drawings."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; none: the embedded base")
    parser.add_argument("--data", type=Path, help="a UnifyBench++ folder; none: the embedded world")
    parser.add_argument("--name", default="base", help="of these rows in the results")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="*", default=[*WAYS, PAINTED], choices=[*WAYS, PAINTED])
    parser.add_argument("--quick", action="store_true", help="few drawings")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    config = SyncR1Config(model=given.model, data=given.data, num_generations=given.members, seed=given.seed)
    rows = run(config, 6 if given.quick else given.prompts, given.ways)
    known = json.loads(given.out.read_text()) if given.out.is_file() else {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps(known | {given.name: {"rows": rows, "environment": environment()}}, indent=1) + "\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
