"""Write the world to a folder laid out as UnifyBench++ is, so that a user's own folder can stand in for it.

```
<root>/ world.json concepts_list.json template.json black_512x512.png random_images/{k.png, attributes.json}
        concept/train/train_images.json
        concept/{train,test}/<c>/{k.png, t2i_conditions.json, attributes.json}
        concept/train/<c>/{info.json, conversations.json, positive_recognitions.json, random_recognitions.json,
                           negative_example/{k.png, score.json}}
        concept/test/<c>/{vqa.json, text_only.json}
        test_data/<c>.json
```
Train and test are split by item, never by index into one file: other photos, other wordings, and in training no
concept at its unseen place. `attributes.json` is ours: it maps picture names and prompt positions to looks, for
rewards and scores that read attributes; a folder of real photographs has none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from .attributes import ATTRIBUTES, CONCEPTS, PLACES, TRAIN_LOOKS, UNSEEN_PLACE, Concept, Look
from .items import MEMORY_QUESTIONS, memory_wordings, near_look, pick, seen_places
from .render import SIZE, render
from .texts import (
    ATTRIBUTE_QUESTIONS,
    FACT_QUESTIONS,
    PROMPTS,
    RECOGNITION_QUESTIONS,
    WHO_QUESTIONS,
    Split,
    fact,
    fill,
)

VERSION: Final = 1
"""Raise whenever what is written changes, so that old folders are replaced."""
STAMP: Final = "world.json"
TRAIN_PHOTOS: Final = 10
TEST_PHOTOS: Final = 5
RANDOM_IMAGES: Final = 50
NEGATIVE_EXAMPLES: Final = 6

Json = Any


def write_world(root: str | Path, *, seed: int = 0) -> Path:
    """Write the world below `root` unless `root/world.json` says that this version and seed lie there already.

    Args:
        root: a folder; created when missing. One that holds other files but no stamp is refused.
        seed: of the photos' variation and of which hard negatives are shown.

    Returns:
        `root` as a Path.

    Raises:
        FileExistsError: `root` holds something that this function did not write.
    """
    root = Path(root)
    stamp = {"world": "syncr1", "version": VERSION, "seed": seed, "size": SIZE}
    if (root / STAMP).is_file():
        if json.loads((root / STAMP).read_text()) == stamp:
            return root
        for old in ("concept", "random_images", "test_data"):
            shutil.rmtree(root / old, ignore_errors=True)
        (root / STAMP).unlink()
    elif root.exists() and any(root.iterdir()):
        raise FileExistsError(f"write_world: {root} isn't empty and holds no {STAMP}; give an empty or new folder")
    rng = np.random.default_rng(seed)
    _save_json(root / "concepts_list.json", [concept.name for concept in CONCEPTS])
    _save_json(root / "template.json", template())
    _save_picture(root / "black_512x512.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    bodies = {concept.look.at(place) for concept in CONCEPTS for place in PLACES}
    strangers = tuple(look for look in TRAIN_LOOKS if look not in bodies)
    _write_photos(root / "random_images", [pick(rng, strangers) for _ in range(RANDOM_IMAGES)], rng)
    for concept in CONCEPTS:
        _write_train(root, concept, rng)
    for concept in CONCEPTS:
        _write_test(root, concept, rng)
    names = {concept.name: [f"{k}.png" for k in range(TRAIN_PHOTOS)] for concept in CONCEPTS}
    _save_json(root / "concept" / "train" / "train_images.json", names)
    _save_json(root / STAMP, stamp)  # last: a folder that was cut short has no stamp and is seen as foreign
    return root


def template() -> Json:
    """All wordings by kind and split, slots unfilled."""
    return {
        "vqa": ATTRIBUTE_QUESTIONS,
        "text_only": FACT_QUESTIONS,
        "who": WHO_QUESTIONS,
        "rec": RECOGNITION_QUESTIONS,
        "t2i": PROMPTS,
    }


def info(concept: Concept) -> Json:
    """`info.json`: class, a line on the looks, facts, and how many prompts of the test file are for testing."""
    name, look = concept.token, concept.look
    return {
        "class": "creature",
        "info": fill("{c} is a {shape} {colour} {pattern} creature with {a_hat}.", concept=concept, look=look),
        "extra_info": [
            f"the favourite place of {name} is the {concept.place}.",
            f"{name} does like to eat {concept.food}.",
            f"the sound of {name} is {concept.sound}.",
            f"the owner of {name} is {concept.owner}.",
            f"the friend of {name} is <{concept.friend}>.",
        ],
        "conversation_type": "object",
        "generation_type": "live_subject",
        "num_testing_info": len(t2i_conditions(concept, "test")[0]["personalized_driven_generation"]),
    }


def photo_questions(concept: Concept, look: Look, split: Split) -> list[dict[str, str]]:
    """Every question about a photo of `concept` that shows `look`, as `{query, answer}`."""
    pairs = [
        {"query": fill(wording, concept=concept), "answer": getattr(look, name)}
        for name in ATTRIBUTES
        for wording in ATTRIBUTE_QUESTIONS[name][split]
    ]
    return pairs + [{"query": wording, "answer": concept.token} for wording in WHO_QUESTIONS[split]]


def memory_questions(concept: Concept, split: Split) -> list[dict[str, str]]:
    """Every question without a photo, as `{query, answer}`."""
    return [
        {"query": fill(wording, concept=concept), "answer": fact(concept, name)}
        for name in MEMORY_QUESTIONS
        for wording in memory_wordings(name)[split]
    ]


def t2i_conditions(concept: Concept, split: Split) -> tuple[dict[str, list[str]], dict[str, list[dict[str, str]]]]:
    """The five prompt lists and, beside each, what every prompt must show.

    `explicit_x[i]` says in full what `x[i]` asks for. Test prompts that name a place use the concept's unseen one and
    one that training has; training prompts never use the unseen one.
    """
    places = seen_places(concept) if split == "train" else (UNSEEN_PLACE[concept.name], concept.place)
    personal = [(wording, concept.look) for wording in PROMPTS["favourite"][split]]
    personal += [(wording, concept.look.at(place)) for place in places for wording in PROMPTS["named"][split]]
    dense = [(wording, concept.look.at(place)) for place in places for wording in PROMPTS["dense"][split]]
    personal_dense = [(wording, concept.look) for wording in PROMPTS["personal_dense"][split]]

    def explicit(kind: str, items: list[tuple[str, Look]]) -> list[tuple[str, Look]]:
        wordings = PROMPTS[kind][split]
        return [(wordings[i % len(wordings)], look) for i, (_, look) in enumerate(items)]

    lists = {
        "personalized_driven_generation": personal,
        "explicit_personalized_driven_generation": explicit("explicit", personal),
        "dense_prompt_generation": dense,
        "personalized_dense_prompt_generation": personal_dense,
        "explicit_personalized_dense_prompt_generation": explicit("explicit_dense", personal_dense),
    }
    prompts = {key: [fill(w, concept=concept, look=look) for w, look in items] for key, items in lists.items()}
    return prompts, {key: [look.to_dict() for _, look in items] for key, items in lists.items()}


def _write_train(root: Path, concept: Concept, rng: np.random.Generator) -> None:
    folder = root / "concept" / "train" / concept.name
    places = (concept.place, *seen_places(concept))  # the favourite place twice as often
    looks = [concept.look.at(places[k % len(places)]) for k in range(TRAIN_PHOTOS)]
    prompts, prompt_looks = t2i_conditions(concept, "train")
    _write_photos(folder, looks, rng, prompt_looks)
    talks = {f"{k}.png": photo_questions(concept, look, "train") for k, look in enumerate(looks)}
    _save_json(folder / "conversations.json", talks | {"text_only": memory_questions(concept, "train")})
    _save_json(folder / "info.json", info(concept))
    _save_json(folder / "t2i_conditions.json", prompts)
    for file, answer in (("positive_recognitions.json", "yes"), ("random_recognitions.json", "no")):
        wordings = RECOGNITION_QUESTIONS["train"]
        _save_json(folder / file, [{"query": fill(w, concept=concept), "answer": answer} for w in wordings])
    near = [near_look(rng, concept) for _ in range(NEGATIVE_EXAMPLES)]
    _write_photos(folder / "negative_example", near, rng)
    scores = {f"{k}.png": _likeness(look, concept.look) for k, look in enumerate(near)}
    _save_json(folder / "negative_example" / "score.json", scores)


def _write_test(root: Path, concept: Concept, rng: np.random.Generator) -> None:
    folder = root / "concept" / "test" / concept.name
    unseen = UNSEEN_PLACE[concept.name]
    others = [place for place in PLACES if place not in (unseen, concept.place)]
    looks = [concept.look.at(place) for place in (unseen, unseen, concept.place, *others)]
    prompts, prompt_looks = t2i_conditions(concept, "test")
    _write_photos(folder, looks, rng, prompt_looks)
    questions = {f"{k}.png": photo_questions(concept, look, "test") for k, look in enumerate(looks)}
    _save_json(folder / "vqa.json", questions)
    _save_json(folder / "text_only.json", memory_questions(concept, "test"))
    _save_json(folder / "t2i_conditions.json", prompts)
    _save_json(root / "test_data" / f"{concept.name}.json", _test_data(concept, questions, rng))


def _test_data(concept: Concept, questions: dict[str, list[dict[str, str]]], rng: np.random.Generator) -> list[Json]:
    """The evaluation's flat list: recognition (own photos and as many of other concepts), VQA, text only."""
    items = []
    strangers = [other for other in CONCEPTS if other is not concept]
    for k in range(TEST_PHOTOS):
        wording = RECOGNITION_QUESTIONS["test"][k % len(RECOGNITION_QUESTIONS["test"])]
        for who, answer in ((concept.name, "yes"), (pick(rng, tuple(strangers)).name, "no")):
            items.append(_flat("rec", f"concept/test/{who}/{k}.png", fill(wording, concept=concept), answer))
    for image, pairs in questions.items():
        path = f"concept/test/{concept.name}/{image}"
        items += [_flat("vqa", path, pair["query"], pair["answer"]) for pair in pairs]
    memory = memory_questions(concept, "test")
    return items + [_flat("text_only", "black_512x512.png", pair["query"], pair["answer"]) for pair in memory]


def _flat(kind: str, image: str, query: str, answer: str) -> Json:
    talk = [{"from": "human", "value": f"<image>\n{query}"}, {"from": "gpt", "value": answer}]
    return {"type": kind, "image": image, "conversations": talk}


def _likeness(look: Look, other: Look) -> float:
    """Share of equal attributes of the body, in [0, 1]."""
    pairs = list(zip(look.words()[:-1], other.words()[:-1], strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def _write_photos(folder: Path, looks: list[Look], rng: np.random.Generator, t2i: Json | None = None) -> None:
    for k, look in enumerate(looks):
        _save_picture(folder / f"{k}.png", render(look, variation=rng))
    images = {f"{k}.png": look.to_dict() for k, look in enumerate(looks)}
    _save_json(folder / "attributes.json", {"images": images} | ({} if t2i is None else {"t2i": t2i}))


def _save_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, compress_level=1)


def _save_json(path: Path, value: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
