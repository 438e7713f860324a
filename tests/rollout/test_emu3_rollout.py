"""Emu3 sampled and trained: the replay, tokens that are not sampled, previews, transformers' own draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import Gate, everything_partitioned, make_prompt, own_process_group, packed, world_photo
from small_emu3 import BOS, EOF, EOI, EOS, FRAME, IMAGE_SIZE, NUM_CODES, PlainEmu3, all_plans, sharp_emu3
from stepping_cases import ReplayedStep, draws_what_eager_steps_draw, static_engines
from torch import Tensor

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import Learner, replay_error
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.pictures import open_picture
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.records import IMAGE, TEXT, Prompt, Rollout
from syncr1.engine.rollout.completion import fill
from syncr1.engine.rollout.preview import preview_length
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling

pytestmark = pytest.mark.slow
REPLAY_TOLERANCE = 1e-4
"""Nats, float32; about 1e-5 is measured."""


@pytest.fixture(scope="module")
def policy() -> Emu3Policy:
    return sharp_emu3()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    return all_plans(world_photo(tmp_path_factory.mktemp("photos"), 3))


def pixels_of(policy: Emu3Policy, prompt: Prompt) -> Tensor | None:
    if not prompt.images:
        return None
    return policy.processor.image_processor(open_picture(prompt.images[0]), return_tensors="pt")["pixel_values"]


def image_segments(rollouts: list[Rollout]) -> list[Tensor]:
    return [segment.tokens for rollout in rollouts for segment in rollout.segments if segment.kind == "image"]


# The replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg_weight", "temperature"), [(1.0, 1.0), (3.0, 0.8)])
@pytest.mark.parametrize("restarts", [False, True])
def test_recorded_log_probabilities_are_the_trainers_and_transformers_own(
    policy: Emu3Policy, prompts: list[Prompt], cfg_weight: float, temperature: float, restarts: bool
) -> None:
    """Sampled, = packed with shared prefixes in training mode, = transformers' forward over text ids, one by one."""
    sampling = Sampling(num_generations=3, cfg_weight=cfg_weight, temperature=temperature, max_text_tokens=8)
    gate = Gate(threshold=None, max_attempts=3) if restarts else None
    rollouts = generate(policy, prompts, sampling, gate)
    forced = policy.forced_image_tokens()
    free = forced < 0
    for tokens in image_segments(rollouts):
        assert tokens[free].max() < NUM_CODES and torch.equal(tokens[~free], forced[~free])
    trainer = PolicyForward(sharp_emu3().train(), Objective(temperature=temperature))
    for shared in (True, False):
        (batch,) = packed(policy, rollouts, 3, share_prefix=shared)
        with torch.no_grad():
            logp = trainer(batch)["logp"]
        assert replay_error(batch, logp) <= REPLAY_TOLERANCE
        images = batch.loss_mask & (batch.modality == IMAGE)
        assert int(images.sum()) == 16 * len(image_segments(rollouts))
        assert (
            batch.sampled_logp[batch.loss_mask].isfinite().all() and batch.sampled_logp[~batch.loss_mask].isnan().all()
        )
    plain = PlainEmu3(policy)
    for rollout in rollouts:
        replayed = plain.replay(
            rollout, pixels_of(policy, rollout.prompt), temperature=temperature, cfg_weight=cfg_weight
        )
        for segment, (logp, mixed) in zip(rollout.segments, replayed, strict=True):
            torch.testing.assert_close(segment.logp, logp, rtol=0, atol=REPLAY_TOLERANCE)
            torch.testing.assert_close(segment.logp_mixed, mixed, rtol=0, atol=REPLAY_TOLERANCE)
            if segment.kind == "image":
                assert not segment.entropy[~free].any() and segment.entropy[free].min() > 0
    if cfg_weight != 1.0:
        gaps = [float((s.logp - s.logp_mixed).abs().max()) for r in rollouts for s in r.segments if s.kind == "image"]
        assert min(gaps) > 0.5, "guidance counts, or the comparison would say little"


