"""Object detectors of transformers: Mask2Former over COCO's classes, OWLv2 and Grounding DINO over any words.

Dims: n images, Q queries of the model, K labels of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    GroundingDinoForObjectDetection,
    Mask2FormerForUniversalSegmentation,
    Owlv2ForObjectDetection,
)

from ...errors import ConfigError, DataError
from .detection import Box, Detection, Detector
from .loading import Loaded, as_bytes, load, model_type, parts

PUBLISHED_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
"""Of pictures for GenEval's detector: the test pipeline of mmdet's `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`."""
MOST_INSTANCES = 100
"""Pairs of a query and a class that the published detector looks at, `max_per_image`."""
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""COCO's names that GenEval calls otherwise."""


def load_detector(key: str, name: str | Path, *, device: torch.device | str = "cpu") -> Detector:
    """The detector in a folder or on the hub, of whichever class its config names.

    Raises:
        ConfigError: nothing that can be read, or another kind of model.
    """
    kind = model_type(key, name)
    if kind == "mask2former":
        processor = AutoImageProcessor
        return Mask2FormerDetector(
            load(key, Mask2FormerForUniversalSegmentation, name, processor_class=processor, device=device)
        )
    if kind == "owlv2":
        return Owlv2Detector(load(key, Owlv2ForObjectDetection, name, device=device))
    if kind == "grounding-dino":
        return GroundingDinoDetector(load(key, GroundingDinoForObjectDetection, name, device=device))
    raise ConfigError(
        f"reward_models: {key}: expected a mask2former, owlv2 or grounding-dino checkpoint, got {name}, whose "
        f"config.json says {kind}; name another"
    )


