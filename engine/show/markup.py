"""Small pieces of the page: text that is escaped, tables that reflow, pictures that are embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

MAX_EMBEDDED_BYTES = 100_000
"""A larger picture is embedded as WebP: the page is to be mailed around."""
KINDS = {"PNG": "png", "JPEG": "jpeg"}


def words(value: Any) -> str:
    """Any value as text that HTML takes to the letter."""
    return escape(str(value), quote=True)


def section(title: str, body: str, anchor: str = "", lead: str = "") -> str:
    """A part of the page under its heading; "" where there is nothing."""
    if not body:
        return ""
    place = f' id="{anchor}"' if anchor else ""
    note = f'<p class="note">{words(lead)}</p>' if lead else ""
    return f"<section{place}><h2>{words(title)}</h2>{note}{body}</section>"


def facts(pairs: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    """A list of names and values, both escaped here; those without a value are left out."""
    items = "".join(f"<div><dt>{words(name)}</dt><dd>{words(value)}</dd></div>" for name, value in pairs if value)
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def table(head: Sequence[str], bodies: Iterable[str], kind: str = "") -> str:
    """A table in a card; on a narrow page each cell stands under its column's name, which `cell` repeats.

    Args:
        head: names of the columns; those behind the first are of numbers.
        bodies: whole `<tbody>` elements, made of `cell`s.
        kind: class of the table.
    """
    names = "".join(
        f'<th scope="col"{"" if not i else " class=number"}>{words(name)}</th>' for i, name in enumerate(head)
    )
    return f'<div class="card"><table class="{kind}"><thead><tr>{names}</tr></thead>{"".join(bodies)}</table></div>'


def cell(column: str, content: str, kind: str = "number", tag: str = "td") -> str:
    """A cell with its column's name for the narrow page; `content` is HTML."""
    scope = ' scope="row"' if tag == "th" else ""
    return f'<{tag}{scope} class="{kind}" data-column="{words(column)}">{content}</{tag}>'


def embed(run_dir: Path, path: Path, alt: str, *, shrink: bool = True) -> str:
    """An <img> with the picture inside; "" for what is missing, broken, or outside the run's folder.

    Args:
        run_dir: the run's folder.
        path: the picture's file.
        alt: what it shows, in words.
        shrink: a large one becomes WebP, which takes a second.
    """
    try:
        if not path.resolve().is_relative_to(run_dir.resolve()):
            return ""
        status = path.stat()
        found = _encoded(str(path), status.st_mtime_ns, status.st_size, shrink)
    except (OSError, ValueError):
        return ""
    if found is None:
        return ""
    source, small, (width, height) = found
    pixels = ' class="pixels"' if small else ""
    return f'<img{pixels} alt="{words(alt)}" width="{width}" height="{height}" src="{source}">'


@lru_cache(maxsize=64)
def _encoded(path: str, changed: int, size: int, shrink: bool) -> tuple[str, bool, tuple[int, int]] | None:
    """A picture as a data URL, whether it is drawn in squares, its size; `changed` and `size` tell versions apart.
    A page that is rewritten while a run goes on encodes a picture once."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=list(KINDS)) as picture:
            kind, shape = KINDS[str(picture.format)], picture.size
            if shrink and len(content) > MAX_EMBEDDED_BYTES:
                shrunk = io.BytesIO()
                picture.convert("RGB").save(shrunk, "WEBP", quality=80)
                content, kind = shrunk.getvalue(), "webp"
            else:
                picture.verify()
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError):
        return None
    data = base64.b64encode(content).decode("ascii")
    return f"data:image/{kind};base64,{data}", max(shape) < 128, shape
