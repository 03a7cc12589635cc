"""One way from an image file to pixels, for training, evaluation and prediction alike.

Pillow's plain ``convert("RGB")`` turns 16-bit pictures white, transparent ones arbitrary and leaves
photographs lying on their side; ``decode`` does not. Of 16-bit colours it keeps the upper 8 bits,
which may be all zero.
"""

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from momconv.data.values import Values, guess_range, summarise, to_eight_bits
from momconv.errors import DataError
from momconv.opening import open_regular
from momconv.words import printable
from momconv.zoo.description import ValueRange, ValueRanges

if TYPE_CHECKING:
    from numpy.typing import NDArray

Image.init()
# Formats that Pillow names but that hold no pixels it can read by itself. (EPS starts Ghostscript.)
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
_COMMON = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # tried first: each has a signature
FORMATS = (*_COMMON, *(name for name in Image.ID if name not in {*_COMMON, *_NOT_PICTURES}))
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name not in _NOT_PICTURES
)

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

_BITS, _SAMPLE_FORMAT, _GDAL_NO_DATA = 258, 339, 42113  # tags of a TIFF
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how one begins
_NONE = ValueRanges()


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
        values: What values it has, if not 8-bit ones and no range was given for them.
        outside: How many of them were outside of their range.
    """

    image: Image.Image
    stored: str
    converted: tuple[str, ...]
    values: Values | None = None
    outside: int = 0


def read_bytes(path: Path) -> bytes:
    """Return the content of ``path``.

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


def decode(
    path: Path, ranges: ValueRanges = _NONE, read: Callable[[Path], bytes] = read_bytes
) -> Image.Image:
    """Return the image in ``path`` as 8-bit RGB, upright, on white, the first frame if it moves.

    Values that are not 8-bit are black to white in ``ranges``, or else in the range that is usual.

    Raises:
        UnreadableImage: the file cannot be read, is empty, truncated, too large or not an image.
    """
    return decode_bytes(read(path), path, ranges).image


def decode_bytes(data: bytes, path: Path, ranges: ValueRanges = _NONE) -> Picture:
    """Return the picture in ``data``, which are those of ``path``; see ``decode``.

    Raises:
        UnreadableImage: as ``decode``.
    """
    with _quiet:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            large = image.width * image.height > _LARGE_PICTURE
            with _one_at_a_time if large else nullcontext():
                return _load(image, _open_lower_bytes(image, data), ranges)
        except UnidentifiedImageError as error:
            raise UnreadableImage(path, _describe_other(data)) from error
        except Image.DecompressionBombError as error:
            raise UnreadableImage(path, "image too large") from error
        except MemoryError as error:
            raise blame(path, error) from error
        except _DAMAGE as error:
            raise UnreadableImage(path, _describe_damage(data)) from error


def blame(path: Path, error: Exception) -> Exception:
    """Return what to raise for an ``error`` that came up while the image in ``path`` was worked on.

    That is the error itself where memory has run out, which is no fault of the image.
    """
    try:
        bytearray(_SOME_MEMORY)
    except MemoryError:
        return error
    large = isinstance(error, MemoryError)
    what = "needs too much memory" if large else f"cannot be worked on: {error!r}"
    return UnreadableImage(path, what)


def read_values(path: Path) -> Values | None:
    """Return what values the image in ``path`` has, if not 8-bit ones and if it can be read."""
    try:
        data = read_bytes(path)
        with _quiet:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        return decode_bytes(data, path).values if _is_deep(image) else None
    except (UnreadableImage, Image.DecompressionBombError, *_DAMAGE):
        return None


def _is_deep(image: ImageFile) -> bool:
    grey = image.mode.startswith("I") or image.mode == "F"
    return grey or any(_swap_bytes(tile.args) != tile.args for tile in image.tile)


