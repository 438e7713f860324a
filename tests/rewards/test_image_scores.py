"""PickScore, CLIP, HPS, SigLIP and looks against transformers' own forward of small checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_detectors import small_aesthetic, small_git, small_siglip
from small_models import saved, small_blip, small_clip
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipProcessor,
)

from syncr1.engine.errors import ConfigError
from syncr1.engine.rewards.images import aesthetic, catalogue
from syncr1.engine.rewards.images.aesthetic import AestheticReward, AestheticScorer, read_layers
from syncr1.engine.rewards.images.catalogue import NamedReward
from syncr1.engine.rewards.images.drawing_asked import what_was_asked

ASKED = ["a man riding a red surfboard", "two dogs", "a blue bus on a street", "a dog", "never drawn"]


@pytest.fixture(scope="module")
def images() -> list[Tensor | None]:
    random = torch.Generator().manual_seed(0)
    sizes = ((32, 32), (48, 36), (32, 32), (20, 64))
    return [*((torch.rand(3, *size, generator=random) * 255).round() / 255 for size in sizes), None]


def drawn(images: list[Tensor | None]) -> list[Tensor]:
    return [(image * 255).byte() for image in images if image is not None]


@torch.no_grad()
def _without_the_words_half(folder: Path) -> Path:
    """A CLIP whose texts lead nowhere."""
    weights = load_file(small_clip(folder) / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "text_projection.weight"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def _of_its_own_kind(folder: Path) -> Path:
    """As the published predictor, whose config.json names a kind of its own code."""
    path = small_aesthetic(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "aesthetics_predictor"}))
    return folder


def test_pickscore_clip_and_hps_are_clips_own_logits(
    images: list[Tensor | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cosine for clip and hps; flow_grpo's 26th of the logits for pickscore."""
    folder = saved(small_clip, tmp_path_factory)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=drawn(images), text=ASKED[:4], padding=True, return_tensors="pt")
    logits = model(**inputs).logits_per_image.diagonal()
    cosines, scale = logits / model.logit_scale.exp(), 26.0
    for name, expected in (("clip", cosines), ("hps", cosines), ("pickscore", logits / scale)):
        reward = NamedReward(name, [f"{name}={folder}"])
        values = reward(images=images, prompts=ASKED)
        assert values[:4] == pytest.approx(expected.tolist(), abs=0.02) and values[4] is None
        exact = [0, 2]  # not resized: nothing is rounded to bytes on the way
        assert [values[i] for i in exact] == pytest.approx(expected[exact].tolist(), abs=1e-5)
        assert reward(images=[None], prompts=["x"]) == [None]
    assert scale * NamedReward("pickscore", [f"pickscore={folder}"])(images=images[:1], prompts=ASKED[:1])[0] == (  # type: ignore[operator]
        pytest.approx(float(logits[0]), abs=1e-4)
    )


