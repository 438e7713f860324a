"""Which prompts a run's rewards can say anything about, known from the data alone, before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..errors import ConfigError
from ..records import Prompt
from .images.drawing_asked import text_to_write


def _drawn(prompt: Prompt) -> bool:
    return "image" in prompt.segments


def _written(prompt: Prompt) -> bool:
    return "text" in prompt.segments


def _has(prompt: Prompt, *columns: str) -> bool:
    """Whether one of the columns is there, or in GenEval's `metadata`, and says anything."""
    held = prompt.extra.get("metadata")
    rows = (prompt.extra, held) if isinstance(held, Mapping) else (prompt.extra,)
    return any(row.get(name) for row in rows for name in columns)


NEEDS: Mapping[str, tuple[str, Callable[[Prompt], bool]]] = {
    "identity": ("a drawing and photos in `references`", lambda p: _drawn(p) and bool(p.references)),
    "judge": ("a drawing and a `target`", lambda p: _drawn(p) and bool(p.target or p.attributes)),
    "remote_judge": ("a drawing", _drawn),
    "text": ("a text and an `answer`", lambda p: _written(p) and p.answer is not None and p.qa_type != "MC"),
    "bleu": ("a text and an `answer`", lambda p: _written(p) and p.answer is not None and p.qa_type != "MC"),
    "accuracy": ("a text and an `answer`", lambda p: _written(p) and p.answer is not None),
    "format": ("a text", _written),
    "cycle": ("a drawing", _drawn),
    "tim": ("a drawing", _drawn),
    "clip_text": ("a drawing", _drawn),
    "clip_image": ("a drawing and a `real_image`", lambda p: _drawn(p) and p.real_image is not None),
    **dict.fromkeys(("pickscore", "clip", "hps", "aesthetic", "siglip", "vqa_score", "orm"), ("a drawing", _drawn)),
    "geneval": (
        "a drawing and GenEval's `include` or `exclude`",
        lambda p: _drawn(p) and _has(p, "include", "exclude"),
    ),
    "detector": (
        "a drawing and T2I-R1's `nouns`, `spatial_info` or `numeracy_info`",
        lambda p: _drawn(p) and _has(p, "nouns", "spatial_info", "numeracy_info"),
    ),
    "git": ("a drawing and T2I-R1's `attr_nouns` or `nouns`", lambda p: _drawn(p) and _has(p, "attr_nouns", "nouns")),
    "ocr": ("a drawing and text in quotes, or `ocr_text`", lambda p: _drawn(p) and bool(text_to_write(p))),
    "face": ("a drawing and photos in `references`", lambda p: _drawn(p) and bool(p.references)),
}
"""Of the built-in rewards: what a prompt must have, in words, and whether it has it. A user's own may need anything."""


def check_scorable(names: Sequence[str], prompts: Sequence[Prompt], data: object) -> list[str]:
    """What will not be rewarded, in words with counts; nothing where every prompt has a reward.

    Args:
        names: of the rewards, the user's own among them.
        prompts: what is trained on; anchors have no reward and are not meant.
        data: what errors call it.

    Raises:
        ConfigError: none of the rewards can score any of the prompts.
    """
    if any(name not in NEEDS for name in names):
        return []
    asked = [prompt for prompt in prompts if prompt.rewarded]
    without = [prompt for prompt in asked if not any(NEEDS[name][1](prompt) for name in names)]
    if not without:
        return []
    needed = "; ".join(f"{name} needs {NEEDS[name][0]}" for name in names)
    if len(without) == len(asked):
        raise ConfigError(
            f"reward_funcs: none of {', '.join(names)} can score any of the {len(asked)} prompts of {data} ({needed}); "
            "add what is missing to the data, or a reward of your own (docs/rewards.md)"
        )
    tasks = ", ".join(f"{count} of task {task}" for task, count in Counter(p.task for p in without).items())
    return [f"{len(without)} of {len(asked)} prompts have no reward and teach nothing ({tasks}): {needed}"]
