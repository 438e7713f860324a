"""Settings that text and image tokens may have of their own: the plain one holds for both, `image_<name>` for images.

`None` in `image_<name>` is "as `<name>`".  Settings, loss and sampler ask here, so that they agree.
"""

from __future__ import annotations

from typing import Any


def value_of(settings: Any, name: str, modality: str) -> Any:
    """The setting `name` of `text` or `image` tokens."""
    own = getattr(settings, f"image_{name}") if modality == "image" else None
    return getattr(settings, name) if own is None else own


def clip_of(settings: Any, modality: str) -> tuple[float, float]:
    """(epsilon, epsilon_high) of `text` or `image` tokens; without any epsilon_high both are epsilon."""
    low: float = value_of(settings, "epsilon", modality)
    high: float | None = value_of(settings, "epsilon_high", modality)
    return low, low if high is None else high


def each(text: float, image: float) -> float | dict[str, float]:
    """As the kernels take it: one number where both are the same."""
    return text if text == image else {"text": text, "image": image}
