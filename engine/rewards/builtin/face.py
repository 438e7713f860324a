"""R_id of people: mean over the person's photos of max(0, 2 (cos - 1/2)), cos between embeddings of faces.

What finds and embeds faces is the caller's choice.  Where a drawing, or every photo, shows no face, another likeness
speaks (CLIP's, in the released code).  `facenet` loads the detector and the embedder that the released code uses.

Source: Sync-R1's released code (`utils.py`); written anew.

Dims: n images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before torchvision, which facenet-pytorch imports)

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...pictures import ImageRef
from .batches import Kept, by_shape, check_images, picture_pixels

FaceEmbedder = Callable[[Tensor], list[Tensor | None]]
"""Images [n, 3, H, W] float32 in [0, 1] to the embedding [D] of a face in each, the largest, say; None for no face."""

IdentityFunction = Callable[..., list[float | None]]
"""A reward function of `images` and `references`, such as `IdentityReward`."""


class FaceIdentity:
    """Likeness of the drawn face to those in the reference photos, in [0, 1]; embeddings of photos are kept.

    Args:
        embed: finds and embeds faces; frozen.
        fallback: asked about the drawings that no face can be compared in; None: their reward is None.
        max_cached: photos whose embeddings are kept.
    """

    def __init__(
        self, embed: FaceEmbedder, fallback: IdentityFunction | None = None, *, max_cached: int = 4096
    ) -> None:
        self.embed, self.fallback = embed, fallback
        self.known: Kept[ImageRef, Tensor | None] = Kept(self._of_pictures, lambda _: 1, max_cached)
        self.__name__ = "face_identity"

    @torch.no_grad()
    def __call__(
        self, *, images: Sequence[Tensor | None], references: Sequence[tuple[ImageRef, ...]], **columns: Any
    ) -> list[float | None]:
        """One value per trajectory; None without an image or references, or without a face and a fallback.

        Raises:
            ValueError: an image is not [3, H, W] float in [0, 1].
            PictureError: a reference photo cannot be read.
        """
        rows = [i for i, image in enumerate(images) if image is not None and references[i]]
        rewards: list[float | None] = [None] * len(images)
        drawn = self._faces([image for i in rows if (image := images[i]) is not None])
        known = self.known([ref for i in rows for ref in references[i]])
        for row, face in zip(rows, drawn, strict=True):
            photos = [known[ref] for ref in references[row]]
            found = [photo for photo in photos if photo is not None]
            if face is not None and found:
                rewards[row] = float((2.0 * (torch.stack(found) @ face - 0.5)).clamp(0.0, 1.0).mean())
        left = {i for i in rows if rewards[i] is None}
        if self.fallback is not None and left:
            asked = [image if i in left else None for i, image in enumerate(images)]
            others = self.fallback(images=asked, references=references, **columns)
            rewards = [other if i in left else own for i, (own, other) in enumerate(zip(rewards, others, strict=True))]
        return rewards

    def _faces(self, images: Sequence[Tensor]) -> list[Tensor | None]:
        """Embeddings [D] of length 1 on the CPU."""
        check_images("face identity", images)
        found: list[Tensor | None] = [None] * len(images)
        for members in by_shape(images):
            faces = self.embed(torch.stack([images[i] for i in members]).float())
            for index, face in zip(members, faces, strict=True):
                found[index] = None if face is None else F.normalize(face.detach().float().flatten(), dim=0).cpu()
        return found

    @torch.no_grad()
    def _of_pictures(self, refs: list[ImageRef]) -> list[Tensor | None]:
        return self._faces([picture_pixels(ref) for ref in refs])


def facenet(
    weights: str | Path = "vggface2", *, device: torch.device | str = "cpu", batch_size: int = 64
) -> FaceEmbedder:
    """MTCNN's largest face of each image, embedded by FaceNet (Inception-ResNet, 512 features).

    Args:
        weights: of the embedder: "vggface2" or "casia-webface", which the package downloads at first use, or the path
            of a safetensors file of its state dict. The detector's come with the package.
        device: of both networks.
        batch_size: images in one pass.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how.
        RuntimeError: torchvision's compiled operators, which the detector needs, do not fit torch.
        ValueError: the file is not of this network.
    """
    try:
        from facenet_pytorch import MTCNN, InceptionResnetV1
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"face identity: {error}. `pip install --no-deps facenet-pytorch; pip install requests tqdm`: its "
            "own pins (torch < 2.3, Pillow < 10.3, NumPy < 2) are older than what is needed here"
        ) from error
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise RuntimeError(
            "face identity: the face detector needs torchvision's compiled operators, which do not load beside this "
            "torch; install torchvision of the same build as torch"
        ) from error
    finder = MTCNN(image_size=160, device=torch.device(device)).eval()
    if weights in ("vggface2", "casia-webface"):
        network = InceptionResnetV1(pretrained=weights)
    else:
        from safetensors.torch import load_file

        network = InceptionResnetV1(pretrained=None)
        loaded = network.load_state_dict(load_file(weights), strict=False)
        if loaded.missing_keys:
            raise ValueError(f"facenet: {weights} lacks {', '.join(loaded.missing_keys[:3])}, ...")
    network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(images: Tensor) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for part in images.split(batch_size):
            pixels = (part * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            boxes, _ = finder.detect(pixels)  # largest first; `finder(pixels)` raises where some images have no face
            faces = finder.extract([Image.fromarray(picture) for picture in pixels], boxes, None)
            seen = [face for face in faces if face is not None]
            features = iter(network(torch.stack(seen).to(device)) if seen else [])
            found += [None if face is None else next(features) for face in faces]
        return found

    return embed
