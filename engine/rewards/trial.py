"""A trial call of the rewards that a user brings, before anything is trained: what fails always is found in seconds.

They are called once, side by side, as a step will call them: on prompts of the first step, with right and wrong texts
and pictures of noise.  The values are not looked at beyond their contract.

Dims: n trajectories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import ChatError, RewardError
from ..records import Prompt
from .calling import call_all
from .hooks import TrainerState
from .judge.llm_judge import LLMJudge
from .places import defined_at, raised_at, told
from .reward import Columns, RewardFunction, columns_for

MOST_PROMPTS = 4
"""Shown: each brings two trajectories."""
OURS = ("syncr1.engine.rewards.builtin.", "syncr1.engine.rewards.judge.attribute_judge", "syncr1.engine.world.")

ADAPTED = "syncr1.engine.rewards.yours."
_READS_A_CHAT = (
    r"^TypeError: string indices must be integers"
    r"|^AttributeError: 'str' object has no attribute '(get|content|role|items)'|^IndexError: string index out of range"
)
"""Python's words where `completion[0]["content"]`, or a message's `.get`, meets a text."""

Encode = Callable[[str], Sequence[int]]


def try_rewards(
    functions: Mapping[str, RewardFunction],
    prompts: Sequence[Prompt],
    *,
    image_size: int,
    encode: Encode,
    timeout: float,
    state: TrainerState | None = None,
) -> list[str]:
    """What is wrong with the user's own rewards, and with a judge behind an address: a line each, with its place.

    Args:
        functions: by name, the built-in ones among them, which are not tried.
        prompts: what will be asked; anchors are not shown.
        image_size: pixels squared of the pictures that prompts ask for.
        encode: text -> token ids, as the policy has them.
        timeout: seconds that a step's rewards may take.
        state: of the training, before its first step.
    """
    own = {name: function for name, function in functions.items() if is_brought(function)}
    shown = _of_each_form([prompt for prompt in prompts if prompt.rewarded])
    if not own or not shown:
        return []
    columns = trial_columns(shown, image_size, encode)
    outcomes = call_all(own, columns, timeout, state)
    return [
        _problem(name, own[name], outcome.error, columns)
        for name, outcome in outcomes.items()
        if outcome.error is not None
    ]


def is_brought(function: RewardFunction) -> bool:
    """Whether a user brought the function, or the server behind it."""
    if isinstance(function, LLMJudge):
        return True
    where = getattr(function, "__module__", None) or type(function).__module__
    return not str(where).startswith(OURS)


def trial_columns(prompts: Sequence[Prompt], image_size: int, encode: Encode) -> Columns:
    """Two trajectories of each prompt: one text is right, the other is not; pictures are noise, the same every time."""
    rows = [(prompt, is_right) for prompt in prompts for is_right in (True, False)]
    texts = [_text(prompt, is_right) if "text" in prompt.segments[:1] else "" for prompt, is_right in rows]
    noise = torch.rand(3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return columns_for(
        [prompt for prompt, _ in rows],
        texts,
        [noise.clone() if "image" in prompt.segments else None for prompt, _ in rows],
        completion_ids=[list(encode(text)) if text else [] for text in texts],
        follow_up_completions=[
            (prompt.follow_up_answer if is_right and prompt.follow_up_answer else "It is there.")
            if "text" in prompt.segments[1:]
            else ""
            for prompt, is_right in rows
        ],
    )


def _of_each_form(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each form, as far as they are shown."""
    first: dict[object, Prompt] = {}
    for prompt in prompts:
        first.setdefault((prompt.task, prompt.segments, prompt.qa_type, len(prompt.images)), prompt)
    return list(first.values())[:MOST_PROMPTS]


def _text(prompt: Prompt, is_right: bool) -> str:
    answer = (prompt.answer or prompt.target or "It is a good one.") if is_right else "I do not know."
    if prompt.qa_type is None and "<answer>" not in prompt.text:
        return answer
    return f"<think>It can be seen.</think><answer>{answer}</answer>"


# What is said ---------------------------------------------------------------------------------------------------------


def _problem(name: str, function: RewardFunction, error: BaseException, columns: Columns) -> str:
    place = defined_at(function)
    where = f" ({place})" if place and not isinstance(function, LLMJudge) else ""
    head = f"reward {name!r}{where}: a trial call before training"
    if isinstance(error, RewardError):
        return f"{head}, on {len(columns['id'])} made-up trajectories: {error.problem}"
    said = told(error)
    if isinstance(error, TimeoutError):
        return f"{head}: {error}; load what is slow when the file is imported, or raise --reward_timeout"
    if isinstance(error, ChatError):
        late = "no answer within" in said or "no time left" in said
        remedy = "raise --reward_timeout, or take a faster server" if late else "see what answers at its address"
        return f"{head} failed with {said}; {remedy}"
    return f"{head} failed with {said}{_of_chats(function, error) if raised_at(error) else _remedy(said, columns)}"


def _of_chats(function: RewardFunction, error: BaseException) -> str:
    """What to do where a function takes texts for conversations, as TRL's do that read `completion[0]["content"]`."""
    name = getattr(function, "__module__", "")
    if str(name).startswith(ADAPTED) or not re.search(_READS_A_CHAT, f"{type(error).__name__}: {error}"):
        return ""
    return "; prompts and completions are texts here: read them as such, or put trl_chat@ before its place"


def _remedy(said: str, columns: Columns) -> str:
    """What to do about a call that did not get into the function: Python's own words tell why."""
    if re.search(r", at \S+:\d+ in ", said):  # of an isolated reward, whose process tells where it was
        return ""
    if "unexpected keyword argument" in said:
        return "; a reward gets every column as a keyword, and there may be more of them: end its parameters with **_"
    if "positional-only argument" in said:
        return "; a reward gets every column as a keyword: leave out the / behind its parameters"
    missing = re.findall(r"'(\w+)'", said) if "missing" in said and "required" in said else []
    if missing and set(missing) <= set(columns):
        return "; a reward gets every column as a keyword: leave out the / behind its parameters"
    if missing:
        return f"; the data have no such column; there are {', '.join(columns)}"
    return ""
