"""BERTScore against torchmetrics and against the formula in float64, on a small BERT."""

from __future__ import annotations

import math
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import WORDS, saved, small_bert
from torchmetrics.functional.text.bert import bert_score
from transformers import AutoModel, AutoTokenizer

from syncr1.engine.errors import ConfigError
from syncr1.engine.rewards.builtin.accuracy import soft_jaccard
from syncr1.engine.rewards.builtin.text_similarity import BertScore, SoftJaccard

CANDIDATES = ["a man riding a red surfboard", "two dogs", "a dog on the beach at the street with two big hats", "bus"]
REFERENCES = ["a woman on a blue surfboard", "the two black dogs sitting on a bench", "a dog", "bus"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_bert, tmp_path_factory)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> BertScore:
    return BertScore.from_pretrained(folder)


def torchmetrics_f1(scorer: BertScore, candidates: list[str], references: list[str], layer: int = -1) -> list[float]:
    """Pair by pair: torchmetrics 1.9 sorts a batch by length and does not undo it, so that scores change places."""
    return [
        float(
            bert_score(
                [a],
                [b],
                model=scorer.model,
                user_tokenizer=scorer.tokenizer,
                num_layers=layer,
                max_length=64,
                truncation=True,
            )["f1"]
        )
        for a, b in zip(candidates, references, strict=True)
    ]


@pytest.mark.parametrize("layer", [-1, 0, 1, 3])
def test_f1_is_torchmetrics(folder: Path, layer: int) -> None:
    scorer = BertScore.from_pretrained(folder, layer=layer, batch_size=3)
    ours = scorer(CANDIDATES, REFERENCES)
    assert ours == pytest.approx(torchmetrics_f1(scorer, CANDIDATES, REFERENCES, layer), abs=1e-6)
    assert ours[3] == pytest.approx(1.0, abs=1e-6) and max(ours[:3]) < 0.99


@given(texts=st.lists(st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=12), min_size=2, max_size=4))
def test_f1_is_torchmetrics_for_any_words(scorer: BertScore, texts: list[list[str]]) -> None:
    words = [" ".join(text).replace("##", "") for text in texts]
    ours = scorer(words, words[::-1])
    assert ours == pytest.approx(torchmetrics_f1(scorer, words, words[::-1]), abs=1e-5)


def test_f1_is_the_formula_in_float64(folder: Path, scorer: BertScore) -> None:
    model, tokenizer = AutoModel.from_pretrained(folder).eval().double(), AutoTokenizer.from_pretrained(folder)

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        return torch.nn.functional.normalize(hidden, dim=-1)

    for value, a, b in zip(scorer(CANDIDATES, REFERENCES), CANDIDATES, REFERENCES, strict=True):
        cosines = (embed(a) @ embed(b).T).clamp(min=0)
        p, r = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
        assert value == pytest.approx(2 * p * r / (p + r), abs=1e-5)


def test_pairs_do_not_depend_on_each_other(scorer: BertScore) -> None:
    together = scorer(CANDIDATES, REFERENCES)
    assert together == pytest.approx(
        [scorer([a], [b])[0] for a, b in zip(CANDIDATES, REFERENCES, strict=True)], abs=1e-6
    )
    assert scorer(REFERENCES, CANDIDATES) == pytest.approx(together, abs=1e-6)  # F1 is symmetric
    assert scorer([], []) == []
    with pytest.raises(ValueError, match="2 candidates, but 1 references"):
        scorer(["a", "b"], ["a"])


@pytest.mark.parametrize("odd", ["", "   ", "一只狗在海滩上", "a dog " * 2000, "[SEP] [CLS]", "\x00\ud7ff", "🐕" * 300])
def test_odd_texts_stay_in_range(scorer: BertScore, odd: str) -> None:
    values = scorer([odd, "a dog", odd, "a dog"], ["a dog", odd, odd, "a dog"])
    assert all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in values)
    assert values[3] == pytest.approx(1.0, abs=1e-6)
    if not odd.strip():
        assert values[:3] == [0.0, 0.0, 0.0] and scorer([odd], [odd]) == [0.0]


def test_each_text_is_embedded_once(folder: Path) -> None:
    scorer = BertScore.from_pretrained(folder)
    seen = 0
    forward = scorer.model.forward

    def counting(input_ids: torch.Tensor, **more: object) -> object:
        nonlocal seen
        seen += len(input_ids)
        return forward(input_ids=input_ids, **more)

    scorer.model.forward = counting
    scorer(["two dogs"] * 8, ["a dog"] * 8)
    assert seen == 2


def test_layers_and_checkpoints_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 4 is not there.*0 .embeddings. to 3"):
        BertScore.from_pretrained(folder, layer=4)
    with pytest.raises(ConfigError, match="nowhere"):
        BertScore.from_pretrained(tmp_path / "nowhere")


def test_words_in_common(scorer: BertScore) -> None:
    expected = [soft_jaccard(a, b, 0.8) for a, b in zip(CANDIDATES, REFERENCES, strict=True)]
    assert SoftJaccard()(CANDIDATES, REFERENCES) == expected
    assert SoftJaccard()(["a dog", ""], ["a dog", "x"]) == [1.0, 0.0]