def test_codes_anywhere_in_the_vocabulary(prompts: list[Prompt]) -> None:
    """The same where a head must gather its rows."""
    policy = sharp_emu3(scattered=True)
    rollouts = generate(policy, prompts[:4], Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=8))
    (batch,) = packed(policy, rollouts, 2)
    with torch.no_grad():
        assert replay_error(batch, PolicyForward(policy, Objective())(batch)["logp"]) <= REPLAY_TOLERANCE
    plain = PlainEmu3(policy)
    for rollout in rollouts:
        pairs = plain.replay(rollout, pixels_of(policy, rollout.prompt), temperature=1.0, cfg_weight=2.0)
        for segment, (logp, _) in zip(rollout.segments, pairs, strict=True):
            torch.testing.assert_close(segment.logp, logp, rtol=0, atol=REPLAY_TOLERANCE)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_image_is_transformers_own(policy: Emu3Policy, guidance: float) -> None:
    """`Emu3ForConditionalGeneration.generate` under its published constraint draws the same tokens and pixels."""
    prompt = make_prompt("draw the creature", ("image",))
    (ours,) = generate(policy, [prompt], Sampling(num_generations=1, temperature=0.0, cfg_weight=guidance))
    plain = PlainEmu3(policy)
    asks = [
        policy.processor(text=text, return_for_image_generation=True, image_area=IMAGE_SIZE**2, return_tensors="pt")
        for text in (prompt.text, "")
    ]
    ids, start = asks[0]["input_ids"], asks[0]["input_ids"].shape[1]
    ends = policy.tokenizer.convert_tokens_to_ids([EOF, EOI, EOS])

    def allowed(_: int, so_far: Tensor) -> list[int]:
        place = len(so_far) - start
        if place >= 4 * 5:
            return [ends[min(place - 4 * 5, 2)]]
        return [plain.eol] if place % 5 == 4 else plain.code_ids.tolist()

    guided: dict[str, Any] = (
        {} if guidance == 1.0 else {"guidance_scale": guidance, "negative_prompt_ids": asks[1]["input_ids"]}
    )
    with torch.no_grad():
        out = plain.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4 * 5 + 3,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            **guided,
        )
        image = plain.model.decode_image_tokens(image_tokens=out[:, start:], height=4, width=4)[0]
    assert policy._image_ids[ours.segments[0].tokens[FRAME:]].tolist() == out[0, start:-3].tolist()
    torch.testing.assert_close(ours.image, (image * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_the_follow_up_goes_on_from_the_drawn_tokens(policy: Emu3Policy, prompts: list[Prompt]) -> None:
    """EOF, EOI and EOS close the image, which is not shown again; the text behind it is an answer."""
    closing = policy.tokenizer.convert_tokens_to_ids([EOF, EOI, EOS])
    for rollout in generate(policy, prompts[6:], Sampling(num_generations=2, max_text_tokens=8)):
        *_, image, answer = rollout.segments
        assert (image.kind, answer.kind) == ("image", "text") and answer.lead_image is None
        assert answer.lead[:3].tolist() == closing and not policy.image_slots(answer.lead).any()
        assert "USER: " + (rollout.prompt.follow_up or "") in policy.tokenizer.decode(answer.lead)
        assert BOS not in policy.tokenizer.convert_ids_to_tokens(answer.lead.tolist())
        assert rollout.follow_up_text == policy.decode_text(answer.tokens)


# What is not sampled --------------------------------------------------------------------------------------------------


@pytest.fixture
def static(policy: Emu3Policy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RolloutEngine]:
    return static_engines(policy, monkeypatch)


@pytest.mark.parametrize("previewed", [False, True])
def test_static_steps_draw_the_same_and_read_nothing_back(
    policy: Emu3Policy, prompts: list[Prompt], static: Callable[[], RolloutEngine], previewed: bool
) -> None:
    engine = static()
    for step in range(2):
        draws_what_eager_steps_draw(engine, policy, prompts, step, previewed=previewed)
    assert ReplayedStep.watch.num_ops > 1000 and ReplayedStep.watch.found == []


def test_a_preview_counts_what_is_sampled(policy: Emu3Policy) -> None:
    """Half the codes, not half the tokens; at least one code; behind the last code there is nothing to preview."""
    forced = policy.forced_image_tokens()
    lengths = []
    for fraction in (0.001, 0.25, 0.5, 0.97, 0.98, 1.0):
        gate = Gate(threshold=0.5, max_attempts=2, fraction=fraction)
        lengths.append(preview_length(gate, len(forced), forced))
    assert lengths == [FRAME + 1, FRAME + 4, FRAME + 9, 0, 0, 0]
    gate = Gate(threshold=0.5, max_attempts=2, fraction=0.9)
    assert preview_length(gate, len(forced), forced) == FRAME + 17 and preview_length(gate, 16) == 14


def test_a_preview_keeps_what_is_forced_in_place(policy: Emu3Policy) -> None:
    forced, codes = policy.forced_image_tokens(), torch.arange(7)
    whole = forced.clone()
    whole[forced < 0] = fill(codes[None], 16)[0]
    drawn = torch.cat([forced[:FRAME], codes[:4], forced[FRAME + 4 : FRAME + 5], codes[4:]])
    assert fill(drawn[None], len(forced), forced)[0].tolist() == whole.tolist()
    assert fill(whole[None], len(forced), forced)[0].tolist() == whole.tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.7])
