"""The benchmarks of rollouts and steps compare like with like: same prompts, same tokens, same gradients."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import own_process_group
from text_models import own_cache
from torch import Tensor

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.records import Rollout
from syncr1.engine.rollout.sampler import RolloutEngine
from syncr1.engine.rollout.sampling import Sampling
from syncr1.kernels.api import group_advantages

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
try:
    import comparison
    import interleaved
    import machine
    import models
    import rates
    import released
    import rollout
    import sides as sides_module
    import step
    import training
finally:
    sys.path.remove(str(BENCH))

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
WORK = sides_module.QUICK
G, R, N = WORK.group, WORK.text_tokens, models.QUICK.image_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("photos")


@pytest.fixture
def sides(folder: Path) -> sides_module.Sides:
    """Two questions and two drawings, with weights far from uniform distributions."""
    made = sides_module.Sides(models.QUICK, WORK, folder, 2, 2)
    for model in (made.policy.model, made.peer):
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
            model.model.generation_head.vision_head.weight.mul_(30)
    return made


# The model and the prompts --------------------------------------------------------------------------------------------


def test_prompts_have_exact_lengths_and_weights_follow_the_seed(sides: sides_module.Sides) -> None:
    assert sides.ids(sides.questions).shape == (2, models.QUICK.photo_tokens + WORK.prompt_tokens)
    drawings = sides.ids(sides.drawings)
    assert drawings.shape == (2, WORK.prompt_tokens) and bool((drawings[:, -1] == sides.policy.image_start).all())
    assert not sides.policy.end_tokens and sides.policy.tokenizer.eos_token_id in sides.forbidden
    weights = [models.build_model(models.QUICK, seed)[0].lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    policy = sides.policy.model
    assert policy.lm_head.weight.data_ptr() != policy.get_input_embeddings().weight.data_ptr()
    assert policy.lm_head.weight.data_ptr() != sides.peer.lm_head.weight.data_ptr(), "the peer trains its own copy"
    assert policy.model.vqmodel.decode(torch.zeros(1, N, dtype=torch.long)).shape[-1] == 8


def test_both_sides_train_what_ulm_r1_trains(sides: sides_module.Sides) -> None:
    for model in (sides.policy.model, sides.peer):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if "language_model" in n or n.startswith("lm_head")}


def test_rewards_of_both_sides_are_the_same() -> None:
    tokens, images = torch.randint(0, 50, (4, 9)), torch.rand(4, 3, 8, 8)
    ours = sides_module.our_text_reward(completion_ids=tokens.tolist())
    torch.testing.assert_close(torch.tensor(ours), sides_module.PEER_REWARDS.text(tokens))
    ours = sides_module.our_image_reward(images=[*images, None])
    torch.testing.assert_close(torch.tensor(ours[:4]), sides_module.PEER_REWARDS.image(images))
    assert ours[4] is None and sides_module.our_text_reward(completion_ids=[[]]) == [None]


# The peer's rollouts --------------------------------------------------------------------------------------------------


def test_text_rollout_has_the_right_shape_tokens_and_cache(sides: sides_module.Sides) -> None:
    ids, pixels, made = sides.ids(sides.questions), sides.pixels(), []
    for encode in ("per prompt", "per sample"):
        torch.manual_seed(3)
        made.append(released.hf_text_rollout(sides.peer, ids, pixels, G, R, forbidden=sides.forbidden, encode=encode))
    for one in made:
        assert one.tokens.shape == (2 * G, R) and one.group_size == G
        assert not set(one.tokens.flatten().tolist()) & set(sides.forbidden)
        assert one.kv_bytes == 2 * G * (ids.shape[1] + R - 1) * sides.kv_token_bytes
        assert torch.equal(one.rows[G], torch.cat([ids[1], one.tokens[G]]))
    assert torch.equal(made[0].tokens, made[1].tokens), "encoding the photo once or G times is the same answer"
    torch.manual_seed(3)
    other = released.hf_text_rollout(
        sides.peer, ids, pixels.flip(0), G, R, forbidden=sides.forbidden, encode="per prompt"
    )
    assert not torch.equal(other.tokens, made[0].tokens), "the photos matter"
    pairs = list(made[0].pairs())
    assert [pair.prompt.shape[0] for pair in pairs] == [1, 1] and torch.equal(pairs[1].tokens, made[0].tokens[G:])


def test_image_loop_draws_what_transformers_draws(sides: sides_module.Sides) -> None:
    """So peaked a head leaves nothing to chance; transformers' greedy `generate` doubles the batch and masks it."""
    with torch.no_grad():
        sides.peer.model.generation_head.vision_head.weight.mul_(1e5)
        sides.peer.model.generation_embeddings.weight.mul_(100)
    ids = sides.ids(sides.drawings)
    made = released.hf_image_rollout(sides.peer, ids, G, N, 5.0, pad_id=sides.pad_id)
    assert made.tokens.shape == (2 * G, N)
    assert made.kv_bytes == 2 * 2 * G * (ids.shape[1] + N - 1) * sides.kv_token_bytes
    expected = sides.peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        do_sample=False,
        guidance_scale=5,
        **own_cache(sides.peer, ids.shape[1] + N),
    )
    assert torch.equal(made.tokens, expected.repeat_interleave(G, 0))
    assert made.tokens.unique().numel() > 4
    unguided = released.hf_image_rollout(sides.peer, ids, G, N, 1.0, pad_id=sides.pad_id)
    assert not torch.equal(unguided.tokens, made.tokens)


