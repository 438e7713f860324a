"""The shipped image tokenizer and the judge: attributes survive sixteen tokens, and files stay small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import syncr1.engine.compat  # noqa: F401  # before transformers, which imports torchvision

import numpy as np
import pytest
import torch

from syncr1.engine.world import vq as world_vq
from syncr1.engine.world.attributes import ATTRIBUTES, HELD_OUT_LOOKS, LOOKS, TRAIN_LOOKS
from syncr1.engine.world.checker import AttributeChecker
from syncr1.engine.world.filled.tokenizer_pictures import Rendered, neighbour
from syncr1.engine.world.judge_cnn import train_judge
from syncr1.engine.world.render import canonical_table

if TYPE_CHECKING:
    from transformers.models.janus.modeling_janus import JanusVQVAE


@pytest.fixture(scope="module")
def vq() -> JanusVQVAE:
    return world_vq.load_vq()


@pytest.fixture(scope="module")
def decoded(vq: JanusVQVAE) -> torch.Tensor:
    return world_vq.round_trip(vq, AttributeChecker.raw_table())


def test_files_are_small() -> None:
    assert (world_vq.FOLDER / world_vq.WEIGHTS).stat().st_size <= 3_000_000
    assert (world_vq.FOLDER / world_vq.CONFIG).stat().st_size <= 2_000


def test_tokenizer_is_frozen_with_unit_codebook_rows(vq: JanusVQVAE) -> None:
    assert not vq.training and not any(parameter.requires_grad for parameter in vq.parameters())
    norms = vq.quantize.embedding.weight.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)


def test_every_attribute_survives_the_round_trip(decoded: torch.Tensor) -> None:
    # Read against raw renders: the harder comparison.
    hits = AttributeChecker(AttributeChecker.raw_table()).score(decoded, LOOKS)
    held = torch.tensor([look in HELD_OUT_LOOKS for look in LOOKS])
    for part in (held, ~held):
        assert dict(zip(ATTRIBUTES, hits[part].mean(0).tolist(), strict=True)) == pytest.approx(
            dict.fromkeys(ATTRIBUTES, 1.0), abs=0.05
        )
    own = AttributeChecker(decoded).score(decoded, LOOKS)
    assert bool((own == 1).all())  # no two looks share their sixteen tokens


def test_round_trip_is_the_hf_path(vq: JanusVQVAE, decoded: torch.Tensor) -> None:
    pixels = world_vq.to_pixels(canonical_table()[:3])
    ids = world_vq.encode(vq, pixels)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64 and ids.max() < vq.config.num_embeddings
    direct = vq(pixels).decoded_pixel_values.clamp(-1, 1)
    torch.testing.assert_close(direct, world_vq.decode(vq, ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((direct + 1) / 2, decoded[:3], atol=1e-4, rtol=1e-3)


def test_pixels_are_the_pictures() -> None:
    table = canonical_table()[:5]
    pixels = world_vq.to_pixels(table)
    assert pixels.shape == (5, 3, 32, 32) and pixels.min() >= -1.0 and pixels.max() <= 1.0
    assert (((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).numpy() == table).all()


def test_weights_load_into_a_janus_models_own_tokenizer() -> None:
    from transformers.models.janus.modeling_janus import JanusVQVAE

    fresh = JanusVQVAE(world_vq.vq_config(projection_dim=64, image_token_embed_dim=64))
    world_vq.load_vq_into(fresh)
    pixels = world_vq.to_pixels(canonical_table()[:2])
    assert torch.equal(world_vq.encode(fresh, pixels), world_vq.encode(world_vq.load_vq(), pixels))


@pytest.mark.slow
def test_judge_reads_round_trips_and_repeats(vq: JanusVQVAE, decoded: torch.Tensor) -> None:
    state = torch.random.get_rng_state()
    judge = train_judge(vq, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    wanted = torch.tensor([look.indices() for look in LOOKS])
    for images in (decoded, AttributeChecker.raw_table()):
        assert (judge.read_indices(images) == wanted).float().mean(0).min() >= 0.95
    place = ATTRIBUTES.index("place")
    assert (judge.read_indices(decoded) == wanted.roll(-1, 0))[:, place].float().mean() < 0.1


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "recipes" / "tiny_vq.py"
    spec = importlib.util.spec_from_file_location("tiny_vq", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_vq"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("world", ["rendered", "digits"])
def test_recipe_repeats_and_saves_what_load_reads(recipe: ModuleType, world: str, tmp_path: Path) -> None:
    settings = recipe.Settings(world=world, steps=3, batch=4, warm_steps=2, codes=16)
    trained = [recipe.train(settings) for _ in range(2)]
    runs = [model.vq for model in trained]
    for name, value in runs[0].state_dict().items():
        assert torch.equal(value, runs[1].state_dict()[name]), name
    trained[0].saved(tmp_path)
    back = world_vq.load_vq(tmp_path)
    assert back.config.num_embeddings == 16
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, runs[0].state_dict()[name], atol=2e-3, rtol=2e-3)


def test_recipes_pairs_differ_in_one_attribute_and_locality_sees_equal_patches(recipe: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        look = TRAIN_LOOKS[int(rng.integers(len(TRAIN_LOOKS)))]
        other = neighbour(look, rng)
        assert (
            sum(a != b for a, b in zip(look.words(), other.words(), strict=True)) == 1 and other not in HELD_OUT_LOOKS
        )
    x = Rendered().pairs(2, 0.5, rng)[:1].repeat(2, 1, 1, 1)
    z = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert recipe.locality(z, x) > 0.5  # equal pictures, unequal encodings
    assert recipe.locality(z[:1].repeat(2, 1, 1, 1), x) == 0.0
    assert recipe.locality(z, torch.stack([x[0], -x[0]])) == 0.0  # no patch is equal: nothing is asked


def test_recipes_codebook_stays_on_the_sphere_and_restarts_dead_rows(recipe: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(64, 8, generator=generator), dim=-1)
    rows = torch.zeros(16, 8)
    book = recipe.Codebook(rows, recipe.Settings(codes=16))
    book.place(z)
    rows[3] = -rows.mean(0)  # far from every encoding
    book.count[3] = 0.01
    book.update(z[:8])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(16))
    assert (z[:8] @ rows[3]).max() > 0.999
