import io
import os
import socket
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from pictures import save_picture
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from momconv.data import decoding
from momconv.data.decoding import UnreadableImage, decode, decode_bytes
from momconv.errors import DataError

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