def _load(image: ImageFile, lower: Image.Image | None, ranges: ValueRanges) -> Picture:
    stored, deep = f"{image.format} {image.mode}", _is_deep(image)
    image.load()
    converted = ["turned upright by EXIF"] if _turn_upright(image) else []
    upright: Image.Image = image
    values, outside = None, 0
    if deep:
        array, no_data = _read_values(image, lower), _read_no_data(image)
        bounds = ranges.floats if array.dtype.kind == "f" else ranges.integers
        if bounds is None:
            values = summarise(array, no_data)
            bounds = guess_range(values)
        converted.append(f"{_name_values(image, lower)}, rescaled to 0-255")
        upright, outside = _to_eight_bits(image, array, bounds, no_data)
    rgb, more = _to_rgb(upright)
    return Picture(rgb, stored, (*converted, *more), values, outside)


def _open_lower_bytes(image: ImageFile, data: bytes) -> Image.Image | None:
    """Return the lower bytes of 16-bit colours, which Pillow drops; None of other images.

    It takes those that it gets in the other order of bytes for the upper ones.
    """
    if all(_swap_bytes(tile.args) == tile.args for tile in image.tile):
        return None
    lower = Image.open(io.BytesIO(data), formats=FORMATS)
    lower.tile = [tile._replace(args=_swap_bytes(tile.args)) for tile in lower.tile]
    lower.load()
    _turn_upright(lower)
    return lower


def _swap_bytes(arguments: Any) -> Any:
    """Return the arguments of one of Pillow's decoders, for the other order of bytes."""
    if isinstance(arguments, tuple):
        return tuple(map(_swap_bytes, arguments))
    if not isinstance(arguments, str) or not arguments.startswith(("RGB;16", "RGBA;16")):
        return arguments
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    return arguments[:-1] + other[arguments[-1]]


def _describe_damage(data: bytes) -> str:
    """Return how the bytes of an image, which cannot be decoded, are damaged."""
    file = _File(data)
    with suppress(*_DAMAGE):
        Image.open(file, formats=FORMATS).load()
    return "truncated image" if file.overrun else "unreadable image"


def _describe_other(data: bytes) -> str:
    """Return what a file is that no reader of pictures knows."""
    if not data:
        return "empty file"
    if data[:4] in _TIFF:
        return "unsupported kind of TIFF, such as one of 64-bit or of many channels"
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


def _read_values(image: Image.Image, lower: Image.Image | None) -> "NDArray[Any]":
    """Return the values of a grey image, or those of 16-bit colours."""
    values: NDArray[Any] = np.asarray(image)
    if lower is not None:
        upper: NDArray[Any] = values[..., :3].astype(np.uint16)
        upper <<= 8
        upper |= np.asarray(lower)[..., :3]
        return upper
    tags = _read_tags(image)
    unsigned = tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,)
    # Pillow takes those without a sign for such with one.
    return values.view(np.uint32) if image.mode == "I" and unsigned else values


def _read_no_data(image: Image.Image) -> float | None:
    """Return the value that stands for no data by what the file says, as GDAL writes it."""
    try:
        value = float(str(_read_tags(image).get(_GDAL_NO_DATA)).strip(" \0"))
    except ValueError:
        return None
    # As it is in the file's precision.
    return float(np.float32(value)) if image.mode == "F" else value


def _read_tags(image: Image.Image) -> Mapping[int, Any]:
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _name_values(image: Image.Image, lower: Image.Image | None) -> str:
    if lower is not None:
        return "16-bit colours"
    return "16-bit grey" if image.mode.startswith("I;16") else "32-bit grey"


def _to_eight_bits(
    image: Image.Image, values: "NDArray[Any]", bounds: ValueRange, no_data: float | None
) -> tuple[Image.Image, int]:
    """Return the image with its ``values`` on 0…255 from ``bounds``, and how many were outside."""
    levels, outside = to_eight_bits(values, bounds, no_data)
    scaled = Image.fromarray(levels)
    if image.mode == "RGBA":
        scaled.putalpha(image.getchannel("A"))
    return scaled, outside


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