# Both sides' updates --------------------------------------------------------------------------------------------------


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _assert_same_gradients(sides: sides_module.Sides) -> None:
    ours, theirs = _gradients(sides.policy.model), _gradients(sides.peer)
    assert set(ours) == set(theirs) and len(ours) == 9 * models.QUICK.layers + 3
    assert max(_distance(ours[name], theirs[name]) for name in ours) < 1e-4
    assert all(float(grad.norm()) > 0 for grad in ours.values())


def _as_sampled(sides: sides_module.Sides, rollouts: list[Rollout], image: bool) -> released.Sampled:
    tokens = torch.stack([r.segments[0].tokens for r in rollouts])
    return released.Sampled(sides.ids(sides.drawings if image else sides.questions), tokens, 0)


def test_step_of_the_peer_has_our_gradients_and_our_log_probabilities(sides: sides_module.Sides) -> None:
    sampling = Sampling(num_generations=G, max_text_tokens=R, cfg_weight=WORK.cfg_weight)
    rollouts = RolloutEngine(sides.policy).generate([*sides.questions, *sides.drawings], sampling)
    texts, images = (
        _as_sampled(sides, part, image) for part, image in ((rollouts[: 2 * G], False), (rollouts[2 * G :], True))
    )
    shared = torch.rand(2 * G)
    advantages = released.group_normalised(shared, G)
    offsets = torch.arange(0, 2 * G + 1, G, dtype=torch.int32)
    torch.testing.assert_close(advantages, group_advantages(shared, offsets))

    forbidden, pixels = torch.tensor(sides.forbidden), sides.pixels()
    with torch.no_grad():
        photos = pixels.repeat_interleave(G, 0)
        text_logp = released.text_logp(sides.peer, texts.rows, photos, R, forbidden=forbidden)
        whole = released.text_logp(sides.peer, texts.rows, photos, R, logits="every position", forbidden=forbidden)
        prompts = images.prompt.repeat_interleave(G, 0)
        image_logp = released.image_logp(sides.peer, prompts, images.tokens)
    torch.testing.assert_close(text_logp, whole)
    for part, logp in ((rollouts[: 2 * G], text_logp), (rollouts[2 * G :], image_logp)):
        sampled = torch.stack([r.segments[0].logp for r in part])
        assert float((sampled - logp).abs().max()) < 1e-3
        assert float(sampled.std()) > 0.3, "a shift by one would show"

    trainer = released.ReleasedTrainer(
        sides.peer,
        sides_module.PEER_REWARDS,
        num_generations=G,
        max_new_tokens=R,
        cfg_weight=WORK.cfg_weight,
        forbidden=sides.forbidden,
        pad_id=sides.pad_id,
    )
    their_loss = trainer.backward(texts, images, pixels, advantages, forbidden=forbidden)
    ours = (
        group_advantages(torch.cat([shared, shared]), torch.arange(0, 4 * G + 1, G))[:, None].expand(-1, 2).contiguous()
    )
    (batch,) = pack(
        sides.policy, rollouts, ours, torch.ones(4 * G, dtype=torch.bool), num_generations=G, max_tokens=1 << 30
    )
    our_loss = training.our_update(PolicyForward(sides.policy, Objective()), batch)
    assert our_loss == pytest.approx(their_loss, abs=1e-5)
    _assert_same_gradients(sides)