def test_dropped_members_stop_at_the_preview(policy: Emu3Policy, fraction: float) -> None:
    """Also in the middle of a row and at its end; they are not trained on beyond, and their picture is whole."""
    prompt = make_prompt("draw it", ("text", "image"))
    sampling = Sampling(num_generations=4, cfg_weight=2.0, max_text_tokens=4)
    forced = policy.forced_image_tokens()
    gate = Gate(threshold=2.0, max_attempts=2, min_keep=2, fraction=fraction)
    length = preview_length(gate, len(forced), forced)
    rollouts = generate(policy, [prompt], sampling, gate)
    assert sum(rollout.dropped for rollout in rollouts) == 2
    for rollout in rollouts:
        tokens = rollout.segments[1].tokens
        assert len(tokens) == (length if rollout.dropped else len(forced))
        assert rollout.image is not None and rollout.image.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        torch.testing.assert_close(rollout.image, policy.draw(fill(tokens[None], len(forced), forced))[0])
    (batch,) = packed(policy, rollouts, 4)
    with torch.no_grad():
        assert replay_error(batch, PolicyForward(policy, Objective())(batch)["logp"]) <= REPLAY_TOLERANCE
    expected = 2 * 16 + 2 * int((forced[:length] < 0).sum())
    assert int((batch.loss_mask & (batch.modality == IMAGE)).sum()) == expected


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _process_group() -> Iterator[None]:
    with own_process_group(), everything_partitioned():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_update_learns_text_and_images_and_leaves_the_eye_alone(
    policy: Emu3Policy, prompts: list[Prompt], _process_group: None
) -> None:
    """Two AdamW steps: decoder and head change, codes and words both; the VQ model, its statistics too, does not.
    Under ZeRO-3, where a part of a weight is asked for outside its module, the same comes out."""
    before = policy.state_dict()
    rollouts = generate(policy, prompts, Sampling(num_generations=3, cfg_weight=2.0, max_text_tokens=8))
    batches = packed(policy, rollouts, 3, 200)
    assert len(batches) > 1
    states = []
    for stage in (0, 3):
        learner = Learner(sharp_emu3(), Objective(beta=0.1), LearnerSettings(learning_rate=1e-3, zero_stage=stage))
        first = learner.update(learner.score(batches))
        assert first["rollout/replay_logp_max_abs"] <= REPLAY_TOLERANCE and first["grad_norm"] > 0
        assert first["kl/text"] <= 1e-8 and first["kl/image"] <= 1e-8
        second = learner.update(learner.score(batches))
        assert second["kl/text"] > 1e-6 and second["kl/image"] > 1e-6
        with learner.sampling() as trained:
            states.append({name: tensor.clone() for name, tensor in trained.state_dict().items()})
    after, partitioned = states
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) is ("vqmodel" in name), name
        torch.testing.assert_close(partitioned[name], tensor, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
    moved = (after["model.lm_head.weight"] - before["model.lm_head.weight"]).abs().amax(1)
    plain = PlainEmu3(policy)
    words = torch.cat([s.tokens for r in rollouts for s in r.segments if s.kind == "text"])
    assert moved[plain.code_ids].min() > 0 and moved[words].min() > 0
    # Ends of rows are read and never predicted: their embedding learns, their row of the head does not.
    assert moved[plain.eol] == 0
    name = "model.model.text_model.embed_tokens.weight"
    assert (after[name] - before[name])[plain.eol].abs().max() > 0


def test_the_loss_does_not_see_what_is_forced(policy: Emu3Policy, prompts: list[Prompt]) -> None:
    """The token counts that a loss is divided by are those of what was sampled."""
    rollouts = generate(policy, [prompts[1]], Sampling(num_generations=2))
    (batch,) = packed(policy, rollouts, 2)
    assert int(batch.loss_mask.sum()) == 2 * 16 and int((batch.modality == IMAGE).sum()) == 2 * 24
    changed = replace(batch, tokens=batch.tokens.where(batch.loss_mask | (batch.modality == TEXT), NUM_CODES))
    forward = PolicyForward(policy, Objective())
    with torch.no_grad():
        a, b = (forward(x)["logp"] for x in (batch, changed))
    assert not a[~batch.loss_mask].any() and (a - b).abs().max() > 0.1, "but later tokens do"
