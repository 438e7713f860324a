"""SPICE without Java: do two captions speak of the same things, with the same attributes, in the same relations?

    F1 over tuples (object), (object, attribute), (subject, relation, object) of the captions' scene graphs;
    tuples match when their words do, in place: equal, or of one WordNet synset

Graphs come from FACTUAL's Flan-T5 checkpoint, which transformers loads: its package (`FactualSceneGraph`, MIT) needs
spaCy, sentence-transformers and pandas, its requirements take torch back to 2.6, and its parser calls tokenizer methods
that transformers 5 has not.  What is used of it, where it is there, is its WordNet table, two text files
(`pip install --no-deps FactualSceneGraph`).

Source: Anderson et al., SPICE (2016); Li et al., FACTUAL (2023), whose evaluator this follows but for words outside of
WordNet ("with", "onto"), which there never match in a tuple that also needs a synonym.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from .batches import Kept
from .pretrained import Pretrained, frozen

Words = tuple[str, ...]
Parser = Callable[[Sequence[str]], "list[SceneGraph]"]
Synonyms = Callable[[str], frozenset[int]]
"""A word, or several, to its synsets; empty for one that is unknown."""

TASK = "Generate Scene Graph: "
_MARKS = re.compile(r"(?<![^\s(,])p?v:|:\d+\b")
"""FACTUAL's marks of verbs and of which of several things is meant."""


@dataclass(frozen=True, slots=True)
class SceneGraph:
    """What a caption speaks of, in lower case."""

    objects: frozenset[str] = frozenset()
    attributes: frozenset[tuple[str, str]] = frozenset()
    """(object, attribute); a number of things is an attribute too."""
    relations: frozenset[tuple[str, str, str]] = frozenset()
    """(subject, relation, object)."""

    def tuples(self) -> list[Words]:
        """All of them, in an order that does not depend on the process."""
        return sorted([*((name,) for name in self.objects), *self.attributes, *self.relations], key=" ".join)


def read_graph(text: str) -> SceneGraph:
    """The graph that a parser wrote as `( man , riding , surfboard ) , ( surfboard , is , red )`; never raises.

    A last tuple that was cut off is left out, but for its object where it is the only one. Two words are an object and
    its attribute; of more than three the first and the last are objects and the others their relation.
    """
    objects, attributes, relations = set(), set(), set()
    facts = _MARKS.sub("", text.lower()).strip().split(")")
    cut_off = facts.pop()
    if not facts:
        facts = [cut_off.split(",")[0]]
    for fact in facts:
        words = [" ".join(part.split()) for part in fact.replace("(", " ").strip(" ,").split(",")]
        words = [word for word in words if word]
        if not words:
            continue
        objects.add(words[0])
        if len(words) == 2 or (len(words) == 3 and words[1] == "is"):
            attributes.add((words[0], words[-1]))
        elif len(words) > 2:
            objects.add(words[-1])
            relations.add((words[0], " ".join(words[1:-1]), words[-1]))
    return SceneGraph(frozenset(objects), frozenset(attributes), frozenset(relations))


def f_score(candidate: SceneGraph, reference: SceneGraph, synonyms: Synonyms | None = None) -> float:
    """F1 over tuples, each matched once: first equal ones, then by synonyms in alphabetical order.

    Returns:
        In [0, 1]; 0 where either graph is empty.
    """
    ours, theirs = candidate.tuples(), reference.tuples()
    num_tuples = len(ours) + len(theirs)
    equal = set(ours) & set(theirs)
    num_matched = len(equal)
    if synonyms is not None:
        left = [words for words in theirs if words not in equal]
        for words in ours:
            if words in equal:
                continue
            match = next((other for other in left if _same(words, other, synonyms)), None)
            if match is not None:
                left.remove(match)
                num_matched += 1
    return 2.0 * num_matched / num_tuples if num_tuples else 0.0


def _same(words: Words, others: Words, synonyms: Synonyms) -> bool:
    return len(words) == len(others) and all(
        word == other or not synonyms(word).isdisjoint(synonyms(other))
        for word, other in zip(words, others, strict=True)
    )