def test_a_published_checkpoint_without_a_tokenizer_takes_its_bases(
    images: list[Tensor | None],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PickScore's and HPS's folders may hold weights alone; other names must be whole."""
    whole = saved(small_clip, tmp_path_factory)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(whole / name, bare / name)
    monkeypatch.setattr(catalogue, "PREPARED_AS", {"hps": str(whole)})
    expected = NamedReward("hps", [f"hps={whole}"])(images=images, prompts=ASKED)
    assert NamedReward("hps", [f"hps={bare}"])(images=images, prompts=ASKED) == expected
    with pytest.raises(ConfigError, match=r"reward model ClipScorer: .*bare"):
        NamedReward("clip", [f"clip={bare}"])(images=images, prompts=ASKED)


@torch.no_grad()
def test_siglip_is_transformers_own_cosine(
    images: list[Tensor | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(small_siglip, tmp_path_factory)
    model, processor = SiglipModel.from_pretrained(folder).eval(), SiglipProcessor.from_pretrained(folder)
    long = [*ASKED[:3], "a dog and a cat and a man and a hat and a bus and a bench and a street and a field", "x"]
    inputs = processor(
        images=drawn(images), text=long[:4], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    logits = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits_per_image.diagonal()
    cosines = (logits - model.logit_bias) / model.logit_scale.exp()
    values = NamedReward("siglip", [f"siglip={folder}"])(images=images, prompts=long)
    assert values[:4] == pytest.approx(cosines.tolist(), abs=0.02) and values[4] is None
    assert [values[0], values[2]] == pytest.approx(cosines[[0, 2]].tolist(), abs=1e-5)
    assert len({round(v, 4) for v in values[:4]}) > 2  # type: ignore[type-var]


@torch.no_grad()
def test_looks_are_five_linear_layers_on_clips_features(
    images: list[Tensor | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(small_aesthetic, tmp_path_factory)
    model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=drawn(images), return_tensors="pt").pixel_values
    features = model(pixels).image_embeds
    features = features / features.norm(dim=-1, keepdim=True)
    weights = load_file(folder / "model.safetensors")
    for index in (0, 2, 4, 6, 7):
        features = features @ weights[f"layers.{index}.weight"].T + weights[f"layers.{index}.bias"]
    values = AestheticReward(AestheticScorer.from_pretrained(str(folder)))(images=images)
    assert [values[0], values[2]] == pytest.approx((features[[0, 2], 0] / 10).tolist(), abs=1e-4)
    assert values[4] is None and None not in values[:4]


def test_laions_layers_alone_go_on_top_of_clip_l14(
    images: list[Tensor | None],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file of the layers, as LAION's pickle holds them, saved as safetensors; `monkeypatch` names a small tower."""
    folder = saved(small_aesthetic, tmp_path_factory)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if name.startswith("layers.")}, tmp_path / "l.safetensors"
    )
    monkeypatch.setattr(aesthetic, "CLIP_L14", str(folder))
    whole = NamedReward("aesthetic", [f"aesthetic={folder}"])(images=images)
    assert NamedReward("aesthetic", [f"aesthetic={tmp_path}/l.safetensors"])(images=images) == whole
    assert [tuple(w.shape) for w, _ in read_layers(tmp_path / "l.safetensors")] == [
        (16, 24),
        (8, 16),
        (4, 8),
        (3, 4),
        (1, 3),
    ]
    save_file({"layers.0.weight": torch.zeros(1, 9), "layers.0.bias": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"expected layers from 24 features to one number, got \(1, 9\)"):
        AestheticScorer.from_pretrained(str(tmp_path / "w.safetensors"))
    save_file({"head.weight": torch.zeros(1, 9)}, tmp_path / "o.safetensors")
    with pytest.raises(ConfigError, match=r"expected layers\.0\.weight.* in o\.safetensors, got none"):
        read_layers(tmp_path / "o.safetensors")
    with pytest.raises(ConfigError, match="reward_models: aesthetic: "):
        AestheticScorer.from_pretrained(str(tmp_path / "absent.safetensors"))


def test_what_a_drawing_is_held_against() -> None:
    """The description where there is one, the user's request before a longer prompt."""
    columns = {"target": ["a red dog", None, None, ""], "request": [None, "draw it", None, None]}
    assert what_was_asked(columns | {"prompts": ["p0", "p1", "p2", "p3"]}, range(4)) == [
        "a red dog",
        "draw it",
        "p2",
        "p3",
    ]


@pytest.mark.parametrize(
    ("reward", "build", "said"),
    [
        ("clip", small_git, "expected a checkpoint of clip, got .*, whose config.json says git; name another"),
        ("siglip", small_blip, "expected a checkpoint of siglip, got .*, whose config.json says blip"),
        ("vqa_score", small_blip, "expected all weights of BlipForQuestionAnswering, got .* without 56 of them"),
        (
            "clip",
            _without_the_words_half,
            "expected all weights of CLIPModel, got .* without 1 of them .text_projection",
        ),
    ],
)
def test_weights_that_are_not_there_are_not_made_up(
    reward: str, build: Callable[[Path], Path], said: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ConfigError, match=said):
        NamedReward(reward, [f"{reward}={saved(build, tmp_path_factory)}"]).load()


def test_a_kind_of_its_own_code_is_read_as_the_class_that_it_extends(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(_of_its_own_kind, tmp_path_factory)
    (score,) = NamedReward("aesthetic", [f"aesthetic={folder}"])(images=[torch.full((3, 32, 32), 0.5)])
    assert score is not None
