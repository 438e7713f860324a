"""Rewards that ask about a drawing: the first answer token of real small models, T2I-R1's questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from small_detectors import small_blip_vqa, small_git, small_llava
from small_models import saved, small_blip, small_clip
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BlipForQuestionAnswering,
    GitForCausalLM,
    LlavaForConditionalGeneration,
)

from syncr1.engine.errors import ConfigError
from syncr1.engine.rewards.images.loading import as_bytes
from syncr1.engine.rewards.images.vqa import ORM, NounsReward, QuestionReward
from syncr1.engine.rewards.images.yes_no import _words, load_yes_no

QUESTIONS = ("is it a dog", "a red bus on the street ?", "two dogs", "is it a dog", "a")


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=random) for size in ((32, 32), (40, 56), (32, 32), (32, 32), (64, 33))]


def share(logits: Tensor, tokenizer: object) -> float:
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))  # type: ignore[attr-defined]
    both = logits[[yes, no]].double().softmax(-1)
    return float(both[0])


def _blip(folder: Path, image: Tensor, question: str) -> float:
    """The score of the first token that transformers' own `generate` chooses from."""
    model, processor = BlipForQuestionAnswering.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=as_bytes(image), text=question, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=1, num_beams=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return share(out.logits[0][0], processor.tokenizer)


def _git(folder: Path, image: Tensor, question: str) -> float:
    """T2I-R1's steps."""
    model, processor = GitForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pixels = processor(images=as_bytes(image), return_tensors="pt").pixel_values
    ids = [processor.tokenizer.cls_token_id, *processor(text=question, add_special_tokens=False).input_ids]
    logits = model(pixel_values=pixels, input_ids=torch.tensor([ids]), return_dict=True).logits[0, -1]
    return share(logits, processor.tokenizer)


def _llava(folder: Path, image: Tensor, question: str) -> float:
    """The prompt written out, alone and unpadded."""
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    inputs = processor(images=as_bytes(image), text=f"USER: <image>{question} ASSISTANT:", return_tensors="pt")
    return share(model(**inputs).logits[0, -1], processor.tokenizer)


@pytest.mark.parametrize(
    ("build", "alone"),
    [(small_blip_vqa, _blip), (small_git, _git), (small_llava, _llava)],
    ids=["blip", "git", "llava"],
)
@torch.no_grad()
def test_a_batch_is_each_row_by_the_models_own_forward(
    build: Callable[[Path], Path],
    alone: Callable[[Path, Tensor, str], float],
    images: list[Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Questions of several lengths and pictures of several sizes in one batch."""
    folder = saved(build, tmp_path_factory)
    ours = load_yes_no("vqa_score", str(folder))(images, QUESTIONS)
    assert ours == pytest.approx([alone(folder, *row) for row in zip(images, QUESTIONS, strict=True)], abs=2e-4)
    assert len({round(value, 5) for value in ours}) == len(ours)


def test_models_that_cannot_answer_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match="reward_models: orm: "):
        load_yes_no("orm", str(saved(small_clip, tmp_path_factory)))
    captioner = str(saved(small_blip, tmp_path_factory))
    with pytest.raises(ConfigError, match="expected all weights of BlipForQuestionAnswering"):
        load_yes_no("vqa_score", captioner)
    with pytest.raises(ConfigError, match="one token for 'yes', got none"):
        _words(AutoTokenizer.from_pretrained(captioner))  # of which there is none among its words


class Noted:
    """Answers by the length of the question, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def __call__(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[float]:
        self.asked += [(float(image.mean()), text) for image, text in zip(images, questions, strict=True)]
        return [len(text) / 100 for text in questions]


def test_what_is_asked_about_which_drawing() -> None:
    drawings = [torch.full((3, 4, 4), value) for value in (0.0, 0.25, 0.5)]
    model = Noted()
    columns = {"prompts": ["a dog", "b", "c"], "target": [None, "a cat", None]}
    assert QuestionReward(model)(images=[drawings[0], drawings[1], None], **columns) == [0.55, 0.55, None]
    assert model.asked == [
        (0.0, 'Does this figure show "a dog"? Please answer yes or no.'),
        (0.25, 'Does this figure show "a cat"? Please answer yes or no.'),
    ]
    model.asked.clear()
    QuestionReward(model, "orm", ORM)(images=drawings[:1], prompts=["a {dog}"])
    assert model.asked[0][1].startswith("This image is generated by a prompt: a {dog}. Does this image accurately")
    assert QuestionReward(model)(images=[None], prompts=["x"]) == [None]


def test_git_asks_for_each_noun_and_leaves_the_detectors_rows_out() -> None:
    model = Noted()
    drawings = [torch.full((3, 4, 4), value) for value in (0.0, 0.25, 0.5, 0.75)]
    values = NounsReward(model)(
        images=[*drawings, None, drawings[0]],
        nouns=[["dog"], ["cat", "bench"], ["dog"], [], ["dog"], None],
        attr_nouns=[["red dog", "dog"], None, ["a"], [], ["dog"], None],
        task_type=["color", None, "spatial", None, None, None],
    )
    assert model.asked == [(0.0, "red dog?"), (0.0, "dog?"), (0.25, "cat?"), (0.25, "bench?")]
    assert values == [pytest.approx(0.06), pytest.approx(0.05), None, None, None, None]
    assert NounsReward(model)(images=drawings, prompts=["x"] * 4) == [None] * 4  # data without T2I-R1's columns
