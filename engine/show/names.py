"""Names that people read in place of the code's: of tasks, rewards and the stages of a step."""

from __future__ import annotations

from .scores import TASKS

NOT_TRAINED = " (not trained on)"
REWARDS = {
    "reward": "total",
    "identity": "like the concept's photos",
    "judge": "shows what was asked",
    "text": "says what is right",
    "cycle": "like the real picture, and captioned back",
    "tim": "words and patches match",
    "accuracy": "answer is right",
    "format": "answer keeps its form",
    "clip_text": "CLIP: picture and prompt",
    "clip_image": "CLIP: picture and real picture",
    "bleu": "answer is near the right one",
}
"""Built-in rewards; one of a user's own has its own name."""
STAGES = {
    "rollout": "sampling",
    "reward": "rewards",
    "pack": "packing",
    "score": "log-probabilities",
    "update": "update of the weights",
    "evaluation": "scoring on held-out items",
}
"""Stages of a step, as metrics.jsonl names their seconds."""
PHOTOS = {
    "shown": "the photo that the model sees",
    "concept": "a photo of the concept; the model does not see it",
    "real": "a real picture of it; the model does not see it",
}
"""What the photo beside a request is."""


def task_words(task: str, *, drawn: bool = False) -> str:
    """A prompt's task in words; `drawn`: what is looked at is a picture, where the task also has a text.

    >>> task_words("rea", drawn=True)
    'Infer what is meant, then draw it'
    """
    return TASKS.get(f"{task}_gen" if drawn else task) or TASKS.get(task) or task.replace("_", " ")


def training_task_words(task: str, *, drawn: bool = False, rewarded: bool = True) -> str:
    """The same of a prompt that is trained on; those without a reward are anchors."""
    words = task_words(task, drawn=drawn).removesuffix(NOT_TRAINED)
    return words if rewarded else f"{words} (anchor: held in place, not rewarded)"


def reward_words(name: str) -> str:
    """A reward in words, its own name behind them where they differ."""
    return f"{REWARDS[name]} ({name})" if name in REWARDS and name != "reward" else REWARDS.get(name, name)