@pytest.mark.parametrize("logits", training.VARIANTS.values())
def test_padded_rows_have_our_gradients(sides: sides_module.Sides, logits: released.Logits) -> None:
    rollouts = training.trajectories(sides, [[R] * G] * 2)
    rewards = training.rewards_of(rollouts)
    batch = training.packed(sides, rollouts, rewards)
    assert batch.num_tokens < batch.num_unshared_tokens
    ours = training.our_update(PolicyForward(sides.policy, Objective()), batch)
    sampled, photos = training.as_sampled(sides, rollouts)
    assert sampled.rows.numel() == batch.num_unshared_tokens
    theirs = released.padded_update(
        sides.peer, sampled, photos, rewards, logits=logits, forbidden=torch.tensor(sides.forbidden)
    )
    assert ours == pytest.approx(theirs, abs=1e-5)
    _assert_same_gradients(sides)


@pytest.mark.parametrize("pair_by_pair", [False, True])
def test_released_step_moves_the_weights_it_trains(sides: sides_module.Sides, pair_by_pair: bool) -> None:
    trainer = released.ReleasedTrainer(
        sides.peer,
        sides_module.PEER_REWARDS,
        num_generations=G,
        max_new_tokens=R,
        cfg_weight=WORK.cfg_weight,
        forbidden=sides.forbidden,
        pad_id=sides.pad_id,
        pair_by_pair=pair_by_pair,
        learning_rate=1e-3,
    )
    ids = sides.ids(sides.questions), sides.pixels(), sides.ids(sides.drawings)
    texts, images = trainer.rollouts(*ids, released.Stopwatch())
    assert texts.tokens.shape == (2 * G, R) and images.tokens.shape == (2 * G, N)
    assert torch.equal(texts.prompt, ids[0]) and torch.equal(images.prompt, ids[2])
    alone = G * (ids[0].shape[1] + R - 1) * sides.kv_token_bytes
    assert texts.kv_bytes == alone * (1 if pair_by_pair else 2)
    before = {name: p.detach().clone() for name, p in sides.peer.named_parameters()}
    trainer.warm_up(*ids[:2])
    seconds = trainer.step(*ids)
    stages = {"prefill", "text", "image", "draw", "reward", "forward", "backward", "optimizer"}
    assert set(seconds) == stages and min(seconds.values()) > 0
    for name, parameter in sides.peer.named_parameters():
        assert bool(parameter.isfinite().all())
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


# The tables -----------------------------------------------------------------------------------------------------------