@dataclass(frozen=True)
class WordNet:
    """Synsets of words, and of what they are forms of: `men` has those of `man`."""

    synsets: Mapping[str, frozenset[int]]
    """Word, underscores for spaces -> ids of its synsets."""
    bases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Irregular form -> what it is a form of."""
    _known: dict[str, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path | Traversable) -> Self:
        """From `english.synsets` and `english.exceptions`: a line with a word, then one with its ids, or its forms."""
        return cls.from_texts(*((folder / f"english.{name}").read_text("utf-8") for name in ("synsets", "exceptions")))

    @classmethod
    def from_package(cls) -> Self:
        """From the tables that lie in the FactualSceneGraph package, which is not imported.

        Raises:
            ModuleNotFoundError: it is not installed; the message says how.
        """
        try:
            folder = resources.files("factual_scene_graph.evaluation.resources")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "spice: the WordNet table is not there; `pip install --no-deps FactualSceneGraph` brings it (with its "
                "requirements it would replace torch), or give WordNet.from_folder, or synonyms=None"
            ) from error
        return cls.from_folder(folder)

    @classmethod
    def from_texts(cls, synsets: str, exceptions: str = "") -> Self:
        """From the contents of both files."""
        bases: dict[str, tuple[str, ...]] = {}
        for base, forms in _pairs(exceptions):
            for form in forms.split():
                bases[form] = (*bases.get(form, ()), base)
        return cls({word: frozenset(map(int, ids.split())) for word, ids in _pairs(synsets)}, bases)

    def __call__(self, word: str) -> frozenset[int]:
        """Ids of every synset of the word itself and of what it is a form of."""
        name = "_".join(word.lower().split())
        if name not in self._known:
            empty: frozenset[int] = frozenset()
            forms = (name, *(self.bases.get(name) or (self._base(name),)))
            self._known[name] = empty.union(*(self.synsets.get(form, empty) for form in forms))
        return self._known[name]

    def _base(self, name: str) -> str:
        """The word without its ending, by WordNet's rules; the word itself where that is none."""
        if name.endswith("ful") and name[:-3] in self.synsets:
            return name[:-3]
        if name.endswith(("ss", "ful")) or len(name) <= 2:
            return name
        candidates = (name[: -len(end)] + new for end, new in _ENDINGS if name.endswith(end))
        return next((base for base in candidates if base in self.synsets), name)


_NOUNS = (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"))
_VERBS = (("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""))
_ADJECTIVES = (("er", ""), ("est", ""), ("er", "e"), ("est", "e"))
_ENDINGS = (*_NOUNS, *_VERBS, *_ADJECTIVES)


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines()]
    return zip(lines[::2], lines[1::2], strict=True)


class FactualParser(Pretrained):
    """Captions to scene graphs, by a T5 that was trained on FACTUAL: `lizhuang144/flan-t5-base-VG-factual-sg`.

    Args:
        model: put into eval mode.
        tokenizer: its own.
        max_input_tokens: longer captions are cut; the authors' number, as the others here.
        max_output_tokens: of the written graph.
        num_beams: of the search.
        batch_size: captions in one pass.
    """

    model_class = AutoModelForSeq2SeqLM

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_input_tokens: int = 64,
        max_output_tokens: int = 128,
        num_beams: int = 5,
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = frozen(model), tokenizer, batch_size
        self.max_input_tokens, self.max_output_tokens, self.num_beams = max_input_tokens, max_output_tokens, num_beams

    def __call__(self, captions: Sequence[str]) -> list[SceneGraph]:
        """n captions -> n graphs; an empty graph for an empty caption."""
        return [read_graph(text) for text in self.write(captions)]

    @torch.no_grad()
    def write(self, captions: Sequence[str]) -> list[str]:
        """n captions -> n graphs as the model writes them, "" for an empty caption."""
        written = [""] * len(captions)
        rows = sorted((i for i, caption in enumerate(captions) if caption.strip()), key=lambda i: len(captions[i]))
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            inputs = self.tokenizer(
                [TASK + captions[i].strip() for i in part],
                padding=True,
                truncation=True,
                max_length=self.max_input_tokens,
                return_tensors="pt",
            ).to(self.model.device)
            tokens = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_length=self.max_output_tokens,
                num_beams=self.num_beams,
                do_sample=False,
                early_stopping=self.num_beams > 1,
            )
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, text in zip(part, texts, strict=True):
                written[row] = text.replace(TASK.strip(), "").strip()
        return written


class Spice:
    """SPICE of candidates and references, a `TextSimilarity`; graphs of texts are kept.

    Args:
        parser: captions to graphs.
        synonyms: `WordNet.from_package()`; None: words must be equal.
        max_graphs: that are kept.
    """

    def __init__(self, parser: Parser, synonyms: Synonyms | None = None, *, max_graphs: int = 16384) -> None:
        self.synonyms = synonyms
        self.graphs: Kept[str, SceneGraph] = Kept(parser, lambda _: 1, max_graphs)

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """n candidates and n references -> F1 of each pair, in [0, 1]; 0 for an empty text."""
        if len(candidates) != len(references):
            raise ValueError(f"SPICE: {len(candidates)} candidates, but {len(references)} references")
        graphs = self.graphs([*candidates, *references])
        return [
            f_score(graphs[a], graphs[b], self.synonyms) if a.strip() and b.strip() else 0.0
            for a, b in zip(candidates, references, strict=True)
        ]
