"""Read the five attributes off generated pictures: nearest of the 360 canonical renders, as the tokenizer decodes them.

Comparing with *decoded* renders cancels what the tokenizer always gets wrong, so a picture made of the right tokens
reads perfectly. Shapes: `n` pictures, `L = 360` looks, `A = 5` attributes in the order of `ATTRIBUTES`; pictures are
float `[n, 3, 32, 32]` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attributes import ATTRIBUTES, LOOK_INDEX, LOOKS, VALUES, Look
from .render import canonical_table


class AttributeChecker:
    """Nearest-render reader of attributes; its table may lie on any device.

    Args:
        decoded_table: float `[360, 3, 32, 32]` in [0, 1], rows in the order of `LOOKS`.
    """

    def __init__(self, decoded_table: Tensor) -> None:
        if decoded_table.ndim != 4 or decoded_table.shape[0] != len(LOOKS):
            raise ValueError(
                f"AttributeChecker: expected a table [{len(LOOKS)}, 3, H, W] in the order of LOOKS, "
                f"got {tuple(decoded_table.shape)}"
            )
        self.table = decoded_table.detach().float()
        self._rows_LD = self.table.flatten(1)
        self._labels_LA = torch.tensor([look.indices() for look in LOOKS], device=decoded_table.device)

    @classmethod
    def from_round_trip(cls, round_trip: Callable[[Tensor], Tensor]) -> AttributeChecker:
        """From a tokenizer's round trip of `[n, 3, 32, 32]` in [0, 1], e.g. `partial(vq.round_trip, tokenizer)`."""
        return cls(round_trip(cls.raw_table()))

    @staticmethod
    def raw_table() -> Tensor:
        """The canonical renders, float32 `[360, 3, 32, 32]` in [0, 1]."""
        return torch.tensor(canonical_table()).permute(0, 3, 1, 2).float() / 255.0

    def mse(self, images: Tensor) -> Tensor:
        """Mean squared difference from every look's render, `[n, 360]`."""
        images_nD = images.to(self._rows_LD).flatten(1)
        cross = images_nD @ self._rows_LD.T
        squares = images_nD.square().sum(1, keepdim=True) + self._rows_LD.square().sum(1) - 2.0 * cross
        return squares.clamp_min(0.0) / images_nD.shape[1]

    def read_indices(self, images: Tensor) -> Tensor:
        """The nearest look's value of each attribute as its position in `VALUES`, int64 `[n, 5]`."""
        return self._labels_LA[self.mse(images).argmin(1)]

    def read(self, images: Tensor) -> list[Look]:
        """The nearest look of each picture."""
        return [LOOKS[row] for row in self.mse(images).argmin(1).tolist()]

    def score(self, images: Tensor, looks: Sequence[Look], attributes: Sequence[str] = ATTRIBUTES) -> Tensor:
        """Which attributes are as they should be.

        Args:
            images: float `[n, 3, 32, 32]` in [0, 1].
            looks: what each picture should show, length n.
            attributes: which columns are wanted, in this order.

        Returns:
            float32 `[n, len(attributes)]` of 0 and 1.
        """
        self._check_lengths("score", images, looks)
        hits = self.read_indices(images) == self._wanted(looks)
        return hits[:, [ATTRIBUTES.index(name) for name in attributes]].float()

    def posterior(self, images: Tensor, *, temperature: float = 0.002) -> dict[str, Tensor]:
        """A soft reading: softmax of −MSE/temperature over looks, summed per attribute value; `[n, values]` each.

        The closest two looks are 0.005 apart, so the default gives a perfect picture 0.8 or more on every attribute and
        still grades pictures in between (correlation with hits .98 when a tenth of the tokens are replaced).
        """
        weights_nL = torch.softmax(-self.mse(images) / temperature, dim=1)
        result = {}
        for column, name in enumerate(ATTRIBUTES):
            is_value = torch.nn.functional.one_hot(self._labels_LA[:, column], len(VALUES[name])).float()
            result[name] = weights_nL @ is_value
        return result

    def _wanted(self, looks: Sequence[Look]) -> Tensor:
        return self._labels_LA[[LOOK_INDEX[look] for look in looks]]

    def _check_lengths(self, op: str, images: Tensor, looks: Sequence[Look]) -> None:
        expected = self.table.shape[1:]
        if images.ndim != 4 or images.shape[1:] != expected or images.shape[0] != len(looks):
            raise ValueError(
                f"AttributeChecker.{op}: expected images [{len(looks)}, {', '.join(map(str, expected))}] "
                f"for {len(looks)} looks, got {tuple(images.shape)}"
            )
