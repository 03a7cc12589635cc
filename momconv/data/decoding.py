"""One way from an image file to pixels, for training, evaluation and prediction alike.

Pillow's plain ``convert("RGB")`` turns 16-bit pictures white, transparent ones arbitrary and leaves
photographs lying on their side; ``decode`` does not.
"""

import io
import os
import struct
import threading
import warnings
import zlib
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from momconv.data.folder import FORMATS
from momconv.errors import DataError
from momconv.opening import open_regular
from momconv.words import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What Pillow's readers raise when the bytes are not what they should be.
_DAMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)


_SNIFFED = 512  # bytes
_LARGEST_FILE = 2**30  # bytes; a picture is decoded from memory
_SOME_MEMORY = 2**25  # bytes, without which nothing goes on
_LARGE_PICTURE = 2**25  # pixels: such are decoded one at a time, lest many threads fill the memory
_one_at_a_time = threading.Lock()


class UnreadableImage(DataError):
    """A file that is no picture, with its ``path`` and the ``reason`` alone."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{printable(path)}: {reason}",
            kind="data.unreadable_image",
            fix="replace the file or take it out of the data folder",
        )
        self.path, self.reason = path, reason


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded file.

    Attributes:
        image: 8-bit RGB.
        stored: The format and mode in the file, such as ``JPEG CMYK``.
        converted: What had to be converted on the way.
    """

    image: Image.Image
    stored: str
    converted: tuple[str, ...]


def decode(path: Path) -> Image.Image:
    """The picture in ``path`` as 8-bit RGB, upright, on white, the first frame if it moves.

    Raises:
        UnreadableImage: the file cannot be read, is empty, truncated, too large or not an image.
    """
    return decode_bytes(read_bytes(path), path).image


def read_bytes(path: Path) -> bytes:
    """The content of ``path``.

    Raises:
        UnreadableImage: it cannot be read, is no regular file or too large to be a picture.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _LARGEST_FILE:
                raise UnreadableImage(path, "file too large")
            return file.read()
    except OSError as error:
        raise UnreadableImage(path, error.strerror or "cannot be read") from error


def decode_bytes(data: bytes, path: Path) -> Picture:
    """The picture in ``data``, which are those of ``path``; see ``decode``.

    Raises:
        UnreadableImage: as ``decode``.
    """
    with _quiet:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            large = image.width * image.height > _LARGE_PICTURE
            with _one_at_a_time if large else nullcontext():
                return _load(image)
        except UnidentifiedImageError as error:
            raise UnreadableImage(path, _describe_other(data)) from error
        except Image.DecompressionBombError as error:
            raise UnreadableImage(path, "image too large") from error
        except MemoryError as error:
            raise blame(path, error) from error
        except _DAMAGE as error:
            raise UnreadableImage(path, _describe_damage(data)) from error


def blame(path: Path, error: Exception) -> Exception:
    """What to raise for an ``error`` that came up while the image in ``path`` was worked on.

    That is the error itself where memory has run out, which is no fault of the image.
    """
    try:
        bytearray(_SOME_MEMORY)
    except MemoryError:
        return error
    large = isinstance(error, MemoryError)
    what = "needs too much memory" if large else f"cannot be worked on: {error!r}"
    return UnreadableImage(path, what)


def _load(image: Image.Image) -> Picture:
    stored = f"{image.format} {image.mode}"
    image.load()
    rgb, converted = _to_rgb(image)
    return Picture(rgb, stored, converted)


def _describe_damage(data: bytes) -> str:
    """How the bytes of an image, which cannot be decoded, are damaged."""
    file = _File(data)
    with suppress(*_DAMAGE):
        Image.open(file, formats=FORMATS).load()
    return "truncated image" if file.overrun else "unreadable image"


def _describe_other(data: bytes) -> str:
    """What a file is that no reader of pictures knows."""
    if not data:
        return "empty file"
    # The last character may be cut.
    text = data[:_SNIFFED].decode(errors="ignore")
    looks_like_text = all(char.isprintable() or char.isspace() for char in text)
    readable = len(text.encode()) > len(data[:_SNIFFED]) - 4
    return "not an image: looks like text" if looks_like_text and readable else "not an image"


class _File(io.BytesIO):
    """The bytes of a file, which remember whether a reader wanted more of them than there are."""

    overrun = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.overrun |= not data and size != 0
        return data


class _Quiet:
    """Silences Pillow's warnings while any thread is inside.

    ``catch_warnings`` swaps the filters of the whole process, so threads that overlap would restore
    them in the wrong order; here the first one in opens it and the last one out closes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    converted = []
    if _turn_upright(image):
        converted.append("turned upright by EXIF")
    if image.mode.startswith("I") or image.mode == "F":
        depth = "16-bit" if image.mode.startswith("I;16") else "32-bit"
        converted.append(f"{depth} grey, rescaled to 0-255")
        image = _to_eight_bits(image)
    if image.mode == "CMYK":
        converted.append("CMYK")
    if image.mode in {"RGBA", "RGBa", "LA", "PA"} or "transparency" in image.info:
        converted.append("transparent, put on white")
        image = _on_white(image)
    # A conversion to the same mode would copy.
    return image if image.mode == "RGB" else image.convert("RGB"), tuple(converted)


def _turn_upright(image: Image.Image) -> bool:
    """Turn ``image`` as its EXIF says, and tell whether it says so; broken EXIF says nothing."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
    except _DAMAGE:
        return False
    return turned


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The grey values on 0…255, from the range that they were recorded in."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = np.asarray(image, dtype=np.float64)
    low, high = _recorded_range(values[np.isfinite(values)], image.mode)
    scaled = (values.clip(low, high) - low) / ((high - low) or 1) * 255
    return Image.fromarray(np.nan_to_num(scaled).round().astype(np.uint8))


def _recorded_range(values: "NDArray[np.float64]", mode: str) -> tuple[float, float]:
    """The usual range that holds all ``values``; where none does, the values' own."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    # Pillow gives 16-bit values as "I" too, depending on the format and on its version.
    usual = (1.0, 255.0) if mode == "F" else (65535.0,)
    top = next((top for top in usual if low >= 0 and high <= top), None)
    return (low, high) if top is None else (0.0, top)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
