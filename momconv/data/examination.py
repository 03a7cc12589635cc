"""What is in each image file, found out once and remembered.

Reading and decoding a large folder takes minutes, and nothing changes between two runs. What was
found is therefore kept in a cache outside the data folder, one file for each folder of images, and
believed as long as the source identifies the file as the same.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL
from pydantic import BaseModel, ConfigDict, ValidationError

from momconv.data.decoding import UnreadableImage, decode_bytes, read_bytes
from momconv.data.source import Source
from momconv.data.values import Values
from momconv.errors import ResourceError
from momconv.files.atomic import write_text
from momconv.files.cache import cache_folder
from momconv.names import encode_name

_DECODER = f"2 Pillow {PIL.__version__}"  # the first number is to be raised when decoding changes

_Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is in one file.

    Attributes:
        sha256: Of its bytes; empty where they cannot be read.
        problem: Why it cannot be decoded; None if it can.
        stored: The format and mode in the file, such as ``JPEG CMYK``.
        size: Width and height in pixels, upright.
        converted: What had to be converted to get 8-bit RGB.
        values: What values it has, if not 8-bit ones.
    """

    sha256: str
    problem: str | None = None
    stored: str = ""
    size: tuple[int, int] = (0, 0)
    converted: tuple[str, ...] = ()
    values: Values | None = None


class _Cache(BaseModel):
    model_config = ConfigDict(extra="forbid")

    decoder: str
    files: dict[str, tuple[_Stamp, Finding]]  # by their paths below the folder


def examine_all(
    source: Source, paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> dict[Path, Finding]:
    """Return what is in each of ``paths``, which are the source's.

    ``progress`` is called with the number of files done and the number of all.
    """
    known = _recall(source.root)
    names = {path: encode_name(os.path.relpath(path, source.root)) for path in paths}
    stamps = {path: source.identify(path) for path in paths}
    found = {
        path: known[name][1]
        for path, name in names.items()
        if name in known and known[name][0] == stamps[path]
    }
    new = [path for path in paths if path not in found]
    for path, finding in _examine_new(source, new):
        found[path] = finding
        if progress:
            progress(len(found), len(paths))
    if settled := {names[path]: (stamp, found[path]) for path in new if (stamp := stamps[path])}:
        _remember(source.root, {**known, **settled})
    return {path: found[path] for path in paths}


def examine(path: Path, read: Callable[[Path], bytes] = read_bytes) -> Finding:
    """Return what is in ``path``."""
    sha256 = ""
    try:
        data = read(path)
        sha256 = hashlib.sha256(data).hexdigest()
        picture = decode_bytes(data, path)
    except UnreadableImage as error:
        return Finding(sha256, error.reason)
    size, converted = picture.image.size, picture.converted
    return Finding(sha256, None, picture.stored, size, converted, picture.values)


def _examine_new(source: Source, paths: Sequence[Path]) -> Iterator[tuple[Path, Finding]]:
    pool = ThreadPoolExecutor()
    try:
        yield from zip(paths, pool.map(partial(examine, read=source.read), paths), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted check must not decode all the rest


def _recall(root: Path) -> Mapping[str, tuple[_Stamp, Finding]]:
    try:
        cache = _Cache.model_validate_json(_cache_file(root).read_bytes())
    except (OSError, ValidationError):
        return {}
    return cache.files if cache.decoder == _DECODER else {}


def _remember(root: Path, files: Mapping[str, tuple[_Stamp, Finding]]) -> None:
    path, cache = _cache_file(root), _Cache(decoder=_DECODER, files=dict(files))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, cache.model_dump_json())
    except (OSError, ResourceError):
        return  # then it is found out again


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    return cache_folder() / "images" / f"{name}.json"
