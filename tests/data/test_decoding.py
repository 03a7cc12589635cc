import io
import os
import socket
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, Literal
from zlib import compress, crc32

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import save_picture
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from momconv.data import decoding
from momconv.data.decoding import UnreadableImage, decode, decode_bytes
from momconv.data.values import summarise
from momconv.errors import DataError
from momconv.zoo.description import ValueRanges

WHITE, RED = (255, 255, 255), (255, 0, 0)


def decode_and_explain(path: Path) -> tuple[Image.Image, tuple[str, ...]]:
    picture = decode_bytes(path.read_bytes(), path)
    return picture.image, picture.converted


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def grey(path: Path, values: list[float], kind: type) -> Path:
    """A TIFF with one row of grey values of that NumPy type."""
    return save(path, Image.fromarray(np.array([values], dtype=kind)))


def reds(image: Image.Image) -> list[int]:
    values: list[int] = np.asarray(image)[..., 0].ravel().tolist()
    return values


def test_plain_pictures_stay_as_they_are(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "plain.png")
    image, converted = decode_and_explain(path)
    assert image.mode == "RGB"
    assert image.tobytes() == Image.open(path).tobytes()
    assert converted == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (16, 8), "white")
    upright.putpixel((0, 0), RED)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image, converted = decode_and_explain(save(tmp_path / "photo.png", stored, exif=exif))
    assert image.tobytes() == upright.tobytes()
    assert converted == (("turned upright by EXIF",) if orientation > 1 else ())


def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    exif = b"Exif\0\0" + bytes(range(60))
    path = save(tmp_path / "photo.jpg", Image.new("RGB", (16, 8), "white"), exif=exif)
    assert decode(path).size == (16, 8)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 257, 32896, 65535], np.uint16, [0, 1, 128, 255]),
        ([0, 100, 200], np.uint16, [0, 0, 1]),
        ([0, 257, 65535], np.int32, [0, 1, 255]),
        ([-1000, 0, 1000], np.int32, [0, 128, 255]),
        ([0, 2**30, 2**31 - 1], np.int32, [0, 128, 255]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 0.25, 0.5], np.float32, [0, 64, 128]),
        ([0.0, 17.0, 255.0], np.float32, [0, 17, 255]),
        ([-5.0, 0.0, 5.0], np.float32, [0, 128, 255]),
        ([float("nan"), 0.5, float("inf")], np.float32, [0, 128, 255]),
        ([-7.0, -7.0], np.float32, [0, 0]),
        ([float("nan")], np.float32, [0]),
    ],
)
def test_deep_greys_are_rescaled_not_clipped(
    tmp_path: Path, values: list[float], kind: type, expected: list[int]
) -> None:
    image, converted = decode_and_explain(grey(tmp_path / "grey.tiff", values, kind))
    assert reds(image) == expected
    assert len(converted) == 1
    assert "grey, rescaled" in converted[0]


