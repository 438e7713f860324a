"""What is odd: values, texts near good ones, damaged files; and how many of them are tried; for `test_fuzz*.py`.

Everything is drawn from one plain generator, because drawing must cost less than reading: hypothesis takes several
milliseconds for what most readers refuse in a tenth of one. It draws the generator's seeds, 20 inputs each.
"""

from __future__ import annotations

import json
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
INPUTS = int(os.environ.get("SYNCR1_FUZZ_INPUTS", "1000000" if NIGHTLY else "4000"))
BATCH = 20
"""Inputs of one seed."""
MEAN_SECONDS, MOST_SECONDS = 0.05, 1.0
"""Of an input, on average and at most: of this process, so other programs' load is not ours."""
MOST_CHARACTERS = 20_000
"""Of a message. Nobody reads a longer one."""
TRIES = 2000
"""Of making a failing input smaller."""

Arguments = tuple[Any, ...]
Make = Callable[["Draw"], Arguments]
Read = Callable[..., object]

ODD_TEXTS = [
    *("", " ", "\0", "\ud800", "a\0b", "~nobody/x", "~", "../x", "/", "x" * 5000, "a/" * 3000, "nan", "-inf", "1e999"),
    *("9" * 5000, "-0", "٣", "İ", "\u202e", "<think>", "</answer>", "<image>", "A", "B.", "(C)", "{form}", "None"),
    *("true", "null", "[", "]", "%s", "\r\n", "ﷺ" * 9, "a" + "\u0301" * 50, "1,000", "-.5", "and hundred", "\u2028"),
]
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**4200), 0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf")]
PLANES = [
    *[(0x20, 0x7E)] * 6,
    *((0, 0x1F), (0x80, 0x2FF), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x206F), (0x3000, 0xD7FF), (0xD800, 0xDFFF)),
    *((0xE000, 0xFFFF), (0x10000, 0x10FFFF)),
]
DEPTHS = [1, 5, 60, 400, 3000]