def test_first_call_is_the_short_one_and_shares_are_ours_over_theirs() -> None:
    asked: list[tuple[str, bool]] = []

    def side(name: str, kv: float) -> comparison.Provider:
        def work(short: bool) -> comparison.Told:
            asked.append((name, short))
            return comparison.Told({"a": kv, "b": 1.0}, {"kv_bytes": kv})

        return comparison.Provider(name, work)

    def goals(found: comparison.Comparison) -> list[comparison.Goal]:
        return [
            comparison.Goal("kv", found.number_share("kv_bytes", "theirs"), 0.25, True),
            comparison.Goal("memory", found.memory_share("theirs"), 0.2, True, "y"),
            comparison.Goal("absent", found.times_slower("nobody"), 2.0),
        ]

    case = comparison.Case("t", "shape", [side("ours", 2.0), side("theirs", 8.0)], goals, lambda: {"x": 1.0, "y": 2.0})
    budget = interleaved.Budget(seconds=0, min_rounds=2, sample_seconds=0.0)
    found = comparison.compare(case, "cpu", budget, lambda p: {"bytes": 3 if p.name == "ours" else 10})
    assert asked == [("ours", True), ("theirs", True), *[("ours", False), ("theirs", False)] * 2]
    rows = {row["provider"]: row for row in found.rows()}
    assert rows["theirs"]["stages"] == {"a": 8.0, "b": 1.0} and rows["ours"]["peak_extra_bytes"] == 3
    assert rows["ours"]["of_floor"] == pytest.approx(3.0 / rows["ours"]["median"])
    lines = [goal.line(case.shape) for goal in goals(found)]
    assert [(line["measured"], line["met"]) for line in lines] == [(0.25, True), (0.3, False), (None, None)]
    assert lines[1]["goal"] == "memory (shape): <= 0.2 y" and "| b | 1 s | 1 s |" in found.show()


def test_floor_counts_every_weight_once(sides: sides_module.Sides) -> None:
    size, model = models.QUICK, sides.policy.model
    weights = rates.linears(model.model.language_model)
    assert len(weights) == 7 * size.layers
    assert rates.num_bytes(weights) == size.layers * 4 * (4 * size.hidden**2 + 3 * size.hidden * size.mlp)
    found = rates.rollout_floor(
        model,
        device="cpu",
        num_photos=2,
        photo_rows=16,
        prompt_tokens=56,
        rows=8,
        steps=5,
        head=[model.lm_head.weight],
        kv_read_bytes=1e6,
    )
    assert set(found) == {"photos", "prompts", "steps", "keys and values"} and min(found.values()) > 0
    assert all(map(math.isfinite, found.values()))


def test_ragged_batches_are_packed_without_padding(sides: sides_module.Sides) -> None:
    shares = training.real_share(sides)
    assert shares["ours"] == 1.0 and 0.5 < shares["padded"] < 1.0


@pytest.fixture
def process_group() -> Iterator[None]:
    with own_process_group():
        yield


def _check(content: dict, path: Path, cases: tuple[str, ...], suffix: str) -> None:
    assert tuple(content["cases"]) == cases
    assert all(case["rows"] and not case["skipped"] for case in content["cases"].values()), content["cases"]
    assert all(line["measured"] is None or line["measured"] > 0 for line in content["goals"])
    written = json.loads((path / f"{machine.slug('cpu')}-{suffix}.json").read_text())
    assert written["environment"]["torch"] and set(written["cases"]) == set(cases)


def test_quick_rollouts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = rollout.main(["--quick", "--device", "cpu", "--no_memory", "--out", str(tmp_path)])
    _check(content, tmp_path, rollout.CASES, "rollout")
    for name in rollout.CASES:
        rows = content["cases"][name]["rows"]
        assert len({row["tokens"] for row in rows}) == 1, "every side samples exactly as many tokens"
        assert all(row["kv_bytes"] > 0 and row["of_floor"] > 0 for row in rows)
    assert "| goal | measured | met |" in capsys.readouterr().out
    rollout.main(["--quick", "--device", "cpu", "--probe", "drawing/ours"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] >= 0
    with pytest.raises(SystemExit):
        rollout.main(["--only", "no_such_case"])


def test_quick_steps_run(tmp_path: Path, process_group: None) -> None:
    content = step.main(["--quick", "--device", "cpu", "--no_memory", "--out", str(tmp_path)])
    _check(content, tmp_path, step.CASES, "step")
    losses = [row["loss"] for row in content["cases"]["training"]["rows"]]
    assert max(losses) - min(losses) < 1e-5
    rows = {row["provider"]: row for row in content["cases"]["step"]["rows"]}
    assert rows["released"]["tokens"] == rows["ours, no DGS"]["tokens"]
    assert rows["ours, no DGS"]["kept"] == 1.0 > rows["ours, DGS"]["kept"]
    assert rows["ours, no DGS"]["positions"] < rows["released"]["positions"]
