"""R_id of people: the formula by hand, drawings without a face, dlib's and FaceNet's networks where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor

from syncr1.engine.errors import ConfigError
from syncr1.engine.pictures import ImageRef
from syncr1.engine.rewards.ensemble import build_rewards
from syncr1.engine.rewards.images.face import Face, FaceReward, likeness, load_faces

INSTALLED = all(importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models"))
needs_dlib = pytest.mark.skipif(not INSTALLED, reason="the extra `face` is not installed")


def face(distance: float, cosine: float | None = None) -> Face:
    """At that distance from the face at 0, and with that cosine to the first axis."""
    one = torch.zeros(128)
    one[0] = distance
    if cosine is None:
        return Face(one, None)
    return Face(one, F.pad(torch.tensor([cosine, (1 - cosine**2) ** 0.5]), (0, 510)))


@pytest.mark.parametrize(
    ("photos", "value"),
    [
        ([face(0.0, 1.0)], 1.0),
        ([face(0.25, 0.75)], 0.7 * 0.5 + 0.3 * 0.5),
        ([face(0.6, 0.9)], 0.7 * 0.8),
        ([face(0.0, 0.2)], 0.3),
        ([face(0.1)], 0.8),  # dlib alone
        ([face(0.0, 1.0), face(0.5, 0.5)], 0.5),
        ([face(2.0)], 0.0),
    ],
)
def test_likeness_by_hand(photos: list[Face], value: float) -> None:
    assert likeness(face(0.0, 1.0), photos) == pytest.approx(value)


class KnownFaces:
    """A picture's face by its brightness: black has none; a photo's by its name."""

    def photos(self, refs: Sequence[Any]) -> dict[Any, Face | None]:
        return {ref: None if "dog" in str(ref) else face(0.0) for ref in refs}

    def of_drawings(self, images: Sequence[Tensor]) -> list[Face | None]:
        return [face(float(image.mean()) / 2) if image.mean() > 0 else None for image in images]


def test_people_are_judged_by_faces_and_all_else_by_features() -> None:
    """Without a fallback: 0 for a drawing without a face, None where no photo shows one."""
    grey, black = torch.full((3, 8, 8), 0.5), torch.zeros(3, 8, 8)
    man, dog = (Path("man.png"), Path("dog.png")), (Path("dog.png"),)
    images, references = [grey, black, grey, None, grey], [man, man, dog, man, ()]
    assert FaceReward(KnownFaces())(images=images, references=references) == [0.5, 0.0, None, None, None]  # type: ignore[arg-type]
    asked: list[list[bool]] = []

    def features(*, images: Sequence[Tensor | None], **_: Any) -> list[float | None]:
        asked.append([image is not None for image in images])
        return [None if image is None else 0.9 for image in images]

    reward = FaceReward(KnownFaces(), features, "identity")  # type: ignore[arg-type]
    assert reward(images=images, references=references) == [0.5, 0.9, 0.9, None, 0.9]
    assert asked == [[False, True, True, False, True]] and reward.__name__ == "identity"


def test_r_id_of_the_ensemble_asks_for_faces(tmp_path: Path) -> None:
    """`build_rewards(faces=…)`: the same column and weight, and the features' own value where no face is seen."""
    dog = tmp_path / "dog.png"
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(dog)

    def features(images: Tensor) -> Tensor:
        return images.flatten(1) + 0.1

    made = [build_rewards(features=features, image_size=8, faces=faces) for faces in (None, KnownFaces())]  # type: ignore[arg-type]
    plain, by_face = made
    assert plain.names == by_face.names == ("identity", "text") and plain.weights == by_face.weights
    row: dict[str, Any] = {"images": [torch.rand(3, 8, 8)], "references": [(dog,)]}
    assert by_face.functions["identity"](**row) == plain.functions["identity"](**row) != [None]
    man: tuple[ImageRef, ...] = (tmp_path / "man.png",)
    assert by_face.functions["identity"](images=[torch.full((3, 8, 8), 0.4)], references=[man]) == [pytest.approx(0.6)]


@pytest.mark.skipif(INSTALLED, reason="the extra `face` is installed")
def test_without_the_extra_the_remedy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"expected dlib, face_recognition_models to be installed.*syncr1\[face\]"):
        load_faces(None)


@needs_dlib
def test_dlibs_own_weights_tell_a_person_from_others() -> None:
    person = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    others = torch.from_numpy(data.lfw_subset()[:100:25]).float()[:, None].expand(-1, 3, -1, -1)
    others = F.pad(F.interpolate(others, (150, 150), mode="bilinear").clamp(0, 1), (40,) * 4, value=0.5)
    reader = load_faces(None)
    photo, mirrored, darker, nobody = reader.of_drawings([person, person.flip(-1), person * 0.6, others[0] * 0 + 0.5])
    assert photo is not None and mirrored is not None and darker is not None and nobody is None
    found = [one for one in reader.of_drawings(list(others)) if one is not None]
    assert len(found) == 4 and likeness(photo, [photo]) == 1.0
    assert min(likeness(mirrored, [photo]), likeness(darker, [photo])) > 0.4 > max(likeness(f, [photo]) for f in found)


@pytest.mark.skipif(not INSTALLED or importlib.util.find_spec("facenet_pytorch") is None, reason="no facenet-pytorch")
def test_facenets_half_is_read_from_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    models = importlib.import_module("facenet_pytorch.models.inception_resnet_v1")
    network = models.InceptionResnetV1()
    save_file(network.state_dict() | {"logits.weight": torch.zeros(2, 512)}, tmp_path / "facenet.safetensors")
    person = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    (found,) = load_faces(str(tmp_path / "facenet.safetensors")).of_drawings([person])
    assert found is not None and found.facenet is not None and found.facenet.shape == (512,)
    assert float(found.facenet.norm()) == pytest.approx(1.0, abs=1e-5)
    for name, said in (("facenet.pt", "expected a safetensors file"), ("absent.safetensors", "face: ")):
        with pytest.raises(ConfigError, match=said):
            load_faces(str(tmp_path / name))
