"""Scores of made-up models on the rendered world's tasks, item by item, as an evaluation gives them."""

from __future__ import annotations

import random
from typing import Any

from syncr1.engine.evaluate.held_out import TaskScores, table_of
from syncr1.engine.show.measured import Measured

ANSWERS = {"rec": ("recall", 120), "vqa": ("accuracy", 192), "qa": ("accuracy", 192), "rea": ("words", 72)}
DRAWINGS = {"rea_gen": 72, "pure_gen": 72, "general_image": 192}
READERS = ("checker", "cnn")


def model(seed: int, skill: float, *, general: float = 0.8) -> dict[str, Any]:
    """Answers and attributes are right with probability `skill`, captions' attributes with `general`; recognition is
    guessed."""
    chance = random.Random(seed)
    tasks = {}
    for task, (metric, count) in ANSWERS.items():
        ids, measures = [f"{task}/{i}" for i in range(count)], {}
        kinds = [("yes", "no")[i % 2] for i in range(count)] if task == "rec" else None
        for how in ("greedy", "sampled"):
            right = [float(chance.random() < (0.5 if task == "rec" else skill)) for _ in ids]
            one = Measured.of(ids, right, kinds, 0.5 if task == "rec" else None)
            measures |= {f"{metric}/{how}": one, f"score/{how}": one}
        tasks[task] = TaskScores(num_items=count, measures=measures)
    for task, count in DRAWINGS.items():
        ids, measures = [f"{task}/{i}" for i in range(count)], {}
        for reader in READERS:
            hits = [[chance.random() < (general if task == "general_image" else skill) for _ in range(5)] for _ in ids]
            measures[f"attributes/{reader}"] = Measured.of(ids, [sum(row) / 5 for row in hits])
            measures[f"all_right/{reader}"] = Measured.of(ids, [float(all(row)) for row in hits])
            measures[f"hat/{reader}"] = Measured.of(ids, [float(row[0]) for row in hits])
        measures |= {"score/sampled": measures["attributes/checker"], "identity": Measured.of(ids, [0.4] * count)}
        tasks[task] = TaskScores(num_items=count, measures=measures)
    return table_of(tasks)
