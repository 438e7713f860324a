"""Policies whose images are tokens of the text vocabulary: one embedding and one head for both.

Such a model understands the very tokens that it draws, so a drawn image is not shown again. Its image vocabulary here
is the codebook's: ids 0 ... K-1, wherever their rows lie in the table.

Dims: K codes, N image tokens, D hidden, V rows of the table, H codes and S pixels of an image's side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from ..records import SegmentKind
from .base import Head, Policy
from .tokens import never_sampled
from .vqgan_decoder import decoded, encoded, factor_of
from .vqgan_files import ADVICE


class OneTablePolicy(Policy):
    """What such policies have in common. A subclass calls `_lay_out` and says where its VQGAN is."""

    side: int
    """H."""
    image_marks: tuple[str, ...]
    """Texts of the tokens around an image, and of those that stand for one."""
    _code_rows: Tensor
    _forbidden_text: Tensor

    @property
    @abstractmethod
    def vqmodel(self) -> Any:
        """The VQGAN, or None; with a `decoder` where its drawing half is there."""

    @abstractmethod
    def read_vqgan(self, name: str | Path, *, shapes_alone: bool = False) -> None:
        """Loads of the VQGAN what a checkpoint has, or what lies beside it; nothing where there is none."""

    def _lay_out(self, codes: Sequence[int], resolution: int) -> None:
        """What a text never has are codes, and what `never_sampled` says; rows of it at the table's end leave the head.

        Args:
            codes: [K] row of each code.
            resolution: S.
        """
        self.num_codes = len(codes)
        marks = zip(self.image_marks, self.tokenizer.convert_tokens_to_ids(list(self.image_marks)), strict=True)
        self.control |= {mark: int(row) for mark, row in marks}  # not every tokenizer marks them as special
        self._structural = frozenset(self.control.values())
        self._first_code = codes[0] if list(codes) == list(range(codes[0], codes[0] + len(codes))) else None
        self.register_buffer("_code_rows", torch.tensor(list(codes), device=self.device), persistent=False)
        self._num_text = self.model.get_output_embeddings().weight.shape[0]
        ends, vocabulary = self.end_tokens, self._num_text
        never = never_sampled(self.model, self.tokenizer, self.control.values(), ends, vocabulary)
        forbidden = {*codes, *never} - ends
        while self._num_text - 1 in forbidden:
            self._num_text -= 1
        kept = sorted(row for row in forbidden if row < self._num_text)
        ids = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.register_buffer("_forbidden_text", ids, persistent=False)
        self._take_size(resolution)

    def _take_size(self, resolution: int) -> None:
        self.image_size = resolution
        self.side = resolution // (factor_of(self.vqmodel.config) if self.vqmodel is not None else 16)
        self.num_image_tokens = self.side**2

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.vqmodel is not None:
            self.vqmodel.eval()  # frozen, so nothing random may happen in it either
        return self

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Self:
        policy = super().from_pretrained(name, dtype=dtype, **settings)
        policy.read_vqgan(name)
        return policy

    @classmethod
    def without_weights(cls, name: str | Path) -> Self:
        policy = super().without_weights(name)
        policy.read_vqgan(name, shapes_alone=True)
        return policy.to("meta")

    # Text -------------------------------------------------------------------------------------------------------------

    def _behind_bos(self, ids: Tensor) -> Tensor:
        bos = int(self.tokenizer.bos_token_id)
        return ids if ids.numel() and int(ids[0]) == bos else torch.cat([ids.new_tensor([bos]), ids])

    # Images -----------------------------------------------------------------------------------------------------------

    @property
    def cannot_draw(self) -> str:
        if self.vqmodel is not None and hasattr(self.vqmodel, "decoder"):
            return ""
        lacks = "a VQGAN, which makes tokens of pictures and pictures of tokens"
        if self.vqmodel is not None:
            lacks = "its VQGAN's decoder, which makes pictures of tokens"
        return f"this checkpoint came without {lacks}; {ADVICE}"

    def no_images(self, what: str) -> NoReturn:
        """Raises ConfigError: the file that it takes to do `what` is not there."""
        raise ConfigError(f"{type(self).__name__} cannot {what}: {self.cannot_draw}")

    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.vqmodel is None:
            self.no_images("see images")
        return encoded(self.vqmodel, self.normalisation().pixels(images.float()))

    def see(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, N, D] embeddings of the images' tokens.

        They are the policy's own embeddings as they are now; training takes them as given, as it does a tower's.
        """
        return self.embed(self.image_tokens(images).to(self.device), "image").detach()

    def vision_features(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, C] float32 the VQGAN's latents place by place, near to pixels: such a model has
        no other eye."""
        return self._encoded(images)[1]

    def image_tokens(self, images: Tensor) -> Tensor:
        return self._encoded(images)[0]

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> Tensor:
        if self.cannot_draw:
            self.no_images("draw")
        return self.normalisation().images(decoded(self.vqmodel, tokens, self.side))

    # The network ------------------------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        ids = self._code_rows[tokens] if kind == "image" else tokens
        return self.model.get_input_embeddings()(ids)

    def whole_head(self, hidden: Tensor) -> Head:
        """[N, D] -> the head over all rows of the table; of its parts `head` is made."""
        return Head(hidden, self.model.get_output_embeddings().weight, None, None)

    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        """One matrix, two vocabularies: the codes' rows, and the rows up to the last that a text may have."""
        whole = self.whole_head(hidden)
        if kind == "text":
            rows: slice | Tensor = slice(0, self._num_text)
        elif self._first_code is not None:
            rows = slice(self._first_code, self._first_code + self.num_codes)
        else:
            rows = self._code_rows
        bias = None if whole.bias is None else whole.bias[rows]
        return Head(whole.hidden, whole.weight[rows], bias, self._forbidden_text if kind == "text" else None)
