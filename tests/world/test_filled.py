"""The tiny Show-o: its image tokenizer, what it is taught, and what it is after a little teaching."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from made import kept_folder, made_once

from syncr1.engine.errors import ConfigError
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.records import Rollout
from syncr1.engine.world import embedded
from syncr1.engine.world.attributes import CONCEPTS, LOOKS
from syncr1.engine.world.base_model import BaseSettings, NoisyTeacher
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.digits.digits_base import DigitsBaseSettings, NoisyWriter
from syncr1.engine.world.filled import sign_vq
from syncr1.engine.world.filled.filled_bases import photo_of, train_filled_base, untrained, untrained_digits
from syncr1.engine.world.filled.filled_lessons import FilledLessons
from syncr1.engine.world.supervised import supervised_loss
from syncr1.engine.world.texts import VOCABULARY
from syncr1.engine.world.worlds import WORLDS

FEW = BaseSettings(steps=12, batch=24, photo_pool=60)


@pytest.fixture(scope="module")
def policy() -> ShowOPolicy:
    return untrained(0)


@pytest.fixture(scope="module")
def teacher(policy: ShowOPolicy) -> NoisyTeacher:
    return NoisyTeacher(cast(Any, policy), replace(FEW, drop_condition=0.0))


@pytest.fixture
def taught(policy: ShowOPolicy, teacher: NoisyTeacher) -> FilledLessons:
    return FilledLessons(policy, teacher.batch, drop_condition=0.0, seed=0, request=photo_of)


def test_shipped_tokenizer_keeps_what_pictures_show() -> None:
    """Read by the very grader that gives rewards; different looks have different codes."""
    vq, table = sign_vq.load_sign_vq(), AttributeChecker.raw_table()
    decoded = sign_vq.round_trip(vq, table)
    assert -10 * (decoded - table).square().mean().log10() > 18
    assert AttributeChecker(decoded).score(decoded, LOOKS).mean(0).min() > 0.99
    assert AttributeChecker(table).score(decoded, LOOKS).mean(0).min() > 0.9
    assert len(vq.encode(table * 2 - 1).unique(dim=0)) >= len(LOOKS) - 4
    sizes = sum(path.stat().st_size for path in sign_vq.FOLDER.glob("*.safetensors"))
    assert sizes < 1.5e6 and not any(parameter.requires_grad for parameter in vq.parameters())


def test_sign_vq_is_read_as_it_was_saved(tmp_path: Path) -> None:
    vq = sign_vq.load_sign_vq()
    sign_vq.save_sign_vq(vq, tmp_path)
    back = sign_vq.load_sign_vq(tmp_path)
    assert back.config == vq.config
    assert all(torch.equal(a, b) for a, b in zip(vq.state_dict().values(), back.state_dict().values(), strict=True))


def test_words_are_tokens_wherever_a_sentence_puts_them(policy: ShowOPolicy) -> None:
    for word in VOCABULARY:
        if word.isalpha():
            assert policy.encode(f"draw {word}").numel() == 2, word
            assert policy.encode(f"USER: \n{word}").numel() == policy.encode("USER: \n").numel() + 1, word
    assert policy.encode("draw <bobo> at it").numel() == 4
    assert policy.decode_text(policy.text_tokens("round red crown")) == "round red crown"
    strange = "Ärger 漢字 🐢"
    assert policy.decode_text(policy.encode(strange)) == strange


def test_a_lesson_is_drawn_behind_what_a_rollout_would_draw_it_behind(
    policy: ShowOPolicy, taught: FilledLessons
) -> None:
    kinds: set[tuple[bool, ...]] = set()
    for rollout in [rollout for _ in range(3) for rollout in taught.batch()]:
        kinds.add(tuple(segment.kind == "image" for segment in rollout.segments))
        last = rollout.segments[-1]
        if last.kind == "text":
            assert last.order is None
            continue
        assert last.order is not None and 1 <= int((last.order == 0).sum()) <= policy.num_image_tokens
        assert set(last.order.tolist()) <= {-1, 0}
        if len(rollout.segments) == 1:
            words = rollout.prompt.text
            assert not last.lead.numel() and torch.equal(
                rollout.prompt_tokens, policy.drawing_tokens(rollout.prompt, words)
            )
        else:
            text = policy.decode_text(rollout.segments[0].tokens)
            requests = [f"A photo of <{concept.name}>." for concept in CONCEPTS]
            if rollout.prompt.task == "personal_t2i":
                requests = [rollout.prompt.text]
            asked = [policy.drawing_tokens(rollout.prompt, f"{request} {text}") for request in requests]
            assert sum(torch.equal(last.lead, ids) for ids in asked) == 1
    assert kinds == {(False,), (True,), (False, True)}


def test_dropped_words_leave_the_free_prompt(policy: ShowOPolicy, taught: FilledLessons) -> None:
    taught.drop_condition = 1.0
    rollouts = [rollout for rollout in taught.batch() if rollout.segments[-1].kind == "image"]
    for rollout in rollouts:
        last = rollout.segments[-1]
        behind = last.lead if len(rollout.segments) > 1 else rollout.prompt_tokens
        assert torch.equal(behind, policy.unconditional_tokens())


def test_masks_follow_the_cosine(policy: ShowOPolicy, taught: FilledLessons) -> None:
    """E[cos(pi/2 t)] = 2/pi of the places."""
    image = next(r.segments[-1] for r in taught.batch() if r.segments[-1].kind == "image")
    masked = [int((order == 0).sum()) for _ in range(2000) if (order := taught._masked(image).order) is not None]
    assert abs(np.mean(masked) / policy.num_image_tokens - 2 / np.pi) < 0.02
    assert min(masked) == 1 and max(masked) == policy.num_image_tokens


def test_masked_places_alone_are_learnt_and_codes_are_learnt_by_looking(
    policy: ShowOPolicy, taught: FilledLessons
) -> None:
    rollouts = taught.batch()
    seen = [rollout for rollout in rollouts if rollout.prompt_image is not None and len(rollout.segments) == 1]
    table = policy.model.get_input_embeddings().weight
    loss = supervised_loss(PolicyForward(policy, Objective()), seen)
    (grad,) = torch.autograd.grad(loss, table)
    assert bool(grad[policy.model.config.text_rows : -1].any()), "codes of photos"

    drawn = next(rollout for rollout in rollouts if len(rollout.segments) == 1 and _half_masked(rollout))
    (image,) = drawn.segments
    assert image.order is not None
    batch = pack(policy, [drawn], torch.zeros(1, 2), torch.ones(1, dtype=torch.bool), num_generations=1, max_tokens=99)[
        0
    ]
    assert torch.equal(batch.tokens, image.tokens[image.order == 0]) and bool(batch.loss_mask.all())


def _half_masked(rollout: Rollout) -> bool:
    order = rollout.segments[-1].order
    return order is not None and 4 < int((order == 0).sum()) < 12


def test_digits_are_asked_for_by_question_and_answer() -> None:
    policy = untrained_digits(0)
    writer = NoisyWriter(cast(Any, policy), DigitsBaseSettings(item_pool=60, hands=1, drop_condition=0.0))
    taught = FilledLessons(policy, writer.batch, drop_condition=0.0, seed=0)
    chained = [rollout for rollout in taught.batch() if len(rollout.segments) == 2]
    assert chained
    for rollout in chained:
        text = policy.decode_text(rollout.segments[0].tokens)
        asked = policy.drawing_tokens(rollout.prompt, f"{rollout.prompt.text} {text}")
        assert torch.equal(rollout.segments[1].lead, asked)


def short_filled_base() -> Path:
    def make(folder: Path) -> None:
        losses: list[float] = []
        train_filled_base(FEW, lambda step, loss: losses.append(loss)).save(folder)
        folder.with_suffix(".json").write_text(json.dumps(losses))

    return made_once(kept_folder(), "short_filled_base", make)


def test_a_little_teaching_helps_and_is_saved() -> None:
    folder = short_filled_base()
    losses = json.loads(folder.with_suffix(".json").read_text())
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    back = ShowOPolicy.from_pretrained(folder)
    assert back.num_image_tokens == 16 and back.image_size == 32


@pytest.mark.parametrize("world", ["rendered", "digits"])
def test_both_kinds_start_from_a_model_of_the_world(world: str) -> None:
    for name, base in WORLDS[world].bases.items():
        policy = base.untrained()
        assert (policy.decoding_order == "masked") == (name == "show_o")
        trained = sum(p.numel() for n, p in policy.named_parameters() if "vqmodel" not in n)
        assert 5e5 < trained < 2.5e6


def test_a_show_o_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = importlib.import_module("syncr1.engine.methods.sync_r1_parts")
    for name in ("tiny_base", "filled_base"):
        monkeypatch.setattr(f"syncr1.engine.world.worlds.{name}", lambda *_, name=name: tmp_path / name)
    assert parts.prepare_model(SyncR1Config()) == tmp_path / "tiny_base"
    with pytest.raises(ConfigError, match="policy: expected none beside model"):
        SyncR1Config(policy="show_o", model="org/name")


def test_what_it_is_made_with_names_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And Janus's bases are not made anew where Show-o's change."""
    before = embedded.filled_fingerprint("x"), embedded.fingerprint("x"), embedded.digits_fingerprint("x")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if path.name == "filled_lessons.py" else read(path))
    after = embedded.filled_fingerprint("x"), embedded.fingerprint("x"), embedded.digits_fingerprint("x")
    assert before[0] != after[0] and before[1:] == after[1:]
