"""A process that decodes pictures and says what is wrong with them: `python -m`, by decoders.py alone.

    asked      a line of JSON, a list; each item a path, or a name and a size, whose bytes then follow the line in order
    answered   a line of JSON, a list: what is wrong with each, "" for a good one

It ends when its input does. Neither torch nor pyarrow is imported: it is there in a moment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import PictureError
from ..pictures import ImageRef, StoredImage, check_picture

Asked = tuple[str, int]
"""A file's path and -1, or the name of an encoded picture and how many bytes it has."""


@dataclass(frozen=True, slots=True)
class Sent(StoredImage):
    """A picture whose bytes came from the process that asks."""

    name: str
    contents: bytes

    def read(self) -> bytes:
        return self.contents


def problem_of(ref: ImageRef, contents: bytes | None = None) -> str:
    """What is wrong with a picture, without the list of formats, which would be said once for each; "" for nothing."""
    try:
        check_picture(ref, contents=contents)
    except PictureError as error:
        return str(error).partition("; expected one of")[0]
    return ""


def answers(asked: Sequence[Asked], source: BinaryIO) -> list[str]:
    """Of each picture of a message, whose bytes are read from `source`."""
    return [problem_of(Path(name) if size < 0 else Sent(name, source.read(size))) for name, size in asked]


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    for line in iter(source.readline, b""):
        sink.write(json.dumps(answers(json.loads(line), source)).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    main()
