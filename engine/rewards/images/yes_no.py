"""How sure a model that answers questions about pictures is of "yes": P(yes) / (P(yes) + P(no)) of its first token.

BLIP's and GIT's own question answering, and any image-text-to-text model of transformers with a chat template
(LLaVA-OneVision, Qwen2.5-VL, …).

Dims: n pictures, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, BlipForQuestionAnswering, GitForCausalLM

from ...errors import ConfigError
from ...policies.tokens import control_tokens, escape_control_tokens
from .loading import Loaded, as_bytes, load, model_type

SPELLINGS = {"yes": ("yes", "Yes", " yes", " Yes", "YES"), "no": ("no", "No", " no", " No", "NO")}


class YesNo(Protocol):
    """Answers questions about pictures."""

    def __call__(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) for each picture [3, H, W] in [0, 1] and question."""
        ...


def load_yes_no(key: str, name: str, *, device: torch.device | str = "cpu") -> YesNo:
    """The model in a folder or on the hub, of whichever class its config names; ConfigError where it cannot be had."""
    kind = model_type(key, name)
    if kind == "blip":
        return BlipYesNo(load(key, BlipForQuestionAnswering, name, device=device))
    if kind == "git":
        return GitYesNo(load(key, GitForCausalLM, name, device=device))
    half = torch.device(device).type == "cuda"  # these have billions of weights
    dtype = torch.bfloat16 if half else torch.float32
    loaded = load(key, AutoModelForImageTextToText, name, device=device, dtype=dtype)
    if getattr(loaded.processor, "apply_chat_template", None) is None or not loaded.processor.chat_template:
        raise ConfigError(
            f"reward_models: {key}: expected a model with a chat template, or blip or git, got {name} ({kind}); name "
            "another"
        )
    return ChatYesNo(loaded)


class BlipYesNo:
    """BLIP's VQA: the question is read beside the picture, the decoder's first token is the answer."""

    def __init__(self, loaded: Loaded, *, batch_size: int = 32) -> None:
        self.model, self.processor = loaded
        self.batch_size = batch_size
        self.words = _words(self.processor.tokenizer)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[float]:
        """See `YesNo`."""
        most = self.model.config.text_config.max_position_embeddings
        ids = self.processor.tokenizer(list(questions), truncation=True, max_length=most)["input_ids"]
        model, device, scores = self.model, self.model.device, [0.0] * len(images)
        for part in _of_one_length(ids, self.batch_size):
            pixels = self.processor.image_processor(images=[as_bytes(images[i]) for i in part], return_tensors="pt")
            seen = model.vision_model(pixel_values=pixels["pixel_values"].to(device, model.dtype))[0]
            read = model.text_encoder(
                input_ids=torch.tensor([ids[i] for i in part], device=device),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
                return_dict=False,
            )[0]
            out = model.text_decoder(
                input_ids=torch.full((len(part), 1), model.decoder_start_token_id, device=device),
                encoder_hidden_states=read,
                encoder_attention_mask=torch.ones(read.shape[:2], dtype=torch.long, device=device),
                return_dict=True,
                is_decoder=True,
            )
            for index, share in zip(part, _shares(out.logits[:, -1], self.words), strict=True):
                scores[index] = share
        return scores


class GitYesNo:
    """GIT's VQA: the question's tokens behind [CLS] follow the picture's, the next one is the answer (as in T2I-R1)."""

    def __init__(self, loaded: Loaded, *, batch_size: int = 16) -> None:
        self.model, self.processor = loaded
        self.batch_size = batch_size
        self.words = _words(self.processor.tokenizer)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[float]:
        """See `YesNo`."""
        tokenizer, device = self.processor.tokenizer, self.model.device
        most = self.model.config.max_position_embeddings - 1
        read = tokenizer(list(questions), add_special_tokens=False)["input_ids"]
        ids = [[tokenizer.cls_token_id, *row[:most]] for row in read]
        scores = [0.0] * len(images)
        for part in _of_one_length(ids, self.batch_size):
            pixels = self.processor.image_processor(images=[as_bytes(images[i]) for i in part], return_tensors="pt")
            out = self.model(
                pixel_values=pixels["pixel_values"].to(device, self.model.dtype),
                input_ids=torch.tensor([ids[i] for i in part], device=device),
            )
            for index, share in zip(part, _shares(out.logits[:, -1], self.words), strict=True):
                scores[index] = share
        return scores


def _of_one_length(ids: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Rows of equally many tokens, at most so many at once: beside longer questions BLIP's answers to shorter ones
    moved by .02 (measured, with the mask), and behind GIT's a filling would stand where the answer does."""
    for length in sorted({len(row) for row in ids}):
        rows = [i for i, row in enumerate(ids) if len(row) == length]
        for start in range(0, len(rows), most):
            yield rows[start : start + most]


class ChatYesNo:
    """Any image-text-to-text model: one user's turn of the picture and the question, the answer's first token."""

    def __init__(self, loaded: Loaded, *, batch_size: int = 8) -> None:
        self.model, self.processor = loaded
        self.batch_size = batch_size
        self.processor.tokenizer.padding_side = "left"  # the last token of every row is the one that is answered
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.words = _words(self.processor.tokenizer)
        control = control_tokens(self.processor.tokenizer, self.processor.chat_template)
        self.control = {*control, *filter(None, [getattr(self.processor, "image_token", None)])}

    def _plain(self, question: str) -> str:
        """Of a prompt's words none opens a picture or ends the turn."""
        return escape_control_tokens(question, self.processor.tokenizer, self.control)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[float]:
        """See `YesNo`."""
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            turns = [
                self.processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._plain(question)}]}],
                    add_generation_prompt=True,
                )
                for question in questions[part]
            ]
            inputs = self.processor(
                text=turns, images=[[as_bytes(image)] for image in images[part]], padding=True, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            scores += _shares(self.model(**inputs).logits[:, -1], self.words)
        return scores


def _words(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of yes and of no that are one token each, in any spelling; ConfigError where there are none."""
    found = []
    for word, spellings in SPELLINGS.items():
        pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
        ids = sorted({ids[0] for ids in pieces if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})
        if not ids:
            raise ConfigError(
                f"vqa_score: expected a tokenizer with one token for {word!r}, got none; name another model"
            )
        found.append(ids)
    yes, no = found
    return yes, no


def _shares(logits: Tensor, words: tuple[list[int], list[int]]) -> list[float]:
    """Logits [n, V] -> P(yes) / (P(yes) + P(no))."""
    yes, no = (logits[:, ids].float().logsumexp(-1) for ids in words)
    return torch.sigmoid(yes - no).tolist()
