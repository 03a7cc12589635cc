"""What is in each image file, found out once and remembered.

Reading and decoding a large folder takes hours, and nothing changes between two runs. What was
found is therefore kept in a cache outside the data folder, one file for each folder of images, and
believed as long as the source identifies the file as the same. Processes that look at parts of a
folder add to the same cache.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from filelock import FileLock
from pydantic import TypeAdapter

from momconv.data.decoding import UnreadableImage, decode_bytes, read_bytes
from momconv.data.findings import Finding, Findings, split_rows
from momconv.data.source import Source
from momconv.errors import ResourceError
from momconv.files.atomic import write_atomically
from momconv.files.cache import cache_folder
from momconv.names import name_below

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DECODER = f"2 Pillow {PIL.__version__}"  # the first number is to be raised when decoding changes
_STAMP = 16  # bytes that stand for what identifies a file
_UNKNOWN = bytes(_STAMP)
_AT_ONCE = 2**16  # files, after which what was found is remembered
_PIECE = 16  # files that a thread takes
_KINDS = TypeAdapter(tuple[Finding, ...])


@dataclass(frozen=True, slots=True)
class _Cache:
    """What was found in files, by their names below their folder, and their stamps at that time."""

    findings: Findings
    stamps: bytes

    def find(self, names: Sequence[str], stamps: bytes) -> "NDArray[np.int64]":
        """Return the row of each of ``names``; -1 where its stamp was another, if it is known."""
        rows, now = self.findings.find(names), split_rows(stamps, _STAMP)
        then = split_rows(self.stamps + _UNKNOWN, _STAMP)[rows]
        return np.where((then == now).all(1) & now.any(1), rows, -1)

    def select(self, names: Sequence[str]) -> "_Cache":
        """Return what it has on ``names``, which it has."""
        rows = self.findings.find(names)
        stamps = split_rows(self.stamps, _STAMP)[rows].tobytes()
        return _Cache(self.findings.take(rows), stamps)

    def __or__(self, newer: "_Cache") -> "_Cache":
        """Return what is in both; the ``newer`` one is right."""
        renewed = set(newer.findings.names)
        kept = self.select([name for name in self.findings.names if name not in renewed])
        return _Cache(kept.findings | newer.findings, kept.stamps + newer.stamps)


def examine_all(
    source: Source, paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> Findings:
    """Return what is in each of ``paths``, which are the source's.

    ``progress`` is called with the number of files done and the number of all.
    """
    named = {name_below(path, source.root): path for path in paths}
    names = [*named]
    stamps = b"".join(_stamp(source.identify(path)) for path in named.values())
    cache = _recall(source.root)
    rows = cache.find(names, stamps)
    found, new = cache.findings.take(rows[rows >= 0]), np.flatnonzero(rows < 0).tolist()
    for start in range(0, len(new), _AT_ONCE):
        piece = new[start : start + _AT_ONCE]
        examined = list[tuple[str, Finding]]()
        for pair in _examine_new(source, {names[n]: named[names[n]] for n in piece}):
            examined.append(pair)
            if progress:
                progress(len(found) + len(examined), len(names))
        fresh = Findings.collect(examined)
        found |= fresh
        _remember(source.root, _Cache(fresh, split_rows(stamps, _STAMP)[piece].tobytes()))
    return (found.select(names) if new else found).rename(map(str, named.values()))


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


def _examine_new(source: Source, named: Mapping[str, Path]) -> Iterator[tuple[str, Finding]]:
    pool, paths = ThreadPoolExecutor(), [*named.values()]
    pieces = [paths[start : start + _PIECE] for start in range(0, len(paths), _PIECE)]
    try:
        findings = chain.from_iterable(pool.map(partial(_examine_some, source), pieces))
        yield from zip(named, findings, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted check must not decode all the rest


def _examine_some(source: Source, paths: Iterable[Path]) -> list[Finding]:
    return [examine(path, source.read) for path in paths]


def _stamp(identity: tuple[int, ...] | None) -> bytes:
    if identity is None:
        return _UNKNOWN
    return hashlib.blake2b(repr(identity).encode(), digest_size=_STAMP).digest()


def _recall(root: Path) -> _Cache:
    """Return what is remembered of the images below ``root``."""
    try:
        with np.load(_cache_file(root)) as arrays:
            text = {name: arrays[name].tobytes() for name in ("names", "decoder", "kinds")}
            if text["decoder"].decode() != _DECODER:
                return _EMPTY
            findings = Findings(
                text["names"].decode().split("\0") if text["names"] else [],
                arrays["digests"].tobytes(),
                arrays["sizes"],
                arrays["kind"],
                _KINDS.validate_json(text["kinds"]),
            )
            return _Cache(findings, arrays["stamps"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _EMPTY


def _remember(root: Path, found: _Cache) -> None:
    """Add what was ``found`` in those of the files that can be identified."""
    stamps = split_rows(found.stamps, _STAMP)
    can_be: list[bool] = (stamps != 0).any(1).tolist()
    if not any(can_be):
        return
    path = _cache_file(root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with suppress(OSError):  # without locks, some of what another process adds may be lost
                held.enter_context(FileLock(path.with_suffix(".lock")))
            every = _recall(root) | found.select(list(compress(found.findings.names, can_be)))
            write_atomically(path, partial(_write, every))
    except (OSError, ResourceError):
        return  # then it is found out again


def _write(cache: _Cache, path: Path) -> None:
    findings = cache.findings
    text = {
        "names": "\0".join(findings.names).encode(),
        "decoder": _DECODER.encode(),
        "kinds": _KINDS.dump_json(findings.kinds),
        "digests": findings.digests,
        "stamps": cache.stamps,
    }
    arrays: dict[str, Any] = {k: np.frombuffer(content, np.uint8) for k, content in text.items()}
    with path.open("wb") as file:
        np.savez(file, sizes=findings.sizes, kind=findings.kind, **arrays)


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    return cache_folder() / "images" / f"{name}.npz"


_EMPTY = _Cache(Findings.collect(()), b"")