class Mask2FormerDetector:
    """Mask2Former over the classes that it was trained on, under GenEval's names, with masks.

    The scores are the published detector's (mmdet's `MaskFormerFusionHead.instance_postprocess`): the class's softmax
    times the mean probability inside of the mask; a box is the mask's.  transformers' own post-processing resizes masks
    to 384 x 384, which moves boxes.
    """

    threshold, counting_threshold, max_overlap = 0.3, 0.9, 1.0  # GenEval's

    def __init__(self, loaded: Loaded, *, size: Mapping[str, int] | None = PUBLISHED_SIZE, batch_size: int = 4) -> None:
        """
        Args:
            loaded: model and image processor.
            size: of pictures, as transformers' processors take it; None: the checkpoint's own.
            batch_size: images in one pass.
        """
        self.model, self.processor = loaded
        self.size, self.batch_size = size, batch_size
        names = self.model.config.id2label
        self.names = [GENEVAL_NAMES.get(names[i], names[i]) for i in range(len(names))]

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Tensor], labels: Sequence[Sequence[str]], least: float
    ) -> list[list[Detection]]:
        """See `Detector`; DataError for a label that the model was not trained on."""
        unknown = sorted({label for row in labels for label in row} - set(self.names))
        if unknown:
            raise DataError(
                f"detector: expected classes that the checkpoint knows ({', '.join(self.names[:5])}, …), got "
                f"{', '.join(unknown)}; take an open-vocabulary detector: reward_models geneval=OWLV2_CHECKPOINT"
            )
        found: list[list[Detection]] = [[] for _ in images]
        own = {} if self.size is None else {"size": dict(self.size)}
        for members in parts(images, self.batch_size):
            inputs = self.processor(images=[as_bytes(images[i]) for i in members], return_tensors="pt", **own)
            inputs = inputs.to(self.model.device)
            out = self.model(pixel_values=inputs["pixel_values"].to(self.model.dtype), pixel_mask=inputs["pixel_mask"])
            seen = inputs["pixel_mask"][0].bool()
            inner = (int(seen.any(1).sum()), int(seen.any(0).sum()))  # what is not padding
            for row, index in enumerate(members):
                found[index] = self._of_one(
                    out.class_queries_logits[row].float(),
                    out.masks_queries_logits[row].float(),
                    tuple(seen.shape),
                    inner,
                    tuple(images[index].shape[1:]),
                    {self.names.index(label) for label in labels[index]},
                    least,
                )
        return found

    def _of_one(
        self,
        classes: Tensor,
        masks: Tensor,
        padded: tuple[int, ...],
        inner: tuple[int, int],
        size: tuple[int, ...],
        asked: set[int],
        least: float,
    ) -> list[Detection]:
        """Logits [Q, classes + 1] and [Q, h, w] of one picture, whose `inner` part of `padded` pixels was seen."""
        probabilities = classes.softmax(-1)[:, :-1]
        best, flat = probabilities.flatten().topk(min(MOST_INSTANCES, probabilities.numel()))
        number = probabilities.shape[1]
        rows = [  # a mask's mean is at most 1, so that a lower class score cannot come above `least`
            (float(score), index // number, index % number)
            for score, index in zip(best, flat.tolist(), strict=True)
            if score > least and index % number in asked
        ]
        found = []
        for score, query, label in rows:
            logits = F.interpolate(masks[None, query, None], padded, mode="bilinear")[:, :, : inner[0], : inner[1]]
            logits = F.interpolate(logits, size, mode="bilinear")[0, 0]
            mask = logits > 0
            whole = score * float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
            if whole > least:
                found.append(Detection(self.names[label], whole, _box_of(mask), mask.cpu()))
        return sorted(found, key=lambda one: -one.score)


def _box_of(mask: Tensor) -> Box:
    """The box around a mask that has a pixel."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)


class Owlv2Detector:
    """OWLv2: each box is the label that it fits best, of those that were asked for; no masks.

    Its scores lie lower than Mask2Former's, and it says one object more than once: the thresholds are ours.
    """

    threshold, counting_threshold, max_overlap = 0.2, 0.2, 0.5

    def __init__(self, loaded: Loaded, *, batch_size: int = 8, sentence: str = "a photo of a {}") -> None:
        self.model, self.processor = loaded
        self.batch_size, self.sentence = batch_size, sentence

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Tensor], labels: Sequence[Sequence[str]], least: float
    ) -> list[list[Detection]]:
        """See `Detector`."""
        found: list[list[Detection]] = [[] for _ in images]
        asked = [i for i, row in enumerate(labels) if row]
        shown = [images[i] for i in asked]
        for part in parts(shown, self.batch_size):
            members = [asked[i] for i in part]
            most = max(len(labels[i]) for i in members)  # the processor's own filling counts as a query: ours is masked
            rows = [[self.sentence.format(label) for label in labels[i]] for i in members]
            texts = self.processor.tokenizer(
                [text for row in rows for text in row + [row[0]] * (most - len(row))],
                padding="max_length",
                max_length=self.model.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )["input_ids"]
            pixels = self.processor.image_processor(images=[as_bytes(images[i]) for i in members], return_tensors="pt")
            pixels = pixels["pixel_values"].to(self.model.device, self.model.dtype)
            out = self.model(input_ids=texts.to(self.model.device), pixel_values=pixels)
            for row, index in enumerate(members):
                logits = out.logits[row, :, : len(labels[index])].float()
                side = float(max(images[index].shape[1:]))  # pictures are padded to squares
                found[index] = _best_labels(
                    logits, out.pred_boxes[row].float() * side, images[index], labels[index], least
                )
        return found


def _best_labels(logits: Tensor, boxes: Tensor, image: Tensor, labels: Sequence[str], least: float) -> list[Detection]:
    """Logits [Q, K], boxes [Q, 4] by centre and size in pixels -> what is above `least`, best first."""
    scores, best = logits.sigmoid().max(-1)
    found = [
        Detection(labels[int(best[i])], float(scores[i]), _corners(boxes[i], image))
        for i in (scores > least).nonzero()[:, 0].tolist()
    ]
    return sorted(found, key=lambda one: -one.score)


def _corners(box: Tensor, image: Tensor) -> Box:
    """Centre and size in pixels -> corners within the picture."""
    x, y, width, height = box.tolist()
    tall, wide = image.shape[1:]
    return (
        min(max(x - width / 2, 0.0), wide),
        min(max(y - height / 2, 0.0), tall),
        min(max(x + width / 2, 0.0), wide),
        min(max(y + height / 2, 0.0), tall),
    )


class GroundingDinoDetector:
    """Grounding DINO: a box fits a label by the mean over the tokens of its first and last word, as in T2I-R1.

    One box may be several labels; it has no mask.  The thresholds are T2I-R1's.
    """

    threshold, counting_threshold, max_overlap = 0.3, 0.3, 0.5

    def __init__(self, loaded: Loaded, *, batch_size: int = 4) -> None:
        self.model, self.processor = loaded
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Tensor], labels: Sequence[Sequence[str]], least: float
    ) -> list[list[Detection]]:
        """See `Detector`; ConfigError where labels are more words than the model reads."""
        found: list[list[Detection]] = [[] for _ in images]
        asked = [i for i, row in enumerate(labels) if row]
        shown = [images[i] for i in asked]
        for part in parts(shown, self.batch_size):
            members = [asked[i] for i in part]
            captions = [f"{' . '.join(labels[i]).lower()}." for i in members]
            texts = self.processor.tokenizer(captions, padding=True, return_tensors="pt")
            if texts["input_ids"].shape[1] > self.model.config.max_text_len:
                raise ConfigError(
                    f"detector: expected labels of at most {self.model.config.max_text_len} tokens, got "
                    f"{texts['input_ids'].shape[1]}: {captions[0][:80]!r}; ask for fewer objects in a prompt"
                )
            pixels = self.processor.image_processor(images=[as_bytes(images[i]) for i in members], return_tensors="pt")
            inputs = {**texts, **pixels}
            out = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
            for row, index in enumerate(members):
                spans = [_tokens_of(texts, row, captions[row], labels[index], k) for k in range(len(labels[index]))]
                probabilities = out.logits[row].float().sigmoid()
                height, width = images[index].shape[1:]
                boxes = out.pred_boxes[row].float() * probabilities.new_tensor([width, height, width, height])
                found[index] = _each_label(probabilities, boxes, images[index], labels[index], spans, least)
        return found


def _tokens_of(texts: Any, row: int, caption: str, labels: Sequence[str], k: int) -> list[int]:
    """Where in the caption's tokens the first and the last word of label `k` stand."""
    start = len(" . ".join(labels[:k]).lower()) + (3 if k else 0)
    label = labels[k].lower()
    words = label.split()
    spans = [(start + label.index(words[0]), len(words[0]))]
    if len(words) > 1:
        spans.append((start + label.rindex(words[-1]), len(words[-1])))
    tokens = set[int]()
    for begin, length in spans:
        first, last = texts.char_to_token(row, begin), texts.char_to_token(row, begin + length - 1)
        if first is None or last is None:
            raise ConfigError(
                f"detector: expected words that the tokenizer knows, got {caption!r}; rename {labels[k]!r}"
            )
        tokens |= set(range(first, last + 1))
    return sorted(tokens)


def _each_label(
    probabilities: Tensor,
    boxes: Tensor,
    image: Tensor,
    labels: Sequence[str],
    spans: Sequence[Sequence[int]],
    least: float,
) -> list[Detection]:
    """Probabilities [Q, tokens], boxes [Q, 4] -> for every label its boxes above `least`, all of them best first."""
    found = []
    for label, span in zip(labels, spans, strict=True):
        scores = probabilities[:, list(span)].mean(-1)
        for i in (scores > least).nonzero()[:, 0].tolist():
            found.append(Detection(label, float(scores[i]), _corners(boxes[i], image)))
    return sorted(found, key=lambda one: -one.score)
