"""The picture that a cell of text names: a path that stays in its folder, base64, or a data URI."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError, PictureError, shown
from ...pictures import ImageRef, StoredImage
from ..unifybench_files import PICTURE_SUFFIXES, inside

MAX_PATH = 4096
"""Characters; as many bytes are what Linux takes."""
DATA_URI = re.compile(r"data:(?:image/[\w.+-]+)?;base64,")
BEGINNINGS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk", "SUkqA", "TU0AK")
"""What base64 of JPEG, PNG, WEBP, GIF, BMP and TIFF begins with; a JPEG's looks like an absolute path."""
LEAST_BASE64 = 80
"""Characters of the smallest picture; a name that happens to begin so is shorter."""
ALPHABET = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")


@dataclass(frozen=True)
class EncodedText(StoredImage):
    """A picture that stands in a table as base64. Equal to one of the same bytes."""

    name: str = field(compare=False)
    key: str
    """Of the text."""
    text: str = field(compare=False, repr=False)

    def read(self) -> bytes:
        return decoded(self.text, self.name)


def decoded(text: str, where: str) -> bytes:
    """The bytes of base64, a data URI's head left off; PictureError where it is none."""
    head = DATA_URI.match(text)
    bare = text if head is None else text[head.end() :]
    try:
        return base64.b64decode("".join(bare.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"{where}: is no whole base64 ({error}); write the picture again") from error


def is_encoded(text: str) -> bool:
    """Whether a text is a picture as base64 and not a path."""
    if DATA_URI.match(text):
        return True
    long = len(text) >= LEAST_BASE64 and text.startswith(BEGINNINGS)
    return long and ALPHABET.fullmatch(text) is not None


def named_picture(root: Path, value: Any, where: str) -> ImageRef:
    """The picture that a cell names.

    Raises:
        DataError: it is none, leads out of `root`, or there is no such file.
    """
    if isinstance(value, dict):
        held = value.get("bytes")
        if isinstance(held, str) and held:
            return encoded_picture(held, where)
        value = value.get("path") or value.get("image")
    if isinstance(value, str) and is_encoded(value):
        return encoded_picture(value, where)
    return confined(root, value, where)


def encoded_picture(text: str, where: str) -> EncodedText:
    key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return EncodedText(where, key, text)


def confined(root: Path, name: Any, where: str) -> Path:
    """The picture that data name by a path, which may not lead out of `root`; a relative one begins there.

    Raises:
        DataError: anything else, or there is no such file.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: a picture must be a path relative to {root}, got {shown(name)}")
    if "://" in name and not name.startswith("file://"):
        raise DataError(f"{where}: {shown(name)} is an address; download the picture and give its path")
    name = name.removeprefix("file://")
    if len(name) > MAX_PATH:  # resolving it would take quadratic time
        raise DataError(f"{where}: a path of {len(name)} characters is no usable path; rename the picture")
    try:
        if Path(name).is_absolute() and not Path(name).resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"{where}: the path {shown(name)} is absolute and leads out of {root}; give it relative to that "
                "folder, or name the folder of the pictures as image_folder"
            )
        return inside(root, root / name, where)
    except (OSError, RuntimeError) as error:  # too long; a loop of symbolic links
        raise DataError(f"{where}: {shown(name)} is no usable path ({error}); rename the picture") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: {shown(name)} is no usable path ({error}); rename the picture") from error


def looks_like_picture(value: Any) -> bool:
    """Whether a cell of text names a picture, or is one as base64."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, str) and looks_like_picture(item) for item in value)
    if not isinstance(value, str) or not value or (len(value) > MAX_PATH and not is_encoded(value)):
        return False
    if is_encoded(value):
        return True
    plain = value.split("?")[0] if "://" in value else value
    return len(plain.splitlines()) == 1 and Path(plain).suffix.lower() in PICTURE_SUFFIXES
