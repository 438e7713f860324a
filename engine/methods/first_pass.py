"""The pass over a user's data before the first step: every picture opened, every prompt's length counted.

One rank of each machine makes it, the others wait; all leave out the same rows or raise the same error. What was good
the last time and has not changed is not looked at again, also where that pass was interrupted (data/seen.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version

from .. import errors
from ..data.loaded import Loaded, row_of
from ..data.opened import broken_pictures, pictures_error, pictures_of, shown_by
from ..data.seen import Seen, digest
from ..errors import ConfigError, PictureError
from ..pictures import ImageRef
from ..policies.base import Policy
from ..policies.inputs import Inputs
from ..processes.group import of_all_ranks
from ..records import Prompt
from ..rollout.capacity import unusable_prompts
from ..settings.train_config import TrainConfig, WorldName
from ..show.pulse import pulse
from .bad_rows import BadRows
from .dry_run import policy_without_weights

AT_ONCE = 256
"""Prompts between two moves of the bar, after which what fits is known for good."""


def check_pictures(loaded: Loaded, data: object, rows: BadRows) -> None:
    """Opens every picture; rows whose picture cannot be read are left out, or all ranks raise PictureError.
    Collective."""

    def look() -> dict[str, str]:
        refs = pictures_of(loaded.everything())
        broken = opened(refs, data)
        if broken and not rows.skip:
            raise pictures_error([*broken.values()], len(refs), rows.remedy)
        bad: dict[str, str] = {}
        for prompt in loaded.everything() if broken else ():
            if words := next((broken[ref] for ref in shown_by(prompt) if ref in broken), ""):
                bad.setdefault(row_of(prompt), words)
        return bad

    rows.settle(loaded, _on_all_ranks(look), data)


def opened(refs: Sequence[ImageRef], data: object) -> dict[ImageRef, str]:
    """Each picture that cannot be read, and what is wrong with it."""
    seen = Seen(data)
    with pulse("opening the data's pictures", len(refs)) as move:
        broken = broken_pictures(refs, lambda done: move(done, ""), seen)
    seen.tidy()
    return broken


def check_prompts(config: TrainConfig, loaded: Loaded, data: object, rows: BadRows, world: WorldName) -> None:
    """Counts every prompt's tokens, through the checkpoint's own template; rows that the model cannot take are left
    out, or all ranks raise DataError. No weights are read. Collective."""

    def look() -> dict[str, str]:
        policy = Inputs.of(config).given_to(policy_without_weights(config.model, world))
        return unusable_rows(policy, loaded.everything(), data, config.drawing_turn, config.max_completion_length)

    rows.settle(loaded, _on_all_ranks(look), data)


def unusable_rows(
    policy: Policy, prompts: Sequence[Prompt], data: object, drawing_turn: str, max_text_tokens: int
) -> dict[str, str]:
    """Rows that the policy cannot take, by name, and why; arguments as for `check_lengths`, and the data's name."""
    seen, bad = Seen(f"{data}#lengths"), dict[str, str]()
    about = digest(_template_of(policy), drawing_turn, max_text_tokens)
    keys = [digest(about, _said(prompt)) for prompt in prompts]
    pending = [(prompt, key) for prompt, key in zip(prompts, keys, strict=True) if key not in seen]
    with pulse("counting the prompts' tokens", len(pending)) as move:
        for begin in range(0, len(pending), AT_ONCE):
            some = pending[begin : begin + AT_ONCE]
            problems = unusable_prompts(policy, [prompt for prompt, _ in some], drawing_turn, max_text_tokens)
            found = {prompt.id: words for prompt, words in problems}
            for prompt, _ in some:
                if prompt.id in found:
                    bad.setdefault(row_of(prompt), found[prompt.id])
            seen.add(key for prompt, key in some if prompt.id not in found)
            move(begin + len(some), "")
    seen.tidy()
    return bad


def _template_of(policy: Policy) -> str:
    """What a prompt's tokens depend on beside the prompt."""
    tokenizer = policy.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    template = getattr(policy.processor, "chat_template", None), getattr(tokenizer, "chat_template", None)
    kind = type(policy).__name__, policy.cannot_draw, policy.max_positions, policy.num_image_tokens
    return digest(version("transformers"), kind, words, template, sorted(policy.template_kwargs.items()))


def _said(prompt: Prompt) -> tuple[object, ...]:
    """What of a prompt becomes tokens."""
    told = prompt.text, prompt.request, prompt.info, prompt.concept, prompt.follow_up, prompt.segments, prompt.target
    return (*told, bool(prompt.images), len(shown_by(prompt)))


def _on_all_ranks(look: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What the first rank of any machine has found; what one of them raises, all do. Collective."""
    mine: tuple[dict[str, str], str, str] = {}, "", ""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            mine = look(), "", ""
        except (PictureError, ConfigError) as error:
            mine = {}, type(error).__name__, str(error)
    found: dict[str, str] = {}
    for told in of_all_ranks(json.dumps(mine)):
        bad, kind, words = json.loads(told)
        if kind:
            raise getattr(errors, kind)(words)
        found = bad | found
    return found
