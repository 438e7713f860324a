"""Is it this person?  Faces are found and described by dlib's networks, and by FaceNet where its weights are named.

Sync-R1's released R_id for people is .7 FaceNet + .3 face_recognition, the mean over all photos: max(0, 2 (cos - 1/2))
of FaceNet's features, max(0, 2 (v - 1/2)) with v = 1 - distance of dlib's; where one of them is missing the other
counts alone.  Both look at the face that dlib's frontal detector finds, the largest (the released code finds FaceNet's
with MTCNN, whose weights are pickles).  The extra `face` has the packages: `dlib-bin` and `face-recognition-models`
(weights, CC0), `facenet-pytorch` for the network that `reward_models face=FILE.safetensors` gives weights to.

Dims: D features.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...pictures import ImageRef, open_picture
from ...reasons import reading
from ..builtin.batches import Kept, check_images
from ..reward import RewardFunction
from .drawing_asked import drawn_rows, filled
from .loading import as_bytes

FACENET_WEIGHT, DLIB_WEIGHT = 0.7, 0.3
FACENET_SIZE = 160
INSTALL = "run `pip install 'syncr1[face]'`, and `pip install --no-deps facenet-pytorch` for FaceNet's half"
MODELS = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")
"""Of face_recognition_models: where eyes and nose are, and what the face is like."""


class Face(NamedTuple):
    """What is known of a face."""

    dlib: Tensor
    """[128] float32: faces of one person lie within about .6."""
    facenet: Tensor | None
    """[512] float32 of length 1; None without FaceNet."""


class FaceReader:
    """Finds the largest face of a picture and describes it.

    Args:
        models: folder of face_recognition_models' files.
        facenet: InceptionResnetV1 with its weights; None: dlib alone.
        max_kept: photos whose faces are kept.
    """

    def __init__(self, models: Path, facenet: Any = None, *, max_kept: int = 4096) -> None:
        dlib = importlib.import_module("dlib")  # of the extra `face`
        self.find = dlib.get_frontal_face_detector()
        self.place = dlib.shape_predictor(str(models / MODELS[0]))
        self.describe = dlib.face_recognition_model_v1(str(models / MODELS[1]))
        self.facenet = None if facenet is None else facenet.eval().requires_grad_(False)
        self._lock = threading.Lock()
        self.photos: Kept[ImageRef, Face | None] = Kept(self._of_photos, lambda _: 1, max_kept)

    def of_drawings(self, images: Sequence[Tensor]) -> list[Face | None]:
        """The face of each image [3, H, W] in [0, 1]; None where none is seen."""
        check_images("face", images)
        return [self._face(as_bytes(image).permute(1, 2, 0).contiguous().numpy()) for image in images]

    def _of_photos(self, refs: list[ImageRef]) -> list[Face | None]:
        return [self._face(np.ascontiguousarray(open_picture(ref))) for ref in refs]

    def _face(self, pixels: Any) -> Face | None:
        """Of [H, W, 3] bytes."""
        with self._lock:  # dlib's objects keep what they computed last
            found = self.find(pixels, 1)
            if not found:
                return None
            box = max(found, key=lambda one: one.area())
            features = self.describe.compute_face_descriptor(pixels, self.place(pixels, box), 1)
        return Face(torch.tensor(list(features)), self._facenet_of(pixels, box))

    @torch.no_grad()
    def _facenet_of(self, pixels: Any, box: Any) -> Tensor | None:
        if self.facenet is None:
            return None
        height, width = pixels.shape[:2]
        top, bottom = max(box.top(), 0), min(box.bottom() + 1, height)
        left, right = max(box.left(), 0), min(box.right() + 1, width)
        face = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[None].float()
        face = F.interpolate(face, (FACENET_SIZE, FACENET_SIZE), mode="bilinear", antialias=True)
        device = next(self.facenet.parameters()).device
        return F.normalize(self.facenet(((face - 127.5) / 128.0).to(device)).float(), dim=-1)[0].cpu()


def load_faces(facenet: str | None, *, device: torch.device | str = "cpu") -> FaceReader:
    """What the extra `face` installs.

    Args:
        facenet: safetensors of InceptionResnetV1's weights (facenet-pytorch's names); None: dlib alone.
        device: of FaceNet.

    Raises:
        ConfigError: a package is not installed, or the weights are others.
    """
    absent = [name for name in ("dlib", "face_recognition_models") if importlib.util.find_spec(name) is None]
    if facenet is not None and importlib.util.find_spec("facenet_pytorch") is None:
        absent.append("facenet_pytorch")
    if absent:
        raise ConfigError(f"reward face: expected {', '.join(absent)} to be installed, got none; {INSTALL}")
    package = importlib.util.find_spec("face_recognition_models")
    assert package is not None and package.submodule_search_locations  # its own __init__ wants pkg_resources
    models = Path(package.submodule_search_locations[0]) / "models"
    return FaceReader(models, None if facenet is None else _facenet(facenet).to(device))


def _facenet(path: str) -> Any:
    from safetensors.torch import load_file

    if not path.endswith(".safetensors"):
        raise ConfigError(
            f"reward_models: face: expected a safetensors file of FaceNet's weights, got {path}; convert it"
        )
    network = importlib.import_module("facenet_pytorch.models.inception_resnet_v1").InceptionResnetV1()
    with reading("reward_models: face", path):
        weights = load_file(Path(path).expanduser())
        network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("logits.")})
    return network


def likeness(drawn: Face, photos: Sequence[Face]) -> float:
    """In [0, 1]: the mean over the photos."""
    by_dlib = torch.stack([(2 * (0.5 - (photo.dlib - drawn.dlib).norm())).clamp(0, 1) for photo in photos]).mean()
    pairs = [
        photo.facenet @ drawn.facenet for photo in photos if photo.facenet is not None and drawn.facenet is not None
    ]
    if not pairs:
        return float(by_dlib)
    by_facenet = (2 * (torch.stack(pairs) - 0.5)).clamp(0, 1).mean()
    return float(FACENET_WEIGHT * by_facenet + DLIB_WEIGHT * by_dlib)


class FaceReward:
    """Likeness to the faces in the concept's photos, in [0, 1]: 0 for a drawing without a face; None without a drawing,
    or where no photo shows a face.

    Args:
        reader: finds and describes faces.
        without_face: gives the rewards of what this says None of, and of drawings without a face, as the released R_id
            falls back on CLIP's likeness; None: there is nothing to fall back on.
        name: the column's.
    """

    kind = "image"

    def __init__(self, reader: FaceReader, without_face: RewardFunction | None = None, name: str = "face") -> None:
        self.reader, self.without_face = reader, without_face
        self.__name__ = name

    def __call__(
        self, *, images: Sequence[Tensor | None], references: Sequence[tuple[ImageRef, ...]], **columns: Any
    ) -> list[float | None]:
        rows, _ = drawn_rows(images)
        known = self.reader.photos(list(dict.fromkeys(ref for row in rows for ref in references[row])))
        shown = {row: [face for ref in references[row] if (face := known[ref]) is not None] for row in rows}
        people = {row: photos for row, photos in shown.items() if photos}
        faces = self.reader.of_drawings([image for row in people if (image := images[row]) is not None])
        values: dict[int, float | None] = {}
        for (row, photos), drawn in zip(people.items(), faces, strict=True):
            values[row] = 0.0 if drawn is None else likeness(drawn, photos)
        if self.without_face is not None:
            seen = {row for row, face in zip(people, faces, strict=True) if face is not None}
            others = [None if row in seen else image for row, image in enumerate(images)]
            told = self.without_face(images=others, references=references, **columns)
            assert isinstance(told, list)  # identity is not async
            values |= {row: told[row] for row in rows if row not in seen}
        return filled(len(images), list(values), list(values.values()))
