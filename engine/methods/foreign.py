"""What the tiny base cannot know: pictures that are not rendered, words that the world's texts do not have.

Without `--model` a tiny base stands in, which has seen nothing but its embedded world.  On anybody's photographs it
would still run, and its numbers would mean nothing: likeness by a vision tower of two layers, drawings of squares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set

from ..errors import ConfigError, PictureError
from ..pictures import ImageRef, check_picture
from ..records import Prompt
from ..world.render import SIZE
from ..world.worlds import World

TAGS = frozenset({"think", "answer", "<think>", "<answer>"})
WORD = re.compile(r"<\w+>|[^\W\d_]+")
SHARE = 0.1
"""Of the prompts that may have a word which the base does not know."""
MOST_LOOKED_AT = 100
CHECKPOINTS = "deepseek-community/Janus-Pro-1B or -7B, an Emu3 or Show-o checkpoint, or a folder that holds one"


def check_own_world(world: World, data: object, prompts: Sequence[Prompt], pictures: Sequence[ImageRef]) -> None:
    """Refuses data that the tiny base cannot learn from.

    Args:
        world: the base's.
        data: what errors call it.
        prompts: what would be trained on, as the data have them, without an instruction around.
        pictures: theirs.

    Raises:
        ConfigError: pictures of another size than the world's, or words that it does not have.
    """
    found = [*_other_pictures(pictures), *_other_words(prompts, TAGS.union(world.words))]
    if found:
        raise ConfigError(
            f"model: none is given, and {data} has {' and '.join(found)}; the tiny base that stands in without --model "
            f"knows {world.title} alone (pictures of {SIZE}x{SIZE} pixels, {len(world.words)} words), so that its "
            f"drawings and scores would say nothing; give --model ({CHECKPOINTS}; docs/models.md), or leave --data out"
        )


def _other_pictures(pictures: Sequence[ImageRef]) -> Iterable[str]:
    for picture in pictures[:MOST_LOOKED_AT]:
        try:
            width, height = check_picture(picture, whole=False)
        except PictureError:  # told on its own
            continue
        if (width, height) != (SIZE, SIZE):
            yield f"pictures of other sizes ({getattr(picture, 'name', picture)}: {width}x{height})"
            return


def _other_words(prompts: Sequence[Prompt], known: Set[str]) -> Iterable[str]:
    strange: dict[str, None] = {}
    num_strange = 0
    for prompt in prompts:
        request = prompt.request  # what it is told beside it is ours
        asked = request if request is not None and request in prompt.text else prompt.words
        new = [word for word in WORD.findall(asked) if not _is_known(word, known)]
        num_strange += bool(new)
        strange |= dict.fromkeys(new)
    if num_strange > SHARE * len(prompts):
        some = ", ".join(list(strange)[:4])
        yield f"words that it does not know in {num_strange} of {len(prompts)} prompts ({some}, …)"


def _is_known(word: str, known: Set[str]) -> bool:
    return word in known or word.lower() in known or (len(word) == 1 and word.isupper())
