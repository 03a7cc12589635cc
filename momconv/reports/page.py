"""A report as one self-contained page of HTML: no script, and nothing that is fetched.

The page is plain data here, and page.html.j2 shows it. All text is escaped there.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from momconv.words import printable

_SIDE = 320  # pixels of a thumbnail's longer side
_QUALITY = 85  # of its JPEG


@dataclass(frozen=True, slots=True)
class Figure:
    """A number at the head of the page."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Illustration:
    """A picture in the page itself, and what is said below it."""

    uri: str
    caption: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows below their titles; without titles, names and what is said of them."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page, whose kinds of content stand in this order."""

    title: str
    lines: tuple[str, ...] = ()
    pictures: tuple[Illustration, ...] = ()
    thumbnails: tuple[Illustration, ...] = ()
    tables: tuple[Table, ...] = ()
    summary: str = ""  # of the details, which are folded
    details: tuple[Table, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """What is to be seen, from above."""

    title: str
    subtitle: str
    figures: tuple[Figure, ...]
    sections: tuple[Section, ...]


def render(page: Page) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("momconv", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_show,
    )
    return environment.get_template("page.html.j2").render(page=page)


def _show(value: object) -> object:
    """Return text as it can be written: with bytes that are no UTF-8, and the like, written out."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def embed(picture: Path, caption: str) -> Illustration:
    """Return a PNG file for the page."""
    return Illustration(_to_uri(picture.read_bytes(), "png"), caption)


def shrink(image: Image.Image, caption: str, lines: Sequence[str] = ()) -> Illustration:
    """Return an image as a thumbnail for the page."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(file, "JPEG", quality=_QUALITY)
    return Illustration(_to_uri(file.getvalue(), "jpeg"), caption, tuple(lines))


def _to_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