def test_a_16_bit_png_keeps_its_mean(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = decode(save(tmp_path / "grey.png", Image.fromarray(values)))
    assert np.asarray(image).mean() == pytest.approx(127.5, abs=0.5)


Order = Literal["<", ">"]


def deep_png(values: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))

    height, width, channels = values.shape
    colours = {3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def deep_tiff(values: NDArray[Any], order: Order, no_data: str = "") -> bytes:
    """An uncompressed TIFF of one or three channels, in little ("<") or big (">") endian."""
    height, width, channels = values.shape
    tags: list[tuple[int, str, list[int]]] = [
        *((256, "H", [width]), (257, "H", [height])),
        *((258, "H", [8 * values.itemsize] * channels), (259, "H", [1])),
        *((262, "H", [2 if channels == 3 else 1]), (273, "I", [0]), (277, "H", [channels])),
        *((278, "H", [height]), (279, "I", [values.nbytes]), (284, "H", [1])),
        (339, "H", [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels),
        *([(42113, "B", [*no_data.encode(), 0])] if no_data else []),
    ]
    entries, extra, start = b"", b"", 8 + 2 + 12 * len(tags) + 4
    size = sum(len(v) * struct.calcsize(k) for _, k, v in tags if len(v) * struct.calcsize(k) > 4)
    for tag, kind, numbers in tags:
        numbers = [start + size] if tag == 273 else numbers
        body = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(body) > 4:
            body, extra = struct.pack(f"{order}I", start + len(extra)), extra + body
        code = {"B": 2, "H": 3, "I": 4}[kind]
        entries += struct.pack(f"{order}HHI", tag, code, len(numbers)) + body.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4)
    return head + extra + values.astype(values.dtype.newbyteorder(order)).tobytes()


DEEP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(8, 8, 4)
TWELVE_BIT = ValueRanges(integers=(0, 4095))


@pytest.mark.parametrize("order", [None, "<", ">"])
def test_of_deep_colours_all_bits_are_used(tmp_path: Path, order: Order | None) -> None:
    colours = DEEP[..., :3]
    path = tmp_path / "deep"
    path.write_bytes(deep_tiff(colours, order) if order else deep_png(colours))
    expected = (colours / 4095 * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(decode(path, TWELVE_BIT)), expected)
    picture = decode_bytes(path.read_bytes(), path)
    assert picture.converted == ("16-bit colours, rescaled to 0-255",)
    assert picture.values == summarise(colours)


def test_deep_colours_may_be_transparent(tmp_path: Path) -> None:
    pixels = np.array([[[4095, 0, 0, 65535], [4095, 0, 0, 0]]], dtype=np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(deep_png(pixels))
    image = decode(path, TWELVE_BIT)
    assert [image.getpixel((n, 0)) for n in range(2)] == [RED, WHITE]


def test_values_are_scaled_by_the_range_of_the_network(tmp_path: Path) -> None:
    path = grey(tmp_path / "grey.tif", [0.0, 400.0, 2000.0, 2500.0, -9999.0], np.float32)
    picture = decode_bytes(path.read_bytes(), path, ValueRanges(floats=(0, 2000)))
    assert reds(picture.image) == [0, 51, 255, 255, 0]
    assert (picture.values, picture.outside) == (None, 2)


@pytest.mark.parametrize("order", ["<", ">"])
def test_what_a_tiff_says_is_no_data_is_black_and_not_counted(tmp_path: Path, order: Order) -> None:
    values = np.array([[[100.0], [3e38], [150.0]]], dtype=np.float32)
    path = tmp_path / "grey.tif"
    path.write_bytes(deep_tiff(values, order, no_data="3e+38"))
    picture = decode_bytes(path.read_bytes(), path, ValueRanges(floats=(0, 200)))
    assert reds(picture.image) == [128, 0, 191]
    assert picture.outside == 0


def test_integers_without_a_sign_are_not_negative(tmp_path: Path) -> None:
    path = tmp_path / "grey.tif"
    path.write_bytes(deep_tiff(np.array([[[0], [2**31], [2**32 - 1]]], dtype=np.uint32), "<"))
    assert reds(decode(path, ValueRanges(integers=(0, 2**32 - 1)))) == [0, 128, 255]


def test_an_unsupported_tiff_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "grey.tif"
    path.write_bytes(deep_tiff(np.ones((2, 2, 1)), "<"))
    with pytest.raises(UnreadableImage, match="unsupported kind of TIFF"):
        decode(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    image, converted = decode_and_explain(save(tmp_path / "logo.png", picture.convert(mode)))
    assert reds(image) == [255, 0]
    assert converted == ("transparent, put on white",)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    path = save(tmp_path / "veil.png", Image.new("RGBA", (1, 1), (255, 0, 0, 127)))
    assert decode(path).getpixel((0, 0)) == (255, 128, 128)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = save(tmp_path / "print.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    image, converted = decode_and_explain(path)
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 4
    assert converted == ("CMYK",)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp"])
def test_of_a_moving_picture_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert decode(path).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_simple_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "simple.png", Image.new("RGB", (4, 4), "white").convert(mode))
    assert decode(path).getpixel((0, 0)) == WHITE


def photograph(suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image: looks like text"),
        (b"\x7fELF\x02\x01\x01" + bytes(99), "not an image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "not an image: looks like text",
        ),
        (photograph("jpeg")[:-110], "truncated image"),
        (photograph("png")[:-110], "truncated image"),
        (photograph("gif")[:-110], "truncated image"),
        (photograph("bmp")[:-110], "truncated image"),
        (photograph("png")[:60] + bytes(500) + photograph("png")[560:], "unreadable image"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        decode(path)
    assert caught.value.message == f"{path}: {reason}"
    assert caught.value.kind == "data.unreadable_image"
    assert caught.value.fix


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: No such file"):
        decode(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_picture(tmp_path / "bomb.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_999)
    with pytest.raises(DataError, match="too large"):
        decode(path)


def test_pillows_warnings_do_not_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_picture(tmp_path / "large.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(path)
    assert decode(path).size == (100, 100)


def test_the_filters_of_warnings_survive_overlapping_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_picture(tmp_path / f"{n}.png", n, size=(100, 100)) for n in range(2)]
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    read, first_bytes = Image.open, paths[0].read_bytes()

    def read_in_turns(file: io.BytesIO, formats: tuple[str, ...]) -> Image.Image:
        if file.getvalue() == first_bytes:
            first_is_in.set()
            assert second_is_in.wait(20)
        else:
            second_is_in.set()
            assert first_is_out.wait(20)
        return read(file, formats=formats)

    monkeypatch.setattr(Image, "open", read_in_turns)
    before = list(warnings.filters)
    first, second = (threading.Thread(target=decode, args=[path]) for path in paths)
    first.start()
    assert first_is_in.wait(20)
    second.start()
    first.join()
    first_is_out.set()
    second.join()
    assert list(warnings.filters) == before


def test_all_real_photographs_decode(shared: Path) -> None:
    paths = sorted((shared / "data/hymenoptera/val/ants").iterdir())
    assert len(paths) == 70
    assert {decode(path).mode for path in paths} == {"RGB"}


def make_special(path: Path, kind: str) -> Path:
    """A file that would be waited for, or has no end."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    else:
        path.symlink_to(kind)
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "link to a pipe", "/dev/zero", "/dev/random", "/dev/null"]
)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="not a regular file"):
        decode(make_special(tmp_path / "0.png", kind))


def test_an_image_that_takes_too_much_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Image.Image) -> None:
        raise MemoryError

    path = save_picture(tmp_path / "large.png")
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(UnreadableImage, match="needs too much memory"):
        decode(path)


def test_memory_that_has_run_out_is_not_blamed_on_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    path = save_picture(tmp_path / "small.png")
    monkeypatch.setattr(PngImageFile, "load", fail)
    monkeypatch.setattr(decoding, "bytearray", fail, raising=False)
    with pytest.raises(MemoryError):
        decode(path)