class Draw(random.Random):
    """Odd things, told by the seed."""

    def once_in(self, times: int) -> bool:
        return self.random() * times < 1

    def text(self, longest: int = 12) -> str:
        if self.once_in(2):
            return self.choice(ODD_TEXTS)
        return "".join(chr(self.randint(*self.choice(PLANES))) for _ in range(self.randint(0, longest)))

    def scalar(self) -> Any:
        kind = self.randrange(6)
        if kind == 0:
            return self.choice((None, True, False))
        if kind == 1:
            return self.choice(NUMBERS)
        if kind == 2:
            return self.randint(-3, 3) if self.once_in(2) else self.randint(-(1 << 70), 1 << 70)
        if kind == 3:
            return self.uniform(-2, 2) * 10.0 ** self.randint(-30, 30)
        return self.text()

    def several(self, make: Callable[[], Any], most: int, least: int = 0) -> list[Any]:
        return [make() for _ in range(self.randint(least, most))]

    def value(self) -> Any:
        kind = self.randrange(4)
        if kind == 0:
            return self.several(self.scalar, 3)
        if kind == 1:
            return {self.text(): self.scalar() for _ in range(self.randint(0, 2))}
        return self.scalar()

    def fields(self, names: Sequence[str], most: int, least: int = 0) -> dict[str, Any]:
        return {self.choice(names): self.value() for _ in range(self.randint(least, most))}

    def depth(self) -> int:
        """Of brackets; some are those that one function more or less on the stack makes too many."""
        return self.choice(DEPTHS) if self.once_in(2) else self.randint(800, 1000)

    def mutated(self, seeds: Sequence[str], pieces: Sequence[str], long: int = 300) -> str:
        """A text near good ones: a few cuts, repeats and odd pieces; once in `long` times a very long one."""
        text = self.choice(seeds)
        for _ in range(self.randint(0, 4)):
            at = self.randint(0, len(text))
            end = at + (self.randint(0, 40) if self.once_in(3) else self.randint(0, 2))
            kind = self.randrange(8)
            if kind < 4:
                piece = self.choice(pieces)
            elif kind < 6:
                piece = self.text(3)
            else:  # a part of this text or of another one, once more
                whole = text if kind == 6 else self.choice(seeds)
                start = self.randint(0, len(whole))
                piece = whole[start : start + self.randint(0, 40)]
            text = text[:at] + piece + text[end:]
        return self.long(text, pieces) if self.once_in(long) else text

    def long(self, text: str, pieces: Sequence[str]) -> str:
        """Up to 60,000 characters of one thing: what takes quadratic time shows here."""
        kind, length = self.randrange(4), int(10 ** self.uniform(3, 4.78))
        if kind == 0:
            piece = self.choice((*pieces, " ", "\t", "a ", "A. x ", "\n", "é")) or "x"
            at = self.randint(0, len(text))
            return text[:at] + piece * (length // len(piece)) + text[at:]
        if kind == 1:  # all of it, again and again
            return text * (length // max(1, len(text)))
        if kind == 2:  # words that are all different
            return text + " ".join(f"{number:x}" for number in range(length // 5))
        return "".join(f"{piece}{number}: {number}\n" for number, piece in enumerate([text[:3]] * (length // 10)))

    def damaged(self, good: bytes) -> bytes:
        """A file with bits flipped, bytes put in, and its end cut off."""
        for _ in range(self.randint(0, 4)):
            at = self.randint(0, len(good))
            if self.once_in(2) and at < len(good):
                good = good[:at] + bytes([good[at] ^ 1 << self.randrange(8)]) + good[at + 1 :]
            else:
                good = good[:at] + self.randbytes(self.randint(0, 8)) + good[at + self.randint(0, 8) :]
        return good[: self.randint(0, len(good))] if self.once_in(3) else good


def brackets(depth: int, inner: str = "1", name: str | None = None) -> str:
    """JSON that is `depth` deep."""
    opening = "[" if name is None else f'{{"{name}":'
    return opening * depth + inner + ("]" if name is None else "}") * depth


def as_json_text(content: Any) -> str:
    """Integers of any length included, which Python refuses to write."""
    if isinstance(content, dict):
        return "{" + ", ".join(f"{json.dumps(str(name))}: {as_json_text(part)}" for name, part in content.items()) + "}"
    if isinstance(content, list):
        return "[" + ", ".join(map(as_json_text, content)) + "]"
    if isinstance(content, int) and not isinstance(content, bool) and abs(content) > 10**4000:
        return "9" * 5000
    return json.dumps(content)


def as_bytes(written: str) -> bytes:
    return written.encode("utf-8", "surrogatepass")


# Trying ---------------------------------------------------------------------------------------------------------------


def share(percent: int) -> Callable[[Any], Any]:
    """Of all inputs; fixed ones by default, so that a run of the suite tells the same every time.

    A smaller seed is no simpler input, so hypothesis does not look for one."""
    seeds = hypothesis.given(seed=st.integers(0, 2**64 - 1))
    settings = hypothesis.settings(
        max_examples=max(1, INPUTS * percent // 100 // BATCH),
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    return lambda test: settings(seeds(test))


@dataclass
class Trial:
    """Inputs for one reader; counts them, takes the time, and shows the smallest input that fails as the first did."""

    most_seconds: float = MOST_SECONDS
    seconds: float = 0.0
    count: int = 0
    slowest: tuple[float, str] = field(default=(0.0, ""))

    def __call__(self, seed: int, make: Make, read: Read, *documented: type[Exception]) -> None:
        """`read(*make(draw))` for `BATCH` inputs; may raise `documented` errors if their message can be printed.

        Raises:
            AssertionError: it raised anything else, or took longer than `most_seconds`; shows the input.
        """
        draw = Draw(seed)
        for _ in range(BATCH):
            arguments = make(draw)
            fault, seconds = tried(read, arguments, documented)
            if seconds > MEAN_SECONDS and fault is None:  # an import or the collector may have taken it
                seconds = min(seconds, tried(read, arguments, documented)[1])
                fault = f"took {seconds:.1f} s" if seconds > self.most_seconds else None
            self.seconds += seconds
            self.count += 1
            if seconds > self.slowest[0]:
                self.slowest = seconds, shown(arguments)
            if fault is not None:
                if not fault.startswith("took"):
                    arguments = smallest(arguments, lambda less: tried(read, less, documented)[0] == fault)  # noqa: B023
                raise AssertionError(f"seed {seed}: {shown(arguments)}: {fault}")

    def __str__(self) -> str:
        seconds, what = self.slowest
        mean = self.seconds / max(1, self.count)
        return f"{self.count} inputs, mean {1000 * mean:.3f} ms, slowest {1000 * seconds:.1f} ms: {what[:200]}"


def tried(
    read: Callable[..., object], arguments: Arguments, documented: tuple[type[Exception], ...]
) -> tuple[Any, float]:
    """What is wrong with how `arguments` are read (None: nothing), and the seconds."""
    start, fault = time.process_time(), None
    try:
        read(*arguments)
    except documented as error:
        told = str(error)
        try:
            told.encode()
        except UnicodeEncodeError:
            fault = "a message that cannot be printed"
        if len(told) >= MOST_CHARACTERS:
            fault = f"a message of over {MOST_CHARACTERS} characters"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__} at {where.filename}:{where.lineno}: {where.line}"
    return fault, time.process_time() - start


def shown(arguments: Arguments) -> str:
    text = ", ".join(map(_shown, arguments))
    return text if len(text) <= 2000 else f"{text[:2000]}… ({len(text)} characters)"


def _shown(value: Any) -> str:
    try:
        return repr(value) if not isinstance(value, type) else value.__name__
    except (ValueError, RecursionError) as error:  # an integer of 4300 digits
        return f"<{type(value).__name__} without a repr: {error}>"


def smallest(arguments: Arguments, fails: Callable[[Arguments], bool]) -> Arguments:
    """`arguments` with everything cut out of texts, lists and mappings that is not needed for `fails`."""
    tries = 0
    for place, content in enumerate(arguments):
        size = 2 * len(content) if isinstance(content, str | bytes | list | dict) else 0
        while size := size // 2 if size > 1 else 0:
            at = 0
            while at < len(content) and tries < TRIES:
                less = _without(content, at, size)
                tries += 1
                if fails((*arguments[:place], less, *arguments[place + 1 :])):
                    content = less
                    arguments = (*arguments[:place], less, *arguments[place + 1 :])
                else:
                    at += size
    return arguments


def _without(content: Any, at: int, size: int) -> Any:
    if isinstance(content, dict):
        return dict([*list(content.items())[:at], *list(content.items())[at + size :]])
    return content[:at] + content[at + size :]


# Pieces of formats ----------------------------------------------------------------------------------------------------

# fmt: off
YAML_PIECES = [
    "&a ", "*a", "<<: ", "!!python/object/apply:os.system [id]", "!!bool x", "!!int ''", "!!float x", "!!timestamp x",
    "!!set {a}", "!!omap [a: 1]", "!!binary '*'", "2001-99-99", "0x" + "f" * 5000, "0b", "1_0", "1:59:59", ": ", "- ",
    "? ", "[[[[[[", "{a: {a: ", "---\n", "...\n", "%YAML 9.9\n", "\t", "|\n", ">-\n", "# ", '"\\ud800"', '"\\0"',
    "'", "@", "`", "\n", ", ", "[", "]", "{", "}",
]
SETTINGS_FILES = [
    "seed: 1\nbeta: 0.02\n",
    "model: null\nreport_to: [tensorboard]\n",
    "loss_type: dapo\nlearning_rate: 1e-4\n",
    "output_dir: runs/x\ndata: a/b\n",
    "reward_funcs: [cycle, tim]\nmerge_models: [a, b]\n",
]
JSON_PIECES = [
    '"prompt":', "{", "}", "[", "]", '"', ",", ":", "\\ud800", "\\u0000", "1e999", "NaN", "9" * 5000, "\n", "null",
    "true", "-1", '""', "[]", "{}",
]
TAGS = [
    "<think>", "</think>", "<answer>", "</answer>", "<think>" * 50, "<answer>" * 50, "</answer>" * 50, "A",
    "twenty-one", "1,000,000", "B. ", "one hundred and five", "−5", "\n", " ",
]
COLUMNS = [
    "prompt", "real_image", "image", "images", "qa_problem", "qa_solution", "qa_type", "problem", "solution", "answer",
    "id", "options", "segments", "follow_up", "attributes", "references", "reward_model", "concept", "extra", "text",
    "target", "choices", "task", "messages", "conversations", "answers", "answer_index", "hint", "A", "B", "image_1",
    "completion", "query", "picture",
]
# fmt: on
