"""The shipped image tokenizer and the judge: attributes survive sixteen tokens, and files stay small."""

from __future__ import annotations

import pytest
import torch

import syncr1.engine.compat  # noqa: F401  # before transformers, which imports torchvision
from syncr1.engine.world import vq as world_vq
from syncr1.engine.world.attributes import ATTRIBUTES, HELD_OUT_LOOKS, LOOKS
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.judge_cnn import judge_hits, train_judge
from syncr1.engine.world.render import canonical_table

JanusVQVAE = pytest.importorskip("transformers.models.janus.modeling_janus").JanusVQVAE


@pytest.fixture(scope="module")
def vq():  # transformers' class is imported late
    return world_vq.load_vq()


@pytest.fixture(scope="module")
def decoded(vq) -> torch.Tensor:
    return world_vq.round_trip(vq, AttributeChecker.raw_table())


def test_files_are_small() -> None:
    assert (world_vq.FOLDER / world_vq.WEIGHTS).stat().st_size <= 3_000_000
    assert (world_vq.FOLDER / world_vq.CONFIG).stat().st_size <= 2_000


def test_tokenizer_is_frozen_with_unit_codebook_rows(vq) -> None:
    assert not vq.training and not any(parameter.requires_grad for parameter in vq.parameters())
    norms = vq.quantize.embedding.weight.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)


def test_every_attribute_survives_the_round_trip(decoded: torch.Tensor) -> None:
    hits = AttributeChecker.from_renders().score(decoded, LOOKS)  # read against raw renders: the harder comparison
    held = torch.tensor([look in HELD_OUT_LOOKS for look in LOOKS])
    for part in (held, ~held):
        assert dict(zip(ATTRIBUTES, hits[part].mean(0).tolist(), strict=True)) == pytest.approx(
            dict.fromkeys(ATTRIBUTES, 1.0), abs=0.05
        )
    own = AttributeChecker(decoded).score(decoded, LOOKS)
    assert bool((own == 1).all())  # no two looks share their sixteen tokens


def test_round_trip_is_the_hf_path(vq, decoded: torch.Tensor) -> None:
    pixels = world_vq.to_pixels(canonical_table()[:3])
    ids = world_vq.encode(vq, pixels)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64 and ids.max() < vq.config.num_embeddings
    direct = vq(pixels).decoded_pixel_values.clamp(-1, 1)
    torch.testing.assert_close(direct, world_vq.decode(vq, ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((direct + 1) / 2, decoded[:3], atol=1e-4, rtol=1e-3)


def test_pictures_and_pixels_go_both_ways() -> None:
    table = canonical_table()[:5]
    pixels = world_vq.to_pixels(table)
    assert pixels.shape == (5, 3, 32, 32) and pixels.min() >= -1.0 and pixels.max() <= 1.0
    assert (world_vq.to_pictures(pixels) == table).all()


def test_weights_load_into_a_janus_models_own_tokenizer() -> None:
    fresh = JanusVQVAE(world_vq.vq_config(projection_dim=64, image_token_embed_dim=64))
    world_vq.load_vq_into(fresh)
    pixels = world_vq.to_pixels(canonical_table()[:2])
    assert torch.equal(world_vq.encode(fresh, pixels), world_vq.encode(world_vq.load_vq(), pixels))


def test_judge_reads_round_trips_and_repeats(vq, decoded: torch.Tensor) -> None:
    state = torch.random.get_rng_state()
    judge = train_judge(vq, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert judge_hits(judge, decoded, LOOKS).float().mean(0).min() >= 0.95
    assert judge_hits(judge, AttributeChecker.raw_table(), LOOKS).float().mean(0).min() >= 0.95
    shifted = LOOKS[1:] + LOOKS[:1]
    assert judge_hits(judge, decoded, shifted)[:, ATTRIBUTES.index("place")].float().mean() < 0.1
